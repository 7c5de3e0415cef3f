"""Which tokens the next pass computes, and where their K/V will go: `schedule(...) -> Step`, a pure function.

Running sequences come first, oldest first, then waiting ones as long as tokens, seats and blocks last. A sequence is
admitted whole: the blocks of all its tokens are reserved in one go, so two half-admitted prompts can never starve
each other. One that was preempted comes back only when there is room for it to go on, twice as much each time, so
that it is not thrown out for ever. The youngest gives way, one that outgrows home only where no other can: what it
would have to compute again is much, and most of it lies elsewhere. It does so once it has waited for blocks as long as
that takes: whenever they come, waiting and computing again cost at most twice the cheaper of the two. A node to which
nobody lends waits for nobody. Blocks are taken at home first, then on the nodes that already hold a part of the
sequence, then where most is left. What lenders gave for sequences that outgrow home no other takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from infinillm.core.cost import Cost
from infinillm.core.layout import grown, uncovered
from infinillm.core.recall import undisturbed
from infinillm.core.request import Sequence, add, first_gap
from infinillm.core.types import Chunk, Grow, Layout, NodeId, SeqId, Step, Stretch


@dataclass(frozen=True, slots=True)
class Budget:
    """What one pass may hold, and how many tokens of K/V may move beside it (rounded up to whole blocks)."""

    tokens: int
    sequences: int
    block_size: int
    moves: int = 0


@dataclass(frozen=True, slots=True)
class Here:
    """What holds at home beside the room.

    own       blocks home has in all; a sequence that may come to need more outgrows it
    kept      blocks of home that are for somebody who saves up: only what runs already may take them
    saved     lenders whose blocks are for outgrown sequences only
    denied    seconds for which no more blocks were to be had; -inf: they may still come (a loan is being asked for)
    cost      of computing, where it is known
    """

    own: int
    kept: int
    saved: Collection[NodeId]
    denied: float
    cost: Cost | None


@dataclass(frozen=True, slots=True)
class Match:
    """What the home has already of a waiting sequence, and how many of the blocks cost room to hold."""

    there: tuple[Stretch, ...] = ()
    idle: int = 0


NO_MATCH = Match()
NEVER = inf  # since when blocks are denied that are not
ROOM_AFTER_PREEMPTION = 32  # blocks, doubled before it is used
ROOM_OUTGROWN = 4  # blocks
MOST_AHEAD, FEW_AHEAD = 64, 4  # blocks asked for beyond what lacks now: for what outgrows home, and for all else


def need(sequence: Sequence, block_size: int, ahead: int, match: Match = NO_MATCH) -> int:
    """Blocks a waiting sequence must be given to be admitted, beyond those that are somewhere already."""
    there = sum(each.blocks for each in match.there) + sum(s.stop - s.start for s in sequence.layout) // block_size
    return -(-reserve(sequence, block_size, ahead) // block_size) - there


def reserve(sequence: Sequence, block_size: int, ahead: int) -> int:
    """Tokens that must have a place before a waiting sequence is admitted.

    One that was preempted must find room to go on, twice as much each time, so that it is not thrown out for ever. One
    for which blocks were saved up finds some `ahead`, from the first: what it would lose is much.
    """
    if sequence.preemptions:
        more = ROOM_AFTER_PREEMPTION << min(sequence.preemptions, 16)
    else:
        more = ahead
    return max(sequence.length, min(sequence.request.longest, sequence.length + more * block_size))


class Shortage(NamedTuple):
    """Blocks to ask lenders for: the least that helps, as many as would last, what is beyond home, and how long.

    Nothing of it is to be wanted back for `hold` seconds.
    """

    least: int
    wanted: int
    beyond: int | None
    hold: float


def shortage(
    step: Step,
    running: Seq[Sequence],
    waiting: Seq[Sequence],
    block_size: int,
    own: int,
    more: int,
    cost: Cost | None,
) -> Shortage:
    """What to ask lenders for after a step.

    Beyond home: what the largest of those that lack blocks needs besides `own`, all of home's, and the `more` that were
    borrowed (less what was lent). None where home could hold each of them alone. Who gave way stands in front of who
    was first before; that one still counts.
    """
    growing, computed = [*running, *waiting[:1]], {chunk.seq for chunk in step.chunks}
    coming = sum(-(-(s.request.longest - s.length) // block_size) for s in growing)
    first = next((n for n, s in enumerate(waiting) if not s.preemptions), len(waiting))
    lacking = (s for s in (*running, *waiting[: first + 1]) if s.id not in computed)
    outgrown = [(blocks, s) for s in lacking if (blocks := -(-s.request.longest // block_size)) > own]
    beyond = max(blocks for blocks, _ in outgrown) - own - more if outgrown else None
    hold = max((undisturbed(s.length, s.preemptions, cost) for _, s in outgrown), default=0.0)
    ahead = MOST_AHEAD if outgrown else FEW_AHEAD  # others that are idle now may be as busy in a moment
    return Shortage(step.short, step.short + min(coming, ahead), beyond, hold)


def schedule(
    step: int,
    running: Seq[Sequence],
    waiting: Seq[Sequence],
    room: Mapping[NodeId, int],
    budget: Budget,
    here: Here,
    match: Callable[[Sequence], Match],
) -> Step:
    """Decide one pass.

    running   oldest first; waiting in the order they are to be admitted
    room      blocks that may be taken on each node, home first
    match     what home has already of one that waits; asked only of those whose turn it is
    """
    size = budget.block_size
    left = dict(room)
    home = next(iter(left))
    tokens = budget.tokens
    chunks: list[Chunk] = []
    grow: list[Grow] = []
    preempt: list[SeqId] = []
    short = 0

    def take(sequence: Sequence, layout: Layout, start: int, stop: int) -> int:
        """Reserve blocks for [start, stop) as far as there is room; returns the position up to which it has a place."""
        for a, b in uncovered(layout, start, stop):
            first = a - a % size
            wanted = -(-(b - first) // size)
            for node in preference(home, layout, left):
                count = min(wanted, left[node]) if node not in barred(sequence, here, size) else 0
                if count > 0:
                    left[node] -= count
                    grow.append(Grow(sequence.id, node, first, count))
                    first += count * size
                    wanted -= count
                if not wanted:
                    break
            if wanted:
                return first
        return stop

    for sequence in running:
        if tokens <= 0:
            break
        gap = sequence.gap
        if gap is None or sequence.id in preempt:
            continue
        start, stop = gap[0], min(gap[1], gap[0] + tokens)
        placed = max(start, min(stop, take(sequence, sequence.layout, start, stop)))
        if placed < stop:
            short += -(-(stop - placed) // size)
        if placed > start:
            chunks.append(Chunk(sequence.id, start, placed))
            tokens -= placed - start
        elif here.denied >= 0 and not preempt:
            scheduled = {chunk.seq for chunk in chunks}
            idle = [s for s in reversed(running) if s.id not in scheduled]
            fits = [s for s in idle if s.request.longest <= here.own * size]
            victim = (fits or idle)[0]
            if len(left) == 1 or here.denied >= patience(victim, here.cost):
                preempt.append(victim.id)

    admit: list[SeqId] = []
    reuse: list[Stretch] = []
    seats = budget.sequences - len(running)
    left[home] = max(left[home] - here.kept, 0)
    if not preempt:
        for sequence in waiting:
            if tokens <= 0 or seats <= 0:
                break
            found = match(sequence)
            if found.idle > left[home]:  # blocks taken above may evict what the cache has
                found = NO_MATCH
            ahead = ROOM_OUTGROWN if here.saved and not barred(sequence, here, size) else 0
            wanted = need(sequence, size, ahead, found)
            missing = wanted + found.idle - sum(left[node] for node in left.keys() - barred(sequence, here, size))
            if missing > 0:
                short += missing
                break  # first come, first served: nobody overtakes
            left[home] -= found.idle
            there = [Grow(sequence.id, home, each.first, each.blocks) for each in found.there]
            layout = grown(sequence.layout, there, size)
            take(sequence, layout, 0, reserve(sequence, size, ahead))
            done = sequence.done
            for each in found.there:
                done = add(done, each.first, each.first + each.blocks * size)
            gap = first_gap(done, sequence.length)
            assert gap is not None, sequence  # the last token is computed, always
            start, stop = gap[0], min(gap[1], gap[0] + tokens)
            chunks.append(Chunk(sequence.id, start, stop))
            reuse += found.there
            admit.append(sequence.id)
            tokens -= stop - start
            seats -= 1
    return Step(step, tuple(chunks), tuple(grow), tuple(preempt), tuple(admit), tuple(reuse), short)


def patience(sequence: Sequence, cost: Cost | None) -> float:
    """Seconds to wait for blocks before a sequence gives way: those in which it would be computed again."""
    return cost.computing(sequence.computed) if cost is not None else 0.0


def barred(sequence: Sequence, here: Here, block_size: int) -> Collection[NodeId]:
    """Lenders of whose blocks a sequence takes none."""
    return here.saved if sequence.request.longest <= here.own * block_size else ()


def preference(home: NodeId, layout: Layout, left: Mapping[NodeId, int]) -> list[NodeId]:
    """Where blocks for a sequence are taken, best first."""
    if left[home] > 0 and len(left) == 1:
        return [home]
    known = dict.fromkeys(span.node for span in reversed(layout))
    others = sorted((n for n in left if n != home and n not in known), key=lambda n: -left[n])
    return [home, *(n for n in known if n != home and n in left), *others]
