"""`infinillm simulate`: what a cluster would do under some traffic, by policy, and how much of it it could take."""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from infinillm import config
from infinillm.console.progress import Progress
from infinillm.console.report import page
from infinillm.console.rows import Row, cells, heads
from infinillm.core.policy import Policy
from infinillm.core.scheduler import Budget
from infinillm.errors import BadRequest
from infinillm.sim import worlds
from infinillm.sim.capacity import Judge, Objective, highest, objective
from infinillm.sim.hardware import Size, cluster, read_size
from infinillm.sim.losses import DIES, RETURNS, Loss, schedule
from infinillm.sim.outcome import Outcome, Traffic, played

LOSS = re.compile(r"([\w.-]+)@(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?")
WIDTH = 140  # of what is no terminal
LATE, LATER = 10, 3600.0  # a search waits so many times as long as requests arrive, and so many seconds more
LOOKS = 400  # at the ledger, for a report, while the requests arrive


def run(settings: config.Simulate) -> None:
    policies = chosen(settings.policy)
    wanted = _objective(settings)
    size = read_size(settings.model, settings.block_size, settings.dtype)
    place = cluster(settings.cluster, size)
    if settings.report:
        _writable(settings.report)
    bench = Bench(settings, size, wanted)
    with Progress() as progress:
        found = bench.search if settings.find_capacity else bench.once
        rows = [found(name, policy, progress) for name, policy in policies]
    nodes, tokens = len(place.sites), sum(site.blocks for site in place.sites) * settings.block_size
    about = (
        f"{settings.requests:,} requests of {settings.trace}{_rate(settings)}, {settings.model} on "
        f"{settings.cluster}: {nodes:,} {'worker' if nodes == 1 else 'workers'}, K/V of {tokens:,} tokens"
    )
    if settings.report:
        Path(settings.report).write_text(page(settings, about, rows), encoding="utf-8")
    if settings.json:
        for row in rows:
            print(json.dumps(row.told()))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(about, soft_wrap=True)
    console.print(table(rows))
    for row in rows:
        if row.remark:
            console.print(row.remark, soft_wrap=True)
    if settings.report:
        console.print(f"written to {settings.report}", soft_wrap=True)


def chosen(text: str) -> list[tuple[str, str | Policy]]:
    """The policies that --policy names, each with what people call it."""
    found: list[tuple[str, str | Policy]] = []
    for name in (each.strip() for each in text.split(",")):
        if name.partition(":")[0] in worlds.NAMES:
            found.append((name, name))
        elif name.endswith(".py") or ":" in name:
            own = config.policy(name)
            found.append((own.name, own))
        else:
            known = ", ".join((*worlds.NAMES, *config.OWN))
            raise BadRequest(f"--policy has {known}, not {name!r}", field="policy")
    if len({name for name, _ in found}) < len(found):
        raise BadRequest(f"policy names {text!r}, one of them twice", field="policy")
    return found


def lost(text: str) -> list[Loss]:
    """What --losses says: who dies, and comes back."""
    found = []
    for part in filter(None, (each.strip() for each in text.split(","))):
        if (loss := LOSS.fullmatch(part)) is None:
            raise BadRequest(f"--losses are like n3@60-120 or n5@90, not {part!r}", field="losses")
        node, dies, returns = loss.groups()
        found.append(Loss(float(dies), node, DIES))
        if returns is not None:
            found.append(Loss(float(returns), node, RETURNS))
    return found


def _objective(settings: config.Simulate) -> Objective | None:
    if not settings.slo:
        if settings.find_capacity:
            raise BadRequest("--find-capacity needs an objective, such as --slo ttft=2,tpot=0.1", field="slo")
        return None
    if settings.find_capacity and not settings.rate:
        raise BadRequest("--find-capacity scales the times of a file: give it a --rate to begin with", field="rate")
    if settings.find_capacity and settings.seconds:
        raise BadRequest("--find-capacity answers every request; --seconds would leave some out", field="seconds")
    return objective(settings.slo, settings.slo_share)


def _rate(settings: config.Simulate) -> str:
    if settings.find_capacity:
        return f" at the highest rate that keeps {settings.slo} for {settings.slo_share:.4g} of them"
    return f" at {settings.rate:g} a second" if settings.rate else " at the times in it"


def _writable(file: str) -> None:
    """Say now, and not after hours, that a file cannot be written."""
    try:
        Path(file).open("a", encoding="utf-8").close()
    except OSError as error:
        raise BadRequest(f"--report {file}: {error.strerror}", field="report") from None


class Bench:
    """What is the same for every policy."""

    def __init__(self, settings: config.Simulate, size: Size, wanted: Objective | None):
        self.settings, self.size, self.wanted, self.losses = settings, size, wanted, lost(settings.losses)
        self.traffic = Traffic(settings.trace, settings.rate, settings.seed, settings.requests)
        self.budget = Budget(
            settings.max_num_batched_tokens, settings.max_num_seqs, settings.block_size, settings.move_tokens_per_step
        )

    def once(self, name: str, policy: str | Policy, progress: Progress) -> Row:
        """The traffic as it is."""
        began = time.perf_counter()
        outcome = self._play(name, policy, self.traffic, progress, f"policy {name}")
        return Row(name, outcome, time.perf_counter() - began)

    def search(self, name: str, policy: str | Policy, progress: Progress) -> Row:
        """The traffic at the highest rate at which it keeps the objective."""
        began = time.perf_counter()
        best: Outcome | None = None
        tried: list[tuple[float, float, bool]] = []

        def keeps(rate: float) -> bool:
            nonlocal best
            rate = float(f"{rate:.4g}")  # as it is told, so that it can be played again
            traffic = replace(self.traffic, rate=rate)
            outcome = self._play(name, policy, traffic, progress, f"policy {name} at {rate:.4g} a second")
            assert outcome.judge is not None
            good = outcome.whole and outcome.judge.good
            tried.append((rate, outcome.judge.share, good))
            if good:
                best = outcome
            return good

        _, above = highest(keeps, self.traffic.rate)
        return Row(name, best, time.perf_counter() - began, tuple(tried), above == math.inf)

    def _play(self, name: str, policy: str | Policy, traffic: Traffic, progress: Progress, what: str) -> Outcome:
        settings = self.settings
        world = worlds.world(
            policy,
            settings.cluster,
            self.size,
            self.budget,
            lend_fraction=settings.lend_fraction,
            beat_seconds=settings.heartbeat_seconds,
        )
        schedule(world, self.losses)
        arriving = self._arriving(traffic) if settings.report or settings.find_capacity else 0.0
        late = (1 + LATE) * arriving + LATER if settings.find_capacity else math.inf
        return played(
            name,
            world,
            traffic,
            until=settings.seconds or late,
            judge=None if self.wanted is None else Judge(self.wanted, traffic.count),
            give_up=settings.find_capacity,
            every=max(arriving / LOOKS, settings.heartbeat_seconds) if settings.report else 0.0,
            say=lambda share: progress.say(what, share),
        )

    def _arriving(self, traffic: Traffic) -> float:
        """Seconds in which the requests arrive, as far as that is known."""
        if traffic.rate and not traffic.name.endswith((".csv", ".jsonl")):
            return traffic.count / traffic.rate
        return sum(last.at for last in deque(traffic.arrivals(), maxlen=1))


# --- for people ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """One row a policy."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("policy", no_wrap=True, min_width=max(len(row.policy) for row in rows))
    for head in heads(rows):
        found.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(row.policy, *cells(row, rows))
    return found
