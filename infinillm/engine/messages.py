"""What an engine hears and what it tells: the values that cross the border of its thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from infinillm.core.moves import Wish
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.request import Interval, Request
from infinillm.core.types import Layout, Refused, SeqId, TokenLogprob
from infinillm.errors import InfinillmError

__all__ = [
    "Borrowed",
    "Cancel",
    "HandOver",
    "Load",
    "Message",
    "MoveBlocks",
    "Output",
    "Pass",
    "Placement",
    "Stop",
    "Submit",
]


@dataclass(frozen=True, slots=True)
class Output:
    """What one step brought for one request. The last one has a finish reason or an error."""

    id: SeqId
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    stop_token: int | None = None
    cached: int = 0
    error: InfinillmError | None = None
    leaving: bool = False  # tokens still come, but whoever listens had better find another worker


@dataclass(frozen=True, slots=True)
class Submit:
    """`names`: of its first blocks, as many as are known. `shared`: blocks others keep for it; a `copy` may pay."""

    request: Request
    names: Sequence[bytes] = ()
    shared: Layout = ()
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    id: SeqId


@dataclass(frozen=True, slots=True)
class Borrowed:
    """The answer to a wish: blocks, or why not. `never` names a request that no pool of this size can hold."""

    answer: int | Refused
    never: SeqId = ""


@dataclass(frozen=True, slots=True)
class HandOver:
    """All requests, or those that wait, are to go on elsewhere, and so is whatever is submitted later."""

    waiting: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """One request is to go on elsewhere."""

    id: SeqId


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Message: TypeAlias = Submit | Cancel | Borrowed | MoveBlocks | HandOver | Pass | Stop


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine tells the process about itself.

    `lost` and `repaired` count tokens since the start, `missing` those lost and not computed again yet, `moving` blocks
    that are to lie elsewhere.
    """

    running: int = 0
    waiting: int = 0
    wanted: int = 0
    layouts: dict[SeqId, Layout] = field(default_factory=dict)
    lost: int = 0
    repaired: int = 0
    missing: int = 0
    moving: int = 0


class Placement(NamedTuple):
    """Where a request is: its spans, the holes that nobody has computed again yet, and what is to lie elsewhere."""

    state: str
    tokens: int
    layout: Layout
    holes: tuple[Interval, ...] = ()
    moving: tuple[Wish, ...] = ()
