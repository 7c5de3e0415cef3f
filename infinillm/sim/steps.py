"""Steps of a simulated worker: many alike in hand at once, and tokens of which only the number is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from infinillm.core.types import Grow, Step


class Totals(NamedTuple):
    """What all workers have done so far."""

    preemptions: int  # requests that gave way
    moved: int  # tokens of K/V
    steps: int
    rows: int  # requests in all steps


class Length:
    """The tokens of a sequence, of which only the number is known."""

    __slots__ = ("count",)

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def append(self, token: int) -> None:
        self.count += 1


@dataclass(slots=True)
class Going:
    """Steps alike in hand: the first takes `first` seconds, each next one `more` than the one before."""

    step: Step
    began: float
    times: int
    first: float
    more: float
    decodes: bool  # every chunk is the last token of its sequence
    grows: list[tuple[int, Grow]] = field(
        default_factory=list
    )  # blocks of later steps, by how many were before, last first
    passed: int = 0  # steps that are over

    def seconds(self, times: int) -> float:
        return times * self.first + self.more * times * (times - 1) / 2

    def over(self, now: float) -> int:
        """How many are over by now; the last one is for `_end` to count."""
        gone, first, more = now - self.began, self.first, self.more
        if gone < first or self.times == 1:
            return 0
        if more <= 0:
            count = int(gone / first)
        else:
            half = first - more / 2
            count = int((math.sqrt(half * half + 2 * more * gone) - half) / more)
        count = min(max(count, 0), self.times - 1)
        while count and self.seconds(count) > gone:
            count -= 1
        return count

    def pass_over(self, times: int) -> None:
        self.began += self.seconds(times)
        self.first += self.more * times
        self.times -= times
        self.passed += times
