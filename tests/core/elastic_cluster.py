"""Elastic instances, requests and times for tests, in few words."""

from __future__ import annotations

import json
from pathlib import Path

from infinillm.core.elastic.times import DecodeTime, PrefillTime, Times, from_plain
from infinillm.core.elastic.values import Batch, Instance, Running, Waiting

MEASURED = json.loads(Path(__file__).with_name("a800_lwm7b.json").read_text(encoding="utf-8"))
A800 = from_plain(MEASURED["times"])
SLOTS = 210_000  # of two A800 with LWM-7B

# The same shape for lengths a thousand times smaller: from 2 tokens on, more instances are quicker.
SMALL = Times(
    tuple(PrefillTime(a, b * 1e3, c * 1e6) for a, b, c in A800.prefill),
    DecodeTime(0.0142, 1.43e-5, 4.0e-5, 4),
    A800.move * 1e3,
    A800.tipping,
    4,
)


def instances(*free: int, slots: int = SLOTS, used: int = 0) -> tuple[Instance, ...]:
    """Instances a, b, c, ... at one place with so many slots free, or `used` of them."""
    found = free or (slots - used,)
    return tuple(Instance("abcdefghijklmnop"[at], slots, slots - n, "") for at, n in enumerate(found))


def waiting(*tokens: int, left: int = 1) -> tuple[Waiting, ...]:
    """Requests w0, w1, ... that came in this order."""
    return tuple(Waiting(f"w{at}", n, float(at), left) for at, n in enumerate(tokens))


def running(
    name: str, arrived: float = 0.0, produced: int = 1, left: int = 1, seconds: float = 0.0, **held: int
) -> Running:
    """A request with so many tokens on each instance."""
    return Running(name, arrived, held, produced, left, seconds)


def batch(*requests: Running) -> Batch:
    return Batch(requests)
