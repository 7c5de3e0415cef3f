"""`infinillm simulate`: one row a policy, the same at every run, and what cannot be is said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infinillm import config
from infinillm.console import simulate
from infinillm.errors import BadRequest

FEW: dict[str, Any] = {"requests": 60, "rate": 30.0, "trace": "sharegpt", "cluster": "1x4xA100"}


def told(capsys: pytest.CaptureFixture[str], **more: Any) -> list[dict[str, Any]]:
    simulate.run(config.Simulate(**{**FEW, **more, "json": True}))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_policy_is_told_of_and_all_is_served(capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys)
    assert [row["policy"] for row in rows] == ["isolated", "pooled", "proactive"]
    assert {(row["served"], row["refused"]) for row in rows} == {(60, 0)}
    for row in rows:
        assert 0 < row["first token"]["p50"] <= row["first token"]["p99"] < row["latency"]["p99"] < row["seconds"]
        assert row["request-steps"] >= row["steps"] > 0


def test_equal_seeds_tell_the_same_and_others_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    def figures(seed: int) -> list[dict[str, Any]]:
        return [row | {"simulated in": 0} for row in told(capsys, seed=seed)]

    assert figures(1) == figures(1) != figures(2)


def test_what_no_worker_holds_is_refused_where_nothing_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    alone, pooled = told(capsys, trace="t3", rate=1.0, policy="isolated,pooled")
    assert alone["refused"] > pooled["refused"] == 0
    assert pooled["served"] == 60


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.run(config.Simulate(**FEW, policy="pooled"))
    out = capsys.readouterr().out
    assert out.startswith("60 requests of sharegpt at 30 a second, Llama-2-7B on 1x4xA100: 4 workers, K/V of ")
    assert "policy" in out and "pooled" in out


def test_seconds_bound_what_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = told(capsys, policy="pooled", seconds=1.0, requests=100000)
    assert row["seconds"] <= 1.0 and 0 < row["served"] < 100


# --- objectives ------------------------------------------------------------------------------------------------------


def test_an_objective_is_told_of_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    (plain,), (judged,) = told(capsys, policy="pooled"), told(capsys, policy="pooled", slo="latency=5")
    took = {"simulated in": 0}
    assert judged | took == plain | took | {"kept": judged["kept"]}
    assert 0 < judged["kept"] < 1
    simulate.run(config.Simulate(**FEW, policy="pooled", slo="latency=5"))
    assert f"{100 * judged['kept']:.4g} %" in capsys.readouterr().out


def test_the_rate_that_is_found_keeps_the_objective_and_a_little_more_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted: dict[str, Any] = {"policy": "pooled", "slo": "ttft=0.2,tpot=0.05", "requests": 150, "cluster": "1x2xA100"}
    (found,) = told(capsys, **wanted, find_capacity=True)
    assert found["kept"] >= 0.9 and found["served"] == 150 and not found["more"]
    best = max(rate for rate, _, good in found["tried"] if good)
    least = min(rate for rate, _, good in found["tried"] if not good and rate > best)
    assert found["rate"] == best < least <= 1.03 * best
    (again,) = told(capsys, **wanted, rate=best)
    assert (again["kept"], again["latency"]) == (found["kept"], found["latency"])
    (over,) = told(capsys, **wanted, rate=1.5 * best)
    assert over["kept"] < 0.9


def test_what_is_kept_at_no_rate_or_at_all_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    (never,) = told(capsys, policy="pooled", find_capacity=True, slo="latency=0.0001")
    assert (never["rate"], never["more"]) == (0.0, False) and not any(good for *_, good in never["tried"])
    (always,) = told(capsys, policy="pooled", find_capacity=True, slo="latency=100000")
    assert always["more"] and always["rate"] == max(rate for rate, *_ in always["tried"]) > 1000 * FEW["rate"]
    simulate.run(config.Simulate(**FEW, policy="isolated,pooled", find_capacity=True, slo="latency=0.0001"))
    out = capsys.readouterr().out
    assert "at the highest rate that keeps latency=0.0001 for 0.9 of them" in out
    assert "pooled keeps it at no rate" in out


def test_a_search_waits_for_nobody_who_is_never_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything goes to one worker, also what it cannot hold: that waits there for ever."""
    monkeypatch.setattr(simulate, "LATER", 20.0)
    monkeypatch.setattr(simulate, "LATE", 1)
    file = tmp_path / "heedless.py"
    file.write_text(
        "BASE = 'isolated'\ndef route(ledger, *more):\n    return min(ledger.nodes)\n"
        "def capacity(ledger, block_size):\n    return 10**9\n"
    )
    trace = tmp_path / "long.jsonl"
    lengths = [300] * 15 + [500_000] + [300] * 4
    trace.write_text("".join(json.dumps({"at": k, "prompt": n, "output": 5}) + "\n" for k, n in enumerate(lengths)))
    few: dict[str, Any] = {"policy": str(file), "trace": str(trace), "cluster": "1x1xA100", "rate": 1000.0}
    (found,) = told(capsys, **few, slo="latency=100000", find_capacity=True)
    assert found["rate"] == 0.0 and {share for _, share, _ in found["tried"]} == {1.0}, "of those that were answered"


def test_a_file_is_judged_at_its_own_times_and_scaled_for_a_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"at": 2.0 * k, "prompt": 300, "output": 9}) + "\n" for k in range(40)))
    (slow,) = told(capsys, policy="pooled", trace=str(file), rate=0.0, slo="ttft=0.1")
    assert (slow["served"], slow["kept"]) == (40, 1.0)
    (found,) = told(capsys, policy="pooled", trace=str(file), slo="ttft=0.1", find_capacity=True)
    assert found["rate"] > 1 and found["served"] == 40


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["pooled", "elastic"])
def test_who_is_gone_for_a_while_is_missed_and_everything_is_answered(
    policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"policy": policy, "cluster": "1x2xA100", "requests": 120}
    (whole,) = told(capsys, **few)
    (while_gone,) = told(capsys, **few, losses="n0@1-3")
    (for_good,) = told(capsys, **few, losses="n0@1")
    assert whole["served"] == while_gone["served"] == for_good["served"] == 120
    assert whole["latency"]["mean"] < while_gone["latency"]["mean"] < for_good["latency"]["mean"]


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("policy", {"policy": "pooled,pooled"}),
        ("policy", {"policy": "greedy"}),
        ("trace", {"trace": "nosuch"}),
        ("cluster", {"cluster": "4 GPUs"}),
        ("model", {"model": "GPT-9"}),
        ("rate", {"rate": 0.0}),
        ("slo", {"find_capacity": True}),
        ("slo", {"slo": "speed=1"}),
        ("rate", {"find_capacity": True, "slo": "ttft=1", "rate": 0.0}),
        ("seconds", {"find_capacity": True, "slo": "ttft=1", "seconds": 5.0}),
        ("losses", {"losses": "n0 dies"}),
        ("node", {"losses": "n9@1"}),
        ("node", {"losses": "n9@1", "policy": "elastic"}),
        ("report", {"report": "/nowhere/report.html"}),
    ],
)
def test_what_cannot_be_names_its_field(field: str, more: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as error:
        simulate.run(config.Simulate(**{**FEW, **more}))
    assert error.value.field == field
