"""Blocks of a running request move between real workers, there and back, because a controller orders it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infinillm import rpc
from infinillm.core.policy import named
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.types import Layout, NodeId
from infinillm.servers.controller import CONTROLLER, Controller
from infinillm.telemetry import Metrics
from tests.e2e import client
from tests.e2e.conftest import truth
from tests.e2e.processes import Cluster, until

SOON = 15.0
BEAT = 0.02
LENGTH, COUNT, MOVED = 100, 280, 4  # tokens, tokens, blocks


@contextmanager
def commanded(pool: Cluster) -> Iterator[Controller]:
    """The pool's controller lives in this process for a while, where a test can put orders into its mouth."""
    pool.controller.kill()
    host, port = pool.address.rsplit(":", 1)
    metrics, loop = Metrics("controller"), asyncio.new_event_loop()
    controller = Controller(
        named("pooled"),
        epoch=time.time_ns() // 1_000_000,
        heartbeat_seconds=BEAT,
        metrics=metrics,
        clock=time.monotonic,
        cost=None,
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> rpc.Server:
        server = rpc.Server(host, int(port), [(CONTROLLER, controller)])
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(serve(), loop).result(SOON)
    try:
        until(lambda: len(controller.ledger.nodes) == len(pool.workers), "the workers join again", SOON)
        yield controller
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0.2), loop).result(SOON)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SOON)
        loop.close()
        metrics.close()
        pool.start_controller_again().ready()


def on(layout: Layout, node: NodeId) -> int:
    return sum(span.stop - span.start for span in layout if span.node == node)


def moved(pool: Cluster) -> dict[str, float]:
    """Tokens that moved so far, of all workers."""
    told = [worker.metrics() for worker in pool.workers.values()]
    return {
        place: sum(
            value
            for samples in told
            for key, value in samples.items()
            if key.startswith(f'moved_tokens_total{{direction="{place}"')
        )
        for place in ("away", "home")
    }


def test_blocks_move_away_and_back_while_the_answer_streams(pool: Cluster) -> None:
    prompt, want = truth(LENGTH, 61, COUNT)
    before = moved(pool)
    with commanded(pool) as controller, client.streaming(pool.url, prompt, COUNT) as stream:
        stream.read(5)
        home = str(pool.placement(stream.id)["node"])
        away = next(name for name in pool.workers if name != home)
        layouts = until(lambda: controller.ledger.layouts.get(home), "the home tells of its sequence", SOON)
        (seq,) = layouts

        def layout() -> Layout:
            return controller.ledger.layouts.get(home, {}).get(seq, ())

        controller.orders[home] = [MoveBlocks(home, seq, home, away, MOVED, "a test wants it")]
        until(lambda: on(layout(), away) == MOVED * 16, "the blocks are there", SOON)
        assert on(layout(), home) >= LENGTH - MOVED * 16
        controller.orders[home] = [MoveBlocks(home, seq, away, home, MOVED, "a test wants them back")]
        until(lambda: layout() and not on(layout(), away), "the blocks are back", SOON)
        got = stream.finish()
        after = moved(pool)
    assert (got.error, got.tokens) == (None, want)
    assert {place: after[place] - before[place] for place in after} == {"away": MOVED * 16, "home": MOVED * 16}
