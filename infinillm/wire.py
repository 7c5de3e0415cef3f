"""Core values to protobuf and back; the one file that knows both.

Times do not travel (clocks differ): a loan says how many seconds it has left, so its pair takes `now`. A plan travels
to the node it is for, so its `Grow.node` is empty on arrival. A value that cannot be is refused here with BadRequest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import fields

from infinillm.core.cost import Cost, from_plain, to_plain
from infinillm.core.moves import Wish
from infinillm.core.names import NAME_BYTES
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.request import Sampling
from infinillm.core.types import (
    TIERS,
    AttentionShape,
    Grow,
    Layout,
    Loan,
    Model,
    Node,
    NodeId,
    Part,
    Plan,
    SeqId,
    Span,
    Stretch,
    TokenLogprob,
)
from infinillm.errors import BadRequest
from infinillm.protos import controller_pb2, pool_pb2, shard_pb2, types_pb2

DTYPES = ("float32", "bfloat16", "float16")


def _named(field: str, value: str) -> str:
    if not value:
        raise BadRequest(f"{field} must be set", field=field)
    return value


# --- shapes and models --------------------------------------------------------------------------------------------


def shape_to_wire(shape: AttentionShape) -> types_pb2.AttentionShape:
    return types_pb2.AttentionShape(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        dtype=shape.dtype,
        scale=shape.scale,
        windows=shape.windows,
        soft_cap=shape.soft_cap,
    )


def shape_from_wire(message: types_pb2.AttentionShape) -> AttentionShape:
    for field in ("heads", "kv_heads", "head_dim", "block_size"):
        if getattr(message, field) < 1:
            raise BadRequest(f"{field} must be at least 1", field=field)
    if message.dtype not in DTYPES:
        raise BadRequest(f"dtype must be one of {', '.join(DTYPES)}, not {message.dtype!r}", field="dtype")
    return AttentionShape(
        heads=message.heads,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        dtype=message.dtype,
        scale=message.scale,
        windows=tuple(message.windows),
        soft_cap=message.soft_cap,
    )


def model_to_wire(model: Model) -> controller_pb2.Model:
    return controller_pb2.Model(
        name=model.name,
        shape=shape_to_wire(model.shape),
        max_position=model.max_position,
        max_model_len=model.max_model_len,
        revision=model.revision,
    )


def model_from_wire(message: controller_pb2.Model) -> Model:
    return Model(
        _named("name", message.name),
        shape_from_wire(message.shape),
        message.max_position,
        message.max_model_len,
        message.revision,
    )


# --- places -------------------------------------------------------------------------------------------------------


def span_to_wire(span: Span) -> types_pb2.Span:
    return types_pb2.Span(node=span.node, start=span.start, stop=span.stop)


def span_from_wire(message: types_pb2.Span) -> Span:
    if message.start > message.stop:
        raise BadRequest(f"a span cannot start at {message.start} and stop at {message.stop}", field="spans")
    return Span(_named("node", message.node), message.start, message.stop)


def layout_to_wire(sequence: SeqId, layout: Layout, home: NodeId = "") -> types_pb2.Layout:
    return types_pb2.Layout(sequence=sequence, spans=[span_to_wire(span) for span in layout], home=home)


def layout_from_wire(message: types_pb2.Layout) -> tuple[SeqId, Layout]:
    return _named("sequence", message.sequence), tuple(span_from_wire(span) for span in message.spans)


# --- nodes and loans ----------------------------------------------------------------------------------------------

_NODE_FIELDS = tuple(Node.__dataclass_fields__)  # the same names on the wire; a test holds them together


def node_to_wire(node: Node) -> types_pb2.Node:
    return types_pb2.Node(**{name: getattr(node, name) for name in _NODE_FIELDS})


def node_from_wire(message: types_pb2.Node) -> Node:
    for name in ("id", "incarnation", "address"):
        _named(name, getattr(message, name))
    if message.tier not in TIERS:
        raise BadRequest(f"tier must be one of {', '.join(TIERS)}, not {message.tier!r}", field="tier")
    return Node(**{name: getattr(message, name) for name in _NODE_FIELDS})


def loan_to_wire(loan: Loan, now: float) -> types_pb2.Loan:
    return types_pb2.Loan(
        id=loan.id,
        lender=loan.lender,
        borrower=loan.borrower,
        blocks=loan.blocks,
        seconds_left=max(0.0, loan.until - now),
        used=loan.used,
        recalled=loan.recalled,
    )


def loan_from_wire(message: types_pb2.Loan, now: float) -> Loan:
    for name in ("id", "lender", "borrower"):
        _named(name, getattr(message, name))
    if not math.isfinite(message.seconds_left):
        raise BadRequest("seconds_left must be a finite number", field="seconds_left")
    until = now + message.seconds_left
    return Loan(message.id, message.lender, message.borrower, message.blocks, until, message.used, message.recalled)


# --- plans --------------------------------------------------------------------------------------------------------


def plan_to_wire(plan: Plan) -> pool_pb2.Plan:
    return pool_pb2.Plan(
        step=plan.step,
        grow=[pool_pb2.Grow(sequence=g.seq, first=g.first, blocks=g.blocks) for g in plan.grow],
        parts=[
            pool_pb2.Part(
                sequence=p.seq,
                start=p.start,
                stop=p.stop,
                keep_start=p.keep_start,
                keep_stop=p.keep_stop,
                holds=p.holds,
            )
            for p in plan.parts
        ],
        leave=stretches_to_wire(plan.leave),
        take=stretches_to_wire(plan.take),
        give=stretches_to_wire(plan.give),
    )


def plan_from_wire(message: pool_pb2.Plan) -> Plan:
    return Plan(
        message.step,
        tuple(Grow(g.sequence, "", g.first, g.blocks) for g in message.grow),
        tuple(Part(p.sequence, p.start, p.stop, p.keep_start, p.keep_stop, p.holds) for p in message.parts),
        stretches_from_wire(message.leave),
        stretches_from_wire(message.take),
        stretches_from_wire(message.give),
    )


def stretches_to_wire(stretches: Iterable[Stretch]) -> list[pool_pb2.Stretch]:
    return [pool_pb2.Stretch(sequence=s.seq, first=s.first, blocks=s.blocks) for s in stretches]


def stretches_from_wire(messages: Iterable[pool_pb2.Stretch]) -> tuple[Stretch, ...]:
    return tuple(Stretch(m.sequence, m.first, m.blocks) for m in messages)


def names_to_wire(seq: SeqId, first: int, names: Iterable[bytes]) -> pool_pb2.Names:
    return pool_pb2.Names(sequence=seq, first=first, names=b"".join(names))


def names_from_wire(message: pool_pb2.Names, block_size: int) -> tuple[SeqId, dict[int, bytes]]:
    """The sequence, and its names by position."""
    packed, size = message.names, NAME_BYTES
    if len(packed) % size or message.first % block_size:
        raise BadRequest(f"names have {size} bytes each, and begin with a block", field="names")
    named = (packed[at : at + size] for at in range(0, len(packed), size))
    return _named("sequence", message.sequence), {message.first + i * block_size: name for i, name in enumerate(named)}


def move_to_wire(order: MoveBlocks, address: str) -> controller_pb2.MoveBlocks:
    """`address` is the target's."""
    return controller_pb2.MoveBlocks(
        sequence=order.seq,
        source=order.source,
        target=order.target,
        target_address=address,
        blocks=order.blocks,
        reason=order.reason,
    )


def move_from_wire(message: controller_pb2.MoveBlocks, home: NodeId) -> MoveBlocks:
    return MoveBlocks(home, message.sequence, message.source, message.target, message.blocks, message.reason)


def wish_to_wire(wish: Wish, block_size: int) -> shard_pb2.Moving:
    _, source, target, first, blocks = wish.move
    stop = first + blocks * block_size
    return shard_pb2.Moving(source=source, target=target, start=first, stop=stop, reason=wish.reason)


def cost_to_wire(cost: Cost) -> str:
    return json.dumps(to_plain(cost))


def cost_from_wire(text: str) -> Cost:
    try:
        return from_plain(json.loads(text))
    except ValueError as error:
        raise BadRequest(f"the profile is not JSON: {error}", field="profile") from None


# --- sampling -----------------------------------------------------------------------------------------------------

SAMPLING_NUMBERS = tuple(f.name for f in fields(Sampling) if isinstance(f.default, int | float))
SAMPLING_OPTIONS = tuple(f.name for f in fields(Sampling) if f.default is None)  # numbers that may be unset


def sampling_to_wire(sampling: Sampling) -> types_pb2.Sampling:
    return types_pb2.Sampling(
        **{name: getattr(sampling, name) for name in (*SAMPLING_NUMBERS, *SAMPLING_OPTIONS)},
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=sampling.stop_token_ids,
    )


def sampling_from_wire(message: types_pb2.Sampling) -> Sampling:
    """Every field counts as written: a shard is told everything, so there is nothing to fill in. Biases come sorted."""
    given = {name: getattr(message, name) for name in SAMPLING_OPTIONS if message.HasField(name)}
    return Sampling(
        **{name: getattr(message, name) for name in SAMPLING_NUMBERS},
        **given,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def token_logprob_to_wire(value: TokenLogprob) -> types_pb2.TokenLogprob:
    return types_pb2.TokenLogprob(
        token=value.token,
        logprob=value.logprob,
        top_tokens=[token for token, _ in value.top],
        top_logprobs=[logprob for _, logprob in value.top],
    )


def token_logprob_from_wire(message: types_pb2.TokenLogprob) -> TokenLogprob:
    if len(message.top_tokens) != len(message.top_logprobs):
        raise BadRequest("top_tokens and top_logprobs must be equally long", field="top_tokens")
    return TokenLogprob(
        message.token,
        message.logprob,
        tuple(zip(message.top_tokens, message.top_logprobs, strict=True)),
    )
