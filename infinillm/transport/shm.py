"""The port between two processes of one host: shared memory, and eventfds for doorbells.

Each way has a ring of bytes and two eventfds. `filled` counts bytes written and not yet noticed by the reader,
`freed` bytes read and not yet noticed by the writer. An eventfd is doorbell, counter and memory barrier in one, so
nothing but the payload lies in the ring and no word of it is trusted: a peer can send wrong bytes, never make us
touch memory outside the ring. The reader gives room back a quarter of the ring at a time; a small message therefore
costs one doorbell. A large one passes in pieces, both ends copying at once.

The memory is anonymous (memfd, sealed against shrinking) and travels with the eventfds over the unix socket that
authenticated the peer. That socket then stays open for one purpose: it hangs up when the peer dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
from collections.abc import Sequence

import torch

from infinillm.errors import PortClosed
from infinillm.transport.door import hang_up
from infinillm.transport.port import BytePort, Piece
from infinillm.transport.watch import Watch

RING = 1 << 21  # bytes, each way
PIECE = 1 << 18  # bytes copied between two doorbells
memmove = ctypes.memmove
SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
MEMFD_FLAGS = 0x0001 | 0x0002  # MFD_CLOEXEC, MFD_ALLOW_SEALING


def open_port(peer: socket.socket, *, leads: bool, patience: float, device: torch.device) -> BytePort:
    """The port to the process behind an authenticated unix socket; exactly one end leads."""
    fds = _make(peer) if leads else _take(peer)
    return BytePort("shm", ShmWire(peer, fds, leads=leads, patience=patience), device)


def _make(peer: socket.socket) -> list[int]:
    memory = os.memfd_create("infinillm-port", MEMFD_FLAGS)
    os.ftruncate(memory, 2 * RING)
    fcntl.fcntl(memory, F_ADD_SEALS, SEALS)
    fds = [memory, *(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4))]
    socket.send_fds(peer, [b"f"], fds)
    return fds


def _take(peer: socket.socket) -> list[int]:
    _, fds, _, _ = socket.recv_fds(peer, 1, 5, socket.MSG_CMSG_CLOEXEC)
    if len(fds) != 5 or os.fstat(fds[0]).st_size != 2 * RING or fcntl.fcntl(fds[0], F_GET_SEALS) & SEALS != SEALS:
        for fd in fds:
            os.close(fd)
        raise PortClosed("the peer offered no ring of ours")
    return fds


class ShmWire:
    """One end of two rings. `fds`: the memory, then filled and freed of the leader's ring, then of the other's."""

    def __init__(self, peer: socket.socket, fds: Sequence[int], *, leads: bool, patience: float):
        memory, *bells = fds
        self._bells = bells
        mine, theirs = (bells[:2], bells[2:]) if leads else (bells[2:], bells[:2])
        self._out_filled, self._out_freed = mine
        self._in_filled, self._in_freed = theirs
        self._peer = peer
        self._map = mmap.mmap(memory, 2 * RING, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        os.close(memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._out, self._in = (base, base + RING) if leads else (base + RING, base)
        self._out_at, self._room = 0, RING
        self._in_at, self._ready, self._owed = 0, 0, 0
        self._reading = Watch([peer.fileno(), self._in_filled], patience)
        self._stirring = Watch([peer.fileno(), self._in_filled, self._out_freed], patience)

    def write(self, pieces: Sequence[Piece]) -> int:
        if not self._room and not self._gain_room():
            return 0
        at, budget = self._out_at, min(PIECE, self._room)
        done = 0
        for address, size in pieces:
            size = min(size, budget - done)
            while size:
                step = size if at + size <= RING else RING - at
                memmove(self._out + at, address, step)
                at, done, address, size = (at + step) % RING, done + step, address + step, size - step
        self._out_at = at
        self._room -= done
        os.eventfd_write(self._out_filled, done)
        return done

    def read(self, pieces: Sequence[Piece], wait: bool) -> int:
        if not self._ready and not self._notice(self._reading.wait() if wait else self._reading.look()):
            return 0
        at, budget = self._in_at, min(PIECE, self._ready)
        done = 0
        for address, size in pieces:
            size = min(size, budget - done)
            while size:
                step = size if at + size <= RING else RING - at
                memmove(address, self._in + at, step)
                at, done, address, size = (at + step) % RING, done + step, address + step, size - step
        self._in_at = at
        self._ready -= done
        self._owed += done
        if self._owed >= RING // 4:
            os.eventfd_write(self._in_freed, self._owed)
            self._owed = 0
        return done

    def stir(self) -> None:
        events = self._stirring.wait()
        if self._out_freed not in events and self._in_filled not in events:
            raise EOFError("the peer is gone")

    def end(self) -> None:
        hang_up(self._peer)

    def free(self) -> None:
        self._peer.close()
        for fd in self._bells:
            os.close(fd)
        self._map.close()

    def _notice(self, events: dict[int, int]) -> bool:
        """Learn of bytes the peer wrote."""
        if self._in_filled in events:
            self._ready = os.eventfd_read(self._in_filled)
            if self._ready > RING:
                raise EOFError("the peer overran the ring")
            return True
        if events:
            raise EOFError("the peer is gone")
        return False

    def _gain_room(self) -> bool:
        """Learn of room the peer made."""
        try:
            self._room = os.eventfd_read(self._out_freed)
        except BlockingIOError:
            return False
        if self._room > RING:
            raise EOFError("the peer overran the ring")
        return True
