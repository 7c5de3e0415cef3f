"""One decode step of a model of Llama-3-8B's shape with random weights, through our own dense layers and store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.gpu_timing import Clock, table_of
from infinillm.attention.store import Store
from infinillm.kernels import triton_body
from infinillm.kernels.bodies import Body
from infinillm.model.decoder import Decoder
from infinillm.model.spec import FAMILIES, Rope, Spec
from infinillm.model.weights import Layer, Mlp, Weights

BLOCK = 16


def llama(hidden: int, heads: int, kv_heads: int, dim: int, layers: int, vocab: int) -> Spec:
    return Spec(
        name="llama",
        family=FAMILIES["llama"],
        vocab=vocab,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        eps=1e-5,
        context=131072,
        dtype="bfloat16",
        windows=(0,) * layers,
        scale=dim**-0.5,
        soft_cap=0.0,
        logit_cap=0.0,
        activation="silu",
        tied=False,
        rope=Rope(tuple(500000.0 ** (-2 * i / dim) for i in range(dim // 2)), 1.0),
        mixture=None,
    )


def random_weights(spec: Spec, device: torch.device, dtype: torch.dtype) -> Weights:
    def some(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=shape[-1] ** -0.5)

    def ones() -> Tensor:
        return torch.ones(spec.hidden, device=device, dtype=dtype)

    width, inner = spec.heads * spec.head_dim, spec.hidden * 7 // 2
    both = width + 2 * spec.kv_heads * spec.head_dim
    layers = tuple(
        Layer(
            attention_norm=ones(),
            qkv=some(both, spec.hidden),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            out=some(spec.hidden, width),
            out_bias=None,
            attention_post_norm=None,
            mlp_norm=ones(),
            mlp=Mlp(some(2 * inner, spec.hidden), None, some(spec.hidden, inner), None),
            mlp_post_norm=None,
        )
        for _ in range(spec.layers)
    )
    return Weights(some(spec.vocab, spec.hidden), layers, ones(), some(spec.vocab, spec.hidden))


def step(clock: Clock, batch: int, context: int) -> dict[str, Any]:
    """The step that adds one token to each of `batch` sequences of `context` tokens, ours beside torch's attention."""
    device, tiny = clock.device, clock.rehearsing
    body: Body = triton_body
    dtype = torch.float32 if tiny else torch.bfloat16
    spec = llama(64, 4, 2, 16, 2, 100) if tiny else llama(4096, 32, 8, 128, 32, 128256)
    decoder = Decoder(spec, random_weights(spec, device, dtype), device, dtype, body)
    held = -(-context // BLOCK)
    store = Store(spec.attention(BLOCK, str(dtype).removeprefix("torch.")), batch * held, device, body)
    store.pool.normal_()
    table = table_of([[context - 1]] * batch, [held] * batch, BLOCK, device)
    last = table.blocks.view(batch, held)[:, -1].long()
    slots = last * BLOCK + (context - 1) % BLOCK
    tokens = torch.arange(batch, device=device)
    positions = torch.full((batch,), context - 1, device=device)

    def ours(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store.write(layer, k, v, slots)
        return store.attend(layer, q, table).o

    def run(attend: Any) -> Tensor:
        return decoder.logits(decoder.forward(tokens, positions, attend)).argmax(-1)

    read = decoder.weights.bytes - decoder.weights.embedding.nbytes
    kv = 2 * spec.layers * batch * context * spec.kv_heads * spec.head_dim * store.pool.element_size()
    found: dict[str, Any] = {"weights_GB": read / 1e9, "K/V_GB": kv / 1e9}
    found["ms"] = clock.time(lambda: run(ours)) * 1e3
    found["ms_from_python"] = clock.time(lambda: run(ours), captured=False) * 1e3
    question = torch.ones((batch, spec.heads, spec.head_dim), device=device, dtype=dtype)

    def attention() -> None:
        for layer in range(spec.layers):
            store.attend(layer, question, table)

    found["ms_of_attention"] = clock.time(attention) * 1e3
    found["tokens_per_s"] = batch / found["ms"] * 1e3
    found["share_of_copy"] = (read + kv) / found["ms"] / 1e6 / clock.copy
    # The same bytes again for torch: K and V of a sequence contiguous, layer by layer.
    flat = store.pool.permute(0, 2, 3, 1, 4, 5).view(spec.layers, 2, -1)[
        ..., : batch * context * spec.kv_heads * spec.head_dim
    ]
    cache = flat.view(spec.layers, 2, batch, spec.kv_heads, context, spec.head_dim)

    def theirs(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[layer, 0, :, :, -1] = k
        cache[layer, 1, :, :, -1] = v
        packed = q.view(batch, spec.kv_heads, -1, spec.head_dim)
        return sdpa(packed, cache[layer, 0], cache[layer, 1], scale=spec.scale).reshape(q.shape)

    found["ms_with_torch_sdpa"] = clock.time(lambda: run(theirs)) * 1e3
    return found
