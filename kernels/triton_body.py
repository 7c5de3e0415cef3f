"""The GPU body: attention and merge in Triton, the rest in torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from infinillm.kernels import merge_triton, paged_triton, reference
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


@functools.cache
def _processors(device: torch.device) -> int:
    """Programs that run at once; on a CPU, where Triton's interpreter runs, a few, so that splitting is tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def write_blocks(k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
    """See reference.write_blocks."""
    check_write(k, v, k_blocks, v_blocks, slots)
    reference.write_blocks(k, v, k_blocks, v_blocks, slots)


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
    wide = q.device.type == "cpu"
    return paged_triton.attend(q, k_blocks, v_blocks, table, scale, window, soft_cap, _processors(q.device), wide)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.merge."""
    check_merge(o_a, lse_a, o_b, lse_b)
    return merge_triton.merge(*(x.contiguous() for x in (o_a, lse_a, o_b, lse_b)))
