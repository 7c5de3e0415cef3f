"""What an engine hears and what it tells: the values that cross the border of its thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.request import Request
from infinillm.core.types import Layout, Refused, SeqId, TokenLogprob
from infinillm.errors import InfinillmError

__all__ = ["Borrowed", "Cancel", "Load", "Message", "MoveBlocks", "Output", "Stop", "Submit"]


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


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    id: SeqId


@dataclass(frozen=True, slots=True)
class Borrowed:
    """The answer to a wish: blocks, or why not. `never` names a request that no pool of this size can hold."""

    answer: int | Refused
    never: SeqId = ""


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Message: TypeAlias = Submit | Cancel | Borrowed | MoveBlocks | Stop


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine tells the process about itself."""

    running: int = 0
    waiting: int = 0
    wanted: int = 0
    layouts: dict[SeqId, Layout] = field(default_factory=dict)
