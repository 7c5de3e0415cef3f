"""What moving K/V beside the steps costs: a decode step with 0 to 128 tokens on their way to another process.

    python -m bench.moves [--dtype float32] [--rounds 60] [--out bench/results/moves.json]

One stream of some 1,000 tokens, a few of its blocks at a lender (so that it is asked in every step), one thread. In
turns, step by step, a stretch of so many tokens moves to the lender and back, over shared memory. A share is of the
median step without moves. The paper's figures beside it are those of Infinite-LLM (arXiv 2401.02669), of throughput.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.machine import facts, say
from bench.profile import BLOCK, CACHE, CPU, Bench, lender
from infinillm.core.request import Request, Sampling
from infinillm.core.types import Move
from infinillm.engine.loop import Submit
from infinillm.kernels import bodies
from infinillm.model import files, weights
from infinillm.model.decoder import Decoder

BUDGETS = (0, 16, 32, 64, 128)  # tokens beside one step
PAPER = {16: 0.0, 32: -8.6}  # % of throughput
PROMPT, KEPT = 1000, 4  # tokens; blocks that stay at the lender
FIRST = 8 * BLOCK  # position of what moves to and fro


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.moves", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=60, help="there and back, with each number of tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "moves.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    folder = files.resolve(None, CACHE, lambda what, share: None)
    spec, tensors = weights.load(folder, chosen.dtype, CPU, lambda what, share: None)
    decoder = Decoder(spec, tensors, CPU, getattr(torch, chosen.dtype), bodies.body(CPU, CACHE))
    steps = 2 * chosen.rounds * len(BUDGETS) + 40
    room = KEPT + max(BUDGETS) // BLOCK
    times: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
    with lender(folder, chosen.dtype, 2 * room) as address:
        bench = Bench(decoder, (PROMPT + steps) // BLOCK + 60, time.perf_counter, address, room)
        engine = bench.engine
        sampling = Sampling(temperature=0.0, max_tokens=steps, ignore_eos=True)
        engine.inbox.put(Submit(Request("s", tuple(5 + i % 1000 for i in range(PROMPT)), sampling, 0.0)))
        engine.hear(block=False)

        def step(blocks: int, source: str, target: str) -> float:
            if blocks:
                engine.moves.wish(Move("s", source, target, FIRST, blocks), "the benchmark")
            began = time.perf_counter()
            assert engine.turn(), "nothing was computed"
            return time.perf_counter() - began

        while not engine.sequences["s"].produced:
            step(0, "", "")
        engine.moves.wish(Move("s", "home", "lender", 0, KEPT), "the benchmark")
        for _ in range(10):
            step(0, "", "")
        say("moving")
        for _ in range(chosen.rounds):
            for budget in BUDGETS:
                for source, target in (("home", "lender"), ("lender", "home")):
                    times[budget].append(step(budget // BLOCK, source, target))
        moved = engine.moves
        assert not moved.wishes, f"{len(moved.wishes)} moves were not made"
        while engine.sequences:
            step(0, "", "")
        bench.close()
    base = statistics.median(times[0])
    rows = [
        {
            "tokens": budget,
            "ms": round(statistics.median(taken) * 1e3, 2),
            "throughput %": round(100 * (base / statistics.median(taken) - 1), 1),
            "paper %": PAPER.get(budget),
        }
        for budget, taken in times.items()
    ]
    for row in rows:
        print(row)
    told = facts(" ".join(["python -m bench.moves", *sys.argv[1:]]), packages=("torch",))
    chosen.out.write_text(json.dumps({**told, "steps": len(times[0]), "moves": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
