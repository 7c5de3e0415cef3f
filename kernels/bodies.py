"""The table from device to body: which functions run attention, merge and the dense pieces there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from infinillm.kernels.few_rows import FewRows, Sizes
from infinillm.kernels.reference import Dense, Table


class Body(Protocol):
    """What every body offers; `infinillm.kernels.reference` says what each function means."""

    def write_blocks(self, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None: ...

    def attend_blocks(
        self,
        q: Tensor,
        k_blocks: Tensor,
        v_blocks: Tensor,
        table: Table,
        *,
        scale: float,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> tuple[Tensor, Tensor]: ...

    def merge(self, o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]: ...

    def copy_blocks(self, source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def few_rows(self, layers: Sequence[Dense], last_norm: Tensor, sizes: Sizes, half: int) -> FewRows | None:
        """Both halves of each layer as one call each, where this body has that and they fit; `half` is cos's width."""


@functools.cache
def body(device: torch.device, cache: Path | None = None) -> Body:
    """The fastest body this machine has for `device`; native code is built into `cache` once."""
    from infinillm.kernels import native, torch_body

    if device.type == "cuda":
        from infinillm.kernels import triton_body

        return triton_body
    if device.type != "cpu":
        raise ValueError(f"device must be cpu or cuda, not {device}")
    return native.load(cache) or torch_body
