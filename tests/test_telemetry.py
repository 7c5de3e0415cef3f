"""Metrics and logs: one table, nothing outside it, and what Prometheus's own linter says of it."""

import io
import json
import logging
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infinillm import telemetry
from infinillm.errors import BadRequest
from infinillm.telemetry import EVENTS, PREFIX, TABLE, Metrics, log, start_log


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def every_metric() -> Metrics:
    """A process that has used every row of the table."""
    metrics = Metrics("worker", "worker-0")
    for metric in TABLE.values():
        verb = {"counter": metrics.add, "gauge": metrics.set, "histogram": metrics.observe}[metric.kind]
        verb(metric.name, 1.5, **{label: (known or ("x",))[0] for label, known in metric.labels.items()})
    return metrics


def test_values_arrive_with_their_labels() -> None:
    metrics = Metrics("worker", "a")
    metrics.add("loan_operations_total", operation="lend")
    metrics.add("loan_operations_total", 2, operation="lend")
    metrics.set("loans", 3, side="borrower")
    metrics.observe("port_wait_seconds", 15e-6, peer="b")
    found = samples(metrics)
    assert found["infinillm_loan_operations_total", frozenset({("node", "a"), ("operation", "lend")})] == 3
    assert found["infinillm_loans", frozenset({("node", "a"), ("side", "borrower")})] == 3
    bucket = frozenset({("node", "a"), ("peer", "b"), ("le", "2e-05")})
    assert found["infinillm_port_wait_seconds_bucket", bucket] == 1
    assert found["infinillm_port_wait_seconds_bucket", bucket - {("le", "2e-05")} | {("le", "1e-05")}] == 0


def test_what_a_process_exports_is_there_before_it_happens() -> None:
    found = samples(Metrics("worker", "a"))
    for state in ("free", "used", "cached", "lent", "borrowed"):
        assert found["infinillm_kv_blocks", frozenset({("node", "a"), ("state", state)})] == 0
    assert ("infinillm_steps_total", frozenset({("node", "a")})) in found
    assert not any(name.startswith("infinillm_controller") for name, _ in found)
    assert not any(name.endswith("_created") for name, _ in found)
    assert any(name == "infinillm_controller_epoch" for name, _ in samples(Metrics("controller")))


def test_a_series_can_be_forgotten() -> None:
    metrics = Metrics("controller")
    metrics.set("heartbeat_age_seconds", 1, node="a")
    metrics.remove("heartbeat_age_seconds", node="a")
    metrics.remove("heartbeat_age_seconds", node="never seen")
    assert not any(name == "infinillm_heartbeat_age_seconds" for name, _ in samples(metrics))
    metrics.set("heartbeat_age_seconds", 2, node="a")
    assert samples(metrics)["infinillm_heartbeat_age_seconds", frozenset({("node", "a")})] == 2


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("no_such_total", {}),
        ("infinillm_steps_total", {}),
        ("loan_operations_total", {}),
        ("loan_operations_total", {"operation": "steal"}),
        ("steps_total", {"colour": "red"}),
    ],
)
def test_what_the_table_does_not_have_is_a_key_error(name: str, labels: dict[str, str]) -> None:
    with pytest.raises(KeyError):
        Metrics("worker", "a").add(name, **labels)


def test_two_processes_share_nothing() -> None:
    first, second = Metrics("worker", "a"), Metrics("worker", "b")
    first.add("steps_total")
    assert ("infinillm_steps_total", frozenset({("node", "a")})) not in samples(second)


def test_metrics_are_served_and_the_port_is_told() -> None:
    metrics = Metrics("controller")
    port = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"infinillm_build_info{" in answer.read()
        with pytest.raises(BadRequest, match=f"cannot serve /metrics on 127.0.0.1:{port}"):
            Metrics("controller").serve("127.0.0.1", port)
    finally:
        metrics.close()
    assert Metrics("controller").serve("127.0.0.1", -1) == -1


def test_serving_ends_at_once() -> None:
    metrics = Metrics("controller")
    metrics.serve("127.0.0.1", 0)
    began = time.monotonic()
    metrics.close()
    assert time.monotonic() - began < 0.3, "the library's own thread looks only twice a second"


def test_promtool_finds_no_fault(promtool: str) -> None:
    text = every_metric().exposition()
    assert all(f"# TYPE {PREFIX}{name.removesuffix('_total')}" in text.decode() for name in TABLE)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr.decode()) == (0, "")
    bad = subprocess.run(
        [promtool, "check", "metrics"],
        input=b"# TYPE x_total gauge\nx_total 1\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert bad.returncode, "promtool finds fault with nothing"


def test_labels_are_bounded() -> None:
    for metric in TABLE.values():
        assert set(metric.labels) <= {
            "node", "state", "side", "operation", "place", "peer", "direction", "kind", "outcome", "reason", "route",
            "status", "version", "process",
        }  # fmt: skip


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What a process logs; the test runner's own logging is put back."""
    root, ours = logging.getLogger(), logging.getLogger("infinillm")
    kept = root.handlers[:], root.level, ours.level
    said = io.StringIO()
    start_log("worker-0", "info", said)
    yield said
    root.handlers[:], root.level = kept[0], kept[1]
    ours.setLevel(kept[2])


def test_events_are_one_json_object_a_line(logged: io.StringIO) -> None:
    log("lent", loan="l-1", borrower="b", blocks=7, reason="naïve\nline")
    line = json.loads(logged.getvalue())
    assert logged.getvalue().count("\n") == 1
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info", "process": "worker-0", "event": "lent", "loan": "l-1", "borrower": "b", "blocks": 7,
        "reason": "naïve\nline",
    }  # fmt: skip


def test_levels_hold_and_libraries_are_heard(logged: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(telemetry.EVENTS, "whispered", ("debug", "nobody hears it"))
    log("whispered")
    logging.getLogger("some.library").info("chatter")
    assert not logged.getvalue()
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("some.library").exception("it broke")
    line = json.loads(logged.getvalue())
    assert (line["event"], line["source"], line["message"], line["level"]) == (
        "library",
        "some.library",
        "it broke",
        "error",
    )
    assert "ValueError: no" in line["traceback"]


def test_every_event_says_its_level_and_meaning() -> None:
    for event, (level, meaning) in EVENTS.items():
        assert level in {"debug", "info", "warning", "error"}, event
        assert meaning, event
