"""The CPU body: compiled C++ reached through ctypes."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from infinillm.kernels import torch_body
from infinillm.kernels.build import build
from infinillm.kernels.checks import check_alike, check_merge, check_question, check_table, check_write
from infinillm.kernels.few_rows import LANES, FewRows, Sizes, fits
from infinillm.kernels.reference import Dense, Table

if TYPE_CHECKING:
    from infinillm.kernels.bodies import Body

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
QUESTION = struct.Struct("@10P5q7i2f")  # Question, as in attention.cpp
LONG = 64  # query rows from which torch's bfloat16 attention, on matrix units, is faster
MOST_BLOCK = 256  # slots of a block; as in attention.cpp
MOST_TOKENS = {torch.float32: 16, torch.bfloat16: 8, torch.float16: 8}  # rows of a linear; torch's is faster beyond


class Walk(NamedTuple):
    """A table as the native walk takes it, kept alive with what points into it; torch answers the `long` chunks."""

    asked: Table
    walked: Table
    pointers: tuple[int, ...]
    long: list[tuple[slice, slice]]  # rows, entries


class Native:
    """The functions of reference.py over one loaded library."""

    def __init__(self, library: ctypes.CDLL):
        self._attend = _bind(library.attend_blocks, c_int, c_int, c_char_p)
        self._merge = _bind(library.merge_parts, None, c_int, *[c_void_p] * 6, c_int64, c_int)
        self._write = _bind(library.write_blocks, c_int, *[c_void_p] * 5, *[c_int64] * 7, c_int, c_int, c_int64)
        self._norm = _bind(
            library.rms_norm, None, c_int, *[c_void_p] * 5, *[c_int64] * 3, c_int, c_int, c_float, c_float
        )
        self._rotate = _bind(library.rotate_pair, None, c_int, *[c_void_p] * 4, *[c_int64] * 3, *[c_int] * 5)
        self._gate = _bind(library.gate_mul, None, c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int)
        self._linear = _bind(library.linear_rows, None, c_int, *[c_void_p] * 4, c_int64, c_int, c_int64, c_int, c_int)
        self._enter = _bind(library.enter_layer, None, c_int, *[c_void_p] * 8, *[c_int] * 3)
        self._leave = _bind(library.leave_layer, None, c_int, *[c_void_p] * 6, *[c_int] * 2)
        self._read = _bind(library.read_floats, c_float, c_void_p, c_int64, c_int)
        self._last: Walk | None = None
        self._tiles = torch.cpu._is_amx_tile_supported()

    copy_blocks = staticmethod(torch_body.copy_blocks)

    def write_blocks(self, k: Tensor, v: Tensor, k_blocks: Tensor, v_blocks: Tensor, slots: Tensor) -> None:
        """See reference.write_blocks."""
        check_write(k, v, k_blocks, v_blocks, slots)
        blocks, heads, size, dim = k_blocks.shape
        item = k.element_size()
        wrong = self._write(
            k.data_ptr(),
            v.data_ptr(),
            k_blocks.data_ptr(),
            v_blocks.data_ptr(),
            slots.data_ptr(),
            slots.shape[0],
            k.stride(0) * item,
            v.stride(0) * item,
            k_blocks.stride(0) * item,
            v_blocks.stride(0) * item,
            k_blocks.stride(1) * item,
            blocks,
            heads,
            size,
            dim * item,
        )
        if wrong:
            raise ValueError(f"slots must lie in a pool of {blocks * size}")

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
    ) -> tuple[Tensor, Tensor]:
        """See reference.attend_blocks."""
        check_question(q, k_blocks, v_blocks)
        blocks, kv_heads, size, dim = k_blocks.shape
        if dim % LANES or size > MOST_BLOCK:
            return torch_body.attend_blocks(q, k_blocks, v_blocks, table, scale=scale, window=window, soft_cap=soft_cap)
        walk = self._walk(q, table, soft_cap)
        tokens, heads, _ = q.shape
        o = torch.empty((tokens, heads, dim), dtype=q.dtype)
        lse = torch.empty((tokens, heads), dtype=torch.float32)
        question = QUESTION.pack(
            q.data_ptr(),
            k_blocks.data_ptr(),
            v_blocks.data_ptr(),
            o.data_ptr(),
            lse.data_ptr(),
            *walk.pointers,
            q.stride(0),
            k_blocks.stride(0),
            v_blocks.stride(0),
            k_blocks.stride(1),
            blocks,
            table.rows.shape[0] - 1,
            heads,
            kv_heads,
            dim,
            size,
            window,
            torch.get_num_threads(),
            scale,
            soft_cap,
        )
        if self._attend(CODES[q.dtype], question):
            raise ValueError(f"table.blocks must lie in a pool of {blocks}")
        for r, e in walk.long:
            held, firsts, positions = table.blocks[e], table.firsts[e], table.positions[r]
            torch_body.attend_sequence(
                q[r], k_blocks, v_blocks, held, firsts, positions, o[r], lse[r], scale, window, soft_cap
            )
        return o, lse

    def _walk(self, q: Tensor, table: Table, soft_cap: float) -> Walk:
        """The last table is remembered, as every layer of a step asks with it.

        Long bfloat16 chunks go to torch where there are matrix units. Of those the native walk sees no entries, so it
        leaves the empty part there.
        """
        last = self._last
        if last is not None and last.asked is table and table.positions.shape[0] == q.shape[0]:
            return last
        check_table(q, table)
        long: list[tuple[slice, slice]] = []
        walked = table
        if self._tiles and q.dtype is torch.bfloat16 and soft_cap == 0 and q.shape[0] >= LONG:
            rows, spans = table.rows.tolist(), table.spans.tolist()
            bounds = zip(itertools.pairwise(rows), itertools.pairwise(spans), strict=True)
            cuts = [(slice(*r), slice(*e)) for r, e in bounds]
            long = [(r, e) for r, e in cuts if r.stop - r.start >= LONG]
            kept = [range(0) if r.stop - r.start >= LONG else range(e.start, e.stop) for r, e in cuts]
            entries = torch.tensor(list(itertools.chain.from_iterable(kept)), dtype=torch.int64)
            ends = torch.tensor([0, *itertools.accumulate(map(len, kept))], dtype=torch.int32)
            walked = table._replace(spans=ends, blocks=table.blocks[entries], firsts=table.firsts[entries])
        self._last = made = Walk(table, walked, tuple(ids.data_ptr() for ids in walked), long)
        return made

    def merge(self, o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        """See reference.merge."""
        check_merge(o_a, lse_a, o_b, lse_b)
        tokens, heads, dim = o_a.shape
        if dim % LANES or not all(x.is_contiguous() for x in (o_a, lse_a, o_b, lse_b)):
            return torch_body.merge(o_a, lse_a, o_b, lse_b)
        o, lse = torch.empty_like(o_a), torch.empty_like(lse_a)
        self._merge(
            CODES[o_a.dtype],
            o_a.data_ptr(),
            lse_a.data_ptr(),
            o_b.data_ptr(),
            lse_b.data_ptr(),
            o.data_ptr(),
            lse.data_ptr(),
            tokens * heads,
            dim,
        )
        return o, lse

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
        """See reference.rms_norm."""
        check_alike(x=x, weight=weight)
        rows, width = x.shape
        if width % LANES or x.stride(1) != 1 or weight.shape != (width,):
            return torch_body.rms_norm(x, weight, eps, plus_one)
        normed = torch.empty((rows, width), dtype=x.dtype)
        self._norm(
            CODES[x.dtype],
            x.data_ptr(),
            None,
            weight.data_ptr(),
            normed.data_ptr(),
            None,
            rows,
            x.stride(0),
            0,
            width,
            torch.get_num_threads(),
            eps,
            float(plus_one),
        )
        return normed

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See reference.add_rms_norm."""
        check_alike(x=x, residual=residual, weight=weight)
        rows, width = x.shape
        if width % LANES or not x.stride(1) == residual.stride(1) == 1 or weight.shape != (width,):
            return torch_body.add_rms_norm(x, residual, weight, eps, plus_one)
        if residual.shape != x.shape:
            raise ValueError(f"residual must be {list(x.shape)}, not {list(residual.shape)}")
        normed = torch.empty((rows, width), dtype=x.dtype)
        total = torch.empty((rows, width), dtype=x.dtype)
        self._norm(
            CODES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            total.data_ptr(),
            rows,
            x.stride(0),
            residual.stride(0),
            width,
            torch.get_num_threads(),
            eps,
            float(plus_one),
        )
        return normed, total

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """See reference.rotate."""
        check_alike(q=q, k=k)
        tokens, heads, dim = q.shape
        half = cos.shape[1]
        rows = q.stride()[1:] == (dim, 1) == k.stride()[1:]
        if half % LANES or not rows or cos.dtype is not torch.float32 or not cos.is_contiguous() & sin.is_contiguous():
            return torch_body.rotate(q, k, cos, sin)
        if k.shape[0] != tokens or k.shape[2] != dim or not cos.shape == sin.shape == (tokens, half) or 2 * half > dim:
            raise ValueError(f"k, cos and sin must fit q {list(q.shape)}")
        self._rotate(
            CODES[q.dtype],
            q.data_ptr(),
            k.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            tokens,
            q.stride(0),
            k.stride(0),
            heads,
            k.shape[1],
            dim,
            half,
            torch.get_num_threads(),
        )
        return None

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See reference.silu_mul."""
        return self._gated(0, gate_up)

    def gelu_tanh_mul(self, gate_up: Tensor) -> Tensor:
        """See reference.gelu_tanh_mul."""
        return self._gated(1, gate_up)

    def _gated(self, act: int, gate_up: Tensor) -> Tensor:
        check_alike(gate_up=gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if width % LANES or gate_up.stride(1) != 1:
            return (torch_body.gelu_tanh_mul if act else torch_body.silu_mul)(gate_up)
        out = torch.empty((rows, width), dtype=gate_up.dtype)
        self._gate(
            CODES[gate_up.dtype],
            act,
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            gate_up.stride(0),
            width,
            torch.get_num_threads(),
        )
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See reference.linear."""
        tokens, width = x.shape
        features = weight.shape[0]
        if (
            not 0 < tokens <= MOST_TOKENS.get(x.dtype, 0)
            or width % LANES
            or features < LANES
            or not weight.is_contiguous()
        ):
            return torch_body.linear(x, weight, bias)
        if x.stride(1) != 1 or (bias is not None and not bias.is_contiguous()):
            return torch_body.linear(x, weight, bias)
        check_alike(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
        if weight.shape[1] != width or (bias is not None and bias.shape != (features,)):
            raise ValueError(f"weight and bias must fit x {list(x.shape)}, not {list(weight.shape)}")
        out = torch.empty((tokens, features), dtype=x.dtype)
        self._linear(
            CODES[x.dtype],
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            tokens,
            features,
            width,
            torch.get_num_threads(),
        )
        return out

    def few_rows(self, layers: Sequence[Dense], last_norm: Tensor, sizes: Sizes, half: int) -> FewRows | None:
        """See bodies.Body."""
        if last_norm.dtype not in MOST_TOKENS or not fits(layers, last_norm, sizes, half):
            return None
        dtype = last_norm.dtype
        return FewRows(self._enter, self._leave, CODES[dtype], layers, last_norm, sizes, MOST_TOKENS[dtype])

    def read(self, x: Tensor) -> float:
        """Read x, contiguous float32, as fast as memory goes, with torch's threads: the benchmarks' yardstick."""
        return float(self._read(x.data_ptr(), x.numel(), torch.get_num_threads()))


def _bind(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


def load(cache: Path | None) -> Body | None:
    """The native body, built if need be; None where nothing can be compiled."""
    library = build(cache)
    return Native(library) if library else None
