"""The pool as a gateway sees it: where to send a request, how long one may be, and which worker serves it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from infinillm import rpc, wire
from infinillm.core import policy
from infinillm.core.request import MOST_SEQUENCES
from infinillm.core.types import Ledger, NodeId, Refused
from infinillm.errors import BadRequest, DeadlineExceeded, InfinillmError, NotFound, TooLong, Unavailable, Unreachable
from infinillm.protos import controller_pb2, shard_pb2
from infinillm.servers.controllers import Controllers
from infinillm.telemetry import log

SHARD = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
ANSWER_SECONDS = 2.0  # the controller and placements answer from memory
REFRESH_SECONDS = 1.0
KEPT_REQUESTS = 4096
MOST_CHOICES = 256  # of one request: prompts times n
REQUEST_ID = re.compile("(cmpl|chatcmpl|grpc)-[0-9a-f]{32}")
ASKED_AT_ONCE = 64
SHOWN_CHARS = 80
STAND_IN = "pooled"  # for a policy that only the controller has
LOST = (Unavailable, DeadlineExceeded)


class Place(NamedTuple):
    """A worker that serves requests."""

    node: NodeId
    address: str
    reach: int  # tokens of the longest sequence it could come to hold
    holders: tuple[tuple[NodeId, str], ...] = ()  # who else may have computed some of it before, and where they are


class Pool:
    """What a gateway knows of the controller and the workers.

    Theory of operation. The controller decides where a request goes. A snapshot of the ledger is taken every second: it
    says how long a request may be, and whether the pool is ready. While no controller leads, and while one that has
    just begun to does not know all workers yet, running requests go on, and new ones are routed by the same policy
    (`STAND_IN` for one that only the controller has), over the last snapshot of before.
    """

    def __init__(self, controller: str, longest: int):
        if not controller:
            raise BadRequest("--controller must name the controller as HOST:PORT", field="controller")
        self._controllers = Controllers(controller)
        self._longest = longest
        self._shards: dict[str, tuple[object, rpc.Client]] = {}
        self._places: dict[str, dict[int, Place]] = {}
        self.last: controller_pb2.SnapshotResponse | None = None
        self.reachable = False

    def start(self) -> None:
        self.watching = asyncio.create_task(self._refresh_always())

    async def close(self) -> None:
        self.watching.cancel()
        await asyncio.gather(self.watching, return_exceptions=True)
        for channel, _ in self._shards.values():
            await channel.close()  # type: ignore[attr-defined]
        await self._controllers.close()

    # --- what is there -------------------------------------------------------------------------------------------

    async def refresh(self) -> controller_pb2.SnapshotResponse:
        """A snapshot of now. Raises Unavailable or DeadlineExceeded where the controller does not answer."""
        try:
            found: controller_pb2.SnapshotResponse = await self._controllers.ask(
                "Snapshot", controller_pb2.SnapshotRequest(), timeout=ANSWER_SECONDS
            )
        except LOST as error:
            if self.reachable:
                log("controller_lost", reason=error.message)
            self.reachable = False
            raise
        if not self.reachable:
            log("controller_found", epoch=found.epoch)
        self.reachable = True
        if self.last is None or not found.settling:
            self.last = found
        return found

    async def try_refresh(self) -> None:
        """A snapshot of now if there is one to be had; else what the pool last said stands."""
        try:
            await self.refresh()
        except InfinillmError:
            pass

    async def _refresh_always(self) -> None:
        while True:
            await self.try_refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    def check_ready(self) -> None:
        """Raises Unavailable, saying why, where no request could be served."""
        if not self.reachable or self.last is None:
            raise Unavailable("the controller does not answer")
        if not any(node.serves and not node.draining for node in self.last.nodes):
            raise Unavailable("no worker is serving")

    @property
    def ready(self) -> bool:
        try:
            self.check_ready()
        except Unavailable:
            return False
        return True

    @property
    def block_size(self) -> int:
        """Tokens; 0 where nobody knows yet."""
        return self.last.model.shape.block_size if self.last else 0

    @property
    def limit(self) -> int:
        """The longest request the model takes, prompt and output, in tokens; 0 where nobody knows yet."""
        known = [n for n in (self._longest, self.last.model.max_position if self.last else 0) if n]
        return min(known, default=0)

    @property
    def capacity(self) -> int:
        """The longest request the nodes of now could hold, and the model takes, in tokens."""
        held = self.last.max_tokens if self.last else 0
        return min(self.limit, held) if self.limit else held

    # --- where to go ---------------------------------------------------------------------------------------------

    async def route(
        self, prompt_tokens: int, longest_tokens: int, exclude: Sequence[NodeId], marks: Iterable[int]
    ) -> Place:
        """The worker for a request of that length with these landmarks.

        Raises TooLong, Overloaded or Unavailable with the reason.
        """
        request = controller_pb2.RouteRequest(
            prompt_tokens=prompt_tokens, longest_tokens=longest_tokens, exclude=exclude, marks=marks
        )
        try:
            found = await self._controllers.ask("Route", request, timeout=ANSWER_SECONDS)
        except LOST as error:
            try:  # away, or there with nobody to serve?
                settling = (await self.refresh()).settling
            except LOST:
                settling = True
            if settling:
                return self._route_alone(prompt_tokens, longest_tokens, exclude, error)
            if not isinstance(error, Unreachable | DeadlineExceeded):
                raise
            found = await self._controllers.ask("Route", request, timeout=ANSWER_SECONDS)  # it was away, and is back
        holders = tuple((each.node, each.address) for each in found.holders)
        return Place(found.node, found.address, found.max_tokens or self.capacity, holders)

    def _route_alone(
        self, prompt_tokens: int, longest_tokens: int, exclude: Sequence[NodeId], lost: InfinillmError
    ) -> Place:
        if self.last is None:
            raise lost
        now, size = time.monotonic(), self.last.model.shape.block_size
        ledger = Ledger(
            epoch=self.last.epoch,
            nodes={node.id: wire.node_from_wire(node) for node in self.last.nodes},
            loans={loan.id: wire.loan_from_wire(loan, now) for loan in self.last.loans},
        )
        chosen_by = policy.POLICIES.get(self.last.policy, policy.POLICIES[STAND_IN])
        chosen = chosen_by.route(ledger, prompt_tokens, longest_tokens, size, exclude)
        if isinstance(chosen, Refused):
            if longest_tokens > chosen_by.capacity(ledger, size) > 0:
                raise TooLong(chosen.reason)
            raise Unavailable(f"the controller does not answer, and by what it last said {chosen.reason}")
        for node in self.last.nodes:
            if node.id == chosen:  # so that the next request goes elsewhere
                node.waiting += 1
                node.wanted += -(-prompt_tokens // size)
        log("routed_alone", node=chosen, epoch=ledger.epoch)
        return Place(chosen, ledger.nodes[chosen].address, chosen_by.reach(ledger, chosen, size))

    # --- workers -------------------------------------------------------------------------------------------------

    def shard(self, address: str) -> rpc.Client:
        """The client of one worker; channels are kept."""
        if address not in self._shards:
            channel = rpc.channel(address)
            self._shards[address] = (channel, rpc.Client(channel, SHARD))
        return self._shards[address][1]

    def note(self, request: str, index: int, place: Place) -> None:
        """Remember who serves a sequence, so that its placement can be asked for."""
        self._places.setdefault(request, {})[index] = place
        while len(self._places) > KEPT_REQUESTS:
            del self._places[next(iter(self._places))]

    async def placement(self, request: str) -> list[tuple[Place, shard_pb2.PlacementResponse]]:
        """Where each sequence of a request is, or was when it ended.

        Every worker is asked where another gateway served it. Raises NotFound where none knows of it, Unavailable or
        DeadlineExceeded where one that might does not answer.
        """
        lost: dict[NodeId, InfinillmError] = {}
        few = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(index: int, place: Place) -> list[tuple[Place, shard_pb2.PlacementResponse]]:
            question = shard_pb2.PlacementRequest(id=f"{request}-{index}")
            async with few:
                if place.node in lost:
                    return []
                try:
                    return [(place, await self.shard(place.address).Placement(question, timeout=ANSWER_SECONDS))]
                except NotFound:
                    return []
                except LOST as error:
                    lost[place.node] = error
                    return []

        found: list[tuple[Place, shard_pb2.PlacementResponse]] = []
        for places in await self._candidates(request):
            more = [pair for pairs in await asyncio.gather(*(ask(*each) for each in places)) for pair in pairs]
            if not more:
                break
            found += more
        if not found:
            nobody = NotFound(f"no request {request[:SHOWN_CHARS]!r} runs here or ended here lately", field="id")
            raise next(iter(lost.values()), nobody)
        return found

    async def _candidates(self, request: str) -> Iterable[list[tuple[int, Place]]]:
        """Which choice of a request may be where, in rounds; a round in which nobody knows of any is the last."""
        if request in self._places:
            return [sorted(self._places[request].items())]
        if not REQUEST_ID.fullmatch(request):
            return []
        await self.try_refresh()
        nodes = [Place(node.id, node.address, 0) for node in self.last.nodes if node.serves] if self.last else []
        return (
            [(index, node) for index in range(first, first + MOST_SEQUENCES) for node in nodes]
            for first in range(0, MOST_CHOICES, MOST_SEQUENCES)
        )
