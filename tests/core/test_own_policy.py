"""A policy of somebody's own: their functions, another policy's for the rest, and what goes wrong said in a line."""

from __future__ import annotations

from typing import Any

import pytest

from infinillm.core.cost import Costs
from infinillm.core.policy import POLICIES, Policy
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.policy.own import FUNCTIONS, made
from infinillm.core.types import Refused
from infinillm.errors import BadRequest, Broken
from tests.core.test_policy import ledger, node

LEDGER = ledger(node("a"), node("b"))


def last(ledger: Any, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Any) -> Any:
    return max(ledger.nodes)


def asked(policy: Policy) -> dict[str, Any]:
    """What each function of a policy answers."""
    return {
        "route": policy.route(LEDGER, 10, 20, 16, ()),
        "reach": policy.reach(LEDGER, "a", 16),
        "capacity": policy.capacity(LEDGER, 16),
        "creditors": policy.creditors(LEDGER, "a", 3, (), False),
        "plan": policy.plan(LEDGER, Costs(own={}), 16),
    }


def test_what_is_written_is_asked_and_the_rest_is_its_bases() -> None:
    policy = made("mine", {"route": last, "BASE": "isolated", "SAVES": True})
    base = POLICIES["isolated"]
    assert asked(base)["route"] == "a"
    assert asked(policy) == asked(base) | {"route": "b"}
    assert (policy.name, policy.shares, policy.saves) == ("mine", base.shares, True)
    assert made("mine", {"route": last, "BASE": "pooled", "NAME": "ours"}).name == "ours"


@pytest.mark.parametrize("name", POLICIES)
def test_a_whole_policy_needs_no_base(name: str) -> None:
    known = POLICIES[name]
    functions = {each: getattr(known, each) for each in FUNCTIONS}
    policy = made("again", {**functions, "SHARES": known.shares, "SAVES": known.saves})
    assert asked(policy) == asked(known)
    assert (policy.shares, policy.saves) == (known.shares, known.saves)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "policy mine defines none of route, reach, capacity, creditors, plan"),
        ({"BASE": "pooled", "rout": last}, "defines none of"),
        ({"route": last}, "does not define reach, capacity, creditors, plan, SHARES, SAVES, nor whose to take"),
        ({"route": last, "BASE": "greedy"}, "BASE of policy mine must be one of isolated, pooled, proactive"),
        ({"route": last, "BASE": ["pooled"]}, "BASE of policy mine must be one of"),
        ({"route": 7, "BASE": "pooled"}, "route of policy mine must be a function, not 7"),
        ({"plan": last, "BASE": "pooled"}, r"plan of policy mine must take \(ledger, costs, block_size\)"),
    ],
)
def test_what_is_no_policy_says_why(values: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words) as error:
        made("mine", values)
    assert error.value.field == "policy"


def test_what_raises_is_told_with_its_line() -> None:
    def plan(ledger: Any, costs: Any, block_size: int) -> Any:
        return ledger.nodes["nobody"]

    policy = made("mine", {"plan": plan, "BASE": "pooled"})
    line = plan.__code__.co_firstlineno + 1
    with pytest.raises(
        Broken, match=rf"policy mine: plan raised KeyError: 'nobody' \(.*{__name__[-15:]}.py, line {line}\)"
    ):
        policy.plan(LEDGER, Costs(own={}), 16)


@pytest.mark.parametrize(
    ("label", "answers", "wrong"),
    [
        ("route", ["b", Refused("no")], [None, "nobody", 7, []]),
        ("reach", [16], [None, 1.5, "16"]),
        ("capacity", [0], [None, Refused("no")]),
        ("creditors", [[], [("b", 3)], Refused("no")], [None, ["b"], [("nobody", 3)], (("b", 3),), [("b",)]]),
        ("plan", [(), (MoveBlocks("a", "s", "a", "b", 1, "why"),)], [None, [], ("s",)]),
    ],
)
def test_what_cannot_be_an_answer_is_told(label: str, answers: list[Any], wrong: list[Any]) -> None:
    said: list[Any] = []
    policy = made("mine", {**{each: lambda *_: said[-1] for each in FUNCTIONS}, "BASE": "pooled"})
    for each in answers:
        said.append(each)
        assert asked_of(policy, label) == each
    for each in wrong:
        said.append(each)
        with pytest.raises(Broken, match=f"policy mine: {label} answered .*, which is not"):
            asked_of(policy, label)


def asked_of(policy: Policy, label: str) -> Any:
    given: dict[str, tuple[Any, ...]] = {
        "route": (10, 20, 16, ()),
        "reach": ("a", 16),
        "capacity": (16,),
        "creditors": ("a", 3, (), False),
        "plan": (Costs(own={}), 16),
    }
    return getattr(policy, label)(LEDGER, *given[label])
