"""How long a stream pauses when the worker that owns it is told to end, or is killed.

    python -m bench.drain [--tokens 2000] [--rounds 3] [--out bench/results/drain.json]

Two workers of one thread, the embedded model, float32, as real processes on loopback. One request streams; after a
third of its answer its worker gets SIGTERM (or SIGKILL), and the other goes on. Told are the time between two tokens
in the median, and the longest there was.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from bench.machine import facts, say
from tests.e2e import client, processes

OUTPUT = 160  # tokens
SIGNALS = {"undisturbed": None, "drained": signal.SIGTERM, "killed": signal.SIGKILL}
FLAGS = {"worker": ("--block-size", "16", "--dtype", "float32", "--threads", "1")}


def gaps(pool: processes.Cluster, prompt: list[int], told: signal.Signals | None) -> list[float]:
    """Seconds between the messages of one stream, whose worker is told this in the middle of it."""
    with client.streaming(pool.url, prompt, OUTPUT) as stream:
        stream.read(1)
        home, times, waiting = pool.placement(stream.id)["node"], [time.perf_counter()], told is not None
        while len(stream.tokens) < OUTPUT:
            stream.read(len(stream.tokens) + 1)
            times.append(time.perf_counter())
            if waiting and len(stream.tokens) >= OUTPUT // 3:
                assert told is not None
                pool.workers[home].signal(told)
                waiting = False
        assert stream.finish().error is None
    if told is not None:
        pool.workers[home].wait()
        pool.start_worker_again(home)
    return [after - before for before, after in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.drain", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2000, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "drain.json")
    chosen = parser.parse_args()
    draw, found = random.Random(3), dict[str, list[tuple[float, float]]]()
    blocks = 2 * (chosen.tokens + OUTPUT) // 16 + 8
    with (
        tempfile.TemporaryDirectory() as folder,
        processes.cluster(Path(folder), "", blocks=blocks, workers=2, flags=FLAGS) as pool,
    ):
        for number in range(chosen.rounds):
            for what, told in SIGNALS.items():
                prompt = [draw.randrange(10, 40000) for _ in range(chosen.tokens)]
                seen = gaps(pool, prompt, told)
                found.setdefault(what, []).append((statistics.median(seen), max(seen)))
            say(f"round {number + 1} of {chosen.rounds}")
    rows = {
        what: {
            "step ms": round(1e3 * statistics.median(each[0] for each in rounds), 1),
            "longest gap ms": round(1e3 * statistics.median(each[1] for each in rounds), 1),
            "of all rounds": [round(1e3 * each[1], 1) for each in rounds],
        }
        for what, rounds in found.items()
    }
    for what, row in rows.items():
        print(f"{what:12} {row}")
    told_of = facts(" ".join(["python -m bench.drain", *sys.argv[1:]]), packages=("torch", "grpcio"))
    chosen.out.write_text(json.dumps({**told_of, "prompt tokens": chosen.tokens, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
