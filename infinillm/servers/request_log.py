"""A log of a gateway's requests, in lengths and times only, which `infinillm simulate --trace` reads.

Theory of operation. A line is one sequence: when it came (`at`, in seconds), the tokens of its prompt and those of its
answer, and what it has in common with an earlier one: which `session` it is of, its `turn` there, and how many tokens
are `shared` with the last request of that session and its answer (conversations.py). A line is written when that
sequence and all that came before it are over, so that lines are in order of time; until then it waits in memory, and of
its tokens only names of blocks do, once it is over. A file that is there already is gone on with: seconds go on where
its last line was, and the time in between does not count. What got no token is left out, for nobody knows how many it
would have got.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from infinillm.errors import BadRequest
from infinillm.servers.conversations import Conversations, named
from infinillm.telemetry import log

TAIL = 4096  # bytes in which the last line is


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence: when it came, in seconds, how long its prompt is, its answer so far; once it is over, its names."""

    at: float
    prompt: int
    answer: list[int] = field(default_factory=list)  # tokens
    output: int = 0
    names: tuple[int, ...] | None = None


class RequestLog:
    """See the theory of operation above. Without a path nothing is written."""

    def __init__(self, path: str, clock: Callable[[], float]):
        self._clock, self._began = clock, clock() - _last(Path(path))
        self._file = _opened(path) if path else None
        self._open: deque[Entry] = deque()
        self._told = Conversations(f"{_size(path)}-")  # no two runs that wrote anything began at one size

    @contextmanager
    def request(self, prompt: Sequence[int], salt: str) -> Iterator[Entry]:
        """An entry, whose answer is to be added to while the block runs. What has another salt shares nothing."""
        self._open.append(entry := Entry(self._clock() - self._began, len(prompt)))
        try:
            yield entry
        finally:
            entry.output = len(entry.answer)
            wanted = self._file is not None and entry.output
            entry.names = named((*prompt, *entry.answer), salt) if wanted else ()
            entry.answer.clear()
            self._write()

    def _write(self) -> None:
        while self._open and (names := self._open[0].names) is not None:
            entry = self._open.popleft()
            if self._file is not None and entry.output:
                lengths = {"at": round(entry.at, 4), "prompt": entry.prompt, "output": entry.output}
                line = lengths | self._told.turn(entry.prompt, names)._asdict()
                try:
                    self._file.write(json.dumps(line) + "\n")
                except OSError as error:  # a full disk: requests go on without
                    log("request_log_failed", reason=str(error))
                    self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


def _opened(path: str) -> TextIO:
    try:
        return Path(path).open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise BadRequest(f"--request-log {path}: {error.strerror}", field="request_log") from None


def _size(path: str) -> int:
    """Bytes of a log."""
    return Path(path).stat().st_size if path else 0


def _last(path: Path) -> float:
    """When the last request of a log came; 0 where there is none."""
    if not path.is_file():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL, 0))
        lines = file.read().splitlines()
    if not lines:
        return 0.0
    try:
        return float(json.loads(lines[-1])["at"])
    except (ValueError, TypeError, KeyError):
        message = f"--request-log {path} does not end with a request; name another file, or move it away"
        raise BadRequest(message, field="request_log") from None
