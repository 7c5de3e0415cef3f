"""`infinillm simulate`: one row a policy, the same at every run, and what cannot be is said by name."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("policy", {"policy": "pooled,pooled"}),
        ("policy", {"policy": "greedy"}),
        ("trace", {"trace": "nosuch"}),
        ("cluster", {"cluster": "4 GPUs"}),
        ("model", {"model": "GPT-9"}),
        ("rate", {"rate": 0.0}),
    ],
)
def test_what_cannot_be_names_its_field(field: str, more: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as error:
        simulate.run(config.Simulate(**{**FEW, **more}))
    assert error.value.field == field
