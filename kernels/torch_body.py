"""A body of plain torch calls: what a CPU runs for long chunks, or for everything where nothing can be compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from infinillm.kernels import reference
from infinillm.kernels.checks import check_attend, check_merge, check_write
from infinillm.kernels.reference import (
    Table,
    add_rms_norm,
    copy_blocks,
    few_rows,
    gelu_tanh_mul,
    linear,
    rms_norm,
    rotate,
    silu_mul,
)

__all__ = [
    "add_rms_norm",
    "attend_blocks",
    "copy_blocks",
    "few_rows",
    "gelu_tanh_mul",
    "linear",
    "merge",
    "rms_norm",
    "rotate",
    "silu_mul",
    "write_blocks",
]

HELD_SCORES = 1 << 24  # most scores held in memory at once where there is a soft cap


def write_blocks(k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
    """See reference.write_blocks."""
    check_write(k, v, k_blocks, v_blocks, slots)
    reference.write_blocks(k, v, k_blocks, v_blocks, slots)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.merge."""
    check_merge(o_a, lse_a, o_b, lse_b)
    return reference.merge(o_a, lse_a, o_b, lse_b)


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
    """See reference.attend_blocks."""
    check_attend(q, k_blocks, v_blocks, table)
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    rows, spans = table.rows.tolist(), table.spans.tolist()
    for s in range(len(rows) - 1):
        r, e = slice(rows[s], rows[s + 1]), slice(spans[s], spans[s + 1])
        p = table.positions[r]
        attend_sequence(
            q[r], k_blocks, v_blocks, table.blocks[e], table.firsts[e], p, o[r], lse[r], scale, window, soft_cap
        )
    return o, lse


def attend_sequence(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    blocks: Tensor,
    firsts: Tensor,
    positions: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> None:
    """Attention of one sequence's rows, into o [T, H, D] and lse [T, H], which hold the empty part.

    What nobody sees is left out and the rest gathered; keys that every row sees go unmasked.
    """
    if not q.shape[0] or not blocks.numel():
        return
    size, low, high = k_blocks.shape[2], int(positions[0]), int(positions[-1])
    oldest = low - window + 1 if window > 0 else 0
    needed = (firsts <= high) & (firsts + size > oldest)
    at = (firsts[needed, None] + torch.arange(size, device=q.device, dtype=torch.int32)).flatten()
    start, past, stop = torch.searchsorted(
        at, torch.tensor([oldest, 0 if window > 0 else low + 1, high + 1], dtype=torch.int32, device=q.device)
    ).tolist()
    if start >= stop:
        return
    kept = blocks[needed].long()
    k, v = (x[kept].transpose(0, 1).flatten(1, 2) for x in (k_blocks, v_blocks))  # [K, S, D]
    if soft_cap > 0:
        step = max(1, HELD_SCORES // ((stop - start) * q.shape[1]))
        for first in range(0, q.shape[0], step):
            some = slice(first, first + step)
            seen = _seen(at[start:stop], positions[some], window)
            o[some], lse[some] = _capped(q[some], k[:, start:stop], v[:, start:stop], seen, scale, soft_cap)
        return
    parts = []
    if past > start:
        parts.append(_flash(q, k[:, start:past], v[:, start:past], scale, None, False))
    rest = slice(max(start, past), stop)
    if rest.start < rest.stop:
        count = rest.stop - rest.start
        square = count == q.shape[0] == high - low + 1 and int(at[rest.start]) == low and int(at[stop - 1]) == high
        causal = square and window == 0
        masked = None if causal else _seen(at[rest], positions, window)
        parts.append(_flash(q, k[:, rest], v[:, rest], scale, masked, causal))
    whole = parts[0] if len(parts) == 1 else reference.merge(*parts[0], *parts[1])
    o.copy_(whole[0])
    lse.copy_(whole[1])


def _seen(at: Tensor, positions: Tensor, window: int) -> Tensor:
    """[T, S] bool: which row sees which slot."""
    seen = at <= positions[:, None]
    return seen & (at > positions[:, None] - window) if window > 0 else seen


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's flash attention of q [T, H, D] over k, v [K, S, D]; a decode packs its group of heads as rows."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[0]
    mask = None if seen is None else torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    if mask is None and not causal:
        q_KGTD = q.view(tokens, kv_heads, -1, dim).transpose(0, 1).reshape(1, kv_heads, -1, dim)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_KGTD, k[None], v[None], scale=scale)
        o = o.view(kv_heads, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim)
        return o, lse.view(kv_heads, tokens, -1).transpose(0, 1).reshape(tokens, heads)
    group = (kv_heads, heads // kv_heads)
    q_KGTD = q.view(tokens, *group, dim).permute(1, 2, 0, 3)
    k_KGSD, v_KGSD = (x[:, None].expand(*group, -1, -1) for x in (k, v))
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGTD, k_KGSD, v_KGSD, is_causal=causal, attn_mask=mask, scale=scale
    )
    o, lse = o.permute(2, 0, 1, 3).reshape(tokens, heads, dim), lse.permute(2, 0, 1).reshape(tokens, heads)
    return o, lse if seen is None else lse.masked_fill(~seen.any(1)[:, None], float("-inf"))


def _capped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, soft_cap: float) -> tuple[Tensor, Tensor]:
    """Attention with a soft cap, scores in memory; q [T, H, D], k, v [K, S, D], seen [T, S]."""
    tokens, heads, dim = q.shape
    q_KMD = q.view(tokens, k.shape[0], -1, dim).transpose(0, 1).flatten(1, 2)
    score = torch.bmm(q_KMD.float(), k.transpose(1, 2).float()).mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    score.view(k.shape[0], tokens, -1, k.shape[1]).masked_fill_(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(score, -1, keepdim=True)
    weight = score.sub_(torch.where(lse.isneginf(), 0.0, lse)).exp_()
    o = torch.bmm(weight, v.float()).view(k.shape[0], tokens, -1, dim).transpose(0, 1)
    return o.reshape(tokens, heads, dim).to(q.dtype), lse.view(k.shape[0], tokens, -1).transpose(0, 1).flatten(1)
