"""The simulator against a real cluster: what it predicts of throughput and latency, and what was measured.

    python -m bench.reality [--profile FILE] [--scale 1.0]

Three real workers of one thread each share this machine's cores. Requests arrive at set times (an open loop), so both
sides see the same traffic, and clients measure to the last token. What the simulator is given is the profile of one
worker (`infinillm profile`) and one number that a profile of one worker cannot tell: how many workers' worth of
computing the cores give, when all of them compute. It is fitted to a load of its own, `twelve at once`. The others
are predicted: steady short requests, bursts of recorded lengths, documents of which some outgrow a worker, and a crowd
that comes at once where memory is short.

Written: bench/results/reality.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from bench import systems
from bench.machine import Quiet, facts, say
from bench.serving import RESULTS, Prompts
from bench.systems import CACHE, Ours
from infinillm import config
from infinillm.core.cost import Cost, Link, from_plain
from infinillm.core.policy import POLICIES
from infinillm.core.scheduler import Budget
from infinillm.model import files
from infinillm.sim.hardware import Cluster, Site
from infinillm.sim.simulation import Ending, Simulation
from infinillm.sim.traffic import Arrival, workload

WORKERS = 3
SEED = 7
SETTLING_SECONDS = 5.0  # what the warm-up borrowed is given back
AIM = 0.2  # a prediction is off by no more than this share


@dataclass(frozen=True, slots=True)
class Load:
    """Traffic, and the cluster it meets: its policy, and how many blocks each worker has."""

    name: str
    policy: str
    kv_blocks: int
    arrivals: tuple[Arrival, ...]


def loads(scale: float) -> list[Load]:
    """The one that is fitted, then those that are predicted; `scale` times as many requests."""
    rng = Random(SEED)

    def count(requests: int) -> int:
        return max(int(requests * scale), WORKERS)

    def drawn(requests: int, gap: float, prompts: tuple[int, int], outputs: tuple[int, int]) -> tuple[Arrival, ...]:
        at, found = 0.0, list[Arrival]()
        for _ in range(count(requests)):
            found.append(Arrival(at, rng.randint(*prompts), rng.randint(*outputs)))
            at += rng.expovariate(1 / gap) if gap else 0.0
        return tuple(found)

    recorded = workload("sharegpt+bursty", rate=0.8, seed=SEED, count=count(48))
    bursts = tuple(Arrival(a.at, min(a.prompt // 4, 480) + 8, min(a.output // 4, 112) + 8) for a in recorded)
    return [
        Load("twelve at once", "isolated", 256, tuple(Arrival(0.0, 64, 96) for _ in range(4 * WORKERS))),
        Load("short and steady", "isolated", 256, drawn(48, 1.0, (32, 128), (16, 96))),
        Load("recorded lengths in bursts", "pooled", 256, bursts),
        Load("documents", "proactive", 64, drawn(16, 8.0, (300, 1400), (16, 48))),
        Load("a crowd short of memory", "isolated", 32, drawn(36, 0.0, (32, 128), (96, 96))),
    ]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one load: tokens of prompts and answers per second until all was answered, and mean seconds of requests."""

    throughput: float
    latency: float
    first: float

    def told(self) -> dict[str, float]:
        return {
            "tokens_per_second": round(self.throughput, 2),
            "mean_latency": round(self.latency, 3),
            "mean_first_token": round(self.first, 3),
        }


def seen(endings: Iterable[Ending]) -> Seen:
    all_ = list(endings)
    tokens = sum(each.prompt + each.output for each in all_)
    return Seen(
        tokens / max(each.last for each in all_),
        fmean(each.last - each.asked for each in all_),
        fmean(each.first - each.asked for each in all_),
    )


def simulated(load: Load, cost: Cost, cores: float) -> Seen:
    """What the simulator says of it."""
    settings = config.Worker()
    sites = tuple(Site(f"worker-{n}", 0, load.kv_blocks, cost, cost) for n in range(WORKERS))
    way = Link("this machine", 0.0, float("inf"))  # the profile has what it costs
    budget = Budget(
        settings.max_num_batched_tokens, settings.max_num_seqs, settings.block_size, settings.move_tokens_per_step
    )
    simulation = Simulation(
        Cluster(sites, way, way),
        POLICIES[load.policy],
        budget,
        lend_fraction=settings.lend_fraction,
        beat_seconds=config.Controller().heartbeat_seconds,
        cores=cores,
    )
    found: list[Ending] = []
    simulation.play(iter(load.arrivals), found.append)
    while simulation.busy and simulation.clock.step(float("inf")):
        pass
    refused = [each.refused for each in found if each.refused]
    assert not refused, refused[0]
    return seen(found)


def fitted(load: Load, cost: Cost, throughput: float) -> float:
    """How many workers' worth of computing there is, for the simulator to give this throughput."""
    low, high = 0.5, float(WORKERS)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if simulated(load, cost, middle).throughput < throughput else (low, middle)
    return (low + high) / 2


async def measured(load: Load, ours: Ours, prompts: Prompts) -> Seen:
    """What a real cluster does."""
    asked = [prompts.make(f"{load.name} {n}", each.prompt) for n, each in enumerate(load.arrivals)]
    start = time.perf_counter()

    async def ask(arrival: Arrival, prompt: list[int]) -> Ending:
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        at = time.perf_counter() - start
        (reply,) = await ours.ask([prompt], arrival.output)
        return Ending(at, at + reply.times[0], at + reply.times[-1], arrival.prompt, arrival.output)

    return seen(await asyncio.gather(*(ask(*each) for each in zip(load.arrivals, asked, strict=True))))


async def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cost = from_plain(json.loads(args.profile.read_text()))
    quiet, prompts = Quiet(args.quiet, 1, args.patience), Prompts(folder)
    fit, *others = loads(args.scale)
    rows: dict[str, dict[str, Any]] = {}
    cores = 0.0
    for load in (fit, *others):
        name = f"reality-{load.name.replace(' ', '-')}"
        ours = systems.ours(name, folder, "float32", workers=WORKERS, threads=1, kv_blocks=load.kv_blocks)
        ours.argv += ["--policy", load.policy, "--profile", str(args.profile)]

        async def sample(_: int, load: Load = load, ours: Ours = ours) -> Seen:
            return await measured(load, ours, prompts)

        try:
            await ours.start()
            await ours.ask([prompts.make(f"warm-up {n}", 64) for n in range(2 * WORKERS)], 8)
            await asyncio.sleep(SETTLING_SECONDS)
            real, used = await quiet.take(sample)
        finally:
            await ours.stop()
        cores = cores or fitted(load, cost, real.throughput)
        ours = simulated(load, cost, cores)
        told, said = real.told(), ours.told()
        rows[load.name] = {
            "policy": load.policy,
            "requests": len(load.arrivals),
            "kv_blocks": load.kv_blocks,
            "fitted": load is fit,
            "measured": told,
            "simulated": said,
            "ratio": {name: round(said[name] / told[name], 3) for name in told},
            "others": used,
        }
        say(f"{load.name}: {json.dumps(rows[load.name])}")
    aimed = ("tokens_per_second", "mean_latency")
    held = [name for name, row in rows.items() if all(abs(row["ratio"][each] - 1) <= AIM for each in aimed)]
    return {
        **facts(f"python -m bench.reality {shlex.join(sys.argv[1:])}".strip()),
        "model": files.served_name(None),
        "workers": WORKERS,
        "cores_fitted": round(cores, 3),
        "within_20_percent": f"{len([name for name in held if name != fit.name])} of {len(others)}",
        "loads": rows,
    }


def table(found: dict[str, Any]) -> str:
    rows = ["| load | policy | tokens/s | simulated | ratio | mean latency | simulated | ratio |", "|" + " --- |" * 8]
    for name, row in found["loads"].items():
        cells = [name + (" (fitted)" if row["fitted"] else ""), row["policy"]]
        for each, unit in (("tokens_per_second", ""), ("mean_latency", " s")):
            cells += [f"{row[side][each]:.4g}{unit}" for side in ("measured", "simulated")]
            cells.append(f"{row['ratio'][each]:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.reality", description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="times as many requests")
    parser.add_argument("--profile", type=Path, help="what `infinillm profile` wrote; default: measure one first")
    parser.add_argument("--quiet", type=float, default=0.2, help="cores others may use before a load is told apart")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait, in all, for others to be done")
    parser.add_argument("--out", type=Path, default=RESULTS / "reality.json")
    args = parser.parse_args()
    cache = Path.home() / ".cache" / "infinillm"
    folder = files.resolve(None, cache, lambda what, share: say(f"{what} {share:.0%}"))
    if args.profile is None:
        args.profile = systems.profile(folder, CACHE / "reality-profile.json")
    found = asyncio.run(compare(args, folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(f"cores {found['cores_fitted']}; within 20 %: {found['within_20_percent']}")


if __name__ == "__main__":
    main()
