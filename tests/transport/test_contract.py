"""One contract, every port: order, silence, nothing, honesty."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infinillm.errors import BadRequest, DeadlineExceeded, PortClosed
from infinillm.transport import KINDS, Lanes, Port
from tests.transport.ends import join, serving

PATIENCE = 20.0
SHORT = 0.5
BETWEEN_PROCESSES = [kind for kind in KINDS if kind != "local"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]
Pair = tuple[Port, Port]
Far = Callable[[Lanes, str, str, str], tuple[Port, int]]


@pytest.fixture(scope="module")
def lanes() -> Iterator[Lanes]:
    with serving(PATIENCE) as one:
        yield one


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, lanes: Lanes) -> Iterator[Pair]:
    ends = join(lanes, lanes, request.param)
    yield ends
    for end in ends:
        end.close()


def some(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random bytes of any dtype, the same for the same seed."""
    count = int(torch.tensor(shape).prod()) * torch.empty(0, dtype=dtype).element_size()
    noise = torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return noise.view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def together(*acts: Callable[[], None]) -> None:
    """Do all at once; the first failure is ours."""
    failed: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_question_and_its_answer(pair: Pair, dtype: torch.dtype) -> None:
    asker, node = pair
    q, o = some(1, 3, 9, 64, dtype=dtype), some(2, 3, 9, 64, dtype=dtype)
    heard, answer = torch.empty_like(q), torch.empty_like(o)
    together(lambda: (asker.send([q]), asker.recv([answer])), lambda: (node.recv([heard]), node.send([o])))
    assert same(heard, q)
    assert same(answer, o)


def test_order_with_mixed_dtypes_and_changing_shapes(pair: Pair) -> None:
    asker, node = pair
    steps = [
        [some(7 * i + j, i + 1, 3 + j, 5, dtype=DTYPES[(i + j) % len(DTYPES)]) for j in range(1 + i % 4)]
        for i in range(60)
    ]

    def answer() -> None:
        for step in steps:
            heard = [torch.empty_like(t) for t in step]
            node.recv(heard)
            assert all(same(a, b) for a, b in zip(heard, step, strict=True))
            node.send(list(reversed(heard)))

    def ask() -> None:
        for step in steps:
            asker.send(step)
            said = [torch.empty_like(t) for t in reversed(step)]
            asker.recv(said)
            assert all(same(a, b) for a, b in zip(said, reversed(step), strict=True))

    together(ask, answer)


def test_several_messages_under_way_keep_their_order(pair: Pair) -> None:
    asker, node = pair
    said = [some(i, 33) for i in range(8)]
    for t in said:
        asker.send([t])
        t.zero_()  # a sent tensor is the caller's again
    for i in range(8):
        heard = torch.empty(33)
        node.recv([heard])
        assert same(heard, some(i, 33))


def test_an_empty_tensor_is_not_sent(pair: Pair) -> None:
    asker, node = pair
    empty, t = torch.empty(0, 4), some(3, 5)
    asker.send([])
    asker.send([empty])
    node.recv([empty])  # would wait for ever if anything were expected
    asker.send([empty, t, empty])
    heard = torch.empty(5)
    node.recv([empty, heard, torch.empty(3, 0, dtype=torch.int64)])
    assert same(heard, t)
    assert asker.sent_bytes == node.received_bytes == 20


def test_bytes_are_counted(pair: Pair) -> None:
    asker, node = pair
    asker.send([some(1, 10), some(2, 3, dtype=torch.bfloat16)])
    node.recv([torch.empty(10), torch.empty(3, dtype=torch.bfloat16)])
    node.send([some(1, 7, dtype=torch.uint8)])
    asker.recv([torch.empty(7, dtype=torch.uint8)])
    assert (asker.sent_bytes, asker.received_bytes, node.sent_bytes, node.received_bytes) == (46, 7, 7, 46)


def test_both_may_say_much_at_once_on_one_thread_each(pair: Pair) -> None:
    big = [some(5, 3_000_001), some(6, 1_000_003, dtype=torch.bfloat16)]  # 14 MB: more than any ring or buffer

    def talk(end: Port) -> None:
        for _ in range(2):
            end.send(big)
            heard = [torch.empty_like(t) for t in big]
            end.recv(heard)
            assert all(same(a, b) for a, b in zip(heard, big, strict=True))

    together(lambda: talk(pair[0]), lambda: talk(pair[1]))


def test_one_thread_sends_while_another_receives(pair: Pair) -> None:
    said = [some(i, 1 + 997 * (i % 40)) for i in range(120)]

    def speak(end: Port) -> None:
        for t in said:
            end.send([t])

    def hear(end: Port) -> None:
        for t in said:
            heard = torch.empty_like(t)
            end.recv([heard])
            assert same(heard, t)

    a, b = pair
    together(lambda: speak(a), lambda: hear(a), lambda: speak(b), lambda: hear(b))


def test_a_strided_tensor_is_refused_and_the_port_lives(pair: Pair) -> None:
    asker, node = pair
    with pytest.raises(BadRequest, match="contiguous"):
        asker.send([torch.zeros(4, 4).t()])
    with pytest.raises(BadRequest, match="contiguous"):
        node.recv([torch.zeros(4, 4).t()])
    asker.send([some(1, 4)])
    heard = torch.empty(4)
    node.recv([heard])
    assert same(heard, some(1, 4))


def raises_closed_within(seconds: float, act: Callable[[], None]) -> None:
    start = time.monotonic()
    with pytest.raises(PortClosed):
        act()
    assert time.monotonic() - start < seconds


def when_blocked(act: Callable[[], None], then: Callable[[], None], within: float) -> None:
    """Run `act` on a thread, `then` once that thread sleeps in the kernel; `act` must raise PortClosed soon."""
    at: list[int] = []

    def run() -> None:
        at.append(threading.get_native_id())
        raises_closed_within(PATIENCE, act)

    def disturb() -> None:
        deadline = time.monotonic() + 10
        asleep = 0
        while asleep < 50 and time.monotonic() < deadline:  # asleep at fifty looks in a row
            with open(f"/proc/self/task/{at[0]}/stat" if at else "/proc/self/stat") as stat:
                asleep = asleep + 1 if at and stat.read().rsplit(")", 1)[1].split()[0] == "S" else 0
        start.append(time.monotonic())
        then()

    start: list[float] = []
    together(run, disturb)
    assert time.monotonic() - start[0] < within


def test_close_at_the_other_end_wakes_a_receiver(pair: Pair) -> None:
    when_blocked(lambda: pair[1].recv([torch.empty(4)]), pair[0].close, 1.0)
    raises_closed_within(1.0, lambda: pair[0].send([torch.empty(4)]))
    raises_closed_within(1.0, lambda: pair[1].send([torch.empty(4)]))


def test_close_from_another_thread_wakes_a_receiver(pair: Pair) -> None:
    when_blocked(lambda: pair[0].recv([torch.empty(4)]), pair[0].close, 1.0)
    raises_closed_within(1.0, lambda: pair[1].recv([torch.empty(4)]))


@pytest.mark.parametrize("closer", [0, 1], ids=["ours", "theirs"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "collective"])  # a gloo send cannot be called back
def test_close_wakes_a_sender(kind: str, closer: int, lanes: Lanes) -> None:
    ends = join(lanes, lanes, kind)
    when_blocked(lambda: ends[0].send([torch.empty(40_000_000, dtype=torch.uint8)]), ends[closer].close, 2.0)
    ends[1 - closer].close()


def test_what_was_said_before_close_is_heard(pair: Pair) -> None:
    asker, node = pair
    node.send([some(1, 100)])
    if node.kind != "collective":  # there the bell is heard, the message may not be
        node.close()
    heard = torch.empty(100)
    asker.recv([heard])
    assert same(heard, some(1, 100))


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_peer_loses_the_port_at_both_ends(kind: str) -> None:
    with serving(SHORT) as lanes:
        asker, node = join(lanes, lanes, kind)
        start = time.monotonic()
        raises_closed_within(SHORT + 1.0, lambda: asker.recv([torch.empty(4)]))
        assert time.monotonic() - start > SHORT * 0.9
        raises_closed_within(1.0, lambda: node.recv([torch.empty(4)]))
        node.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_never_listens_loses_the_port(kind: str) -> None:
    with serving(SHORT) as lanes:
        asker, node = join(lanes, lanes, kind)

        def flood() -> None:
            for _ in range(100):
                asker.send([torch.empty(4_000_000, dtype=torch.uint8)])

        raises_closed_within(10.0, flood)
        node.close()


@pytest.mark.parametrize("role", ["asker", "node"])
@pytest.mark.parametrize("kind", BETWEEN_PROCESSES)
def test_a_killed_peer_is_noticed_at_once(kind: str, role: str, lanes: Lanes, far: Far) -> None:
    port, pid = far(lanes, kind, role, "echo")
    t = some(1, 4)
    port.send([t])
    port.recv([heard := torch.empty(4)])
    assert same(heard, t)
    when_blocked(lambda: port.recv([torch.empty(4)]), lambda: os.kill(pid, signal.SIGKILL), 1.0)


@pytest.mark.parametrize("role", ["asker", "node"])
@pytest.mark.parametrize("kind", BETWEEN_PROCESSES)
def test_a_stopped_peer_is_noticed_within_the_patience(kind: str, role: str, far: Far) -> None:
    with serving(SHORT) as lanes:
        port, pid = far(lanes, kind, role, "echo")
        os.kill(pid, signal.SIGSTOP)
        port.send([some(1, 4)])
        raises_closed_within(SHORT + 1.0, lambda: port.recv([torch.empty(4)]))
        raises_closed_within(0.1, lambda: port.send([torch.empty(4)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_token_is_refused_and_the_right_one_is_good_once(kind: str, lanes: Lanes) -> None:
    listener = lanes.listen(kind)
    token = listener.ticket[-8:-2]
    forged = listener.ticket.replace(token, bytes(reversed(token)))
    assert forged != listener.ticket
    found: list[Port] = []

    def forge() -> None:
        with pytest.raises(PortClosed):
            lanes.connect(forged)
        found.append(lanes.connect(listener.ticket))

    together(forge, lambda: found.append(listener.accept(10.0)))
    with pytest.raises(PortClosed):
        lanes.connect(listener.ticket)
    found[0].send([some(1, 4)])
    heard = torch.empty(4)
    found[1].recv([heard])
    assert same(heard, some(1, 4))
    for port in found:
        port.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_offer_nobody_takes_up(kind: str, lanes: Lanes) -> None:
    listener = lanes.listen(kind)
    with pytest.raises(DeadlineExceeded):
        listener.accept(0.02)
    with pytest.raises(PortClosed):
        lanes.connect(listener.ticket)
    withdrawn = lanes.listen(kind)
    when_blocked(lambda: withdrawn.accept(10.0).close(), withdrawn.close, 1.0)


def held() -> tuple[list[str], int]:
    """What this process has: files, sockets and shared memory by kind, and how many threads."""
    gc.collect()
    files = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    with open("/proc/self/maps") as maps:
        rings = [line for line in maps if "infinillm" in line]
    return sorted(file.split(":")[0] for file in files) + rings, len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_after_close(kind: str, lanes: Lanes) -> None:
    def use() -> None:
        asker, node = join(lanes, lanes, kind)
        asker.send([some(1, 4)])
        node.recv([torch.empty(4)])
        asker.close()
        node.close()
        lanes.listen(kind).close()

    use()  # the first use may load and keep things
    before = held()
    for _ in range(3):
        use()
    deadline = time.monotonic() + 5
    while held() != before and time.monotonic() < deadline:
        pass
    assert held() == before
