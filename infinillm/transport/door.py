"""Tickets and doors: how a peer proves that it was invited before a port opens.

A ticket says where to knock and holds a random 128-bit token; it travels to the peer inside our own gRPC reply. A door
admits one peer: the first that presents the token. Then it is gone, so a token is never good twice.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from infinillm.errors import BadRequest, DeadlineExceeded, PortClosed, Unavailable
from infinillm.transport.base import Port

TOKEN_BYTES = 16
ADMITTED = b"+"
KNOCK_SECONDS = 1.0  # how long a stranger may stand in the door without a word


class Ticket(NamedTuple):
    """Where to knock, and with what. `address` is "host:port", a name in the abstract unix namespace, or ""."""

    kind: str
    address: str
    token: bytes

    def encode(self) -> bytes:
        return json.dumps([self.kind, self.address, self.token.hex()]).encode()

    @staticmethod
    def decode(said: bytes) -> Ticket:
        try:
            kind, address, token = json.loads(said)
            ticket = Ticket(str(kind), str(address), bytes.fromhex(token))
        except (ValueError, TypeError) as error:
            raise BadRequest("this is no ticket of a port", field="ticket") from error
        if len(ticket.token) != TOKEN_BYTES:
            raise BadRequest("the ticket's token has a wrong length", field="ticket")
        return ticket


class Door:
    """A Listener on a socket; `enter` makes a port of the admitted peer's socket.

    With a `host` it listens there on TCP, and peers reach it at `shown`; without, on a unix socket in the abstract
    namespace, which leaves no file behind.
    """

    def __init__(self, kind: str, host: str, shown: str, enter: Callable[[socket.socket], Port]):
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._enter = enter
        self._closed = False
        self._accepting, self._closing = threading.Lock(), threading.Lock()
        try:
            self._socket, address = _bind_tcp(host, shown) if host else _bind_unix()
        except OSError as error:
            raise Unavailable(f"cannot listen for a {kind} port on {host or 'a unix socket'}: {error}") from error
        self._socket.setblocking(False)
        self._knocked = select.poll()
        self._knocked.register(self._socket, select.POLLIN)
        self.ticket = Ticket(kind, address, self._token).encode()

    def accept(self, timeout: float) -> Port:
        try:
            with self._accepting:
                peer = self._admit(time.monotonic() + timeout)
        finally:
            self.close()
        return entered(peer, self._enter)

    def close(self) -> None:
        self._closed = True
        with self._closing:
            hang_up(self._socket)
            with self._accepting:
                self._socket.close()

    def _admit(self, deadline: float) -> socket.socket:
        while (left := deadline - time.monotonic()) > 0:
            if self._closed:
                raise PortClosed("the offer of a port was withdrawn")
            self._knocked.poll(left * 1000)
            try:
                peer, _ = self._socket.accept()
            except OSError:  # nobody, or nobody any more
                continue
            with contextlib.suppress(OSError):
                peer.settimeout(min(left, KNOCK_SECONDS))
                if hmac.compare_digest(peer.recv(TOKEN_BYTES), self._token):
                    peer.sendall(ADMITTED)
                    return peer
            peer.close()
        raise DeadlineExceeded("nobody came for the port")


class Waiting:
    """A Listener without a socket: whoever takes the peer's call brings the port here."""

    def __init__(self, kind: str, address: str):
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._news = threading.Condition()
        self._port: Port | None = None
        self._claimed = self._withdrawn = False
        self.ticket = Ticket(kind, address, self._token).encode()

    def claim(self, token: bytes) -> bool:
        """True for the right token, once."""
        with self._news:
            if self._claimed or self._withdrawn or not hmac.compare_digest(token, self._token):
                return False
            self._claimed = True
            return True

    def bring(self, port: Port) -> None:
        with self._news:
            if not self._withdrawn:
                self._port = port
                self._news.notify_all()
                return
        port.close()

    def accept(self, timeout: float) -> Port:
        with self._news:
            came = self._news.wait_for(lambda: self._port or self._withdrawn, timeout)
            self._withdrawn = True
            if self._port:
                return self._port
        raise PortClosed("the offer of a port was withdrawn") if came else DeadlineExceeded("nobody came for the port")

    def close(self) -> None:
        with self._news:
            self._withdrawn = True
            self._news.notify_all()


def knock(ticket: Ticket, timeout: float) -> socket.socket:
    """The socket behind a door that admits us. Raises PortClosed."""
    try:
        peer = _reach(ticket.address, timeout)
    except (OSError, ValueError) as error:
        raise PortClosed(f"no {ticket.kind} port waits at {ticket.address}: {error}") from error
    reason = "the token was refused"
    try:
        peer.sendall(ticket.token)
        if peer.recv(1) == ADMITTED:
            return peer
    except OSError as error:
        reason = str(error)
    peer.close()
    raise PortClosed(f"no {ticket.kind} port waits at {ticket.address}: {reason}")


def entered(peer: socket.socket, enter: Callable[[socket.socket], Port]) -> Port:
    """The port made of an admitted socket, or PortClosed where the peer leaves half-way."""
    try:
        return enter(peer)
    except PortClosed:
        peer.close()
        raise
    except (OSError, EOFError, RuntimeError) as error:  # torch.distributed raises RuntimeError
        peer.close()
        raise PortClosed(f"the peer left while the port was being made: {error}") from error


def hang_up(end: socket.socket) -> None:
    """Wake whoever waits on this socket, at both ends."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _bind_tcp(host: str, shown: str) -> tuple[socket.socket, str]:
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    door = socket.create_server((host, 0), family=family)
    port = door.getsockname()[1]
    return door, f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"


def _bind_unix() -> tuple[socket.socket, str]:
    door, name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), f"infinillm-{secrets.token_hex(TOKEN_BYTES)}"
    door.bind("\0" + name)
    door.listen()
    return door, name


def _reach(address: str, timeout: float) -> socket.socket:
    host, colon, port = address.rpartition(":")
    if colon:
        return socket.create_connection((host.strip("[]"), int(port)), timeout)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.settimeout(timeout)
        peer.connect("\0" + address)
    except OSError:
        peer.close()
        raise
    return peer
