"""Questions to put to a body: pools with garbage where nobody wrote, tables, and one shape of everything."""

from typing import NamedTuple

import torch
from torch import Tensor

from infinillm.kernels.reference import Table

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    size: int


SHAPES = [
    Shape(9, 3, 64, 16),
    Shape(4, 4, 32, 8),
    Shape(32, 8, 128, 32),
    Shape(8, 1, 80, 16),
    Shape(6, 2, 16, 16),
    Shape(10, 2, 96, 64),
    Shape(7, 1, 256, 8),
    Shape(5, 5, 24, 16),
]
MASKS = [(0, 0.0), (7, 0.0), (40, 0.0), (0, 30.0), (9, 5.0)]


class Sequence(NamedTuple):
    """Positions asked from; positions of the blocks held, in blocks."""

    positions: list[int]
    held: list[int]


# A decode, a chunk on a hole, blocks only later than the row, no rows, scattered rows, a row far past what is
# held, a chunk from the start, a sequence of which nothing is held, and a long chunk.
SEQUENCES = [
    Sequence([37], [0, 1, 2, 3, 4]),
    Sequence(list(range(20, 53)), [0, 2, 3, 4, 5, 6]),
    Sequence([3], [16]),
    Sequence([], [0]),
    Sequence([5, 9, 30, 31], [0, 1, 2, 3]),
    Sequence([100], [0, 1]),
    Sequence(list(range(48)), [0, 1, 2, 3, 4, 5]),
    Sequence([2], []),
    Sequence(list(range(11, 140)), list(range(18))),
]


class Question(NamedTuple):
    q: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    table: Table


def ask(shape: Shape, sequences: list[Sequence], dtype: torch.dtype, seed: int, device: str = "cpu") -> Question:
    """A question over a shuffled pool; slots later than every row that could see them hold NaN.

    Even seeds lay K and V of each head side by side, as a store does; odd ones lay all K before all V.
    """
    make = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim, size = shape
    total = max(1, sum(len(s.held) for s in sequences))
    pool = torch.full((2, total + 3, kv_heads, size, dim), float("nan"))
    if seed % 2 == 0:
        pool = pool.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
    free = torch.randperm(total + 3, generator=make).tolist()
    rows, spans, positions, blocks, firsts = [0], [0], [], [], []
    for sequence in sequences:
        last = max(sequence.positions, default=-1)
        for at in sequence.held:
            block = free.pop()
            written = min(size, max(0, last + 1 - at * size))
            pool[:, block, :, :written] = torch.randn(2, kv_heads, written, dim, generator=make)
            blocks.append(block)
            firsts.append(at * size)
        positions += sequence.positions
        rows.append(len(positions))
        spans.append(len(blocks))
    table = Table(*(torch.tensor(x, dtype=torch.int32).to(device) for x in (rows, positions, spans, blocks, firsts)))
    pool = pool.to(dtype).to(device)
    q = torch.randn(len(positions), heads, dim, generator=make).to(dtype).to(device)
    return Question(q, pool[0], pool[1], table)


def widened(question: Question, dtype: torch.dtype = torch.float64) -> Question:
    """The same question, in more digits."""
    return question._replace(**{name: getattr(question, name).to(dtype) for name in ("q", "k_blocks", "v_blocks")})


def differ(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """The largest difference of two parts; infinite where one is empty and the other is not, or where there is NaN."""
    (o, lse), (other, other_lse) = ours, theirs
    if o.isnan().any() or lse.isnan().any() or not torch.equal(lse.isneginf(), other_lse.isneginf()):
        return float("inf")
    if o[lse.isneginf()].any():
        return float("inf")
    pairs = ((o, other), (lse.nan_to_num(neginf=0.0), other_lse.nan_to_num(neginf=0.0)))
    gaps = [(a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel()]
    return max(gaps, default=0.0)
