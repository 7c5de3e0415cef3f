"""Step 3: which requests are prefilled together and on which instances, by dynamic programming.

Theory of operation. Requests lie in order of length, longest first, and instances by place, then by free slots. A
batch is a run of neighbours on a run of neighbouring instances. f[k][i], the least sum of normalised input latencies
(a batch's seconds times the sum of 1 / length) of the first i requests on the first k instances, is

    min( f[k-1][i],  min over d, j of  f[k-d][j] + T_d(requests j..i) * sum of 1/length )

where requests j..i fit the free slots of the d instances. This is the recurrence of LoongServe's section 5.3; that an
instance may stay without work is ours (k-1), as a lone short prompt is quickest on one of four.

The paper prunes j and d by neighbouring entries, which needs the quadrangle inequality. The released code has one of
its bounds the wrong way round: its table never holds more than one batch. With the right bounds it can still miss the
best by a factor of two, or find nothing where there is something, because what fits is not so regular. So nothing is
pruned here: n^2 m^2 / 4 additions, done by the row. Beyond `MOST` requests those of the shorter end, which are alike,
are batched in parcels of neighbours: the cuts are fewer, everything else stays exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from operator import add
from typing import NamedTuple

from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Waiting

MOST = 100  # runs of requests among which cuts are searched


class Batched(NamedTuple):
    """Requests to prefill together on a group, and the seconds that takes."""

    requests: tuple[Waiting, ...]
    group: tuple[Instance, ...]
    seconds: float

    @property
    def latency(self) -> float:
        """Sum of normalised input latencies: seconds per token of input, over the requests."""
        return self.seconds * sum(1 / each.tokens for each in self.requests)


def batched(requests: Sequence[Waiting], instances: Sequence[Instance], times: Times) -> tuple[Batched, ...] | None:
    """The batches of least normalised latency in sum; None where the requests do not fit."""
    queue = sorted(requests, key=lambda r: (-r.tokens, r.arrived, r.id))
    order = sorted(instances, key=lambda e: (e.place, -e.free, e.id))
    cuts = _cuts(len(queue))
    tokens = _sums([float(r.tokens) for r in queue], cuts)
    squares = _sums([float(r.tokens) ** 2 for r in queue], cuts)
    inverse = _sums([1.0 / r.tokens for r in queue], cuts)
    room = [0.0, *accumulate(float(e.free) for e in order)]
    best = [[0.0, *[inf] * (len(cuts) - 1)] for _ in room]
    came = [[(0, 0)] * len(cuts) for _ in room]
    for i in range(1, len(cuts)):
        shares = [inverse[i] - inverse[j] for j in range(i)]
        costs = [
            [time(tokens[i] - tokens[j], squares[i] - squares[j]) * share for j, share in enumerate(shares)]
            for time in times.prefill[: len(order)]
        ]
        for k in range(1, len(room)):
            least, origin = best[k - 1][i], (k - 1, i)
            for dop, cost in enumerate(costs[:k], 1):
                first = bisect_left(tokens, tokens[i] - (room[k] - room[k - dop]), 0, i)
                if first < i:
                    sums = list(map(add, best[k - dop][first:i], cost[first:]))
                    if (lower := min(sums)) < least:
                        least, origin = lower, (k - dop, first + sums.index(lower))
            best[k][i], came[k][i] = least, origin
    k, i = len(order), len(cuts) - 1
    if best[k][i] == inf:
        return None
    found: list[Batched] = []
    while i:
        before, j = came[k][i]
        if j < i:
            time = times.prefill[k - before - 1]
            seconds = time(tokens[i] - tokens[j], squares[i] - squares[j])
            found.append(Batched(tuple(queue[cuts[j] : cuts[i]]), tuple(order[before:k]), seconds))
        k, i = before, j
    return tuple(reversed(found))


def _cuts(requests: int) -> list[int]:
    """Where batches may begin and end: anywhere, and among too many requests between parcels of the shorter ones."""
    alone = min(requests, MOST // 2) if requests > MOST else requests
    parcels = MOST - alone if requests > alone else 0
    return [*range(alone + 1), *(alone + (requests - alone) * n // parcels for n in range(1, parcels + 1))]


def _sums(numbers: Sequence[float], cuts: Sequence[int]) -> list[float]:
    """What comes before each cut, in sum."""
    sums = [0.0, *accumulate(numbers)]
    return [sums[cut] for cut in cuts]
