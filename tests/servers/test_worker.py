"""When a worker asks for the memory back that it lent: for a request that starved alone for long, not at once."""

from types import SimpleNamespace

import pytest

from infinillm import config
from infinillm.servers import worker
from infinillm.servers.worker import RECALL_AFTER_SECONDS, Worker


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
