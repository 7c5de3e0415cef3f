"""The definition of attention over blocks and of the dense pieces, in plain torch: every other body must agree with it.

Legend of shape suffixes: T query tokens, H query heads, G = H / K query heads per K/V head, K K/V heads,
D head dimension, N blocks in the pool, B token slots per block, S sequences, E table entries.

Laws: `lse` is float32, natural logarithm, [T, H], and -inf where a row saw nothing (its `o` is then 0).
`merge` is commutative and associative up to rounding, and an empty part is its exact identity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """Which query rows look at which blocks.

    rows       [S + 1] int32  rows of sequence s are q[rows[s]:rows[s + 1]]
    positions  [T]     int32  position of each query row in its sequence
    spans      [S + 1] int32  entries of sequence s are blocks[spans[s]:spans[s + 1]]
    blocks     [E]     int32  a block of the pool
    firsts     [E]     int32  position of that block's first slot, ascending within a sequence
    """

    rows: Tensor
    positions: Tensor
    spans: Tensor
    blocks: Tensor
    firsts: Tensor


class Dense(NamedTuple):
    """The weights of one decoder layer with one MLP; None for what a model lacks.

    qkv [(H + 2K) * D, E] holds rows of q, then k, then v; gate_up [2F, E] the gate, then up; out [E, H * D];
    down [E, F]; each bias is as long as its matrix has rows; norms are [E], those of q and k [D].
    """

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    mlp_post_norm: Tensor | None


def write_blocks(k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
    """Store rows of K and V where `slots` says.

    k, v                [T, K, D]     the pool's dtype
    k_blocks, v_blocks  [N, K, B, D]  the pool of one layer, changed in place
    slots               [T] int64     block * B + offset
    """
    size = k_blocks.shape[2]
    block, offset = slots // size, slots % size
    k_blocks[block, :, offset] = k
    v_blocks[block, :, offset] = v


def attend_blocks(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    table: Table,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of every query row over the K/V its sequence has in this pool.

    A row at position p sees slots at positions <= p and, where `window` > 0, > p - window. Slots nobody
    wrote lie at later positions, so they are never seen, whatever bytes they hold.

    q                   [T, H, D]     the pool's dtype
    k_blocks, v_blocks  [N, K, B, D]
    returns o [T, H, D] in q's dtype and lse [T, H] float32.
    Source: Infinite-LLM section 4 (DistAttention), with (o, lse) in place of (MA, m, e).
    """
    tokens, heads, dim = q.shape
    kv_heads, size = k_blocks.shape[1], k_blocks.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = torch.zeros(tokens, heads, dim, dtype=wide, device=q.device)
    lse = torch.full((tokens, heads), float("-inf"), dtype=wide, device=q.device)
    rows, spans = table.rows.tolist(), table.spans.tolist()
    for s in range(len(rows) - 1):
        r, e = slice(rows[s], rows[s + 1]), slice(spans[s], spans[s + 1])
        if r.start == r.stop or e.start == e.stop:
            continue
        blocks = table.blocks[e].long()
        at = (table.firsts[e].long()[:, None] + torch.arange(size, device=q.device)).flatten()
        p = table.positions[r].long()
        seen = at[None, :] <= p[:, None]
        if window > 0:
            seen &= at[None, :] > p[:, None] - window
        k = k_blocks[blocks].transpose(1, 2).reshape(-1, kv_heads, dim).to(wide)
        v = v_blocks[blocks].transpose(1, 2).reshape(-1, kv_heads, dim).to(wide)
        used = seen.any(0)
        k, v, seen = k[used], v[used], seen[:, used]
        if not seen.shape[1]:
            continue
        q_TKGD = q[r].to(wide).reshape(-1, kv_heads, heads // kv_heads, dim)
        score = torch.einsum("tkgd,skd->tkgs", q_TKGD, k) * scale
        if soft_cap > 0:
            score = soft_cap * torch.tanh(score / soft_cap)
        score = score.masked_fill(~seen[:, None, None, :], float("-inf"))
        total = torch.logsumexp(score, -1)
        weight = torch.exp(score - torch.where(total.isneginf(), 0.0, total)[..., None])
        o[r] = torch.einsum("tkgs,skd->tkgd", weight, v).reshape(-1, heads, dim)
        lse[r] = total.reshape(-1, heads)
    return o.to(q.dtype), lse.to(torch.float32) if q.dtype != torch.float64 else lse


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the same rows' attention, made one.

    o_a, o_b      [T, H, D]
    lse_a, lse_b  [T, H] float32
    returns o in o_a's dtype and lse float32; empty with empty is empty, never NaN.
    """
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top.isneginf(), 0.0, top)
    a, b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    both = a + b
    share = torch.where(both > 0, both, 1.0)
    o = o_a * (a / share)[..., None].to(lse_a.dtype) + o_b * (b / share)[..., None].to(lse_a.dtype)
    return o.to(o_a.dtype), torch.log(both) + top


def copy_blocks(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """Copy whole blocks, all layers, between pools [layers, 2, N, K, B, D] of one dtype.

    source_ids, target_ids  [M] int64
    """
    target[:, :, target_ids] = source[:, :, source_ids].to(target.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """x [T, E] divided by its root mean square, times weight [E] (times 1 + weight where `plus_one`)."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    gain = weight.to(wide.dtype) + 1 if plus_one else weight.to(wide.dtype)
    return (normed * gain).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself; all [T, E]."""
    total = x + residual
    return rms_norm(total, weight, eps, plus_one), total


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding of the first R dimensions, in place, halves apart ("neox" order).

    q [T, H, D], k [T, K, D]; cos, sin [T, R / 2] float32
    """
    half = cos.shape[-1]
    c, s = cos[:, None], sin[:, None]
    for x in (q, k):
        a, b = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
        x[..., :half], x[..., half : 2 * half] = (a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate_up [T, 2F] holds gate in its first half; returns [T, F]."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate), tanh form, times up, where gate_up [T, 2F] holds gate first; returns [T, F]."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, E] times weight [F, E] transposed, plus bias [F]; returns [T, F]."""
    return torch.nn.functional.linear(x, weight, bias)


def few_rows(layers: object, last_norm: Tensor, sizes: object, half: int) -> None:
    """No body need have halves of layers of its own: they mean what the pieces above mean, one after the other."""
