"""Simulated clusters by policy: one name each, whichever kind of world it runs in.

The policies of `core/policy` run as they are; those of planners (`core/planners.py`) in a world of groups, large
clusters in cells. Some are others with one thing changed:

    whole           isolated, prompts computed whole, as vLLM 0.3 did
    chunked         isolated, with chunks of 512 tokens of prompts beside its decodes (SplitFuse); chunked:N with N
    single          whole, on all devices as one worker
    disaggregated   half of the instances prefill; disaggregated:N so many
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from infinillm.core.planners import AUTO, ELASTIC, disaggregating
from infinillm.core.policy import POLICIES, Policy, named
from infinillm.core.scheduler import Budget
from infinillm.errors import BadRequest
from infinillm.sim import striping
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.hardware import CLUSTER, Cluster, Size, cluster
from infinillm.sim.simulation import Clock, Simulation
from infinillm.sim.statistics import Tally
from infinillm.sim.traffic import Arrival

NAMES = (*POLICIES, "whole", "chunked", "single", "elastic", "disaggregated", "auto")
ALONE = "isolated"
CHUNK, WHOLE = 512, 1 << 22  # tokens computed in one step


def world(
    policy: str | Policy, text: str, size: Size, budget: Budget, *, lend_fraction: float, beat_seconds: float
) -> Simulation | Groups | Cells:
    """The cluster `text` under a policy, by name or as one. Raises BadRequest."""
    if isinstance(policy, Policy):
        return Simulation(cluster(text, size), policy, budget, lend_fraction=lend_fraction, beat_seconds=beat_seconds)
    name, _, number = policy.partition(":")
    if name not in NAMES or (number and name not in ("chunked", "disaggregated")):
        raise BadRequest(f"policy must be one of {', '.join(NAMES)}, not {policy!r}", field="policy")
    place = cluster(together(text) if name == "single" else text, size)
    match name:
        case "elastic" | "auto":
            return Cells(place, ELASTIC if name == "elastic" else AUTO, budget.block_size)
        case "disaggregated":
            return _apart(policy, place, _number(policy, number, max(len(place.sites) // 2, 1)), budget)
        case "whole" | "single":
            budget = replace(budget, tokens=WHOLE)
        case "chunked":
            budget = replace(budget, tokens=_number(policy, number, CHUNK))
    chosen = named(name if name in POLICIES else ALONE)
    return Simulation(place, chosen, budget, lend_fraction=lend_fraction, beat_seconds=beat_seconds)


def together(text: str) -> str:
    """The same devices as one worker."""
    if (found := CLUSTER.fullmatch(text)) is None:
        raise BadRequest(f"policy single lays out a cluster like 4x8xA100 anew, not {text!r}", field="policy")
    servers, devices, device, _ = found.groups()
    return f"{servers}x{devices}x{device}:tp{int(servers) * int(devices)}"


def best_ratio(
    text: str, size: Size, budget: Budget, traffic: Callable[[], Iterator[Arrival]], score: Callable[[Tally], float]
) -> str:
    """The name under which `disaggregated` has the least score: every number of instances to prefill is tried."""
    nodes = len(cluster(text, size).sites)
    names = [f"disaggregated:{n}" for n in range(1, nodes)]
    if not names:
        raise BadRequest("policy disaggregated needs two workers or more", field="policy")

    def scored(name: str) -> float:
        return score(answered(world(name, text, size, budget, lend_fraction=0.0, beat_seconds=1.0), traffic()))

    return min(names, key=scored)


def answered(here: Simulation | Groups | Cells, traffic: Iterator[Arrival]) -> Tally:
    """What became of all this traffic, once nothing is left to do."""
    tally = Tally()
    here.play(traffic, tally.add)
    while here.busy and here.clock.step(float("inf")):
        pass
    return tally


def _apart(policy: str, place: Cluster, prefilling: int, budget: Budget) -> Groups:
    """The first instances of the cluster prefill."""
    if prefilling >= len(place.sites):
        raise BadRequest(f"policy {policy!r} leaves none of {len(place.sites)} workers to decode", field="policy")
    planner = disaggregating(site.id for site in place.sites[:prefilling])
    return Groups(place, striping.times(place), planner, budget.block_size, Clock())


def _number(policy: str, number: str, usual: int) -> int:
    if not number:
        return usual
    if not number.isdecimal() or not int(number):
        raise BadRequest(f"after the colon of policy {policy!r} stands a whole number of 1 or more", field="policy")
    return int(number)
