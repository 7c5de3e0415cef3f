"""What is told of two looks at the pool: what became different between them, and nothing else."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm.console.changes import changes, short
from infinillm.core.ledger import Event, Joined, Left, Lent, Placed, Released, Report, Reported, Returned, apply_all
from infinillm.core.policy import named
from infinillm.core.types import Ledger, Loan, Node, Span
from infinillm.protos import controller_pb2 as pb
from infinillm.servers.controller import Controller
from infinillm.servers.openai_bodies import plain
from infinillm.telemetry import Metrics

A, B, C = (Node(name, "1", f"{name}:1", 100, 90) for name in "abc")
LOAN = Loan("b>a", "b", "a", 8, 10.0, used=4)
ALL = apply_all(Ledger(7), [*(Joined(Report(node)) for node in (A, B, C)), Lent(LOAN)])
SPREAD = Placed("a", "s-0", (Span("a", 0, 64), Span("b", 64, 128)))


def seen(ledger: Ledger) -> dict[str, Any]:
    """The ledger as GET /v1/pool answers it."""
    controller = Controller(
        named("pooled"),
        epoch=ledger.epoch,
        heartbeat_seconds=1,
        metrics=Metrics("controller"),
        clock=lambda: 0.0,
        cost=None,
    )
    controller.ledger = ledger
    return plain(asyncio.run(controller.Snapshot(pb.SnapshotRequest(), None)))


def told(*events: Event, first: tuple[Event, ...] = ()) -> list[str]:
    before = apply_all(ALL, first)
    return changes(seen(before), seen(apply_all(before, events)))


@pytest.mark.parametrize(
    ("events", "lines"),
    [
        ((), []),
        ((Joined(Report(Node("d", "1", "d:1", 1000, 900))),), ["d joined with 1,000 blocks"]),
        ((Left("c", "silent"),), ["c left"]),
        ((Joined(Report(replace(C, incarnation="2"))),), ["c started again"]),
        ((Reported(replace(C, draining=True)),), ["c drains"]),
        ((Reported(replace(C, used=5, running=1)),), []),
        ((Lent(replace(LOAN, blocks=20)),), ["b lent a 12 blocks, 20 in all"]),
        ((Lent(Loan("c>a", "c", "a", 3, 10.0)),), ["c lent a 3 blocks, 3 in all"]),
        ((Lent(replace(LOAN, blocks=6)),), ["a gave b 2 blocks back, 6 left"]),
        ((Lent(replace(LOAN, until=99.0, used=5)),), []),
        ((Returned("b", "b>a"),), ["a gave b 8 blocks back"]),
        ((Lent(replace(LOAN, recalled=3)),), ["b wants 3 blocks back from a"]),
        ((Left("b", "silent"),), ["b left"]),
        ((Reported(replace(A, lost=64)),), ["a lost 64 tokens of its requests with another node"]),
        ((Reported(replace(A, lost=64, repaired=64)),), [
            "a lost 64 tokens of its requests with another node",
            "a computed 64 lost tokens again",
        ]),
    ],
)  # fmt: skip
def test_what_happened_to_nodes_and_loans(events: tuple[Event, ...], lines: list[str]) -> None:
    assert told(*events) == lines


def test_what_moved() -> None:
    away = Placed("a", "s-0", (Span("a", 0, 32), Span("c", 32, 64), Span("b", 64, 128)))
    assert told(away, first=(SPREAD,)) == ["moved 32 tokens of s-0 from a to c"]
    assert told(SPREAD, first=(away,)) == ["moved 32 tokens of s-0 from c to a"]
    grown = Placed("a", "s-0", (Span("a", 0, 64), Span("b", 64, 128), Span("c", 128, 140)))
    assert told(grown, first=(SPREAD,)) == []
    assert told(SPREAD) == [], "a request that came"
    assert told(Released("a", "s-0"), first=(SPREAD,)) == [], "and one that went"


def test_what_was_lost_did_not_move() -> None:
    again = Placed("a", "s-0", (Span("a", 0, 64), Span("c", 64, 128)))
    lost = Reported(replace(A, lost=64))
    assert told(lost, again, first=(SPREAD,)) == [
        "a lost 64 tokens of its requests with another node",
        "64 tokens of s-0 were lost with b; c has their place",
    ]


def test_the_ledger_of_another_controller_is_not_compared() -> None:
    before, now = seen(ALL), seen(Ledger(8))
    assert changes(before, now) == ["another controller leads, epoch 8"]


@given(st.text(max_size=60))
def test_a_name_fits_its_column(name: str) -> None:
    assert len(short(name)) <= 16
    assert short(name)[-4:] == name[-4:], "the choice is at the end"
