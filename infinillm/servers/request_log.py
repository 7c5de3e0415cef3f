"""A log of a gateway's requests, in lengths and times only, which `infinillm simulate --trace` reads.

Theory of operation. A line is one sequence: when it came (`at`, in seconds), the tokens of its prompt and those of its
answer. It is written when that one and all that came before it are over, so that lines are in order of time; until
then it waits in memory. A file that is there already is gone on with: seconds go on where its last line was, and the
time in between does not count. What got no token is left out, for nobody knows how many it would have got.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from infinillm.errors import BadRequest
from infinillm.telemetry import log

TAIL = 4096  # bytes in which the last line is


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence: when it came, in seconds, and its tokens so far."""

    at: float
    prompt: int
    output: int = 0
    over: bool = False


class RequestLog:
    """See the theory of operation above. Without a path nothing is written."""

    def __init__(self, path: str, clock: Callable[[], float]):
        self._clock, self._began = clock, clock() - _last(Path(path))
        self._file = _opened(path) if path else None
        self._open: deque[Entry] = deque()

    @contextmanager
    def request(self, prompt: int) -> Iterator[Entry]:
        """An entry, whose output is to be counted while the block runs."""
        self._open.append(entry := Entry(self._clock() - self._began, prompt))
        try:
            yield entry
        finally:
            entry.over = True
            self._write()

    def _write(self) -> None:
        while self._open and self._open[0].over:
            entry = self._open.popleft()
            if self._file is not None and entry.output:
                line = {"at": round(entry.at, 4), "prompt": entry.prompt, "output": entry.output}
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
