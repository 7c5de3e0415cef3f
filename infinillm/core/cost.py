"""What things cost: seconds of a decode step, of a question to a node, of moving K/V, from a few calibrated numbers.

A roofline with fixed costs. Reading is what decode pays for (weights once per step, K/V once per token of context), so
a part's time is its bytes over the bandwidth it really reaches, plus what every layer costs however small it is. Asking
another node costs a round trip and `question_bytes` per row, whatever the context. All times are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from infinillm.core.types import AttentionShape


@dataclass(frozen=True, slots=True)
class Device:
    """One device: data-sheet figures, the shares of them it reaches, and its fixed costs, all measured or published."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes per second, read
    flops: float  # per second, dense, in the dtype of the model
    weights_share: float  # of bandwidth, streaming weights
    attention_share: float  # of bandwidth, paged attention over much context
    flops_share: float  # of flops, prefill
    attention_seconds: float  # fixed, of one layer's attention
    layer_seconds: float  # fixed, of everything else in a layer
    merge_seconds: float  # of merging partials in one layer


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two nodes: `latency` is a round trip with no work in it, `bandwidth` bytes per second one way."""

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Dense:
    """Everything of a model that is not attention: parameters read per layer and per step (the head)."""

    layer_parameters: int
    head_parameters: int
    element_bytes: float


@dataclass(frozen=True, slots=True)
class Asked:
    """What one remote node does in one layer: query rows sent to it, and tokens of context it reads."""

    rows: int
    tokens: float


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of one model on equal devices joined by equal links."""

    device: Device
    link: Link
    dense: Dense
    shape: AttentionShape

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.shape.element_bytes

    @property
    def seconds_per_token(self) -> float:
        """Reading one token of context in one layer."""
        return self.token_bytes / (self.device.attention_share * self.device.bandwidth)

    def pass_over(self, parameters: int, rows: int) -> float:
        """Multiplying `rows` rows by so many parameters: bound by reading them or by computing, whichever is more."""
        d = self.device
        reading = parameters * self.dense.element_bytes / (d.weights_share * d.bandwidth)
        return max(reading, 2 * parameters * rows / (d.flops_share * d.flops))

    def attend(self, tokens: float) -> float:
        """Decode attention of one layer over `tokens` of context, summed over the sequences."""
        return self.device.attention_seconds + tokens * self.seconds_per_token if tokens > 0 else 0.0

    def exchange(self, rows: int) -> float:
        """A question of `rows` rows and its answer, without the work in between."""
        return self.link.latency + rows * self.shape.question_bytes / self.link.bandwidth

    def decode_step(self, rows: int, local: float, remote: Iterable[Asked] = ()) -> float:
        """One step of `rows` sequences; `local` tokens of context are read here while remote nodes read theirs."""
        away = [self.exchange(asked.rows) + self.attend(asked.tokens) for asked in remote]
        attention = max([self.attend(local), *away]) + (self.device.merge_seconds if away else 0.0)
        layer = self.pass_over(self.dense.layer_parameters, rows) + self.device.layer_seconds + attention
        return self.shape.layers * layer + self.pass_over(self.dense.head_parameters, rows)

    def spreading_pays_from(self, rows: int) -> float:
        """Tokens of context above which handing the best share to one equal node makes a layer quicker.

        Of n tokens the best split reads (n + exchange) / 2 here, in units of reading a token; it wins where that and
        a merge take less than reading n.
        """
        return (self.exchange(rows) + 2 * self.device.merge_seconds) / self.seconds_per_token

    def best_local(self, tokens: float, rows: int) -> float:
        """Of `tokens`, how many to keep here so that one equal node is done at the same moment; all, where none can."""
        return min(tokens, (tokens + self.exchange(rows) / self.seconds_per_token) / 2)

    def moving_pays_after(self, tokens: int) -> float:
        """Decode steps still to come above which moving K/V of `tokens` sends fewer bytes than asking in each."""
        return tokens * self.token_bytes / self.shape.question_bytes

    def move(self, tokens: int) -> float:
        """Moving K/V of `tokens` in all layers, streamed."""
        return self.link.latency + self.shape.layers * tokens * self.token_bytes / self.link.bandwidth

    def prefill(self, tokens: int, prefix: int = 0) -> float:
        """Computing `tokens` after `prefix` that are cached; bound by computing."""
        s = self.shape
        dense = 2 * (s.layers * self.dense.layer_parameters + self.dense.head_parameters) * tokens
        attention = 4 * s.layers * s.heads * s.head_dim * (tokens * prefix + tokens * tokens / 2)
        return (dense + attention) / (self.device.flops_share * self.device.flops)
