"""What a worker tells of itself, and when it asks for the memory back that it lent: for who starved alone for long."""

import asyncio
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest

from infinillm import config
from infinillm.core.blocks import Blocks
from infinillm.core.pace import RECALL_AFTER_SECONDS
from infinillm.engine.messages import Load
from infinillm.errors import BadRequest
from infinillm.servers import worker
from infinillm.servers.worker import Worker
from infinillm.telemetry import Metrics
from tests import tiny


def test_only_a_request_that_starved_for_long_makes_others_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Worker(config.Worker())
    now = 100.0
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now))
    assert not made._starves("a")
    now += RECALL_AFTER_SECONDS - 1
    assert not made._starves("a")
    now += 1
    assert made._starves("a")
    assert not made._starves("b"), "another request has only begun to wait"
    assert not made._starves("a"), "and this one begins anew"


def test_what_a_worker_tells_of_itself() -> None:
    """In the ledger and in metrics: what is wanted back, what moves, what was lost, and no block twice."""
    made: Any = Worker(config.Worker(id="a"))
    blocks = Blocks("a", 8, 4, 8)
    blocks.grow("s", 0, 3)
    for at, name in enumerate((b"1", b"2", b"3")):
        blocks.seal("s", 4 * at, name)
    blocks.release("s")
    blocks.lend("b", 7, 99.0, "a>b")
    made.address, made.metrics = "127.0.0.1:1", Metrics("worker", node="a")
    made.memory = SimpleNamespace(blocks=blocks, lock=RLock())
    made.pool = SimpleNamespace(claims=SimpleNamespace(wanted=lambda loan: 2))
    made.lenders = SimpleNamespace(borrowed=0, room=dict, measure=lambda: None)
    made.engine = SimpleNamespace(load=Load(running=1, lost=64, repaired=48, missing=16, moving=5))
    node, (loan,) = made.report().node, made.report().lent
    assert (loan.blocks, loan.recalled) == (7, 2)
    assert (node.lost, node.repaired) == (64, 48)
    assert (node.lent, node.cached, node.free) == (7, 1, 1), "two of the kept blocks are promised"
    made._measure()
    exported = made.metrics.exposition().decode()
    for line in (
        'recalled_blocks{node="a",side="lender"} 2.0',
        'moving_blocks{node="a"} 5.0',
        'missing_tokens{node="a"} 16.0',
        'kv_blocks{node="a",state="cached"} 1.0',
        'kv_blocks{node="a",state="free"} 0.0',
    ):
        assert f"infinillm_{line}" in exported


@pytest.mark.parametrize(
    ("settings", "field", "complaint"),
    [
        ({"tier": "host"}, "tier", "host memory is a CPU's and serves no model"),
        ({"tier": "host", "memory_only": True, "device": "cuda"}, "tier", "not --device cuda"),
        ({"memory_only": True, "kv_memory_gib": 0.0}, "kv_memory_gib", "kv_memory_gib 0.0 holds no block"),
        ({"kv_memory_gib": 1e-9}, "kv_memory_gib", "kv_memory_gib 1e-09 holds no block"),
        ({"kv_memory_gib": 0.0}, "controller", "needs a controller, to borrow by"),
    ],
)
def test_memory_that_cannot_be_is_refused(settings: dict[str, Any], field: str, complaint: str) -> None:
    made = Worker(config.Worker(model=str(tiny.folder("llama")), **settings))
    with pytest.raises(BadRequest, match=complaint) as refused:
        asyncio.run(made.start())
    assert refused.value.field == field
