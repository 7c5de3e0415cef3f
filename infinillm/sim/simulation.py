"""A cluster of plain values, and a heap for a clock: the decisions of a real one, in virtual time.

Theory of operation. Everything that happens is a call at a moment of the clock; calls of one moment come in the order
they were asked for, so equal inputs give equal histories. The controller's side is here: every `beat_seconds` the
workers tell what changed and the ledger takes it in, so questions are answered from books that are a little old; every
fourth beat the policy may order what nobody asked for, and the orders arrive with the next beat. The policies, the
ledger, the scheduler and the books are those of the product; what is left out is everything that carries them out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from infinillm.core import ledger as books
from infinillm.core.blocks import Blocks
from infinillm.core.cost import Costs
from infinillm.core.ledger import Joined, Report
from infinillm.core.pace import PLAN_BEATS
from infinillm.core.policy import Policy, saving
from infinillm.core.policy.orders import MoveBlocks, Offers, blocks_for
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.scheduler import Budget
from infinillm.core.types import Ledger, NodeId, Refused
from infinillm.sim.hardware import Cluster
from infinillm.sim.traffic import Arrival
from infinillm.sim.worker import Worker

GREEDY = 0.0


class Clock:
    """What is to happen when."""

    def __init__(self) -> None:
        self.now, self.count, self._heap = 0.0, 0, list[tuple[float, int, Callable[[], None]]]()

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
        self.clock = Clock()
        self.at = self.clock.at
        self.sites = {site.id: site for site in cluster.sites}
        self.workers = {
            s.id: Worker(s, Blocks(s.id, s.blocks, budget.block_size, int(s.blocks * lend_fraction)), budget, self)
            for s in cluster.sites
        }
        apart = len({site.server for site in cluster.sites}) > 1
        self.costs = Costs(own={site.id: site.far if apart else site.near for site in cluster.sites})
        self.reports: dict[NodeId, Report] = {w.id: w.report() for w in self.workers.values()}
        self.ledger = books.apply_all(Ledger(1), (Joined(report) for report in self.reports.values()))
        self.promised = books.Promised()
        self.turn = saving.NOBODY
        self.orders: tuple[MoveBlocks, ...] = ()
        self.running: dict[str, tuple[float, Then]] = {}
        self.arriving: Arrival | None = None
        self.asked = self.beats = 0
        self.at(beat_seconds, self._beat)

    @property
    def now(self) -> float:
        return self.clock.now

    # --- requests ------------------------------------------------------------------------------------------------

    def ask(self, prompt: int, output: int, then: Then) -> None:
        """Ask for `output` tokens after a prompt of so many, now; `then` hears how it ended."""
        self.asked += 1
        size, now = self.budget.block_size, self.now
        found = self.policy.route(self.promised.expected(self.ledger), prompt, prompt + output, size, ())
        if isinstance(found, Refused):
            then(Ending(now, now, now, prompt, 0, refused=found.reason))
            return
        self.promised.add(found, blocks_for(prompt, size), now)
        name = f"s{self.asked}"
        self.running[name] = (now, then)
        sampling = Sampling(temperature=GREEDY, max_tokens=output, ignore_eos=True)
        self.workers[found].submit(Request(name, range(prompt), sampling, now))  # type: ignore[arg-type]

    def ended(self, worker: Worker, sequence: Sequence, first: float) -> None:
        asked, then = self.running.pop(sequence.id)
        prompt = len(sequence.request.prompt)
        then(Ending(asked, first, self.now, prompt, sequence.produced, worker.id))

    def play(self, arrivals: Iterator[Arrival], then: Then) -> None:
        """Ask for what arrives, when it does; only the next arrival is known at any time."""
        self.arriving = next(arrivals, None)
        if self.arriving is not None:
            self.at(self.arriving.at, partial(self._arrive, self.arriving, arrivals, then))

    def _arrive(self, arrival: Arrival, arrivals: Iterator[Arrival], then: Then) -> None:
        self.ask(arrival.prompt, arrival.output, then)
        self.play(arrivals, then)

    @property
    def busy(self) -> bool:
        """Whether anything is still to arrive or to be answered."""
        return self.arriving is not None or bool(self.running)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        while self.clock.step(until):
            pass
        self.clock.now = until
        for worker in self.workers.values():
            worker.settle()

    # --- what workers see ----------------------------------------------------------------------------------------

    def worker(self, node: NodeId) -> Worker:
        return self.workers[node]

    def answer(self, one: NodeId, other: NodeId, rows: int, tokens: int) -> float:
        way = self.cluster.cost(self.sites[one], self.sites[other])
        return way.question(rows) + self.workers[other].cost.attend(tokens, rows)

    def offers(self, node: NodeId, blocks: int, outgrown: bool) -> tuple[Offers | Refused, bool]:
        offers, self.turn, may_save = saving.creditors(
            self.policy, self.promised.expected(self.ledger), self.turn, self.now, node, blocks, (), outgrown
        )
        return offers, may_save

    def seconds(self, node: NodeId, seconds: float) -> float:
        if self.cores is None:
            return seconds
        computing = sum(worker.going is not None or worker.id == node for worker in self.workers.values())
        return seconds * max(1.0, computing / self.cores)

    # --- the controller ------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        self.beats += 1
        for order in self.orders:
            self.workers[order.home].obey(order)
        self.orders = ()
        told: list[books.Event] = []
        for worker in self.workers.values():
            worker.tidy()
        for worker in self.workers.values():
            report = worker.report()
            told += books.changes(self.reports[worker.id], report)
            self.reports[worker.id] = report
            self.promised.heard(worker.id, self.now)
        self.ledger = books.apply_all(self.ledger, told)
        if self.beats % PLAN_BEATS == 0:
            found = self.policy.plan(self.ledger, self.costs, self.budget.block_size)
            self.orders = saving.orders(found, self.turn, self.now)
        self.at(self.now + self.beat_seconds, self._beat)

    def check(self) -> None:
        """Raise Broken where the books of a worker, or the ledger, do not balance."""
        for worker in self.workers.values():
            worker.settle()
            worker.blocks.check()
        books.check(self.ledger)
