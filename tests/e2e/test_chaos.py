"""A short seed of chaos: whatever happens, answers are right or fail with a reason, and nothing stays behind."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

from tests.e2e import audit, chaos
from tests.e2e.chaos import Case, Result
from tests.e2e.client import Ending
from tests.e2e.faults import KINDS, SHORTEST, Fault, schedule

SEED, REQUESTS, MINUTES = 2262, 40, 0.25  # whose first quarter of a minute has a bit of everything
FEW = 0.1  # of all requests may fail, each with a reason


def test_a_schedule_is_a_function_of_its_seed_and_draws_everything() -> None:
    first = list(islice(schedule(SEED, 4), 200))
    assert first == list(islice(schedule(SEED, 4), 200)) != list(islice(schedule(SEED + 1, 4), 200))
    assert {fault.kind for fault in first} == set(KINDS) and {fault.who for fault in first} == set(range(4))
    assert all(a.at < b.at and a.lasts >= SHORTEST for a, b in pairwise(first))


def test_the_audit_sees() -> None:
    """Wrong tokens, an answer that breaks off in silence, and one that should have been refused."""
    fine = Case("stream", [1, 2], Ending("", [1, 2], "length"), 0.1)
    broken = Ending("", [1], status=503, error={"message": "worker-1 is gone"})
    cases = {
        "exact": fine,
        "failed": fine._replace(ending=broken),
        "left": fine._replace(kind="left", ending=Ending("", [1])),
        "refused": fine._replace(kind="too long", ending=Ending("", [], status=400, error={"message": "too long"})),
    }
    assert {name: case.verdict for name, case in cases.items()} == {name: name for name in cases}
    assert Result(SEED, "pooled", cases=list(cases.values())).trouble() == ""
    wrong = [
        fine._replace(ending=Ending("", [1, 3], "length")),
        fine._replace(ending=Ending("", [1], "length")),
        fine._replace(ending=Ending("", [2], status=503, error={"message": "worker-1 is gone"})),
        fine._replace(ending=Ending("", [1], status=0, error={"message": ""})),
        fine._replace(kind="left", ending=Ending("", [2])),
        fine._replace(kind="too long", ending=Ending("", [1, 2], "length")),
    ]
    assert {case.verdict for case in wrong} == {"wrong"}
    told = Result(SEED, "pooled", cases=wrong, faults=[Fault(1.0, "kill", 2, 0.5)]).trouble()
    assert f"seed {SEED}" in told and "kill" in told


def test_the_audit_hears(tmp_path: Path) -> None:
    """What no process may log, two leaders of one epoch, an older epoch believed, and moves that were ordered."""
    order: dict[str, object] = {
        "event": "ordered",
        "request": "r",
        "source": "a",
        "target": "b",
        "reason": "room for 1 waiting request",
    }
    logs: dict[str, list[dict[str, object]]] = {
        "controller-one": [{"event": "leads", "epoch": 5}, order, {**order, "target": "c", "reason": "a circle"}],
        "controller-two": [{"event": "leads", "epoch": 6}],
        "worker-0": [{"event": "member", "epoch": epoch} for epoch in (5, 6, 6)],
        "worker-1": [{"event": "moved", "request": "r", "source": "a", "target": target} for target in "bbcd"],
    }

    def heard() -> audit.Heard:
        for name, lines in logs.items():
            (tmp_path / f"{name}.log").write_text("\n".join(map(json.dumps, lines)) + '\n{"event": "half')
        return audit.heard(tmp_path)

    events, defects = heard()
    assert not defects
    assert (events["leads"], events["moved"], events["ordered"]) == (2, 4, 2)
    assert (events[audit.ROOM_ORDERED], events[audit.MOVED]) == (1, 3)
    logs["controller-two"] += [{"event": "leads", "epoch": 5}]
    logs["worker-0"] += [
        {"event": "member", "epoch": 5},
        {"event": "pass_failed"},
        {"event": "library", "traceback": ""},
    ]
    assert [each.partition(": ")[0] for each in heard().defects] == ["epoch 5", *["worker-0"] * 3]


def test_a_short_seed(tmp_path: Path) -> None:
    result = chaos.run(tmp_path, SEED, REQUESTS, MINUTES, "proactive", print)
    assert not result.trouble(), result.trouble()
    assert len(result.cases) >= REQUESTS and result.verdicts["exact"] >= REQUESTS // 2
    assert len(result.failed) <= FEW * len(result.cases), Counter(case.reason for case in result.failed)
    assert {fault.kind for fault in result.faults} >= {"kill", "cut", "kill controller"}
    assert result.events["request_resubmitted"]
    assert result.events["leads"] >= 2  # the first leader is among those killed
