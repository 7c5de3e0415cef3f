"""What blocks of simulated sessions are called: numbers in place of hashes, equal where the tokens are.

Theory of operation. Every request of a session has a number. Its blocks are called by it and by their index, but for
the full blocks of what it shares with the session's last request and answer, which keep their names. So names are equal
exactly where all tokens up to the end of a block are. Requests outside sessions share nothing and have no names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

from infinillm.core.blocks import Blocks
from infinillm.core.layout import firsts, grown, stretches, uncovered
from infinillm.core.names import MARK_EVERY, mark
from infinillm.core.request import Sequence
from infinillm.core.scheduler import NO_MATCH, Match
from infinillm.core.types import Grow, Layout, NodeId, SeqId, Stretch

INDEX_BITS = 24  # of a name: 64 bits are all that a landmark has
MOST_SESSIONS = 1 << 16


class Names:
    """The names of one request's blocks. `parts`: (the first block, the request it is called by), ascending."""

    __slots__ = ("_first", "parts")

    def __init__(self, parts: tuple[tuple[int, int], ...]):
        self.parts = parts
        self._first: list[bytes] = []  # that were asked for

    def __getitem__(self, index: int) -> bytes:
        _, number = self.parts[bisect_right(self.parts, index, key=lambda part: part[0]) - 1]
        return (number << INDEX_BITS | index).to_bytes(8, "big")

    def upto(self, stop: int) -> list[bytes]:
        """Those of the first blocks."""
        self._first += [self[index] for index in range(len(self._first), stop)]
        return self._first[:stop]

    def marks(self, tokens: int, block_size: int) -> list[int]:
        """The landmarks of so many tokens."""
        return [mark(self[index]) for index in range(MARK_EVERY - 1, tokens // block_size, MARK_EVERY)]


class Sessions:
    """The latest sessions, and what the last request of each was called."""

    def __init__(self, block_size: int):
        self.size, self.count = block_size, 0
        self._last: OrderedDict[str, Names] = OrderedDict()

    def names(self, session: str, shared: int) -> Names | None:
        """The names of the next request of a session, which shares so many tokens with the last; None outside."""
        if not session:
            return None
        before, kept = self._last.pop(session, None), shared // self.size
        self.count += 1
        parts = tuple(part for part in before.parts if part[0] < kept) if before is not None else ()
        names = Names((*parts, (kept if parts else 0, self.count)))
        self._last[session] = names
        if len(self._last) > MOST_SESSIONS:
            self._last.popitem(last=False)
        return names


def match(blocks: Blocks, sequence: Sequence, names: Names | None) -> Match:
    """What home has of a sequence that waits, but never its last token: as `engine.names`."""
    if names is None:
        return NO_MATCH
    size = blocks.block_size
    wanted = names.upto((sequence.length - 1) // size)
    for span in sequence.layout:
        for at in range(span.start, span.stop, size):
            wanted[at // size] = b""
    found, idle = blocks.match(sequence.id, wanted)
    return Match(tuple(stretches(sequence.id, (i * size for i in found), size)), idle)


def reuse(blocks: Blocks, stretch: Stretch, names: Names) -> None:
    """Hold what `match` found."""
    wanted = {at: names[at // blocks.block_size] for at in firsts(stretch.first, stretch.blocks, blocks.block_size)}
    shared = blocks.share(stretch.seq, wanted)
    assert len(shared) == stretch.blocks, (stretch, shared)


def seal(
    books: Callable[[NodeId], tuple[Blocks, NodeId]], sequence: Sequence, start: int, stop: int, names: Names
) -> None:
    """Tokens [start, stop) have K/V now: the blocks they fill can be found. `books`: of a node, and whose they are."""
    for span in sequence.layout:
        blocks, owner = books(span.node)
        size = blocks.block_size
        for index in range(max(start, span.start) // size, min(stop, span.stop) // size):
            blocks.seal(sequence.id, index * size, names[index], owner)


def find(
    seq: SeqId,
    known: Seq[bytes],
    blocks: Blocks,
    holders: Iterable[NodeId],
    share: Callable[[NodeId, SeqId, Mapping[int, bytes]], list[int]],
) -> Layout:
    """What these nodes keep of a sequence from now on, beyond what is here: as `pool.find`. `share` asks one."""
    size, here = blocks.block_size, blocks.leading(known) * blocks.block_size
    layout: Layout = ()
    for node in holders:
        missing = uncovered(layout, here, len(known) * size)
        if wanted := {at: known[at // size] for a, b in missing for at in range(a, b, size)}:
            there = stretches(seq, share(node, seq, wanted), size)
            layout = grown(layout, [Grow(seq, node, each.first, each.blocks) for each in there], size)
    return layout
