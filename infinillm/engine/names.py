"""The content names of one engine's sequences: what is found under them, and what is kept under them.

A block gets its name once all its tokens are computed, wherever it lies: a lender hears it in the conversation, after
the plan that wrote the block. So whoever begins with the same tokens finds them, and whoever goes on with a sequence
that another worker lost finds what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from infinillm.core.layout import firsts, stretches
from infinillm.core.names import prefix_hashes
from infinillm.core.request import Sequence
from infinillm.core.scheduler import Match
from infinillm.core.types import NodeId, SeqId, Stretch
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory


class Names:
    """See above. `home` is the node whose sequences these are."""

    def __init__(self, home: NodeId, memory: Memory, lenders: Lenders):
        self.home, self.memory, self.lenders = home, memory, lenders
        self.size = memory.blocks.block_size
        self._names: dict[SeqId, list[bytes]] = {}

    def begin(self, sequence: Sequence, known: Iterable[bytes] = ()) -> None:
        """`known`: the names of its first blocks, which are many where it is long."""
        self._names[sequence.id] = list(known)
        self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        names = self._names[sequence.id]
        names += prefix_hashes(sequence.tokens, self.size, sequence.request.cache_salt, names)

    def end(self, seq: SeqId) -> None:
        del self._names[seq]

    def match(self, sequence: Sequence) -> Match:
        """What home has of a sequence that waits, but never its last token. The caller holds the lock of memory."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return Match()  # they need every position computed
        names = self._names[sequence.id][: (sequence.length - 1) // self.size]
        there = {at for span in sequence.layout for at in range(span.start, span.stop, self.size)}
        if there:
            names = [b"" if i * self.size in there else name for i, name in enumerate(names)]
        found, idle = self.memory.blocks.match(sequence.id, names)
        return Match(tuple(stretches(sequence.id, (i * self.size for i in found), self.size)), idle)

    def reuse(self, stretch: Stretch) -> None:
        """Hold what `match` found. The caller still holds the lock."""
        seq, first, blocks = stretch
        names = self._names[seq]
        wanted = {at: names[at // self.size] for at in firsts(first, blocks, self.size)}
        shared = self.memory.blocks.share(seq, wanted)
        assert len(shared) == blocks, (stretch, shared)

    def seal(self, sequence: Sequence, start: int, stop: int) -> None:
        """Tokens [start, stop) have K/V now: the blocks they fill can be found from now on, where they lie."""
        first, last = start // self.size, stop // self.size
        names = self._names[sequence.id]
        if last > len(names):
            self._go_on(sequence)
        for span in sequence.layout:
            a, b = max(first, span.start // self.size), min(last, span.stop // self.size)
            if a >= b:
                continue
            if span.node != self.home:
                self.lenders.name(span.node, sequence.id, a * self.size, names[a:b])
                continue
            with self.memory.lock:
                for i in range(a, b):
                    self.memory.blocks.seal(sequence.id, i * self.size, names[i])
