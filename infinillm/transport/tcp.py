"""The port over plain TCP: the fast lane between hosts that have no NCCL.

Keepalive and TCP_USER_TIMEOUT let the kernel notice a host that vanished while nobody was reading. Nothing is
encrypted or signed: use it inside a network you trust, else `stream` over TLS.
"""

from __future__ import annotations

import ctypes
import select
import socket
from collections.abc import Sequence

import torch

from infinillm.transport.door import hang_up
from infinillm.transport.port import BytePort, Piece
from infinillm.transport.watch import Watch

PARTS = 64  # buffers in one system call, well below IOV_MAX


def open_port(peer: socket.socket, *, leads: bool, patience: float, device: torch.device) -> BytePort:
    """The port over an authenticated TCP socket."""
    return BytePort("tcp", TcpWire(peer, patience), device)


class TcpWire:
    """One end of a TCP connection."""

    def __init__(self, peer: socket.socket, patience: float):
        self._peer = peer
        peer.setblocking(False)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(patience)))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(patience / 3)))
        self._patience = patience
        self._reading = Watch([peer.fileno()], patience)
        self._stirring = select.poll()
        self._stirring.register(peer, select.POLLIN | select.POLLOUT)

    def write(self, pieces: Sequence[Piece]) -> int:
        try:
            return self._peer.sendmsg(_buffers(pieces), (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def read(self, pieces: Sequence[Piece], wait: bool) -> int:
        if wait:
            self._reading.wait()
        try:
            count = self._peer.recvmsg_into(_buffers(pieces))[0]
        except BlockingIOError:
            return 0
        if not count:
            raise EOFError("the peer is gone")
        return count

    def stir(self) -> None:
        if not self._stirring.poll(self._patience * 1000):
            raise TimeoutError(f"no room for {self._patience} s")

    def end(self) -> None:
        hang_up(self._peer)

    def free(self) -> None:
        self._peer.close()


def _buffers(pieces: Sequence[Piece]) -> list[ctypes.Array[ctypes.c_char]]:
    return [(ctypes.c_char * size).from_address(address) for address, size in pieces[:PARTS]]
