"""A cluster whose planner decides whole iterations: groups of instances that prefill and decode, in virtual time.

Theory of operation. The planner is told of all instances that are not in a prefill, what they hold and who waits, and
its plan (core/elastic/values.py) is carried out here. It is asked as soon as a prefill or a batch ends or slots run
out, where a request comes while somebody is idle, and after some steps of decode while requests wait. Asking takes
no time, and nobody stops for it: the books are brought to where every batch is at the end of its step in hand, and what
a plan begins on a group begins when the last of its instances is there (`ready`). What ends with such a step is told
at that moment.

An instance that is lost ends the prefills and the steps that it has a part in, at once. What of them was computed does
not count, and what it kept is gone: those requests wait again with all they have said, and everything is planned anew
without it (sim/books.py). A step that the books were brought to the end of is not taken back.

Slots that a prefill keeps are taken when it is planned. Steps of decode are alike until a request ends or a master has
no slot left, so many are taken in one go. A preempted batch lies still, and the planner is not told of its instances,
until no prefill uses any of them. Whatever is computed takes what sim/striping.py says, and not what was predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from math import inf

from infinillm.core.cost import Cost
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Batch, Decode, Migration, Plan, Prefill, Running, State, Waiting
from infinillm.core.planners import Planner
from infinillm.core.types import Ledger, NodeId
from infinillm.errors import BadRequest, Broken
from infinillm.sim import striping
from infinillm.sim.books import Books, Coming
from infinillm.sim.hardware import Cluster
from infinillm.sim.parties import Asked, Party
from infinillm.sim.simulation import Clock, Ending, Then
from infinillm.sim.steps import Totals
from infinillm.sim.traffic import Arrival

TOLD = 1024  # requests of the queue that the planner is told of, the oldest


class Groups:
    """See the theory of operation above."""

    def __init__(self, cluster: Cluster, times: Times, planner: Planner, block_size: int, clock: Clock):
        self.cluster, self.times, self.planner = cluster, times, planner
        self.clock = clock
        self.at = self.clock.at
        self.books = Books(cluster.sites, times, planner, block_size)
        self.due, self.armed = inf, False  # when the planner is asked though nothing ended
        self.preemptions = self.moved = self.steps = self.rows = 0
        self.decoded, self.decodes = 0.0, 0  # seconds of those that ended, and how many

    # --- from outside --------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.clock.now

    def ask(self, prompt: int, output: int, then: Then) -> None:
        """Ask for `output` tokens after a prompt of so many, now; `then` hears how it ended."""
        request = Asked("", self.now, prompt, output, then)
        if not self.admit(request):
            request.refuse(self.planner.name, self.books.longest, self.now)
        elif len(self.books.waiting) == 1 and self._idle():
            self.plan()
        else:
            self._remind()

    def admit(self, request: Asked) -> bool:
        """Have a request wait until it is planned; false where it could never be held."""
        if fits := request.most <= self.books.longest:
            self.books.admit(request)
        return fits

    def play(self, arrivals: Iterator[Arrival], then: Then) -> None:
        """Ask for what arrives, when it does; only the next arrival is known at any time."""
        self.clock.play(arrivals, lambda each: self.ask(each.prompt, each.output, then))

    @property
    def busy(self) -> bool:
        """Whether anything is still to arrive or to be answered."""
        return self.clock.arriving is not None or bool(self.books.requests)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        self.clock.run(until)

    def watch(self, every: float, look: Callable[[float, Ledger], None]) -> None:
        """Have somebody look at the time and a ledger every so many seconds from now on."""
        self.clock.watch(every, lambda: look(self.now, self.ledger()))

    def ledger(self) -> Ledger:
        """What people may look at."""
        return self.books.ledger()

    def totals(self) -> Totals:
        return Totals(self.preemptions, self.moved, self.steps, self.rows)

    # --- losses --------------------------------------------------------------------------------------------------

    def die(self, node: NodeId) -> None:
        """An instance is lost, now, with all that it keeps; whoever needs that waits again, and all others go on."""
        if self.known(node):
            for request in self.lose(node):
                if not self.admit(request):
                    request.refuse(self.planner.name, self.books.longest, self.now)
            self.plan()

    def lose(self, node: NodeId) -> list[Asked]:
        """An instance is lost. Whom this returns is to be admitted somewhere, and then all is to be planned anew."""
        for party in self.books.parties:
            if node not in party.group:
                self._rest(party)
            elif party.times:
                self._count(party, party.over(self.now), self.now)
        return self.books.lose(node, self.now)

    def revive(self, node: NodeId) -> None:
        """An instance that was lost is there again, empty."""
        if not self.known(node):
            self.books.restore(node, self.now)
            self.plan()

    def known(self, node: NodeId) -> bool:
        """Whether an instance is there, and not lost. Raises BadRequest where there never was one."""
        if node not in (names := [site.id for site in self.cluster.sites]):
            raise BadRequest(f"there is no node {node!r}; there are {', '.join(names)}", field="node")
        return node in self.books.places

    def _refuse(self, request: Asked) -> None:
        """It had to make room, and could not be held any more."""
        self.books.leaving.remove(request.id)
        del self.books.requests[request.id]
        request.refuse(self.planner.name, self.books.longest, self.now)

    # --- planning ------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Have the planner decide anew, until nobody it was told of lies still."""
        while True:
            for party in self.books.parties:
                self._rest(party)
            still = self._still()
            self._carry_out(self.planner.plan(self._state(still), self.times), still)
            still = self._still()
            if all(party.times or still & party.holders for party in self.books.parties):
                break
        if self.books.waiting and not (self.books.prefills or self.books.parties):
            raise Broken(f"policy {self.planner.name} begins nothing on an idle cluster")
        going = [party for party in self.books.parties if party.times]
        self.due = min((party.began + party.seconds(self.planner.steps) for party in going), default=inf)
        self._remind()

    def _remind(self) -> None:
        """Ask the planner after some steps while requests wait."""
        if self.books.waiting and not self.armed and self.due < inf:
            self.armed = True
            self.at(self.due, self._be_reminded)

    def _be_reminded(self) -> None:
        self.armed = False
        if self.books.waiting and self.now >= self.due:
            self.plan()
        else:
            self._remind()

    def _still(self) -> set[NodeId]:
        """Instances the planner is not told of: in a prefill, or of a batch that waits for one."""
        found = {name for each in self.books.prefills for name in each.group}
        lying = [party.holders for party in self.books.parties if not party.times]
        while more := [names for names in lying if names & found and not names <= found]:
            found.update(*more)
        return found

    def _idle(self) -> bool:
        """Whether an instance could be given work."""
        busy = self._still().union(*(party.group for party in self.books.parties if party.times))
        return len(busy) < len(self.books.places)

    def _state(self, still: set[NodeId]) -> State:
        books = self.books
        told = islice(books.waiting.values(), TOLD)
        batches = (party.requests for party in books.parties if not still & party.holders)
        return State(
            books.instances((name for name in books.places if name not in still), self.now),
            tuple(Waiting(each.id, each.tokens, each.arrived, each.left) for each in told),
            tuple(Batch(tuple(map(self._running, requests))) for requests in batches if requests),
            self.decoded / max(self.decodes, 1),
            min((books.places[name].ready for each in books.prefills for name in each.group), default=inf) - self.now,
            self.now,
            books.largest,
        )

    def _running(self, each: Asked) -> Running:
        seconds = max(self.now - each.decoding, 0.0)
        return Running(each.id, each.arrived, each.held, each.produced, each.left, seconds)

    # --- what a plan begins --------------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan, still: set[NodeId]) -> None:
        lying = [party for party in self.books.parties if still & party.holders]
        for party in self.books.parties:
            party.times = 0
        for request in [self.books.requests[seq] for seq in plan.evicted]:
            self.books.release(request)
            self.preemptions += 1
            if request.most <= self.books.longest:
                self.books.queue(request, 1)
            else:
                self.books.leaving.add(request.id)
                self.at(self.now, partial(self._refuse, request))
        if plan.evicted:
            self.books.sort()
        self._move(plan.migrations)
        for prefill in plan.prefills:
            self._prefill(prefill)
        preempted = set(plan.preempted)
        paused = [[each for each in party.requests if each.id in preempted] for party in self.books.parties]
        decodes = [self._decode(each) for each in plan.decodes]
        self.books.parties = [*lying, *(Party(requests) for requests in paused if requests), *decodes]

    def _move(self, migrations: Sequence[Migration]) -> None:
        """K/V goes elsewhere; both ends do nothing else meanwhile."""
        sums: Counter[tuple[NodeId, NodeId]] = Counter()
        for seq, source, target, tokens in migrations:
            request = self.books.requests[seq]
            self.books.hold(request, target, tokens)
            self.books.hold(request, source, -tokens)
            sums[source, target] += tokens
        until: dict[tuple[NodeId, NodeId], float] = {}
        for (source, target), tokens in sums.items():
            over = self._ready((source, target)) + self._cost((source, target)).move(tokens)
            self.books.places[source].ready = self.books.places[target].ready = until[source, target] = over
            self.moved += tokens
        if migrations:
            going = [each for each in self.books.coming if each.until > self.now]
            self.books.coming = going + [Coming(m.source, m.seq, until[m.source, m.target]) for m in migrations]

    def _prefill(self, prefill: Prefill) -> None:
        requests = self.books.take(prefill.requests, prefill.kept)
        away = sum(each.stop - each.start for each in prefill.kept if each.instance not in prefill.group)
        cost = self._cost((*prefill.group, *(each.instance for each in prefill.kept)))
        seconds = striping.prefill(cost, [each.tokens for each in requests], len(prefill.group))
        over = self._ready(prefill.group) + max(seconds, cost.move(away) if away else 0.0)
        for name in prefill.group:
            self.books.places[name].ready = over
        self.books.prefills.append(prefill)
        self.at(over, partial(self._prefilled, prefill))

    def _prefilled(self, prefill: Prefill) -> None:
        if prefill not in self.books.prefills:
            return  # an instance of it was lost
        self.books.prefills.remove(prefill)
        party = Party([], prompts=[self.books.requests[seq] for seq in prefill.requests])
        self.steps += 1
        self._join(party, self.now)
        self._leave(party, self.now)
        self.books.parties.append(party)
        self.plan()

    def _decode(self, decode: Decode) -> Party:
        masters = {each.instance: [self.books.requests[seq] for seq in each.requests] for each in decode.masters}
        prompts = self.books.take(decode.prompts, decode.kept)
        party = Party([self.books.requests[seq] for seq in decode.requests], decode.group, masters, prompts)
        self._go_on(party, self._ready(decode.group))
        return party

    def _go_on(self, party: Party, now: float) -> None:
        """As many steps as are alike; they begin `now`."""
        party.times = self._alike(party)
        if party.times < 1:
            raise Broken(f"{party.group} has no slots for the next tokens of its {len(party.requests)} requests")
        shares, cost, further = party.shares(), self._cost(party.group), party.times - 1
        lengths = [each.tokens for each in party.prompts]
        party.began = now
        party.first = striping.beside(cost, shares, lengths) if lengths else striping.step(cost, shares)
        party.more = max((striping.step(cost, shares, further) - party.first) / further, 0.0) if further else 0.0
        self.at(now + party.seconds(party.times), partial(self._end, party))

    def _alike(self, party: Party) -> int:
        """Steps until a request ends or a master has no slots left; one where prompts are computed."""
        rooms = [self.books.places[name].free // len(requests) for name, requests in party.masters.items()]
        alike = min(*rooms, *(request.left for request in party.requests))
        return min(alike, 1) if party.prompts else alike

    # --- what ends -----------------------------------------------------------------------------------------------

    def _end(self, party: Party) -> None:
        if not party.times:
            return  # it was planned anew
        joined = bool(party.prompts)
        self._count(party, party.times, self.now)
        fits = all(self.books.places[name].free >= len(requests) for name, requests in party.masters.items())
        if party.requests and fits and not joined and not (self.books.waiting and self.now >= self.due):
            self._go_on(party, self.now)
        else:
            self.plan()

    def _rest(self, party: Party) -> None:
        """Bring the books to the end of the step in hand."""
        if party.times:
            steps = party.begun(self.now)
            over = party.began + party.seconds(steps)
            for name in party.group:
                self.books.places[name].ready = over
            self._count(party, steps, over)

    def _count(self, party: Party, times: int, over: float) -> None:
        """So many steps are over at that moment, and no more are in hand."""
        party.times = 0
        self.steps += times
        self.rows += times * len(party.requests)
        for name, requests in party.masters.items():
            for request in requests if times else ():
                self.books.hold(request, name, times)
                request.produced += times
        if times:
            self._join(party, over)
        self._leave(party, over)

    def _join(self, party: Party, over: float) -> None:
        """Prompts are computed: their requests belong to the batch."""
        self.rows += len(party.prompts)
        for request in party.prompts:
            request.produced += 1
            request.first = request.first or over
            request.decoding = request.decoding or over
        party.requests += party.prompts
        party.prompts = []

    def _leave(self, party: Party, over: float) -> None:
        for request in party.leave():
            self.books.release(request)
            self.books.leaving.add(request.id)
            self.at(over, partial(self._tell, request))

    def _tell(self, request: Asked) -> None:
        """Say that a request has ended."""
        self.books.leaving.remove(request.id)
        del self.books.requests[request.id]
        self.decoded += self.now - request.decoding
        self.decodes += 1
        request.then(Ending(request.arrived, request.first, self.now, request.prompt, request.produced))

    def _ready(self, names: Iterable[NodeId]) -> float:
        return max(self.now, *(self.books.places[name].ready for name in names))

    def _cost(self, names: Sequence[NodeId]) -> Cost:
        """The cost of the first, with others over the worst link among them."""
        sites = [self.books.places[name].site for name in names]
        apart = any(site.server != sites[0].server for site in sites)
        return sites[0].far if apart else sites[0].near

    def check(self) -> None:
        """Raise Broken where the books do not balance."""
        self.books.check()
