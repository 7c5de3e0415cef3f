"""Many clients at once, short requests among some that no single worker could hold: all are served, and rightly."""

from __future__ import annotations

import asyncio
import random

from tests.e2e import client
from tests.e2e.client import Ending
from tests.e2e.conftest import truth
from tests.e2e.processes import Cluster

CLIENTS = 64
LENGTHS = (3, 16, 31, 64, 100, 150, 220, 300, 420, 520, 640, 800)
COUNT = 24
SECONDS = 100.0  # for all of them


def test_64_streams_of_mixed_lengths_all_finish_and_none_starves(pool: Cluster) -> None:
    rng = random.Random(64)
    asked = [(LENGTHS[i % len(LENGTHS)], 20 + i % 3, rng.randint(4, COUNT)) for i in range(CLIENTS)]
    rng.shuffle(asked)
    answers = [(*truth(length, seed, COUNT), count) for length, seed, count in asked]
    before = pool.total("requests_total")
    told = {name: len(worker.events) for name, worker in pool.workers.items()}

    async def crowd() -> list[Ending]:
        async with client.client(pool.url) as http:
            work = (client.ask(http, prompt, count, stream=True) for prompt, _, count in answers)
            return await asyncio.wait_for(asyncio.gather(*work), SECONDS)

    endings = asyncio.run(crowd())
    for ending, (prompt, want, count) in zip(endings, answers, strict=True):
        assert (ending.error, ending.tokens, ending.finish_reason) == (None, want[:count], "length"), len(prompt)
    assert pool.total("requests_total") - before == CLIENTS
    assert pool.total("attention_tokens_total") > 0
    for name, worker in pool.workers.items():
        bad = [
            e for e in worker.events[told[name] :] if e["event"] in {"node_lost", "conversation_lost", "pass_failed"}
        ]
        assert not bad, "nobody died, so nobody may be lost"
