"""The borrower's end of one conversation: a port for tensors, and a stream of plans one way and news the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

from infinillm import rpc, wire
from infinillm.core.types import NodeId, Plan, SeqId, Stretch
from infinillm.errors import InfinillmError, NodeLost
from infinillm.protos import pool_pb2 as pb
from infinillm.telemetry import Metrics, log
from infinillm.transport.base import Port

POOL = pb.DESCRIPTOR.services_by_name["PoolService"]
REOPEN_SECONDS = 1.0  # while every running request waits


class Heard(Protocol):
    """Who is told what a lender says; by the thread that hears it."""

    def recalled(self, node: NodeId, blocks: int) -> None: ...
    def ending(self, node: NodeId) -> None: ...
    def shared(self, conversation: Conversation, blocks: Iterable[Stretch]) -> None: ...


class Conversation:
    """The borrower's end of one port and one stream of plans."""

    def __init__(
        self,
        node: NodeId,
        address: str,
        name: str,
        port: Port,
        held: Iterable[Stretch],
        heard: Heard,
    ):
        self.node, self.port, self._heard = node, port, heard
        self._asked: deque[Future[tuple[Stretch, ...]]] = deque()  # in the order of the questions
        self._asking = threading.Lock()
        self._counted = (0, 0)
        self._closing = self._over = False
        self._said: SimpleQueue[pb.ConverseRequest | None] = SimpleQueue()
        self._channel = rpc.blocking_channel(address)
        self._said.put(pb.ConverseRequest(open=pb.Open(conversation=name, held=wire.stretches_to_wire(held))))
        self._replies = rpc.BlockingClient(self._channel, POOL).Converse(iter(self._said.get, None))
        self._reader = threading.Thread(target=self._read, name=f"hear-{node}", daemon=True)
        self._reader.start()

    def announce(self, plan: Plan) -> None:
        self._said.put(pb.ConverseRequest(plan=wire.plan_to_wire(plan)))

    def release(self, seq: SeqId) -> None:
        self._said.put(pb.ConverseRequest(release=pb.Release(sequence=seq)))

    def name(self, seq: SeqId, first: int, names: Sequence[bytes]) -> None:
        self._said.put(pb.ConverseRequest(name=wire.names_to_wire(seq, first, names)))

    def share(self, seq: SeqId, first: int, names: Sequence[bytes]) -> Future[tuple[Stretch, ...]]:
        """Ask the node to keep what it has of these; the answer comes between two of its steps. Raises NodeLost."""
        answer: Future[tuple[Stretch, ...]] = Future()
        with self._asking:
            if self._over:
                raise NodeLost(f"the conversation with {self.node} is over", node=self.node)
            self._asked.append(answer)
            self._said.put(pb.ConverseRequest(share=wire.names_to_wire(seq, first, names)))
        return answer

    def renew(self) -> None:
        self._said.put(pb.ConverseRequest(renew=pb.Renew()))

    def measure(self, metrics: Metrics) -> None:
        """Count the bytes the port carried since the last time."""
        now = (self.port.sent_bytes, self.port.received_bytes)
        for direction, new, old in zip(("sent", "received"), now, self._counted, strict=True):
            metrics.add("port_bytes_total", new - old, peer=self.node, direction=direction, kind=self.port.kind)
        self._counted = now

    def close(self) -> None:
        self._closing = True
        self._said.put(None)
        self.port.close()
        self._replies.cancel()
        self._channel.close()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=REOPEN_SECONDS)

    def _read(self) -> None:
        try:
            for reply in self._replies:
                said = reply.WhichOneof("said")
                if said == "recalled":
                    self._heard.recalled(self.node, reply.recalled)
                if said == "ending":
                    self._heard.ending(self.node)
                if said == "shared":
                    blocks = wire.stretches_from_wire(reply.shared.blocks)
                    self._heard.shared(self, blocks)
                    self._asked.popleft().set_result(blocks)
                if said == "refused":
                    log("conversation_refused", node=self.node, reason=reply.refused)
                    break
        except InfinillmError as error:
            if not self._closing:
                log("conversation_lost", node=self.node, reason=error.message)
        finally:
            self.port.close()  # wakes a step that waits for this node
            with self._asking:
                self._over = True
                lost = NodeLost(f"the conversation with {self.node} is over", node=self.node)
                for answer in self._asked:
                    answer.set_exception(lost)
