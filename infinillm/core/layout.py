"""From a step and the layouts to what each node must do: the plan, a pure function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from infinillm.core.types import Chunk, Grow, Layout, Move, NodeId, Part, Plan, SeqId, Span, Step, Stretch
from infinillm.errors import Broken


def reserved(layout: Layout) -> int:
    """Where the last reserved span ends: tokens at earlier positions have a place, unless there are holes."""
    return layout[-1].stop if layout else 0


def uncovered(layout: Layout, start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of [start, stop) that have no place yet."""
    gaps: list[tuple[int, int]] = []
    for span in layout:
        if span.stop <= start or span.start >= stop:
            continue
        if span.start > start:
            gaps.append((start, span.start))
        start = max(start, span.stop)
    if start < stop:
        gaps.append((start, stop))
    return gaps


def grown(layout: Layout, grow: Iterable[Grow], block_size: int) -> Layout:
    """The layout with more blocks in it; neighbouring spans of one node become one."""
    spans = [*layout, *(Span(g.node, g.first, g.first + g.blocks * block_size) for g in grow)]
    spans.sort(key=lambda span: span.start)
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].node == span.node and joined[-1].stop == span.start:
            joined[-1] = Span(span.node, joined[-1].start, span.stop)
        else:
            assert not joined or joined[-1].stop <= span.start, (layout, span)
            joined.append(span)
    return tuple(joined)


def without(layout: Layout, node: NodeId) -> tuple[Layout, list[Span]]:
    """The layout after `node` was lost, and the spans that went with it."""
    return tuple(s for s in layout if s.node != node), [s for s in layout if s.node == node]


def firsts(first: int, blocks: int, block_size: int) -> range:
    """The positions at which so many blocks begin, side by side."""
    return range(first, first + blocks * block_size, block_size)


def stretches(seq: SeqId, positions: Iterable[int], block_size: int) -> list[Stretch]:
    """The blocks at these positions, said briefly."""
    found: list[Stretch] = []
    for first in sorted(positions):
        if found and found[-1].first + found[-1].blocks * block_size == first:
            found[-1] = found[-1]._replace(blocks=found[-1].blocks + 1)
        else:
            found.append(Stretch(seq, first, 1))
    return found


def moved(layout: Layout, move: Move, block_size: int) -> Layout:
    """The layout after a move: the same tokens, some of them on another node."""
    start, stop = move.first, move.first + move.blocks * block_size
    around: list[Span] = []
    for span in layout:
        if span.start < start:
            around.append(Span(span.node, span.start, min(span.stop, start)))
        if span.stop > stop:
            around.append(Span(span.node, max(span.start, stop), span.stop))
    return grown(tuple(around), [Grow(move.seq, move.target, start, move.blocks)], block_size)


def filled(layout: Layout, length: int) -> Layout:
    """The spans up to `length`: where K/V is, as told to people and to the controller."""
    return tuple(Span(s.node, s.start, min(s.stop, length)) for s in layout if s.start < length)


def parts(chunk: Chunk, layout: Layout, block_size: int) -> dict[NodeId, list[Part]]:
    """Each node's share of a chunk: rows that can see something there, and rows whose K/V it keeps.

    A node holding only later positions is not asked (visibility is by position).
    """
    asked: dict[NodeId, list[Part]] = {}
    holds: dict[NodeId, int] = {}
    for span in layout:
        if span.start < chunk.stop:
            held = -(-(min(span.stop, chunk.stop) - span.start) // block_size)
            holds[span.node] = holds.get(span.node, 0) + held
    for span in layout:
        if span.start >= chunk.stop:
            continue
        keep = (max(span.start, chunk.start), min(span.stop, chunk.stop))
        keep = keep if keep[0] < keep[1] else (chunk.stop, chunk.stop)
        mine = asked.setdefault(span.node, [])
        if not mine:
            mine.append(Part(chunk.seq, max(span.start, chunk.start), chunk.stop, *keep, holds[span.node]))
        elif keep[0] < keep[1]:
            mine.append(Part(chunk.seq, chunk.stop, chunk.stop, *keep, holds[span.node]))
    return asked


def plan(
    step: Step,
    layouts: Mapping[SeqId, Layout],
    block_size: int,
    moves: Iterable[Move] = (),
    moved: Iterable[Move] = (),
) -> dict[NodeId, Plan]:
    """What every node must do during the step. `layouts` already include what the step grows.

    moves   copied during this step; the layouts do not know of them yet
    moved   copied before, whose sources have still to let go
    """
    grow: dict[NodeId, list[Grow]] = {}
    work: dict[NodeId, list[Part]] = {}
    leave: dict[NodeId, list[Stretch]] = {}
    take: dict[NodeId, list[Stretch]] = {}
    give: dict[NodeId, list[Stretch]] = {}
    for move in moved:
        leave.setdefault(move.source, []).append(move.stretch)
    for move in moves:
        give.setdefault(move.source, []).append(move.stretch)
        take.setdefault(move.target, []).append(move.stretch)
    for g in step.grow:
        grow.setdefault(g.node, []).append(g)
    for chunk in step.chunks:
        kept = 0
        for node, mine in parts(chunk, layouts[chunk.seq], block_size).items():
            work.setdefault(node, []).extend(mine)
            kept += sum(part.keep_stop - part.keep_start for part in mine)
        if kept != chunk.stop - chunk.start:
            raise Broken(f"{chunk}: {kept} of its rows would be kept, by {layouts[chunk.seq]}")
    return {
        node: Plan(
            step.id,
            tuple(grow.get(node, ())),
            tuple(work.get(node, ())),
            tuple(leave.get(node, ())),
            tuple(take.get(node, ())),
            tuple(give.get(node, ())),
        )
        for node in dict.fromkeys([*grow, *work, *leave, *take, *give])
    }
