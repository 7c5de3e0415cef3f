"""A shard's question: attention over everything a step's sequences have, wherever it lies.

`PooledAttention` is the `attend` a model calls. Per layer it sends every remote node of the step's plans its query
rows (and K/V rows to keep), computes its own partial while the wire works, and merges the remote partials as they
arrive. What it sends per decoded token does not depend on the context. Blocks that move travel with the questions and
the answers, as they lie in the stores.

What a node says is believed, but for two things that cost microseconds to see: numbers that are not finite, and answers
that are out of step (the last one ends with the number of the step, so a node that says too much or too little is found
out before the step counts). Such a node is lost, with all it holds, and not asked for memory again for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import NoReturn

import torch
from torch import Tensor

from infinillm.core.types import Chunk, NodeId, Part, Plan, SeqId
from infinillm.errors import NodeLost, PortClosed
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory, Work
from infinillm.telemetry import Metrics
from infinillm.transport.base import Port


@dataclass(slots=True)
class Share:
    """One node's rows of a step. `None` for rows or kept means all of them, in order."""

    node: NodeId
    rows: Tensor | None
    kept: Tensor | None
    row_count: int
    kept_count: int


@dataclass(slots=True)
class Exchange:
    """What goes to one remote node and comes back, in every layer of a step: rows, and blocks of our store.

    `echo` is the number of the step, which comes back with the last layer: all before it was heard and answered.
    """

    share: Share
    port: Port
    o: Tensor
    lse: Tensor
    taken: list[int]
    given: list[int]
    step: int
    echo: Tensor


class PooledAttention:
    """`attend(layer, q, k, v) -> o` over everything a step's sequences have, wherever it lies."""

    def __init__(self, home: NodeId, memory: Memory, lenders: Lenders, metrics: Metrics):
        self.home, self.memory, self.lenders, self.metrics = home, memory, lenders, metrics
        self.local: tuple[Share, Work] | None = None
        self.remote: list[Exchange] = []
        self.told: set[NodeId] = set()  # who heard, or should have heard, of the step in hand

    def begin(self, chunks: Sequence[Chunk], plans: Mapping[NodeId, Plan]) -> None:
        """Announce the plans, and fix the shapes of this step. Raises NodeLost."""
        shape, store = self.memory.store.shape, self.memory.store
        total = sum(chunk.stop - chunk.start for chunk in chunks)
        self.local, self.remote, self.told = None, [], set(plans)
        for node, plan in plans.items():
            share = _share(node, chunks, plan.parts, total, store.device)
            if node == self.home:
                self.local = (share, self.memory.work(plan.parts))
                continue
            talk = self.lenders.conversation(node)
            talk.announce(plan)
            taken = self.memory.found(plan.take, staged=False)
            given = self.memory.found(plan.give, staged=True)
            if share.row_count or share.kept_count or taken or given:
                o = torch.empty(share.row_count, shape.heads, shape.head_dim, dtype=store.dtype, device=store.device)
                lse = torch.empty(share.row_count, shape.heads, dtype=torch.float32, device=store.device)
                echo = torch.empty(1, dtype=torch.int64, device=store.device)
                self.remote.append(Exchange(share, talk.port, o, lse, taken, given, plan.step, echo))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k, v [T, K, D] after RoPE, contiguous; returns o [T, H, D]. Raises NodeLost."""
        store = self.memory.store
        for to in self.remote:
            share = to.share
            rows = [_pick(q, share.rows), _pick(k, share.kept), _pick(v, share.kept)]
            try:
                to.port.send([*rows, *store.whole(layer, to.taken)])
            except PortClosed as closed:
                raise NodeLost(closed.message, node=share.node) from closed
        o, lse = self._here(layer, q, k, v)
        for to in self.remote:
            share, theirs, their_lse = to.share, to.o, to.lse
            last = layer == store.shape.layers - 1
            if not (share.row_count or to.given or last):
                continue
            waited = time.perf_counter()
            try:
                to.port.recv([theirs, their_lse, *store.whole(layer, to.given), *[to.echo] * last])
            except PortClosed as closed:
                raise NodeLost(closed.message, node=share.node) from closed
            self.metrics.observe("port_wait_seconds", time.perf_counter() - waited, peer=share.node)
            if last and int(to.echo) != to.step:
                self._doubt(share.node, f"its answers end with {int(to.echo)}, not with step {to.step}")
            if not share.row_count:
                continue
            if not (isfinite(theirs.sum(dtype=torch.float32)) and their_lse.amax() < inf) and isfinite(q.float().sum()):
                self._doubt(share.node, "its numbers are not finite, though those it was asked with are")
            merge = store.body.merge
            if share.rows is None:
                o, lse = merge(o, lse, theirs, their_lse)
            else:
                o[share.rows], lse[share.rows] = merge(o[share.rows], lse[share.rows], theirs, their_lse)
        return o

    def _doubt(self, node: NodeId, reason: str) -> NoReturn:
        self.lenders.doubt(node)
        raise NodeLost(f"{node} answers nonsense: {reason}", node=node)

    def _here(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        store = self.memory.store
        if self.local is not None:
            share, work = self.local
            if share.kept_count:
                store.write(layer, _pick(k, share.kept), _pick(v, share.kept), work.slots)
            if share.rows is None:
                return store.attend(layer, q, work.table)
        o = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
        if self.local is not None and share.row_count:
            o[share.rows], lse[share.rows] = store.attend(layer, _pick(q, share.rows), work.table)
        return o, lse


def _share(node: NodeId, chunks: Sequence[Chunk], parts: Sequence[Part], total: int, device: torch.device) -> Share:
    offsets: dict[SeqId, int] = {}
    at = 0
    for chunk in chunks:
        offsets[chunk.seq] = at - chunk.start
        at += chunk.stop - chunk.start
    rows = _index([(offsets[p.seq] + p.start, offsets[p.seq] + p.stop) for p in parts])
    kept = _index([(offsets[p.seq] + p.keep_start, offsets[p.seq] + p.keep_stop) for p in parts])
    return Share(node, _tensor(rows, total, device), _tensor(kept, total, device), len(rows), len(kept))


def _index(ranges: Iterable[tuple[int, int]]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


def _tensor(index: list[int], total: int, device: torch.device) -> Tensor | None:
    return None if index == list(range(total)) else torch.tensor(index, dtype=torch.int64, device=device)


def _pick(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)
