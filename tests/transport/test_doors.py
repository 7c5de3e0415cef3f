"""Who gets in: tickets, strangers at the door, hosts that share memory, and a peer that breaks the rules of a ring."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infinillm.errors import BadRequest, PortClosed, Unavailable
from infinillm.transport import Lanes, Port, choose, host_key
from infinillm.transport.door import Ticket, Waiting
from infinillm.transport.port import BytePort, Chunks, rest
from infinillm.transport.shm import RING, open_port
from infinillm.transport.stream import plain
from infinillm.transport.watch import Watch
from tests.transport.ends import CPU, join, serving


@pytest.fixture(scope="module")
def lanes() -> Iterator[Lanes]:
    with serving(5.0) as one:
        yield one


@given(st.text(), st.text(), st.binary(min_size=16, max_size=16))
def test_a_ticket_says_what_it_was_told(kind: str, address: str, token: bytes) -> None:
    ticket = Ticket(kind, address, token)
    assert Ticket.decode(ticket.encode()) == ticket


@given(
    st.one_of(
        st.binary(max_size=64),
        st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda value: json.dumps(value).encode()),
    )
)
def test_what_is_no_ticket_is_refused_by_name(said: bytes) -> None:
    lanes = Lanes(host="127.0.0.1", patience=1.0, device=CPU, dial=plain(1.0))
    with pytest.raises(BadRequest) as caught:
        lanes.connect(said)
    assert caught.value.field == "ticket"


def test_an_unknown_kind_is_refused_with_the_list(lanes: Lanes) -> None:
    with pytest.raises(BadRequest, match=r"pigeon.*shm, tcp") as caught:
        lanes.listen("pigeon")
    assert caught.value.field == "kind"
    with pytest.raises(BadRequest, match="pigeon"):
        lanes.connect(Ticket("pigeon", "", bytes(16)).encode())


def test_a_host_that_is_not_ours_cannot_be_listened_on() -> None:
    with pytest.raises(Unavailable, match=r"192\.0\.2\.1"):
        Lanes(host="192.0.2.1", patience=1.0, device=CPU, dial=plain(1.0)).listen("tcp")


@pytest.mark.parametrize("kind", ["shm", "tcp", "stream"])
def test_nobody_there(kind: str, lanes: Lanes) -> None:
    address = "nobody" if kind == "shm" else "127.0.0.1:1"
    with pytest.raises(PortClosed):
        lanes.connect(Ticket(kind, address, bytes(16)).encode())


def test_listening_everywhere_shows_the_address_others_dial() -> None:
    lanes = Lanes(host="0.0.0.0", patience=1.0, device=CPU, dial=plain(1.0))
    for address, shown in (
        ("10.1.2.3:7000", "10.1.2.3"),
        ("[fd00::1]:7000", "[fd00::1]"),
        ("node-1.pool:7", "node-1.pool"),
    ):
        lanes.address = address
        listener = lanes.listen("tcp")
        assert Ticket.decode(listener.ticket).address.rpartition(":")[0] == shown
        listener.close()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("word", [b"", b"let me in, let me in", bytes(16), b"x"])
def test_a_stranger_does_not_keep_the_guest_out(kind: str, word: bytes, lanes: Lanes) -> None:
    listener = lanes.listen(kind)
    address = Ticket.decode(listener.ticket).address
    stranger = socket.socket(socket.AF_UNIX if kind == "shm" else socket.AF_INET, socket.SOCK_STREAM)
    host, _, number = address.rpartition(":")
    stranger.connect("\0" + address if kind == "shm" else (host, int(number)))
    stranger.sendall(word)
    found: list[Port] = []
    accepting = threading.Thread(target=lambda: found.append(listener.accept(10.0)))
    accepting.start()
    found.append(lanes.connect(listener.ticket))
    accepting.join()
    stranger.settimeout(5)
    try:
        assert stranger.recv(1) == b""
    except ConnectionResetError:
        pass
    stranger.close()
    for port in found:
        port.close()


def test_a_port_brought_too_late_is_closed() -> None:
    waiting = Waiting("local", "")
    token = Ticket.decode(waiting.ticket).token
    assert not waiting.claim(bytes(16))
    assert waiting.claim(token)
    assert not waiting.claim(token)
    waiting.close()
    closed: list[str] = []

    class Late:
        kind, sent_bytes, received_bytes = "local", 0, 0

        def send(self, tensors: object) -> None: ...

        def recv(self, out: object) -> None: ...

        def close(self) -> None:
            closed.append("closed")

    waiting.bring(Late())
    assert closed == ["closed"]


def test_memory_is_shared_with_ourselves_and_nobody_unknown() -> None:
    assert host_key() == host_key()
    assert choose("", host_key(), host_key()) == "shm"
    assert choose("", host_key(), "another host") == "tcp"
    assert choose("", "", "") == "tcp"
    assert choose("stream", host_key(), host_key()) == "stream"


@pytest.mark.parametrize("written", [RING + 1, 1 << 60])
def test_a_peer_that_claims_more_than_the_ring_holds_loses_the_port(written: int, lanes: Lanes) -> None:
    asker, node = join(lanes, lanes, "shm")
    assert isinstance(node, BytePort)
    os.eventfd_write(node._wire._out_filled, written)  # type: ignore[attr-defined]
    with pytest.raises(PortClosed, match="overran"):
        asker.recv([torch.empty(4)])
    node.close()


def test_memory_that_could_shrink_is_not_taken(lanes: Lanes) -> None:
    near, far = socket.socketpair()
    unsealed = os.memfd_create("probe")
    os.ftruncate(unsealed, 2 * RING)
    fds = [unsealed, *(os.eventfd(0) for _ in range(4))]
    socket.send_fds(far, [b"f"], fds)
    with pytest.raises(PortClosed, match="no ring"):
        open_port(near, leads=False, patience=1.0, device=CPU)
    for fd in fds:
        os.close(fd)
    near.close()
    far.close()


@given(st.lists(st.integers(1, 9), max_size=9), st.lists(st.integers(1, 9), max_size=9))
def test_chunks_come_out_as_they_went_in(chunks: list[int], pieces: list[int]) -> None:
    said = bytes(range(1, sum(chunks) + 1))
    store, at = Chunks(), 0
    for size in chunks:
        store.put(said[at : at + size])
        at += size
    heard = ctypes.create_string_buffer(sum(pieces) + 1)
    parts, at = [], ctypes.addressof(heard)
    for size in pieces:
        parts.append((at, size))
        at += size
    count = store.take(parts)
    assert count == min(len(said), sum(pieces))
    assert heard.raw == said[:count] + bytes(sum(pieces) + 1 - count)
    assert store.size == len(said) - count
    assert sum(size for _, size in rest(parts, count)) == sum(pieces) - count


def test_a_watch_times_out_and_sees_what_is_there() -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    watch = Watch([bell], 0.05)
    assert watch.look() == {}
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        watch.wait()
    assert time.monotonic() - start >= 0.049
    os.eventfd_write(bell, 1)
    for _ in range(3):  # asleep first, then spinning
        assert list(watch.wait()) == [bell]
    os.close(bell)
