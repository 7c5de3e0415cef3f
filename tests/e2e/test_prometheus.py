"""A real Prometheus scrapes a cluster under load: every panel of the dashboard has data."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import tiny
from tests.e2e import client
from tests.e2e.conftest import truth
from tests.e2e.processes import Cluster, until

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRAPE_SECONDS = 1
SECONDS = 45.0  # for every panel to have data
VARIABLES = {"$__rate_interval": f"{4 * SCRAPE_SECONDS}s", "$__interval": f"{SCRAPE_SECONDS}s", "$__range": "30s"}


def panels() -> list[tuple[str, str]]:
    """Title and expression of everything the dashboard draws."""
    board = json.loads((DEPLOY / "grafana" / "memory-pool.json").read_text())
    known = dict(VARIABLES)
    for variable in board.get("templating", {}).get("list", []):
        known[f"${variable['name']}"] = known[f"${{{variable['name']}}}"] = ".*"
    found = []
    pending = list(board["panels"])
    while pending:
        panel = pending.pop(0)
        pending += panel.get("panels", [])
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in sorted(known.items(), key=lambda each: -len(each[0])):
                expression = expression.replace(name, value)
            assert "$" not in expression, f"{panel['title']} uses a variable nobody knows: {expression}"
            found.append((panel["title"], expression))
        assert panel["type"] == "row" or panel.get("targets"), f"{panel['title']} asks nothing"
    return found


def scraping(pool: Cluster) -> dict[str, Any]:
    """The configuration that comes with the project, for these addresses."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "local.yml").read_text())
    config["global"]["scrape_interval"] = f"{SCRAPE_SECONDS}s"
    config["global"]["scrape_timeout"] = f"{SCRAPE_SECONDS}s"
    addresses = {
        "gateway": [pool.gateway.said["http"]],
        "controller": [pool.controller.said["metrics"]],
        "worker": [worker.said["metrics"] for worker in pool.workers.values()],
    }
    (job,) = config["scrape_configs"]
    assert {group["labels"]["process"] for group in job["static_configs"]} == set(addresses)
    for group in job["static_configs"]:
        group["targets"] = addresses[group["labels"]["process"]]
    return config


@contextmanager
def load(pool: Cluster) -> Iterator[None]:
    """Requests long and short, some refused, until the block is left."""
    over = threading.Event()

    async def one(http: httpx.AsyncClient, seed: int) -> None:
        while not over.is_set():
            prompt, want = truth((600, 60, 450, 20)[seed], 50, 24)
            answered = await client.ask(http, prompt, 24, stream=seed % 2 == 0)
            assert answered.tokens == want
            refused = await client.ask(http, tiny.prompt(1100), 8)
            assert refused.status == 400
            assert (await client.ask(http, prompt, -1)).status == 400

    async def all_of_them() -> None:
        async with client.client(pool.url) as http:
            await asyncio.gather(*(one(http, seed) for seed in range(4)))

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(all_of_them())
        except BaseException as failure:
            failures.append(failure)

    for seed in range(4):
        truth((600, 60, 450, 20)[seed], 50, 24)
    thread = threading.Thread(target=run, name="load")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures


@pytest.fixture
def server(prometheus: str, pool: Cluster, tmp_path: Path) -> Iterator[str]:
    """Where a Prometheus that scrapes the cluster answers."""
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump(scraping(pool)))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    log = tmp_path / "prometheus.log"
    flags = {"config.file": config, "storage.tsdb.path": tmp_path / "data", "web.listen-address": address}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [prometheus, *(f"--{name}={value}" for name, value in flags.items())], stdout=out, stderr=out
        )

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://{address}/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(ready, "prometheus is ready", 30)
        yield f"http://{address}/api/v1"
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def has_data(server: str, expression: str, began: float) -> bool:
    asked = {"query": expression, "start": began, "end": time.time(), "step": SCRAPE_SECONDS}
    reply = httpx.get(f"{server}/query_range", params=asked).json()
    assert reply["status"] == "success", (expression, reply)
    return any(math.isfinite(float(value)) for series in reply["data"]["result"] for _, value in series["values"])


def test_every_panel_has_data(server: str, pool: Cluster) -> None:
    wanted = panels()
    assert len({title for title, _ in wanted}) >= 10
    began = time.time()
    with load(pool):
        empty = set(wanted)

        def full() -> bool:
            empty.difference_update({each for each in empty if has_data(server, each[1], began)})
            return not empty

        try:
            until(full, "every panel has data", SECONDS)
        except AssertionError as late:
            raise AssertionError(f"{late}; empty: {sorted(empty)}") from None
    targets = httpx.get(f"{server}/targets").json()["data"]["activeTargets"]
    assert len(targets) == 5 and {target["health"] for target in targets} == {"up"}, targets
    asked = {"query": 'sum(infinillm_kv_blocks{state="lent"})', "start": began, "end": time.time(), "step": 1}
    (lent,) = httpx.get(f"{server}/query_range", params=asked).json()["data"]["result"]
    assert max(float(value) for _, value in lent["values"]) > 0, "it shows that blocks were lent"
