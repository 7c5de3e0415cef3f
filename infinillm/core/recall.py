"""Lent blocks that are wanted back, and how they leave a borrower: pure functions. When they are: see `claims`.

Theory of operation. The borrower puts nothing new where blocks are wanted back, and what lies there comes home as far
as there is room. Where there is none, blocks of home go to other lenders, so that there is; the room at both ends is
kept for that. Where no lender has any either, the blocks are homeless, and others are asked for room. Many a sequence
ends within a grace; after that, where nobody lends, the youngest that lies there gives way, and blocks that wait for
tokens to come are let go of (at once, where home has room for these tokens). The block being written to moves once it
is full.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from infinillm.core.cost import Cost
from infinillm.core.moves import Wish, ahead, pick
from infinillm.core.pace import LEFT_ALONE_TIMES, RECALL_AFTER_SECONDS
from infinillm.core.request import Sequence
from infinillm.core.types import Layout, Move, NodeId, SeqId, Stretch

RECALLED, ROOM = "recalled", "room for what is recalled"
MOST_DOUBLED = 6


class Terms(NamedTuple):
    """How to borrow: to `save` up, of each so many as it has; nothing of it is wanted back for `hold` seconds."""

    save: bool
    hold: float


AT_ONCE = Terms(save=False, hold=0.0)


def undisturbed(tokens: int, preemptions: int, cost: Cost | None) -> float:
    """Seconds for which nothing is wanted back of what is lent for a request of so many tokens that gave way so often.

    `cost`: of computing them, where that is known.
    """
    again = LEFT_ALONE_TIMES * cost.computing(tokens) if cost is not None else 0.0
    if not preemptions and again <= RECALL_AFTER_SECONDS:
        return 0.0
    return max(again, RECALL_AFTER_SECONDS) * 2.0 ** min(preemptions, MOST_DOUBLED)


@dataclass(frozen=True, slots=True)
class Repayment:
    """What a borrower does for lenders that want blocks back.

    empty      blocks without content that are let go of now, as moves home; `layouts` are those of their sequences then
    wishes     what is to move beside the next steps
    give_way   sequences that are thrown out
    homeless   blocks that have nowhere to go
    """

    empty: tuple[Move, ...] = ()
    layouts: Mapping[SeqId, Layout] = field(default_factory=dict)
    wishes: tuple[Wish, ...] = ()
    give_way: tuple[SeqId, ...] = ()
    homeless: int = 0


def repay(
    running: Seq[Sequence],
    debts: Mapping[NodeId, int],
    late: Collection[NodeId],
    wishes: Seq[Wish],
    room: Mapping[NodeId, int],
    most: int,
    refused: bool,
    block_size: int,
) -> Repayment:
    """Decide before a step what goes back.

    running   oldest first
    debts     blocks that must come free on each lender that wants some back; those in `late` have waited for a grace
    wishes    what is to move already
    room      blocks that may be taken on each node, home first; on one that wants blocks back there are none
    most      blocks that may move beside one step
    refused   whether nobody lent any room for what is homeless
    """
    left, home = dict(room), next(iter(room))
    youngest = [*reversed(running)]
    empty: list[Move] = []
    layouts: dict[SeqId, Layout] = {}
    new: list[Wish] = []
    give_way: list[SeqId] = []
    homeless = 0

    def send(found: Iterable[Stretch], source: NodeId, target: NodeId, blocks: int, reason: str) -> None:
        for seq, first, count in found:
            if (count := min(count, blocks)) > 0:
                new.append(Wish(Move(seq, source, target, first, count), reason))
                blocks -= count

    for node, owed in debts.items():
        there = [i for i, s in enumerate(youngest) if any(span.node == node for span in s.layout)]
        for i in there:
            s = youngest[i]
            layout, reserved = ahead(s, node, block_size)
            blocks = sum(each.blocks for each in reserved)
            if not blocks or (node not in late and blocks > left[home]):
                continue
            youngest[i] = replace(s, layout=layout)
            layouts[s.id] = layout
            empty += [Move(s.id, node, home, each.first, each.blocks) for each in reserved]
            left[node] += max(0, blocks - owed)
            owed = max(0, owed - blocks)
        found = [each for i in there for each in pick(youngest[i], node, owed, block_size)]
        owed = min(owed, sum(each.blocks for each in found))
        if not owed or any(wish.move.source == node for wish in (*wishes, *new)):
            continue
        if blocks := min(owed, left[home], owed * most):
            send(found, node, home, blocks, RECALLED)
        elif not any(wish.reason == ROOM for wish in (*wishes, *new)):
            target, blocks = max(((n, b) for n, b in left.items() if n != home), key=lambda each: each[1])
            order = (*(youngest[i] for i in there), *(s for i, s in enumerate(youngest) if i not in there))
            mine = [each for s in order for each in pick(s, home, owed, block_size)] if most else []
            if mine and blocks:
                send(mine, home, target, min(owed, blocks), ROOM)
            elif node in late and (refused or not mine):
                give_way += [youngest[i].id for i in there[:1]]
            elif mine:
                homeless += owed
    return Repayment(tuple(empty), layouts, tuple(new), tuple(dict.fromkeys(give_way)), homeless)


def beside(room: Mapping[NodeId, int], wishes: Iterable[Wish]) -> dict[NodeId, int]:
    """What of this room is not kept for what lenders want back."""
    left = dict(room)
    for wish in wishes:
        if wish.reason in (RECALLED, ROOM) and wish.move.target in left:
            left[wish.move.target] = max(0, left[wish.move.target] - wish.move.blocks)
    return left
