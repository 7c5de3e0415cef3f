"""A worker's side of the ledger: it joins, tells what changed, and joins again when the controller forgot it.

Theory of operation. `told` is what the controller has acknowledged, or None where that is not known: at the start,
after any failed call (it may have been heard or not), and when the controller says so. With None the next word is
Join, with all the node knows; else it is a Heartbeat with the difference. So whatever is lost on the way, the next
success mends it. Two failures end it, and with it the worker: another process goes by this node's name, or this node
does not fit the cluster it wanted to join. Once it was a member, the latter too is tried again, like any other failure:
it may be the controller that is wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from infinillm import wire
from infinillm.core.cost import Cost
from infinillm.core.ledger import Event, Joined, Left, Lent, Placed, Released, Report, Reported, Returned, changes
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.types import Model, NodeId, Refused
from infinillm.errors import BadRequest, InfinillmError, Stale, Unavailable
from infinillm.protos import controller_pb2 as pb
from infinillm.servers.controllers import Controllers
from infinillm.telemetry import log

__all__ = ["Membership", "Report", "heard_in"]

ANSWER_SECONDS = 2.0
LEAVE_SECONDS = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between tries while the controller is away
NO_HEARTBEAT = 0.5  # until a controller has said otherwise


class Superseded(Stale):
    """A process that was started later goes by this node's name."""


class Membership:
    """See the theory of operation above.

    report  gives the node's books as they are now, taken in one go
    cost    what things cost on this node, where that was measured
    obey    called with what the controller orders this node to move, and the address of the target
    """

    def __init__(
        self,
        controller: str,
        report: Callable[[], Report],
        model: Model,
        cost: Cost | None,
        obey: Callable[[MoveBlocks, str], None],
    ):
        self.controllers = Controllers(controller)
        self.report, self.model, self.cost, self.obey = report, model, cost, obey
        self.told: Report | None = None
        self.epoch = 0
        self.heartbeat_seconds = NO_HEARTBEAT
        self.max_tokens = 0  # of the longest sequence this node could come to hold, by the last answer; 0: not known
        self.may_save = False  # by that answer: keep less than is needed, until there is enough
        self.another_saves = False  # by that answer: for a request like this one, at another node
        self.others = 0  # nodes besides this one that take requests
        self._speaking = asyncio.Lock()
        self._over = asyncio.Event()
        self._lost = False

    async def run(self) -> None:
        """Join and beat until `leave`. Raises Superseded, or BadRequest where a first Join is refused."""
        pause = FIRST_PAUSE
        while not self._over.is_set():
            try:
                await self._speak()
                wait, pause = self.heartbeat_seconds, FIRST_PAUSE
            except Superseded as error:
                log("superseded", controller=self.controllers.address, reason=error.message)
                raise
            except InfinillmError as error:
                if isinstance(error, BadRequest) and not self.epoch:
                    log("join_refused", controller=self.controllers.address, reason=error.message)
                    raise
                self._fail(error)
                another = len(self.controllers.addresses) > 1  # which may lead soon
                wait, pause = pause, min(2 * pause, self.heartbeat_seconds if another else LONGEST_PAUSE)
            except Exception as defect:  # noqa: BLE001 a worker does not end because its controller confuses it
                self._fail(InfinillmError(repr(defect)))
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE)
            await self._pause(wait)

    async def creditors(
        self, blocks: int, exclude: Collection[NodeId], outgrown: bool
    ) -> list[tuple[NodeId, str, int]] | Refused:
        """Who else could lend: (node, address, blocks), best first. `outgrown`: for more than this node can hold."""
        self.max_tokens, self.may_save, self.another_saves = 0, False, False
        node = self.report().node
        request = pb.CreditorsRequest(
            node=node.id, incarnation=node.incarnation, blocks=blocks, exclude=exclude, outgrown=outgrown
        )
        try:
            answer = await self.controllers.ask("Creditors", request, timeout=ANSWER_SECONDS)
        except InfinillmError as error:
            return Refused(error.message)
        self.max_tokens, self.may_save, self.another_saves = answer.max_tokens, answer.may_save, answer.another_saves
        if answer.refused:
            return Refused(answer.refused)
        return [(each.node, each.address, each.blocks) for each in answer.creditors]

    async def capacity(self) -> int:
        """Tokens of the longest sequence this node could come to hold, by the last `creditors`. Raises Unavailable."""
        if not self.max_tokens:
            raise Unavailable("the controller has not said how much the pool could hold")
        return self.max_tokens

    async def leave(self) -> None:
        """Say goodbye, and say nothing after it. A controller that does not hear it notices the silence."""
        self._over.set()
        async with self._speaking:
            node = self.report().node
            request = pb.LeaveRequest(node=node.id, incarnation=node.incarnation)
            if self.told is not None:
                try:
                    await self.controllers.ask("Leave", request, timeout=LEAVE_SECONDS)
                except InfinillmError as error:
                    log("leave_failed", reason=error.message)
            self.told = None
            await self.controllers.close()

    # --- speaking ------------------------------------------------------------------------------------------------

    async def _speak(self) -> None:
        async with self._speaking:
            if self._over.is_set():
                return
            told, self.told = self.told, None  # until it is acknowledged
            now = self.report()
            if told is not None and await self._beat(told, now):
                self.told = now
            else:
                await self._join(now)
                self.told = now
            if self._lost:
                log("controller_found", controller=self.controllers.address, epoch=self.epoch)
            self._lost = False

    async def _beat(self, told: Report, now: Report) -> bool:
        """Tell what changed; false where the controller does not know the node."""
        request = pb.HeartbeatRequest(node=now.node.id, incarnation=now.node.incarnation)
        clock = time.monotonic()
        for event in changes(told, now):
            match event:
                case Reported(node):
                    request.changed.CopyFrom(wire.node_to_wire(node))
                case Lent(loan):
                    request.lent.append(wire.loan_to_wire(loan, clock))
                case Returned(_, loan_id):
                    request.returned.append(loan_id)
                case Placed(_, sequence, layout):
                    request.placed.append(wire.layout_to_wire(sequence, layout))
                case Released(_, sequence):
                    request.released.append(sequence)
                case Joined() | Left():
                    raise AssertionError(event)
        request.marks.extend(now.marks - told.marks)
        request.unmarked.extend(told.marks - now.marks)
        answer = await self.controllers.ask("Heartbeat", request, timeout=ANSWER_SECONDS)
        if not answer.known or answer.epoch != self.epoch:
            return False
        self.others = answer.others
        for each in answer.moves:
            self.obey(wire.move_from_wire(each, now.node.id), each.target_address)
        return True

    async def _join(self, now: Report) -> None:
        clock = time.monotonic()
        request = pb.JoinRequest(
            node=wire.node_to_wire(now.node),
            model=wire.model_to_wire(self.model),
            loans=[wire.loan_to_wire(loan, clock) for loan in now.lent],
            layouts=[wire.layout_to_wire(sequence, layout) for sequence, layout in now.layouts.items()],
            epoch=self.epoch,
            marks=now.marks,
            profile=wire.cost_to_wire(self.cost) if self.cost is not None else "",
        )
        try:
            answer = await self.controllers.ask("Join", request, timeout=ANSWER_SECONDS)
        except Stale as stale:
            raise Superseded(stale.message) from None
        self.epoch, self.heartbeat_seconds = answer.epoch, answer.heartbeat_seconds
        log("member", controller=self.controllers.address, epoch=self.epoch, policy=answer.policy)

    async def _pause(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)

    def _fail(self, error: InfinillmError) -> None:
        if not self._lost:
            log("controller_lost", controller=self.controllers.address, reason=error.message)
        self._lost = True


def heard_in(request: pb.HeartbeatRequest, now: float) -> list[Event]:
    """What a heartbeat tells, as events. Raises BadRequest where a node speaks for another."""
    events: list[Event] = [Returned(request.node, loan) for loan in request.returned]
    for loan in (wire.loan_from_wire(each, now) for each in request.lent):
        if loan.lender != request.node:
            raise BadRequest(f"{request.node} tells of a loan of {loan.lender}", field="lent")
        events.append(Lent(loan))
    if request.HasField("changed"):
        node = wire.node_from_wire(request.changed)
        if (node.id, node.incarnation) != (request.node, request.incarnation):
            raise BadRequest(f"{request.node} tells of {node.id} {node.incarnation}", field="changed")
        events.append(Reported(node))
    events += [Released(request.node, sequence) for sequence in request.released]
    events += [Placed(request.node, *wire.layout_from_wire(layout)) for layout in request.placed]
    return events
