"""The cost model against figures published or measured by others, named beside each."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from infinillm.core.cost import Cost, Costs, Curve, Dense, Device, Link, fitted, from_plain, roofline, to_plain
from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest


def shape(layers: int, heads: int, kv_heads: int, head_dim: int = 128, dtype: str = "bfloat16") -> AttentionShape:
    return AttentionShape(heads, kv_heads, head_dim, 16, dtype, 1.0, (0,) * layers)


def dense(hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocabulary: int, size: float = 2) -> Dense:
    layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * ffn
    return Dense(layer, vocabulary * hidden, size)


H100 = Device("H100", 3.35e12, 989e12, 0.80, 0.85, 0.60, 12e-6, 10e-6, 3e-6)
A100 = Device("A100", 2.039e12, 312e12, 0.80, 0.85, 0.60, 12e-6, 10e-6, 3e-6)
NVLINK4_NCCL = Link("NVLink 4, NCCL", 20e-6, 0.70 * 450e9)
NVLINK3_NCCL = Link("NVLink 3, NCCL", 40e-6, 0.61 * 300e9)
ROCE400_NCCL = Link("400G RoCE, NCCL", 67e-6, 0.71 * 50e9)
ROCE400_BYPASS = Link("400G RoCE, GPU-initiated", 33e-6, 0.91 * 50e9)
SHM = Link("shared memory", 15e-6, 5e9)
SOCKET = Link("Unix socket", 40e-6, 3.5e9)
GRPC = Link("gRPC stream", 316e-6, 0.75e9)

LLAMA, LLAMA_SHAPE = dense(4096, 32, 8, 128, 14336, 128256), shape(32, 32, 8)
LLAMA_H100 = roofline(H100, NVLINK4_NCCL, LLAMA, LLAMA_SHAPE)
QWEN_H100 = roofline(
    replace(H100, attention_share=0.74, layer_seconds=22e-6),
    NVLINK4_NCCL,
    dense(4096, 32, 8, 128, 12288, 151936),
    shape(36, 32, 8),
)
LLAMA13_A100 = roofline(A100, NVLINK3_NCCL, dense(5120, 40, 40, 128, 13824, 32000), shape(40, 40, 40))
SMOLLM = dense(576, 9, 3, 64, 1536, 49152, 4)
SMOLLM_SHAPE = shape(30, 9, 3, 64, "float32")
CPU1 = Device("2-core machine, 1 thread", 11.3e9, 1.2e11, 0.80, 0.52, 0.60, 40e-6, 340e-6, 10e-6)
CPU2 = Device("2-core machine, 2 threads", 22e9, 2.0e11, 0.76, 0.45, 0.60, 60e-6, 500e-6, 10e-6)


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
    cost = roofline(device, NVLINK4_NCCL, LLAMA, LLAMA_SHAPE)
    assert cost.attend(batch * 8192, batch) / LLAMA_SHAPE.layers == pytest.approx(seconds, rel=within)


@pytest.mark.parametrize(
    ("device", "tokens", "seconds"),
    [(CPU1, 128, 71.9e-3), (CPU1, 2048, 86.2e-3), (CPU2, 128, 49.8e-3), (CPU2, 2048, 60.2e-3)],
)
def test_smollm2_decodes_on_a_small_cpu_as_measured(device: Device, tokens: int, seconds: float) -> None:
    """A lean torch loop, float32, batch 1."""
    assert roofline(device, SHM, SMOLLM, SMOLLM_SHAPE).decode_step(1, tokens) == pytest.approx(seconds, rel=0.18)


@pytest.mark.parametrize(
    ("cost", "rows", "tokens"),
    [
        (LLAMA_H100, 8, 18_400),
        (roofline(H100, ROCE400_NCCL, LLAMA, LLAMA_SHAPE), 8, 53_300),
        (roofline(H100, ROCE400_BYPASS, LLAMA, LLAMA_SHAPE), 8, 29_100),
        (roofline(replace(CPU1, attention_share=0.81), SHM, SMOLLM, SMOLLM_SHAPE), 1, 214),
        (roofline(replace(CPU2, attention_share=0.80), SHM, SMOLLM, SMOLLM_SHAPE), 1, 412),
        (roofline(replace(CPU2, attention_share=0.80), SOCKET, SMOLLM, SMOLLM_SHAPE), 1, 703),
        (roofline(replace(CPU2, attention_share=0.80), GRPC, SMOLLM, SMOLLM_SHAPE), 1, 3_920),
    ],
)
def test_spreading_pays_from_the_context_where_a_round_trip_is_hidden(cost: Cost, rows: int, tokens: float) -> None:
    start = cost.spreading_pays_from(rows)
    assert start == pytest.approx(tokens, rel=0.01)
    for context, pays in ((0.99 * start, False), (1.01 * start, True)):
        kept = (context + cost.question(rows) / cost.seconds_per_token) / 2  # both are done at the same moment
        spread = cost.decode_step(1, kept, [cost.answer(rows, context - kept)])
        assert (spread < cost.decode_step(1, context)) is pays
        assert 0 < kept <= context


def test_an_mha_model_pays_sooner() -> None:
    assert 2_000 < LLAMA13_A100.spreading_pays_from(8) < 10_000


def test_a_question_costs_the_same_whatever_the_context() -> None:
    assert LLAMA_H100.question_bytes == 32 * 16_512  # q out, o and lse back
    assert LLAMA_H100.token_bytes == 32 * 4096
    near, far = (LLAMA_H100.answer(1, tokens) - LLAMA_H100.attend(tokens) for tokens in (1000, 2000))
    assert near == pytest.approx(far) == pytest.approx(32 * (20e-6 + 16_512 / NVLINK4_NCCL.bandwidth))


def test_moving_pays_where_many_steps_are_left() -> None:
    assert LLAMA_H100.moving_pays_after(4000) == pytest.approx(1000, rel=0.01)  # a quarter of the tokens, heads 32/8
    assert LLAMA13_A100.moving_pays_after(4000) == pytest.approx(4000, rel=0.01)
    assert LLAMA_H100.move(32_000) == pytest.approx(32_000 * 131_072 / NVLINK4_NCCL.bandwidth, rel=0.01)


def test_a_copy_of_a_prefix_pays_where_it_is_used_for_long_and_not_where_two_nodes_read_faster() -> None:
    steps = next(n for n in range(1, 1000) if LLAMA_H100.copying_pays(4000, 100, n))
    assert 1 < steps < 10
    assert not LLAMA_H100.copying_pays(4000, 100, 0)
    assert not LLAMA_H100.copying_pays(1_000_000, 1_000_000, 1_000_000)


def test_the_longest_remote_answer_decides_a_step() -> None:
    one, two = LLAMA_H100.answer(8, 50_000), LLAMA_H100.answer(8, 100_000)
    assert LLAMA_H100.decode_step(8, 1000, [one, two]) - LLAMA_H100.decode_step(8, 1000, [two]) == pytest.approx(
        LLAMA_H100.merging(8)
    )
    assert LLAMA_H100.decode_step(8, 1000, [two]) > LLAMA_H100.decode_step(8, 1000, [one])
    assert LLAMA_H100.decode_step(8, 10**6, [one]) == LLAMA_H100.decode_step(8, 10**6) + LLAMA_H100.merging(8)


def test_prefill_counts_what_it_computes() -> None:
    per_token = 2 * (32 * LLAMA.layer_parameters + LLAMA.head_parameters)
    attention = 4 * 32 * 32 * 128
    flops = 0.60 * 989e12
    assert LLAMA_H100.computing(1024) == pytest.approx((1024 * per_token + attention * 2**19) / flops)
    assert LLAMA_H100.computing(1024, 1024) - LLAMA_H100.computing(1024) == pytest.approx(attention * 2**20 / flops)
    assert 0.4 < LLAMA_H100.computing(16_000) < 0.6  # 7.5e9 parameters, 250 TFLOP, on 0.6 PFLOP/s


def test_a_large_batch_is_bound_by_computing() -> None:
    fixed, parameters = 32 * 10e-6, 32 * LLAMA.layer_parameters + LLAMA.head_parameters
    assert LLAMA_H100.dense(1) == pytest.approx(fixed + 2 * parameters / (0.8 * 3.35e12))
    assert LLAMA_H100.dense(1000) == pytest.approx(fixed + 2000 * parameters / (0.6 * 989e12))


CURVE = Curve(((2.0, 4.0), (4.0, 5.0), (8.0, 13.0)))


@pytest.mark.parametrize(("amount", "seconds"), [(2, 4), (3, 4.5), (4, 5), (6, 9), (8, 13), (9, 15), (0, 3), (-10, 0)])
def test_a_curve_is_straight_between_its_points_and_beyond_them(amount: float, seconds: float) -> None:
    assert CURVE(amount) == pytest.approx(seconds)


def test_a_fit_takes_the_undisturbed_samples_and_never_falls() -> None:
    found = fitted({4: [2.0], 1: [9.0, 1.0, 1.0, 1.0, 9.0], 2: [0.5, 0.5, 0.5, 7.0]})
    assert found == Curve(((1.0, 1.0), (2.0, 1.0), (4.0, 2.0)))


def measured(**curves: Curve) -> Cost:
    return replace(LLAMA_H100, **curves)


def test_a_step_is_its_rows_and_its_context_and_the_fixed_part_is_paid_once() -> None:
    cost = measured(dense=Curve(((1, 10.0), (2, 12.0))), attention=Curve(((100, 2.0), (200, 3.0), (400, 9.0))))
    assert cost.decode_step(2, 200) == pytest.approx(12 + 3)  # twice 100, and one second of them fixed
    assert cost.decode_step(1, 200) == pytest.approx(11 - 1 + 3)
    assert cost.decode_step(1, 400) == pytest.approx(10 + 9)  # longer is not the same as more
    assert cost.decode_step(2, 400) == pytest.approx(12 + 5)
    assert cost.decode_step(1, 0) == 10


def test_a_profile_survives_json_and_says_what_is_wrong_with_it() -> None:
    plain = json.loads(json.dumps({"about": {"model": "llama"}, **to_plain(LLAMA_H100)}))
    assert from_plain(plain) == LLAMA_H100
    for field, broken in (
        ("dense", []),
        ("dense", [[1, 2]]),
        ("attention", [[2, 1], [1, 2]]),
        ("question", [[1, -1], [2, 2]]),
        ("move", [[1, float("nan")], [2, 2]]),
        ("prefill", "fast"),
        ("merging", None),
        ("token_bytes", 0),
        ("question_bytes", 1.5),
    ):
        with pytest.raises(BadRequest, match=field) as caught:
            from_plain({**plain, field: broken})
        assert caught.value.field == field
    for whole in ([], None, {}):
        with pytest.raises(BadRequest):
            from_plain(whole)


def test_a_node_without_a_profile_costs_what_is_taken_for_all() -> None:
    costs = Costs(LLAMA_H100, {"a": QWEN_H100})
    assert (costs.of("a"), costs.of("b"), Costs().of("a")) == (QWEN_H100, LLAMA_H100, None)
