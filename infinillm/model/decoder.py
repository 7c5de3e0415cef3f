"""The dense layers of a decoder: they hold weights and no cache, and ask the world one question, `attend`.

Legend of shape suffixes: T tokens, R rows to sample, E hidden, H query heads, K K/V heads, D head dimension, F inner
size of an MLP, V vocabulary. All of it runs under inference mode, `attend` included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from infinillm.kernels.bodies import Body
from infinillm.kernels.few_rows import Sizes
from infinillm.kernels.reference import Dense
from infinillm.model.spec import Spec
from infinillm.model.weights import Experts, Layer, Mlp, Weights

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def place(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The same tuple of tensors on `device` as `dtype`; tensors already there are not copied."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    if isinstance(value, tuple):
        parts = [place(part, device, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _dense(layer: Layer) -> Dense:
    assert isinstance(layer.mlp, Mlp)
    pieces = layer._asdict() | layer.mlp._asdict()
    return Dense(**{name: pieces[name] for name in Dense._fields})


class Decoder:
    """One model on one device. `device` and `dtype` say where and in what it computes; weights are moved if need be."""

    def __init__(self, spec: Spec, weights: Weights, device: torch.device, dtype: torch.dtype, body: Body):
        tied = weights.head is weights.embedding
        weights = place(weights, device, dtype)
        if tied:
            weights = weights._replace(head=weights.embedding)
        self.spec, self.weights, self.device, self.dtype, self.body = spec, weights, device, dtype, body
        self._frequencies = torch.tensor(spec.rope.frequencies, dtype=torch.float32, device=device)
        # rounded to dtype before it multiplies, as the model was trained
        scale = spec.hidden**0.5 if spec.family.scaled_embedding else 1.0
        self._embedding_scale = torch.tensor(scale, dtype=dtype).item()
        sizes = Sizes(spec.heads, spec.kv_heads, spec.head_dim, spec.activation, spec.eps, spec.family.plus_one)
        self._few = None
        if all(isinstance(layer.mlp, Mlp) for layer in weights.layers):
            layers = [_dense(layer) for layer in weights.layers]
            self._few = body.few_rows(layers, weights.norm, sizes, len(spec.rope.frequencies))
        self._norms = [*(layer.attention_norm for layer in weights.layers[1:]), weights.norm]
        self._activate = body.gelu_tanh_mul if spec.activation == "gelu_tanh" else body.silu_mul

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One pass over `tokens`, of any mix of sequences.

        tokens, positions  [T] int64; a position is that of a token in its own sequence
        attend             (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> o [T, H, D], all contiguous and of the
                           model's dtype, q and k after RoPE; o[t] is attention over what token t sees, itself included
        returns            hidden [T, E] in the model's dtype, normalised, ready for `logits`.
        """
        spec, weights = self.spec, self.weights
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if spec.rope.scaling != 1.0:
            cos, sin = cos * spec.rope.scaling, sin * spec.rope.scaling

        x = weights.embedding[tokens]
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        y = self._norm(x, weights.layers[0].attention_norm)
        if self._few is not None and tokens.shape[0] <= self._few.most:
            for n in range(spec.layers):
                self._few.leave(n, attend(n, *self._few.enter(n, y, cos, sin)), x, y)
            return y
        for n, layer in enumerate(weights.layers):
            o = attend(n, *self._enter(layer, y, cos, sin))
            y, x = self._leave(layer, o, x, self._norms[n])
        return y

    def _enter(self, layer: Layer, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer up to its attention: y [T, E], normalised, to q, k, v after RoPE."""
        spec, body = self.spec, self.body
        width, dim, heads, kv_heads = y.shape[0], spec.head_dim, spec.heads, spec.kv_heads
        qkv = body.linear(y, layer.qkv, layer.qkv_bias).view(width, heads + 2 * kv_heads, dim)
        q, k, v = (part.contiguous() for part in qkv.split_with_sizes((heads, kv_heads, kv_heads), 1))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._norm(q.view(-1, dim), layer.q_norm).view(width, heads, dim)
            k = self._norm(k.view(-1, dim), layer.k_norm).view(width, kv_heads, dim)
        body.rotate(q, k, cos, sin)
        return q, k, v

    def _leave(self, layer: Layer, o: Tensor, x: Tensor, next_norm: Tensor) -> tuple[Tensor, Tensor]:
        """A layer from its attention on: what the next one reads, normalised, and the residual; both [T, E]."""
        eps, plus_one, add_rms_norm = self.spec.eps, self.spec.family.plus_one, self.body.add_rms_norm
        y = self.body.linear(o.flatten(1), layer.out, layer.out_bias)
        if layer.attention_post_norm is not None:
            y = self._norm(y, layer.attention_post_norm)
        y, x = add_rms_norm(y, x, layer.mlp_norm, eps, plus_one)
        y = self._mlp(y, layer.mlp) if isinstance(layer.mlp, Mlp) else self._experts(y, layer.mlp)
        if layer.mlp_post_norm is not None:
            y = self._norm(y, layer.mlp_post_norm)
        return add_rms_norm(y, x, next_norm, eps, plus_one)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.body.rms_norm(x, weight, self.spec.eps, self.spec.family.plus_one)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary: hidden [R, E] in the model's dtype -> [R, V] float32."""
        logits = self.body.linear(hidden, self.weights.head).to(torch.float32)
        cap = self.spec.logit_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _mlp(self, x: Tensor, mlp: Mlp) -> Tensor:
        linear = self.body.linear
        return linear(self._activate(linear(x, mlp.gate_up, mlp.gate_up_bias)), mlp.down, mlp.down_bias)

    def _experts(self, x: Tensor, experts: Experts) -> Tensor:
        """Each token through its chosen experts; a token's share of each is the router's softmax over all of them."""
        mixture, linear = self.spec.mixture, self.body.linear
        assert mixture is not None
        share, chosen = torch.softmax(linear(x, experts.router).to(torch.float32), -1).topk(mixture.chosen, -1)
        if mixture.normalise:
            share = share / share.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=mixture.experts).tolist()
        out, start = torch.zeros_like(x), 0
        for n, count in enumerate(counts):
            if not count:
                continue
            picks = order[start : start + count]
            start += count
            rows = picks // mixture.chosen
            y = linear(self._activate(linear(x[rows], experts.gate_up[n])), experts.down[n])
            out.index_add_(0, rows, (y * share.flatten()[picks, None]).to(out.dtype))
        return out
