"""Merging parts of attention on a GPU: two parts from two holders, or the many of one question."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infinillm.kernels.reference import Table

ELEMENTS = 2048  # of o, per program: one row alone would be bound by dispatch
AT_ONCE = 16  # parts of a row


@triton.jit(do_not_specialize=["rows"])
def merge_rows(o_a, lse_a, o_b, lse_b, o, lse, rows, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of two parts o_a, o_b [rows, D], lse_a, lse_b [rows], made one."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM_PAD)
    here = r < rows
    a = tl.load(lse_a + r, mask=here, other=float("-inf"))
    b = tl.load(lse_b + r, mask=here, other=float("-inf"))
    top = tl.maximum(a, b)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp(a - pivot)
    b = tl.exp(b - pivot)
    both = a + b
    some = both > 0.0
    share = 1.0 / tl.where(some, both, 1.0)
    at = r[:, None] * DIM + d[None, :]
    mask = here[:, None] & (d[None, :] < DIM)
    x = tl.load(o_a + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(o_b + at, mask=mask, other=0.0).to(tl.float32)
    z = x * (a * share)[:, None] + y * (b * share)[:, None]
    tl.store(o + at, z.to(o.dtype.element_ty), mask=mask)
    ln = tl.where(some, pivot + tl.log(tl.where(some, both, 1.0)), float("-inf"))
    tl.store(lse + r, ln, mask=here)


@triton.jit(do_not_specialize=["tokens", "sequences", "parts", "chunk"])
def combine_rows(
    o_part, lse_part, o, lse, rows, spans, tokens, sequences, parts, chunk,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, FEW: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One row and head of o [T, H, D], lse [T, H], from its parts: rows t, t + T, ... of o_part [P * T, H, D], or where
    FEW, the parts that attend_few left (see there)."""
    t, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, step = t, tokens
    if FEW > 0:
        low, high = 0, sequences
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(rows + middle) <= t:
                low = middle
            else:
                high = middle
        row, start = tl.load(rows + low), tl.load(spans + low)
        parts = tl.cdiv(tl.load(spans + low + 1) - start, chunk)
        if (parts <= 1) | (tl.load(rows + low + 1) - row > FEW):
            return
        first, step = (start // chunk + low) * FEW + t - row, FEW
    d = tl.arange(0, DIM_PAD)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for base in range(0, parts, AT_ONCE):
        n = base + tl.arange(0, AT_ONCE)
        at = (first + n * step).to(tl.int64) * heads + head
        one = tl.load(lse_part + at, mask=n < parts, other=float("-inf"))
        x = tl.load(o_part + at[:, None] * DIM + d[None, :], mask=(n < parts)[:, None] & (d[None, :] < DIM), other=0.0)
        higher = tl.maximum(top, tl.max(one, 0))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(one - pivot)
        keep = tl.exp(top - pivot)
        acc = acc * keep + tl.sum(x * weight[:, None], 0)
        total = total * keep + tl.sum(weight, 0)
        top = higher
    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)
    out = t.to(tl.int64) * heads + head
    tl.store(o + out * DIM + d, acc.to(o.dtype.element_ty), mask=d < DIM)
    tl.store(lse + out, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")))


def rows_per_program(dim: int) -> int:
    """A power of two near ELEMENTS / dim."""
    return max(1, ELEMENTS // triton.next_power_of_2(dim))


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.merge; all contiguous."""
    o, lse = torch.empty_like(o_a), torch.empty_like(lse_a)
    rows, dim = lse.numel(), o.shape[-1]
    if rows:
        each = rows_per_program(dim)
        sizes = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "ROWS": each}
        merge_rows[(triton.cdiv(rows, each),)](o_a, lse_a, o_b, lse_b, o, lse, rows, **sizes, enable_fp_fusion=True)
    return o, lse


def combine(
    o_part: Tensor,
    lse_part: Tensor,
    o: Tensor,
    lse: Tensor,
    parts: int,
    table: Table | None = None,
    chunk: int = 1,
    few: int = 0,
) -> None:
    """`parts` parts o_part [P * T, H, D], lse_part [P * T, H], float32, into o [T, H, D] and lse [T, H].

    With `few` > 0 the parts are those of paged_triton.attend_few, and rows that have but one are left alone.
    """
    tokens, heads, dim = o.shape
    rows, spans = (lse, lse) if table is None else (table.rows, table.spans)
    sequences = 0 if table is None else table.rows.shape[0] - 1
    sizes = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "FEW": few, "AT_ONCE": AT_ONCE}
    combine_rows[(tokens, heads)](
        o_part, lse_part, o, lse, rows, spans, tokens, sequences, parts, chunk, **sizes, enable_fp_fusion=True
    )  # fmt: skip
