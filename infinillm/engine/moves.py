"""The moves of one engine: blocks of running sequences that go to another node beside the steps.

Theory of operation. A move is reserve, copy, switch, free. Between two steps `reserve` chooses among the wishes, and
holds blocks at the other end: staged, so that no question sees them. The plans of the step say what to take and give,
and the blocks travel layer by layer with the questions and answers. Only after the whole pass succeeded, `switch` makes
them the sequence's, changes its layout, and lets go of the source: at home at once, at a lender by the next plan. A
pass that failed calls `abandon`: nothing was changed, and all wishes are forgotten, because the world is another. What
a lender did not hear is mended when the conversation opens again.

A lender may want blocks back: what is done then is decided by `repay` (core/recall.py) before each step. The lender's
patience is the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from infinillm.core.blocks import OWN
from infinillm.core.layout import moved
from infinillm.core.moves import Wish, choose, ordered
from infinillm.core.pace import GRACE_SECONDS
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.recall import beside, repay
from infinillm.core.request import Sequence as Running
from infinillm.core.types import Move, NodeId, SeqId, Span
from infinillm.engine.names import Names
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics, log


class Moves:
    """See the theory of operation above. `most`: tokens that may move beside one step, rounded up to whole blocks."""

    def __init__(self, home: NodeId, memory: Memory, lenders: Lenders, names: Names, most: int, metrics: Metrics):
        self.home, self.memory, self.lenders, self.names, self.metrics = home, memory, lenders, names, metrics
        self.most = -(-most // memory.blocks.block_size)
        self.wishes: tuple[Wish, ...] = ()
        self.now: tuple[Move, ...] = ()  # of the step in hand
        self.done: tuple[Move, ...] = ()  # sources that are lenders and have not heard yet that they may let go
        self.homeless = 0  # blocks which lenders want back, and which have nowhere to go
        self._asked = self._refused = False  # for room for these
        self._since: dict[NodeId, float] = {}  # since when a lender wants blocks back

    @property
    def blocks(self) -> int:
        """Blocks on their way, or waiting for their turn."""
        return sum(move.blocks for move in (*self.now, *(wish.move for wish in self.wishes)))

    def of(self, seq: SeqId) -> tuple[Wish, ...]:
        """What of this sequence is on its way, or waits for its turn, and why."""
        wishes = (*(Wish(move, "beside this step") for move in self.now), *self.wishes)
        return tuple(wish for wish in wishes if wish.move.seq == seq)

    def wish(self, move: Move, reason: str) -> None:
        self.wishes = (*self.wishes, Wish(move, reason))

    def hear(self, said: MoveBlocks, sequence: Running | None) -> None:
        """Take an order as wishes."""
        self.wishes = ordered(self.wishes, said, sequence, self.memory.blocks.block_size)

    def bring(self, sequence: Running, span: Span) -> None:
        """Wish home what another node keeps for a sequence; it stays in the cache there."""
        blocks = (span.stop - span.start) // self.memory.blocks.block_size
        self.wish(Move(sequence.id, span.node, self.home, span.start, blocks), "used often")

    def repay(self, running: Sequence[Running]) -> list[Running]:
        """Wish home what lenders want back, or room for it; returns who gives way. The caller holds the locks."""
        debts, now, size = self.lenders.owed(), time.monotonic(), self.memory.blocks.block_size
        self._since = {node: self._since.get(node, now) for node in debts}
        if not debts:
            self.homeless, self._refused = 0, False
            return []
        late = [node for node, since in self._since.items() if now >= since + GRACE_SECONDS]
        room = {self.home: self.memory.blocks.room, **self.lenders.room()}
        found = repay(running, debts, late, self.wishes, room, self.most, self._refused, size)
        for sequence in running:
            sequence.layout = found.layouts.get(sequence.id, sequence.layout)
        for move in found.empty:
            self.lenders.leave(move.source, move.stretch)
        self.wishes, self.done = (*self.wishes, *found.wishes), (*self.done, *found.empty)
        self.homeless, self._refused = found.homeless, False
        by_id = {sequence.id: sequence for sequence in running}
        return [by_id[seq] for seq in found.give_way]

    def ask(self) -> bool:
        """Whether room has to be borrowed for what lenders want back; `hear_lent` is told the answer."""
        self._asked = self.homeless > 0
        return self._asked

    def hear_lent(self, refused: bool) -> None:
        self._asked, self._refused = False, self._asked and refused

    def beside(self, room: Mapping[NodeId, int]) -> dict[NodeId, int]:
        """What of this room is not kept for what lenders want back."""
        return beside(room, self.wishes)

    def reserve(self, running: Sequence[Running]) -> None:
        """Choose what moves beside this step, and hold room for it. The caller holds the locks of both books."""
        self.done = tuple(move for move in self.done if self.lenders.hears(move.source))
        if not self.wishes:
            return
        blocks, room = self.memory.blocks, self.lenders.room()
        chosen = choose(
            self.wishes, {s.id: s for s in running}, {self.home: blocks.room, **room}, self.most, blocks.block_size
        )
        for wish, reason in chosen.refused:
            log("move_refused", request=wish.move.seq, target=wish.move.target, reason=reason, wish=wish.reason)
        for move in chosen.moves:
            if move.target == self.home:
                refused = blocks.stage(*move.stretch)
                assert refused is None, refused
            else:
                self.lenders.stage(move.target, move.stretch)
        self.wishes, self.now = chosen.wishes, chosen.moves

    def switch(self, sequences: Mapping[SeqId, Running]) -> None:
        """The pass succeeded: what was copied is the sequence's, and its sources let go."""
        if not self.now and not self.done:
            return
        blocks, size = self.memory.blocks, self.memory.blocks.block_size
        with self.memory.lock, self.lenders.lock:
            self.lenders.adopt()
            self.memory.adopt([move.stretch for move in self.now if move.target == self.home])
            for move in self.now:
                sequence = sequences[move.seq]
                sequence.layout = moved(sequence.layout, move, size)
                if move.source == self.home:
                    blocks.leave(*move.stretch)
                else:
                    self.lenders.leave(move.source, move.stretch)
                self.names.seal(sequence, move.first, move.first + move.blocks * size)
        for move in self.now:
            log("moved", request=move.seq, tokens=move.blocks * size, source=move.source, target=move.target)
            direction = "home" if move.target == self.home else "away"
            self.metrics.add("moved_tokens_total", move.blocks * size, direction=direction)
        self.done, self.now = tuple(move for move in self.now if move.source != self.home), ()

    def abandon(self) -> None:
        """The pass failed, and the conversations it used were ended: nothing moved, and nobody has to be told."""
        with self.memory.lock, self.lenders.lock:
            self.memory.blocks.abandon(OWN)
            self.lenders.abandon()
        self.wishes, self.now, self.done = (), (), ()

    def forget(self, seq: SeqId) -> None:
        """A sequence is over, or begins anew."""
        self.wishes = tuple(wish for wish in self.wishes if wish.move.seq != seq)
        self.done = tuple(move for move in self.done if move.seq != seq)
