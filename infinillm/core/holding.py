"""Blocks of one sequence on one node, by the position of their first slot."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Holding:
    """The positions, ascending, the block of each, and at which of them it is shared with the node."""

    firsts: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    guests: set[int] = field(default_factory=set)

    def insert(self, positions: Sequence[int], blocks: Sequence[int]) -> None:
        """Hold blocks at positions where there were none."""
        if positions and (not self.firsts or positions[0] > self.firsts[-1]):
            self.firsts.extend(positions)
            self.blocks.extend(blocks)
            return
        for first, block in zip(positions, blocks, strict=True):
            at = bisect_left(self.firsts, first)
            assert self.firsts[at : at + 1] != [first], (first, self.firsts)
            self.firsts.insert(at, first)
            self.blocks.insert(at, block)


def slots(holding: Holding, positions: Iterable[int], block_size: int) -> list[int]:
    """Where in the pool the tokens at these positions go: block * block_size + offset."""
    where = dict(zip(holding.firsts, holding.blocks, strict=True))
    return [where[p - p % block_size] * block_size + p % block_size for p in positions]
