"""The values every room speaks in: nodes, spans, chunks, steps, loans, events and orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

NodeId: TypeAlias = str
SeqId: TypeAlias = str
LoanId: TypeAlias = str

DEVICE, HOST = TIERS = ("device", "host")  # the kinds of memory: where a shard computes, and what is kept behind it


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What two processes must agree on before one can answer the other's questions.

    `windows[layer]` is the sliding window of a layer in tokens, 0 where it sees everything;
    `scale` multiplies q.k; `soft_cap` is 0 or the bound of `cap * tanh(score / cap)`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32", "bfloat16" or "float16": K/V in blocks, and q, k, v, o on the wire
    scale: float
    windows: tuple[int, ...]
    soft_cap: float = 0.0

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.block_size * self.element_bytes

    @property
    def question_bytes(self) -> int:
        """Bytes one query row costs one remote node in one layer: q out, o and lse back."""
        return 2 * self.heads * self.head_dim * self.element_bytes + 4 * self.heads


@dataclass(frozen=True, slots=True)
class Model:
    """What a cluster serves; nodes pool only where it is the same.

    `max_position` tokens the model was made for (0: no limit known), `max_model_len` tokens of the longest request
    served, on which some rotary embeddings depend, `revision` a digest of config and weights.
    """

    name: str
    shape: AttentionShape
    max_position: int = 0
    max_model_len: int = 0
    revision: str = ""


def difference(ours: Model | AttentionShape, theirs: Model | AttentionShape) -> tuple[str, object, object] | None:
    """The first field in which two models, or two shapes, are not the same, with both its values."""
    for name in ours.__dataclass_fields__:
        one, other = getattr(ours, name), getattr(theirs, name)
        if one != other:
            return difference(one, other) if isinstance(one, AttentionShape) else (name, one, other)
    return None


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, stop) of one sequence live on `node`; start is a multiple of the block size."""

    node: NodeId
    start: int
    stop: int


Layout: TypeAlias = tuple[Span, ...]


class Chunk(NamedTuple):
    """Tokens [start, stop) of one sequence, computed in one pass. A decode is a chunk of one."""

    seq: SeqId
    start: int
    stop: int


class Grow(NamedTuple):
    """Reserve `blocks` blocks on `node` for tokens of `seq` from position `first` on."""

    seq: SeqId
    node: NodeId
    first: int
    blocks: int


class Stretch(NamedTuple):
    """Whole blocks of one sequence, side by side: `blocks` of them, for tokens from position `first` on."""

    seq: SeqId
    first: int
    blocks: int


class Move(NamedTuple):
    """Full, computed blocks of a running sequence go from `source` to `target`, for tokens from position `first` on."""

    seq: SeqId
    source: NodeId
    target: NodeId
    first: int
    blocks: int

    @property
    def stretch(self) -> Stretch:
        return Stretch(self.seq, self.first, self.blocks)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass, as decided: at most one chunk per sequence; `preempt` is disjoint from the chunks.

    `reuse`: blocks the home has already of sequences it admits. `short` is how many more blocks the step would have
    used had there been room: a wish to borrow.
    """

    id: int
    chunks: tuple[Chunk, ...] = ()
    grow: tuple[Grow, ...] = ()
    preempt: tuple[SeqId, ...] = ()
    admit: tuple[SeqId, ...] = ()
    reuse: tuple[Stretch, ...] = ()
    short: int = 0


class Part(NamedTuple):
    """One node's share of one chunk: answer query rows [start, stop), keep K/V rows [keep_start, keep_stop).

    All four are positions in the sequence, so a part costs the same few bytes whatever the context.
    An empty query range asks nothing; an empty keep range stores nothing. `holds` is how many blocks the asker believes
    the node has for positions below `stop`: a node that has others refuses, because its answer would be wrong.
    """

    seq: SeqId
    start: int
    stop: int
    keep_start: int
    keep_stop: int
    holds: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one node must do during one step. Ids increase; a node refuses an older plan.

    Blocks it is to `leave` are let go first. Those it is to `take` come to it layer by layer, and are seen by no
    question of this step; copies of those it is to `give` go out in the same way.
    """

    step: int
    grow: tuple[Grow, ...]
    parts: tuple[Part, ...]
    leave: tuple[Stretch, ...] = ()
    take: tuple[Stretch, ...] = ()
    give: tuple[Stretch, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A node as the ledger knows it. Law: used + lent <= blocks.

    `used` counts blocks held by the node's own sequences, `cached` unreferenced blocks kept for their
    prefix (they are room), `lent` blocks promised to others, `lendable` the cap on `lent`. Of two incarnations of
    one node the larger word was started later, and supersedes the other.
    """

    id: NodeId
    incarnation: str
    address: str  # of its gRPC services
    blocks: int
    lendable: int
    used: int = 0
    cached: int = 0
    lent: int = 0
    borrowed: int = 0
    serves: bool = True  # it has a shard: requests can be routed to it
    draining: bool = False
    running: int = 0
    waiting: int = 0
    wanted: int = 0  # blocks its queue asks for beyond what it holds
    lost: int = 0  # tokens of its sequences lost with another node since it started
    repaired: int = 0  # of those, tokens computed again
    tier: str = DEVICE  # what its blocks are made of

    @property
    def free(self) -> int:
        return self.blocks - self.used - self.lent

    @property
    def place(self) -> str:
        """The server it is on, as far as its address tells: nodes of one place have the quicker links between them."""
        return self.address.rpartition(":")[0]


@dataclass(frozen=True, slots=True)
class Loan:
    """Blocks of `lender` promised to `borrower`; it lapses at `until` unless renewed (seconds, monotonic)."""

    id: LoanId
    lender: NodeId
    borrower: NodeId
    blocks: int
    until: float
    used: int = 0
    recalled: int = 0  # blocks the lender wants back and has not got


@dataclass(frozen=True, slots=True)
class Refused:
    """A wish that was not granted, and why: a value, not an error."""

    reason: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """The sum of the events so far: who owns, lends and borrows, and where sequences live.

    `layouts` is keyed by home (the node whose shard runs the sequence and alone speaks for it), then by sequence.
    """

    epoch: int = 0
    nodes: Mapping[NodeId, Node] = field(default_factory=dict)
    loans: Mapping[LoanId, Loan] = field(default_factory=dict)
    layouts: Mapping[NodeId, Mapping[SeqId, Layout]] = field(default_factory=dict)


class TokenLogprob(NamedTuple):
    """A token's log-probability (natural, before penalties and temperature) and the likeliest tokens beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
