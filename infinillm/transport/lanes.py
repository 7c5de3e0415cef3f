"""The lanes of one process: how a port of any kind is offered and taken up.

A node listens and puts the listener's ticket in its reply; the asker connects with it; the node accepts. Which kind it
is matters to nobody else.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import grpc
import torch

from infinillm.errors import BadRequest, PortClosed
from infinillm.transport import collective, local, shm, stream, tcp
from infinillm.transport.base import Listener, Port
from infinillm.transport.door import Door, Ticket, Waiting, entered, knock


class Enter(Protocol):
    def __call__(self, peer: socket.socket, *, leads: bool, patience: float, device: torch.device) -> Port: ...


BY_SOCKET: dict[str, Enter] = {"shm": shm.open_port, "tcp": tcp.open_port, "collective": collective.open_port}
EVERYWHERE = ("0.0.0.0", "::")
KINDS = (*BY_SOCKET, "stream", "local")


class Lanes:
    """Where this process listens for ports, and how it reaches others.

    host      the address TCP ports listen on; peers dial the same, or where it is 0.0.0.0 or ::, that of `address`
    patience  seconds a port waits for a silent peer before it is lost
    device    where the tensors live
    dial      a gRPC channel to an address, for stream ports
    address   of our gRPC server, once it is known: it carries stream ports and must register `service()`
    """

    def __init__(self, *, host: str, patience: float, device: torch.device, dial: Callable[[str], grpc.Channel]):
        self.address = ""
        self._host, self._patience, self._device, self._dial = host, patience, device, dial
        self._lock = threading.Lock()
        self._waiting: weakref.WeakSet[Waiting] = weakref.WeakSet()

    def listen(self, kind: str) -> Listener:
        """Offer one port. The caller gives `ticket` to the peer, then accepts."""
        if kind in BY_SOCKET:
            host = "" if kind == "shm" else self._host
            return Door(kind, host, self._shown(), functools.partial(self._enter, kind, True))
        if kind not in KINDS:
            raise BadRequest(f"no port is of kind {kind!r}; there are {', '.join(KINDS)}", field="kind")
        waiting = Waiting(kind, self.address)
        with self._lock:
            self._waiting.add(waiting)
        return waiting

    def connect(self, ticket: bytes) -> Port:
        """Take up an offer. Raises PortClosed where it no longer stands, BadRequest where it is none."""
        offer = Ticket.decode(ticket)
        if offer.kind in BY_SOCKET:
            return entered(knock(offer, self._patience), functools.partial(self._enter, offer.kind, False))
        if offer.kind == "stream":
            return stream.connect(offer, self._dial, patience=self._patience, device=self._device)
        if offer.kind != "local":
            raise BadRequest(f"no port is of kind {offer.kind!r}; there are {', '.join(KINDS)}", field="ticket")
        waiting = self._claim(offer.token)
        if waiting is None:
            raise PortClosed("no local port waits for this token")
        asker, node = local.pair(patience=self._patience, device=self._device)
        waiting.bring(node)
        return asker

    def service(self) -> grpc.GenericRpcHandler:
        """What our grpc.aio server registers so that stream ports can come in."""
        return stream.service(self._claim, patience=self._patience, device=self._device)

    def _shown(self) -> str:
        """The host others dial: ours, or where we listen everywhere, that of our gRPC server."""
        return self.address.rpartition(":")[0].strip("[]") if self._host in EVERYWHERE else self._host

    def _enter(self, kind: str, leads: bool, peer: socket.socket) -> Port:
        return BY_SOCKET[kind](peer, leads=leads, patience=self._patience, device=self._device)

    def _claim(self, token: bytes) -> Waiting | None:
        with self._lock:
            return next((waiting for waiting in list(self._waiting) if waiting.claim(token)), None)


def host_key() -> str:
    """Equal for two processes exactly where they can share memory: one kernel, one network and user namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return ":".join([boot, *(os.readlink(f"/proc/self/ns/{space}") for space in ("net", "user"))])
    except OSError:
        return uuid.uuid4().hex


def choose(asked: str, ours: str, theirs: str) -> str:
    """The kind of a new port: the one asked for, else the best two processes with these host keys can have."""
    return asked or ("shm" if ours and ours == theirs else "tcp")
