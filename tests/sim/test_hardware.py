"""Devices, models and clusters as data, and calibrations that can be fitted again."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from bench.fit import STUDIES, fit
from infinillm.core.cost import Cost, to_plain
from infinillm.errors import BadRequest
from infinillm.sim.hardware import (
    Size,
    calibrated,
    chip,
    cluster,
    dense_of,
    hardware,
    link,
    read_size,
    shape_of,
    size_of,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def table(name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(
        resources.files("infinillm.sim").joinpath(f"data/{name}.json").read_text()
    )
    return found


def size(name: str, dtype: str = "float16") -> Size:
    return read_size(name, 16, dtype)


# --- devices and links -----------------------------------------------------------------------------------------------


def test_every_device_and_link_is_read_and_says_where_its_figures_are_from() -> None:
    devices = [*table("devices"), "A100@infinite-llm", "A800@loongserve", "A800@vllm"]
    for name in devices:
        found = chip(name)
        assert found.device.name == name
        assert 0 < found.attention_share <= 1
        assert link(found.inside).bandwidth > 0
        assert link(found.between).latency > 0
    for kind in ("devices", "links"):
        assert all(len(str(each["source"])) > 30 for each in table(kind).values())


def test_a_calibration_replaces_only_what_it_fitted() -> None:
    plain, fitted = chip("A800"), chip("A800@vllm")
    found = calibrated("vllm")
    assert fitted == replace(plain, name="A800@vllm", **found["fitted"], **found["taken"])
    assert fitted != replace(plain, name="A800@vllm")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("B100", "A100, A800, H100"),
        ("A100@nobody", "infinite-llm, loongserve, vllm"),
        ("A100@loongserve", "is of A800"),
    ],
)
def test_an_unknown_device_is_refused_with_those_there_are(name: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as refused:
        chip(name)
    assert refused.value.field == "device"


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "token_bytes"),
    [
        ("Llama-2-7B", 6.74, 512 << 10),
        ("Llama-2-13B", 13.02, 800 << 10),
        ("Llama-2-70B", 68.98, 320 << 10),
        ("Llama-3-8B", 8.03, 128 << 10),
        ("Llama-3-70B", 70.55, 320 << 10),
        ("LWM-7B", 6.74, 512 << 10),
        ("Qwen3-8B", 8.19, 144 << 10),
        ("SmolLM2-135M", 0.1345, 22.5 * 1024),
    ],
)
def test_models_are_as_large_as_published(name: str, billions: float, token_bytes: float) -> None:
    found = size(name)
    assert found.weights / 2e9 == pytest.approx(billions, rel=0.002)
    assert found.shape.block_bytes / 16 == token_bytes
    assert size(name, "float32").weights == 2 * found.weights


def test_a_model_is_read_from_a_config_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": False}))
    one, two = (read_size(str(path), 16, "bfloat16") for path in (tmp_path, tmp_path / "config.json"))
    assert one.dense == two.dense == size("Llama-3-8B").dense
    assert one.shape == replace(size("Llama-3-8B").shape, dtype="bfloat16")


def test_old_configs_have_as_many_kv_heads_as_heads_and_only_some_windows_are_used() -> None:
    old = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert shape_of(old, 16, "float16").kv_heads == 32
    assert shape_of(LLAMA | {"model_type": "mistral", "sliding_window": 4096}, 16, "float16").windows == (4096,) * 32
    off = {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    assert shape_of(LLAMA | off, 16, "float16").windows == (0,) * 32
    assert shape_of(LLAMA | {"head_dim": 64}, 16, "float16").head_dim == 64


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"intermediate_size": "big"}, "intermediate_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_simulated_is_refused_by_key(change: dict[str, object], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        size_of("x", LLAMA | change, 16, "float16")
    assert refused.value.field == field


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(BadRequest) as refused:
        dense_of(LLAMA, "int3")
    assert refused.value.field == "dtype"


# --- nodes -----------------------------------------------------------------------------------------------------------


def node_cost(name: str, degree: int, model: str) -> Cost:
    node = hardware(name, degree, 8)
    return node.cost(size(model), node.near)


def test_tensor_parallel_divides_reading_and_adds_two_all_reduces_a_layer() -> None:
    one, four = (node_cost("A100", degree, "Llama-2-7B") for degree in (1, 4))
    reduces = 64 * hardware("A100", 4, 8).reduce(8, size("Llama-2-7B"))
    fixed = 32 * chip("A100").layer_seconds
    assert four.seconds_per_token == pytest.approx(one.seconds_per_token / 4)
    assert four.dense(8) - fixed - reduces == pytest.approx((one.dense(8) - fixed) / 4)
    assert reduces == pytest.approx(64 * (40e-6 + 2 * 3 / 4 * 8 * 8192 / 183e9))


def test_kv_heads_are_repeated_on_more_devices_than_there_are() -> None:
    """70B has eight: on sixteen devices each token is read, and kept, twice as often."""
    eight, sixteen = (node_cost("A100", degree, "Llama-2-70B") for degree in (8, 16))
    assert sixteen.seconds_per_token == pytest.approx(eight.seconds_per_token)
    held = [hardware("A100", degree, 8).kv_bytes(size("Llama-2-70B")) for degree in (8, 16)]
    assert held[1] == pytest.approx((16 * 72e9 - size("Llama-2-70B").weights) / 2)
    assert held[0] == pytest.approx(8 * 72e9 - size("Llama-2-70B").weights)


def test_a_node_of_several_servers_reduces_between_them_too() -> None:
    found = hardware("A100@infinite-llm", 32, 8)
    inside = 40e-6 + 2 * 7 / 8 * 8192 / 183e9
    assert found.servers == 4
    assert found.reduce(1, size("Llama-2-7B")) == pytest.approx(inside + 250e-6 + 2 * 3 / 4 * 8192 / 125e6)


def test_a_prompt_costs_its_matrices_its_attention_and_what_is_fixed() -> None:
    found, model = node_cost("H100", 1, "Llama-3-8B"), size("Llama-3-8B")
    for tokens in (1, 700, 9000, 1_000_000):
        matrices = 2 * 32 * model.dense.layer_parameters * tokens / (0.6 * 989e12)
        attention = 2 * 32 * 32 * 128 * tokens**2 / (0.5 * 989e12)
        assert found.prefill(tokens) == pytest.approx(32 * 10e-6 + matrices + attention, rel=0.003)


# --- clusters --------------------------------------------------------------------------------------------------------


def test_a_short_text_is_a_cluster() -> None:
    found = cluster("4x8xA100@infinite-llm", size("Llama-2-7B"))
    assert [site.id for site in found.sites] == [f"n{n:02}" for n in range(32)]
    assert [site.server for site in found.sites] == [n // 8 for n in range(32)]
    assert found.sites[0].blocks == 88_000 // 16
    near, far = (found.link(found.sites[0], found.sites[n]) for n in (7, 8))
    assert (near.name, far.name) == ("nvlink-a100", "ethernet-1g")
    assert found.cost(found.sites[0], found.sites[8]).move(1000) > 1000 * found.sites[0].near.move(1000) / 10


@pytest.mark.parametrize(
    ("text", "nodes", "servers"), [("4x8xA800:tp2", 16, 4), ("4x8xA800:tp8", 4, 4), ("4x8xA800:tp16", 2, 2)]
)
def test_nodes_of_several_devices_share_or_fill_servers(text: str, nodes: int, servers: int) -> None:
    found = cluster(text, size("LWM-7B"))
    assert len(found.sites) == nodes
    assert len({site.server for site in found.sites}) == servers
    wide = int(text.rpartition("tp")[2])
    assert found.near.bandwidth == wide * link("nvlink-a800").bandwidth
    assert found.far.bandwidth == max(wide // 8, 1) * link("infiniband-4x200").bandwidth


def test_a_file_is_a_cluster_of_devices_or_of_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"servers": 2, "devices": 4, "device": "H100", "tensor_parallel": 2, "between": "tcp-25g"}')
    found = cluster(str(path), size("Llama-3-8B"))
    assert (len(found.sites), found.far.name, found.near.name) == (4, "tcp-25g", "nvlink-h100")
    measured = node_cost("CPU1", 1, "SmolLM2-135M")
    (tmp_path / "profile.json").write_text(json.dumps({"about": {}} | to_plain(measured)))
    plain = {"servers": 1, "devices": 3, "profile": "profile.json", "blocks": 400}
    path.write_text(json.dumps(plain | {"inside": "shared-memory", "between": "tcp-25g"}))
    found = cluster(str(path), size("SmolLM2-135M", "float32"))
    assert [(site.id, site.blocks, site.server) for site in found.sites] == [(f"n{n}", 400, 0) for n in range(3)]
    assert found.cost(*found.sites[:2]) == measured


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("many", "cluster"),
        ("4x8", "cluster"),
        ("0x8xA100", "servers"),
        ("4x8xB100", "device"),
        ("4x8xA100:tp3", "tensor_parallel"),
        ("1x8xA100:tp16", "tensor_parallel"),
        ("1x8xA100:tp0", "tensor_parallel"),
        ("nowhere.json", "cluster"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(text: str, field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        cluster(text, size("Llama-2-7B"))
    assert refused.value.field == field


def test_a_model_too_large_for_its_devices_is_refused() -> None:
    with pytest.raises(BadRequest, match="leave no room") as refused:
        cluster("1x8xA100", size("Llama-2-70B"))
    assert refused.value.field == "tensor_parallel"


# --- calibrations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_a_calibration_can_be_fitted_again(name: str) -> None:
    committed, again = calibrated(name), fit(STUDIES[name]())
    assert again["fitted"] == pytest.approx(committed["fitted"], rel=1e-3)
    assert [point["what"] for point in again["points"]] == [point["what"] for point in committed["points"]]
    for ours, theirs in zip(again["points"], committed["points"], strict=True):
        assert ours == theirs | {"ours": pytest.approx(theirs["ours"], rel=1e-3), "ratio": ours["ratio"]}


@pytest.mark.parametrize(
    ("name", "fits", "within"), [("infinite-llm", 10, 0.08), ("loongserve", 17, 0.18), ("vllm", 6, 0.06)]
)
def test_what_was_fitted_fits(name: str, fits: int, within: float) -> None:
    ratios = [point["ratio"] for point in calibrated(name)["points"] if point["use"] != "predicted"]
    assert ratios == pytest.approx([1.0] * fits, abs=within)


def test_results_of_figure_1a_at_other_degrees_are_predicted_never_fitted() -> None:
    points = {point["what"]: point for point in calibrated("infinite-llm")["points"]}
    assert points["rate, DP32TP1"]["use"] == "fitted: row_seconds"
    for what in ("rate, DP4TP8", "rate, DP1TP32", "longest context, TP8"):
        assert points[what]["use"] == "predicted"
    assert points["longest context, TP8"]["ratio"] == pytest.approx(1, abs=0.05)


def test_loongserves_runs_of_other_shapes_are_predicted_within_a_tenth() -> None:
    points = [point for point in calibrated("loongserve")["points"] if point["use"] == "predicted"]
    timed = [point["ratio"] for point in points if point["unit"] == "ms"]
    assert timed == pytest.approx([1.0] * 11, abs=0.11)
