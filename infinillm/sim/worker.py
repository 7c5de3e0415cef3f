"""A worker of the simulator: it decides, borrows and gives back as a real one does, and computes nothing.

Theory of operation. `schedule` decides each step over the same books (`Blocks`) as on a real worker, and the cost model
says how long it takes. A step that only decodes is like the next one, until a request ends or room runs short: so many
are taken in one go. Whoever looks at the books in between has them brought up to date first (`settle`), and whoever
changes anything that the next decision depends on has it taken at the end of the step in hand (`cut`).

    submit, lend, give_back   from outside; each may change the next decision
    _begin                    decide and commit, as often as the worker has nothing in hand
    _end                      count what was computed, end what is finished, begin anew
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, cast

from infinillm.core.blocks import OWN, Blocks
from infinillm.core.layout import filled, grown, moved, reserved
from infinillm.core.ledger import Report
from infinillm.core.moves import Wish, choose, pick
from infinillm.core.pace import IDLE_LOAN_SECONDS, MOST_ADMITTED, RETRY_SECONDS
from infinillm.core.policy.orders import MoveBlocks, Offers
from infinillm.core.policy.saving import KEPT_SECONDS, TURN_SECONDS
from infinillm.core.request import Request, Sequence, add
from infinillm.core.scheduler import NO_MATCH, Budget, Here, need, schedule, shortage
from infinillm.core.types import Chunk, Grow, Loan, Move, Node, NodeId, Refused, SeqId, Step
from infinillm.sim.hardware import Site
from infinillm.sim.steps import Going, Length

ASK_SECONDS = 0.02  # from a wish for blocks to the answer
INCARNATION = "1"


class World(Protocol):
    """What a worker sees of the cluster around it."""

    @property
    def now(self) -> float: ...

    def at(self, when: float, do: Callable[[], None]) -> None: ...

    def worker(self, node: NodeId) -> Worker: ...

    def answer(self, one: NodeId, other: NodeId, rows: int, tokens: int) -> float:
        """Seconds from a question of one node to the answer of another, which has so many tokens of its context."""

    def offers(self, node: NodeId, blocks: int, outgrown: bool) -> tuple[Offers | Refused, bool]:
        """Who could lend, and whether it is this node's turn to save up."""

    def seconds(self, node: NodeId, seconds: float) -> float:
        """How long this node takes for work of so many seconds, where cores are shared."""

    def ended(self, worker: Worker, sequence: Sequence, first: float) -> None: ...


class Worker:
    """See the theory of operation above."""

    def __init__(self, site: Site, blocks: Blocks, budget: Budget, world: World):
        self.id, self.cost, self.blocks, self.budget, self.world = site.id, site.near, blocks, budget, world
        self.size = budget.block_size
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.sequences: dict[SeqId, Sequence] = {}
        self.firsts: dict[SeqId, float] = {}  # when the first token came
        self.going: Going | None = None
        self.wishes: tuple[Wish, ...] = ()
        self.lenders: dict[NodeId, float] = {}  # who lends to us, and since when some of it is idle
        self.saved: set[NodeId] = set()  # lenders whose blocks are for outgrown sequences
        self.saved_until = 0.0
        self.kept = (0, 0.0)  # blocks that are for somebody who saves up, and until when
        self.asking = self.denied = False
        self.ask_again = 0.0
        self.preemptions = self.steps = self.rows = self.moved = 0  # `rows`: of all steps
        self.prompts = self.output = 0  # tokens of prompts whose answer has begun, and of answers
        self._version = self._loans = 0

    # --- from outside --------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        sequence = Sequence(request, cast("list[int]", Length(len(request.prompt))))
        self.sequences[request.id] = sequence
        self.waiting.append(sequence)
        if len(self.waiting) == 1:
            self.cut()
        self._begin()

    def lend(self, borrower: NodeId, blocks: int, least: int) -> int:
        """How many of so many blocks are lent, all or none; with a `least`, as many as there are."""
        self.settle()
        if least:
            asked, blocks = blocks, min(blocks, self.blocks.offer)
            self.kept = asked - blocks, self.world.now + KEPT_SECONDS
        self._loans += 1
        name = f"{self.id}>{borrower}#{self._loans}"
        if blocks < max(least, 1) or isinstance(self.blocks.lend(borrower, blocks, math.inf, name), Refused):
            return 0
        self.cut()
        return blocks

    def give_back(self, borrower: NodeId, blocks: int) -> None:
        self.settle()
        self.blocks.give_back(borrower, blocks)
        self.cut()
        self._begin()

    def obey(self, order: MoveBlocks) -> None:
        """As engine.moves.Moves.hear: an order takes the place of an earlier one like it."""
        like = (order.seq, order.source, order.target)
        self.wishes = tuple(wish for wish in self.wishes if wish.move[:3] != like)
        for stretch in pick(self.sequences.get(order.seq), order.source, order.blocks, self.size):
            move = Move(order.seq, order.source, order.target, stretch.first, stretch.blocks)
            self.wishes = (*self.wishes, Wish(move, order.reason))
        self.cut()

    def report(self) -> Report:
        self.settle()
        b = self.blocks
        node = Node(
            self.id,
            INCARNATION,
            self.id,
            blocks=b.count,
            lendable=b.lendable,
            used=b.used,
            lent=b.lent,
            borrowed=sum(loan.blocks for _, loan in self._lent_to_us()),
            running=len(self.running),
            waiting=len(self.waiting),
            wanted=sum(need(s, self.size, 0) for s in self.waiting),
        )
        layouts = {s.id: filled(s.layout, s.length) for s in self.running}
        return Report(node, tuple(b.loans.values()), layouts)

    def tidy(self) -> None:
        """Give back what no sequence has used for a while."""
        for lender, loan in list(self._lent_to_us()):
            saved_until = self.saved_until if lender.id in self.saved else 0.0
            idle = max(self.lenders[lender.id] + IDLE_LOAN_SECONDS, saved_until)
            if loan.used < loan.blocks and self.world.now >= idle:
                if not loan.used:
                    del self.lenders[lender.id]
                    self.saved.discard(lender.id)
                lender.give_back(self.id, loan.blocks - loan.used)

    # --- time ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring the books up to now."""
        if (going := self.going) is not None and (times := going.over(self.world.now)):
            self._count(going, times)
            going.pass_over(times)
            for chunk in going.step.chunks:
                self._hold(sequence := self.sequences[chunk.seq], sequence.length)

    def cut(self) -> None:
        """Decide anew at the end of the step in hand."""
        self.settle()
        if self.going is not None and self.going.times > 1:
            self.going.times = 1
            self._arm(self.going)

    def _arm(self, going: Going) -> None:
        self._version += 1
        self.world.at(going.began + going.seconds(going.times), partial(self._end, self._version))

    def _begin(self) -> None:
        if self.going is not None or not (self.running or self.waiting):
            return
        room = self._room()
        kept = self.kept[0] if self.world.now < self.kept[1] else 0
        here = Here(self.blocks.count, kept, self.saved, not self.denied)
        waiting = self.waiting[:MOST_ADMITTED]
        step = schedule(0, self.running, waiting, room, self.budget, here, lambda _: NO_MATCH)
        self._commit(step)
        self._wish(step)
        if step.chunks:
            moves = self._moves()
            first = self._seconds(step.chunks, 0)
            decodes = all(chunk.start == self.sequences[chunk.seq].length - 1 for chunk in step.chunks)
            times = self._alike(step) if decodes and not moves else 1
            more = (self._seconds(step.chunks, times - 1) - first) / (times - 1) if times > 1 else 0.0
            self.going = Going(step, self.world.now, times, first, max(more, 0.0), decodes, moves)
            if step.short and not self.asking:  # then it asks again
                self.going.times = self.going.over(self.ask_again) + 1
            self._arm(self.going)

    def _end(self, version: int) -> None:
        if version != self._version or (going := self.going) is None:
            return
        self._count(going, going.times)
        self.going = None
        self._switch(going.moves)
        over = [s for s in self.running if s.produced >= s.request.sampling.max_tokens]
        for sequence in over:
            self._release(sequence.id)
            self.running.remove(sequence)
            del self.sequences[sequence.id]
        self._begin()
        for sequence in over:
            self.world.ended(self, sequence, self.firsts.pop(sequence.id))

    # --- a step --------------------------------------------------------------------------------------------------

    def _commit(self, step: Step) -> None:
        for seq in step.preempt:
            sequence = self.sequences[seq]
            self._release(seq)
            sequence.forget()
            self.running.remove(sequence)
            self.waiting.insert(0, sequence)
            self.preemptions += 1
        for seq in step.admit:
            sequence = self.sequences[seq]
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.pass_through("admit")
        for grow in step.grow:
            self._grow(grow)
        for seq in {grow.seq for grow in step.grow}:
            sequence = self.sequences[seq]
            sequence.layout = grown(sequence.layout, [g for g in step.grow if g.seq == seq], self.size)

    def _grow(self, grow: Grow) -> None:
        owner = OWN if grow.node == self.id else self.id
        refused = self.world.worker(grow.node).blocks.grow(grow.seq, grow.first, grow.blocks, owner)
        assert refused is None, refused
        if owner:
            self.lenders[grow.node] = self.world.now

    def _seconds(self, chunks: tuple[Chunk, ...], later: int) -> float:
        """What a step of these takes, so many steps alike later."""
        rows = local = 0
        away: dict[NodeId, tuple[int, int]] = {}
        seconds, decoding = 0.0, True
        for chunk in chunks:
            layout = self.sequences[chunk.seq].layout
            if chunk.stop - chunk.start > 1:
                seconds += self.cost.computing(chunk.stop - chunk.start, chunk.start)
                decoding = False
            else:
                rows += 1
            for span in layout:
                if span.node != self.id:
                    asked, tokens = away.get(span.node, (0, 0))
                    away[span.node] = asked + 1, tokens + min(span.stop, chunk.stop) - span.start
                elif chunk.stop - chunk.start == 1:
                    local += min(span.stop, chunk.stop) - span.start
        local += rows * later
        answers = [self.world.answer(self.id, node, asked, tokens) for node, (asked, tokens) in away.items()]
        step = self.cost.decode_step(rows, local, answers)
        seconds += step if decoding else step - self.cost.dense(rows)
        hosted = sum(loan.used for loan in self.blocks.loans.values()) * self.size
        return self.world.seconds(self.id, seconds + self.cost.attend(hosted))

    def _alike(self, step: Step) -> int:
        """How many steps like this follow each other, this one included, should nothing come from outside."""
        sequences = [self.sequences[chunk.seq] for chunk in step.chunks]
        if len(sequences) < len(self.running):
            return 1
        most = min(s.request.sampling.max_tokens - s.produced for s in sequences)
        room = self.blocks.room

        def fits(times: int) -> bool:
            return sum(max(-(-(s.length + times - 1 - reserved(s.layout)) // self.size), 0) for s in sequences) <= room

        return bisect_left(range(2, most + 1), True, key=lambda times: not fits(times)) + 1

    def _count(self, going: Going, times: int) -> None:
        """So many steps are over."""
        self.steps += times
        self.rows += times * len(going.step.chunks)
        for chunk in going.step.chunks:
            sequence = self.sequences[chunk.seq]
            if going.decodes:
                self._decode(sequence, times)
            else:
                sequence.compute(chunk)
            if sequence.gap is None:
                sequence.tokens.append(0)
                self.output += times
                if sequence.id not in self.firsts:
                    self.firsts[sequence.id] = self.world.now
                    self.prompts += len(sequence.request.prompt)

    def _decode(self, sequence: Sequence, times: int) -> None:
        """So many tokens, the last of which is still to be added."""
        start = sequence.length - 1
        self._hold(sequence, start + times)
        sequence.done = add(sequence.done, start, start + times)
        cast("Length", sequence.tokens).count += times - 1

    def _hold(self, sequence: Sequence, stop: int) -> None:
        """Blocks of home for tokens up to there."""
        there = reserved(sequence.layout)
        if stop > there:
            grow = Grow(sequence.id, self.id, there, -(-(stop - there) // self.size))
            self._grow(grow)
            sequence.layout = grown(sequence.layout, [grow], self.size)

    def _release(self, seq: SeqId) -> None:
        self.blocks.release(seq)
        for node in self.lenders:
            if self.world.worker(node).blocks.release(seq, self.id):
                self.lenders[node] = self.world.now
        self.wishes = tuple(wish for wish in self.wishes if wish.move.seq != seq)

    # --- moves ---------------------------------------------------------------------------------------------------

    def _moves(self) -> tuple[Move, ...]:
        """What goes elsewhere beside the step that begins; room is held for it there."""
        if not self.wishes:
            return ()
        room = self._room()
        most = -(-self.budget.moves // self.size)
        chosen = choose(self.wishes, {s.id: s for s in self.running}, room, most, self.size)
        for move in chosen.moves:
            refused = self.world.worker(move.target).blocks.stage(*move.stretch, self._owner(move.target))
            assert refused is None, refused
        self.wishes = chosen.wishes
        return chosen.moves

    def _switch(self, moves: tuple[Move, ...]) -> None:
        for move in moves:
            source, target = self.world.worker(move.source), self.world.worker(move.target)
            target.blocks.adopt(move.seq, self._owner(move.target))
            refused = source.blocks.leave(*move.stretch, self._owner(move.source))
            assert refused is None, refused
            sequence = self.sequences[move.seq]
            sequence.layout = moved(sequence.layout, move, self.size)
            self.moved += move.blocks * self.size
            for node in (move.source, move.target):
                if node != self.id:
                    self.lenders[node] = self.world.now

    def _owner(self, node: NodeId) -> NodeId:
        return OWN if node == self.id else self.id

    # --- borrowing -----------------------------------------------------------------------------------------------

    def _lent_to_us(self) -> Iterator[tuple[Worker, Loan]]:
        for node in self.lenders:
            lender = self.world.worker(node)
            if (loan := lender.blocks.loans.get(self.id)) is not None:
                yield lender, loan

    def _room(self) -> dict[NodeId, int]:
        """Blocks that may be taken on each node, home first."""
        return {self.id: self.blocks.room, **{w.id: loan.blocks - loan.used for w, loan in self._lent_to_us()}}

    def _wish(self, step: Step) -> None:
        """As engine.loop.Engine: ask for what the step was short of, and more for what grows."""
        self.denied = self.denied and bool(step.short)
        if not step.short or self.asking:
            return
        if self.world.now < self.ask_again:
            self.world.at(self.ask_again, self._begin)
            return
        self.asking = True
        more = sum(loan.blocks for _, loan in self._lent_to_us()) - self.blocks.lent
        wanted = shortage(step, self.running, self.waiting, self.size, self.blocks.count, more)
        self.world.at(self.world.now + ASK_SECONDS, partial(self._borrow, *wanted))

    def _borrow(self, least: int, wanted: int, beyond: int | None) -> None:
        self.asking, self.ask_again = False, self.world.now + RETRY_SECONDS
        self.denied = not self._borrowed(least, wanted, beyond)
        self.cut()
        self._begin()

    def _borrowed(self, least: int, wanted: int, beyond: int | None) -> bool:
        """As servers.worker and pool.borrow: from those the policy names, in order, enough or nothing."""
        offers, save = self.world.offers(self.id, wanted, beyond is not None)
        if save and beyond is not None:
            least, wanted, self.saved_until = 1, beyond, self.world.now + TURN_SECONDS
        if isinstance(offers, Refused) or wanted < 1:
            return False
        got: list[tuple[Worker, int]] = []
        total = 0
        for name, offered in offers:
            if (asked := min(wanted - total, offered)) < 1:
                break
            lender = self.world.worker(name)
            if lent := lender.lend(self.id, asked, 1 if save else 0):
                got.append((lender, lent))
                total += lent
        for lender, lent in got:
            if total < least:
                lender.give_back(self.id, lent)
                continue
            self.lenders[lender.id] = self.world.now
            (self.saved.add if save else self.saved.discard)(lender.id)
        return total >= least
