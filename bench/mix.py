"""Policies under a memory-bound mix, side by side: many short prompts, and some that no worker could hold.

    python -m bench.mix [--rounds 3] [--warm 50] [--seconds 120] [--policies isolated,pooled,proactive] [--profile FILE]

Every policy has a cluster of its own: three real workers of one thread each, with the same few K/V blocks. The clusters
are asked in turn, for a window of so many seconds. In it a number of clients of each kind ask one request after the
other, each as soon as the last was answered:

    short  a prompt of 32 to 128 tokens and a long answer; many at once, so that even these queue for memory
    long   a document of 1.5 to 2.5 workers' memory and a short answer; policy isolated refuses it

The window begins `--warm` seconds after the clients do, so that what is seen is a cluster under load, not one that
fills. What counts are the tokens a client saw within the window: of the prompt when the first token of the answer came,
then each token of the answer. Every request is waited for, though, and its answer compared with those of the other
policies, token by token. A client that is refused asks its next after a second. Prompts are never asked twice.

Measured are `mix`, with both kinds of clients, and `shorts`, with the short ones alone. Written:
bench/results/mix.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import systems
from bench.machine import Quiet, facts, say
from bench.serving import BLOCK, RESULTS, Prompts
from bench.systems import CACHE, Ours
from infinillm.model import files

POLICIES = ("isolated", "pooled", "proactive")
KINDS = ("mix", "shorts")
WORKERS = 3
REFUSED_SECONDS = 1.0
COUNTED = (
    "preemptions_total",
    "steps_total",
    "step_seconds_sum",
    "step_tokens_sum",
    "loan_operations_total",
    "moved_tokens_total",
    "attention_tokens_total",
)


@dataclass(frozen=True, slots=True)
class Mix:
    """The load: how much memory a worker has, how many clients ask at once, and for what (tokens)."""

    kv_blocks: int = 32
    short_clients: int = 18
    short_least: int = 32
    short_most: int = 128
    short_count: int = 128
    long_clients: int = 2
    long_shares: tuple[float, ...] = (2.0, 1.5, 2.5)  # of one worker's memory, prompt and answer
    long_count: int = 16

    def job(self, name: str, long: bool, number: int) -> tuple[int, int]:
        """Tokens of the prompt and of the answer of a client's n-th request."""
        if long:
            share = self.long_shares[number % len(self.long_shares)]
            return int(share * self.kv_blocks) * BLOCK - self.long_count, self.long_count
        return random.Random(name).randint(self.short_least, self.short_most), self.short_count


@dataclass(slots=True)
class Window:
    """What clients saw of one cluster in one window; seconds are those after its beginning."""

    prompt: int = 0
    output: int = 0
    long_tokens: int = 0
    served: dict[str, int] = field(default_factory=lambda: {"short": 0, "long": 0})  # that ended within the window
    refused: int = 0
    latencies: list[float] = field(default_factory=list)  # of the short ones, to the last token
    firsts: list[float] = field(default_factory=list)  # of the short ones, to the first
    said: dict[str, tuple[int, ...]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def told(self, seconds: float) -> dict[str, Any]:
        return {
            "tokens_per_second": round((self.prompt + self.output) / seconds, 1),
            "output_per_second": round(self.output / seconds, 1),
            "long_tokens_per_second": round(self.long_tokens / seconds, 1),
            "served_short": self.served["short"],
            "served_long": self.served["long"],
            "refused": self.refused,
            "short_seconds_p50": quantile(self.latencies, 0.5),
            "short_seconds_p99": quantile(self.latencies, 0.99),
            "short_first_p50": quantile(self.firsts, 0.5),
            **{name: round(value, 2) for name, value in self.counters.items()},
        }


def quantile(values: Sequence[float], share: float) -> float:
    ranked = sorted(values)
    return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3) if ranked else 0.0


async def counters(ours: Ours) -> dict[str, float]:
    """What the workers counted so far, summed over them; labels besides the node's are kept."""
    found: dict[str, float] = {}
    for worker in ours.addresses["workers"]:
        page = (await ours.client.get(f"http://{worker['metrics']}/metrics")).text
        for line in page.splitlines():
            name, _, labels, value = (
                re.fullmatch(r"(\w+)(\{(.*)\})? (\S+)", line).groups() if line[:1] != "#" else [""] * 4
            )
            name = name.removeprefix("infinillm_")
            if name in COUNTED:
                kept = re.sub(r'node="[^"]*",?', "", labels or "").strip(",").replace('"', "")
                key = f"{name} {kept}".strip()
                found[key] = found.get(key, 0.0) + float(value)
    return found


async def ask(
    ours: Ours, window: Window, name: str, prompt: list[int], count: int, long: bool, start: float, stop: float
) -> None:
    began = time.perf_counter()
    try:
        (reply,) = await ours.ask([prompt], count)
    except RuntimeError as error:
        if "blocks (" in str(error):
            window.refused += time.perf_counter() >= start
            await asyncio.sleep(max(0.0, min(REFUSED_SECONDS, stop - time.perf_counter())))
        else:
            window.failed.append(f"{name}: {error}")
        return
    window.said[name] = reply.tokens
    within = sum(start <= began + at <= stop for at in reply.times)
    read = len(prompt) if start <= began + reply.times[0] <= stop else 0
    window.prompt += read
    window.output += within
    if long:
        window.long_tokens += read + within
    elif began + reply.times[-1] >= start:
        window.latencies.append(reply.times[-1])
        window.firsts.append(reply.times[0])
    window.served["long" if long else "short"] += start <= began + reply.times[-1] <= stop


async def load(ours: Ours, mix: Mix, kind: str, name: str, prompts: Prompts, warm: float, seconds: float) -> Window:
    """All clients of a kind of load against one cluster: to warm it up, for the window, and to the last answer."""
    window = Window()
    start = time.perf_counter() + warm
    stop = start + seconds

    async def client(long: bool, number: int) -> None:
        turn = number if long else 0
        while time.perf_counter() < stop:
            job = f"{name} {'long' if long else 'short'} {number} {turn}"
            length, count = mix.job(job, long, turn)
            await ask(ours, window, job, prompts.make(job, length), count, long, start, stop)
            turn += 1

    clients = [client(False, number) for number in range(mix.short_clients)]
    if kind == "mix":
        clients += [client(True, number) for number in range(mix.long_clients)]
    running = [asyncio.create_task(each) for each in clients]
    try:
        await asyncio.sleep(warm)
        before = await counters(ours)
        await asyncio.sleep(stop - time.perf_counter())
        after = await counters(ours)
        window.counters = {key: value - before.get(key, 0.0) for key, value in after.items()}
        await asyncio.gather(*running)
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return window


def cluster(policy: str, folder: Path, mix: Mix, profile: Path) -> Ours:
    found = systems.ours(f"mix-{policy}", folder, "float32", workers=WORKERS, threads=1, kv_blocks=mix.kv_blocks)
    found.argv += ["--policy", policy, *(["--profile", str(profile)] if policy == "proactive" else [])]
    return found


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The medians over rounds, and every round."""
    names = {name: None for each in rounds for name in each}
    medians = {name: round(statistics.median(each.get(name, 0) for each in rounds), 3) for name in names}
    return {**medians, "rounds": list(rounds)}


def equal(said: Sequence[dict[str, tuple[int, ...]]]) -> str:
    """How many answers that several policies gave are the same."""
    names = [name for name in set().union(*said) if sum(name in each for each in said) > 1]
    same = sum(len({each[name] for each in said if name in each}) == 1 for name in names)
    return f"{same} of {len(names)}"


async def compare(args: argparse.Namespace, folder: Path, mix: Mix) -> dict[str, Any]:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # and what was started is ended
    quiet = Quiet(args.quiet, args.tries, args.patience)
    prompts = Prompts(folder)
    clusters = {policy: cluster(policy, folder, mix, args.profile) for policy in args.policies}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {kind: {p: [] for p in clusters} for kind in args.kinds}
    said: dict[str, dict[str, tuple[int, ...]]] = {policy: {} for policy in clusters}
    failed: list[str] = []
    try:
        await asyncio.gather(*(each.start() for each in clusters.values()))
        for policy, ours in clusters.items():
            await ours.ask([prompts.make(f"warm-up {n}", 64) for n in range(2 * WORKERS)], 8)
            say(f"{policy} is ready")
        order = list(clusters)
        for round_ in range(args.rounds):
            for kind in args.kinds:
                for policy in order[round_ % len(order) :] + order[: round_ % len(order)]:

                    async def sample(
                        attempt: int, kind: str = kind, policy: str = policy, round_: int = round_
                    ) -> Window:
                        name = f"{kind} {round_} {attempt}"
                        return await load(clusters[policy], mix, kind, name, prompts, args.warm, args.seconds)

                    window, others = await quiet.take(sample)
                    told = {**window.told(args.seconds), "others": others}
                    found[kind][policy].append(told)
                    said[policy] |= window.said
                    failed += [f"{policy}: {why}" for why in window.failed]
                    say(f"round {round_} {kind:6s} {policy:9s} {json.dumps(told)}")
                    for why in window.failed[:3]:
                        say(f"  failed: {why}")
    finally:
        await asyncio.gather(*(each.stop() for each in clusters.values()))
    return {
        **facts(f"python -m bench.mix {shlex.join(sys.argv[1:])}".strip()),
        "model": files.served_name(args.model),
        "dtype": "float32",
        "workers": WORKERS,
        "warm_seconds": args.warm,
        "seconds": args.seconds,
        "load": asdict(mix),
        "answers_equal": equal(list(said.values())),
        "failed": failed,
        **{kind: {policy: middle(rounds) for policy, rounds in each.items()} for kind, each in found.items()},
    }


def table(found: dict[str, Any]) -> str:
    rows = [
        "| | tokens/s | of isolated | output tokens/s | short, p50 | p99 | long served | refused |",
        "|" + " --- |" * 8,
    ]
    for kind in KINDS:
        for policy, each in found.get(kind, {}).items():
            base = found[kind].get("isolated", each)["tokens_per_second"] or 1.0
            cells = [
                f"{kind}, {policy}",
                f"{each['tokens_per_second']:.0f}",
                f"{each['tokens_per_second'] / base:.2f}",
                f"{each['output_per_second']:.0f}",
                f"{each['short_seconds_p50']:.1f} s",
                f"{each['short_seconds_p99']:.1f} s",
                f"{each['served_long']:g}",
                f"{each['refused']:g}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mix", description=__doc__.splitlines()[0])
    parser.add_argument("--policies", metavar="POLICY,...", default=",".join(POLICIES))
    parser.add_argument("--kinds", metavar="KIND,...", default=",".join(KINDS))
    parser.add_argument("--model", help="a Hugging Face folder, a GGUF file or a hub id; default: the default model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=float, default=50.0, help="seconds of load before a window")
    parser.add_argument("--seconds", type=float, default=120.0, help="of one window")
    parser.add_argument("--profile", type=Path, help="what `infinillm profile` wrote; default: measure one first")
    parser.add_argument("--quiet", type=float, default=0.2, help="cores others may use before a window is taken again")
    parser.add_argument("--tries", type=int, default=1, help="how often a window is taken at most")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait, in all, for others to be done")
    parser.add_argument("--out", type=Path, default=RESULTS / "mix.json")
    for name, default in asdict(Mix()).items():
        if isinstance(default, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    args.policies, args.kinds = args.policies.split(","), args.kinds.split(",")
    mix = Mix(**{name: getattr(args, name) for name, value in asdict(Mix()).items() if isinstance(value, int)})
    cache = Path.home() / ".cache" / "infinillm"
    folder = files.resolve(args.model, cache, lambda what, share: say(f"{what} {share:.0%}"))
    if args.profile is None and "proactive" in args.policies:
        args.profile = systems.profile(folder, CACHE / "mix-profile.json")
    found = asyncio.run(compare(args, folder, mix))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print(f"answers equal: {found['answers_equal']}; failed: {len(found['failed'])}")


if __name__ == "__main__":
    main()
