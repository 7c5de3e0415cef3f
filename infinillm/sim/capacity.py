"""How much a cluster can take: the highest rate of requests at which it keeps an objective.

An objective bounds figures of each request, of which it wants some share to keep all bounds, or of all requests in the
mean, as LoongServe's evaluation does (section 7). It is written `ttft=2,tpot=0.1` or `mean-per-token=0.07`, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from infinillm.errors import BadRequest
from infinillm.sim.simulation import Ending

FIGURES: Mapping[str, Callable[[Ending], float]] = {
    "ttft": lambda ending: ending.first - ending.asked,
    "tpot": lambda ending: (ending.last - ending.first) / max(ending.output - 1, 1),
    "latency": lambda ending: ending.last - ending.asked,
    "per-token": lambda ending: (ending.last - ending.asked) / (ending.prompt + ending.output),
    "per-input": lambda ending: (ending.first - ending.asked) / ending.prompt,
}
MEAN = "mean-"
WITHIN = 0.02  # of the rate that is searched for
FAR = 2.0**12  # from the rate it begins with, at most


@dataclass(frozen=True, slots=True)
class Objective:
    """Most seconds of figures: of each request, for this share of them at least, and of all in the mean."""

    each: Mapping[str, float]
    means: Mapping[str, float]
    share: float


def objective(text: str, share: float) -> Objective:
    """What `--slo` says. Raises BadRequest."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name.removeprefix(MEAN) not in FIGURES:
            known = ", ".join(FIGURES)
            raise BadRequest(f"--slo has figures {known}, each also as {MEAN}..., not {name!r}", field="slo")
        try:
            most = float(number)
        except ValueError:
            most = math.nan
        if not (most > 0 and math.isfinite(most)) or name in found:
            raise BadRequest(
                f"--slo gives each figure once, in seconds above 0, as {name}=2, not {part!r}", field="slo"
            )
        found[name] = most
    means = {name.removeprefix(MEAN): most for name, most in found.items() if name.startswith(MEAN)}
    return Objective({name: most for name, most in found.items() if not name.startswith(MEAN)}, means, share)


@dataclass(slots=True)
class Judge:
    """How well an objective is kept by requests that end one after the other, `count` in all."""

    objective: Objective
    count: int
    kept: int = 0
    missed: int = 0
    served: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, ending: Ending) -> None:
        wanted = self.objective
        if ending.refused or any(FIGURES[name](ending) > most for name, most in wanted.each.items()):
            self.missed += 1
        else:
            self.kept += 1
        if not ending.refused:
            self.served += 1
            for name in wanted.means:
                self.sums[name] = self.sums.get(name, 0.0) + FIGURES[name](ending)

    @property
    def share(self) -> float:
        """Of those that ended, the share that kept all bounds."""
        return self.kept / max(self.kept + self.missed, 1)

    @property
    def good(self) -> bool:
        """Whether those that ended keep the objective."""
        means = self.objective.means.items()
        mean = all(self.sums.get(name, 0.0) <= most * self.served for name, most in means)
        return self.share >= self.objective.share and mean

    @property
    def hopeless(self) -> bool:
        """Whether nothing that is still to come can mend it."""
        return self.missed > round((1 - self.objective.share) * self.count, 9) or any(
            self.sums.get(name, 0.0) > most * self.count for name, most in self.objective.means.items()
        )


def highest(keeps: Callable[[float], bool], start: float) -> tuple[float, float]:
    """The highest rate that was seen to be kept, and the lowest above it that was not; 0 or infinite for none.

    From `start` it goes up or down in doublings until it has both, and then between them until they are `WITHIN` of
    each other. Where more is kept than less, as may happen, it finds one of several such pairs.
    """
    low, high, rate = 0.0, math.inf, start
    while (low == 0 or high == math.inf) and start / FAR <= rate <= start * FAR:
        if keeps(rate):
            low, rate = rate, 2 * rate
        else:
            high, rate = rate, rate / 2
    while low > 0 and high < math.inf and high > low * (1 + WITHIN):
        rate = math.sqrt(low * high)
        if keeps(rate):
            low = rate
        else:
            high = rate
    return low, high
