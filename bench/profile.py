"""Where the time of a step goes: an engine turned by hand in this process, every part of it under a stopwatch.

    python -m bench.profile [--dtype float32] [--threads 1] [--steps 40]

Four kinds of steps: a decode of one stream after 128 and after 4,000 tokens, a decode of 16 streams, and a prefill
chunk of 512 tokens of a prompt of 4,000 (the median over its chunks). The last table is a decode with half of the K/V
in another process, over shared memory. Times are exclusive (what a part does itself) and the median over steps; the
stopwatch itself costs about 2 % of a decode. Written: bench/results/profile.md.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.machine import facts, say
from infinillm import rpc
from infinillm.attention.store import Store
from infinillm.core.blocks import Blocks
from infinillm.core.recall import AT_ONCE
from infinillm.core.request import Request, Sampling
from infinillm.core.scheduler import Budget
from infinillm.engine.loop import Engine, Submit
from infinillm.engine.runner import Runner
from infinillm.kernels import bodies
from infinillm.model import files, weights
from infinillm.model.decoder import Decoder
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics
from infinillm.transport.lanes import Lanes

RESULTS = Path(__file__).parent / "results"
CACHE = Path.home() / ".cache" / "infinillm"
BLOCK = 16
CPU = torch.device("cpu")
PARTS = {  # as the table shows them, in order: what is timed under each name
    "enter": "layers before attention: matrix q, k, v, rotation",
    "leave": "layers after it: matrices out, gate, up, down, norms",
    "linear qkv": "matrix: q, k, v",
    "linear out": "matrix: attention output",
    "linear gate_up": "matrix: MLP gate and up",
    "linear down": "matrix: MLP down",
    "linear head": "matrix: scores of the vocabulary",
    "attend_blocks": "attention over blocks",
    "write_blocks": "writing K/V",
    "merge": "merging partials",
    "send": "port: sending questions",
    "recv": "port: waiting for answers",
    "dense small": "norms, rotation, activation",
    "forward": "the rest of the forward pass (Python, views)",
    "attend": "the rest of `attend`",
    "begin": "tables and plans of the step",
    "logits": "the rest of scoring",
    "sample": "sampling",
    "runner": "the rest of the runner",
    "decide": "scheduling",
    "commit": "committing",
    "append": "appending, publishing",
    "turn": "the rest of the loop",
}


class Stopwatch:
    """Exclusive times of nested parts, collected step by step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.spent: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self._inner: list[float] = []

    def time(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.time_as(lambda *args: name, function)

    def time_as(self, naming: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        inner, clock = self._inner, self.clock

        def timed(*args: Any, **words: Any) -> Any:
            inner.append(0.0)
            began = clock()
            try:
                return function(*args, **words)
            finally:
                lasted = clock() - began
                name = naming(*args)
                self.spent[name] = self.spent.get(name, 0.0) + lasted - inner.pop()
                if inner:
                    inner[-1] += lasted

        return timed

    def cut(self) -> None:
        """End a step."""
        self.steps.append(self.spent)
        self.spent = {}


class TimedBody:
    """A body of kernels, each function under the stopwatch; matrices go by their place in the model."""

    SMALL = ("rms_norm", "add_rms_norm", "rotate", "silu_mul", "gelu_tanh_mul")

    def __init__(self, body: Any, watch: Stopwatch, places: dict[int, str]):
        for name in ("attend_blocks", "write_blocks", "merge"):
            setattr(self, name, watch.time(name, getattr(body, name)))
        for name in self.SMALL:
            setattr(self, name, watch.time("dense small", getattr(body, name)))
        self._watch, self._few_rows = watch, body.few_rows
        self.linear = watch.time_as(lambda x, weight, *rest: places[weight.data_ptr()], body.linear)
        self.copy_blocks = body.copy_blocks

    def few_rows(self, *args: Any) -> Any:
        found = self._few_rows(*args)
        if found is not None:
            found.enter, found.leave = self._watch.time("enter", found.enter), self._watch.time("leave", found.leave)
        return found


class Bench:
    """One engine over one node, turned by hand; `lender` is the address of a node to borrow from."""

    def __init__(self, decoder: Decoder, blocks: int, clock: Callable[[], float], lender: str = "", borrowed: int = 0):
        watch = self.watch = Stopwatch(clock)
        body = decoder.body
        shape = decoder.spec.attention(BLOCK, str(decoder.dtype).removeprefix("torch."))
        places = {decoder.weights.head.data_ptr(): "linear head"}
        for layer in decoder.weights.layers:
            assert isinstance(layer.mlp, weights.Mlp)
            named = {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.mlp.gate_up, "down": layer.mlp.down}
            places |= {tensor.data_ptr(): f"linear {name}" for name, tensor in named.items()}
        timed: Any = TimedBody(body, watch, places)
        self.decoder = Decoder(decoder.spec, decoder.weights, CPU, decoder.dtype, timed)
        self.memory = Memory(Blocks("home", blocks, BLOCK, blocks), Store(shape, blocks, CPU, timed))
        metrics = Metrics("worker", node="home")
        lanes = Lanes(host="127.0.0.1", patience=10.0, device=CPU, dial=rpc.blocking_channel)
        self.lenders = Lenders("home", "home-1", self.memory, lanes=lanes, port_kind="shm", metrics=metrics)
        self.runner = Runner(self.decoder, torch.get_num_threads())
        self.engine = Engine(
            "home",
            self.runner,
            self.memory,
            self.lenders,
            Budget(512, 64, BLOCK, 128),
            publish=lambda outputs: None,
            borrow=lambda *wish: None,
            cost=None,
            metrics=metrics,
        )
        if borrowed:
            got = asyncio.run(self.lenders.borrow(borrowed, borrowed, [("lender", lender, borrowed)], AT_ONCE))
            assert got == borrowed, got
            port: Any = self.lenders.conversation("lender").port
            port.send, port.recv = watch.time("send", port.send), watch.time("recv", port.recv)
        engine, attend = self.engine, self.engine.attend
        for name in ("decide", "commit", "append", "turn"):
            setattr(engine, name, watch.time(name, getattr(engine, name)))
        attend.begin = watch.time("begin", attend.begin)  # type: ignore[method-assign]
        engine.attend = watch.time("attend", attend)  # type: ignore[assignment]
        engine.attend.begin = attend.begin  # type: ignore[method-assign]
        self.runner.run = watch.time("runner", self.runner.run)  # type: ignore[method-assign]
        self.decoder.forward = watch.time("forward", self.decoder.forward)  # type: ignore[method-assign]
        self.decoder.logits = watch.time("logits", self.decoder.logits)  # type: ignore[method-assign]

    def run(self, lengths: list[int], count: int, wanted: Callable[[int], bool]) -> list[dict[str, float]]:
        """The steps of these requests, as parts, for which `wanted(tokens in the step)`."""
        rng = random.Random(0)
        vocab = self.decoder.spec.vocab
        for n, length in enumerate(lengths):
            prompt = tuple(rng.randrange(vocab) for _ in range(length))
            sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
            self.engine.inbox.put(Submit(Request(str(n), prompt, sampling, float(n))))
        self.engine.hear(block=False)
        found = []
        computed = 0
        while self.engine.sequences:
            running = {s.id: s.length - (s.gap[0] if s.gap else s.length) for s in self.engine.running}
            before = sum(running.values()) or sum(s.length for s in self.engine.waiting)
            assert self.engine.turn(), "nothing was computed"
            self.watch.cut()
            computed += 1
            if wanted(before):
                found.append(self.watch.steps[-1])
        return found

    def close(self) -> None:
        asyncio.run(self.lenders.close())


@contextmanager
def lender(folder: Path, dtype: str, blocks: int) -> Iterator[str]:
    """A memory worker in a process of its own; its address."""
    argv = [sys.executable, "-m", "infinillm", "worker", str(folder), "--memory-only", "--dtype", dtype]
    argv += ["--kv-blocks", str(blocks), "--id", "lender", "--loan-seconds", "600"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.terminate()
        process.wait(30.0)


def table(title: str, steps: list[dict[str, float]]) -> str:
    names = [name for name in PARTS if any(name in step for step in steps)]
    totals = [sum(step.values()) for step in steps]
    total = statistics.median(totals)
    summary = f"Median step **{total * 1e3:.1f} ms**, quickest {min(totals) * 1e3:.1f} ms, {len(steps)} steps."
    lines = [f"### {title}", "", summary, ""]
    lines += ["| part | ms | share |", "| --- | --- | --- |"]
    for name in names:
        spent = statistics.median(step.get(name, 0.0) for step in steps)
        if spent >= total / 1000:
            lines.append(f"| {PARTS[name]} | {spent * 1e3:.2f} | {spent / total:.1%} |")
    return "\n".join([*lines, ""])


def floor(body: Any, decoder: Decoder, clock: Callable[[], float]) -> tuple[float, float]:
    """GB/s of plain reads measured now, and milliseconds to read all weights once at that speed."""
    if not hasattr(body, "read"):
        return 0.0, 0.0
    much = torch.ones(1 << 28)
    times = []
    for _ in range(7):
        began = clock()
        body.read(much)
        times.append(clock() - began)
    speed = much.nbytes / min(times)
    return speed / 1e9, decoder.weights.bytes / speed * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="decode steps of each kind")
    parser.add_argument("--cpu", action="store_true", help="processor time: for a machine in use, and one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "profile.md")
    args = parser.parse_args()
    if args.cpu and args.threads > 1:
        parser.error("--cpu sees one thread only")
    clock = time.thread_time if args.cpu else time.perf_counter
    torch.set_num_threads(args.threads)
    folder = files.resolve(None, CACHE, lambda what, share: None)
    body = bodies.body(CPU, CACHE)
    spec, tensors = weights.load(folder, args.dtype, CPU, lambda what, share: None)
    decoder = Decoder(spec, tensors, CPU, getattr(torch, args.dtype), body)
    speed, least = floor(body, decoder, clock)
    found: list[str] = []
    for title, lengths, wanted in (
        ("Decode, 1 stream after 128 tokens", [128], lambda tokens: tokens == 1),
        ("Decode, 1 stream after 4,000 tokens", [4000], lambda tokens: tokens == 1),
        ("Decode, 16 streams after 320 tokens", [320] * 16, lambda tokens: tokens == 16),
        ("Prefill, a chunk of 512 tokens among 4,000", [4000], lambda tokens: tokens > 512),
    ):
        say(title)
        count = 1 if title.startswith("Prefill") else args.steps + 1
        if len(lengths) > 1:
            count += 8  # they are not all there at first
        bench = Bench(decoder, 4200 // BLOCK + 200, clock)
        steps = bench.run(lengths, count, wanted)
        bench.close()
        found.append(table(title, steps[-args.steps :]))
    say("half of the K/V in another process")
    half = -(-4000 // (2 * BLOCK)) + 4
    with lender(folder, args.dtype, half + 8) as address:
        bench = Bench(decoder, half, time.perf_counter, address, half + 8)
        steps = bench.run([4000], args.steps + 1, lambda tokens: tokens == 1)
        found.append(table("Decode, 1 stream after 4,000 tokens, half of the K/V remote (by the wall clock)", steps))
        bench.close()
    told = facts(f"python -m bench.profile {' '.join(sys.argv[1:])}".strip())
    title = f"## {args.dtype}, {args.threads} {'thread' if args.threads == 1 else 'threads'}"
    where = f"{files.served_name(None)} on {told['cpu']}, torch {told['versions']['torch']}"
    about = f"`{told['command']}`, {'processor' if args.cpu else 'wall'} time, {told['when']}, {where}."
    bound = (
        f"Plain reads went at {speed:.1f} GB/s; at that speed all {decoder.weights.bytes / 1e6:.0f} MB of weights take "
        f"{least:.1f} ms, below which no decode of one stream can be."
    )
    text = "\n".join([title, "", about, bound, "", *found])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(_replace(args.out.read_text() if args.out.exists() else "", text))
    print(text)


def _replace(whole: str, section: str) -> str:
    """The page with this section new: one section for each dtype and number of threads."""
    title = section.splitlines()[0]
    page = (whole or "# Where the time of a step goes\n\nMade by `python -m bench.profile`.\n").split("\n## ")
    kept = [page[0], *(x for x in page[1:] if not x.startswith(title.removeprefix("## ")))]
    return "\n## ".join([*kept, section.removeprefix("## ")])


if __name__ == "__main__":
    main()
