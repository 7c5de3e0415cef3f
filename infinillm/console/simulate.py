"""`infinillm simulate`: what a cluster would do under some traffic, by policy."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from infinillm import config
from infinillm.console.progress import Progress
from infinillm.core import policy as policies
from infinillm.core.scheduler import Budget
from infinillm.errors import BadRequest
from infinillm.sim.hardware import Cluster, cluster, read_size
from infinillm.sim.simulation import Simulation
from infinillm.sim.statistics import Spread, Tally
from infinillm.sim.traffic import workload

TELL_EVERY = 4096  # events
WIDTH = 120  # of what is no terminal


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the traffic under one policy. `seconds` are of the cluster, `took` of this machine."""

    policy: str
    tally: Tally
    seconds: float
    preemptions: int
    moved: int  # tokens of K/V
    steps: int
    rows: int  # requests in all steps
    took: float

    def told(self) -> dict[str, Any]:
        """As JSON; times in seconds."""
        tally = self.tally
        return {
            "policy": self.policy,
            "served": tally.served,
            "refused": tally.refused,
            "seconds": round(self.seconds, 3),
            "tokens per second": round((tally.prompt + tally.output) / self.seconds, 1) if self.seconds else 0.0,
            "output tokens per second": round(tally.output / self.seconds, 1) if self.seconds else 0.0,
            "first token": _told(tally.first),
            "output token": _told(tally.each),
            "latency": _told(tally.latency),
            "preemptions": self.preemptions,
            "moved tokens": self.moved,
            "steps": self.steps,
            "request-steps": self.rows,
            "simulated in": round(self.took, 2),
        }


def _told(spread: Spread) -> dict[str, float]:
    found = {
        "mean": spread.mean,
        "p50": spread.quantile(0.5),
        "p90": spread.quantile(0.9),
        "p99": spread.quantile(0.99),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def run(settings: config.Simulate) -> None:
    names = [name.strip() for name in settings.policy.split(",")]
    chosen = [policies.named(name) for name in names]
    if len(set(names)) < len(names):
        raise BadRequest(f"policy names {settings.policy!r}, one of them twice", field="policy")
    place = cluster(settings.cluster, read_size(settings.model, settings.block_size, settings.dtype))
    with Progress() as progress:
        outcomes = [simulated(settings, place, policy, progress) for policy in chosen]
    if settings.json:
        for outcome in outcomes:
            print(json.dumps(outcome.told()))
        return
    nodes = place.sites
    tokens = sum(site.blocks for site in nodes) * settings.block_size
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(
        f"{settings.requests:,} requests of {settings.trace} at {settings.rate:g} a second, {settings.model} on "
        f"{settings.cluster}: {len(nodes):,} workers, K/V of {tokens:,} tokens",
        soft_wrap=True,
    )
    console.print(table(outcomes))


def simulated(settings: config.Simulate, place: Cluster, policy: policies.Policy, progress: Progress) -> Outcome:
    """All the traffic under one policy."""
    began = time.perf_counter()
    budget = Budget(
        settings.max_num_batched_tokens, settings.max_num_seqs, settings.block_size, settings.move_tokens_per_step
    )
    simulation = Simulation(
        place, policy, budget, lend_fraction=settings.lend_fraction, beat_seconds=settings.heartbeat_seconds
    )
    tally = Tally()
    arrivals = workload(settings.trace, rate=settings.rate, seed=settings.seed, count=settings.requests)
    simulation.play(arrivals, tally.add)
    events = 0
    while simulation.busy and simulation.clock.step(settings.seconds or float("inf")):
        events += 1
        if events % TELL_EVERY == 1:
            progress.say(f"policy {policy.name}", (tally.served + tally.refused) / settings.requests)
    workers = simulation.workers.values()
    return Outcome(
        policy.name,
        tally,
        simulation.now,
        sum(worker.preemptions for worker in workers),
        sum(worker.moved for worker in workers),
        sum(worker.steps for worker in workers),
        sum(worker.rows for worker in workers),
        time.perf_counter() - began,
    )


def table(outcomes: list[Outcome]) -> Table:
    """One row a policy."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("policy")
    for head in (
        "tokens/s",
        "served",
        "refused",
        "first p50",
        "p99",
        "token p50",
        "p99",
        "latency p50",
        "p99",
        "gave way",
    ):
        found.add_column(head, justify="right", no_wrap=True)
    for each in outcomes:
        told, tally = each.told(), each.tally
        times = [
            seconds(spread.quantile(share))
            for spread in (tally.first, tally.each, tally.latency)
            for share in (0.5, 0.99)
        ]
        rate = f"{told['tokens per second']:,.0f}"
        found.add_row(each.policy, rate, f"{tally.served:,}", f"{tally.refused:,}", *times, f"{each.preemptions:,}")
    return found


def seconds(amount: float) -> str:
    """For people: three digits and a unit."""
    if amount < 1.0:
        return f"{1e3 * amount:.3g} ms"
    return f"{amount:.3g} s" if amount < 1000 else f"{amount:,.0f} s"
