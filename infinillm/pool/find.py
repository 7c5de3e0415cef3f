"""Finding what other nodes have already of a sequence that is to come, so that nobody computes it again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from infinillm.core.layout import grown, uncovered
from infinillm.core.types import Grow, Layout, NodeId, SeqId
from infinillm.errors import InfinillmError
from infinillm.pool.borrow import Lenders
from infinillm.telemetry import log

NAMES_AT_ONCE = 1 << 15  # one megabyte of names


async def find(
    lenders: Lenders, seq: SeqId, names: Sequence[bytes], first: int, holders: Sequence[tuple[NodeId, str]]
) -> Layout:
    """Ask these nodes for the blocks from index `first` on; returns where they are kept for the sequence from now on.

    Each is asked for what those before it have not, and one that does not answer has nothing.
    """
    size = lenders.memory.blocks.block_size
    layout: Layout = ()
    for node, address in holders:
        missing = [
            (start, names[start // size : min(stop, start + NAMES_AT_ONCE * size) // size])
            for a, b in uncovered(layout, first * size, len(names) * size)
            for start, stop in ((at, b) for at in range(a, b, NAMES_AT_ONCE * size))
        ]
        if node == lenders.node or not missing:
            continue
        try:
            found = await lenders.share(node, address, seq, missing)
        except InfinillmError as error:
            log("share_failed", request=seq, node=node, reason=error.message)
            continue
        layout = grown(layout, [Grow(seq, node, each.first, each.blocks) for each in found], size)
        log("shared", request=seq, node=node, tokens=sum(each.blocks for each in found) * size)
    return layout


async def kept_or_released(lenders: Lenders, seq: SeqId, finding: asyncio.Task[Layout]) -> Layout:
    """What was found; should nobody wait for it any more, it is let go as soon as it is known."""
    try:
        return await asyncio.shield(finding)
    except asyncio.CancelledError:
        finding.add_done_callback(lambda _: lenders.release(seq))
        raise
