"""Processes that die or fall silent, and clients that leave: the others go on, and nothing stays behind."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from tests.e2e import client
from tests.e2e.client import Ending, Stream
from tests.e2e.conftest import BLOCKS, truth
from tests.e2e.processes import Cluster, until

LENGTH, COUNT = 420, 290  # tokens; they take two workers
LONG, MOST = 600, 400  # tokens; they take all three
NOTICED = 3.0  # seconds until somebody who stands still is given up


def lost(pool: Cluster, home: str) -> list[dict[str, Any]]:
    return [event for event in pool.workers[home].events if event["event"] == "node_lost"]


def resubmitted(pool: Cluster) -> list[dict[str, Any]]:
    return [event for event in pool.gateway.events if event["event"] == "request_resubmitted"]


def home_and_lender(pool: Cluster, stream: Stream) -> tuple[str, str]:
    sequence = pool.placement(stream.id)
    (lender,) = {span["node"] for span in sequence["spans"]} - {sequence["node"]}
    return sequence["node"], lender


def test_a_lender_that_is_killed_does_not_change_the_answer(pool: Cluster) -> None:
    prompt, want = truth(LENGTH, 8, COUNT)
    before = {name: worker.metrics() for name, worker in pool.workers.items()}
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home, lender = home_and_lender(pool, stream)
        already = len(lost(pool, home))
        pool.workers[lender].kill()
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    told = {sample: value - before[home].get(sample, 0.0) for sample, value in pool.workers[home].metrics().items()}
    names = ("hole_tokens_total", "repaired_tokens_total", "step_tokens_sum")
    hole, repaired, computed = (told[f'{name}{{node="{home}"}}'] for name in names)
    assert computed == LENGTH + COUNT - 1 + hole
    assert hole == repaired > LENGTH - 16 * BLOCKS, "what did not fit at home was lost, and computed again once"
    assert [event["node"] for event in lost(pool, home)[already:]] == [lender], "the kill came while it lent"
    pool.start_worker_again(lender)


def test_a_lender_that_stands_still_for_a_while_does_not_change_the_answer(pool: Cluster) -> None:
    """It wakes up after it was given up, with its books as they were, and is asked again for the same request."""
    prompt, want = truth(LONG, 9, MOST)
    with client.streaming(pool.url, prompt, MOST) as stream:
        stream.read(5)
        home, lender = home_and_lender(pool, stream)
        already = len(lost(pool, home))
        pool.workers[lender].signal(signal.SIGSTOP)
        try:
            until(lambda: len(lost(pool, home)) > already, f"{home} gives {lender} up", NOTICED)
        finally:
            pool.workers[lender].signal(signal.SIGCONT)
        got = stream.finish()
    assert lost(pool, home)[already:][0]["node"] == lender
    assert (got.error, got.tokens) == (None, want)
    sequence = pool.placement(got.id)
    assert lender in {span["node"] for span in sequence["spans"]}, "it is too long for the other two"
    until(lambda: len(pool.ledger().nodes) == 3, "it is a member again", 15)


def test_the_home_of_a_request_that_is_killed_does_not_change_the_answer(pool: Cluster) -> None:
    """Its lender has to wait until the loan of the dead lapses, then lends to whoever goes on."""
    prompt, want = truth(LENGTH, 11, COUNT)
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home, _ = home_and_lender(pool, stream)
        pool.workers[home].kill()
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    sequence = pool.placement(got.id)
    assert sequence["node"] != home
    pool.start_worker_again(home)


def test_the_home_of_a_request_that_stands_still_does_not_change_the_answer(pool: Cluster) -> None:
    """It wakes when another one goes on, in blocks that were lent to it: it must not write into them."""
    prompt, want = truth(LENGTH, 17, COUNT)
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home, _ = home_and_lender(pool, stream)
        already = len(resubmitted(pool))
        pool.workers[home].signal(signal.SIGSTOP)
        try:
            (event,) = until(lambda: resubmitted(pool)[already:], f"{home} is given up", NOTICED)
            stream.read(event["tokens"] + 15)
        finally:
            pool.workers[home].signal(signal.SIGCONT)
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    sequence = pool.placement(got.id)
    assert sequence["node"] != home
    until(lambda: len(pool.ledger().nodes) == 3, "it is a member again", 15)


@pytest.mark.parametrize("after", [0, 5], ids=["before the first token", "in the middle"])
def test_a_client_that_leaves_frees_its_blocks_within_a_second(pool: Cluster, after: int) -> None:
    prompt, _ = truth(LONG, 12 + after, 4)

    def used() -> list[int]:
        said = [pool.books(name) for name in pool.workers]
        return [s.node.used + sum(loan.used for loan in s.loans) + s.node.running + s.node.waiting for s in said]

    with client.streaming(pool.url, prompt, 400) as stream:
        if after:
            stream.read(after)
        until(lambda: any(used()), "it is being computed", 5)
    left = time.monotonic()
    until(lambda: not any(used()), "no block is used", 1.0)
    assert time.monotonic() - left < 1.0


def test_a_controller_that_is_killed_is_not_missed_by_who_runs_and_learns_everything_again(pool: Cluster) -> None:
    prompt, want = truth(LONG, 13, MOST)
    epoch = pool.ledger().epoch
    with client.streaming(pool.url, prompt, 400) as stream:
        stream.read(5)
        home, _ = home_and_lender(pool, stream)
        pool.controller.kill()
        short, answer = truth(50, 14, 8)
        got: Ending = client.complete(pool.url, short, 8)  # the gateway routes alone
        assert (got.error, got.tokens) == (None, answer)
        assert pool.start_controller_again().ready()["address"] == pool.address
        until(lambda: len(pool.ledger().nodes) == 3, "all workers in the new ledger", 10)
        ledger = pool.ledger()
        assert ledger.epoch > epoch
        until(
            lambda: pool.ledger().loans or not pool.books(home).node.running,
            "the new ledger has the loans of before",
            2.0,
        )
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)


@pytest.mark.parametrize("who", ["its home", "its lender"])
def test_a_worker_that_is_told_to_end_does_not_spoil_what_runs(pool: Cluster, who: str) -> None:
    """A home finishes its requests first; a lender takes its memory along, and what it held is computed again."""
    prompt, want = truth(LENGTH, 15 + len(who), COUNT)
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home, lender = home_and_lender(pool, stream)
        leaver = pool.workers[home if who == "its home" else lender]
        leaver.signal(signal.SIGTERM)
        short, answer = truth(50, 14, 8)
        beside = client.complete(pool.url, short, 8)
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    assert (beside.error, beside.tokens) == (None, answer), "nobody new is sent there"
    assert leaver.wait() == 0, leaver.last_words
    pool.start_worker_again(leaver.name)
