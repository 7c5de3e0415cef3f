"""The K/V blocks of one device: one preallocated pool, written by slot and asked by table."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from infinillm.attention.partial import Partial
from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest
from infinillm.kernels.bodies import Body
from infinillm.kernels.reference import Table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


def build_table(
    positions: Sequence[Sequence[int]],
    holdings: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
) -> Table:
    """The table of one step: for each sequence, the positions of its rows, and its (blocks, firsts) held here.

    Rows are in the order given; `firsts` ascend and may have holes. Built once per step, used in every layer.
    """
    if len(positions) != len(holdings):
        raise BadRequest(f"{len(positions)} sequences ask but {len(holdings)} hold", field="holdings")
    rows, spans = [0], [0]
    at: list[int] = []
    blocks: list[int] = []
    firsts: list[int] = []
    for asked, (held, starts) in zip(positions, holdings, strict=True):
        if len(held) != len(starts):
            raise BadRequest(f"{len(held)} blocks have {len(starts)} firsts", field="holdings")
        at.extend(asked)
        blocks.extend(held)
        firsts.extend(starts)
        rows.append(len(at))
        spans.append(len(blocks))
    return Table(*(torch.tensor(ids, dtype=torch.int32, device=device) for ids in (rows, at, spans, blocks, firsts)))


class Store:
    """Blocks of all layers on one device. It knows slots and blocks, not sequences: who owns what is decided elsewhere.

    pool  [layers, 2, blocks, kv_heads, block_size, head_dim]  K at [:, 0], V at [:, 1]

    It may have no blocks at all: a worker that keeps nothing borrows all it needs.

    In memory a block's heads lie one after the other, K then V of each: attention reads it as one stream.
    """

    def __init__(self, shape: AttentionShape, blocks: int, device: torch.device, body: Body):
        if blocks < 0:
            raise BadRequest(f"a store cannot have {blocks} blocks", field="blocks")
        if shape.dtype not in DTYPES:
            raise BadRequest(f"dtype must be one of {', '.join(DTYPES)}, not {shape.dtype}", field="dtype")
        self.shape = shape
        self.blocks = blocks
        self.device = device
        self.dtype = DTYPES[shape.dtype]
        self.body = body
        size = (shape.layers, blocks, shape.kv_heads, 2, shape.block_size, shape.head_dim)
        ground = torch.empty(size, dtype=self.dtype, device=device)
        if device.type == "cpu":
            want_huge_pages(ground)
        ground.zero_()  # touched here, so that no page faults later
        self.pool = ground.permute(0, 3, 1, 2, 4, 5)
        self._whole = [list(layer) for layer in ground]
        self._layers = [(layer[0], layer[1]) for layer in self.pool]

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Keep rows k, v [T, K, D] of one layer at slots [T] int64 (block * block_size + offset)."""
        self.body.write_blocks(k, v, *self._layers[layer], slots)

    def attend(self, layer: int, q: Tensor, table: Table) -> Partial:
        """What this store knows about the rows q [T, H, D] of one layer."""
        shape = self.shape
        o, lse = self.body.attend_blocks(
            q, *self._layers[layer], table, scale=shape.scale, window=shape.windows[layer], soft_cap=shape.soft_cap
        )
        return Partial(o, lse)

    def whole(self, layer: int, blocks: Sequence[int]) -> list[Tensor]:
        """These blocks of one layer as they lie, each [kv_heads, 2, block_size, head_dim], contiguous: no copies."""
        held = self._whole[layer]
        return [held[block] for block in blocks]

    def copy(self, source: Store, source_blocks: Sequence[int], target_blocks: Sequence[int]) -> None:
        """Copy whole blocks, all layers, from another store of this shape (or from itself)."""
        if source.shape != self.shape:
            raise BadRequest("blocks can only be copied between stores of one shape", field="source")
        if len(source_blocks) != len(target_blocks):
            raise BadRequest(f"{len(source_blocks)} blocks into {len(target_blocks)}", field="target_blocks")
        source_ids = torch.tensor(source_blocks, dtype=torch.int64, device=source.device)
        target_ids = torch.tensor(target_blocks, dtype=torch.int64, device=self.device)
        self.body.copy_blocks(source.pool, self.pool, source_ids, target_ids)


def want_huge_pages(pool: Tensor) -> None:
    """Ask Linux to back the pool by huge pages; elsewhere, or when refused, nothing changes."""
    start = -(-pool.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (pool.data_ptr() + pool.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if length > 0 and madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
