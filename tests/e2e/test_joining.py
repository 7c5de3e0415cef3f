"""A worker joins a cluster that runs, lends at once, and leaves it again."""

from __future__ import annotations

import time

from tests.e2e import client
from tests.e2e.conftest import BLOCK, BLOCKS, truth
from tests.e2e.processes import Cluster, until

LENDING_SECONDS = 2.0  # after it is ready
LENGTH, COUNT = (3 * BLOCKS - 2) * BLOCK, 20  # tokens: too many for three workers, of which each lends seven eighths


def test_a_worker_that_joins_lends_within_two_seconds_and_leaves_cleanly(pool: Cluster) -> None:
    prompt, want = truth(LENGTH, 51, COUNT)
    refused = client.complete(pool.url, prompt, COUNT)
    assert refused.error is not None and refused.status == 400
    joining = pool.add_worker("worker-3")
    joining.ready()
    ready = time.monotonic()
    until(lambda: len(pool.ledger().nodes) == 4, "it joins", LENDING_SECONDS)
    with client.streaming(pool.url, prompt, COUNT) as stream:
        until(lambda: any(loan.lender == "worker-3" for loan in pool.ledger().loans), "it lends", LENDING_SECONDS)
        assert time.monotonic() - ready < LENDING_SECONDS
        got = stream.finish()
    assert (got.error, got.tokens) == (None, want)
    pool.settle()
    del pool.workers["worker-3"]
    assert joining.end() == 0, joining.last_words
    until(lambda: len(pool.ledger().nodes) == 3, "it has left", 5)
    assert client.complete(pool.url, prompt, COUNT).status == 400
