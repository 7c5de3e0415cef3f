"""One node's K/V memory: the books, the tensors they speak of, and the lock that keeps the two one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor

from infinillm.attention.store import Store, build_table
from infinillm.core.blocks import OWN, Blocks
from infinillm.core.holding import Holding, slots
from infinillm.core.layout import firsts
from infinillm.core.types import NodeId, Part, Plan, Refused, Stretch
from infinillm.errors import Broken
from infinillm.kernels.reference import Table

MOST_ROWS = 1 << 20  # of one part: far more than any step computes


class Work(NamedTuple):
    """A node's share of one step, as tensors: the same for all layers.

    rows   query rows it answers
    kept   K/V rows it stores
    table  which query rows look at which blocks
    slots  [kept] int64, where the K/V rows go
    """

    rows: int
    kept: int
    table: Table
    slots: Tensor


class Memory:
    """Books and store of one node. Every use of the books happens under `lock`."""

    def __init__(self, blocks: Blocks, store: Store):
        self.blocks, self.store, self.lock = blocks, store, RLock()
        self._kept, self._kept_until = 0, 0.0

    def keep_back(self, blocks: int, until: float) -> None:
        """Admit nothing of our own to so many blocks before then: a borrower that saves up is to have them."""
        self._kept, self._kept_until = blocks, until

    def kept_back(self, now: float) -> int:
        return self._kept if now < self._kept_until else 0

    @property
    def held_by_others(self) -> bool:
        """Whether sequences of other nodes lie here."""
        with self.lock:
            return any(self.blocks.holders(borrower) for borrower in self.blocks.loans)

    def accept(self, plan: Plan, owner: NodeId) -> Refused | None:
        """Let go of and reserve what a plan says, in this order; stops at the first refusal."""
        with self.lock:
            if sum(each.blocks for each in (*plan.leave, *plan.take, *plan.give)) > 3 * self.blocks.count:
                return Refused(f"a plan moves more blocks than {self.blocks.node} has")
            for change, stretches in (
                (self.blocks.leave, plan.leave),
                (self.blocks.grow, plan.grow),
                (self.blocks.stage, plan.take),
            ):
                for each in stretches:
                    if refused := change(each.seq, each.first, each.blocks, owner):
                        return refused
        return None

    def adopt(self, stretches: Iterable[Stretch], owner: NodeId = OWN) -> None:
        """What was staged for these has come."""
        with self.lock:
            for seq in {each.seq for each in stretches}:
                self.blocks.adopt(seq, owner)

    def found(self, stretches: Iterable[Stretch], owner: NodeId = OWN, *, staged: bool) -> list[int]:
        """Which blocks of the store these are. Raises Broken where one is not here."""
        ids: list[int] = []
        with self.lock:
            for seq, first, blocks in stretches:
                holding = (self.blocks.staged if staged else self.blocks.holding)(seq, owner) or Holding()
                where = dict(zip(holding.firsts, holding.blocks, strict=True))
                ats = firsts(first, blocks, self.blocks.block_size)
                if blocks > len(where) or not where.keys() >= set(ats):
                    raise Broken(f"{self.blocks.node} has not {blocks} blocks of {seq} from position {first} on")
                ids += [where[at] for at in ats]
        return ids

    def work(self, parts: Sequence[Part], owner: NodeId = OWN) -> Work:
        """The tensors of one step's parts.

        Raises Broken where the asker believes in other blocks than are here: an answer would be silently wrong.
        """
        asked: list[range] = []
        held: list[tuple[list[int], list[int]]] = []
        kept: list[int] = []
        with self.lock:
            size = self.blocks.block_size
            for part in parts:
                if part.stop - part.start > MOST_ROWS or part.keep_stop - part.keep_start > MOST_ROWS:
                    raise Broken(f"a part of {part.seq} has more than {MOST_ROWS} rows")
                holding = self.blocks.holding(part.seq, owner) or Holding()
                if part.start < part.stop:
                    seen = bisect_left(holding.firsts, part.stop)
                    if seen != part.holds:
                        raise Broken(f"{self.blocks.node} holds {seen} blocks of {part.seq}, not {part.holds}")
                    asked.append(range(part.start, part.stop))
                    held.append((holding.blocks[:seen], holding.firsts[:seen]))
                if part.keep_start < part.keep_stop:
                    try:
                        kept.extend(slots(holding, range(part.keep_start, part.keep_stop), size))
                    except KeyError as first:
                        raise Broken(f"{self.blocks.node} has no block of {part.seq} at position {first}") from None
        table = build_table(asked, held, self.store.device)
        where = torch.tensor(kept, dtype=torch.int64, device=self.store.device)
        return Work(len(table.positions), len(kept), table, where)
