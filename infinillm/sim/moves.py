"""The moves of a simulated worker: blocks that go elsewhere beside its steps, and what lenders want back.

As `engine.moves`: what is chosen holds room at its target while a step is in hand, and is there when that ends. The
step takes longer by what the way there takes, and so does the next one of the node at the other end, if that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

from infinillm.core.blocks import OWN, Blocks
from infinillm.core.layout import moved
from infinillm.core.moves import Wish, choose, ordered
from infinillm.core.pace import GRACE_SECONDS
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.recall import repay
from infinillm.core.request import Sequence
from infinillm.core.types import Layout, Move, NodeId, SeqId
from infinillm.sim.around import Around
from infinillm.sim.borrower import Borrower


class Moves:
    """See above. `most`: tokens that may move beside one step, rounded up to whole blocks."""

    def __init__(self, home: NodeId, blocks: Blocks, borrower: Borrower, world: Around, most: int):
        self.home, self.blocks, self.borrower, self.world = home, blocks, borrower, world
        self.size = blocks.block_size
        self.most = -(-most // self.size)
        self.wishes: tuple[Wish, ...] = ()
        self.now: tuple[Move, ...] = ()  # of the step in hand
        self.homeless = 0  # blocks which lenders want back, and which have nowhere to go
        self.tokens = 0  # that have moved
        self.taken = 0.0  # seconds that others' moves took here since a step began
        self._asked = self._refused = False  # for room for these
        self._since: dict[NodeId, float] = {}  # since when a lender wants blocks back

    @property
    def busy(self) -> bool:
        """Whether the next step may differ from this one for the sake of moves."""
        return bool(self.wishes or self.now or self._since)

    def hear(self, said: MoveBlocks, sequence: Sequence | None) -> None:
        """Take an order as wishes."""
        self.wishes = ordered(self.wishes, said, sequence, self.size)

    def bring(self, seq: SeqId, layout: Layout) -> None:
        """Wish home what other nodes keep for a sequence; it stays in the caches there."""
        for span in layout:
            move = Move(seq, span.node, self.home, span.start, (span.stop - span.start) // self.size)
            self.wishes = (*self.wishes, Wish(move, "used often"))

    def repay(self, running: Seq[Sequence]) -> tuple[SeqId, ...]:
        """Wish home what lenders want back, or room for it; returns who gives way."""
        debts, now = self.borrower.owed(), self.world.now
        self._since = {node: self._since.get(node, now) for node in debts}
        if not debts:
            self.homeless, self._refused = 0, False
            return ()
        late = [node for node, since in self._since.items() if now >= since + GRACE_SECONDS]
        room = {self.home: self.blocks.room, **self.borrower.room()}
        found = repay(running, debts, late, self.wishes, room, self.most, self._refused, self.size)
        for sequence in running:
            sequence.layout = found.layouts.get(sequence.id, sequence.layout)
        for move in found.empty:
            self._leave(move)
        self.wishes = (*self.wishes, *found.wishes)
        self.homeless, self._refused = found.homeless, False
        return found.give_way

    def ask(self) -> bool:
        """Whether room has to be borrowed for what lenders want back; `hear_lent` is told the answer."""
        self._asked = self.homeless > 0
        return self._asked

    def hear_lent(self, refused: bool) -> None:
        self._asked, self._refused = False, self._asked and refused

    def reserve(self, running: Seq[Sequence]) -> None:
        """Choose what moves beside the step that begins, and hold room for it."""
        if not self.wishes:
            return
        room = {self.home: self.blocks.room, **self.borrower.room()}
        chosen = choose(self.wishes, {s.id: s for s in running}, room, self.most, self.size)
        for move in chosen.moves:
            refused = self._books(move.target).stage(*move.stretch, self._owner(move.target))
            assert refused is None, refused
        self.wishes, self.now = chosen.wishes, chosen.moves

    def seconds(self) -> float:
        """How much longer the step takes that begins."""
        found, self.taken = self.taken, 0.0
        tokens: Counter[NodeId] = Counter()
        for move in self.now:
            tokens[move.target if move.source == self.home else move.source] += move.blocks * self.size
        for node, count in tokens.items():
            found += (taken := self.world.moving(self.home, node, count))
            if (other := self.world.worker(node)).going is not None:
                other.moves.taken += taken
        return found

    def switch(self, sequences: dict[SeqId, Sequence]) -> tuple[Move, ...]:
        """The step is over: what was copied is the sequence's, and its sources let go."""
        done, self.now = self.now, ()
        for move in done:
            self._books(move.target).adopt(move.seq, self._owner(move.target))
            self._leave(move)
            sequence = sequences[move.seq]
            sequence.layout = moved(sequence.layout, move, self.size)
            self.tokens += move.blocks * self.size
            if move.target != self.home:
                self.borrower.touch(move.target, self.world.now)
        return done

    def abandon(self) -> None:
        """The step in hand does not count: nothing moved, and all wishes are forgotten."""
        for node in {move.target for move in self.now}:
            self._books(node).abandon(self._owner(node))
        self.wishes, self.now = (), ()

    def forget(self, seq: SeqId) -> None:
        """A sequence is over, or begins anew."""
        self.wishes = tuple(wish for wish in self.wishes if wish.move.seq != seq)

    def _leave(self, move: Move) -> None:
        refused = self._books(move.source).leave(*move.stretch, self._owner(move.source))
        assert refused is None, refused
        if move.source != self.home:
            self.borrower.touch(move.source, self.world.now)

    def _books(self, node: NodeId) -> Blocks:
        self.world.stir(node)
        return self.world.worker(node).blocks

    def _owner(self, node: NodeId) -> NodeId:
        return OWN if node == self.home else self.home
