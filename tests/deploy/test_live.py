"""A real Prometheus over a real cluster under load: every panel of the dashboard shows data."""

import json
import math
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import dashboards
from tests import live, tiny

BLOCKS, BLOCK = 24, 16
SCRAPE, RATE = "500ms", "5s"
PATIENCE = 90.0  # seconds until every panel must have shown something
LONG = "The model asks, the pool remembers, the ledger decides. " * 12  # more tokens than one worker holds


@pytest.fixture(scope="module")
def cluster() -> Iterator[live.Served]:
    flags = (f"--kv-blocks={BLOCKS}", f"--block-size={BLOCK}", "--served-model-name=tiny", "--workers=3")
    with live.serve(str(tiny.folder("llama")), *flags) as served:
        yield served


def targets(served: live.Served) -> dict[str, list[str]]:
    ready = served.ready
    return {
        "gateway": [ready["http"]],
        "controller": [ready["controller"]["metrics"]],
        "worker": [worker["metrics"] for worker in ready["workers"]],
    }


def get(url: str, **query: str) -> Any:
    whole = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    with urllib.request.urlopen(whole, timeout=10) as answer:
        return answer.read()


def ask(served: live.Served, number: int) -> int:
    """One request of the load; the status it got. Some are long enough to borrow, some too long for the whole pool."""
    text = f"{number} " + LONG * (20 if number % 7 == 6 else 1 + number % 2)
    body = json.dumps(
        {"model": "tiny", "prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    ).encode()
    request = urllib.request.Request(f"{served.url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def source(cluster: live.Served, prometheus: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the cluster; its URL."""
    folder = tmp_path_factory.mktemp("prometheus")
    static = [{"targets": found, "labels": {"process": process}} for process, found in targets(cluster).items()]
    scrape = {"job_name": "local", "static_configs": static}
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump({"global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE}, "scrape_configs": [scrape]})
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(30)


def values(source: str, expression: str) -> list[float]:
    """What a panel's query finds now: finite numbers only."""
    query = expression.replace("$__rate_interval", RATE)
    answer = json.loads(get(f"{source}/api/v1/query", query=query))
    assert answer["status"] == "success", answer
    found = [float(series["value"][1]) for series in answer["data"]["result"]]
    return [value for value in found if math.isfinite(value)]


def empty(source: str, waiting: list[tuple[str, str]]) -> list[tuple[str, str]]:
    try:
        return [(title, expression) for title, expression in waiting if not values(source, expression)]
    except (urllib.error.URLError, ConnectionError):  # not up yet
        return waiting


def test_every_panel_has_data_under_load(cluster: live.Served, source: str) -> None:
    waiting = [(panel.title, expression) for panel in dashboards.panels() for expression, _ in panel.queries]
    deadline = time.monotonic() + PATIENCE
    statuses: set[int] = set()
    number = 0
    with ThreadPoolExecutor(4) as clients:
        while waiting and time.monotonic() < deadline:
            statuses |= set(clients.map(lambda each: ask(cluster, each), range(number, number + 8)))
            number += 8
            waiting = empty(source, waiting)
    assert not waiting, "no data: " + "; ".join(f"{title}: {expression}" for title, expression in waiting)
    assert statuses == {200, 400}


def test_a_misspelt_panel_would_have_been_seen(cluster: live.Served, source: str) -> None:
    assert empty(source, [("wrong", "rate(infinillm_step_total[$__rate_interval])")])


def test_books_balance_in_what_is_exported(cluster: live.Served, source: str) -> None:
    """Scrapes are of one moment per node, so what a node owns is exactly what it says it has."""
    (drift,) = [panel for panel in dashboards.panels() if panel.title == "Blocks unaccounted for"]
    assert set(values(source, drift.queries[0][0])) == {0.0}
    (least,) = values(source, "min(min_over_time(infinillm_kv_blocks[10m]))")
    assert least == 0, "a block that is promised and holds a kept prefix was counted twice"


@pytest.mark.parametrize("process", ["gateway", "controller", "worker"])
def test_promtool_finds_no_fault_with_what_is_really_exported(
    cluster: live.Served, promtool: str, process: str, tmp_path: Path
) -> None:
    for target in targets(cluster)[process]:
        text = get(f"http://{target}/metrics")
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
        )
        assert (checked.returncode, checked.stderr.decode()) == (0, "")
