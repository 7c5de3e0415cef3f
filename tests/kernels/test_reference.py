"""The definition itself, against a plain softmax in float64, and the laws of merging."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infinillm.kernels import reference
from infinillm.kernels.reference import Table
from tests.kernels.questions import MASKS, SEQUENCES, SHAPES, Question, Shape, ask, differ, widened


def plain(question: Question, scale: float, window: int, soft_cap: float) -> tuple[Tensor, Tensor]:
    """Attention one row and one head at a time, as a textbook has it."""
    q, k_blocks, v_blocks, table = question
    tokens, heads, dim = q.shape
    kv_heads, size = k_blocks.shape[1:3]
    o, lse = torch.zeros(tokens, heads, dim, dtype=torch.float64), torch.full((tokens, heads), -torch.inf).double()
    rows, spans = table.rows.tolist(), table.spans.tolist()
    for s in range(len(rows) - 1):
        slots = [
            (block, offset, first + offset)
            for block, first in zip(
                table.blocks[spans[s] : spans[s + 1]].tolist(),
                table.firsts[spans[s] : spans[s + 1]].tolist(),
                strict=True,
            )
            for offset in range(size)
        ]
        for t, h in itertools.product(range(rows[s], rows[s + 1]), range(heads)):
            p = int(table.positions[t])
            seen = [(b, i) for b, i, at in slots if at <= p and (window == 0 or at > p - window)]
            if seen:
                kv = h // (heads // kv_heads)
                score = torch.stack([q[t, h] @ k_blocks[b, kv, i] for b, i in seen]) * scale
                score = soft_cap * torch.tanh(score / soft_cap) if soft_cap else score
                o[t, h] = torch.softmax(score, 0) @ torch.stack([v_blocks[b, kv, i] for b, i in seen])
                lse[t, h] = torch.log(torch.exp(score).sum())
    return o, lse


@pytest.mark.parametrize(("window", "soft_cap"), MASKS)
def test_it_is_softmax_over_what_a_row_sees(window: int, soft_cap: float) -> None:
    question = widened(ask(Shape(4, 2, 8, 8), SEQUENCES[:-1], torch.float32, seed=1))
    ours = reference.attend_blocks(*question, scale=0.3, window=window, soft_cap=soft_cap)
    assert differ(ours, plain(question, 0.3, window, soft_cap)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_digits_stay_close(shape: Shape) -> None:
    question = ask(shape, SEQUENCES, torch.float32, seed=2)
    exact = reference.attend_blocks(*widened(question), scale=shape.dim**-0.5)
    assert differ(reference.attend_blocks(*question, scale=shape.dim**-0.5), exact) < 2e-5


def holders(table: Table, owner: list[int], count: int) -> list[Table]:
    """The tables of `count` holders, where entry e of the table belongs to holder owner[e]."""
    spans = table.spans.tolist()
    made = []
    for holder in range(count):
        mine = [[e for e in range(a, b) if owner[e] == holder] for a, b in itertools.pairwise(spans)]
        ends = list(itertools.accumulate(map(len, mine), initial=0))
        kept = torch.tensor([e for entries in mine for e in entries], dtype=torch.int64)
        made.append(
            table._replace(
                spans=torch.tensor(ends, dtype=torch.int32), blocks=table.blocks[kept], firsts=table.firsts[kept]
            )
        )
    return made


@settings(max_examples=60)
@given(data=st.data(), count=st.integers(1, 5), window=st.sampled_from([0, 9]), seed=st.integers(0, 10**6))
def test_any_split_in_any_order_is_the_whole(data: st.DataObject, count: int, window: int, seed: int) -> None:
    question = widened(ask(Shape(4, 2, 8, 8), SEQUENCES[:-1], torch.float32, seed))
    entries = question.table.blocks.shape[0]
    owner = data.draw(st.lists(st.integers(0, count - 1), min_size=entries, max_size=entries))
    parts = [
        reference.attend_blocks(*question[:3], table, scale=0.3, window=window)
        for table in holders(question.table, owner, count)
    ]
    parts = data.draw(st.permutations(parts))
    merged = functools.reduce(lambda a, b: reference.merge(*a, *b), parts)
    assert differ(merged, reference.attend_blocks(*question, scale=0.3, window=window)) < 1e-12
    paired = parts
    while len(paired) > 1:  # another tree of merges
        paired = [
            reference.merge(*paired[i], *paired[i + 1]) if i + 1 < len(paired) else paired[i]
            for i in range(0, len(paired), 2)
        ]
    assert differ(paired[0], merged) < 1e-12


@settings(max_examples=60)
@given(keys=st.integers(1, 9), cut=st.integers(0, 9), rows=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_one_key_and_odd_lengths(keys: int, cut: int, rows: int, seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 2, 5, generator=make, dtype=torch.float64) for n in (rows, keys, keys))

    def over(some: slice) -> tuple[Tensor, Tensor]:
        score = torch.einsum("thd,shd->ths", q, k[some])
        lse = torch.logsumexp(score, -1) if k[some].shape[0] else torch.full((rows, 2), -torch.inf).double()
        return torch.einsum("ths,shd->thd", torch.softmax(score, -1), v[some]), lse

    cut = min(cut, keys)
    assert differ(reference.merge(*over(slice(0, cut)), *over(slice(cut, keys))), over(slice(0, keys))) < 1e-12


def test_empty_is_the_identity_and_never_nan() -> None:
    make = torch.Generator().manual_seed(3)
    part = torch.randn(3, 2, 8, generator=make), torch.randn(3, 2, generator=make)
    empty = torch.zeros(3, 2, 8), torch.full((3, 2), -torch.inf)
    for merged in (reference.merge(*part, *empty), reference.merge(*empty, *part)):
        assert torch.equal(merged[0], part[0])
        assert torch.equal(merged[1], part[1])
    nothing = reference.merge(*empty, *empty)
    assert torch.equal(nothing[0], empty[0])
    assert torch.equal(nothing[1], empty[1])


def test_an_early_block_matters() -> None:
    """The oracle is not blind: changing the oldest key moves every row that sees it, and no other."""
    question = ask(Shape(4, 2, 8, 8), SEQUENCES[:1], torch.float32, seed=4)
    before = reference.attend_blocks(*question, scale=0.3)[0]
    question.k_blocks[int(question.table.blocks[0]), :, 0] += 3.0
    assert (reference.attend_blocks(*question, scale=0.3)[0] - before).abs().max() > 1e-3
    narrow = [reference.attend_blocks(*question, scale=0.3, window=5)[0] for _ in range(2)]
    assert torch.equal(*narrow)


def test_rotation_is_hugging_faces() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    make = torch.Generator().manual_seed(5)
    q, k = torch.randn(6, 4, 16, generator=make), torch.randn(6, 2, 16, generator=make)
    angle = torch.randn(6, 8, generator=make)
    cos, sin = (torch.cat([x, x], -1)[None] for x in (angle.cos(), angle.sin()))
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    reference.rotate(q, k, angle.cos(), angle.sin())
    for ours, other in zip((q, k), theirs, strict=True):
        assert torch.allclose(ours, other[0].transpose(0, 1), atol=1e-6)


def test_norms_are_hugging_faces() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    make = torch.Generator().manual_seed(6)
    x, weight = torch.randn(5, 32, generator=make), torch.randn(32, generator=make)
    for layer, plus_one in ((LlamaRMSNorm(32, eps=1e-5), False), (Gemma2RMSNorm(32, eps=1e-5), True)):
        layer.weight.data.copy_(weight)
        assert torch.allclose(reference.rms_norm(x, weight, 1e-5, plus_one), layer(x), atol=1e-6)
