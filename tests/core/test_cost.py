"""The cost model against figures published or measured by others, named beside each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infinillm.core.cost import Asked, Cost, Dense, Device, Link
from infinillm.core.types import AttentionShape


def shape(layers: int, heads: int, kv_heads: int, head_dim: int = 128, dtype: str = "bfloat16") -> AttentionShape:
    return AttentionShape(heads, kv_heads, head_dim, 16, dtype, 1.0, (0,) * layers)


def dense(hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocabulary: int, size: float = 2) -> Dense:
    layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * ffn
    return Dense(layer, vocabulary * hidden, size)


H100 = Device("H100", 80e9, 3.35e12, 989e12, 0.80, 0.85, 0.60, 12e-6, 10e-6, 3e-6)
A100 = Device("A100", 80e9, 2.039e12, 312e12, 0.80, 0.85, 0.60, 12e-6, 10e-6, 3e-6)
NVLINK4_NCCL = Link("NVLink 4, NCCL", 20e-6, 0.70 * 450e9)
NVLINK3_NCCL = Link("NVLink 3, NCCL", 40e-6, 0.61 * 300e9)
ROCE400_NCCL = Link("400G RoCE, NCCL", 67e-6, 0.71 * 50e9)
ROCE400_BYPASS = Link("400G RoCE, GPU-initiated", 33e-6, 0.91 * 50e9)
SHM = Link("shared memory", 15e-6, 5e9)
SOCKET = Link("Unix socket", 40e-6, 3.5e9)
GRPC = Link("gRPC stream", 316e-6, 0.75e9)

LLAMA_H100 = Cost(H100, NVLINK4_NCCL, dense(4096, 32, 8, 128, 14336, 128256), shape(32, 32, 8))
QWEN_H100 = Cost(
    replace(H100, attention_share=0.74, layer_seconds=22e-6),
    NVLINK4_NCCL,
    dense(4096, 32, 8, 128, 12288, 151936),
    shape(36, 32, 8),
)
LLAMA13_A100 = Cost(A100, NVLINK3_NCCL, dense(5120, 40, 40, 128, 13824, 32000), shape(40, 40, 40))
SMOLLM = dense(576, 9, 3, 64, 1536, 49152, 4)
SMOLLM_SHAPE = shape(30, 9, 3, 64, "float32")
CPU1 = Device("2-core machine, 1 thread", 20e9, 11.3e9, 1.2e11, 0.80, 0.52, 0.60, 40e-6, 340e-6, 10e-6)
CPU2 = Device("2-core machine, 2 threads", 20e9, 22e9, 2.0e11, 0.76, 0.45, 0.60, 60e-6, 500e-6, 10e-6)


@pytest.mark.parametrize(
    ("tokens", "per_second"),
    [(1000, 142.71), (2000, 140.11), (4000, 138.67), (8000, 135.0), (16000, 126.81), (32000, 113.23)],
)
def test_qwen3_8b_decodes_on_h100_as_published(tokens: int, per_second: float) -> None:
    """sgl-project/sglang#21775, FlashInfer column, batch 1."""
    assert QWEN_H100.decode_step(1, tokens) == pytest.approx(1 / per_second, rel=0.021)


@pytest.mark.parametrize(
    ("bandwidth", "batch", "seconds", "within"),
    [(3.35e12, 1, 30.5e-6, 0.17), (3.35e12, 64, 726e-6, 0.03), (8e12, 1, 23.9e-6, 0.18), (8e12, 64, 322.4e-6, 0.03)],
)
def test_paged_attention_takes_as_long_as_flashinfers(
    bandwidth: float, batch: int, seconds: float, within: float
) -> None:
    """flashinfer's persistent batch attention, 32 query and 8 K/V heads of 128, 8,192 tokens each (their PR 5329)."""
    device = replace(H100, bandwidth=bandwidth, attention_share=0.88, attention_seconds=15e-6)
    assert replace(LLAMA_H100, device=device).attend(batch * 8192) == pytest.approx(seconds, rel=within)


@pytest.mark.parametrize(
    ("device", "tokens", "seconds"),
    [(CPU1, 128, 71.9e-3), (CPU1, 2048, 86.2e-3), (CPU2, 128, 49.8e-3), (CPU2, 2048, 60.2e-3)],
)
def test_smollm2_decodes_on_a_small_cpu_as_measured(device: Device, tokens: int, seconds: float) -> None:
    """A lean torch loop, float32, batch 1."""
    assert Cost(device, SHM, SMOLLM, SMOLLM_SHAPE).decode_step(1, tokens) == pytest.approx(seconds, rel=0.18)


@pytest.mark.parametrize(
    ("cost", "rows", "tokens"),
    [
        (LLAMA_H100, 8, 18_400),
        (replace(LLAMA_H100, link=ROCE400_NCCL), 8, 53_300),
        (replace(LLAMA_H100, link=ROCE400_BYPASS), 8, 29_100),
        (Cost(replace(CPU1, attention_share=0.81), SHM, SMOLLM, SMOLLM_SHAPE), 1, 214),
        (Cost(replace(CPU2, attention_share=0.80), SHM, SMOLLM, SMOLLM_SHAPE), 1, 412),
        (Cost(replace(CPU2, attention_share=0.80), SOCKET, SMOLLM, SMOLLM_SHAPE), 1, 703),
        (Cost(replace(CPU2, attention_share=0.80), GRPC, SMOLLM, SMOLLM_SHAPE), 1, 3_920),
    ],
)
def test_spreading_pays_from_the_context_where_a_round_trip_is_hidden(cost: Cost, rows: int, tokens: float) -> None:
    start = cost.spreading_pays_from(rows)
    assert start == pytest.approx(tokens, rel=0.01)
    for context, pays in ((0.99 * start, False), (1.01 * start, True)):
        kept = cost.best_local(context, rows)
        spread = cost.decode_step(1, kept, [Asked(rows, context - kept)])
        assert (spread < cost.decode_step(1, context)) is pays
        assert 0 < kept <= context


def test_an_mha_model_pays_sooner() -> None:
    assert 2_000 < LLAMA13_A100.spreading_pays_from(8) < 10_000


def test_a_question_costs_the_same_whatever_the_context() -> None:
    assert LLAMA_H100.shape.question_bytes == 16_512  # q out, o and lse back
    assert LLAMA_H100.token_bytes == 4096
    near, far = (LLAMA_H100.decode_step(1, 0, [Asked(1, tokens)]) for tokens in (1000, 2000))
    assert far - near == pytest.approx(32 * 1000 * LLAMA_H100.seconds_per_token)


def test_moving_pays_where_many_steps_are_left() -> None:
    assert LLAMA_H100.moving_pays_after(4000) == pytest.approx(1000, rel=0.01)  # a quarter of the tokens, heads 32/8
    assert LLAMA13_A100.moving_pays_after(4000) == pytest.approx(4000, rel=0.01)
    assert LLAMA_H100.move(32_000) == pytest.approx(32_000 * 131_072 / NVLINK4_NCCL.bandwidth, rel=0.01)


def test_the_longest_remote_answer_decides_a_layer() -> None:
    two = LLAMA_H100.decode_step(8, 1000, [Asked(8, 50_000), Asked(8, 100_000)])
    assert two == LLAMA_H100.decode_step(8, 1000, [Asked(8, 100_000)])
    assert two > LLAMA_H100.decode_step(8, 1000, [Asked(8, 50_000)])


def test_prefill_counts_what_it_computes() -> None:
    per_token = 2 * (32 * LLAMA_H100.dense.layer_parameters + LLAMA_H100.dense.head_parameters)
    attention = 4 * 32 * 32 * 128
    flops = 0.60 * 989e12
    assert LLAMA_H100.prefill(100) == pytest.approx((100 * per_token + attention * 5000) / flops)
    assert LLAMA_H100.prefill(100, 900) - LLAMA_H100.prefill(100) == pytest.approx(attention * 90_000 / flops)
    assert 0.4 < LLAMA_H100.prefill(16_000) < 0.6  # 7.5e9 parameters, 250 TFLOP, on 0.6 PFLOP/s


def test_a_large_batch_is_bound_by_computing() -> None:
    small, large = (LLAMA_H100.pass_over(10**9, rows) for rows in (1, 1000))
    assert small == pytest.approx(2e9 / (0.8 * 3.35e12))
    assert large == pytest.approx(2e12 / (0.6 * 989e12))
