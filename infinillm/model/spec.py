"""A decoder described by values: what differs between model families, read from a transformers config.

The next family is one entry of FAMILIES, unless its layers do something no family here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest


class Family(NamedTuple):
    """What a config does not say. Names are those of tensors in a Hugging Face folder, below `model.layers.N.`"""

    mlp_norm: str = "post_attention_layernorm"
    attention_post_norm: str = ""  # "sandwich" norms: of what a branch returns, before it joins the residual
    mlp_post_norm: str = ""
    qk_norm: bool = False  # q and k are normalised head by head before RoPE
    plus_one: bool = False  # norms multiply by 1 + weight
    scaled_embedding: bool = False  # by the square root of the hidden size
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # stacked in this order
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    sparse: str = ""  # where a mixture of experts lives
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


FAMILIES: dict[str, Family] = {
    "gemma2": Family(
        mlp_norm="pre_feedforward_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        plus_one=True,
        scaled_embedding=True,
    ),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(sparse="block_sparse_moe", expert=("w1", "w3", "w2")),
    "phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "qwen2": Family(),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, sparse="mlp"),
}

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = ("float32", "bfloat16", "float16")


class Rope(NamedTuple):
    """Rotary embedding: the first 2 * len(frequencies) dims of a head turn, by position * frequency radians."""

    frequencies: tuple[float, ...]
    scaling: float  # multiplies cos and sin


class Mixture(NamedTuple):
    """A mixture of experts: each token goes to `chosen` of `experts` small MLPs, in layers where `layers[n]`."""

    experts: int
    chosen: int
    normalise: bool  # the chosen experts' weights sum to one
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """One decoder-only model. Sizes are in elements; a window or a cap of 0 means there is none."""

    name: str  # a key of FAMILIES
    family: Family
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    context: int  # the longest sequence the model was made for, in tokens
    dtype: str  # the dtype its weights were published in
    windows: tuple[int, ...]
    scale: float
    soft_cap: float
    logit_cap: float
    activation: str
    tied: bool  # the head is the embedding
    rope: Rope
    mixture: Mixture | None

    @property
    def layers(self) -> int:
        return len(self.windows)

    def attention(self, block_size: int, dtype: str) -> AttentionShape:
        """What the memory nodes must know of this model."""
        return AttentionShape(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype,
            scale=self.scale,
            windows=self.windows,
            soft_cap=self.soft_cap,
        )


def spec_of(config: Any, longest: int | None = None) -> Spec:
    """Read a transformers config. Raises BadRequest naming what is not supported.

    `longest` is the longest sequence that will be served, in tokens, by default the longest the config allows. RoPE
    variants whose frequencies depend on the length (longrope, dynamic) are fixed by it once, because K is stored
    rotated: every sequence of a deployment uses the same frequencies.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BadRequest(
            f"model architecture {config.model_type!r} is not supported; supported are: {', '.join(sorted(FAMILIES))}",
            field="model",
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise BadRequest(f"activation {activation!r} is not supported; supported are: {known}", field="model")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Spec(
        name=config.model_type,
        family=family,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        context=config.max_position_embeddings,
        dtype=_dtype(config),
        windows=_windows(config),
        scale=(getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        soft_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        activation=ACTIVATIONS[activation],
        tied=bool(config.tie_word_embeddings),
        rope=_rope(config, head_dim, longest or config.max_position_embeddings),
        mixture=_mixture(config) if family.sparse else None,
    )


def dtype_of(spec: Spec, dtype: str) -> str:
    """`dtype`, or the model's own where it is "auto". Raises BadRequest for any other word."""
    if dtype == "auto":
        return spec.dtype
    if dtype not in DTYPES:
        raise BadRequest(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}", field="dtype")
    return dtype


def _dtype(config: Any) -> str:
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _windows(config: Any) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise BadRequest(f"attention of type {kind!r} is not supported", field="model")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(config: Any, head_dim: int, longest: int) -> Rope:
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        powers = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
        return Rope(tuple((1.0 / parameters["rope_theta"] ** powers).tolist()), 1.0)
    if kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise BadRequest(f"RoPE of type {kind!r} is not supported; supported are: {known}", field="model")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=longest)
    return Rope(tuple(frequencies.tolist()), float(scaling))


def _mixture(config: Any) -> Mixture:
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    stride = getattr(config, "decoder_sparse_step", 1)
    return Mixture(
        experts=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        normalise=getattr(config, "norm_topk_prob", True),
        layers=tuple(n not in dense and (n + 1) % stride == 0 for n in range(config.num_hidden_layers)),
    )
