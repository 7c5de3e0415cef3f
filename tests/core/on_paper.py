"""A pool on paper: nodes that schedule, borrow and give back as workers do, with the seconds of a cost model.

The decisions are the real ones (`schedule`, `Blocks`, the policies over a ledger told twice a second); what is left out
is everything that carries them out. Cores are shared evenly by the nodes that compute. No prefix is shared, no move
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from infinillm.core.blocks import Blocks
from infinillm.core.cost import Cost
from infinillm.core.layout import filled, grown
from infinillm.core.ledger import Report, expecting, rebuild
from infinillm.core.policy import Policy
from infinillm.core.policy.orders import NOBODY, TURN_SECONDS, Turn
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.scheduler import Budget, Here, Match, need, schedule, shortage
from infinillm.core.types import Ledger, Loan, Node, NodeId, Refused, SeqId, Step

BEAT, RETRY, IDLE = 0.5, 0.25, 2.0  # seconds
BLOCK = 16
BUDGET = Budget(512, 64, BLOCK)


@dataclass(eq=False)
class Place:
    """One worker: its books, its sequences, and the step it computes."""

    id: NodeId
    blocks: Blocks
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    step: Step | None = None
    left: float = 0.0  # seconds of the step
    denied: bool = False
    saved: set[NodeId] = field(default_factory=set)  # lenders whose blocks are for outgrown sequences
    saved_until: float = 0.0
    ask_again: float = 0.0
    idle_since: dict[NodeId, float] = field(default_factory=dict)  # by lender

    def node(self, borrowed: int) -> Node:
        b = self.blocks
        wanted = sum(need(s, BLOCK, 0) for s in self.waiting)
        return Node(
            self.id,
            "1",
            f"{self.id}:1",
            blocks=b.count,
            lendable=b.lendable,
            used=b.used,
            lent=b.lent,
            borrowed=borrowed,
            running=len(self.running),
            waiting=len(self.waiting),
            wanted=wanted,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A request, and what to do when it is answered (or refused)."""

    prompt: int
    count: int
    after: Callable[[Pool, bool], None]
    asked: float


@dataclass(eq=False)
class Pool:
    policy: Policy
    cost: Cost
    cores: float
    busy_question: float  # seconds more for a question to a node that computes
    places: dict[NodeId, Place]
    now: float = 0.0
    turn: Turn = NOBODY
    ledger: Ledger = field(default_factory=lambda: Ledger(1))
    promised: dict[NodeId, list[tuple[float, int]]] = field(default_factory=dict)
    jobs: dict[SeqId, Job] = field(default_factory=dict)
    later: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "output": 0, "long": 0})
    latencies: list[float] = field(default_factory=list)
    preempted: int = 0
    computed: int = 0
    refused: int = 0
    served: int = 0
    loans: int = 0
    count: int = 0

    # --- asking --------------------------------------------------------------------------------------------------

    def ask(self, prompt: int, count: int, after: Callable[[Pool, bool], None]) -> None:
        sums = {n: (sum(b for _, b in each), len(each)) for n, each in self.promised.items() if each}
        found = self.policy.route(expecting(self.ledger, sums), prompt, prompt + count, BLOCK, ())
        if isinstance(found, Refused):
            self.refused += 1
            after(self, False)
            return
        self.promised.setdefault(found, []).append((self.now, -(-prompt // BLOCK)))
        self.count += 1
        id = f"s{self.count}"
        self.jobs[id] = Job(prompt, count, after, self.now)
        request = Request(id, (1,) * prompt, Sampling(max_tokens=count), self.now)
        self.places[found].waiting.append(Sequence(request, [1] * prompt))

    # --- time ----------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        beat = self.now
        while self.now < seconds:
            if self.now >= beat:
                self.beat()
                beat += BEAT
            due = [each for each in self.later if each[0] <= self.now]
            self.later = [each for each in self.later if each[0] > self.now]
            for _, do in due:
                do()
            for place in self.places.values():
                if place.step is None:
                    self.begin(place)
            busy = [p for p in self.places.values() if p.step is not None]
            rate = min(1.0, self.cores / len(busy)) if busy else 1.0
            ahead = min([beat - self.now, *(p.left / rate for p in busy), 0.05])
            self.now += max(ahead, 1e-6)
            for place in busy:
                place.left -= ahead * rate
                if place.left <= 1e-9:
                    self.end(place)

    def beat(self) -> None:
        for place in self.places.values():
            for lender in list(place.idle_since):
                loan = self.places[lender].blocks.loans.get(place.id)
                if loan is None:
                    del place.idle_since[lender]
                elif loan.used < loan.blocks and self.now >= self.idle_from(place, lender):
                    self.places[lender].blocks.give_back(place.id, loan.blocks - loan.used)
        borrowed = {p.id: sum(loan.blocks for _, loan in self.loans_of(p)) for p in self.places.values()}
        reports = []
        for place in self.places.values():
            place.blocks.check()
            layouts = {s.id: filled(s.layout, s.length) for s in place.running}
            reports.append(Report(place.node(borrowed[place.id]), tuple(place.blocks.loans.values()), layouts))
        self.ledger = rebuild(1, reports)
        self.promised = {n: [e for e in each if e[0] > self.now - 0.1] for n, each in self.promised.items()}

    def idle_from(self, place: Place, lender: NodeId) -> float:
        return max(place.idle_since[lender] + IDLE, place.saved_until if lender in place.saved else 0.0)

    def loans_of(self, place: Place) -> Iterator[tuple[Place, Loan]]:
        for lender in self.places.values():
            if (loan := lender.blocks.loans.get(place.id)) is not None:
                yield lender, loan

    # --- a step --------------------------------------------------------------------------------------------------

    def begin(self, place: Place) -> None:
        if not place.running and not place.waiting:
            return
        room = {place.id: place.blocks.room}
        for lender, loan in self.loans_of(place):
            room[lender.id] = loan.blocks - loan.used
        here = Here(place.blocks.count, 0, place.saved, not place.denied)
        step = schedule(1, place.running, place.waiting[:8], room, BUDGET, here, lambda _: Match())
        sequences = {s.id: s for s in [*place.running, *place.waiting]}
        for seq in step.preempt:
            self.preempt(place, sequences[seq])
        for seq in step.admit:
            place.waiting.remove(sequences[seq])
            place.running.append(sequences[seq])
            sequences[seq].pass_through("admit")
        for grow in step.grow:
            own = grow.node == place.id
            got = self.places[grow.node].blocks.grow(grow.seq, grow.first, grow.blocks, "" if own else place.id)
            assert got is None, got
            if not own:
                place.idle_since[grow.node] = self.now
        for seq in {grow.seq for grow in step.grow}:
            s = sequences[seq]
            s.layout = grown(s.layout, [g for g in step.grow if g.seq == seq], BLOCK)
        self.wish(place, step)
        if step.chunks:
            place.step, place.left = step, self.seconds(place, step, sequences)

    def seconds(self, place: Place, step: Step, sequences: dict[SeqId, Sequence]) -> float:
        decodes = [c for c in step.chunks if c.stop - c.start == 1]
        prefills = [c for c in step.chunks if c.stop - c.start > 1]
        asked = {span.node for c in step.chunks for span in sequences[c.seq].layout} - {place.id}
        found = self.cost.decode_step(len(decodes), sum(c.stop for c in decodes)) if decodes else 0.0
        found += sum(self.cost.computing(c.stop - c.start, c.start) for c in prefills)
        for node in asked:
            found += self.cost.question(len(step.chunks)) + self.cost.merging(len(step.chunks))
            found += self.busy_question if self.places[node].step is not None else 0.0
        return found

    def end(self, place: Place) -> None:
        step, place.step = place.step, None
        assert step is not None
        running = {s.id: s for s in place.running}
        for chunk in step.chunks:
            s = running[chunk.seq]
            s.compute(chunk)
            self.computed += chunk.stop - chunk.start
            if s.gap is not None:
                continue
            job = self.jobs[s.id]
            long = job.prompt > place.blocks.count * BLOCK
            got = 1 + (job.prompt if not s.produced else 0)
            self.tokens["output"] += 1
            self.tokens["prompt"] += got - 1
            self.tokens["long"] += got if long else 0
            s.tokens.append(1)
            if s.produced >= job.count:
                place.running.remove(s)
                self.release(place, s.id)
                self.served += 1
                if not long:
                    self.latencies.append(self.now - job.asked)
                job.after(self, True)

    def preempt(self, place: Place, s: Sequence) -> None:
        self.release(place, s.id)
        s.forget()
        place.running.remove(s)
        place.waiting.insert(0, s)
        self.preempted += 1

    def release(self, place: Place, seq: SeqId) -> None:
        place.blocks.release(seq)
        for lender, _ in list(self.loans_of(place)):
            if lender.blocks.release(seq, place.id):
                place.idle_since[lender.id] = self.now

    # --- borrowing -----------------------------------------------------------------------------------------------

    def wish(self, place: Place, step: Step) -> None:
        if not step.short:
            place.denied = False
            return
        if self.now < place.ask_again:
            return
        more = sum(loan.blocks for _, loan in self.loans_of(place)) - place.blocks.lent
        wish = shortage(step, place.running, place.waiting, BLOCK, place.blocks.count, more)
        place.ask_again = self.now + RETRY
        place.denied = not self.borrow(place, *wish)

    def borrow(self, place: Place, least: int, wanted: int, beyond: int | None) -> bool:
        offers = self.policy.creditors(self.ledger, place.id, wanted, (), beyond is not None)
        save = False
        if beyond is not None and self.policy.saves:
            self.turn = self.turn.after(place.id, self.now)
            save = self.turn.node == place.id
        if save and beyond is not None:
            least, wanted, place.saved_until = 1, beyond, self.now + TURN_SECONDS
        if isinstance(offers, Refused) or wanted < 1:
            return False
        got: list[tuple[Place, int]] = []
        for name, offered in offers:
            lender = self.places[name].blocks
            asked = min(wanted - sum(n for _, n in got), offered)
            if save:
                asked = min(asked, lender.offer)
            if asked < 1:
                continue
            self.count += 1
            if not isinstance(lender.lend(place.id, asked, 1e9, f"l{self.count}"), Refused):
                got.append((self.places[name], asked))
        enough = sum(n for _, n in got) >= least
        for host, asked in got:
            if not enough:
                host.blocks.give_back(place.id, asked)
                continue
            self.loans += 1
            place.idle_since[host.id] = self.now
            (place.saved.add if save else place.saved.discard)(host.id)
        return enough
