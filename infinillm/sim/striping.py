"""What a group of instances takes: a prefill striped over it, a step of its masters, and the planner's times of both.

Theory of operation. A prefill is striped: each instance computes every n-th token, and K/V goes round in a ring
(LoongServe, section 4.1). So of what one instance would take the fixed part is paid in full, and the rest divided. Each
round beyond the first costs an exchange, a kernel and a merge a layer more, and the sending is paid in full: on paper
it hides behind attention, but the times published for four instances are 5 % above this, and 7 to 21 % above hiding
all of it. What is kept outside the group is written there layer by layer, while the next ones are computed.

A step takes the dense layers of the largest share of rows, then the slowest instance's attention over the tokens it
has, with the questions of others, then the merging of their answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from infinillm.core.cost import Cost, Curve
from infinillm.core.elastic.times import DecodeTime, PrefillTime, Times, fitted, sample
from infinillm.sim.hardware import Cluster

WIDEST = 16  # instances in a group
LENGTHS = (10, 100, 1_000, 5_000, 20_000, 100_000, 500_000)  # tokens of the prompts that times are fitted to
BATCHES = (1, 8, 64)  # of so many
ROWS = 256  # between which and none the seconds of a row are told
SMALL = 0.01  # of a prefill at the tipping point: what is fixed


class Share(NamedTuple):
    """What one instance does in a step of its group.

    rows      requests it is the master of
    asked     requests of which it has K/V
    foreign   those of them that have another master
    tokens    of K/V it reads
    peers     other instances whose answers it merges
    """

    rows: int
    asked: int
    foreign: int
    tokens: int
    peers: int


def prefill(cost: Cost, lengths: Iterable[int], degree: int) -> float:
    """Seconds of prompts together on so many instances, at the ends of links like that of `cost`."""
    known = list(lengths)
    fixed = cost.prefill(0)
    alone = sum(cost.prefill(each) - fixed for each in known)
    rounds = degree - 1
    if not rounds:
        return max(fixed + alone, cost.dense(0))
    start = cost.question(0) + cost.attention(0) + cost.merging(1)
    sending = cost.move(sum(known) * rounds / degree) - cost.move(0)
    return max(fixed + alone / degree, cost.dense(0)) + rounds * start + sending


def step(cost: Cost, shares: Sequence[Share], later: int = 0) -> float:
    """Seconds of a step of decode, so many steps alike later."""
    reading = max(
        cost.attend(each.tokens + later * each.rows, each.asked)
        + (cost.question(each.foreign) if each.foreign else 0.0)
        for each in shares
    )
    merging = max(each.peers * cost.merging(each.rows) for each in shares)
    return cost.dense(max(each.rows for each in shares)) + reading + merging


def beside(cost: Cost, shares: Sequence[Share], lengths: Iterable[int]) -> float:
    """Seconds of a step with prompts striped over the same instances: their weights are read once."""
    dense = cost.dense(max(each.rows for each in shares))
    return max(prefill(cost, lengths, len(shares)), dense) + step(cost, shares) - dense


def times(cluster: Cluster) -> Times:
    """What a planner is told of a cluster of equal instances, fitted to the same costs."""
    first = cluster.sites[0]
    beside = sum(site.server == first.server for site in cluster.sites)
    degrees = range(1, min(len(cluster.sites), WIDEST) + 1)
    ways = [first.near if degree <= beside else first.far for degree in degrees]
    prefills = tuple(_fitted(way, degree) for way, degree in zip(ways, degrees, strict=True))
    cost, far = first.near, ways[-1]
    rows = (cost.dense(ROWS) - cost.dense(0)) / ROWS
    decode = DecodeTime(cost.dense(0) + cost.attention(0), max(rows, 0.0), cost.seconds_per_token, 1)
    move = (far.move(LENGTHS[-1]) - far.move(0)) / LENGTHS[-1]
    return Times(prefills, decode, move, prefills[-1].alpha / SMALL, max(int(elbow(cost.dense)), 1))


def elbow(curve: Curve) -> float:
    """The amount from which on more costs more: where the curve lies deepest under the straight line of its ends."""
    (a, low), (b, high) = curve.points[0], curve.points[-1]
    slope = (high - low) / (b - a)
    return max(curve.points, key=lambda point: low + slope * (point[0] - a) - point[1])[0]


def _fitted(cost: Cost, degree: int) -> PrefillTime:
    return fitted([sample(each, prefill(cost, each, degree)) for n in LENGTHS for each in ([n] * b for b in BATCHES)])
