"""A cluster whose planner decides whole iterations: groups of instances that prefill and decode, in virtual time.

Theory of operation. The planner is told of all instances that are not in a prefill, what they hold and who waits, and
its plan (core/elastic/values.py) is carried out here. It is asked as soon as a prefill or a batch ends or slots run
out, where a request comes while somebody is idle, and after some steps of decode while requests wait. Asking takes
no time, and nobody stops for it: the books are brought to where every batch is at the end of its step in hand, and what
a plan begins on a group begins when the last of its instances is there (`ready`). What ends with such a step is told
at that moment.

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
from infinillm.core.elastic.values import (
    Batch,
    Decode,
    Instance,
    Kept,
    Migration,
    Plan,
    Prefill,
    Running,
    State,
    Waiting,
)
from infinillm.core.planners import Planner
from infinillm.core.types import Ledger, NodeId, SeqId
from infinillm.errors import Broken
from infinillm.sim import parties as books
from infinillm.sim import striping
from infinillm.sim.hardware import Cluster
from infinillm.sim.parties import Asked, Party, Place
from infinillm.sim.simulation import Clock, Ending, Then
from infinillm.sim.steps import Totals
from infinillm.sim.traffic import Arrival

TOLD = 1024  # requests of the queue that the planner is told of, the oldest


class Groups:
    """See the theory of operation above."""

    def __init__(self, cluster: Cluster, times: Times, planner: Planner, block_size: int, clock: Clock):
        self.cluster, self.times, self.planner, self.block_size = cluster, times, planner, block_size
        self.clock = clock
        self.at = self.clock.at
        self.places = {site.id: Place(site, site.blocks * block_size) for site in cluster.sites}
        self.longest = planner.longest(self._instances(self.places), times)
        self.requests: dict[SeqId, Asked] = {}  # all that are not answered
        self.waiting: dict[SeqId, Asked] = {}  # oldest first
        self.prefills: list[Prefill] = []
        self.parties: list[Party] = []
        self.leaving: set[SeqId] = set()  # whose last step is still in hand
        self.due, self.armed = inf, False  # when the planner is asked though nothing ended
        self.asked = self.preemptions = self.moved = self.steps = self.rows = 0
        self.decoded, self.decodes = 0.0, 0  # seconds of those that ended, and how many
        self.backlog, self.wanted = 0.0, 0  # seconds of the prompts that wait, each on all instances, and their slots

    # --- from outside --------------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.clock.now

    def ask(self, prompt: int, output: int, then: Then) -> None:
        """Ask for `output` tokens after a prompt of so many, now; `then` hears how it ended."""
        self.asked += 1
        if prompt + output > self.longest:
            name, longest = self.planner.name, self.longest
            why = f"{prompt + output:,} tokens are more than the {longest:,} that policy {name} can serve here"
            then(Ending(self.now, self.now, self.now, prompt, 0, refused=why))
            return
        request = Asked(f"s{self.asked}", self.now, prompt, output, then)
        self.requests[request.id] = request
        self._queue(request, 1)
        if len(self.waiting) == 1 and self._idle():
            self._plan()
        else:
            self._remind()

    def play(self, arrivals: Iterator[Arrival], then: Then) -> None:
        """Ask for what arrives, when it does; only the next arrival is known at any time."""
        self.clock.play(arrivals, lambda each: self.ask(each.prompt, each.output, then))

    @property
    def busy(self) -> bool:
        """Whether anything is still to arrive or to be answered."""
        return self.clock.arriving is not None or bool(self.requests)

    def run(self, until: float) -> None:
        """Let time pass until then."""
        self.clock.run(until)

    def watch(self, every: float, look: Callable[[float, Ledger], None]) -> None:
        """Have somebody look at the time and a ledger every so many seconds from now on."""
        self.clock.watch(every, lambda: look(self.now, self.ledger()))

    def ledger(self) -> Ledger:
        """What people may look at."""
        return books.ledger(self.places.values(), self.parties, len(self.waiting), self.block_size)

    @property
    def free(self) -> int:
        """Slots free, less what those that wait come to need."""
        return sum(each.free for each in self.places.values()) - self.wanted

    def totals(self) -> Totals:
        return Totals(self.preemptions, self.moved, self.steps, self.rows)

    # --- planning ------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Have the planner decide anew, until nobody it was told of lies still."""
        while True:
            for party in self.parties:
                self._rest(party)
            still = self._still()
            self._carry_out(self.planner.plan(self._state(still), self.times), still)
            still = self._still()
            if all(party.times or still & party.holders for party in self.parties):
                break
        if self.waiting and not (self.prefills or self.parties):
            raise Broken(f"policy {self.planner.name} begins nothing on an idle cluster")
        going = [party for party in self.parties if party.times]
        self.due = min((party.began + party.seconds(self.planner.steps) for party in going), default=inf)
        self._remind()

    def _remind(self) -> None:
        """Ask the planner after some steps while requests wait."""
        if self.waiting and not self.armed and self.due < inf:
            self.armed = True
            self.at(self.due, self._be_reminded)

    def _be_reminded(self) -> None:
        self.armed = False
        if self.waiting and self.now >= self.due:
            self._plan()
        else:
            self._remind()

    def _still(self) -> set[NodeId]:
        """Instances the planner is not told of: in a prefill, or of a batch that waits for one."""
        found = {name for each in self.prefills for name in each.group}
        lying = [party.holders for party in self.parties if not party.times]
        while more := [names for names in lying if names & found and not names <= found]:
            found.update(*more)
        return found

    def _idle(self) -> bool:
        """Whether an instance could be given work."""
        busy = self._still().union(*(party.group for party in self.parties if party.times))
        return len(busy) < len(self.places)

    def _state(self, still: set[NodeId]) -> State:
        told = islice(self.waiting.values(), TOLD)
        batches = (party.requests for party in self.parties if not still & party.holders)
        return State(
            self._instances(name for name in self.places if name not in still),
            tuple(Waiting(each.id, each.tokens, each.arrived, each.left) for each in told),
            tuple(Batch(tuple(map(self._running, requests))) for requests in batches if requests),
            self.decoded / max(self.decodes, 1),
            min((self.places[name].ready for each in self.prefills for name in each.group), default=inf) - self.now,
            self.now,
        )

    def _running(self, each: Asked) -> Running:
        seconds = max(self.now - each.decoding, 0.0)
        return Running(each.id, each.arrived, each.held, each.produced, each.left, seconds)

    def _instances(self, names: Iterable[NodeId]) -> tuple[Instance, ...]:
        places = [self.places[name] for name in names]
        return tuple(Instance(each.site.id, each.slots, each.used, str(each.site.server)) for each in places)

    # --- what a plan begins --------------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan, still: set[NodeId]) -> None:
        lying = [party for party in self.parties if still & party.holders]
        for party in self.parties:
            party.times = 0
        for request in [self.requests[seq] for seq in plan.evicted]:
            self._release(request)
            self._queue(request, 1)
            self.preemptions += 1
        if plan.evicted:
            self.waiting = dict(sorted(self.waiting.items(), key=lambda item: (item[1].arrived, item[0])))
        self._move(plan.migrations)
        for prefill in plan.prefills:
            self._prefill(prefill)
        preempted = set(plan.preempted)
        paused = [[each for each in party.requests if each.id in preempted] for party in self.parties]
        decodes = [self._decode(each) for each in plan.decodes]
        self.parties = [*lying, *(Party(requests) for requests in paused if requests), *decodes]

    def _move(self, migrations: Sequence[Migration]) -> None:
        """K/V goes elsewhere; both ends do nothing else meanwhile."""
        sums: Counter[tuple[NodeId, NodeId]] = Counter()
        for seq, source, target, tokens in migrations:
            request = self.requests[seq]
            self._hold(request, target, tokens)
            self._hold(request, source, -tokens)
            sums[source, target] += tokens
        for (source, target), tokens in sums.items():
            over = self._ready((source, target)) + self._cost((source, target)).move(tokens)
            self.places[source].ready = self.places[target].ready = over
            self.moved += tokens

    def _prefill(self, prefill: Prefill) -> None:
        requests = self._take(prefill.requests, prefill.kept)
        away = sum(each.stop - each.start for each in prefill.kept if each.instance not in prefill.group)
        cost = self._cost((*prefill.group, *(each.instance for each in prefill.kept)))
        seconds = striping.prefill(cost, [each.tokens for each in requests], len(prefill.group))
        over = self._ready(prefill.group) + max(seconds, cost.move(away) if away else 0.0)
        for name in prefill.group:
            self.places[name].ready = over
        self.prefills.append(prefill)
        self.at(over, partial(self._prefilled, prefill))

    def _take(self, names: Iterable[SeqId], kept: Iterable[Kept]) -> list[Asked]:
        """Requests that wait are to be prefilled, and to lie so."""
        requests = [self.waiting[seq] for seq in names]
        for request in requests:
            self._queue(request, -1)
        for name, seq, start, stop in kept:
            self._hold(self.requests[seq], name, stop - start)
        return requests

    def _prefilled(self, prefill: Prefill) -> None:
        self.prefills.remove(prefill)
        party = Party([], prompts=[self.requests[seq] for seq in prefill.requests])
        self.steps += 1
        self._join(party, self.now)
        self._leave(party, self.now)
        self.parties.append(party)
        self._plan()

    def _decode(self, decode: Decode) -> Party:
        masters = {each.instance: [self.requests[seq] for seq in each.requests] for each in decode.masters}
        prompts = self._take(decode.prompts, decode.kept)
        party = Party([self.requests[seq] for seq in decode.requests], decode.group, masters, prompts)
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
        rooms = [self.places[name].free // len(requests) for name, requests in party.masters.items()]
        alike = min(*rooms, *(request.left for request in party.requests))
        return min(alike, 1) if party.prompts else alike

    # --- what ends -----------------------------------------------------------------------------------------------

    def _end(self, party: Party) -> None:
        if not party.times:
            return  # it was planned anew
        joined = bool(party.prompts)
        self._count(party, party.times, self.now)
        fits = all(self.places[name].free >= len(requests) for name, requests in party.masters.items())
        if party.requests and fits and not joined and not (self.waiting and self.now >= self.due):
            self._go_on(party, self.now)
        else:
            self._plan()

    def _rest(self, party: Party) -> None:
        """Bring the books to the end of the step in hand."""
        if party.times:
            steps = party.begun(self.now)
            over = party.began + party.seconds(steps)
            for name in party.group:
                self.places[name].ready = over
            self._count(party, steps, over)

    def _count(self, party: Party, times: int, over: float) -> None:
        """So many steps are over at that moment, and no more are in hand."""
        party.times = 0
        self.steps += times
        self.rows += times * len(party.requests)
        for name, requests in party.masters.items():
            for request in requests if times else ():
                self._hold(request, name, times)
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
            self._release(request)
            self.leaving.add(request.id)
            self.at(over, partial(self._tell, request))

    def _tell(self, request: Asked) -> None:
        """Say that a request has ended."""
        self.leaving.remove(request.id)
        del self.requests[request.id]
        self.decoded += self.now - request.decoding
        self.decodes += 1
        request.then(Ending(request.arrived, request.first, self.now, request.prompt, request.produced))

    # --- books ---------------------------------------------------------------------------------------------------

    def _queue(self, request: Asked, sign: int) -> None:
        """A request begins to wait, or ends."""
        if sign > 0:
            self.waiting[request.id] = request
        else:
            del self.waiting[request.id]
        self.backlog += sign * self.times.quickest(len(self.places), request.tokens, request.tokens**2)
        self.wanted += sign * (request.tokens + request.left)

    def _hold(self, request: Asked, name: NodeId, tokens: int) -> None:
        held = request.held.get(name, 0) + tokens
        if held:
            request.held[name] = held
        else:
            del request.held[name]
        self.places[name].used += tokens

    def _release(self, request: Asked) -> None:
        for name, tokens in request.held.items():
            self.places[name].used -= tokens
        request.held.clear()

    def _ready(self, names: Iterable[NodeId]) -> float:
        return max(self.now, *(self.places[name].ready for name in names))

    def _cost(self, names: Sequence[NodeId]) -> Cost:
        """The cost of the first, with others over the worst link among them."""
        sites = [self.places[name].site for name in names]
        apart = any(site.server != sites[0].server for site in sites)
        return sites[0].far if apart else sites[0].near

    def check(self) -> None:
        """Raise Broken where a slot is lost or used twice, or a request is nowhere or in two places."""
        running = [request for party in self.parties for request in party.requests]
        filling = [self.requests[seq] for each in self.prefills for seq in each.requests]
        filling += [request for party in self.parties for request in party.prompts]
        everywhere = [*self.waiting, *self.leaving, *(each.id for each in (*running, *filling))]
        if sorted(everywhere) != sorted(self.requests):
            raise Broken(f"requests {sorted(self.requests)} are at {sorted(everywhere)}")
        held: Counter[NodeId] = Counter()
        for request, tokens in [*((r, r.tokens - 1) for r in running), *((r, r.tokens) for r in filling)]:
            held.update(request.held)
            if sum(request.held.values()) != tokens or not all(request.held.values()):
                raise Broken(f"{request.id} of {tokens} tokens holds {request.held}")
        for name, place in self.places.items():
            if place.used != held[name] or not 0 <= place.used <= place.slots:
                raise Broken(f"{name} has {place.used} slots in use for {held[name]} tokens, of {place.slots}")
        groups = [*(each.group for each in self.prefills), *(party.group for party in self.parties if party.times)]
        names = [name for group in groups for name in group]
        if len(set(names)) < len(names):
            raise Broken(f"groups share an instance: {groups}")
