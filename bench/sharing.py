"""Time to first token of a prompt that another worker has computed: shared where it lies, or computed again.

    python -m bench.sharing [--tokens 4000] [--rounds 5] [--out bench/results/sharing.json]

`infinillm serve`, two workers, the embedded model, float32. In each round a new prompt goes to one worker (computed),
to the other, which is told who has it (shared), to the first again (cached at home), and a further new one to the
other (computed). Every answer to the same prompt must be the same. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine import facts, say
from infinillm import rpc, wire
from infinillm.core.request import Sampling
from infinillm.protos import shard_pb2
from infinillm.servers.shard import SHARD

OUTPUT = 32  # tokens after the first, to see what sharing costs a step
TAIL = 16  # tokens of the prompt that are its own
SECONDS = 600.0


@contextmanager
def serving(*argv: str) -> Iterator[Any]:
    """`infinillm serve`; gives its pool, as told over HTTP, once every worker is in it."""
    command = [sys.executable, "-m", "infinillm", "serve", "--port", "0", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        said = next(json.loads(line) for line in process.stdout if line.startswith('{"ready"'))
        yield lambda: json.load(urllib.request.urlopen(f"http://{said['http']}/v1/pool", timeout=10))
    finally:
        process.terminate()
        process.wait(60)


async def ask(address: str, id: str, prompt: list[int], holder: dict[str, str] | None) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the seconds after which each came."""
    sampling = Sampling(temperature=0.0, max_tokens=OUTPUT + 1, ignore_eos=True)
    request = shard_pb2.ShardGenerateRequest(
        id=id, prompt=prompt, sampling=wire.sampling_to_wire(sampling), holders=[holder] if holder else []
    )
    tokens: list[int] = []
    times: list[float] = []
    async with rpc.channel(address) as channel:
        began = time.perf_counter()
        async for message in rpc.Client(channel, SHARD).Generate(request):
            tokens += message.tokens
            times += [time.perf_counter() - began] * len(message.tokens)
    return tokens, times


async def measure(pool: Any, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    while len(nodes := pool()["nodes"]) < 2:
        await asyncio.sleep(0.2)
    one, other = ({"node": node["id"], "address": node["address"]} for node in nodes)
    draw = random.Random(1)
    first: dict[str, list[float]] = {}
    step: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first warms up
        prompt, fresh = ([draw.randrange(10, 40000) for _ in range(tokens + TAIL)] for _ in range(2))
        said = {}
        for what, place, asked, holder in (
            ("computed", one, prompt, None),
            ("shared", other, prompt, one),
            ("cached at home", one, prompt, None),
            ("computed by the other", other, fresh, None),
        ):
            said[what], times = await ask(place["address"], f"{number}-{what}", asked, holder)
            if number:
                first.setdefault(what, []).append(times[0])
                step.setdefault(what, []).append((times[-1] - times[0]) / (len(times) - 1))
        assert said["computed"] == said["shared"] == said["cached at home"], "placement shows"
        say(f"round {number} of {rounds}")
    return {
        what: {
            "first token s": round(statistics.median(first[what]), 3),
            "step ms": round(1e3 * statistics.median(step[what]), 1),
        }
        for what in first
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4000, help="of the shared prefix")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharing.json")
    chosen = parser.parse_args()
    blocks = str(3 * (chosen.tokens + TAIL + OUTPUT) // 16 + 8)
    with serving("--workers", "2", "--threads", "1", "--dtype", "float32", "--kv-blocks", blocks) as pool:
        rows = asyncio.run(measure(pool, chosen.tokens, chosen.rounds))
    for what, row in rows.items():
        print(f"{what:24} {row}")
    told = facts(" ".join(["python -m bench.sharing", *sys.argv[1:]]), packages=("torch",))
    chosen.out.write_text(json.dumps({**told, "prefix tokens": chosen.tokens, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
