"""The controller: the ledger's shell. It hears events, answers questions with policies, and keeps time.

Theory of operation. All calls run on one event loop, which is the inbox: `hear` is the only place where the ledger
changes, and nothing awaits between reading it and changing it. The ledger is soft state. A new controller starts with
an empty one and a larger epoch; nodes find that they are not known, and join again with all they know. While that goes
on (`settling`) a request that seems too long is told to try again, not that it never fits.

Of several controllers one leads, by a lease (lease.py), and only until a moment of its own clock; the others refuse
every call with StandsBy. One that begins to lead is like one that has just started. An epoch that is larger than ours
tells that another one leads or has led: we are Stale, and stand by.

    any call    from one who knows of a larger epoch finds us Stale
    Join        anybody but an earlier incarnation of a member, which is Stale; a later one supersedes the member
    Heartbeat   from a known node and its present incarnation; else `known` is false, or it is Stale
    Creditors   from anybody but an earlier incarnation of a member
    silence     a node not heard for SILENT_BEATS heartbeats has left; nobody is blamed for a sleep of our own
    plan        every PLAN_BEATS heartbeats the policy may order what nobody asked for; an order goes to the node it
                concerns with its next heartbeat, and one that was not fetched by the next plan is void

Requests routed since a node's last report are counted as if they were in its queue already, so that a burst spreads.
"""

from __future__ import annotations

import asyncio
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NoReturn

from infinillm import config, rpc, wire
from infinillm.core import ledger as books
from infinillm.core.cost import Cost, Costs
from infinillm.core.ledger import Event, Joined, Left, Lent, Report, Returned
from infinillm.core.names import Landmarks
from infinillm.core.pace import PLAN_BEATS, SILENT_BEATS
from infinillm.core.policy import Policy, saving
from infinillm.core.policy.near import near
from infinillm.core.policy.orders import MoveBlocks, blocks_for
from infinillm.core.policy.places import too_far
from infinillm.core.types import Ledger, Model, NodeId, Refused, difference
from infinillm.errors import BadRequest, Broken, NotFound, Stale, StandsBy, TooLong, Unavailable
from infinillm.protos import controller_pb2 as pb
from infinillm.protos import types_pb2
from infinillm.servers.lease import Campaign, lease
from infinillm.servers.membership import LONGEST_PAUSE, heard_in
from infinillm.servers.process import Told, ready
from infinillm.telemetry import Metrics, log

CONTROLLER = pb.DESCRIPTOR.services_by_name["ControllerService"]
STOP_SECONDS = 1.0


class Controller:
    """The body of ControllerService. `clock` is monotonic, in seconds.

    It leads for good where an `epoch` larger than any controller's before is given; with 0 it stands by.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        epoch: int,
        heartbeat_seconds: float,
        metrics: Metrics,
        clock: Callable[[], float],
        cost: Cost | None,
    ):
        self.policy, self.heartbeat_seconds, self.metrics, self.clock = policy, heartbeat_seconds, metrics, clock
        self.cost = cost  # of nodes which bring none of their own
        self.leader = ""  # who leads, where we do not
        self.seen = 0  # the largest epoch anybody told us of
        self.until = math.inf if epoch else -math.inf  # by the clock: we lead no longer than that
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        """With empty books."""
        self.costs = Costs(self.cost)
        self.orders: dict[NodeId, list[MoveBlocks]] = {}  # by the home that will carry them out
        self.ledger = Ledger(epoch)
        self.model: Model | None = None  # of the nodes in the ledger; the first to join says
        self.heard: dict[NodeId, float] = {}
        self.landmarks, self.turn = Landmarks(), saving.NOBODY
        self.promised = books.Promised()
        self.started = self.ticked = self.clock()
        self.restarted = False
        self.sound = True

    # --- who leads -----------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of our present term, or our last."""
        return self.ledger.epoch

    @property
    def leads(self) -> bool:
        return self.clock() < self.until

    def lead(self, epoch: int, until: float) -> None:
        """Lead until that moment; with an epoch that is not ours yet, from empty books."""
        if epoch != self.epoch:
            self._forget()
            self._begin(epoch)
            log("leads", epoch=epoch)
        self.until, self.leader = until, ""

    def stand_by(self, leader: str) -> None:
        """Lead no more; `leader` does."""
        if self.until > -math.inf or leader != self.leader:
            log("stands_by", leader=leader, epoch=self.epoch)
        self.until, self.leader = -math.inf, leader
        self._forget()

    def _forget(self) -> None:
        for node in self.heard:
            self.metrics.remove("heartbeat_age_seconds", node=node)
        self._begin(self.epoch)

    def _check_leads(self, heard: int) -> None:
        """Raises Stale where somebody has heard of a larger epoch, StandsBy where another controller leads."""
        self.seen = max(self.seen, heard)
        self.restarted |= 0 < heard < self.epoch
        if heard > self.epoch and self.leads:
            self.stand_by("the one of a later epoch")
            raise Stale(f"this controller speaks for epoch {self.epoch}, and {heard} is known", field="epoch")
        if not self.leads:
            raise StandsBy(f"this controller stands by; {self.leader or 'none that it knows of'} leads")

    # --- membership ----------------------------------------------------------------------------------------------

    async def Join(self, request: pb.JoinRequest, call: Any) -> pb.JoinResponse:
        self._check_leads(request.epoch)
        now = self.clock()
        node, model = wire.node_from_wire(request.node), wire.model_from_wire(request.model)
        self._check_current(node.id, node.incarnation)
        others = set(self.ledger.nodes) - {node.id}
        if others and self.model is not None and (differs := difference(self.model, model)):
            field, ours, theirs = differs
            raise BadRequest(f"{field} is {ours} in this cluster, {theirs} in the node that joins", field=field)
        loans = tuple(wire.loan_from_wire(loan, now) for loan in request.loans)
        report = Report(node, loans, dict(wire.layout_from_wire(layout) for layout in request.layouts))
        cost = wire.cost_from_wire(request.profile) if request.profile else None
        self.hear([Joined(report)])
        self.landmarks.forget(node.id)
        self.landmarks.tell(node.id, request.marks, ())
        self._price(node.id, cost)
        self.model = model
        self.heard[node.id] = now
        log("joined", node=node.id, incarnation=node.incarnation, address=node.address, blocks=node.blocks)
        return pb.JoinResponse(
            epoch=self.ledger.epoch, heartbeat_seconds=self.heartbeat_seconds, policy=self.policy.name
        )

    async def Heartbeat(self, request: pb.HeartbeatRequest, call: Any) -> pb.HeartbeatResponse:
        self._check_leads(request.epoch)
        now, epoch = self.clock(), self.epoch
        known = self._check_current(request.node, request.incarnation)
        if not known or request.epoch < epoch:
            return pb.HeartbeatResponse(epoch=epoch, known=False)
        self.hear(heard_in(request, now))
        self.landmarks.tell(request.node, request.marks, request.unmarked)
        self.heard[request.node] = now
        self.promised.heard(request.node, now)
        self.metrics.add("heartbeats_total")
        orders = (o for o in self.orders.pop(request.node, ()) if o.target in self.ledger.nodes)
        moves = (wire.move_to_wire(order, self.ledger.nodes[order.target].address) for order in orders)
        others = sum(n.serves and not n.draining for n in self.ledger.nodes.values() if n.id != request.node)
        return pb.HeartbeatResponse(epoch=epoch, known=True, moves=moves, others=others)

    async def Leave(self, request: pb.LeaveRequest, call: Any) -> pb.LeaveResponse:
        self._check_leads(request.epoch)
        if self._check_current(request.node, request.incarnation):
            self._leave(request.node, "it said so")
        return pb.LeaveResponse(epoch=self.epoch)

    def _check_current(self, node: NodeId, incarnation: str) -> bool:
        """Whether this is the member of that name. Raises Stale where the member was started later."""
        known = self.ledger.nodes.get(node)
        if known is not None and incarnation < known.incarnation:
            raise Stale(f"{node} is {known.incarnation} now, which was started after {incarnation!r}")
        return known is not None and known.incarnation == incarnation

    def _leave(self, node: NodeId, reason: str) -> None:
        if node not in self.ledger.nodes:
            return
        self.hear([Left(node, reason)])
        self.heard.pop(node, None)
        self.promised.forget(node)
        self.orders.pop(node, None)
        self._price(node, None)
        self.landmarks.forget(node)
        self.turn = saving.NOBODY if self.turn.node == node else self.turn
        self.metrics.remove("heartbeat_age_seconds", node=node)
        log("left", node=node, reason=reason)

    def _price(self, node: NodeId, cost: Cost | None) -> None:
        own = {name: each for name, each in self.costs.own.items() if name != node}
        self.costs = replace(self.costs, own=own if cost is None else {**own, node: cost})

    def hear(self, events: Iterable[Event]) -> None:
        """Take events in; all of them or, where one cannot be, none. Raises BadRequest."""
        events = list(events)
        try:
            ledger = books.apply_all(self.ledger, events)
        except Broken as broken:
            raise BadRequest(broken.message) from None
        for event in events:
            match event:
                case Lent(loan) if (was := self.ledger.loans.get(loan.id)) is None or was.blocks != loan.blocks:
                    log("lent", loan=loan.id, borrower=loan.borrower, blocks=loan.blocks)
                case Returned(_, loan_id) if loan_id in self.ledger.loans:
                    log("returned", loan=loan_id)
        self.ledger = ledger

    # --- questions -----------------------------------------------------------------------------------------------

    async def Creditors(self, request: pb.CreditorsRequest, call: Any) -> pb.CreditorsResponse:
        self._check_leads(request.epoch)
        if request.blocks < 1:
            raise BadRequest("blocks must be at least 1", field="blocks")
        node, exclude, outgrown = request.node, frozenset(request.exclude), request.outgrown
        self._check_current(node, request.incarnation)
        ledger, now = self.promised.expected(self.ledger), self.clock()
        if not outgrown:
            exclude |= too_far(ledger, self.costs, node, self._block_size())
        offers, self.turn, may_save = saving.creditors(
            self.policy, ledger, self.turn, now, node, request.blocks, exclude, outgrown
        )
        another = outgrown and self.policy.saves and not may_save
        answer = pb.CreditorsResponse(epoch=self.epoch, may_save=may_save, another_saves=another)
        known = node in self.ledger.nodes and not self.settling
        answer.max_tokens = self.policy.reach(self.ledger, node, self._block_size()) if known else 0
        if isinstance(offers, Refused):
            answer.refused = offers.reason
            log("creditors_refused", node=node, blocks=request.blocks, reason=offers.reason)
            return answer
        log("creditors_named", node=node, blocks=request.blocks, offers=dict(offers))
        answer.creditors.extend(pb.Creditor(node=n, address=self.ledger.nodes[n].address, blocks=b) for n, b in offers)
        return answer

    async def Route(self, request: pb.RouteRequest, call: Any) -> pb.RouteResponse:
        self._check_leads(request.epoch)
        if not 0 < request.prompt_tokens <= request.longest_tokens:
            prompt, longest = request.prompt_tokens, request.longest_tokens
            raise BadRequest(f"{prompt} prompt tokens of at most {longest} cannot be", field="longest_tokens")
        if self.model is None or not self.ledger.nodes:
            self._refuse("no_worker", Unavailable("no worker has joined yet"))
        if request.model and request.model != self.model.name:
            raise NotFound(f"no model {request.model!r} is served here, only {self.model.name!r}", field="model")
        size, expected = self._block_size(), self.promised.expected(self.ledger)
        found = self.policy.route(
            expected, request.prompt_tokens, request.longest_tokens, size, frozenset(request.exclude)
        )
        if isinstance(found, Refused):
            if request.longest_tokens <= self.policy.capacity(self.ledger, size):
                self._refuse("no_worker", Unavailable(found.reason))
            if self.settling:
                self._refuse("settling", Unavailable(f"the controller has just restarted; so far {found.reason}"))
            self._refuse("too_long", TooLong(found.reason))
        holders = self.landmarks.holders(request.marks)
        found = near(expected, found, holders, request.longest_tokens, size, frozenset(request.exclude))
        self.promised.add(found, blocks_for(request.prompt_tokens, size), self.clock())
        address, reach = self.ledger.nodes[found].address, self.policy.reach(self.ledger, found, size)
        sharing = [name for name, _ in holders if name != found] if self.policy.shares else []
        others = [types_pb2.Place(node=name, address=self.ledger.nodes[name].address) for name in sharing]
        return pb.RouteResponse(node=found, address=address, max_tokens=reach, holders=others, epoch=self.epoch)

    async def Snapshot(self, request: pb.SnapshotRequest, call: Any) -> pb.SnapshotResponse:
        self._check_leads(request.epoch)
        now = self.clock()
        return pb.SnapshotResponse(
            epoch=self.epoch,
            settling=self.settling,
            policy=self.policy.name,
            model=wire.model_to_wire(self.model) if self.model is not None else None,
            max_tokens=self.policy.capacity(self.ledger, self._block_size()) if self.model is not None else 0,
            nodes=[wire.node_to_wire(node) for node in self.ledger.nodes.values()],
            loans=[wire.loan_to_wire(loan, now) for loan in self.ledger.loans.values()],
            layouts=[
                wire.layout_to_wire(sequence, layout, home)
                for home, layouts in self.ledger.layouts.items()
                for sequence, layout in layouts.items()
            ],
        )

    def _block_size(self) -> int:
        return self.model.shape.block_size if self.model is not None else 1

    def _refuse(self, reason: str, error: TooLong | Unavailable) -> NoReturn:
        self.metrics.add("refusals_total", reason=reason)
        log("route_refused", reason=error.message)
        raise error

    # --- time ----------------------------------------------------------------------------------------------------

    @property
    def silence(self) -> float:
        """Seconds after which a node that says nothing has left."""
        return SILENT_BEATS * self.heartbeat_seconds

    @property
    def settling(self) -> bool:
        """Another one led before, or this one before its restart; some nodes may not have found us yet."""
        return self.restarted and self.clock() < self.started + self.silence + LONGEST_PAUSE

    def tick(self) -> None:
        """Once per heartbeat: who is silent, whether the books balance, and the metrics."""
        if not self.leads and self.until > -math.inf:  # the lease could not be renewed
            self.stand_by("")
        slept = (now := self.clock()) - self.ticked - self.heartbeat_seconds
        if slept > self.heartbeat_seconds:
            self.heard = {node: when + slept for node, when in self.heard.items()}
        self.ticked = now
        for node, when in list(self.heard.items()):
            if now - when > self.silence:
                self._leave(node, f"silent for {now - when:.1f} s")
        try:
            books.check(self.ledger)
            self.sound = True
        except Broken as broken:  # what a node told cannot be; the next time it joins it is told anew
            if self.sound:
                log("law_broken", reason=broken.message)
            self.sound = False
        self._measure(now)

    async def plan(self) -> None:
        """Ask the policy what to order; in a thread, as the ledger is a value and may be large."""
        if not self.leads or not self.sound or self.settling:
            return
        epoch = self.epoch
        try:
            found = await asyncio.to_thread(self.policy.plan, self.ledger, self.costs, self._block_size())
        except Broken as broken:
            log("policy_failed", reason=broken.message)
            return
        if epoch != self.epoch or not self.leads:
            return
        self.orders = {}
        for order in saving.orders(found, self.turn, self.clock()):
            self.orders.setdefault(order.home, []).append(order)
            what = {name: getattr(order, name) for name in ("source", "target", "blocks", "reason")}
            log("ordered", request=order.seq, **what)
            self.metrics.add("orders_total", direction=order.direction)

    def _measure(self, now: float) -> None:
        nodes, m = self.ledger.nodes.values(), self.metrics
        m.set("controller_epoch", self.epoch)
        m.set("controller_leader", self.leads)
        m.set("nodes", sum(n.serves and not n.draining for n in nodes), state="serving")
        m.set("nodes", sum(not n.serves and not n.draining for n in nodes), state="memory")
        m.set("nodes", sum(n.draining for n in nodes), state="draining")
        m.set("pool_blocks", sum(n.free - n.cached for n in nodes), state="free")
        m.set("pool_blocks", sum(n.used for n in nodes), state="used")
        m.set("pool_blocks", sum(n.cached for n in nodes), state="cached")
        m.set("pool_blocks", sum(n.lent for n in nodes), state="lent")
        m.set("pool_blocks", sum(n.borrowed for n in nodes), state="borrowed")
        for node, when in self.heard.items():
            m.set("heartbeat_age_seconds", now - when, node=node)


async def run(settings: config.Controller) -> None:
    """The process: ready line on stdout, SIGTERM and SIGINT end it cleanly."""
    metrics = Metrics("controller")
    controller = Controller(
        config.policy(settings.policy),
        epoch=0,
        heartbeat_seconds=settings.heartbeat_seconds,
        metrics=metrics,
        clock=time.monotonic,
        cost=config.cost(settings.profile),
    )
    told = Told()
    server = rpc.Server(settings.host, settings.port, [(CONTROLLER, controller)])
    address = f"{settings.host}:{await server.start()}"
    scraped = f"{settings.host}:{port}" if (port := metrics.serve(settings.host, settings.metrics_port)) >= 0 else ""
    name = f"{platform.node()}:{server.port}" if settings.host in {"0.0.0.0", "::"} else address
    its = lease(settings.lease, name, settings.lease_seconds, time.monotonic)
    campaign = Campaign(its, controller, time.monotonic)
    await campaign.look()
    controller.tick()
    server.set_ready(True)
    ready("controller", id="controller", address=address, metrics=scraped)
    over = asyncio.create_task(campaign.run(told.once))
    beats = 0
    while not over.done():
        await asyncio.wait([over], timeout=settings.heartbeat_seconds)
        controller.tick()
        beats += 1
        if beats % PLAN_BEATS == 0:
            await controller.plan()
    await server.stop(STOP_SECONDS)
    metrics.close()
    await over
