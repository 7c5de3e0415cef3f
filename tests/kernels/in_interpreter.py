"""The GPU body in Triton's interpreter; run by test_triton.py in a process where it is switched on."""

import functools

import pytest
import torch

from infinillm.kernels import merge_triton, paged_triton, reference, triton_body
from tests.kernels.questions import MASKS, SEQUENCES, SHAPES, TOLERANCE, Question, Sequence, Shape, ask, differ, widened

ROWS = 13  # of a chunk: with each group of heads here that many fill tiles, and the last one in part


def expected(question: Question, **how: float) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attend_blocks(*widened(question), **how)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [(SHAPES[n], MASKS[mask]) for n, mask in ((0, 0), (3, 0), (5, 2), (0, 1), (4, 3), (3, 4))],
)
def test_chunks_and_decodes_together(shape: Shape, mask: tuple[int, float]) -> None:
    window, soft_cap = mask
    few = [each._replace(positions=each.positions[:ROWS]) for each in SEQUENCES[:6] + SEQUENCES[7:8]]
    question = ask(shape, few, torch.float32, seed=1)
    how = {"scale": shape.dim**-0.5, "window": window, "soft_cap": soft_cap}
    assert differ(triton_body.attend_blocks(*question, **how), expected(question, **how)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(8, 2, 128, 32), Shape(2, 1, 256, 8), Shape(9, 3, 64, 64)])
def test_decodes(shape: Shape, dtype: torch.dtype) -> None:
    sequences = [Sequence([p], list(range(p // shape.size + 1))) for p in (70, 3, 150)] + [Sequence([9], [])]
    question = ask(shape, sequences, dtype, seed=2)
    assert differ(triton_body.attend_blocks(*question, scale=0.1), expected(question, scale=0.1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [0, 300])
def test_one_long_sequence_among_short_ones(window: int) -> None:
    """The long one is cut into units, and the short ones are not."""
    sequences = [Sequence([9], [0]), Sequence([1100], list(range(70))), Sequence([4], []), Sequence([30], [0, 1])]
    question = ask(Shape(4, 1, 64, 16), sequences, torch.float32, seed=3)
    how = {"scale": 0.1, "window": window}
    assert differ(triton_body.attend_blocks(*question, **how), expected(question, **how)) < 2e-5


@pytest.mark.parametrize("window", [0, 200])
def test_a_short_chunk_after_much_is_shared(window: int) -> None:
    """Beside a decode after as much, and one after nothing."""
    sequences = [
        Sequence([1200], list(range(80))),
        Sequence(list(range(1180, 1200)), list(range(75))),
        Sequence([7], []),
    ]
    question = ask(Shape(2, 1, 32, 16), sequences, torch.float32, seed=7)
    assert paged_triton.shared(4, 155 * 16 / 3, processors=4) > 1
    how = {"scale": 0.1, "window": window}
    assert differ(triton_body.attend_blocks(*question, **how), expected(question, **how)) < 2e-5


def test_as_many_rows_as_sequences_but_not_one_each() -> None:
    sequences = [Sequence([], [0]), *[Sequence([], [])] * 30, Sequence(list(range(400, 432)), list(range(27)))]
    question = ask(Shape(4, 2, 32, 16), sequences, torch.float32, seed=8)
    assert question.q.shape[0] == len(sequences)
    assert differ(triton_body.attend_blocks(*question, scale=0.2), expected(question, scale=0.2)) < 2e-5


def test_a_long_chunk() -> None:
    question = ask(Shape(4, 2, 32, 16), [Sequence(list(range(150, 200)), list(range(13)))], torch.float32, seed=4)
    assert differ(triton_body.attend_blocks(*question, scale=0.2), expected(question, scale=0.2)) < 2e-5


def test_nothing_at_all() -> None:
    shape = Shape(4, 2, 16, 8)
    for sequences in ([Sequence([3], [])], [Sequence([], [0])]):
        question = ask(shape, sequences, torch.float32, seed=5)
        assert differ(triton_body.attend_blocks(*question, scale=0.2), expected(question, scale=0.2)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 80])
def test_merging(dim: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(6)
    (o_a, o_b), (lse_a, lse_b) = torch.randn(2, 30, 3, dim, generator=make), torch.randn(2, 30, 3, generator=make) * 50
    for o, lse, row in ((o_a, lse_a, 0), (o_b, lse_b, 1), (o_a, lse_a, 2), (o_b, lse_b, 2)):
        o[row], lse[row] = 0, -torch.inf
    o_a, o_b = o_a.to(dtype), o_b.to(dtype)
    ours = triton_body.merge(o_a, lse_a, o_b, lse_b)
    assert differ(ours, reference.merge(o_a.double(), lse_a, o_b.double(), lse_b)) < TOLERANCE[dtype]
    assert torch.equal(ours[0][0], o_b[0])
    assert ours[1][2].isneginf().all()


def test_more_parts_than_are_read_at_once() -> None:
    """One of them empty, one that outweighs all before it; and a row of which all are empty."""
    make = torch.Generator().manual_seed(9)
    count = 2 * merge_triton.AT_ONCE + 3
    o_part, lse_part = torch.randn(count, 3, 2, 24, generator=make), torch.randn(count, 3, 2, generator=make)
    o_part[1], lse_part[1], lse_part[20] = 0, -torch.inf, 30
    o_part[:, 2], lse_part[:, 2] = 0, -torch.inf
    o, lse = torch.empty(3, 2, 24), torch.empty(3, 2)
    merge_triton.combine(o_part.flatten(0, 1), lse_part.flatten(0, 1), o, lse, count)
    parts = zip(o_part.double(), lse_part.double(), strict=True)
    assert differ((o, lse), functools.reduce(lambda a, b: reference.merge(*a, *b), parts)) < 2e-5
