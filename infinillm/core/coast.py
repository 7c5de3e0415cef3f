"""Many steps at a time, where all only decode: what `schedule` would decide in each, a pure function.

While every running sequence decodes and nothing comes from outside, a step is like the one before it, but that now and
then a sequence needs one more block, which is taken where `schedule` would take it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from heapq import heapify, heappop, heappush

from infinillm.core.layout import grown, reserved
from infinillm.core.request import Sequence
from infinillm.core.scheduler import Here, barred, preference
from infinillm.core.types import Grow, NodeId

FEW, MOST_TOLD = 8, 64  # steps: where home alone can feed only a few, what comes from lenders is told for some more


def fits(running: Seq[Sequence], steps: int, room: int, block_size: int) -> bool:
    """Whether so many blocks of home are enough for so many steps, the one in hand included."""
    lacking = (s.length + steps - 1 - reserved(s.layout) for s in running)
    return sum(-(-tokens // block_size) for tokens in lacking if tokens > 0) <= room


def coast(
    running: Seq[Sequence], room: Mapping[NodeId, int], here: Here, block_size: int
) -> tuple[int, list[tuple[int, Grow]]]:
    """How many steps are like the one in hand, that one included, until a sequence ends or finds no block.

    And the blocks that these take besides, by step (0 is in hand), where they are not all of home. What the step in
    hand takes is in the layouts, and not in `room` (blocks on each node, home first) any more.
    """
    left, home = dict(room), next(iter(room))
    most = min(s.request.sampling.max_tokens - s.produced for s in running)
    more = range(2, most + 1)
    alone = bisect_left(more, True, key=lambda steps: not fits(running, steps, left[home], block_size)) + 1
    if alone >= min(most, FEW) or len(room) == 1:
        return alone, []
    most = min(most, MOST_TOLD)
    layouts = [s.layout for s in running]
    taken: list[tuple[int, Grow]] = []
    due = [(reserved(s.layout) - s.length + 1, i) for i, s in enumerate(running)]
    heapify(due)
    while due[0][0] < most:
        step, i = heappop(due)
        closed = barred(running[i], here, block_size)
        where = [home] if left[home] > 0 else preference(home, layouts[i], left)
        node = next((n for n in where if left[n] > 0 and n not in closed), None)
        if node is None:
            return step, [each for each in taken if each[0] < step]
        left[node] -= 1
        grow = Grow(running[i].id, node, reserved(layouts[i]), 1)
        layouts[i] = grown(layouts[i], [grow], block_size)
        taken.append((step, grow))
        heappush(due, (step + block_size, i))
    return most, taken
