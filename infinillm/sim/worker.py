"""A worker of the simulator: it decides, borrows and gives back as a real one does, and computes nothing.

Theory of operation. `schedule` decides each step over the same books (`Blocks`) as on a real worker, and the cost model
says how long it takes. A step that only decodes is like the next one, until a request ends or room runs short: so many
are taken in one go (`coast`). Whoever looks at the books in between has them brought up to date first (`settle`), and
whoever changes anything that the next decision depends on has it taken at the end of the step in hand (`cut`).

    submit, lend, give_back   from outside; each may change the next decision
    hear                      a lender wants blocks back
    lose                      a lender is gone, or has ended its loan: the step in hand does not count
    begin                     decide and commit, as often as the worker has nothing in hand
    _end                      count what was computed, end what is finished, begin anew
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import cast

from infinillm.core.blocks import OWN, Blocks
from infinillm.core.coast import coast, fits
from infinillm.core.layout import grown, reserved, without
from infinillm.core.names import Uses
from infinillm.core.pace import MOST_ADMITTED
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.recall import AT_ONCE, Terms, beside
from infinillm.core.request import Request, Sequence, add
from infinillm.core.scheduler import Budget, Here, Match, need, schedule
from infinillm.core.types import Chunk, Grow, NodeId, SeqId, Span, Step
from infinillm.sim import names
from infinillm.sim.around import Around
from infinillm.sim.asking import still, wish
from infinillm.sim.borrower import Account, Borrower
from infinillm.sim.hardware import Site
from infinillm.sim.lender import Lender
from infinillm.sim.moves import Moves
from infinillm.sim.names import Names
from infinillm.sim.steps import Going, Length
from infinillm.sim.timing import step_seconds

KEPT_USES = 4096


class Worker:
    """See the theory of operation above. `start`: the number of its start."""

    def __init__(self, site: Site, blocks: Blocks, budget: Budget, world: Around, start: int):
        self.id, self.cost, self.blocks, self.budget, self.world = site.id, site.near, blocks, budget, world
        self.address, self.start = f"server-{site.server}:{site.id}", start
        self.size = budget.block_size
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.needs: dict[SeqId, int] = {}  # blocks that each of those that wait must be given
        self.sequences: dict[SeqId, Sequence] = {}
        self.firsts: dict[SeqId, float] = {}  # when the first token came
        self.names: dict[SeqId, Names] = {}  # of those that share prefixes
        self.going: Going | None = None
        self.lender, self.borrower = Lender(blocks, start), Borrower(site.id, world)
        self.moves = Moves(site.id, blocks, self.borrower, world, budget.moves)
        self.dead = False
        self.preemptions = self.steps = self.rows = 0  # `rows`: requests in all steps
        self.shared = 0  # tokens that had been computed already
        self.prompts = self.output = 0  # tokens of prompts whose answer has begun, and of answers
        self._uses = Uses(KEPT_USES)
        self._version = 0
        self._seen: tuple[object, Step] = object(), Step(0)  # what was decided on last (`still`), and what

    # --- requests ------------------------------------------------------------------------------------------------

    def submit(self, request: Request, named: Names | None, holders: Collection[NodeId], first: float | None) -> None:
        """`holders`: who may have computed some of it before. `first`: when its first token came, if it did."""
        self.world.wake(self.id)
        self.world.stir(self.id)
        length = len(request.prompt) + len(request.already)
        sequence = Sequence(request, cast("list[int]", Length(length)))
        self.sequences[request.id] = sequence
        if first is not None:
            self.firsts[request.id] = first
        if named is not None:
            self.names[request.id] = named
            self._find(sequence, named, holders)
        self.queue(sequence, len(self.waiting))
        if len(self.waiting) == 1:
            self.cut()
        self.begin()

    def queue(self, sequence: Sequence, at: int) -> None:
        self.waiting.insert(at, sequence)
        self.needs[sequence.id] = need(sequence, self.size, 0)

    def _find(self, sequence: Sequence, named: Names, holders: Collection[NodeId]) -> None:
        """Have others keep what they have of a request beyond what is here, and copy it where that pays."""
        known = named.upto((sequence.length - 1) // self.size)
        layout = names.find(sequence.id, known, self.blocks, holders, self._share)
        for span in layout:
            sequence.have(span)
        if layout:
            uses, there = self._uses.count(known[layout[-1].stop // self.size - 1]), sequence.computed
            steps = uses * (sequence.request.sampling.max_tokens - len(sequence.request.already))
            self.shared += there
            if self.cost.copying_pays(there, sequence.length - there, steps):
                self.moves.bring(sequence.id, layout)

    def _share(self, node: NodeId, seq: SeqId, wanted: Mapping[int, bytes]) -> list[int]:
        found = self.world.worker(node).share(self.id, seq, wanted)
        if found is None:
            return []
        self.borrower.accounts.setdefault(node, Account(self.world.now))
        return found

    # --- lending, from outside -----------------------------------------------------------------------------------

    def offer(self, borrower: NodeId, blocks: int, terms: Terms) -> int | None:
        """How many of so many blocks it would lend, as `Lender.offer`. None: refused."""
        if self.dead:
            return None
        self.settle()
        self.world.wake(self.id)
        offered = self.lender.offer(borrower, blocks, terms, self.world.now)
        if offered:
            self._narrow(offered)
        return offered

    def lend(self, borrower: NodeId, blocks: int, terms: Terms) -> None:
        """Lend what was offered just now."""
        self.world.stir(self.id)
        self.lender.lend(borrower, blocks, terms, self.world.now)

    def share(self, borrower: NodeId, seq: SeqId, wanted: Mapping[int, bytes]) -> list[int] | None:
        """Keep what is here under these names, by position, for a sequence of somebody else: which positions."""
        if self.dead:
            return None
        if borrower not in self.blocks.loans:
            if self.offer(borrower, 0, AT_ONCE) is None:
                return None
            self.lend(borrower, 0, AT_ONCE)
        self.settle()
        self.world.stir(self.id)
        found = self.blocks.share(seq, wanted, borrower)
        self._narrow(0)
        return found

    def give_back(self, borrower: NodeId, blocks: int | None) -> None:
        """So many blocks of a loan; None: all of it."""
        self.settle()
        self.world.stir(self.id)
        self.blocks.give_back(borrower, blocks)
        if self.waiting or (self.going is not None and self.going.grows):
            self.cut()
            self.begin()

    def hear(self, lender: NodeId, blocks: int) -> None:
        """A lender wants blocks back."""
        if lender in self.borrower.accounts:
            self.settle()
            self.borrower.hear(lender, blocks)
            self.cut()
            self.begin()

    def obey(self, order: MoveBlocks) -> None:
        """Reserve at the target, then move; where it does not lend, nothing changes."""
        if self.dead or order.seq not in self.sequences:
            return
        if order.target != self.id:
            offers = [(order.target, order.blocks)]
            if not self.borrower.reserve(order.blocks, order.blocks, offers, AT_ONCE):
                return
        self.settle()
        self.moves.hear(order, self.sequences[order.seq])
        self.cut()

    # --- losses --------------------------------------------------------------------------------------------------

    def lose(self, node: NodeId) -> None:
        """Forget what a node held for us: holes are pending work, and the step in hand does not count."""
        self.settle()
        if node not in self.borrower.accounts:
            return
        self._stop()
        del self.borrower.accounts[node]
        for sequence in [*self.running, *self.waiting]:
            sequence.layout, gone = without(sequence.layout, node)
            for span in gone:
                sequence.lose(span.start, span.stop)
        self.needs = {s.id: need(s, self.size, 0) for s in self.waiting}
        self.begin()

    def die(self) -> list[Sequence]:
        """All that is here is lost; returns the requests that were, in their order."""
        self.settle()
        self._stop()
        self.dead = True
        return [*self.running, *self.waiting]

    def _stop(self) -> None:
        self.moves.abandon()
        self.going = None
        self._version += 1

    # --- time ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Bring the books up to now."""
        if (going := self.going) is not None and (times := going.over(self.world.now)):
            self._count(going, times, going.passed + times)
            going.pass_over(times)
            for chunk in going.step.chunks:
                self._hold(sequence := self.sequences[chunk.seq], sequence.length)

    def cut(self) -> None:
        """Decide anew at the end of the step in hand."""
        self.settle()
        if self.going is not None and self.going.times > 1:
            self.going.times = 1
            self._arm(self.going)

    def until(self, when: float) -> None:
        """Decide anew at the end of the step in hand at that moment."""
        self.settle()
        if (going := self.going) is not None and (times := going.over(when) + 1) < going.times:
            going.times = times
            self._arm(going)

    def _narrow(self, blocks: int) -> None:
        """There is less room than there was, or will be so many blocks less."""
        if (
            (going := self.going) is not None
            and going.decodes
            and (going.grows or not fits(self.running, going.times, self.blocks.room - blocks, self.size))
        ):
            self.cut()

    def _arm(self, going: Going) -> None:
        self._version += 1
        self.world.at(going.began + going.seconds(going.times), partial(self._end, self._version))

    def begin(self) -> None:
        if self.dead or self.going is not None or not self.sequences:
            return
        if (seen := still(self)) == self._seen[0]:
            wish(self, self._seen[1])
            return
        self.world.stir(self.id)
        for seq in self.moves.repay(self.running):
            self.preempt(self.sequences[seq])
        room = beside({self.id: self.blocks.room, **self.borrower.room()}, self.moves.wishes)
        now, kept = self.world.now, self.lender.kept_back(self.world.now)
        here = Here(self.blocks.count, kept, self.borrower.saved, now - self.borrower.denied_since, self.cost)
        step = schedule(0, self.running, self.waiting[:MOST_ADMITTED], room, self.budget, here, self._match)
        self._commit(step)
        if step.chunks:
            self.moves.reserve(self.running)
        wish(self, step)
        self._seen = seen, step
        if step.chunks:
            decodes = all(chunk.start == self.sequences[chunk.seq].length - 1 for chunk in step.chunks)
            times, grows = self._alike(step, here) if decodes and not self.moves.busy else (1, [])
            first = self._seconds(step.chunks, 0, ())
            last = self._seconds(step.chunks, times - 1, grows) if times > 1 else first
            more = max(last - first, 0.0) / max(times - 1, 1)
            first += self.world.seconds(self.id, self.moves.seconds()) / times
            self.going = Going(step, now, times, first, more, decodes, grows[::-1])
            if step.short and not self.borrower.asking:  # then it asks again
                self.going.times = self.going.over(self.borrower.ask_again) + 1
            if kept and self.waiting:  # then somebody may come in
                self.going.times = self.going.over(self.lender.kept_until) + 1
            self._arm(self.going)

    def _end(self, version: int) -> None:
        if version != self._version or (going := self.going) is None:
            return
        self._count(going, going.times, going.passed + going.times - 1)
        self.going = None
        for move in self.moves.switch(self.sequences):
            self._seal(self.sequences[move.seq], move.first, move.first + move.blocks * self.size)
        over = [s for s in self.running if s.produced >= s.request.sampling.max_tokens]
        for sequence in over:
            self.finish(sequence, self.running)
        self.begin()
        for sequence in over:
            self.world.ended(self, sequence, self.firsts.pop(sequence.id), "")

    # --- a step --------------------------------------------------------------------------------------------------

    def _match(self, sequence: Sequence) -> Match:
        return names.match(self.blocks, sequence, self.names.get(sequence.id))

    def _commit(self, step: Step) -> None:
        for seq in step.preempt:
            self.preempt(self.sequences[seq])
        for seq in step.admit:
            sequence = self.sequences[seq]
            self.waiting.remove(sequence)
            del self.needs[seq]
            self.running.append(sequence)
            sequence.pass_through("admit")
        for each in step.reuse:
            names.reuse(self.blocks, each, self.names[each.seq])
            self.sequences[each.seq].have(Span(self.id, each.first, each.first + each.blocks * self.size))
            self.shared += each.blocks * self.size
        for grow in step.grow:
            self._grow(grow, self.world.now)
        for seq in {grow.seq for grow in step.grow}:
            sequence = self.sequences[seq]
            sequence.layout = grown(sequence.layout, [g for g in step.grow if g.seq == seq], self.size)

    def _grow(self, grow: Grow, when: float) -> None:
        blocks, owner = self._books(grow.node)
        refused = blocks.grow(grow.seq, grow.first, grow.blocks, owner)
        assert refused is None, refused
        if owner:
            self.borrower.touch(grow.node, when)

    def _books(self, node: NodeId) -> tuple[Blocks, NodeId]:
        if node == self.id:
            return self.blocks, OWN
        self.world.stir(node)
        return self.world.worker(node).blocks, self.id

    def _seconds(self, chunks: tuple[Chunk, ...], later: int, grows: Collection[tuple[int, Grow]]) -> float:
        """What a step of these takes, so many steps alike later, with these blocks besides."""
        layouts = {chunk.seq: self.sequences[chunk.seq].layout for chunk in chunks}
        for _, grow in grows:
            layouts[grow.seq] = grown(layouts[grow.seq], [grow], self.size)
        answer = partial(self.world.answer, self.id)
        seconds = step_seconds(self.id, self.cost, [(c, layouts[c.seq]) for c in chunks], later, answer)
        hosted = sum(loan.used for loan in self.blocks.loans.values()) * self.size
        return self.world.seconds(self.id, seconds + self.cost.attend(hosted))

    def _alike(self, step: Step, here: Here) -> tuple[int, list[tuple[int, Grow]]]:
        """How many steps like this follow each other, this one included, and the blocks they take: as `coast`."""
        if len(step.chunks) < len(self.running):
            return 1, []
        return coast(self.running, {self.id: self.blocks.room, **self.borrower.room()}, here, self.size)

    def _count(self, going: Going, times: int, taken: int) -> None:
        """So many steps are over, and the blocks of the steps up to `taken` are had."""
        self.steps += times
        self.rows += times * len(going.step.chunks)
        while going.grows and going.grows[-1][0] <= taken:
            later, grow = going.grows.pop()
            self._grow(grow, going.began + going.seconds(later - going.passed))
            sequence = self.sequences[grow.seq]
            sequence.layout = grown(sequence.layout, [grow], self.size)
        for chunk in going.step.chunks:
            sequence = self.sequences[chunk.seq]
            start = sequence.length - 1 if going.decodes else chunk.start
            if going.decodes:
                self._decode(sequence, start, times)
            else:
                sequence.compute(chunk)
            self._seal(sequence, start, start + times if going.decodes else chunk.stop)
            if sequence.gap is None:
                sequence.tokens.append(0)
                self.output += times
                if sequence.id not in self.firsts:
                    self.firsts[sequence.id] = going.began + going.seconds(1)
                    self.prompts += len(sequence.request.prompt)

    def _decode(self, sequence: Sequence, start: int, times: int) -> None:
        """So many tokens from there on, the last of which is still to be added."""
        self._hold(sequence, start + times)
        sequence.done = add(sequence.done, start, start + times)
        cast("Length", sequence.tokens).count += times - 1

    def _hold(self, sequence: Sequence, stop: int) -> None:
        """Blocks of home for tokens up to there."""
        there = reserved(sequence.layout)
        if stop > there:
            grow = Grow(sequence.id, self.id, there, -(-(stop - there) // self.size))
            self._grow(grow, self.world.now)
            sequence.layout = grown(sequence.layout, [grow], self.size)

    def _seal(self, sequence: Sequence, start: int, stop: int) -> None:
        if (named := self.names.get(sequence.id)) is not None:
            names.seal(self._books, sequence, start, stop, named)

    def preempt(self, sequence: Sequence) -> None:
        self.release(sequence.id)
        sequence.forget()
        self.running.remove(sequence)
        self.queue(sequence, 0)
        self.preemptions += 1

    def finish(self, sequence: Sequence, queue: list[Sequence]) -> None:
        self.release(sequence.id)
        queue.remove(sequence)
        self.needs.pop(sequence.id, None)
        del self.sequences[sequence.id]
        self.names.pop(sequence.id, None)

    def release(self, seq: SeqId) -> None:
        self.world.stir(self.id)
        self.blocks.release(seq)
        self.borrower.release(seq)
        self.moves.forget(seq)
