"""The seam: what every body refuses, naming the tensor, before any arithmetic.

Each check is one quick expression; only when it fails is the culprit looked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infinillm.kernels.reference import Table

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))


def check_write(k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
    """Rows to store fit the pool of one layer."""
    _, kv_heads, _, dim = shape = _pool_shape(k_blocks)
    rows = (slots.shape[0], kv_heads, dim)
    if (
        k.dtype is v.dtype is k_blocks.dtype is v_blocks.dtype
        and k.dtype in FLOATS
        and slots.dtype is torch.int64
        and k.device == v.device == k_blocks.device == v_blocks.device == slots.device
        and v_blocks.shape == shape
        and k.shape == v.shape == rows
        and k.stride()[1:] == v.stride()[1:] == (dim, 1)
        and _tiled(k_blocks)
        and _tiled(v_blocks)
        and k_blocks.stride(1) == v_blocks.stride(1)
        and slots.is_contiguous()
    ):
        return
    _explain_pool(k_blocks, v_blocks)
    for name, x in (("k", k), ("v", v)):
        _explain(name, x, k_blocks, (slots.numel(), kv_heads, dim))
    _explain_ids("slots", slots, torch.int64, k_blocks)


def check_attend(q: Tensor, k_blocks: Tensor, v_blocks: Tensor, table: Table) -> None:
    """A question fits the pool, and the table fits the question."""
    check_question(q, k_blocks, v_blocks)
    check_table(q, table)


def check_question(q: Tensor, k_blocks: Tensor, v_blocks: Tensor) -> None:
    """A question fits the pool of one layer."""
    _, kv_heads, _, dim = shape = _pool_shape(k_blocks)
    if (
        q.dtype is k_blocks.dtype is v_blocks.dtype
        and q.dtype in FLOATS
        and q.device == k_blocks.device == v_blocks.device
        and v_blocks.shape == shape
        and q.stride()[1:] == (dim, 1)
        and q.shape[2] == dim
        and q.shape[1] % kv_heads == 0
        and _tiled(k_blocks)
        and _tiled(v_blocks)
        and k_blocks.stride(1) == v_blocks.stride(1)
    ):
        return
    _explain_pool(k_blocks, v_blocks)
    _explain("q", q, k_blocks, (q.shape[0], max(1, q.shape[1] // kv_heads) * kv_heads if q.dim() > 1 else 0, dim))


def check_table(q: Tensor, table: Table) -> None:
    """A table fits the question."""
    for name, ids in zip(Table._fields, table, strict=True):
        if ids.dtype is not torch.int32 or ids.dim() != 1 or not ids.is_contiguous() or ids.device != q.device:
            _explain_ids(f"table.{name}", ids, torch.int32, q)
    if table.positions.shape[0] != q.shape[0]:
        raise ValueError(f"table.positions must be [{q.shape[0]}], one for each row of q")
    if table.spans.shape != table.rows.shape or not table.rows.shape[0]:
        raise ValueError("table.spans must be as long as table.rows, one more than there are sequences")
    if table.firsts.shape != table.blocks.shape:
        raise ValueError("table.firsts must be as long as table.blocks")


def check_merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> None:
    """Two parts of the same rows."""
    shape = o_a.shape
    if (
        o_a.dtype is o_b.dtype
        and o_a.dtype in FLOATS
        and lse_a.dtype is lse_b.dtype is torch.float32
        and o_a.device == o_b.device == lse_a.device == lse_b.device
        and o_b.shape == shape
        and lse_a.shape == lse_b.shape == shape[:2]
        and len(shape) == 3
    ):
        return
    if o_a.dim() != 3:
        raise ValueError(f"o_a must be [T, H, D], not {tuple(shape)}")
    for name, o in (("o_a", o_a), ("o_b", o_b)):
        _explain(name, o, o_a, tuple(shape))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        _explain(name, lse, o_a, tuple(shape[:2]), torch.float32)


def check_alike(**tensors: Tensor) -> None:
    """Floating tensors of one dtype on one device; the first is the measure."""
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        if x.dtype is not first.dtype or x.dtype not in FLOATS or x.device != first.device:
            _explain(name, x, first, tuple(x.shape))


def _tiled(blocks: Tensor) -> bool:
    """Whether the slots of each head in each block are contiguous."""
    return blocks.stride()[2:] == (blocks.shape[3], 1)


def _pool_shape(k_blocks: Tensor) -> Sequence[int]:
    if k_blocks.dim() != 4:
        raise ValueError(f"k_blocks must be [N, K, B, D], not {tuple(k_blocks.shape)}")
    return k_blocks.shape


def _explain_pool(k_blocks: Tensor, v_blocks: Tensor) -> None:
    for name, blocks in (("k_blocks", k_blocks), ("v_blocks", v_blocks)):
        _explain(name, blocks, k_blocks, tuple(k_blocks.shape), rows=False)
        if not _tiled(blocks) or blocks.stride(1) != k_blocks.stride(1):
            raise ValueError(f"{name} must have its heads evenly apart, each contiguous, not strides {blocks.stride()}")


def _explain(
    name: str, x: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, rows: bool = True
) -> None:
    wanted = dtype or like.dtype
    if wanted not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {wanted}")
    if x.dtype is not wanted:
        raise TypeError(f"{name} must be {wanted}, not {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {x.device}")
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
    if rows and x[:1].numel() and not x[:1].is_contiguous():
        raise ValueError(f"{name} must have contiguous rows, not strides {x.stride()}")


def _explain_ids(name: str, ids: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    if ids.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, not {ids.dtype}")
    if ids.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {ids.device}")
    if ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(f"{name} must be one contiguous dimension, not {list(ids.shape)}")
