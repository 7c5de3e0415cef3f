"""Tiny random models of every supported family, saved as real Hugging Face folders, and a memory to run them alone.

Weights are scaled so that the easy oracle is gone: greedy output varies, and a change to one early block of the prompt
moves the log-probabilities. tests/model/test_tiny.py proves it.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, trainers
from torch import Tensor

from infinillm.model.decoder import Attend, Decoder
from infinillm.model.spec import Spec
from infinillm.model.weights import load

transformers.utils.logging.disable_progress_bar()
SEED = 20240611
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = (
    "The model asks, the pool remembers, the ledger decides. Dense layers hold weights and no cache; their one "
    "question to the world is a function. Blocks of keys and values live on nodes spread over the cluster, and each "
    "node answers with attention over the tokens it holds. Parts merge, in any order, to the exact attention. Who "
    "owns, lends and borrows blocks, and where every token of every sequence lives, is one value. Policies are pure "
    "functions of it. "
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}

# name -> (family, what differs from SIZES). head_dim differs from hidden / heads where the family allows it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 40}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, trained on TEXT: every string round-trips."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = ["<|start|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def config(name: str) -> Any:
    family, differs = MODELS[name]
    sizes = {"vocab_size": len(tokenizer()), **SIZES, **differs}
    return transformers.AutoConfig.for_model(family, **copy.deepcopy(sizes))


def model(name: str) -> Any:
    """The transformers model, float32, eager attention: the oracle. Seeded: the same weights each time."""
    spoken = config(name)
    spoken._attn_implementation = "eager"
    made = transformers.AutoModelForCausalLM.from_config(spoken, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for key, tensor in made.state_dict().items():
            tensor.copy_(_draw(key, tensor, spoken.model_type, generator))
    made.generation_config.pad_token_id = 1
    return made


def _draw(key: str, tensor: Tensor, family: str, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    gemma = (
        family == "gemma2"
    )  # tied and scaled up, its embedding would repeat what was just said: mixed signs forbid it
    if key == "model.norm.weight" and gemma:
        return 8.0 * noise
    if key.endswith("norm.weight"):
        return 0.2 * noise + (0.0 if gemma else 1.0)
    if tensor.dim() == 1:
        return 0.5 * noise
    if "embed_tokens" in key or "lm_head" in key:
        return noise * (0.175 if gemma else 1.0 if "embed_tokens" in key else 0.3)
    gain = 2.0 if any(part in key for part in ("q_proj", "k_proj", "qkv_proj", "o_proj")) else 1.4
    return gain * noise * tensor.shape[-1] ** -0.5


@cache
def folder(name: str) -> Path:
    """The model as a Hugging Face folder: config, safetensors, tokenizer. Lives as long as the process."""
    root = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    path = root / name
    model(name).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


class Memory:
    """One sequence's K/V, contiguous, in the order it came: the plainest possible answer to `attend`."""

    def __init__(self, spec: Spec):
        self._spec = spec
        self._k: list[list[Tensor]] = [[] for _ in range(spec.layers)]
        self._v: list[list[Tensor]] = [[] for _ in range(spec.layers)]
        self._positions: list[list[Tensor]] = [[] for _ in range(spec.layers)]

    def at(self, positions: Tensor) -> Attend:
        """The `attend` of one pass over tokens at `positions`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for kept, new in zip((self._k, self._v, self._positions), (k, v, positions), strict=True):
                kept[layer].append(new.clone())
            keys, values, where = (torch.cat(kept[layer]) for kept in (self._k, self._v, self._positions))
            return self._answer(layer, q, keys.float(), values.float(), positions[:, None] - where[None, :])

        return attend

    def _answer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, age: Tensor) -> Tensor:
        spec, (width, heads, dim) = self._spec, q.shape
        seen = age >= 0
        if window := spec.windows[layer]:
            seen &= age < window
        groups = q.float().view(width, spec.kv_heads, heads // spec.kv_heads, dim)
        score = torch.einsum("tkgd,skd->kgts", groups, k) * spec.scale
        if spec.soft_cap:
            score = spec.soft_cap * torch.tanh(score / spec.soft_cap)
        weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("kgts,skd->tkgd", weight, v).reshape(width, heads, dim).to(q.dtype).contiguous()


def silent(what: str, share: float) -> None:
    """Progress nobody watches."""


def decoder(path: Path, body: Any, dtype: str = "float32", longest: int | None = None) -> Decoder:
    """The Decoder of folder `path` on the CPU."""
    cpu = torch.device("cpu")
    spec, weights = load(path, dtype, cpu, silent, longest)
    return Decoder(spec, weights, cpu, weights.embedding.dtype, body)


def run(model: Decoder, tokens: list[int], memory: Memory, start: int, chunk: int) -> Tensor:
    """Logits [len(tokens), V] of tokens at positions from `start` on, computed `chunk` at a time."""
    rows = []
    for at in range(0, len(tokens), chunk):
        part = torch.tensor(tokens[at : at + chunk], dtype=torch.int64)
        positions = torch.arange(start + at, start + at + len(part))
        rows.append(model.logits(model.forward(part, positions, memory.at(positions))))
    return torch.cat(rows)


def generate(model: Decoder, prompt: list[int], count: int, chunk: int = 10**9) -> tuple[list[int], Tensor]:
    """Greedy: `count` tokens and the log-probabilities [count, V] each was chosen from."""
    memory, out, rows = Memory(model.spec), [], []
    logits = run(model, prompt, memory, 0, chunk)[-1]
    while True:
        rows.append(logits.log_softmax(-1))
        out.append(int(logits.argmax()))
        if len(out) == count:
            return out, torch.stack(rows)
        logits = run(model, out[-1:], memory, len(prompt) + len(out) - 1, 1)[-1]


def oracle(model: Any, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """What transformers' generate gives, past any end-of-text token: the same two values as `generate`."""
    model.generation_config.eos_token_id = None
    done = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return done.sequences[0, len(prompt) :].tolist(), torch.cat(done.logits).log_softmax(-1)


def prompt(length: int, seed: int = 1) -> list[int]:
    """Random tokens of the tiny vocabulary, without its two special ones."""
    return torch.randint(2, len(tokenizer()), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
