"""Serving systems side by side in one run: same machine, weights, prompts and dtype, their repetitions interleaved.

    python -m bench.serving [--only ours,transformers,vllm,remote] [--dtype float32] [--quick]

The figures, all with greedy answers of a fixed length to prompts no system has seen before:

    short       tokens/s of one stream after a prompt of 128 tokens
    long        tokens/s of one stream after a prompt of 4,000 tokens
    first       seconds to the first token of that prompt
    throughput  output tokens/s of 16 requests at once, prompts of 128 to 512 tokens

infinillm and vLLM are asked over HTTP, streaming, by this process on the same cores; transformers is called directly.
Written: bench/results/serving.json (everything) and serving.md (the tables, made from it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench import systems
from bench.machine import Quiet, cores, facts, say
from bench.report import render
from bench.systems import Missing, Ours, Reply, System
from infinillm.model import files

RESULTS = Path(__file__).parent / "results"
PARTS = ("ours", "transformers", "vllm", "remote")
BLOCK = 16  # tokens; infinillm's default
WORDS = """\
    the a of and to in water river stone house night winter captain letter garden market engine record valley light
    small old quiet long first last green heavy narrow early open broken careful distant walked opened carried found
    wrote counted crossed waited turned left under behind across after before without every some never again slowly
"""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of prompts and of answers."""

    short: int = 128
    short_count: int = 64
    long: int = 4000
    long_count: int = 48
    requests: int = 16
    least: int = 128
    most: int = 512
    count: int = 64

    @property
    def lengths(self) -> list[int]:
        """Prompt lengths of the concurrent requests: evenly spread, in a fixed order without a pattern."""
        step = (self.most - self.least) / max(1, self.requests - 1)
        spread = [round(self.least + step * n) for n in range(self.requests)]
        random.Random(0).shuffle(spread)
        return spread

    @property
    def half_blocks(self) -> int:
        """Blocks of a worker that holds half of the long request."""
        return -(-(self.long + self.long_count) // (2 * BLOCK))


QUICK = Sizes(short=64, short_count=12, long=600, long_count=12, requests=4, least=32, most=64, count=12)


@dataclass(slots=True)
class Entry:
    """One system in the comparison, and what was measured of it."""

    system: System
    kinds: tuple[str, ...]
    missing: str = ""
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # value, cores others used meanwhile
    said: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tokens, by prompt

    def note(self, figure: str, value: float, others: float) -> None:
        self.samples.setdefault(figure, []).append((value, others))

    def told(self, limit: float) -> dict[str, Any]:
        figures = {figure: summary(pairs, limit) for figure, pairs in self.samples.items()}
        return {"command": self.system.command, "missing": self.missing, "figures": figures}


def summary(pairs: Sequence[tuple[float, float]], limit: float) -> dict[str, Any]:
    """The median of a figure's samples; where some had the machine to themselves, of those alone."""
    quiet = [value for value, others in pairs if others <= limit]
    counted = quiet or [value for value, _ in pairs]
    return {
        "median": round(statistics.median(counted), 3),
        "low": round(min(counted), 3),
        "high": round(max(counted), 3),
        "quiet": len(quiet),
        "samples": [round(value, 3) for value, _ in pairs],
        "others": [others for _, others in pairs],
    }


class Prompts:
    """Prompts of exact lengths, never the same twice, and the same ones for every system."""

    def __init__(self, folder: Path):
        self.words = WORDS.split()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def make(self, name: str, length: int) -> list[int]:
        rng = random.Random(name)
        text = " ".join(rng.choice(self.words) + ("." if rng.random() < 0.1 else "") for _ in range(length + 8))
        tokens: list[int] = self.tokenizer.encode(f"{name}: {text}", add_special_tokens=False).ids
        assert len(tokens) >= length
        return tokens[:length]


def choose(parts: set[str], folder: Path, dtype: str, sizes: Sizes, port: int) -> list[Entry]:
    longest = sizes.long + sizes.long_count
    whole = sum(-(-(length + sizes.count) // BLOCK) for length in sizes.lengths) + longest // BLOCK + 2
    every = ("short", "long", "throughput")
    found: list[Entry] = []
    if "ours" in parts:
        one = systems.ours("infinillm-1-worker", folder, dtype, workers=1, threads=cores(), kv_blocks=whole)
        found.append(Entry(one, every))
    if parts & {"ours", "remote"}:
        local = systems.ours("infinillm-3-workers-local", folder, dtype, workers=3, threads=1, kv_blocks=whole)
        few = sizes.half_blocks
        half = systems.ours("infinillm-3-workers-half-remote", folder, dtype, workers=3, threads=1, kv_blocks=few)
        found.append(Entry(local, every if "ours" in parts else ("long",)))
        found.append(Entry(half, ("long",)))
    if "transformers" in parts:
        found.append(Entry(systems.transformers("transformers-generate", "generate", folder, dtype), every))
        found.append(Entry(systems.transformers("transformers-continuous-batching", "batching", folder, dtype), every))
    if "vllm" in parts:
        found.append(Entry(systems.vllm(folder, dtype, port=port, longest=longest + BLOCK), every))
    return found


async def start(entry: Entry, prompts: Prompts, sizes: Sizes) -> None:
    """Start a system and let it answer once, so that nothing is done for the first time later."""
    try:
        if isinstance(entry.system, systems.Vllm):
            await asyncio.to_thread(systems.install_vllm)
        await entry.system.start()
        await entry.system.ask([prompts.make("warm-up", min(sizes.long, 700))], 8)
    except Missing as missing:
        entry.missing = str(missing)
        say(f"{entry.system.name} is left out: {missing}")
    else:
        say(f"{entry.system.name} is ready")


async def measure(entry: Entry, kind: str, round_: int, prompts: Prompts, sizes: Sizes, quiet: Quiet) -> None:
    asked: list[str] = []

    async def sample(attempt: int) -> list[Reply]:
        name = f"{kind} {round_}" + (f" again {attempt}" if attempt else "")
        asked.append(name)
        match kind:
            case "short":
                return await entry.system.ask([prompts.make(name, sizes.short)], sizes.short_count)
            case "long":
                return await entry.system.ask([prompts.make(name, sizes.long)], sizes.long_count)
            case _:
                several = [prompts.make(f"{name} of {n}", length) for n, length in enumerate(sizes.lengths)]
                return await entry.system.ask(several, sizes.count)

    replies, others = await quiet.take(sample)
    if kind != "throughput" and len(asked) == 1:  # the prompts of another try are others
        entry.said[asked[0]] = replies[0].tokens
    if kind == "throughput":
        told = [("throughput", sum(len(r.tokens) for r in replies) / max(r.times[-1] for r in replies))]
    else:
        times = replies[0].times
        told = [(kind, (len(times) - 1) / (times[-1] - times[0]))]
        if kind == "long":
            told.append(("first", times[0]))
    for figure, value in told:
        entry.note(figure, value, others)
    shown = ", ".join(f"{figure} {value:.2f}" for figure, value in told)
    say(f"round {round_}  {entry.system.name:34s} {shown}  (others used {others} cores)")


async def traffic(entry: Entry, prompts: Prompts, sizes: Sizes) -> dict[str, Any]:
    """Where the long request lies, and the bytes its ports carry for each decoded token."""
    ours = entry.system
    assert isinstance(ours, Ours)
    carried: list[float] = []
    for count in (1, sizes.long_count):
        before = await ours.port_bytes()
        await ours.ask([prompts.make(f"bytes {count}", sizes.long)], count)
        await asyncio.sleep(1.5)  # workers publish what their ports carried twice a second
        carried.append(await ours.port_bytes() - before)
    return {
        "tokens_on_each_node": list((await ours.placement()).values()),
        "bytes_per_decoded_token": round((carried[1] - carried[0]) / (sizes.long_count - 1)),
    }


def agreement(entries: Sequence[Entry]) -> dict[str, str]:
    """How many answers of each system equal transformers' generate, token by token."""
    oracle = next((e for e in entries if e.system.name == "transformers-generate"), None)
    found: dict[str, str] = {}
    for entry in entries:
        if oracle is None or entry is oracle:
            continue
        shared = [name for name in entry.said if name in oracle.said]
        same = sum(entry.said[name] == oracle.said[name] for name in shared)
        found[entry.system.name] = f"{same} of {len(shared)}"
    return found


async def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # and what was started is ended
    sizes = QUICK if args.quick else Sizes()
    quiet = Quiet(args.quiet, args.tries, args.patience)
    prompts = Prompts(folder)
    entries = choose(set(args.only), folder, args.dtype, sizes, args.port)
    began = time.monotonic()
    extra: dict[str, Any] = {}
    try:
        await asyncio.gather(*(start(entry, prompts, sizes) for entry in entries))
        there = [entry for entry in entries if not entry.missing]
        await asyncio.sleep(3.0)
        for round_ in range(args.rounds):
            turned = there[round_ % len(there) :] + there[: round_ % len(there)]
            for kind in ("short", "long", "throughput"):
                for entry in turned:
                    if kind in entry.kinds and time.monotonic() - began < 60 * args.minutes:
                        await measure(entry, kind, round_, prompts, sizes, quiet)
        for entry in there:
            if isinstance(entry.system, Ours) and entry.system.name.endswith("remote"):
                extra["remote"] = await traffic(entry, prompts, sizes)
    finally:
        await asyncio.gather(*(entry.system.stop() for entry in entries))
    command = f"python -m bench.serving {shlex.join(sys.argv[1:])}".strip()
    return {
        **facts(command),
        "dtype": args.dtype,
        "model": files.served_name(args.model),
        "sizes": {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__},
        "seconds": round(time.monotonic() - began),
        "vllm": systems.VLLM,
        "systems": {entry.system.name: entry.told(args.quiet) for entry in entries},
        "same_tokens": agreement(entries),
        **extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PART,...", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--model", help="a Hugging Face folder, a GGUF file or a hub id; default: the default model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of everything")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no new sample after that")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: shows that it works")
    parser.add_argument("--quiet", type=float, default=0.2, help="cores others may use before a sample is taken again")
    parser.add_argument("--tries", type=int, default=2, help="how often a sample is taken at most")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait, in all, for others to be done")
    parser.add_argument("--port", type=int, default=18102, help="port for vLLM")
    parser.add_argument("--out", type=Path, help="default: bench/results/serving.json, or serving-quick.json")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    args.out = args.out or RESULTS / ("serving-quick.json" if args.quick else "serving.json")
    if args.quick:
        args.rounds = 1
    cache = Path.home() / ".cache" / "infinillm"
    folder = files.resolve(args.model, cache, lambda what, share: say(f"{what} {share:.0%}"))
    found = asyncio.run(compare(args, folder))
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    known[args.dtype if len(args.only) == len(PARTS) else f"{args.dtype}, {' and '.join(args.only)} alone"] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(known, indent=1) + "\n")
    text = render(known)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
