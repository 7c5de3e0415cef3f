"""Both halves of a layer as one native call against the same halves written out in float64."""

import pytest
import torch
from torch import Tensor

from infinillm.kernels import native, reference
from infinillm.kernels.few_rows import FewRows, Sizes
from infinillm.kernels.native import Native
from infinillm.kernels.reference import Dense
from tests.kernels.questions import TOLERANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HIDDEN, INNER, HALF = 96, 160, 16
LLAMA = Sizes(6, 2, 32, "silu", 1e-5, False)
WIDE_HEADS = Sizes(4, 4, 48, "silu", 1e-6, False)
GEMMA = Sizes(6, 2, 32, "gelu_tanh", 1e-6, True)


@pytest.fixture(scope="module")
def body() -> Native:
    found = native.load(None)
    if found is None:
        pytest.skip("no C++ compiler")
    assert isinstance(found, Native)
    return found


def layer(sizes: Sizes, make: torch.Generator, dtype: torch.dtype, biases: bool, qk_norm: bool, post: bool) -> Dense:
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim

    def matrix(rows: int, width: int) -> Tensor:
        return (torch.randn(rows, width, generator=make) / width**0.5).to(dtype)

    def vector(wanted: bool, width: int) -> Tensor | None:
        return torch.randn(width, generator=make).to(dtype) if wanted else None

    def norm(width: int) -> Tensor:
        return (torch.rand(width, generator=make) + 0.5).to(dtype)

    return Dense(
        norm(HIDDEN),
        matrix(queries + 2 * keys, HIDDEN),
        vector(biases, queries + 2 * keys),
        norm(sizes.head_dim) if qk_norm else None,
        norm(sizes.head_dim) if qk_norm else None,
        matrix(HIDDEN, queries),
        vector(biases, HIDDEN),
        norm(HIDDEN) if post else None,
        norm(HIDDEN),
        matrix(2 * INNER, HIDDEN),
        vector(biases, 2 * INNER),
        matrix(HIDDEN, INNER),
        vector(biases, HIDDEN),
        norm(HIDDEN) if post else None,
    )


def enter(layer: Dense, sizes: Sizes, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    qkv = reference.linear(y, layer.qkv, layer.qkv_bias).view(y.shape[0], -1, sizes.head_dim)
    q, k, v = qkv.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), 1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = reference.rms_norm(q, layer.q_norm, sizes.eps, sizes.plus_one)
        k = reference.rms_norm(k, layer.k_norm, sizes.eps, sizes.plus_one)
    reference.rotate(q, k, cos, sin)
    return q, k, v


def leave(layer: Dense, sizes: Sizes, o: Tensor, x: Tensor, next_norm: Tensor) -> tuple[Tensor, Tensor]:
    act = reference.silu_mul if sizes.activation == "silu" else reference.gelu_tanh_mul
    y = reference.linear(o.flatten(1), layer.out, layer.out_bias)
    if layer.attention_post_norm is not None:
        y = reference.rms_norm(y, layer.attention_post_norm, sizes.eps, sizes.plus_one)
    y, x = reference.add_rms_norm(y, x, layer.mlp_norm, sizes.eps, sizes.plus_one)
    y = reference.linear(act(reference.linear(y, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
    if layer.mlp_post_norm is not None:
        y = reference.rms_norm(y, layer.mlp_post_norm, sizes.eps, sizes.plus_one)
    return reference.add_rms_norm(y, x, next_norm, sizes.eps, sizes.plus_one)


def wide(layer: Dense) -> Dense:
    return Dense(*(None if x is None else x.double() for x in layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("sizes", "biases", "qk_norm", "post"),
    [(LLAMA, False, False, False), (LLAMA, True, False, False), (WIDE_HEADS, False, True, False), (GEMMA, 0, 0, 1)],
)
def test_halves(body: Native, sizes: Sizes, biases: bool, qk_norm: bool, post: bool, rows: int, dtype: torch.dtype):
    make = torch.Generator().manual_seed(rows)
    layers = [layer(sizes, make, dtype, biases, qk_norm, post) for _ in range(2)]
    last = torch.randn(HIDDEN, generator=make).to(dtype)
    few = body.few_rows(layers, last, sizes, HALF)
    assert isinstance(few, FewRows)
    assert few.most >= rows
    next_norms = [layers[1].attention_norm, last]
    for n in range(2):
        x, y = torch.randn(2, rows, HIDDEN, generator=make).to(dtype)
        o = torch.randn(rows, sizes.heads, sizes.head_dim, generator=make).to(dtype)
        cos, sin = torch.randn(2, rows, HALF, generator=make)
        told = enter(wide(layers[n]), sizes, y.double(), cos.double(), sin.double())
        for ours, theirs in zip(few.enter(n, y, cos, sin), told, strict=True):
            assert (ours.dtype, ours.shape, ours.is_contiguous()) == (dtype, theirs.shape, True)
            assert torch.allclose(ours.double(), theirs, rtol=0, atol=10 * TOLERANCE[dtype])
        theirs, residual = leave(wide(layers[n]), sizes, o.double(), x.double(), next_norms[n].double())
        few.leave(n, o, x, y)
        assert torch.allclose(x.double(), residual, rtol=0, atol=10 * TOLERANCE[dtype])
        assert torch.allclose(y.double(), theirs, rtol=0, atol=10 * TOLERANCE[dtype])


def test_what_does_not_fit_is_left_to_the_pieces(body: Native) -> None:
    make = torch.Generator().manual_seed(0)
    good = layer(LLAMA, make, torch.float32, False, False, False)
    assert body.few_rows([good], good.mlp_norm, LLAMA, HALF) is not None
    assert body.few_rows([good], good.mlp_norm, LLAMA, 8) is None
    assert body.few_rows([good], good.mlp_norm, LLAMA._replace(activation="relu"), HALF) is None
    assert body.few_rows([good], good.mlp_norm, LLAMA._replace(heads=4), HALF) is None
    assert body.few_rows([good._replace(down=good.down.double())], good.mlp_norm, LLAMA, HALF) is None
    strided = good._replace(qkv=torch.cat([good.qkv, good.qkv], 1)[:, :HIDDEN])
    assert body.few_rows([strided], good.mlp_norm, LLAMA, HALF) is None
