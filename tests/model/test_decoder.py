"""The Decoder of every family against transformers' generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest
from infinillm.kernels.bodies import body as fastest
from infinillm.model.decoder import Decoder
from infinillm.model.spec import FAMILIES, spec_of
from infinillm.model.weights import Experts
from tests import tiny

NAMES = sorted(tiny.MODELS)
COUNT = 32
CPU = torch.device("cpu")


def test_every_family_has_a_tiny_model() -> None:
    assert {family for family, _ in tiny.MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(name: str, body: Any) -> None:
    model, prompt = tiny.decoder(tiny.folder(name), body), tiny.prompt(70)
    want, scores = tiny.oracle(tiny.model(name), prompt, COUNT)
    for chunk in (70, 13):
        got, mine = tiny.generate(model, prompt, COUNT, chunk)
        assert got == want
        assert (mine - scores).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_this_machines_body_agrees(name: str) -> None:
    model, prompt = tiny.decoder(tiny.folder(name), fastest(CPU)), tiny.prompt(67, seed=2)
    want, scores = tiny.oracle(tiny.model(name), prompt, 24)
    got, mine = tiny.generate(model, prompt, 24, 8)
    assert got == want
    assert (mine - scores).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_not_easy(name: str, body: Any) -> None:
    """Greedy output varies, and one early block of the prompt moves the log-probabilities."""
    model, prompt = tiny.decoder(tiny.folder(name), body), tiny.prompt(70)
    tokens, scores = tiny.generate(model, prompt, COUNT)
    assert len(set(tokens)) >= COUNT // 3
    assert max(tokens.count(token) for token in tokens) <= COUNT // 4
    changed = [*prompt[:8], *tiny.prompt(8, seed=3), *prompt[16:]]
    moved = (tiny.generate(model, changed, 1)[1][0] - scores[0]).abs().max()
    assert moved > 0.1


@pytest.mark.parametrize("length", [40, 100])
def test_longrope_follows_the_longest_sequence_served(length: int, body: Any) -> None:
    """transformers looks at each sequence, we at the deployment: they agree where all sequences are of one kind."""
    model = tiny.decoder(tiny.folder("phi3-longrope"), body, longest=64 if length < 64 else None)
    prompt = tiny.prompt(length)
    want, scores = tiny.oracle(tiny.model("phi3-longrope"), prompt, 20)
    got, mine = tiny.generate(model, prompt, 20, 32)
    assert got == want
    assert (mine - scores).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_half_precision_stays_near_float32(name: str, dtype: str, body: Any) -> None:
    model, prompt = tiny.decoder(tiny.folder(name), body, dtype), tiny.prompt(40)
    assert model.dtype == getattr(torch, dtype)
    exact = tiny.run(tiny.decoder(tiny.folder(name), body), prompt, tiny.Memory(model.spec), 0, 40).log_softmax(-1)
    rough = tiny.run(model, prompt, tiny.Memory(model.spec), 0, 9).log_softmax(-1)
    assert rough.dtype == torch.float32
    off = (exact - rough).abs().mean()
    assert off < (0.5 if dtype == "bfloat16" else 0.1)
    assert (exact.argmax(-1) == rough.argmax(-1)).float().mean() > 0.7


def test_attend_sees_what_was_promised(body: Any) -> None:
    """Layers in order, contiguous tensors of the model's dtype, and o used as it is returned."""
    model, asked = tiny.decoder(tiny.folder("qwen3"), body, "bfloat16"), []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in (q, k, v))
        return torch.zeros_like(q)

    spec = model.spec
    hidden = model.forward(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 9]), attend)
    shapes = [(3, n, spec.head_dim) for n in (spec.heads, spec.kv_heads, spec.kv_heads)]
    assert asked == [(layer, *shapes) for layer in range(spec.layers)]
    assert hidden.shape == (3, spec.hidden)
    assert model.logits(hidden[1:]).shape == (2, spec.vocab)


def test_sequences_in_one_pass_do_not_mix(body: Any) -> None:
    model = tiny.decoder(tiny.folder("mixtral"), body)
    a, b = tiny.prompt(20, seed=4), tiny.prompt(11, seed=5)
    alone = [tiny.run(model, tokens, tiny.Memory(model.spec), 0, 99) for tokens in (a, b)]
    positions = [torch.arange(len(tokens)) for tokens in (a, b)]
    answers = [tiny.Memory(model.spec).at(where) for where in positions]

    def attend(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        parts = zip(*(t.split([20, 11]) for t in qkv), strict=True)
        return torch.cat([answer(layer, *part) for answer, part in zip(answers, parts, strict=True)])

    logits = model.logits(model.forward(torch.tensor(a + b), torch.cat(positions), attend))
    assert torch.allclose(logits, torch.cat(alone), atol=1e-4)


def test_all_experts_are_used() -> None:
    """Else the mixture of experts would be tested on few of its weights."""
    model = tiny.decoder(tiny.folder("qwen3_moe"), fastest(CPU))
    mixture, mlps = model.spec.mixture, [layer.mlp for layer in model.weights.layers]
    assert mixture is not None
    assert mixture.layers == tuple(isinstance(mlp, Experts) for mlp in mlps) == (True, False, True)
    x = torch.randn(64, model.spec.hidden, generator=torch.Generator().manual_seed(0))
    for mlp in mlps:
        if isinstance(mlp, Experts):
            chosen = (x @ mlp.router.T).topk(mixture.chosen).indices
            assert set(chosen.flatten().tolist()) == set(range(mixture.experts))


def test_weights_may_come_from_elsewhere(body: Any) -> None:
    """device and dtype of a Decoder hold whatever those of the weights; tied stays tied."""
    model = tiny.decoder(tiny.folder("gemma2"), body)
    other = Decoder(model.spec, model.weights, CPU, torch.bfloat16, body)
    assert other.weights.head is other.weights.embedding
    assert other.weights.layers[0].qkv.dtype == torch.bfloat16
    again = Decoder(model.spec, model.weights, CPU, torch.float32, body)
    assert again.weights.layers[0].qkv is model.weights.layers[0].qkv


@pytest.mark.parametrize("name", NAMES)
def test_rope_is_that_of_transformers(name: str) -> None:
    model, spec = tiny.model(name), spec_of(tiny.config(name), longest=64 if name == "phi3-longrope" else None)
    rope = model.model.rotary_emb
    assert torch.equal(torch.tensor(spec.rope.frequencies), rope.inv_freq)
    assert spec.rope.scaling == pytest.approx(rope.attention_scaling)


def test_windows_and_attention_shape() -> None:
    assert spec_of(tiny.config("gemma2")).windows == (24, 0, 24)
    assert spec_of(tiny.config("mistral")).windows == (24, 24, 24)
    assert spec_of(tiny.config("qwen2")).windows == (0, 0, 0)
    windowed = transformers.Qwen2Config(
        **tiny.SIZES, vocab_size=99, use_sliding_window=True, sliding_window=7, max_window_layers=2
    )
    assert spec_of(windowed).windows == (0, 0, 7)
    assert spec_of(tiny.config("gemma2")).attention(16, "bfloat16") == AttentionShape(
        heads=4,
        kv_heads=2,
        head_dim=32,
        block_size=16,
        dtype="bfloat16",
        scale=24**-0.5,
        windows=(24, 0, 24),
        soft_cap=5.0,
    )


def test_unsupported_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"'gpt2' is not supported.*gemma2.*qwen3_moe") as caught:
        spec_of(transformers.GPT2Config())
    assert caught.value.field == "model"
    with pytest.raises(BadRequest, match="'relu'"):
        spec_of(transformers.LlamaConfig(hidden_act="relu"))


def test_default_model_is_transformers_own(smollm: Path) -> None:
    """SmolLM2-135M, float32: 32 greedy tokens of a chat, prefilled whole and in odd chunks."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    question = [{"role": "user", "content": "Name three rivers of Europe, and say where each meets the sea."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    want, scores = tiny.oracle(oracle, prompt, 32)
    model = tiny.decoder(smollm, fastest(CPU))
    for chunk in (len(prompt), 7):
        got, mine = tiny.generate(model, prompt, 32, chunk)
        assert got == want
        assert (mine - scores).abs().max() < 1e-3
    assert len(set(want)) > 12
