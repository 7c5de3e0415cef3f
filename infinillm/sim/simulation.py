"""A cluster of plain values, and a heap for a clock: the decisions of a real one, in virtual time.

Theory of operation. Everything that happens is a call at a moment of the clock; calls of one moment come in the order
they were asked for, so equal inputs give equal histories. The controller's side is here: every `beat_seconds` the
workers tell what changed and the ledger takes it in, so questions are answered from books that are a little old; every
fourth beat the policy may order what nobody asked for, and the orders arrive with the next beat. Only plans look at
layouts, so these are told once a plan. Nobody tells anything while nothing changes. The policies, the ledger, the
scheduler and the books are those of the product; what is left out is everything that carries them out.

A node that dies takes along what it held and what it ran. Gateways notice at once, and have others go on with its
requests; borrowers compute again what it held for them; lenders keep its blocks until they doubt that it lives, and the
ledger keeps it until it has been silent for some beats. It may come back, empty.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from infinillm.core import ledger as books
from infinillm.core.blocks import Blocks
from infinillm.core.cost import Costs
from infinillm.core.ledger import Joined, Left, Report
from infinillm.core.names import Landmarks
from infinillm.core.pace import DOUBT_SECONDS, PLAN_BEATS, SILENT_BEATS
from infinillm.core.policy import Policy, saving
from infinillm.core.policy.near import near
from infinillm.core.policy.orders import MoveBlocks, Offers, blocks_for
from infinillm.core.policy.places import too_far
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.scheduler import Budget
from infinillm.core.types import Ledger, Loan, LoanId, NodeId, Refused
from infinillm.errors import BadRequest
from infinillm.sim.around import Named
from infinillm.sim.hardware import Cluster, Site
from infinillm.sim.heartbeat import calm, quiet, report, tidy
from infinillm.sim.names import Names, Sessions
from infinillm.sim.remembered import Remembered
from infinillm.sim.steps import Totals
from infinillm.sim.traffic import Arrival
from infinillm.sim.worker import Worker

GREEDY = 0.0


class Clock:
    """What is to happen when."""

    def __init__(self) -> None:
        self.now, self.count, self._heap = 0.0, 0, list[tuple[float, int, Callable[[], None]]]()
        self.arriving: Arrival | None = None  # next

    def at(self, when: float, do: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self._heap, (max(when, self.now), self.count, do))

    def step(self, until: float) -> bool:
        """Have the next thing happen; false where there is none before `until`."""
        if not self._heap or self._heap[0][0] > until:
            return False
        self.now, _, do = heapq.heappop(self._heap)
        do()
        return True

    def run(self, until: float) -> None:
        """Let time pass until then."""
        while self.step(until):
            pass
        self.now = until

    def play(self, arrivals: Iterator[Arrival], ask: Callable[[Arrival], None]) -> None:
        """Have `ask` hear of what arrives, when it does; only the next arrival is known at any time."""
        self.arriving = next(arrivals, None)
        if self.arriving is not None:
            self.at(self.arriving.at, partial(self._arrive, self.arriving, arrivals, ask))

    def _arrive(self, arrival: Arrival, arrivals: Iterator[Arrival], ask: Callable[[Arrival], None]) -> None:
        ask(arrival)
        self.play(arrivals, ask)

    def watch(self, every: float, look: Callable[[], None]) -> None:
        """Have somebody look every so many seconds from now on. Raises BadRequest."""
        if not every > 0:
            raise BadRequest(f"every must be seconds above 0, not {every!r}", field="every")
        look()
        self.at(self.now + every, partial(self.watch, every, look))


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended: moments in seconds, lengths in tokens. Refused: no first token, and why."""

    asked: float
    first: float
    last: float
    prompt: int
    output: int
    node: NodeId = ""
    refused: str = ""


Then = Callable[[Ending], None]


@dataclass(slots=True)
class Asked:
    """A request that is being answered."""

    at: float
    prompt: int
    output: int
    then: Then
    names: Names | None
    first: float | None = None  # when its first token came
    produced: int = 0  # tokens that came from workers that died
    lost: set[NodeId] = field(default_factory=set)  # these workers


class Simulation:
    """See the theory of operation above.

    lend_fraction   most of its blocks a worker lends, as a share
    cores           that computing workers share evenly (workers on one machine), or None where each has its own
    """

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        budget: Budget,
        *,
        lend_fraction: float,
        beat_seconds: float,
        cores: float | None = None,
    ):
        self.cluster, self.policy, self.budget = cluster, policy, budget
        self.beat_seconds, self.cores = beat_seconds, cores
        self.lend_fraction = lend_fraction
        self.clock = Clock()
        self.at = self.clock.at
        self.sites = {site.id: site for site in cluster.sites}
        self.workers = {site.id: self._worker(site, 1) for site in cluster.sites}
        near, far = {site.id: site.near for site in cluster.sites}, {site.id: site.far for site in cluster.sites}
        self.costs = Costs(own=far if len({site.server for site in cluster.sites}) > 1 else near, near=near)
        self.reports: dict[NodeId, Report] = {w.id: report(w, None) for w in self.workers.values()}
        self.ledger = books.apply_all(Ledger(1), (Joined(each) for each in self.reports.values()))
        self.promised, self.landmarks = books.Promised(), Landmarks()
        self.turn = saving.NOBODY
        self._asked = replace(policy, creditors=self._creditors)
        self._told, self._expected = Remembered(), Remembered()  # of the ledger, and with what is promised
        self.orders: tuple[MoveBlocks, ...] = ()
        self.sessions = Sessions(budget.block_size)
        self.running: dict[str, Asked] = {}
        self.awake: dict[NodeId, None] = {}  # who has something to tell
        self.calm: set[NodeId] = set()  # of these: whose last word holds until something stirs them
        self.died: dict[NodeId, float] = {}  # and when
        self.past: list[Worker] = []  # that died, and whose nodes came back
        self.asked = self.beats = 0
        self.at(beat_seconds, self._beat)

    def _worker(self, site: Site, start: int) -> Worker:
        blocks = Blocks(site.id, site.blocks, self.budget.block_size, int(site.blocks * self.lend_fraction))
        return Worker(site, blocks, self.budget, self, start)

    @property
    def now(self) -> float:
        return self.clock.now

    # --- requests ------------------------------------------------------------------------------------------------

    def ask(self, prompt: int, output: int, then: Then, session: str = "", shared: int = 0) -> None:
        """Ask for `output` tokens after a prompt of so many, now; `then` hears how it ended.

        Its first `shared` tokens are those of the last request and answer of its `session`.
        """
        self.asked += 1
        name = f"s{self.asked}"
        self.running[name] = Asked(self.now, prompt, output, then, self.sessions.names(session, shared))
        self._send(name)

    def _send(self, name: str) -> None:
        """Have a worker answer a request, or go on with it."""
        asked, size = self.running[name], self.budget.block_size
        length, longest = asked.prompt + asked.produced, asked.prompt + asked.output
        expected = self.promised.expected(self.ledger)
        while True:
            found = self.policy.route(expected, length, longest, size, asked.lost)
            if isinstance(found, Refused):
                self._over(name, self.now if asked.first is None else asked.first, "", found.reason)
                return
            marks = asked.names.marks(length, size) if asked.names is not None else ()
            holders = self.landmarks.holders(marks)
            found = near(expected, found, holders, longest, size, asked.lost)
            if not self.workers[found].dead:
                break
            asked.lost.add(found)
        self.promised.add(found, blocks_for(length, size), self.now)
        sampling = Sampling(temperature=GREEDY, max_tokens=asked.output, ignore_eos=True)
        prompt, already = range(asked.prompt), range(asked.produced)
        request = Request(name, prompt, sampling, asked.at, already=already)  # type: ignore[arg-type]
        others = [node for node, _ in holders if node != found] if self.policy.shares else []
        self.workers[found].submit(request, asked.names, others, asked.first)

    def ended(self, worker: Worker, sequence: Sequence, first: float | None, refused: str) -> None:
        self.running[sequence.id].produced = sequence.produced
        self._over(sequence.id, self.now if first is None else first, worker.id, refused)

    def _over(self, name: str, first: float, node: NodeId, refused: str) -> None:
        asked = self.running.pop(name)
        asked.then(Ending(asked.at, first, self.now, asked.prompt, asked.produced, node, refused))

    def play(self, arrivals: Iterator[Arrival], then: Then) -> None:
        """Ask for what arrives, when it does; only the next arrival is known at any time."""
        self.clock.play(arrivals, lambda each: self.ask(each.prompt, each.output, then, each.session, each.shared))

    @property
    def busy(self) -> bool:
        """Whether anything is still to arrive or to be answered."""
        return self.clock.arriving is not None or bool(self.running)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        self.clock.run(until)
        for worker in self.workers.values():
            worker.settle()

    def watch(self, every: float, look: Callable[[float, Ledger], None]) -> None:
        """Have somebody look at the time and the ledger every so many seconds from now on."""
        self.clock.watch(every, lambda: look(self.now, self.ledger))

    def totals(self) -> Totals:
        workers = [*self.workers.values(), *self.past]
        return Totals(
            sum(worker.preemptions for worker in workers),
            sum(worker.moves.tokens for worker in workers),
            sum(worker.steps for worker in workers),
            sum(worker.rows for worker in workers),
        )

    # --- losses --------------------------------------------------------------------------------------------------

    def die(self, node: NodeId) -> None:
        """A node is lost, now, with all that it held and ran."""
        worker = self.known(node)
        if worker.dead:
            return
        self.died[node] = self.now
        self.awake.pop(node, None)
        self.calm.discard(node)
        lost = worker.die()
        for other in self.workers.values():
            other.lose(node)
        loans = [(lender, loan.id) for lender, loan in self._lent_to(node)]
        self.at(self.now + DOUBT_SECONDS, partial(self._doubt, node, loans))
        for sequence in lost:
            asked = self.running[sequence.id]
            asked.first, asked.produced = worker.firsts.get(sequence.id), sequence.produced
            asked.lost.add(node)
        for sequence in lost:
            self._send(sequence.id)

    def revive(self, node: NodeId) -> None:
        """A node that died is there again, empty."""
        worker = self.known(node)
        if not worker.dead:
            return
        for lender, _ in self._lent_to(node):
            lender.give_back(node, None)
        del self.died[node]
        self._forget(node)
        self.past.append(worker)
        self.workers[node] = self._worker(self.sites[node], worker.start + 1)
        self.reports[node] = report(self.workers[node], None)
        self.ledger = books.apply(self.ledger, Joined(self.reports[node]))

    def known(self, node: NodeId) -> Worker:
        """The worker of that name. Raises BadRequest."""
        if node not in self.workers:
            raise BadRequest(f"there is no node {node!r}; there are {', '.join(self.workers)}", field="node")
        return self.workers[node]

    def _lent_to(self, node: NodeId) -> list[tuple[Worker, Loan]]:
        workers = (worker for worker in self.workers.values() if not worker.dead)
        return [(worker, worker.blocks.loans[node]) for worker in workers if node in worker.blocks.loans]

    def _doubt(self, node: NodeId, loans: list[tuple[Worker, LoanId]]) -> None:
        """Who was silent for so long has no loans any more."""
        for lender, name in loans:
            loan = lender.blocks.loans.get(node)
            if loan is not None and loan.id == name and not lender.dead:
                lender.give_back(node, None)

    def _forget(self, node: NodeId) -> None:
        """The ledger's shell knows nothing of a node any more."""
        self.awake.pop(node, None)
        self.promised.forget(node)
        self.landmarks.forget(node)
        self.turn = saving.NOBODY if self.turn.node == node else self.turn

    # --- what workers see ----------------------------------------------------------------------------------------

    def worker(self, node: NodeId) -> Worker:
        return self.workers[node]

    def answer(self, one: NodeId, other: NodeId, rows: int, tokens: int) -> float:
        way = self.cluster.cost(self.sites[one], self.sites[other])
        return way.question(rows) + self.workers[other].cost.attend(tokens, rows)

    def moving(self, one: NodeId, other: NodeId, tokens: int) -> float:
        return self.cluster.cost(self.sites[one], self.sites[other]).move(tokens)

    def wake(self, node: NodeId) -> None:
        self.awake[node] = None

    def stir(self, node: NodeId) -> None:
        self.calm.discard(node)

    @property
    def capacity(self) -> int:
        ledger, size = self.ledger, self.budget.block_size
        return self._told.ask(ledger, "capacity", lambda: self.policy.capacity(ledger, size))

    def creditors(self, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool) -> Named:
        ledger, size = self.promised.expected(self.ledger), self.budget.block_size
        if not outgrown:
            far = self._expected.ask(ledger, node, lambda: too_far(ledger, self.costs, node, size))
            exclude = {*exclude, *far}
        offers, self.turn, may_save = saving.creditors(
            self._asked, ledger, self.turn, self.now, node, blocks, exclude, outgrown
        )
        return Named(offers, may_save, outgrown and self.policy.saves and not may_save)

    def _creditors(
        self, ledger: Ledger, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool
    ) -> Offers | Refused:
        question = node, blocks, frozenset(exclude), outgrown
        return self._expected.ask(ledger, question, lambda: self.policy.creditors(ledger, *question))

    def seconds(self, node: NodeId, seconds: float) -> float:
        if self.cores is None:
            return seconds
        computing = sum(worker.going is not None or worker.id == node for worker in self.workers.values())
        return seconds * max(1.0, computing / self.cores)

    # --- the controller ------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self.beats += 1
        planning = self.beats % PLAN_BEATS == 0
        for order in self.orders:
            self.workers[order.home].obey(order)
        self.orders = ()
        for node in [*self.awake]:
            if node not in self.calm:
                tidy(self.workers[node])
        told: list[books.Event] = []
        for node in [*self.awake]:
            if node not in self.calm:
                told += self._heartbeat(node, planning)
        for node, when in self.died.items():
            if node in self.ledger.nodes and self.now - when > SILENT_BEATS * self.beat_seconds:
                told.append(Left(node, "silent"))
                self._forget(node)
        if told:
            self.ledger = books.apply_all(self.ledger, told)
        if planning:
            ledger, size = self.ledger, self.budget.block_size
            found = self._told.ask(ledger, "plan", lambda: self.policy.plan(ledger, self.costs, size))
            self.orders = saving.orders(found, self.turn, self.now)
        self.at(self.now + self.beat_seconds, self._beat)

    def _heartbeat(self, node: NodeId, planning: bool) -> tuple[books.Event, ...]:
        """What a worker tells; once it has told that it is idle, it sleeps; once it has told all, it may be calm."""
        worker, before = self.workers[node], self.reports[node]
        rests = quiet(worker)
        after = self.reports[node] = report(worker, None if planning or rests else before.layouts)
        if before.marks != after.marks:
            self.landmarks.tell(node, after.marks - before.marks, before.marks - after.marks)
        self.promised.heard(node, self.now)
        if not self.promised.waits(node):
            if rests:
                del self.awake[node]
            elif (planning or not (worker.running or before.layouts)) and calm(worker):
                self.calm.add(node)
        return books.changes(before, after)

    def check(self) -> None:
        """Raise Broken where the books of a worker, or the ledger, do not balance."""
        for worker in self.workers.values():
            worker.settle()
        for worker in self.workers.values():
            worker.blocks.check()
        books.check(self.ledger)
