"""A pool inside one process: real nodes, real gRPC, real ports, engines turned by hand. No controller."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from infinillm import rpc
from infinillm.attention.store import Store
from infinillm.core.blocks import Blocks
from infinillm.core.recall import AT_ONCE
from infinillm.core.request import Request, Sampling
from infinillm.core.scheduler import Budget, Shortage
from infinillm.core.types import AttentionShape, Node, NodeId
from infinillm.engine.loop import Engine
from infinillm.engine.messages import Borrowed, Output, Submit
from infinillm.engine.runner import Runner
from infinillm.model.decoder import Decoder
from infinillm.pool.answer import POOL, PoolService
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics
from infinillm.transport.lanes import Lanes

CPU = torch.device("cpu")
LOCALHOST = "127.0.0.1"


class Peer:
    """One node: memory, the service that answers for it, and an engine if it has a model."""

    def __init__(
        self,
        id: NodeId,
        blocks: int,
        shape: AttentionShape,
        body: Any,
        port_kind: str,
        patience: float,
        lanes: Lanes | None = None,
    ):
        self.id, self.address = id, ""
        self.memory = Memory(Blocks(id, blocks, shape.block_size, blocks), Store(shape, blocks, CPU, body))
        self.metrics = Metrics("worker", node=id)
        self.lanes = lanes or Lanes(host=LOCALHOST, patience=patience, device=CPU, dial=rpc.blocking_channel)
        self.lenders = Lenders(id, f"{id}-1", self.memory, lanes=self.lanes, port_kind=port_kind, metrics=self.metrics)
        self.service = PoolService(
            self.memory,
            describe=lambda: Node(id, f"{id}-1", self.address, blocks, blocks),
            model="tiny",
            lanes=self.lanes,
            port_kind=port_kind,
            patience=patience,
            loan_seconds=60.0,
            clock=time.monotonic,
            metrics=self.metrics,
            threads=1,
        )
        self.outputs: list[Output] = []
        self.engine: Engine | None = None
        self.server: rpc.Server | None = None

    async def start(self) -> None:
        self.server = rpc.Server(LOCALHOST, 0, [(POOL, self.service)], extra_handlers=[self.lanes.service()])
        self.address = self.lanes.address = f"{LOCALHOST}:{await self.server.start()}"

    async def stop(self) -> None:
        await self.lenders.close()
        self.service.close()
        assert self.server is not None
        await self.server.stop(0.2)


class Cluster:
    """Nodes by name with their number of blocks; sequences run on the first. Use as a value of `with`."""

    def __init__(
        self,
        decoder: Decoder,
        blocks: Mapping[NodeId, int],
        *,
        block_size: int = 8,
        port_kind: str = "tcp",
        step_tokens: int = 64,
        sequences: int = 8,
        patience: float = 10.0,
        share: bool = True,
        moves: int = 64,
    ):
        shape = decoder.spec.attention(block_size, str(decoder.dtype).removeprefix("torch."))
        self.share = share
        one = Lanes(host=LOCALHOST, patience=patience, device=CPU, dial=rpc.blocking_channel)
        lanes = one if port_kind == "local" else None  # local ports join what one process offers to itself
        self.peers = {
            id: Peer(id, count, shape, decoder.body, port_kind, patience, lanes) for id, count in blocks.items()
        }
        self.home = next(iter(self.peers.values()))
        self.engine = Engine(
            self.home.id,
            Runner(decoder, 1),
            self.home.memory,
            self.home.lenders,
            Budget(step_tokens, sequences, block_size, moves),
            publish=self.home.outputs.extend,
            borrow=self._borrow,
            cost=None,
            metrics=self.home.metrics,
        )
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="cluster")

    def __enter__(self) -> Cluster:
        self.thread.start()
        for peer in self.peers.values():
            self.wait(peer.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for peer in self.peers.values():
            self.wait(peer.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def wait(self, work: Any, seconds: float = 30.0) -> Any:
        """Run a coroutine in the cluster's event loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def lend(self, node: NodeId, blocks: int) -> None:
        """Borrow from one node beforehand, so that a test decides where a sequence comes to lie."""
        got = self.wait(self.home.lenders.borrow(blocks, blocks, [(node, self.peers[node].address, blocks)], AT_ONCE))
        assert got == blocks, got

    def _borrow(self, short: Shortage, alone: Request | None) -> None:
        others = [p for p in self.peers.values() if p is not self.home and self.share]
        offers = [(p.id, p.address, room) for p in others if (room := p.memory.blocks.room) > 0]
        work = self.home.lenders.borrow(short.least, short.wanted, offers, AT_ONCE)
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        future.add_done_callback(lambda f: self.engine.inbox.put(Borrowed(f.result())))

    def submit(self, prompt: Sequence[int], id: str = "s", arrival: float = 0.0, **sampling: Any) -> None:
        wanted = Sampling(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling})
        self.engine.inbox.put(Submit(Request(id, tuple(prompt), wanted, arrival)))

    def turn(self) -> bool:
        """One turn of the engine, waiting for whatever it waits for."""
        self.engine.hear(block=False)
        if self.engine.turn():
            return True
        if self.engine.sequences:
            self.engine.hear(block=True)
        return False

    def finish(self, seconds: float = 60.0) -> dict[str, list[Output]]:
        """Turn until everything submitted has ended; the outputs of each request."""
        deadline = time.monotonic() + seconds
        self.engine.hear(block=False)
        while self.engine.sequences:
            assert time.monotonic() < deadline, (self.engine.running, self.engine.waiting)
            self.turn()
        found: dict[str, list[Output]] = {}
        for output in self.home.outputs:
            found.setdefault(output.id, []).append(output)
        self.home.outputs.clear()
        return found

    def kill(self, node: NodeId) -> None:
        """A node dies: its ports close, its server is gone, its loans are void."""
        peer = self.peers.pop(node)
        self.wait(peer.stop())

    def generate(self, prompt: Sequence[int], **sampling: Any) -> list[int]:
        self.submit(prompt, **sampling)
        return tokens(self.finish()["s"])

    def settle(self) -> None:
        """Give everything back, and see that the books balance and every block is free again."""
        self.wait(self.home.lenders.give_back_idle(0.0))
        for peer in self.peers.values():
            peer.memory.blocks.check()
            assert peer.memory.blocks.room == peer.memory.blocks.count, (peer.id, peer.memory.blocks.loans)
            assert not peer.memory.blocks.loans


def tokens(outputs: Sequence[Output]) -> list[int]:
    for output in outputs:
        if output.error is not None:
            raise output.error
    return [token for output in outputs for token in output.tokens]


__all__ = ["Cluster", "Peer", "tokens"]
