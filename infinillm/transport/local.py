"""The port inside one process: two queues of bytes, for tests and for clusters of one process."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence

import torch

from infinillm.transport.port import BytePort, Chunks, Piece

ROOM = 1 << 22  # bytes a queue holds before its writer must wait
CHUNK = 1 << 20  # bytes written at once


class Queue:
    """Bytes one way. `news` guards both ways of a lane; `ended` says why there will be no more."""

    def __init__(self, news: threading.Condition):
        self.news = news
        self.chunks = Chunks()
        self.ended = ""

    def put(self, chunk: bytes) -> None:
        with self.news:
            self.chunks.put(chunk)
            self.news.notify_all()

    def pop(self) -> bytes:
        """The first chunk, or nothing."""
        with self.news:
            chunk = self.chunks.pop() if self.chunks.size else b""
            self.news.notify_all()
            return chunk

    def next(self) -> bytes:
        """The first chunk once there is one; nothing at the end."""
        with self.news:
            self.news.wait_for(self.settled)
            return self.pop()

    def wait_for_room(self) -> None:
        with self.news:
            self.news.wait_for(self.roomy)

    def settled(self) -> bool:
        return bool(self.ended) or self.chunks.size > 0

    def roomy(self) -> bool:
        return bool(self.ended) or self.chunks.size < ROOM

    def end(self, reason: str) -> None:
        with self.news:
            self.ended = self.ended or reason
            self.news.notify_all()


class QueueWire:
    """A Wire made of two queues. `moved` is called after bytes went in or out, `freed` at the end."""

    def __init__(
        self,
        out: Queue,
        into: Queue,
        *,
        patience: float,
        moved: Callable[[], None] = lambda: None,
        freed: Callable[[], None] = lambda: None,
    ):
        self._out, self._into, self._news = out, into, out.news
        self._patience, self._moved, self.free = patience, moved, freed

    def write(self, pieces: Sequence[Piece]) -> int:
        with self._news:
            if self._out.ended:
                raise EOFError(self._out.ended)
            if not self._out.roomy():
                return 0
            chunk = _taken(pieces, CHUNK)
            self._out.chunks.put(chunk)
            self._news.notify_all()
        self._moved()
        return len(chunk)

    def read(self, pieces: Sequence[Piece], wait: bool) -> int:
        with self._news:
            if wait and not self._news.wait_for(self._into.settled, self._patience):
                raise TimeoutError(f"silent for {self._patience} s")
            if not self._into.chunks.size:
                if self._into.ended:
                    raise EOFError(self._into.ended)
                return 0
            count = self._into.chunks.take(pieces)
            self._news.notify_all()
        self._moved()
        return count

    def stir(self) -> None:
        with self._news:
            if not self._news.wait_for(lambda: self._into.settled() or self._out.roomy(), self._patience):
                raise TimeoutError(f"no room for {self._patience} s")

    def end(self) -> None:
        self._into.end("it was closed")
        self._out.end("the peer closed it")
        self._moved()


def pair(*, patience: float, device: torch.device) -> tuple[BytePort, BytePort]:
    """Both ends of a lane within this process."""
    news = threading.Condition()
    there, back = Queue(news), Queue(news)
    asker = QueueWire(there, back, patience=patience)
    node = QueueWire(back, there, patience=patience)
    return BytePort("local", asker, device), BytePort("local", node, device)


def _taken(pieces: Sequence[Piece], most: int) -> bytes:
    found = []
    for address, size in pieces:
        found.append(ctypes.string_at(address, min(size, most)))
        most -= len(found[-1])
        if not most:
            break
    return b"".join(found)
