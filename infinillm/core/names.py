"""Content names: what a full block is called, so that whoever needs what it holds finds it, on whatever node it lies.

A block's K/V depends on the model and on all tokens up to its end, so its name is a hash of these tokens: the name of
the block before, and its own tokens. Names are salted: what has another salt has other names, and is never shared.
Every MARK_EVERY-th block of a sequence is a landmark. Nodes tell the controller which landmarks they have, in eight
bytes each; that says whom to ask, and who is asked says which of the blocks are really there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence

from infinillm.core.types import NodeId

NAME_BYTES = hashlib.sha256().digest_size
MARK_EVERY = 8  # blocks
MOST_HOLDERS = 4  # nodes that are worth asking for one sequence


def prefix_hashes(tokens: Sequence[int], block_size: int, salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
    """The names of the full blocks of a sequence, after those that are known."""
    names: list[bytes] = []
    packed, size = array("I", tokens[len(known) * block_size :]).tobytes(), 4 * block_size
    name = known[-1] if known else hashlib.sha256(salt.encode()).digest()
    for start in range(0, len(packed) - size + 1, size):
        name = hashlib.sha256(name + packed[start : start + size]).digest()
        names.append(name)
    return names


def mark(name: bytes) -> int:
    """What a landmark is called in brief: 64 bits."""
    return int.from_bytes(name[:8], "big")


def marks(names: Sequence[bytes]) -> list[int]:
    """The landmarks of a sequence."""
    return [mark(name) for name in names[MARK_EVERY - 1 :: MARK_EVERY]]


class Uses:
    """How often what begins a sequence was used where it lies elsewhere, by its last name; of the latest ones."""

    def __init__(self, most: int):
        self.most = most
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def count(self, name: bytes) -> int:
        """One more; returns how many there were."""
        self._counts[name] = self._counts.pop(name, 0) + 1
        if len(self._counts) > self.most:
            self._counts.popitem(last=False)
        return self._counts[name]


class Landmarks:
    """Which nodes have told that they have which landmarks."""

    def __init__(self) -> None:
        self._nodes: dict[int, set[NodeId]] = {}
        self._told: dict[NodeId, set[int]] = {}

    def tell(self, node: NodeId, new: Iterable[int], gone: Iterable[int]) -> None:
        told = self._told.setdefault(node, set())
        for each in new:
            told.add(each)
            self._nodes.setdefault(each, set()).add(node)
        for each in told.intersection(gone):
            told.discard(each)
            self._forget(node, each)

    def forget(self, node: NodeId) -> None:
        for each in self._told.pop(node, ()):
            self._forget(node, each)

    def _forget(self, node: NodeId, each: int) -> None:
        self._nodes[each].discard(node)
        if not self._nodes[each]:
            del self._nodes[each]

    def holders(self, wanted: Collection[int]) -> list[tuple[NodeId, int]]:
        """Who has how many of these, most first: few nodes, since each has to be asked."""
        found = Counter(node for each in wanted for node in self._nodes.get(each, ()))
        return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_HOLDERS]
