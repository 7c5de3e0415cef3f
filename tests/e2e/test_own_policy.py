"""A policy from a file on real workers: it decides, its slip fails a request and no process; a log tells of both."""

from __future__ import annotations

from pathlib import Path

from infinillm.sim.traffic import workload
from tests import tiny
from tests.e2e import client, processes
from tests.e2e.conftest import BLOCKS, FLAGS, MODEL, truth

# Everything to the worker whose name is last; of prompts of 33 tokens it knows nothing.
POLICY = """
BASE = "pooled"
def route(ledger, prompt_tokens, *more):
    return {33: None}.get(prompt_tokens, max(ledger.nodes))
def plan(ledger, costs, block_size):
    return [ledger]
"""


def test_a_policy_from_a_file_decides_where_real_workers_serve(tmp_path: Path) -> None:
    file, log = tmp_path / "last.py", tmp_path / "requests.jsonl"
    file.write_text(POLICY)
    flags = {
        **FLAGS,
        "controller": (*FLAGS["controller"], "--policy", str(file)),
        "gateway": ("--request-log", str(log)),
    }
    with processes.cluster(tmp_path, str(tiny.folder(MODEL)), blocks=BLOCKS, workers=2, flags=flags) as made:
        assert made.ledger().policy == "last"
        answered = []
        for seed in (1, 2):
            prompt, want = truth(40, 900 + seed, 8)
            got = client.complete(made.url, prompt, 8)
            assert (got.error, got.tokens) == (None, want)
            answered.append(made.placement(got.id)["node"])
        assert answered == ["worker-1", "worker-1"]
        refused = client.complete(made.url, tiny.prompt(33, 5), 8)
        assert refused.status == 500 and refused.error is not None
        assert "policy last: route answered None" in refused.error["message"]
        processes.until(
            lambda: [each for each in made.controller.events if each["event"] == "policy_failed"], "its plan fails", 10
        )
        made.settle()
    found = list(workload(str(log), rate=0, seed=0, count=None))
    assert [(each.prompt, each.output) for each in found] == [(40, 8), (40, 8)]
    assert 0 <= found[0].at < found[1].at
