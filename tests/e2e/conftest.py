"""One cluster of real processes for most tests, prompts whose answers are known, and a check that nothing leaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests import tiny
from tests.e2e import processes
from tests.e2e.processes import Cluster
from tests.e2e.warm import Warm

MODEL = "llama"
BLOCK, BLOCKS = 16, 24  # tokens of a block; blocks of a worker, of which it lends 21
FLAGS = {
    "controller": ("--heartbeat-seconds", "0.2"),
    "worker": ("--block-size", str(BLOCK), "--dtype", "float32", "--loan-seconds", "8", "--patience-seconds", "5"),
}
MARGIN = 1e-3  # in log-probability between the first and the second choice: less could fall either way


@cache
def truth(length: int, seed: int, count: int) -> tuple[list[int], list[int]]:
    """A prompt of random tokens, and what transformers' generate makes of it; near ties are passed over."""
    for attempt in range(50):
        prompt = tiny.prompt(length, 1000 * seed + attempt)
        tokens, logprobs = tiny.oracle(_model(), prompt, count)
        first, second = logprobs.topk(2).values.T
        if (first - second).min() > MARGIN:
            return prompt, tokens
    raise AssertionError("every prompt has a near tie")


@cache
def _model() -> Any:
    return tiny.model(MODEL)


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[None]:
    """What clusters fork their processes from. `infinillm serve`, here and in tests/console, starts them one by one."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not on this machine: then all are started one by one
        yield
        return
    Cluster.warm = Warm(tiny.folder(MODEL))
    yield
    Cluster.warm.end()
    Cluster.warm = None


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three workers of 24 blocks; no worker holds more than 384 tokens, all together hold 1,056."""
    folder = tmp_path_factory.mktemp("pooled")
    with processes.cluster(folder, str(tiny.folder(MODEL)), blocks=BLOCKS, flags=FLAGS) as made:
        yield made


@pytest.fixture
def pool(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster; whatever a test did with it, every block is free again soon, and all books agree."""
    yield shared
    shared.settle()
