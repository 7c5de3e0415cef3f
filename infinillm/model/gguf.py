"""A GGUF file made into a Hugging Face folder: bfloat16 safetensors, config, tokenizer."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

from infinillm.errors import BadRequest
from infinillm.model.files import Progress
from infinillm.model.spec import FAMILIES, Family

ARCHITECTURES = {
    "gemma2": "gemma2",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}
SHARD_BYTES = 2 << 30
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONFIG = {  # our config's name -> the file's, below its architecture
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


class Stored(NamedTuple):
    """Where a tensor lies in the file. `shape` is in torch's order, `kind` a ggml type, `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    fields: Mapping[str, Any]
    tensors: tuple[Stored, ...]
    data: int  # bytes before the first tensor


def convert(path: Path, out: Path, progress: Progress) -> None:
    """Write the model in `path` to the empty folder `out`. Raises BadRequest where we cannot run it."""
    progress("reading GGUF header", 0.0)
    header = read_header(path)
    _check_whole(path, header)
    family, values = _config(path, header)
    _write_tokenizer(path, out, header, progress)
    _write_tensors(path, header, family, values, out, progress)
    _write_config(family, values, out)


def read_header(path: Path) -> Header:
    """Everything in a GGUF file but its tensors' bytes. Raises BadRequest where it is none."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadRequest(f"{path} is not a GGUF file", field="model")
    blob = np.memmap(path, mode="r", dtype=np.uint8)
    reader = _Reader(blob)
    try:
        version, tensors, fields = reader.take("IQQ")
        if version not in (2, 3):
            raise BadRequest(f"{path} is GGUF version {version}; versions 2 and 3 can be read", field="model")
        read: dict[str, Any] = {}
        for _ in range(fields):
            name = reader.string()
            (kind,) = reader.take("I")
            read[name] = reader.value(kind)
        stored = tuple(reader.stored() for _ in range(tensors))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise BadRequest(f"{path} is damaged: its header ends or errs at byte {reader.at}", field="model") from error
    align = read.get("general.alignment", 32)
    return Header(read, stored, -(-reader.at // align) * align)


def _check_whole(path: Path, header: Header) -> None:
    """Refuse a file whose tensors we cannot read, or that was cut short, before any work is done."""
    known, size = {kind.value for kind in GGML_QUANT_SIZES}, path.stat().st_size
    for stored in header.tensors:
        if stored.kind not in known:
            raise BadRequest(f"{path} stores {stored.name} in ggml type {stored.kind}, unknown here", field="model")
        if header.data + stored.offset + _bytes(stored) > size:
            raise BadRequest(f"{path} is damaged: it ends before its tensor {stored.name}", field="model")


def _bytes(stored: Stored) -> int:
    items, size = GGML_QUANT_SIZES[GGMLQuantizationType(stored.kind)]
    return math.prod(stored.shape) // items * size


class _Reader:
    """A cursor over the header's bytes."""

    def __init__(self, blob: Any):
        self._blob, self.at = memoryview(blob), 4

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._blob, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        if length > len(self._blob) - self.at:
            raise struct.error
        self.at += length
        return str(self._blob[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(SCALARS[kind])[0]
        each, count = self.take("IQ")
        if count > len(self._blob) - self.at:
            raise struct.error
        if each in SCALARS:
            return list(self.take(f"{count}{SCALARS[each]}"))
        return [self.value(each) for _ in range(count)]

    def stored(self) -> Stored:
        name, (dims,) = self.string(), self.take("I")
        shape = tuple(reversed(self.take(f"{dims}Q")))
        kind, offset = self.take("IQ")
        return Stored(name, shape, kind, offset)


def _config(path: Path, header: Header) -> tuple[str, dict[str, Any]]:
    """The family and the values of its transformers config."""
    fields, names = header.fields, {t.name for t in header.tensors}
    arch = fields.get("general.architecture", "")
    if arch not in ARCHITECTURES:
        raise BadRequest(
            f"{path} holds architecture {arch!r}; GGUF files can be read of: {', '.join(sorted(ARCHITECTURES))}",
            field="model",
        )
    own = {key.removeprefix(arch + "."): value for key, value in fields.items() if key.startswith(arch + ".")}
    family = "mixtral" if arch == "llama" and own.get("expert_count") else ARCHITECTURES[arch]
    values = {name: own[key] for name, key in CONFIG.items() if key in own}
    if len(values) < 6 or "tokenizer.ggml.tokens" not in fields:
        raise BadRequest(f"{path} does not say the sizes of its model, or holds no tokenizer", field="model")
    values |= {name: fields.get(key) for name, key in TOKENS.items()}  # absent: none, not the default of the family
    values["vocab_size"] = next(t.shape[0] for t in header.tensors if t.name == "token_embd.weight")
    values["tie_word_embeddings"] = "output.weight" not in names
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values["rope_parameters"] = _rope(path, header, own, values)
    if "expert_count" in own:
        values["num_local_experts" if family == "mixtral" else "num_experts"] = own["expert_count"]
    if family == "qwen3_moe":
        values["norm_topk_prob"] = True
    if family == "gemma2":  # the file does not say; only the 27B model, of 46 layers, differs
        wide = values["hidden_size"] // values["num_attention_heads"]
        values["query_pre_attn_scalar"] = wide if values["num_hidden_layers"] == 46 else values["head_dim"]
    if family in ("llama", "qwen2"):
        values.pop("sliding_window", None)
    if family == "llama" and "blk.0.attn_q.bias" in names:
        values["attention_bias"] = True
    if family == "phi3":
        values["original_max_position_embeddings"] = own.get(
            "rope.scaling.original_context_length", values["max_position_embeddings"]
        )
    return family, values


def _rope(path: Path, header: Header, own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as the file has it: frequency factors in tensors are transformers' longrope, whatever they came from."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    partial = own.get("rope.dimension_count", values["head_dim"]) / values["head_dim"]
    if partial != 1.0:
        rope["partial_rotary_factor"] = partial
    original = own.get("rope.scaling.original_context_length", values["max_position_embeddings"])
    factors = {t.name: _read(path, header, t).tolist() for t in header.tensors if t.name.startswith("rope_")}
    kind = own.get("rope.scaling.type", "none")
    if "rope_factors_long.weight" in factors:
        rope |= {
            "rope_type": "longrope",
            "short_factor": factors["rope_factors_short.weight"],
            "long_factor": factors["rope_factors_long.weight"],
            "original_max_position_embeddings": original,
        }
    elif "rope_freqs.weight" in factors:
        each = factors["rope_freqs.weight"]
        rope |= {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
        rope |= {"factor": 1.0, "original_max_position_embeddings": original}
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": own["rope.scaling.factor"]}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = original
    elif kind != "none":
        raise BadRequest(f"{path} scales RoPE by {kind!r}, which is not supported", field="model")
    return rope


def _read(path: Path, header: Header, stored: Stored) -> Tensor:
    """One tensor as float32."""
    kind = GGMLQuantizationType(stored.kind)
    raw = np.memmap(path, mode="r", dtype=np.uint8, offset=header.data + stored.offset, shape=(_bytes(stored),))
    rows = raw.reshape(*stored.shape[:-1], -1)
    try:
        return torch.from_numpy(np.array(dequantize(rows, kind), dtype=np.float32)).reshape(stored.shape)
    except NotImplementedError as error:
        raise BadRequest(f"{path} stores {stored.name} as {kind.name}, which cannot be read", field="model") from error


def _write_tensors(
    path: Path, header: Header, family: str, values: Mapping[str, Any], out: Path, progress: Progress
) -> None:
    total = sum(math.prod(t.shape) for t in header.tensors)
    permuted = header.fields["general.architecture"] == "llama"
    done = 0
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for stored in header.tensors:
        progress("converting GGUF to bfloat16", done / total)
        done += math.prod(stored.shape)
        if stored.name.startswith("rope_"):
            continue
        tensor = _read(path, header, stored)
        if permuted and stored.name.endswith((".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")):
            heads = values["num_attention_heads" if ".attn_q." in stored.name else "num_key_value_heads"]
            tensor = _unpermute(tensor, heads)
        if FAMILIES[family].plus_one and "norm.weight" in stored.name:
            tensor = tensor - 1.0
        for name, part in _named(path, stored.name, tensor, family):
            shard[name] = part.to(torch.bfloat16).contiguous()
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """llama.cpp interleaves the halves of each q and k head of Llama; Hugging Face keeps them apart."""
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _named(path: Path, name: str, tensor: Tensor, family: str) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face names of a tensor of the file; a stack of experts is many tensors."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, _, suffix = name.rpartition(".")
    if stem in whole:
        yield f"{whole[stem]}.{suffix}", tensor
        return
    block, n, *rest = stem.split(".")
    at, names = f"model.layers.{n}.", _block_names(FAMILIES[family])
    key = ".".join(rest)
    if block != "blk" or key not in names:
        raise BadRequest(f"{path} holds a tensor we have no use for: {name}", field="model")
    if key.endswith("_exps"):
        for x, part in enumerate(tensor):
            yield at + names[key].format(x) + "." + suffix, part
    else:
        yield f"{at}{names[key]}.{suffix}", tensor


def _block_names(family: Family) -> dict[str, str]:
    """llama.cpp's names of the tensors of one layer -> Hugging Face's, for this family."""
    fused = len(family.gate_up) == 1
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": family.attention_post_norm,
        "ffn_norm": family.mlp_norm,
        "post_ffw_norm": family.mlp_post_norm,
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.gate_up_proj" if fused else "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": f"{family.sparse}.gate",
    }
    for key, name in zip(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), family.expert, strict=True):
        names[key] = f"{family.sparse}.experts.{{}}.{name}"
    return names


def _write_config(family: str, values: Mapping[str, Any], out: Path) -> None:
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(family, **values)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    config.dtype = torch.bfloat16
    config.save_pretrained(out)
    GenerationConfig(**{name: values[name] for name in TOKENS}).save_pretrained(out)


def _write_tokenizer(path: Path, out: Path, header: Header, progress: Progress) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    progress("building the tokenizer", 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} holds a tokenizer that cannot be built: {error}", field="model") from error
    if header.fields.get("tokenizer.ggml.pre") == "smollm":  # transformers forgets that digits stand alone
        digits = Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(out)
