"""Every CPU body against the definition, from one table of shapes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from infinillm.kernels import bodies, native, reference, torch_body
from infinillm.kernels.bodies import Body
from tests.kernels.questions import MASKS, SEQUENCES, SHAPES, TOLERANCE, Question, Sequence, Shape, ask, differ, widened

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["torch", "native"])
def body(request: pytest.FixtureRequest) -> Body:
    if request.param == "torch":
        return torch_body
    found = native.load(None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def expected(question: Question, **how: float) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attend_blocks(*widened(question), **how)


@pytest.mark.parametrize(("window", "soft_cap"), MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(body: Body, shape: Shape, dtype: torch.dtype, window: int, soft_cap: float) -> None:
    question = ask(shape, SEQUENCES, dtype, seed=1)
    how = {"scale": shape.dim**-0.5, "window": window, "soft_cap": soft_cap}
    o, lse = body.attend_blocks(*question, **how)
    assert (o.dtype, lse.dtype, o.shape) == (dtype, torch.float32, question.q.shape)
    assert differ((o, lse), expected(question, **how)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 900])
def test_long_sequences_cut_between_threads(body: Body, threads: int, dtype: torch.dtype, window: int) -> None:
    sequences = [Sequence([4000], list(range(251))), Sequence(list(range(1900, 2000)), list(range(125)))]
    sequences += [Sequence([i], list(range(i // 16 + 1))) for i in (5, 700, 1, 1500)]
    question = ask(Shape(9, 3, 64, 16), sequences, dtype, seed=threads)
    how = {"scale": 0.125, "window": window}
    assert differ(body.attend_blocks(*question, **how), expected(question, **how)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 112])
def test_every_number_of_queries(body: Body, group: int, rows: int) -> None:
    question = ask(
        Shape(2 * group, 2, 32, 8), [Sequence(list(range(40, 40 + rows)), list(range(10)))], torch.float32, 7
    )
    assert differ(body.attend_blocks(*question, scale=0.2), expected(question, scale=0.2)) < 2e-5


def test_scores_too_large_for_a_float_s_exp(body: Body) -> None:
    question = ask(Shape(4, 2, 32, 8), SEQUENCES, torch.float32, seed=8)
    question = question._replace(q=question.q * 100)
    o, lse = body.attend_blocks(*question, scale=1.0)
    other, other_lse = expected(question, scale=1.0)
    assert torch.allclose(o.double(), other, atol=1e-3)
    assert torch.allclose(lse.double(), other_lse, rtol=1e-5)


def test_rows_of_a_wider_tensor(body: Body) -> None:
    question = ask(Shape(4, 2, 32, 8), SEQUENCES, torch.float32, seed=9)
    wide = torch.zeros(question.q.shape[0], 3, 4, 32)
    wide[:, 1] = question.q
    strided = question._replace(q=wide[:, 1])
    assert differ(body.attend_blocks(*strided, scale=0.2), body.attend_blocks(*question, scale=0.2)) < 1e-6


def test_a_table_changes_from_step_to_step(body: Body) -> None:
    """Whatever a body remembers of a table, another table with the same shapes is another table."""
    shape = Shape(4, 2, 32, 8)
    first, second = (ask(shape, [Sequence([p], [0, 1, 2])], torch.float32, seed=10) for p in (9, 20))
    for _ in range(2):
        for question in (first, second):
            assert differ(body.attend_blocks(*question, scale=0.2), expected(question, scale=0.2)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_ask_at_once(body: Body, dtype: torch.dtype) -> None:
    """As a worker's own step and its answers to others do, each with its own table."""
    questions = [ask(Shape(6, 2, 64, 16), SEQUENCES[i : i + 8], dtype, seed=20 + i) for i in (0, 1)]
    answers = [expected(question, scale=0.2) for question in questions]

    def often(i: int) -> float:
        return max(differ(body.attend_blocks(*questions[i], scale=0.2), answers[i]) for _ in range(30))

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(often, (0, 1))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_writing(body: Body, shape: Shape, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(11)
    pools = [torch.zeros(2, 5, shape.kv_heads, shape.size, shape.dim, dtype=dtype) for _ in range(2)]
    qkv = torch.randn(7, shape.kv_heads * 3, shape.dim, generator=make).to(dtype)
    k, v = qkv[:, : shape.kv_heads], qkv[:, shape.kv_heads : 2 * shape.kv_heads]
    slots = torch.randperm(5 * shape.size, generator=make)[:7]
    reference.write_blocks(k, v, *pools[0], slots)
    body.write_blocks(k, v, *pools[1], slots)
    assert torch.equal(*pools)
    assert pools[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 24, 64])
def test_merging(body: Body, dtype: torch.dtype, dim: int) -> None:
    make = torch.Generator().manual_seed(12)
    (o_a, o_b), (lse_a, lse_b) = torch.randn(2, 6, 3, dim, generator=make), torch.randn(2, 6, 3, generator=make) * 50
    for o, lse, row in ((o_a, lse_a, 0), (o_b, lse_b, 1), (o_a, lse_a, 2), (o_b, lse_b, 2)):
        o[row], lse[row] = 0, -torch.inf
    o_a, o_b = o_a.to(dtype), o_b.to(dtype)
    theirs = reference.merge(o_a.double(), lse_a, o_b.double(), lse_b)
    ours = body.merge(o_a, lse_a, o_b, lse_b)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    assert differ(ours, theirs) < TOLERANCE[dtype]
    assert torch.equal(ours[0][0], o_b[0])  # the identity is exact
    assert torch.equal(ours[1][1], lse_a[1])
    assert not ours[0][2].any()
    assert ours[1][2].isneginf().all()


def test_copying(body: Body) -> None:
    make = torch.Generator().manual_seed(13)
    source, target = torch.randn(3, 2, 6, 2, 8, 16, generator=make), torch.zeros(3, 2, 4, 2, 8, 16)
    body.copy_blocks(source, target, torch.tensor([5, 0]), torch.tensor([1, 3]))
    assert torch.equal(target[:, :, 1], source[:, :, 5])
    assert torch.equal(target[:, :, 3], source[:, :, 0])
    assert not target[:, :, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 16, 200])
@pytest.mark.parametrize("width", [16, 48, 100, 576])
def test_dense_pieces(body: Body, tokens: int, width: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(14)
    x, residual = torch.randn(2, tokens, width, generator=make).to(dtype)
    weight, gate_up = torch.randn(width, generator=make).to(dtype), torch.randn(tokens, 2 * width, generator=make) * 30
    gate_up = gate_up.to(dtype)

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.dtype == dtype
        assert torch.allclose(ours.double(), theirs.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    for plus_one in (False, True):
        close(body.rms_norm(x, weight, 1e-5, plus_one), reference.rms_norm(x.double(), weight.double(), 1e-5, plus_one))
        normed, total = body.add_rms_norm(x, residual, weight, 1e-5, plus_one)
        close(total, x.double() + residual.double())
        close(normed, reference.rms_norm(total.double(), weight.double(), 1e-5, plus_one))
    close(body.silu_mul(gate_up), reference.silu_mul(gate_up.double()))
    close(body.gelu_tanh_mul(gate_up), reference.gelu_tanh_mul(gate_up.double()))
    for features in (5, 16, 37, 96):
        matrix = (torch.randn(features, width, generator=make) / width**0.5).to(dtype)
        for bias in (None, torch.randn(features, generator=make).to(dtype)):
            theirs = reference.linear(x.double(), matrix.double(), None if bias is None else bias.double())
            close(body.linear(x, matrix, bias), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (64, 16), (80, 16), (24, 12), (32, 8)])
def test_rotation(body: Body, dim: int, half: int, dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(15)
    qkv = torch.randn(9, 10, dim, generator=make).to(dtype)
    cos, sin = torch.randn(2, 9, half, generator=make)
    wide = qkv.double()
    reference.rotate(wide[:, :6], wide[:, 6:8], cos.double(), sin.double())
    body.rotate(qkv[:, :6], qkv[:, 6:8], cos, sin)
    assert torch.allclose(qkv.double(), wide, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_table_of_bodies() -> None:
    cpu = torch.device("cpu")
    assert bodies.body(cpu) is bodies.body(cpu)
    with pytest.raises(ValueError, match="cpu or cuda"):
        bodies.body(torch.device("meta"))
