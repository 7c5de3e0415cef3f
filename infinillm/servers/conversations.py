"""Which requests go on with which, for a log without text: sessions, turns, and how much two have in common.

Theory of operation. Of the last request of each session, with its answer, the names of its full blocks are kept
(core/names.py), 64 bits of each: where two sequences have one, all tokens up to there are equal. So a request has as
much in common with a session as its last name that is there says. It goes on with that session where it begins with
all that the last request asked, or where that is half of its prompt; else it begins a session. Sessions that nobody
went on with for longest are forgotten where there are too many names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from infinillm.core.names import mark, prefix_hashes

BLOCK = 16  # tokens: less than that is not seen
MOST_TOLD = 1 << 12  # blocks of one request: naming them takes some 10 ms
MOST_KEPT = 1 << 18  # blocks of all sessions


class Turn(NamedTuple):
    """Whose request it is, the how manyth from 0, and how many tokens are those of the one before and its answer."""

    session: str
    turn: int
    shared: int


class Said(NamedTuple):
    """The last request of a session: its turn, full blocks of its prompt, and names, those of its answer included."""

    turn: int
    asked: int
    names: tuple[int, ...]


def named(tokens: Sequence[int], salt: str) -> tuple[int, ...]:
    """What its full blocks are called, as far as they are told."""
    return tuple(map(mark, prefix_hashes(tokens[: MOST_TOLD * BLOCK], BLOCK, salt)))


class Conversations:
    """See the theory of operation above. `prefix`: of the names of sessions; `most`: names that are kept."""

    def __init__(self, prefix: str, most: int = MOST_KEPT):
        self.prefix, self.most = prefix, most
        self._count = self._names = 0
        self._last: OrderedDict[str, Said] = OrderedDict()  # the longest unused first
        self._where: dict[int, str] = {}  # the session that had a name last

    def turn(self, prompt: int, names: tuple[int, ...]) -> Turn:
        """Where a request of so many tokens belongs; `names` are of its answer, too."""
        asked = min(prompt // BLOCK, len(names))
        shared = next((n for n in range(asked, 0, -1) if names[n - 1] in self._where), 0)
        session = self._where[names[shared - 1]] if shared else ""
        before = self._last.get(session)
        if before is None or (shared < before.asked and 2 * shared < asked):
            self._count += 1
            session, before, shared = f"{self.prefix}{self._count}", Said(-1, 0, ()), 0
        self._keep(session, Said(before.turn + 1, asked, names))
        return Turn(session, before.turn + 1, shared * BLOCK)

    def _keep(self, session: str, said: Said) -> None:
        self._forget(session)
        self._last[session] = said
        self._names += len(said.names)
        self._where |= dict.fromkeys(said.names, session)
        while self._names > self.most:
            self._forget(next(iter(self._last)))

    def _forget(self, session: str) -> None:
        said = self._last.pop(session, Said(0, 0, ()))
        self._names -= len(said.names)
        for name in said.names:
            if self._where.get(name) == session:
                del self._where[name]
