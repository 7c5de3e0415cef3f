"""How long elastic instances take: a prefill by its degree of parallelism, a decode step, a move of K/V.

A prefill on d instances takes alpha_d + beta_d * (sum of lengths) + gamma_d * (sum of their squares): equation 7 of
LoongServe, with a triple measured for every degree of parallelism (dop). The paper has no model of decode (its code
takes a constant); ours is fixed + each * requests + token * context, where the instances share the reading of the
context, and each of them reads all weights. Triples are fitted as the released code does: least squares on the
relative error, each sample weighted by seconds ** 0.1. All times are seconds, all lengths tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any, NamedTuple

from infinillm.errors import BadRequest


class PrefillTime(NamedTuple):
    """Seconds of a prefill at one degree of parallelism: fixed, by token, by token squared."""

    alpha: float
    beta: float
    gamma: float

    def __call__(self, tokens: float, squares: float) -> float:
        """Of requests whose lengths sum to `tokens`, and the squares of their lengths to `squares`."""
        return self.alpha + self.beta * tokens + self.gamma * squares


class DecodeTime(NamedTuple):
    """Seconds of a decode step: fixed, by request, by token of context as measured on `dop` instances."""

    fixed: float
    each: float
    token: float
    dop: int

    def __call__(self, dop: int, requests: int, context: float) -> float:
        return self.fixed + self.each * requests + self.token * context * self.dop / dop


@dataclass(frozen=True, slots=True)
class Times:
    """What the planner knows of the hardware: LoongServe's scaling information base.

    `prefill` holds the times on 1, 2, 3, ... instances; no batch is given more of them than that. `move` is seconds per
    token of K/V that goes to another instance. From `tipping` seconds on a prefill of several requests is bound by
    computing, and more of them only wait for each other. From `crowd` requests on, a master is bound by computing.
    """

    prefill: tuple[PrefillTime, ...]
    decode: DecodeTime
    move: float
    tipping: float
    crowd: int

    @property
    def widest(self) -> int:
        """The largest degree of parallelism."""
        return len(self.prefill)

    def on(self, instances: int, tokens: float, squares: float) -> float:
        """Seconds of one prefill striped over so many instances, or over as many as may be."""
        return self.prefill[min(instances, self.widest) - 1](tokens, squares)

    def alone(self, tokens: int) -> float:
        """Seconds of one prompt on one instance."""
        return self.on(1, tokens, tokens**2)

    def quickest(self, instances: int, tokens: float, squares: float) -> float:
        """Seconds of one prefill at the best degree that so many instances allow."""
        return min(time(tokens, squares) for time in self.prefill[:instances])


def to_plain(times: Times) -> dict[str, Any]:
    """As numbers, lists and names, for JSON."""
    return {
        "prefill": [list(each) for each in times.prefill],
        "decode": list(times.decode),
        "move": times.move,
        "tipping": times.tipping,
        "crowd": times.crowd,
    }


def from_plain(plain: Any) -> Times:
    """What `to_plain` made; anything else in it is passed over. Raises BadRequest, naming the field."""
    if not isinstance(plain, Mapping):
        raise BadRequest("times are a mapping of names", field="times")
    rows = plain.get("prefill")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise BadRequest("prefill of times must be a list of [alpha, beta, gamma], from degree 1 on", field="prefill")
    fixed, each, token, dop = _numbers("decode", plain.get("decode"), 4)
    move, tipping, crowd = (_numbers(name, [plain.get(name)], 1)[0] for name in ("move", "tipping", "crowd"))
    for name, number in (("decode", dop), ("crowd", crowd)):
        if number < 1 or number != int(number):
            raise BadRequest(f"{name} of times needs a positive whole number, not {number!r}", field=name)
    return Times(
        tuple(PrefillTime(*_numbers("prefill", row, 3)) for row in rows),
        DecodeTime(fixed, each, token, int(dop)),
        move,
        tipping,
        int(crowd),
    )


def _numbers(name: str, found: Any, count: int) -> list[float]:
    numbers = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else []
    fit = all(isinstance(x, int | float) and not isinstance(x, bool) and isfinite(x) and x >= 0 for x in numbers)
    if len(numbers) != count or not fit:
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise BadRequest(f"{name} of times must be {wanted}, none negative, not {found!r}", field=name)
    return [float(x) for x in numbers]


# --- fitting ---------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One measured prefill: the sum of its lengths, the sum of their squares, its seconds."""

    tokens: float
    squares: float
    seconds: float


def sample(lengths: Iterable[int], seconds: float) -> Sample:
    """A measured prefill of requests of these lengths."""
    known = list(lengths)
    return Sample(sum(known), sum(n * n for n in known), seconds)


def fitted(samples: Sequence[Sample]) -> PrefillTime:
    """The triple of one degree of parallelism. A term below zero is noise: it is left out. Raises BadRequest."""
    if not samples or any(each.seconds <= 0 for each in samples):
        raise BadRequest("a fit needs samples that took time", field="samples")
    weights = [each.seconds ** (0.1 - 2) for each in samples]
    terms = [(1.0, each.tokens, each.squares) for each in samples]
    sums = [sum(w * row[at] ** 2 for w, row in zip(weights, terms, strict=True)) for at in range(3)]
    scale = [sqrt(each) or 1.0 for each in sums]  # so that terms are of a size, however far apart the samples
    rows = [tuple(row[at] / scale[at] for at in range(3)) for row in terms]
    used = [0, 1, 2]
    while True:
        matrix = [[sum(w * row[a] * row[b] for w, row in zip(weights, rows, strict=True)) for b in used] for a in used]
        right = [
            sum(w * row[a] * each.seconds for w, row, each in zip(weights, rows, samples, strict=True)) for a in used
        ]
        found = dict(zip(used, _solved(matrix, right), strict=True))
        least = min(used, key=lambda term: found[term])
        if found[least] >= 0:
            return PrefillTime(*(found.get(term, 0.0) / scale[term] for term in range(3)))
        used.remove(least)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The x of matrix x = right, by elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    most = max(abs(value) for row in matrix for value in row)
    for at in range(size):
        pivot = max(range(at, size), key=lambda row: abs(rows[row][at]))
        rows[at], rows[pivot] = rows[pivot], rows[at]
        if abs(rows[at][at]) <= 1e-13 * most:
            raise BadRequest("the samples are too few, or too much alike, to tell three terms apart", field="samples")
        for row in range(size):
            if row != at:
                factor = rows[row][at] / rows[at][at]
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[at], strict=True)]
    return [rows[at][size] / rows[at][at] for at in range(size)]
