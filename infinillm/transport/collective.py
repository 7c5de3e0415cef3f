"""The port over torch.distributed: NCCL between GPUs, gloo between CPUs.

A collective cannot be called back: once entered it waits for a peer that may never come, and on a GPU it blocks the
stream. So a bell rings first: the sender starts its send, then puts one byte on the socket that authenticated the
peer. The receiver waits for that byte, where a dead, silent or closing peer is noticed at once, and only then enters
the receive. One message is one flat run of bytes, so the body knows no dtypes. A send keeps its own copy, so both
ends may send before either receives; the oldest is waited for when too many are under way.

Each port is a world of two ranks of its own. NCCL has one group for each way: its sends and receives are kernels on
a group's stream, and one stream would make both ends wait behind their own sends. The tests run gloo; NCCL needs two
GPUs. Neither library authenticates its own connections: use this inside a network you trust.
"""

from __future__ import annotations

import datetime as dt
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infinillm.errors import BadRequest, PortClosed
from infinillm.transport.door import hang_up
from infinillm.transport.watch import Watch

UNDER_WAY = 8  # messages sent and not yet known to have arrived
BELL = b"!"


def open_port(peer: socket.socket, *, leads: bool, patience: float, device: torch.device) -> CollectivePort:
    """The port between this process and the one behind an authenticated TCP socket; exactly one end leads."""
    store = _store(peer, leads, patience)
    ways = ("there", "back") if device.type == "cuda" else ("both",)
    groups = [_group(dist.PrefixStore(way, store), peer, leads, patience, device) for way in ways]
    out, into = (groups[0], groups[-1]) if leads else (groups[-1], groups[0])
    return CollectivePort(peer, out, into, other=1 if leads else 0, patience=patience, device=device)


class CollectivePort:
    """A Port over process groups of two ranks."""

    def __init__(self, peer: socket.socket, out: Any, into: Any, *, other: int, patience: float, device: torch.device):
        self.kind = "collective"
        self.sent_bytes = 0
        self.received_bytes = 0
        self._peer, self._out, self._into, self._other = peer, out, into, other
        self._patience, self._device = patience, device
        self._under_way: deque[tuple[Any, Tensor]] = deque()
        self._closed = False
        self._closing, self._sending, self._receiving = threading.Lock(), threading.Lock(), threading.Lock()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.settimeout(patience)
        self._bell = Watch([peer.fileno()], patience)

    def send(self, tensors: Sequence[Tensor]) -> None:
        parts = self._flat(tensors)
        if not parts:
            return
        message = torch.cat(parts)  # a copy: the caller may overwrite his
        try:
            with self._sending:
                self._heed_close()
                self._under_way.append((self._out.send([message], self._other, 0), message))
                self._peer.sendall(BELL)
                self.sent_bytes += message.numel()
                if len(self._under_way) > UNDER_WAY:
                    self._wait(self._under_way.popleft()[0])
        except (OSError, EOFError, RuntimeError) as lost:
            self.close()
            raise PortClosed(f"collective port, sending: {lost}") from lost

    def recv(self, out: Sequence[Tensor]) -> None:
        parts = self._flat(out)
        if not parts:
            return
        sizes = [part.numel() for part in parts]
        try:
            with self._receiving:
                self._heed_close()
                self._bell.wait()
                if not self._peer.recv(1):
                    raise EOFError("the peer is gone")
                message = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
                self._wait(self._into.recv([message], self._other, 0))
                self.received_bytes += message.numel()
        except (OSError, EOFError, RuntimeError) as lost:
            self.close()
            raise PortClosed(f"collective port, receiving: {lost}") from lost
        for part, said in zip(parts, torch.split(message, sizes), strict=True):
            part.copy_(said)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            hang_up(self._peer)
            with self._sending, self._receiving:
                self._under_way.clear()
                self._out = self._into = None
                self._peer.close()

    def _wait(self, work: Any) -> None:
        work.wait(dt.timedelta(seconds=self._patience))

    def _heed_close(self) -> None:
        if self._closed:
            raise EOFError("it was closed")

    def _flat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for t in tensors:
            if not t.is_contiguous():
                raise BadRequest("a port carries contiguous tensors only", field="tensors")
            if t.device.type != self._device.type:
                raise BadRequest(f"this port carries {self._device.type} tensors, not {t.device}", field="tensors")
        return [t.view(-1).view(torch.uint8) for t in tensors if t.numel()]


def _store(peer: socket.socket, leads: bool, patience: float) -> dist.distributed_c10d.Store:
    """The key-value store through which two ranks find each other; the leader's side serves it."""
    timeout = dt.timedelta(seconds=patience)
    if leads:
        host = peer.getsockname()[0]
        door = socket.create_server((host, 0), family=peer.family)
        port = door.getsockname()[1]
        store = dist.TCPStore(host, port, 2, True, timeout, wait_for_workers=False, master_listen_fd=door.detach())
        peer.sendall(struct.pack("!H", port))
        return store
    (port,) = struct.unpack("!H", peer.recv(2, socket.MSG_WAITALL))
    return dist.TCPStore(peer.getpeername()[0], port, 2, False, timeout, wait_for_workers=False)


def _group(store: dist.Store, peer: socket.socket, leads: bool, patience: float, device: torch.device) -> Any:
    rank, timeout = (0 if leads else 1), dt.timedelta(seconds=patience)
    if device.type == "cuda":
        chosen = dist.ProcessGroupNCCL.Options()
        chosen._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, chosen)
    gloo: Any = dist.ProcessGroupGloo  # its options have no stubs
    options = gloo._Options()
    options._timeout = timeout
    options._threads = 1
    options._devices = [gloo.create_device(hostname=peer.getsockname()[0])]
    return gloo(store, rank, 2, options)
