"""GGUF files: tiny ones of each architecture, written by llama.cpp's own names and conventions, and damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from infinillm.errors import BadRequest
from infinillm.model.gguf import convert, read_header
from infinillm.model.spec import spec_of
from infinillm.model.tokenizer import Tokenizer
from infinillm.model.weights import read_config
from tests import tiny

ARCHITECTURES = {
    "llama": "llama",
    "llama-tied": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "mixtral": "llama",
}
CONTROL, NORMAL = 3, 1


def write_gguf(name: str, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
    """The tiny model as llama.cpp's converter would write it."""
    arch, spoken = ARCHITECTURES[name], tiny.config(name)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    _write_sizes(writer, spoken)
    _write_tokenizer(writer)
    if name == "phi3-longrope":
        rope = spoken.rope_parameters
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_tensor("rope_factors_long.weight", torch.tensor(rope["long_factor"]).numpy())
        writer.add_tensor("rope_factors_short.weight", torch.tensor(rope["short_factor"]).numpy())
        writer.add_rope_dimension_count(12)
    for key, tensor in _tensors(name, arch):
        quantised = kind if tensor.dim() > 1 and tensor.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: gguf.GGUFWriter, spoken: Any) -> None:
    writer.add_context_length(spoken.max_position_embeddings)
    writer.add_embedding_length(spoken.hidden_size)
    writer.add_block_count(spoken.num_hidden_layers)
    writer.add_feed_forward_length(spoken.intermediate_size)
    writer.add_head_count(spoken.num_attention_heads)
    writer.add_head_count_kv(spoken.num_key_value_heads)
    writer.add_layer_norm_rms_eps(spoken.rms_norm_eps)
    writer.add_rope_freq_base(spoken.rope_parameters["rope_theta"])
    head = getattr(spoken, "head_dim", None) or spoken.hidden_size // spoken.num_attention_heads
    writer.add_key_length(head)
    if spoken.model_type == "gemma2":
        writer.add_attn_logit_softcapping(spoken.attn_logit_softcapping)
        writer.add_final_logit_softcapping(spoken.final_logit_softcapping)
    if getattr(spoken, "sliding_window", None):
        writer.add_sliding_window(spoken.sliding_window)
    if experts := getattr(spoken, "num_local_experts", 0):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(spoken.num_experts_per_tok)


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    model = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in ("<|start|>", "<|end|>") else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tiny.TEMPLATE)


def _tensors(name: str, arch: str) -> list[tuple[str, torch.Tensor]]:
    spoken = tiny.config(name)
    known = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(known, spoken.num_hidden_layers)
    found: list[tuple[str, torch.Tensor]] = []
    stacks: dict[str, list[torch.Tensor]] = {}
    for key, tensor in load_file(tiny.folder(name) / "model.safetensors").items():
        stem, _, suffix = key.rpartition(".")
        head, experts, tail = stem.partition(".experts.")
        if experts:
            stacks.setdefault(f"{head}.experts.{tail.split('.')[1]}.{suffix}", []).append(tensor)
            continue
        if arch == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = spoken.num_attention_heads if "q_proj" in key else spoken.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        if arch == "gemma2" and suffix == "weight" and tensor.dim() == 1:
            tensor = tensor + 1
        found.append((f"{names.get_name(stem)}.{suffix}", tensor.contiguous()))
    for key, parts in stacks.items():
        stem, _, suffix = key.rpartition(".")
        found.append((f"{names.get_name(stem)}.{suffix}", torch.stack(parts)))
    return found


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_converted_file_is_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_gguf(name, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", out, tiny.silent)
    want = load_file(tiny.folder(name) / "model.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    got = {key: tensor for shard in set(index.values()) for key, tensor in load_file(out / shard).items()}
    assert set(got) == set(want) == set(index)
    for key, tensor in want.items():
        assert torch.allclose(got[key].float(), tensor.bfloat16().float(), rtol=1e-2, atol=1e-6), key
    mine, theirs = spec_of(read_config(out)), spec_of(tiny.config(name))
    for field in (
        "name",
        "family",
        "vocab",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "context",
        "activation",
        "tied",
    ):
        assert getattr(mine, field) == getattr(theirs, field), field
    assert (mine.windows, mine.soft_cap, mine.logit_cap) == (theirs.windows, theirs.soft_cap, theirs.logit_cap)
    assert mine.mixture == theirs.mixture
    assert mine.eps == pytest.approx(theirs.eps)
    assert mine.rope.frequencies == pytest.approx(theirs.rope.frequencies)
    assert mine.rope.scaling == pytest.approx(theirs.rope.scaling)
    tokenizer = Tokenizer.load(out)
    text = "The ledger decides: naïve 日本 😀"
    assert tokenizer.encode(text) == tiny.tokenizer()(text)["input_ids"]
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.chat([{"role": "user", "content": "Hi"}])[0] == 0
    transformers.AutoModelForCausalLM.from_pretrained(out)  # others can read it too


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_tensors_are_near(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_gguf("llama", tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    convert(tmp_path / "m.gguf", out, tiny.silent)
    want, got = load_file(tiny.folder("llama") / "model.safetensors"), load_file(out / "model-00001.safetensors")
    for key, tensor in want.items():
        off = (got[key].float() - tensor).norm() / tensor.norm()
        assert off < (0.15 if kind.startswith("Q4") else 0.01), key


def test_factors_of_rope_are_kept(tmp_path: Path) -> None:
    """llama.cpp bakes Llama 3's RoPE scaling into a tensor of factors."""
    out = tmp_path / "out"
    out.mkdir()
    base, spec = spec_of(tiny.config("llama")), spec_of(tiny.config("llama3-rope"))
    factors = torch.tensor(base.rope.frequencies) / torch.tensor(spec.rope.frequencies)
    extra = gguf.GGUFWriter.write_header_to_file

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            self.add_tensor("rope_freqs.weight", factors.numpy())
            extra(self, path)

    original, gguf.GGUFWriter = gguf.GGUFWriter, Writer
    try:
        write_gguf("llama", tmp_path / "m.gguf")
    finally:
        gguf.GGUFWriter = original
    convert(tmp_path / "m.gguf", out, tiny.silent)
    rope = spec_of(read_config(out)).rope
    assert rope.frequencies == pytest.approx(spec.rope.frequencies)
    assert rope.scaling == 1.0


def test_the_default_models_header(smollm: Path) -> None:
    spec = spec_of(read_config(smollm))
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.vocab) == (30, 576, 9, 3, 49152)
    assert (spec.tied, spec.context, spec.dtype) == (True, 8192, "bfloat16")


@pytest.mark.parametrize("cut", [0, 3, 20, 40, 200, 3000])
def test_a_cut_file_is_a_bad_request(cut: int, tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:cut])
    with pytest.raises(BadRequest) as caught:
        read_header(tmp_path / "cut.gguf")
    assert caught.value.field == "model"


def test_tensors_cut_short_are_a_bad_request(tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-5000])
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="ends before"):
        convert(tmp_path / "cut.gguf", tmp_path / "out", tiny.silent)


@pytest.mark.parametrize("length", [2**63, 2**40])
def test_absurd_lengths_cost_nothing(length: int, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, length) + b"abc")
    with pytest.raises(BadRequest, match="damaged"):
        read_header(tmp_path / "m.gguf")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BadRequest, match=r"'mamba'.*gemma2.*qwen3moe"):
        convert(tmp_path / "m.gguf", tmp_path, tiny.silent)
