"""What happened between two looks at the pool, in words: `changes(before, now) -> lines`, a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Pool = Mapping[str, Any]  # what GET /v1/pool answers
Span = Mapping[str, Any]
ID_WIDTH = 16  # of a request's name, where there is little room


def short(name: str) -> str:
    """A name that fits a narrow column: its beginning and its end, where the choice is."""
    return name if len(name) <= ID_WIDTH else f"{name[: ID_WIDTH - 5]}…{name[-4:]}"


def named(things: Iterable[Mapping[str, Any]], key: str = "id") -> dict[str, Mapping[str, Any]]:
    return {str(each[key]): each for each in things}


def changes(before: Pool, now: Pool) -> list[str]:
    """Who joined and left, lent and gave back, wanted memory back; what moved, was lost, and was computed again."""
    if before["epoch"] != now["epoch"]:  # its ledger begins empty, so the two cannot be compared
        return [f"another controller leads, epoch {now['epoch']}"]
    return [*_members(before, now), *_loans(before, now), *_holes(before, now), *_places(before, now)]


def _members(before: Pool, now: Pool) -> Iterator[str]:
    old, new = named(before["nodes"]), named(now["nodes"])
    yield from (f"{name} left" for name in old if name not in new)
    for name, node in new.items():
        if name not in old:
            yield f"{name} joined with {int(node['blocks']):,} blocks"
        elif node["incarnation"] != old[name]["incarnation"]:
            yield f"{name} started again"
        elif node["draining"] and not old[name]["draining"]:
            yield f"{name} drains"


def _loans(before: Pool, now: Pool) -> Iterator[str]:
    members = named(now["nodes"])
    old, new = _pairs(before), _pairs(now)
    for lender, borrower in dict.fromkeys([*old, *new]):
        was, wanted = old.get((lender, borrower), (0, 0))
        blocks, wants = new.get((lender, borrower), (0, 0))
        if blocks > was:
            yield f"{lender} lent {borrower} {blocks - was:,} blocks, {blocks:,} in all"
        if wants > wanted:
            yield f"{lender} wants {wants:,} blocks back from {borrower}"
        if blocks < was and {lender, borrower} <= members.keys():
            yield f"{borrower} gave {lender} {was - blocks:,} blocks back" + (f", {blocks:,} left" if blocks else "")


def _pairs(pool: Pool) -> dict[tuple[str, str], tuple[int, int]]:
    """Blocks lent, and blocks wanted back, by (lender, borrower)."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for loan in pool["loans"]:
        pair = (str(loan["lender"]), str(loan["borrower"]))
        blocks, wanted = found.get(pair, (0, 0))
        found[pair] = (blocks + int(loan["blocks"]), wanted + int(loan.get("recalled") or 0))
    return found


def _holes(before: Pool, now: Pool) -> Iterator[str]:
    for name in named(now["nodes"]):
        if lost := grown(before, now, name, "lost"):
            yield f"{name} lost {lost:,} tokens of its requests with another node"
        if repaired := grown(before, now, name, "repaired"):
            yield f"{name} computed {repaired:,} lost tokens again"


def grown(before: Pool, now: Pool, node: str, count: str) -> int:
    """By how much a count of a node that goes on has grown."""
    old, new = named(before["nodes"]).get(node), named(now["nodes"]).get(node)
    if old is None or new is None or old["incarnation"] != new["incarnation"]:
        return 0
    return max(int(new.get(count) or 0) - int(old.get(count) or 0), 0)


def _places(before: Pool, now: Pool) -> Iterator[str]:
    """What lies elsewhere than before. Where its home has lost tokens, it did not move: it is computed again there."""
    old = named(before["layouts"], "sequence")
    for sequence, layout in named(now["layouts"], "sequence").items():
        if sequence not in old:
            continue
        lost = grown(before, now, str(layout.get("home") or ""), "lost")
        for (source, target), tokens in _elsewhere(old[sequence]["spans"], layout["spans"]).items():
            if lost:
                yield f"{tokens:,} tokens of {short(sequence)} were lost with {source}; {target} has their place"
            else:
                yield f"moved {tokens:,} tokens of {short(sequence)} from {source} to {target}"


def _elsewhere(before: Sequence[Span], now: Sequence[Span]) -> Counter[tuple[str, str]]:
    """Tokens that have a place in both layouts, and not the same, by (from, to)."""
    found: Counter[tuple[str, str]] = Counter()
    for was in before:
        for span in now:
            both = min(int(was["stop"]), int(span["stop"])) - max(int(was["start"]), int(span["start"]))
            if both > 0 and was["node"] != span["node"]:
                found[str(was["node"]), str(span["node"])] += both
    return found
