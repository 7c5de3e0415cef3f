"""Waiting for file descriptors, with a moment of spinning where that has paid.

Waking a sleeping core costs tens of microseconds, more than a small message does. So a watch looks again and again
for up to SPIN seconds before it sleeps, but only if the last wait was that short: a node between two steps sleeps at
once, a shard whose answer is nearly there does not. While it spins it yields its core to whoever can use it. (The
rule is that of KVM's halt polling.)
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from time import perf_counter

SPIN = 100e-6  # seconds


class Watch:
    """Waits until one of some file descriptors can be read. One thread at a time may wait."""

    def __init__(self, files: Sequence[int], patience: float):
        self._patience = patience
        self._patience_ms = max(1, int(patience * 1000))
        self._spin = 0.0
        self._poll = select.poll()
        for fd in files:
            self._poll.register(fd, select.POLLIN)

    def look(self) -> dict[int, int]:
        """The events there are now."""
        return dict(self._poll.poll(0))

    def wait(self) -> dict[int, int]:
        """At least one event. Raises TimeoutError after the patience."""
        look, begin = self._poll.poll, perf_counter()
        until = begin + self._spin
        while self._spin:
            if events := look(0):
                return dict(events)
            if perf_counter() > until:
                break
            os.sched_yield()
        events = look(self._patience_ms)
        self._spin = SPIN if perf_counter() - begin < SPIN else 0.0
        if not events:
            raise TimeoutError(f"silent for {self._patience} s")
        return dict(events)
