"""Every pair in wire.py, by round trips over random values, through bytes."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm import wire
from infinillm.core.request import Sampling
from infinillm.core.types import AttentionShape, Grow, Loan, Model, Node, Part, Plan, Span, Stretch, TokenLogprob
from infinillm.errors import BadRequest
from infinillm.protos import types_pb2

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
names = st.text(min_size=1, max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
floats32 = st.floats(width=32, allow_nan=False)
shapes = st.builds(
    AttentionShape,
    heads=st.integers(1, 128),
    kv_heads=st.integers(1, 128),
    head_dim=st.integers(1, 256),
    block_size=st.integers(1, 128),
    dtype=st.sampled_from(wire.DTYPES),
    scale=numbers,
    windows=st.lists(u32, max_size=80).map(tuple),
    soft_cap=numbers,
)
models = st.builds(Model, name=names, shape=shapes, max_position=u64, max_model_len=u64, revision=st.text(max_size=5))
spans = st.builds(lambda node, a, b: Span(node, min(a, b), max(a, b)), names, u64, u64)
nodes = st.builds(
    Node,
    id=names,
    incarnation=names,
    address=names,
    serves=st.booleans(),
    tier=st.sampled_from(["device", "host"]),
    draining=st.booleans(),
    running=u32,
    waiting=u32,
    **dict.fromkeys(("blocks", "lendable", "used", "cached", "lent", "borrowed", "wanted"), u64),
)
loans = st.builds(Loan, id=names, lender=names, borrower=names, blocks=u64, until=st.floats(0, 1e6), used=u64)
stretches = st.lists(st.builds(Stretch, seq=names, first=u64, blocks=u32), max_size=3).map(tuple)
plans = st.builds(
    Plan,
    step=u64,
    grow=st.lists(st.builds(Grow, seq=names, node=st.just(""), first=u64, blocks=u32), max_size=5).map(tuple),
    parts=st.lists(
        st.builds(Part, seq=names, start=u64, stop=u64, keep_start=u64, keep_stop=u64, holds=u32), max_size=5
    ).map(tuple),
    leave=stretches,
    take=stretches,
    give=stretches,
)
samplings = st.integers(0, 2**31 - 1).flatmap(
    lambda longest: st.builds(
        Sampling,
        max_tokens=st.just(longest),
        min_tokens=st.integers(0, longest),
        temperature=st.floats(0, 100),
        top_k=st.integers(-1, 2**31 - 1),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        repetition_penalty=st.floats(1e-3, 100),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5).map(
            lambda biases: tuple(sorted(biases.items()))
        ),
        stop_token_ids=st.lists(u32, max_size=5).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
    )
)
token_logprobs = st.builds(
    TokenLogprob,
    token=u32,
    logprob=floats32,
    top=st.lists(st.tuples(u32, floats32), max_size=20).map(tuple),
)


def sent(message: Any) -> Any:
    """The message as it comes out of the wire at the other end."""
    return type(message).FromString(message.SerializeToString())


@given(shapes)
def test_shape(shape: AttentionShape) -> None:
    assert wire.shape_from_wire(sent(wire.shape_to_wire(shape))) == shape


@given(models)
def test_model(model: Model) -> None:
    assert wire.model_from_wire(sent(wire.model_to_wire(model))) == model


@given(spans)
def test_span(span: Span) -> None:
    assert wire.span_from_wire(sent(wire.span_to_wire(span))) == span


@given(names, st.lists(spans, max_size=5).map(tuple))
def test_layout(sequence: str, layout: tuple[Span, ...]) -> None:
    assert wire.layout_from_wire(sent(wire.layout_to_wire(sequence, layout))) == (sequence, layout)


@given(nodes)
def test_node(node: Node) -> None:
    assert wire.node_from_wire(sent(wire.node_to_wire(node))) == node


@given(loans, st.floats(0, 1e6), st.floats(0, 1e6))
def test_loan_keeps_the_seconds_it_has_left_under_another_clock(loan: Loan, here: float, there: float) -> None:
    heard = wire.loan_from_wire(sent(wire.loan_to_wire(loan, here)), there)
    assert heard.until - there == pytest.approx(max(0.0, loan.until - here), abs=1e-6)
    assert (heard.id, heard.lender, heard.borrower, heard.blocks, heard.used) == (
        loan.id,
        loan.lender,
        loan.borrower,
        loan.blocks,
        loan.used,
    )


@given(plans)
def test_plan(plan: Plan) -> None:
    assert wire.plan_from_wire(sent(wire.plan_to_wire(plan))) == plan


@given(samplings)
def test_sampling(sampling: Sampling) -> None:
    assert wire.sampling_from_wire(sent(wire.sampling_to_wire(sampling))) == sampling


@given(token_logprobs)
def test_token_logprob(value: TokenLogprob) -> None:
    assert wire.token_logprob_from_wire(sent(wire.token_logprob_to_wire(value))) == value


def test_every_field_of_the_core_values_travels() -> None:
    for message, kind in (
        (types_pb2.Node, Node),
        (types_pb2.AttentionShape, AttentionShape),
        (types_pb2.Sampling, Sampling),
    ):
        assert set(message.DESCRIPTOR.fields_by_name) == set(kind.__dataclass_fields__), kind


SHAPE = types_pb2.AttentionShape(heads=1, kv_heads=1, head_dim=1, block_size=1, dtype="int8")
FOREVER = types_pb2.Loan(id="a", lender="b", borrower="c", seconds_left=float("inf"))


@pytest.mark.parametrize(
    ("field", "act"),
    [
        ("node", lambda: wire.span_from_wire(types_pb2.Span(start=0, stop=1))),
        ("spans", lambda: wire.span_from_wire(types_pb2.Span(node="a", start=2, stop=1))),
        ("sequence", lambda: wire.layout_from_wire(types_pb2.Layout())),
        ("incarnation", lambda: wire.node_from_wire(types_pb2.Node(id="a", address="b"))),
        ("tier", lambda: wire.node_from_wire(types_pb2.Node(id="a", address="b", incarnation="c", tier="tape"))),
        ("lender", lambda: wire.loan_from_wire(types_pb2.Loan(id="a", borrower="b"), 0.0)),
        ("heads", lambda: wire.shape_from_wire(types_pb2.AttentionShape())),
        ("dtype", lambda: wire.shape_from_wire(SHAPE)),
        ("seconds_left", lambda: wire.loan_from_wire(FOREVER, 0.0)),
        ("top_p", lambda: wire.sampling_from_wire(types_pb2.Sampling(repetition_penalty=1.0))),
        ("top_tokens", lambda: wire.token_logprob_from_wire(types_pb2.TokenLogprob(top_tokens=[1]))),
    ],
)
def test_what_cannot_be_is_refused_by_name(field: str, act: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        act()
    assert caught.value.field == field


def test_logprobs_travel_as_float32() -> None:
    value = wire.token_logprob_to_wire(TokenLogprob(1, -0.1))
    assert value.logprob == struct.unpack("f", struct.pack("f", -0.1))[0]
