"""Near what is there already, unless that is full or much busier."""

from __future__ import annotations

from typing import Any

import pytest

from infinillm.core.names import MARK_EVERY
from infinillm.core.policy.near import near
from infinillm.core.types import Ledger, Node

SIZE = 16
LONG = 10 * MARK_EVERY * SIZE  # tokens


def ledger(more: dict[str, dict[str, Any]]) -> Ledger:
    nodes = (Node(name, "1", "", 200, 150, **more.get(name, {})) for name in "abc")
    return Ledger(1, {node.id: node for node in nodes})


@pytest.mark.parametrize(
    ("chosen", "more", "exclude", "found"),
    [
        ("a", {}, (), "b"),
        ("a", {"b": {"running": 1}}, (), "b"),  # hardly busier
        ("a", {"b": {"running": 1, "waiting": 1}}, (), "c"),  # then who has the next most
        ("a", {"b": {"draining": True}}, (), "c"),
        ("a", {"b": {"serves": False}, "c": {"serves": False}}, (), "a"),
        ("a", {}, ("b", "c"), "a"),
        ("a", {"b": {"used": 177}}, (), "c"),  # 80 blocks less 56 it has are 24, and it has room for 23
        ("a", {"b": {"used": 176}}, (), "b"),
        ("c", {"b": {"draining": True}}, (), "c"),
    ],
)
def test_where_most_of_a_prompt_is(chosen: str, more: Any, exclude: Any, found: str) -> None:
    holders = [("gone", 9), ("b", 7), ("c", 3)]
    assert near(ledger(more), chosen, holders, LONG, SIZE, exclude) == found
    assert near(ledger(more), chosen, [], LONG, SIZE, exclude) == chosen
