"""The worker that owns a request dies, stands still or leaves in mid-stream: the client sees the same tokens."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests import tiny
from tests.e2e import client
from tests.e2e.conftest import BLOCK, truth
from tests.e2e.processes import Cluster, until

LENGTH, COUNT = 60, 310  # tokens; one worker holds them, and is more than half a second at it
NOTICED_SECONDS = 3.0
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
PENALISED: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}


def resubmitted(pool: Cluster) -> list[dict[str, Any]]:
    return [event for event in pool.gateway.events if event["event"] == "request_resubmitted"]


@pytest.mark.parametrize(
    "more",
    [{}, {**SAMPLED, **PENALISED, "min_tokens": 100, "logprobs": 2}],
    ids=["greedy", "sampled"],
)
def test_an_owner_that_is_killed(pool: Cluster, more: dict[str, Any]) -> None:
    prompt = tiny.prompt(LENGTH, 31)
    with client.streaming(pool.url, prompt, COUNT, **more) as whole:
        whole.finish()
    already = len(resubmitted(pool))
    with client.streaming(pool.url, prompt, COUNT, **more) as stream:
        stream.read(5)
        home = pool.placement(stream.id)["node"]
        pool.workers[home].kill()
        got = stream.finish()
    (event,) = resubmitted(pool)[already:]
    assert (event["node"], event["request"]) == (home, f"{got.id}-0")
    assert 5 <= event["tokens"] < COUNT
    assert (got.error, got.finish_reason, len(got.tokens)) == (None, "length", COUNT)
    assert got.tokens == whole.tokens
    assert stream.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert len(stream.logprobs) == (COUNT if "logprobs" in more else 0)
    assert pool.placement(stream.id)["node"] != home
    pool.start_worker_again(home)


def test_an_owner_that_stands_still_is_noticed_and_says_nothing_when_it_wakes(pool: Cluster) -> None:
    prompt, want = truth(LENGTH, 32, COUNT)
    already = len(resubmitted(pool))
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home = pool.placement(stream.id)["node"]
        pool.workers[home].signal(signal.SIGSTOP)
        try:
            until(lambda: resubmitted(pool)[already:], f"{home} is given up", NOTICED_SECONDS)
        finally:
            pool.workers[home].signal(signal.SIGCONT)
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    until(lambda: len(pool.ledger().nodes) == 3, "it is a member again", 15)


def computed(pool: Cluster, *names: str) -> float:
    """Tokens in all steps of these workers."""
    return sum(pool.workers[name].metrics()[f'step_tokens_sum{{node="{name}"}}'] for name in names)


def test_an_owner_that_is_told_to_end_hands_over_with_all_it_has(pool: Cluster) -> None:
    """The next one shares what it has, computes what is no whole block yet, and brings all home beside its steps."""
    prompt, want = truth(LENGTH, 33, COUNT)
    already = len(resubmitted(pool))
    before = {name: computed(pool, name) for name in pool.workers}
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home = pool.workers[pool.placement(stream.id)["node"]]
        others = [name for name in pool.workers if name != home.name]
        home.signal(signal.SIGTERM)
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    (event,) = resubmitted(pool)[already:]
    assert (event["node"], event["reason"]) == (home.name, f"worker {home.name} is draining")
    assert computed(pool, *others) - sum(before[name] for name in others) <= COUNT - event["tokens"] + BLOCK
    assert home.wait() == 0, home.last_words
    assert [event for event in home.events if event["event"] == "handed_over"][-1]["requests"] == 1
    pool.start_worker_again(home.name)


def test_the_last_owner_that_is_told_to_end_finishes_what_it_can(pool: Cluster) -> None:
    prompt, want = truth(LENGTH, 32, COUNT)
    already = len(resubmitted(pool))
    with client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home = pool.placement(stream.id)["node"]
        others = [worker for name, worker in pool.workers.items() if name != home]
        for worker in others:
            worker.signal(signal.SIGTERM)
        for worker in others:
            assert worker.wait() == 0, worker.last_words
        until(lambda: len(pool.ledger().nodes) == 1, "it is alone", 5)
        pool.workers[home].signal(signal.SIGTERM)
        got = stream.finish()
    assert (got.error, got.tokens, resubmitted(pool)[already:]) == (None, want, [])
    assert pool.workers[home].wait() == 0
    for name in list(pool.workers):
        pool.add_worker(name)
    pool.ready()
