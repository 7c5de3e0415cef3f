"""Paged attention with its log-sum-exp on a GPU: few rows of a sequence, cut over its keys, and chunks of many.

Theory of operation. The G query heads of a K/V head are packed as rows of one tile, so that every key is read once and
the tensor cores have rows to work on: a tile is BLOCK_Q rows of one sequence, times G heads, padded to BLOCK_M. Keys go
by BLOCK_N, whatever the block size: each lane looks its block up. The host knows sizes, never contents, so nothing here
waits for the device, and nothing that changes from step to step is a compile-time constant.

`attend_few` is for sequences whose rows fit one tile of 16, decodes above all. Work is cut by entries, `chunk` of them
a unit, so that one long sequence among many short ones is shared by the whole device: sequence s owns units from
spans[s] // chunk + s on, and each program finds its own by bisection. `attend_many` is for longer chunks: sequence s
owns tiles from rows[s] // BLOCK_Q + s on, and where tiles are too few to fill the device the entries of each are shared
by several programs. Both leave parts that merge_triton.combine makes one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infinillm.kernels.merge_triton import combine
from infinillm.kernels.reference import Table

LOG2_E = 1.4426950408889634
FEWEST_KEYS = 256  # a unit with less to read costs more than it saves
UNITS = 8  # per processor, so that the last ones to finish are a small share


class Tiling(NamedTuple):
    """How a question is cut into programs: rows of a tile, keys at once, warps, stages of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tiling(rows_per_sequence: float, group: int, dim: int, element_bytes: int) -> Tiling:
    """The tiling for sequences with that many query rows on average; a row of K/V bounds what fits."""
    least = max(16, triton.next_power_of_2(group))
    if element_bytes == 4:  # no tensor cores: small tiles, or registers spill
        return Tiling(least, 32, 4, 2)
    wide = dim > 128
    if rows_per_sequence * group <= 16:
        return Tiling(least, 32 if wide else 64, 4, 3)
    if wide:
        return Tiling(max(64, least), 32, 8, 2)
    if rows_per_sequence * group <= 64:
        return Tiling(max(64, least), 32, 4, 3)
    return Tiling(max(128, least), 64, 8, 3)


@triton.jit
def _first_at_or_after(firsts, start, stop, position):
    """The first entry of an ascending run whose first position is not below `position`."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if tl.load(firsts + middle) < position:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _owner(ends, sequences, unit, size):
    """The sequence that owns `unit`, where sequence s owns those from ends[s] // size + s on."""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(ends + middle) // size + middle <= unit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _answer(
    q, k, v, o, lse, o_part, lse_part, positions, blocks, firsts,
    row, row_stop, kv, start, stop, share, shares, alone, part_row,
    q_stride, k_stride, v_stride, head_stride, scale, soft_cap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NARROW: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile from `row` on over the entries that fall to `share` of `shares`; into o, lse where `alone`, else a part.

    NARROW skips entries that no row of the tile sees; WIDE multiplies in float32, as Triton's interpreter must.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM_PAD)
    n = tl.arange(0, BLOCK_N)
    mine = row + m // GROUP
    head = kv * GROUP + m % GROUP
    valid = (m < BLOCK_Q * GROUP) & (mine < row_stop)
    p = tl.load(positions + mine, mask=valid, other=-1)
    newest = tl.max(p, 0)
    if NARROW:
        if WINDOWED:
            oldest = tl.min(tl.where(valid, p, 2147483647), 0) - window + 1
            start = _first_at_or_after(firsts, start, stop, oldest - SIZE + 1)
        stop = _first_at_or_after(firsts, start, stop, newest + 1)
    each = tl.maximum(tl.cdiv(stop - start, shares), tl.cdiv(BLOCK_N, SIZE))
    start = start + share * each
    stop = tl.minimum(start + each, stop)

    q_at = q + mine[:, None].to(tl.int64) * q_stride + head[:, None] * DIM + d[None, :]
    q_MD = tl.load(q_at, mask=valid[:, None] & (d[None, :] < DIM), other=0.0)
    if WIDE:
        q_MD = q_MD.to(tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)

    keys = tl.maximum(stop - start, 0) * SIZE
    for base in range(0, keys, BLOCK_N):
        entry = start + (base + n) // SIZE
        offset = (base + n) % SIZE
        held = entry < stop
        block = tl.load(blocks + entry, mask=held, other=0).to(tl.int64)
        at = tl.load(firsts + entry, mask=held, other=1073741824) + offset
        written = held & (at <= newest)
        within = kv * head_stride + offset * DIM
        k_at = k + (block * k_stride + within)[None, :] + d[:, None]
        k_DN = tl.load(k_at, mask=written[None, :] & (d[:, None] < DIM), other=0.0)
        v_at = v + (block * v_stride + within)[:, None] + d[None, :]
        v_ND = tl.load(v_at, mask=written[:, None] & (d[None, :] < DIM), other=0.0)
        if WIDE:
            k_DN = k_DN.to(tl.float32)
            v_ND = v_ND.to(tl.float32)
        score = tl.dot(q_MD, k_DN, input_precision="ieee") * scale
        if CAPPED:  # scores count powers of two: cap * tanh(x / cap) in natural units
            natural = score * (0.6931471805599453 / soft_cap)
            score = soft_cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp(2.0 * natural) + 1.0))
        seen = written[None, :] & (at[None, :] <= p[:, None])
        if WINDOWED:
            seen = seen & (at[None, :] > p[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - pivot[:, None])
        keep = tl.exp2(top - pivot)
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None] + tl.dot(weight.to(v_ND.dtype), v_ND, input_precision="ieee")
        top = higher

    some = total > 0.0
    ln = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
    acc = acc / tl.where(some, total, 1.0)[:, None]
    mask = valid[:, None] & (d[None, :] < DIM)
    if alone:
        out = mine.to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(lse + out, ln, mask=valid)
        tl.store(o + out[:, None] * DIM + d[None, :], acc.to(o.dtype.element_ty), mask=mask)
    else:
        out = (part_row + m // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(lse_part + out, ln, mask=valid)
        tl.store(o_part + out[:, None] * DIM + d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["window", "sequences", "chunk", "only"])
def attend_few(
    q, k, v, o, lse, o_part, lse_part, rows, positions, spans, blocks, firsts,
    q_stride, k_stride, v_stride, head_stride, scale, soft_cap, window, sequences, chunk, only,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One unit of entries and one K/V head. o_part [units * BLOCK_Q, H, D], lse_part [units * BLOCK_Q, H].

    A sequence with more than BLOCK_Q rows is left to attend_many, or where `only` this runs, to its first unit.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    unit, kv = tl.program_id(0), tl.program_id(1)
    s = _owner(spans, sequences, unit, chunk)
    start = tl.load(spans + s)
    stop = tl.load(spans + s + 1)
    share = unit - (start // chunk + s)
    shares = tl.maximum(tl.cdiv(stop - start, chunk), 1)
    first_row = tl.load(rows + s)
    row_stop = tl.load(rows + s + 1)
    if row_stop - first_row > BLOCK_Q:
        shares = only
    if share >= shares:
        return
    for row in range(first_row, row_stop, BLOCK_Q):
        _answer(
            q, k, v, o, lse, o_part, lse_part, positions, blocks, firsts,
            row, row_stop, kv, start, stop, share, shares, shares == 1, unit * BLOCK_Q,
            q_stride, k_stride, v_stride, head_stride, scale, soft_cap, window,
            KV_HEADS, GROUP, DIM, DIM_PAD, SIZE, BLOCK_M, BLOCK_N, WINDOWED, WINDOWED, CAPPED, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window", "sequences", "tokens", "few"])
def attend_many(
    q, k, v, o, lse, o_part, lse_part, rows, positions, spans, blocks, firsts,
    q_stride, k_stride, v_stride, head_stride, scale, soft_cap, window, sequences, tokens, few,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile, one K/V head and one share of its entries. o_part [shares, T, H, D], lse_part [shares, T, H].

    A sequence with no more than `few` rows is left to attend_few.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most: they go first
    kv, share, shares = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    s = _owner(rows, sequences, tile, BLOCK_Q)
    first_row = tl.load(rows + s)
    row_stop = tl.load(rows + s + 1)
    row = first_row + (tile - (first_row // BLOCK_Q + s)) * BLOCK_Q
    if (row >= row_stop) | (row_stop - first_row <= few):
        return
    _answer(
        q, k, v, o, lse, o_part, lse_part, positions, blocks, firsts,
        row, row_stop, kv, tl.load(spans + s), tl.load(spans + s + 1), share, shares, shares == 1, share * tokens + row,
        q_stride, k_stride, v_stride, head_stride, scale, soft_cap, window,
        KV_HEADS, GROUP, DIM, DIM_PAD, SIZE, BLOCK_M, BLOCK_N, True, WINDOWED, CAPPED, WIDE,
    )  # fmt: skip


def attend(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    table: Table,
    scale: float,
    window: int,
    soft_cap: float,
    processors: int,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """See reference.attend_blocks. `processors` is how many of them the device has; `wide` as in `_answer`."""
    tokens, heads, dim = q.shape
    kv_heads, size = k_blocks.shape[1:3]
    sequences, entries = table.rows.shape[0] - 1, table.blocks.shape[0]
    o = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if not tokens or not entries:
        return o.zero_(), lse.fill_(float("-inf"))
    group = heads // kv_heads
    strides = q.stride(0), k_blocks.stride(0), v_blocks.stride(0), k_blocks.stride(1)
    asked = (*table, *strides, scale * LOG2_E, soft_cap, window, sequences)
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "DIM_PAD": max(16, triton.next_power_of_2(dim))}
    sizes |= {"SIZE": size, "WINDOWED": window > 0, "CAPPED": soft_cap > 0, "WIDE": wide}

    def launch(
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        part: tuple[Tensor, Tensor],
        last: tuple[int, int],
        cut: Tiling,
    ) -> None:
        kernel[grid](
            q, k_blocks, v_blocks, o, lse, *part, *asked, *last, **sizes, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
            num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=True,
        )  # fmt: skip

    low = tiling(1, group, dim, q.element_size())
    few = low.block_m // group
    if tokens != sequences:
        cut = tiling(tokens / sequences, group, dim, q.element_size())
        tiles = tokens // (cut.block_m // group) + sequences
        shares = shared(tiles * kv_heads, entries * size / sequences, processors)
        part = parts(shares * tokens if shares > 1 else 0, q)
        launch(attend_many, (tiles, kv_heads, shares), part, (tokens, few), cut)
        if shares > 1:
            combine(*part, o, lse, shares)
    # after the others: their combining wrote these rows too
    chunk = max(triton.cdiv(FEWEST_KEYS, size), triton.cdiv(entries * kv_heads, UNITS * processors))
    units = entries // chunk + sequences
    part = parts(units * few if entries > chunk else 0, q)
    launch(attend_few, (units, kv_heads), part, (chunk, int(tokens == sequences)), low)
    if entries > chunk:
        combine(*part, o, lse, 0, table, chunk, few)
    return o, lse


def parts(rows: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for that many rows of parts, o [rows, H, D] and lse [rows, H], both float32."""
    shape = (rows, *q.shape[1:])
    made = (torch.empty(x, dtype=torch.float32, device=q.device) for x in (shape, shape[:2]))
    return next(made), next(made)


def shared(programs: int, keys: float, processors: int) -> int:
    """Into how many the keys of a tile are shared, a power of two: enough to fill the device, none too short."""
    wanted = min(2 * processors / max(1, programs), keys / FEWEST_KEYS)
    return 1 << max(0, int(wanted).bit_length() - 1) if wanted >= 2 else 1
