"""Both halves of a decoder layer as one native call each: for few rows, many small calls cost as much as the work."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infinillm.kernels.reference import Dense

LANES = 16  # widths must be multiples
SIZES = struct.Struct("@6i2f")  # Sizes, as in dense.cpp
LAYER = struct.Struct(f"@{len(Dense._fields)}P")  # Dense, as in dense.cpp
ACTIVATIONS = ("silu", "gelu_tanh")


class Sizes(NamedTuple):
    """What the layers of a model share. `activation` is one of ACTIVATIONS, `plus_one` as in reference.rms_norm."""

    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    eps: float
    plus_one: bool


class FewRows:
    """The layers of one model, for up to `most` rows: `enter` before attention, `leave` after it.

    The weights are held by pointer: they stay where they are for as long as this lives.
    """

    def __init__(
        self,
        enter: Callable[..., None],
        leave: Callable[..., None],
        code: int,
        layers: Sequence[Dense],
        last_norm: Tensor,
        sizes: Sizes,
        most: int,
    ):
        self.most = most
        self._enter, self._leave, self._code = enter, leave, code
        self._held = (layers, last_norm)
        self._dtype = last_norm.dtype
        self._heads, self._kv_heads, self._dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        hidden, inner = layers[0].qkv.shape[1], layers[0].down.shape[1]
        act = ACTIVATIONS.index(sizes.activation)
        packed = SIZES.pack(
            hidden, inner, sizes.heads, sizes.kv_heads, sizes.head_dim, act, sizes.eps, float(sizes.plus_one)
        )
        pointers = b"".join(LAYER.pack(*(0 if x is None else x.data_ptr() for x in layer)) for layer in layers)
        self._ground = ctypes.create_string_buffer(packed + pointers)
        self._sizes = ctypes.addressof(self._ground)
        self._layers = [self._sizes + SIZES.size + n * LAYER.size for n in range(len(layers))]
        self._next_norms = [*(layer.attention_norm.data_ptr() for layer in layers[1:]), last_norm.data_ptr()]

    def enter(self, n: int, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Layer n up to its attention: y [T, E] normalised, cos and sin [T, R / 2] float32; all contiguous.

        Returns q [T, H, D] and k, v [T, K, D], after RoPE.
        """
        rows, dim, dtype = y.shape[0], self._dim, self._dtype
        q = torch.empty((rows, self._heads, dim), dtype=dtype)
        k = torch.empty((rows, self._kv_heads, dim), dtype=dtype)
        v = torch.empty((rows, self._kv_heads, dim), dtype=dtype)
        self._enter(
            self._code,
            self._layers[n],
            self._sizes,
            y.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            rows,
            cos.shape[1],
            torch.get_num_threads(),
        )
        return q, k, v

    def leave(self, n: int, o: Tensor, x: Tensor, y: Tensor) -> None:
        """Layer n from its attention on: o [T, H, D]; all contiguous.

        The residual x [T, E] becomes that of the next layer, and y [T, E] what that one reads, normalised.
        """
        self._leave(
            self._code,
            self._layers[n],
            self._sizes,
            self._next_norms[n],
            o.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            o.shape[0],
            torch.get_num_threads(),
        )


def fits(layers: Sequence[Dense], last_norm: Tensor, sizes: Sizes, half: int) -> bool:
    """Whether the native layers can take these; `half` is the width of cos and sin."""
    hidden, inner = layers[0].qkv.shape[1], layers[0].down.shape[1]
    widths = (hidden, inner, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim, half, sizes.head_dim)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    matrices = ((queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner))
    return (
        all(width and width % LANES == 0 for width in widths)
        and 2 * half <= sizes.head_dim
        and sizes.activation in ACTIVATIONS
        and all(
            (layer.qkv.shape, layer.out.shape, layer.gate_up.shape, layer.down.shape) == matrices for layer in layers
        )
        and all(x.is_contiguous() and x.dtype is last_norm.dtype for x in _tensors(layers))
    )


def _tensors(layers: Sequence[Dense]) -> list[Tensor]:
    return [x for layer in layers for x in layer if x is not None]
