"""Which blocks move beside the next pass: `choose(wishes, ...) -> Chosen`, a pure function.

Only full, computed blocks of running sequences move: nothing writes to them any more. Every move has its home at one
end, because its tensors travel on the lanes that the home's questions use; from lender to lender a block goes by way of
home. A wish whose target has no room is refused and forgotten; one to a home that others are leaving waits for them.
What the layout does not bear out is forgotten, too: whoever wished looked at an older one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from infinillm.core.layout import stretches
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.request import Interval, Sequence
from infinillm.core.types import Layout, Move, NodeId, SeqId, Span, Stretch


class Wish(NamedTuple):
    """Somebody would have blocks lie elsewhere, and why."""

    move: Move
    reason: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """What moves beside the next pass, what waits for a later one, and what was refused, with the reason."""

    moves: tuple[Move, ...] = ()
    wishes: tuple[Wish, ...] = ()
    refused: tuple[tuple[Wish, str], ...] = ()


def choose(
    wishes: Seq[Wish], running: Mapping[SeqId, Sequence], room: Mapping[NodeId, int], most: int, block_size: int
) -> Chosen:
    """At most `most` blocks, the oldest wishes first. `room`: blocks that may be taken on each node, home first."""
    left = dict(room)
    home = next(iter(left))
    moves: list[Move] = []
    waiting: list[Wish] = []
    refused: list[tuple[Wish, str]] = []
    for wish in wishes:
        seq, source, target, first, blocks = wish.move
        if (sequence := running.get(seq)) is None or source == target:
            continue
        rest = stop = first + blocks * block_size  # `rest`: from here on the wish is not fulfilled yet
        for at in range(first, stop, block_size):
            here = place(sequence.layout, at)
            on_its_way = here == home and home not in (source, target)
            if here is None or not (here == source or on_its_way) or not _computed(sequence.done, at, at + block_size):
                continue
            to = target if home in (here, target) else home
            if most <= 0 or any(_covers(move, seq, at, block_size) for move in moves):
                rest = min(rest, at)
                break
            if left.get(to, 0) < 1 and to == home and any(each.move.source == home for each in wishes):
                rest = min(rest, at)
                break
            if left.get(to, 0) < 1:
                refused.append((wish, f"{to} has no room"))
                rest = stop
                break
            left[to] -= 1
            most -= 1
            _append(moves, Move(seq, here, to, at, 1), block_size)
            if to != target:
                rest = min(rest, at)
        if rest < stop:
            waiting.append(Wish(wish.move._replace(first=rest, blocks=(stop - rest) // block_size), wish.reason))
    return Chosen(tuple(moves), tuple(waiting), tuple(refused))


def ordered(wishes: tuple[Wish, ...], said: MoveBlocks, sequence: Sequence | None, block_size: int) -> tuple[Wish, ...]:
    """The wishes with an order: of the first blocks that could move now. It takes the place of one like it."""
    like = (said.seq, said.source, said.target)
    found = (
        Wish(Move(said.seq, said.source, said.target, each.first, each.blocks), said.reason)
        for each in pick(sequence, said.source, said.blocks, block_size)
    )
    return (*(wish for wish in wishes if wish.move[:3] != like), *found)


def pick(sequence: Sequence | None, source: NodeId, blocks: int, block_size: int) -> list[Stretch]:
    """The first so many blocks of a sequence that lie on `source` and could move now."""
    found: list[Stretch] = []
    if sequence is None:
        return found
    there = (span for span in sequence.layout if span.node == source)
    for first, stop in ((max(s.start, a), min(s.stop, b)) for s in there for a, b in sequence.done):
        first += -first % block_size
        count = min((stop - first) // block_size, blocks)
        if count < 1:
            continue
        blocks -= count
        if found and found[-1].first + found[-1].blocks * block_size == first:
            found[-1] = found[-1]._replace(blocks=found[-1].blocks + count)
        else:
            found.append(Stretch(sequence.id, first, count))
    return found


def ahead(sequence: Sequence, node: NodeId, block_size: int) -> tuple[Layout, list[Stretch]]:
    """The layout without what is reserved on a node for tokens that are still to come, and these blocks."""
    end = -(-sequence.length // block_size) * block_size
    spans = [Span(s.node, s.start, min(s.stop, end)) if s.node == node else s for s in sequence.layout]
    ranges = (range(max(s.start, end), s.stop, block_size) for s in sequence.layout if s.node == node)
    empty = stretches(sequence.id, (at for each in ranges for at in each), block_size)
    return tuple(span for span in spans if span.start < span.stop), empty


def place(layout: Layout, position: int) -> NodeId | None:
    """The node that has, or will have, the token at a position."""
    return next((span.node for span in layout if span.start <= position < span.stop), None)


def _computed(done: tuple[Interval, ...], start: int, stop: int) -> bool:
    return any(a <= start and stop <= b for a, b in done)


def _covers(move: Move, seq: SeqId, at: int, block_size: int) -> bool:
    return move.seq == seq and move.first <= at < move.first + move.blocks * block_size


def _append(moves: list[Move], move: Move, block_size: int) -> None:
    """One more block; side by side with the last one it makes that move longer."""
    if moves:
        last = moves[-1]
        if last[:3] == move[:3] and last.first + last.blocks * block_size == move.first:
            moves[-1] = last._replace(blocks=last.blocks + 1)
            return
    moves.append(move)
