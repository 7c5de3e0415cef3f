"""Two controllers and one lease: the leader is killed or stands still under load, and only the other one notices."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from infinillm.errors import Unavailable
from tests import tiny
from tests.e2e import client
from tests.e2e.conftest import BLOCKS, FLAGS, MODEL, truth
from tests.e2e.pair import LEASE_SECONDS, SOON, Pair
from tests.e2e.processes import until

COUNT, LENGTH = 300, 450  # of a request that runs all the while, in memory of two workers


def books_agree(pair: Pair) -> bool:
    """Whether the ledger knows every loan and what it is made of, while all goes on; `settle` compares the rest."""
    ledger = pair.ledger()
    said = [pair.books(name) for name in pair.workers]
    return (
        {node.id: (node.incarnation, node.lent, node.borrowed) for node in ledger.nodes}
        == {s.node.id: (s.node.incarnation, s.node.lent, s.node.borrowed) for s in said}
        and {loan.id: loan.blocks for loan in ledger.loans} == {loan.id: loan.blocks for s in said for loan in s.loans}
        and not ledger.settling
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), str(tiny.folder(MODEL)), blocks=BLOCKS, flags=FLAGS)
    try:
        pair.start(workers=3)
        yield pair
        pair.end()
    finally:
        pair.kill()


@pytest.fixture
def pair(made: Pair) -> Iterator[Pair]:
    yield made
    made.settle()


@contextmanager
def load(pair: Pair) -> Iterator[list[float]]:
    """Short requests, one after the other, each of which must be answered rightly; the seconds each has taken."""
    over, took, failed = threading.Event(), list[float](), list[BaseException]()

    async def run() -> None:
        prompt, want = truth(50, 14, 8)
        async with client.client(pair.url) as http:
            while not over.is_set():
                began = time.monotonic()
                got = await client.ask(http, prompt, 8, stream=len(took) % 2 == 0)
                took.append(time.monotonic() - began)
                assert (got.error, got.tokens) == (None, want)

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as failure:
            failed.append(failure)
            took.append(0.0)  # nobody need wait for more

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join(60.0)
    assert not failed, failed
    assert took


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_when_the_leader_is_gone_the_other_one_leads_within_seconds_and_nobody_notices(
    pair: Pair, how: signal.Signals
) -> None:
    old = until(pair.leader, "a leader", SOON)
    (new,) = set(pair.controllers) - {old}
    epoch = pair.ledger().epoch
    prompt, want = truth(LENGTH, 61, COUNT)
    with client.streaming(pair.url, prompt, COUNT) as stream, load(pair) as took:
        stream.read(5)
        until(lambda: pair.ledger().loans, "it borrows", 5)
        gone = pair.controllers[old]
        gone.signal(how)
        began = time.monotonic()
        until(lambda: pair.leader(new), "the other one leads", SOON)
        led = time.monotonic() - began
        until(lambda: len(pair.asked(new).nodes) == 3, "every worker has joined there", SOON)
        joined = time.monotonic() - began
        until(lambda: books_agree(pair), "the ledger is the nodes' own books", SOON)
        if how == signal.SIGKILL:
            gone.wait()
            pair.start_controller(old).ready()
        else:
            gone.signal(signal.SIGCONT)  # it has not heard of anything
        with pytest.raises(Unavailable, match=f"stands by; .*{pair.ports[new]} leads|none that it knows of"):
            pair.asked(old)
        served = len(took)
        until(lambda: len(took) > served + 2 or not took[-1], "new requests are served", 10)
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    print(f"{how.name}: led after {led:.2f} s, joined after {joined:.2f}, the slowest short one took {max(took):.2f}")

    ledger = pair.asked(new)
    assert ledger.epoch > epoch
    assert pair.leader() == new
    until(lambda: pair.controllers[old].metrics()["controller_leader"] == 0, "it says that it stands by", SOON)
    assert pair.controllers[new].metrics()["controller_leader"] == 1
    for worker in pair.workers.values():
        epochs = [event["epoch"] for event in worker.events if event["event"] == "member"]
        assert epochs == sorted(set(epochs)), "a smaller epoch was believed"
        assert epochs[-1] == ledger.epoch
    long, answer = truth(LENGTH, 62, 8)
    assert client.complete(pair.url, long, 8).tokens == answer  # by loans of the new leader's naming


def test_a_leader_that_is_told_to_end_is_followed_within_a_second(pair: Pair) -> None:
    old = until(pair.leader, "a leader", SOON)
    (new,) = set(pair.controllers) - {old}
    with load(pair):
        assert pair.controllers[old].end() == 0
        until(lambda: pair.leader(new), "the other one leads", 1.0 + LEASE_SECONDS / 5)
        until(lambda: len(pair.asked(new).nodes) == 3, "every worker has joined there", SOON)
    pair.start_controller(old).ready()
