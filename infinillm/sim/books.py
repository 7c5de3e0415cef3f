"""The books of simulated groups: where every request is, and what each instance keeps of it.

Theory of operation. A request waits, is computed by a prefill or beside the step of a batch, belongs to a batch, or has
had its last step. Only those that are computed or in a batch have K/V. An instance that is lost takes along what it
kept. Whoever had K/V there is let go with all it has elsewhere, and so are all prompts of a prefill that it had a part
in, and beside a step of its group; and who waits and could not be held to its end any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple

from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Kept, Prefill, by_place, slots
from infinillm.core.planners import Planner
from infinillm.core.types import Ledger, Loan, Node, NodeId, SeqId
from infinillm.errors import Broken
from infinillm.sim.hardware import Site
from infinillm.sim.parties import Asked, Party, Place


class Coming(NamedTuple):
    """K/V of a request is on its way, until then."""

    source: NodeId
    seq: SeqId
    until: float


class Books:
    """See the theory of operation above."""

    def __init__(self, sites: Sequence[Site], times: Times, planner: Planner, block_size: int):
        self.sites, self.times, self.planner, self.block_size = sites, times, planner, block_size
        self.places = {site.id: Place(site, site.blocks * block_size) for site in sites}  # but those that are lost
        self.requests: dict[SeqId, Asked] = {}  # all that are not answered
        self.waiting: dict[SeqId, Asked] = {}  # oldest first
        self.leaving: set[SeqId] = set()  # whose last step is still in hand
        self.prefills: list[Prefill] = []
        self.parties: list[Party] = []
        self.coming: list[Coming] = []
        self.asked = 0
        self.longest = self.largest = 0  # tokens of a request that can be served, and slots of the largest server
        self.backlog, self.wanted = 0.0, 0  # seconds of the prompts that wait, each on all instances, and their slots
        self._measure()

    def _measure(self) -> None:
        """After instances came or went."""
        instances = self.instances(self.places, inf)
        self.longest = self.planner.longest(instances, self.times)
        self.largest = max(map(slots, by_place(instances)), default=0)
        self.backlog = sum(map(self._alone, self.waiting.values()))

    def _alone(self, request: Asked) -> float:
        """Seconds of its prompt on all instances."""
        return self.times.quickest(max(len(self.places), 1), request.tokens, request.tokens**2)

    @property
    def free(self) -> int:
        """Slots free, less what those that wait come to need."""
        return sum(each.free for each in self.places.values()) - self.wanted

    def instances(self, names: Iterable[NodeId], now: float) -> tuple[Instance, ...]:
        """What the planner is told of them."""
        return tuple(map(partial(self._told, now), names))

    def _told(self, now: float, name: NodeId) -> Instance:
        place = self.places[name]
        return Instance(name, place.slots, place.used, str(place.site.server), max(place.ready - now, 0.0))

    # --- requests ------------------------------------------------------------------------------------------------

    def admit(self, request: Asked) -> None:
        """A request comes to these instances, and waits; perhaps again."""
        self.asked += 1
        request.id = f"s{self.asked}"
        self.requests[request.id] = request
        newest = next(reversed(self.waiting.values()), request)
        self.queue(request, 1)
        if request.arrived < newest.arrived:
            self.sort()

    def queue(self, request: Asked, sign: int) -> None:
        """A request begins to wait, or ends."""
        if sign > 0:
            self.waiting[request.id] = request
        else:
            del self.waiting[request.id]
        self.backlog += sign * self._alone(request)
        self.wanted += sign * (request.tokens + request.left)

    def sort(self) -> None:
        """Some that wait again came before others."""
        self.waiting = dict(sorted(self.waiting.items(), key=lambda item: (item[1].arrived, item[0])))

    def take(self, names: Iterable[SeqId], kept: Iterable[Kept]) -> list[Asked]:
        """Requests that wait are to be prefilled, and to lie so."""
        requests = [self.waiting[seq] for seq in names]
        for request in requests:
            self.queue(request, -1)
        for name, seq, start, stop in kept:
            self.hold(self.requests[seq], name, stop - start)
        return requests

    def hold(self, request: Asked, name: NodeId, tokens: int) -> None:
        held = request.held.get(name, 0) + tokens
        if held:
            request.held[name] = held
        else:
            del request.held[name]
        self.places[name].used += tokens

    def release(self, request: Asked) -> None:
        for name, tokens in request.held.items():
            self.places[name].used -= tokens
        request.held.clear()

    # --- losses --------------------------------------------------------------------------------------------------

    def lose(self, node: NodeId, now: float) -> list[Asked]:
        """An instance is lost while no batch has steps in hand; returns whom these books know no more, oldest first."""
        gone = {each.id for each in self.requests.values() if node in each.held}
        gone.update(each.seq for each in self.coming if each.source == node and each.until > now)
        gone.update(prompt.id for party in self.parties for prompt in party.prompts)
        for request in self.requests.values():
            request.held.pop(node, None)
        del self.places[node]
        self._measure()
        gone.update(each.id for each in self.waiting.values() if each.most > self.longest)
        gone &= self.requests.keys() - self.leaving
        for prefill in [each for each in self.prefills if node in each.group or not gone.isdisjoint(each.requests)]:
            self.prefills.remove(prefill)
            gone.update(prefill.requests)
            for name in prefill.group:
                if name in self.places:
                    self.places[name].ready = now
        rests = [[each for each in party.requests if each.id not in gone] for party in self.parties]
        self.parties = [Party(requests) for requests in rests if requests]
        lost = sorted((self.requests.pop(seq) for seq in gone), key=lambda each: (each.arrived, each.id))
        for request in lost:
            if request.id in self.waiting:
                self.queue(request, -1)
            self.release(request)
        return lost

    def restore(self, node: NodeId, now: float) -> None:
        """An instance that was lost is there again, empty."""
        known = self.places
        fresh = {each.id: Place(each, each.blocks * self.block_size, ready=now) for each in self.sites}
        self.places = {name: known.get(name, place) for name, place in fresh.items() if name in known or name == node}
        self._measure()

    # --- looking on ----------------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        """What people may look at. K/V of a request that lies with others than its master is taken for lent to that.

        Who waits, waits at the first instance; slots are rounded to blocks.
        """
        lent: Counter[tuple[NodeId, NodeId]] = Counter()
        running: Counter[NodeId] = Counter()
        for party in self.parties:
            for master, requests in party.masters.items():
                running[master] += len(requests)
                for request in requests:
                    for name, tokens in request.held.items():
                        if name != master:
                            lent[name, master] += tokens
        given: Counter[NodeId] = Counter()
        taken: Counter[NodeId] = Counter()
        for (lender, borrower), tokens in lent.items():
            given[lender] += tokens // self.block_size
            taken[borrower] += tokens // self.block_size
        nodes: dict[NodeId, Node] = {}
        for place in self.places.values():
            name, blocks = place.site.id, place.site.blocks
            own = min(-(-place.used // self.block_size), blocks) - given[name]
            nodes[name] = Node(
                name,
                "1",
                name,
                blocks,
                blocks,
                used=own,
                lent=given[name],
                borrowed=taken[name],
                running=running[name],
                waiting=0 if nodes else len(self.waiting),
            )
        loans = {
            f"{lender}>{borrower}": Loan(f"{lender}>{borrower}", lender, borrower, count, inf, count)
            for (lender, borrower), tokens in lent.items()
            if (count := tokens // self.block_size)
        }
        return Ledger(1, nodes, loans)

    def check(self) -> None:
        """Raise Broken where a slot is lost or used twice, or a request is nowhere or in two places."""
        running = [request for party in self.parties for request in party.requests]
        filling = [self.requests[seq] for each in self.prefills for seq in each.requests]
        filling += [request for party in self.parties for request in party.prompts]
        everywhere = [*self.waiting, *self.leaving, *(each.id for each in (*running, *filling))]
        if sorted(everywhere) != sorted(self.requests):
            raise Broken(f"requests {sorted(self.requests)} are at {sorted(everywhere)}")
        if any(each.most > self.longest for each in self.waiting.values()):
            raise Broken(f"nobody can hold more than {self.longest:,} tokens, and some wait for that")
        arrived = [each.arrived for each in self.waiting.values()]
        if arrived != sorted(arrived):
            raise Broken("those that wait are not in their order")
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
        if len(set(names)) < len(names) or not self.places.keys() >= set(names):
            raise Broken(f"groups share an instance, or have one that is lost: {groups}")
