"""The gRPC face of an engine: tokens in, tokens out, and where the blocks of a request are."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from infinillm import wire
from infinillm.core.names import prefix_hashes
from infinillm.core.request import MOVED, Request
from infinillm.core.types import Layout, NodeId, SeqId
from infinillm.engine.loop import Engine
from infinillm.engine.messages import Cancel, HandOver, Output, Pass, Submit
from infinillm.errors import BadRequest, InfinillmError, NotFound, Overloaded, Unavailable
from infinillm.model import sampler
from infinillm.protos import shard_pb2 as pb

SHORT = 4096  # tokens that are named at once; more take a thread
SHARD = pb.DESCRIPTOR.services_by_name["ShardService"]


class ShardService:
    """Tokens in, tokens out: the gRPC face of an engine.

    find  says what other nodes keep of a request already, whose blocks have these names, asking those nodes, and
          whether a copy pays
    meet  gets to know a node of whom something is going to be asked
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        vocabulary: int,
        block_size: int,
        max_waiting: int,
        find: Callable[[Request, Sequence[bytes], Sequence[tuple[NodeId, str]]], Awaitable[tuple[Layout, bool]]],
        meet: Callable[[NodeId, str], Awaitable[None]],
    ):
        self.engine, self.loop, self.vocabulary, self.block_size = engine, loop, vocabulary, block_size
        self.max_waiting, self.find, self.meet = max_waiting, find, meet
        self.streams: dict[SeqId, asyncio.Queue[Output]] = {}
        self.draining = False

    def publish(self, outputs: list[Output]) -> None:
        """From the engine's thread: once per step, for all requests."""
        if outputs and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if (stream := self.streams.get(output.id)) is not None:
                stream.put_nowait(output)

    def fail(self, error: InfinillmError) -> None:
        """End everything that runs, at once, with this error."""
        self._deliver([Output(name, error=error) for name in self.streams])

    def leave(self) -> None:
        """Tell all who listen to find others that go on; tokens still come until they have."""
        self._deliver([Output(name, leaving=True) for name in self.streams])

    def hand_over(self, *, waiting: bool) -> None:
        """Have all requests, or those that wait, go on elsewhere."""
        self.engine.inbox.put(HandOver(waiting))

    async def Generate(self, request: pb.ShardGenerateRequest, call: Any) -> AsyncIterator[pb.ShardGenerateResponse]:
        if self.draining:
            yield pb.ShardGenerateResponse(finish_reason=MOVED)
            return
        if not self.engine.alive:
            raise Unavailable("the engine is not running")
        running = self.engine.load.running
        if (waiting := len(self.streams) - running) >= self.max_waiting:
            most = f"at most {self.max_waiting:,} may wait (--max-waiting)"
            raise Overloaded(f"{waiting:,} requests wait at this worker and {running:,} run; {most}")
        if not request.id:
            raise BadRequest("id must be set", field="id")
        if request.id in self.streams:  # it was moved away and comes back before we noticed
            raise Unavailable(f"request {request.id!r} runs here still")
        prompt, already = tuple(request.prompt), tuple(request.already)
        for field, tokens in (("prompt", prompt), ("already", already)):
            if tokens and max(tokens) >= self.vocabulary:
                raise BadRequest(f"token {max(tokens)} is beyond the vocabulary of {self.vocabulary}", field=field)
        sampling = wire.sampling_from_wire(request.sampling)
        sampler.check(sampling, self.vocabulary, tuple(request.eos_ids))
        wanted = Request(
            request.id,
            prompt,
            sampling,
            time.monotonic(),
            tuple(request.eos_ids),
            request.cache_salt,
            secrets.randbits(63) if sampling.seed is None else sampling.seed,
            already,
        )
        stream: asyncio.Queue[Output] = asyncio.Queue()
        self.streams[request.id] = stream
        reason = ""
        try:
            naming = partial(prefix_hashes, (*prompt, *already), self.block_size, request.cache_salt)
            names = naming() if len(prompt) <= SHORT else await asyncio.to_thread(naming)
            shared, copy = await self.find(wanted, names, [(each.node, each.address) for each in request.holders])
            self.engine.inbox.put(Submit(wanted, names, shared, copy))
            while not reason:
                output = await stream.get()
                if output.error is not None:
                    raise output.error
                reason = output.finish_reason
                yield _response(output)
        finally:
            del self.streams[request.id]
            if not reason:
                self.engine.inbox.put(Cancel(request.id))

    async def Meet(self, request: pb.MeetRequest, call: Any) -> pb.MeetResponse:
        await asyncio.gather(*(self.meet(each.node, each.address) for each in request.nodes))
        return pb.MeetResponse()

    async def HandOver(self, request: pb.HandOverRequest, call: Any) -> pb.HandOverResponse:
        self.engine.inbox.put(Pass(request.id))
        return pb.HandOverResponse()

    async def Placement(self, request: pb.PlacementRequest, call: Any) -> pb.PlacementResponse:
        found = self.engine.placement(request.id)
        if found is None:
            raise NotFound(f"no request {request.id!r} runs here or ended here lately", field="id")
        return pb.PlacementResponse(
            id=request.id,
            state=found.state,
            tokens=found.tokens,
            block_size=self.block_size,
            spans=[wire.span_to_wire(span) for span in found.layout],
            holes=[pb.Interval(start=start, stop=stop) for start, stop in found.holes],
            moving=[wire.wish_to_wire(wish, self.block_size) for wish in found.moving],
        )


def _response(output: Output) -> pb.ShardGenerateResponse:
    return pb.ShardGenerateResponse(
        tokens=output.tokens,
        logprobs=[wire.token_logprob_to_wire(x) for x in output.logprobs],
        prompt_logprobs=[wire.token_logprob_to_wire(x) for x in output.prompt_logprobs],
        finish_reason=output.finish_reason,
        cached_tokens=output.cached,
        stop_token=output.stop_token,
        leaving=output.leaving,
    )
