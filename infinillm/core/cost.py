"""What things cost: seconds of a decode step, of a question to a node, of moving K/V, from measured curves.

A step of `rows` sequences pays for two things that behave differently. Everything but attention depends on the rows
alone: f(rows). Attention depends on the tokens of context and not on the batch: the seconds of S tokens over S are one
over the rate g(S). So a step takes f(rows) + sum of S / g(S), where what other nodes read is read at the same time.
Asking another node costs the same whatever the context. A `Cost` comes from a profile, measured on the worker it
speaks for, or from a data sheet (`roofline`). All times are seconds, over all layers; sizes are bytes.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from math import isfinite
from typing import Any

from infinillm.core.types import AttentionShape, Node, NodeId
from infinillm.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by some amount: straight between measured points and on beyond the outer two; never negative."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, amount: float) -> float:
        points = self.points
        at = bisect_left(points, (amount,), 1, len(points) - 1)
        (a, low), (b, high) = points[at - 1], points[at]
        return max(low + (amount - a) * (high - low) / (b - a), 0.0)


def fitted(samples: Mapping[int, Sequence[float]]) -> Curve:
    """The curve of several samples at each amount: of each the lower quartile, since others can only slow a sample.

    More never costs less: a point below the one before is noise.
    """
    amounts = sorted(samples)
    found = [statistics.quantiles(samples[a], n=4)[0] if len(samples[a]) > 1 else samples[a][0] for a in amounts]
    return Curve(tuple(zip(map(float, amounts), accumulate(found, max), strict=True)))


@dataclass(frozen=True, slots=True)
class Cost:
    """The costs of one model on one node."""

    dense: Curve  # by rows: a step without its attention
    attention: Curve  # by tokens of context of one sequence: its attention in a step
    question: Curve  # by rows: asking another node and hearing its answer, without its work
    merging: Curve  # by rows: merging the answer of another node
    move: Curve  # by tokens: sending their K/V to another node
    prefill: Curve  # by tokens: computing a prompt that long
    question_bytes: int  # of one row, there and back
    token_bytes: int  # K and V of one token

    @property
    def seconds_per_token(self) -> float:
        """Reading one more token of much context."""
        (a, low), (b, high) = self.attention.points[-2:]
        return (high - low) / (b - a)

    def attend(self, tokens: float, rows: float = 1) -> float:
        """Decode attention of `rows` sequences with `tokens` of context between them; what is fixed is paid once."""
        if tokens <= 0:
            return 0.0
        fixed = self.attention(0)
        return fixed + rows * max(self.attention(tokens / rows) - fixed, 0.0)

    def answer(self, rows: float, tokens: float) -> float:
        """From a question of `rows` rows to the answer of a node like this, which holds `tokens` of their context."""
        return self.question(rows) + self.attend(tokens, rows)

    def decode_step(self, rows: float, local: float, away: Iterable[float] = ()) -> float:
        """One step of `rows` sequences; `local` tokens of context are read here while others `answer`."""
        waits = list(away)
        attention = self.attend(local, rows)
        if waits:
            attention = max(attention, *waits) + len(waits) * self.merging(rows)
        return self.dense(rows) + attention

    def computing(self, tokens: int, prefix: int = 0) -> float:
        """Computing `tokens` of a prompt after `prefix` that are cached."""
        return self.prefill(prefix + tokens) - (self.prefill(prefix) if prefix else 0.0)

    def spreading_pays_from(self, rows: int) -> float:
        """Tokens of context above which handing the best share to one equal node makes a step quicker.

        Of n tokens the best split reads (n + question) / 2 here, in units of reading a token; it wins where that and
        a merge take less than reading n.
        """
        return (self.question(rows) + 2 * self.merging(rows)) / self.seconds_per_token

    def copying_pays(self, tokens: int, own: int, steps: int) -> bool:
        """Whether copying a prefix of `tokens` here saves more than it costs, in so many steps of its requests.

        Each reads `own` tokens here besides. Two nodes that read at once may be quicker than one: then it never pays.
        """
        there = self.decode_step(1, own, [self.answer(1, tokens)])
        return steps * (there - self.decode_step(1, own + tokens)) > self.move(tokens)

    def moving_pays_after(self, tokens: int) -> float:
        """Decode steps still to come above which moving K/V of `tokens` sends fewer bytes than asking in each."""
        return tokens * self.token_bytes / self.question_bytes


CURVES = tuple(each.name for each in fields(Cost) if each.type == "Curve")
SIZES = tuple(each.name for each in fields(Cost) if each.type == "int")


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of every node: its own, else what is taken for all, if anything is.

    near   of nodes to which those of their own place have another way, where that was measured
    """

    default: Cost | None = None
    own: Mapping[NodeId, Cost] = field(default_factory=dict)
    near: Mapping[NodeId, Cost] = field(default_factory=dict)

    def of(self, node: NodeId) -> Cost | None:
        return self.own.get(node, self.default)

    def between(self, one: Node, other: Node) -> Cost | None:
        """The cost of `other` as `one` pays it, over the way between them."""
        if one.place == other.place and (near := self.near.get(other.id)) is not None:
            return near
        return self.of(other.id)


def to_plain(cost: Cost) -> dict[str, Any]:
    """As numbers, lists and names, for JSON."""
    curves = {name: [list(point) for point in getattr(cost, name).points] for name in CURVES}
    return curves | {name: getattr(cost, name) for name in SIZES}


def from_plain(plain: Any) -> Cost:
    """What `to_plain` made; anything else in it is passed over. Raises BadRequest, naming the field."""
    if not isinstance(plain, Mapping):
        raise BadRequest("a profile is a mapping of names", field="profile")
    values: dict[str, Any] = {name: _curve(name, plain) for name in CURVES}
    values |= {name: _size(name, plain) for name in SIZES}
    return Cost(**values)


def _curve(name: str, plain: Mapping[str, Any]) -> Curve:
    try:
        points = tuple((float(amount), float(seconds)) for amount, seconds in plain[name])
    except (KeyError, TypeError, ValueError):
        raise BadRequest(f"{name} of a profile must be a list of [amount, seconds]", field=name) from None
    rising = all(a < b for (a, _), (b, _) in pairwise(points))
    if len(points) < 2 or not rising or not all(isfinite(x) and x >= 0 for point in points for x in point):
        raise BadRequest(f"{name} of a profile needs two points or more, of rising amounts, none negative", field=name)
    return Curve(points)


def _size(name: str, plain: Mapping[str, Any]) -> int:
    size = plain.get(name)
    if not isinstance(size, int) or size < 1:
        raise BadRequest(f"{name} of a profile must be a positive whole number, not {size!r}", field=name)
    return size


# --- from a data sheet -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Device:
    """One device: data-sheet figures, the shares of them it reaches, and its fixed costs, all measured or published."""

    name: str
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


FAR = 1 << 20  # where the second point of a straight line lies


def roofline(device: Device, link: Link, dense: Dense, shape: AttentionShape) -> Cost:
    """The cost of one model on a device of a data sheet, with equal nodes at the end of equal links.

    Decode is bound by reading (weights once per step, K/V once per token of context) or, from some batch on, by
    computing; on top comes what every layer costs however small it is.
    """
    parameters = shape.layers * dense.layer_parameters + dense.head_parameters
    speed = device.flops_share * device.flops
    reading = parameters * dense.element_bytes / (device.weights_share * device.bandwidth)
    knee = max(reading * speed / (2 * parameters), 1.0)  # rows whose computing takes as long as reading
    fixed = shape.layers * device.layer_seconds
    token_bytes = shape.block_bytes // shape.block_size
    question_bytes = shape.layers * shape.question_bytes

    def line(start: float, each: float) -> Curve:
        return Curve(((0.0, start), (float(FAR), start + FAR * each)))

    def prompt(tokens: int) -> float:
        return (2 * parameters * tokens + 2 * shape.layers * shape.heads * shape.head_dim * tokens * tokens) / speed

    batches = ((0.0, max(reading, 2 * parameters / speed)), (knee, 2 * parameters * knee / speed))
    beyond = (2 * knee, 4 * parameters * knee / speed)
    return Cost(
        dense=Curve(tuple((rows, fixed + seconds) for rows, seconds in (*batches, beyond))),
        attention=line(
            shape.layers * device.attention_seconds, token_bytes / (device.attention_share * device.bandwidth)
        ),
        question=line(shape.layers * link.latency, question_bytes / link.bandwidth),
        merging=line(shape.layers * device.merge_seconds, 0.0),
        move=line(link.latency, token_bytes / link.bandwidth),
        prefill=Curve(((0.0, 0.0), *((float(n), prompt(n)) for n in (1 << k for k in range(22))))),
        question_bytes=question_bytes,
        token_bytes=token_bytes,
    )
