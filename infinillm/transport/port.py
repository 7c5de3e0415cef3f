"""The port over a wire of bytes: what local, shm, tcp and stream have in common.

A wire moves bytes and never waits to write. That is what lets both ends send at once: a sender who finds no room
takes in what the peer is saying (`_spilled`) until there is some, unless a receiver is at it already.

`close` first ends the wire, which makes every waiting call fail at both ends, then frees it once the threads that
were inside have left. So no call ever touches a file descriptor or a mapping that was given back.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from infinillm.errors import BadRequest, PortClosed

Piece: TypeAlias = tuple[int, int]  # address in host memory, bytes

SPILL_BYTES = 1 << 18


class Wire(Protocol):
    """Bytes to one peer, in order. Raises OSError or EOFError once the peer or the wire is gone."""

    def write(self, pieces: Sequence[Piece]) -> int:
        """Take bytes off the front of `pieces`, as many as there is room for now; how many."""
        ...

    def read(self, pieces: Sequence[Piece], wait: bool) -> int:
        """Fill the front of `pieces`; how many bytes. With `wait` not before something came, or TimeoutError."""
        ...

    def stir(self) -> None:
        """Return when there may be something to read or room to write; TimeoutError after the patience."""
        ...

    def end(self) -> None:
        """Make every call at both ends fail, the waiting ones included. Called once, from any thread."""
        ...

    def free(self) -> None:
        """Give back what the wire holds. Called once, after `end`, with no thread inside."""
        ...


class BytePort:
    """A Port over a Wire. Tensors of another device than the CPU are staged through pinned host memory."""

    def __init__(self, kind: str, wire: Wire, device: torch.device):
        self.kind = kind
        self.sent_bytes = 0
        self.received_bytes = 0
        self._wire = wire
        self._device = device
        self._on_host = device.type == "cpu"
        self._closed = False
        self._closing, self._sending, self._receiving = threading.Lock(), threading.Lock(), threading.Lock()
        self._spilled = Chunks()

    def send(self, tensors: Sequence[Tensor]) -> None:
        host = tensors if self._on_host else self._to_host(tensors)
        parts, left = pieces(host)
        try:
            with self._sending:
                while left:
                    if self._closed:
                        raise EOFError("it was closed")
                    count = self._wire.write(parts)
                    self.sent_bytes += count
                    left -= count
                    if not count:
                        self._make_way()
                    elif left:
                        parts = rest(parts, count)
        except (OSError, EOFError) as lost:
            self.close()
            raise PortClosed(f"{self.kind} port, sending: {lost or type(lost).__name__}") from lost

    def recv(self, out: Sequence[Tensor]) -> None:
        host = out if self._on_host else [torch.empty_like(t, device="cpu", pin_memory=True) for t in out]
        parts, left = pieces(host)
        try:
            with self._receiving:
                while left:
                    if self._closed:
                        raise EOFError("it was closed")
                    count = self._spilled.take(parts) if self._spilled.size else self._wire.read(parts, True)
                    self.received_bytes += count
                    left -= count
                    if left:
                        parts = rest(parts, count)
        except (OSError, EOFError) as lost:
            self.close()
            raise PortClosed(f"{self.kind} port, receiving: {lost or type(lost).__name__}") from lost
        if host is not out:
            for t, h in zip(out, host, strict=True):
                t.copy_(h, non_blocking=True)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._wire.end()
            with self._sending, self._receiving:
                self._wire.free()
                self._spilled = Chunks()

    def _make_way(self) -> None:
        """There is no room to write: take in what the peer says, so that it can take in what we say."""
        if self._receiving.acquire(blocking=False):
            try:
                scratch = ctypes.create_string_buffer(SPILL_BYTES)
                address = ctypes.addressof(scratch)
                while count := self._wire.read([(address, SPILL_BYTES)], False):
                    self._spilled.put(ctypes.string_at(address, count))
            finally:
                self._receiving.release()
        self._wire.stir()

    def _to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        host = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
        for h, t in zip(host, tensors, strict=True):
            h.copy_(t, non_blocking=True)
        torch.accelerator.current_stream(self._device).synchronize()
        return host


class Chunks:
    """Bytes put in as chunks and taken out as pieces, first in first out."""

    def __init__(self) -> None:
        self.size = 0
        self._chunks: deque[memoryview] = deque()

    def put(self, chunk: bytes) -> None:
        self._chunks.append(memoryview(chunk))
        self.size += len(chunk)

    def pop(self) -> bytes:
        """The first chunk, whole."""
        chunk = self._chunks.popleft()
        self.size -= len(chunk)
        return bytes(chunk)

    def take(self, pieces: Sequence[Piece]) -> int:
        """Fill the front of `pieces` with what there is; how many bytes."""
        done = 0
        for address, size in pieces:
            while size and self._chunks:
                chunk = self._chunks[0]
                step = min(size, len(chunk))
                memoryview((ctypes.c_char * step).from_address(address)).cast("B")[:] = chunk[:step]
                address, size, done = address + step, size - step, done + step
                if step == len(chunk):
                    self._chunks.popleft()
                else:
                    self._chunks[0] = chunk[step:]
        self.size -= done
        return done


def pieces(tensors: Sequence[Tensor]) -> tuple[list[Piece], int]:
    """Where the bytes of contiguous host tensors lie, and how many there are; empty tensors have none."""
    found, total = [], 0
    for t in tensors:
        if not (t.is_cpu and t.is_contiguous()):
            raise BadRequest(
                f"this port carries contiguous CPU tensors, not {t.stride()} on {t.device}", field="tensors"
            )
        if size := t.nbytes:
            found.append((t.data_ptr(), size))
            total += size
    return found, total


def rest(parts: list[Piece], count: int) -> list[Piece]:
    """What is left of `parts` without the first `count` bytes."""
    for i, (address, size) in enumerate(parts):
        if count < size:
            return [(address + count, size - count), *parts[i + 1 :]]
        count -= size
    return []
