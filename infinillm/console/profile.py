"""`infinillm profile`: what a step, a question to another node and a move of K/V cost on this machine, as JSON.

Everything is measured with the worker's own parts and weights: the dense layers with an `attend` that does nothing,
attention over blocks of a store, questions to a memory worker (a process of its own, or one that is there already).
Each point gets an equal share of the time. What others do to the machine meanwhile is left out as far as it can be: of
the samples of a point the lower quartile counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinillm import config, rpc
from infinillm.attention.store import Store, build_table
from infinillm.console.progress import Progress
from infinillm.core.blocks import Blocks
from infinillm.core.cost import Cost, Curve, fitted, to_plain
from infinillm.core.recall import AT_ONCE
from infinillm.core.request import Request, Sampling
from infinillm.core.request import Sequence as Running
from infinillm.core.types import Chunk, Grow, Part, Plan, Refused
from infinillm.engine.runner import Runner
from infinillm.errors import Unavailable
from infinillm.kernels import bodies
from infinillm.model import files, weights
from infinillm.model.decoder import Attend, Decoder
from infinillm.model.spec import dtype_of, spec_of
from infinillm.pool.ask import PooledAttention
from infinillm.pool.borrow import Lenders
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics, start_log
from infinillm.transport.lanes import Lanes

BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = tuple(128 << k for k in range(7))  # to 8,192 tokens of context
ASKED = (1, 4, 16)  # rows of a question
MOVED = (16, 256, 1024)  # tokens
CHUNK, PROMPT = 512, 2048  # tokens of one pass, and of the prompt
LEAST, MOST = 5, 400  # samples of a point
LENDER = "lender"
LOAN_SECONDS = 600.0

Say = Callable[[str, float], None]
Samples = dict[int, list[float]]


def run(settings: config.Profile) -> None:
    start_log("profile", "error")
    with Progress() as progress:
        measured, about = measure(settings, progress.say)
    lines = (f'"{name}": {json.dumps(value)}' for name, value in {"about": about, **to_plain(measured)}.items())
    text = "{" + ",\n ".join(lines) + "}"
    if settings.out:
        Path(settings.out).write_text(text + "\n", encoding="utf-8")
        print(summary(measured))
        print(f"written to {settings.out}")
    else:
        print(text)


def measure(settings: config.Profile, say: Say) -> tuple[Cost, dict[str, Any]]:
    """The cost of this model on this machine, and what it was measured on. Raises BadRequest or Unavailable."""
    cache = files.cache_folder(settings.cache_dir)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    )
    body = bodies.body(device, cache)
    path = files.resolve(settings.model or None, cache, say)
    dtype = dtype_of(spec_of(weights.read_config(path), None), settings.dtype)
    spec, tensors = weights.load(path, dtype, device, say, None)
    decoder = Decoder(spec, tensors, device, getattr(torch, dtype), body)
    runner = Runner(decoder, settings.threads)
    runner.settle()
    shape = spec.attention(settings.block_size, dtype)
    lengths = tuple(n for n in LENGTHS if n <= (spec.context or n)) or LENGTHS[:2]
    prompt = min(PROMPT, lengths[-1])
    store = Store(shape, -(-max(lengths[-1], prompt) // settings.block_size), device, body)
    bench = _Bench(runner, store, settings.seconds / (len(BATCHES) + len(lengths) + 2 * len(ASKED) + len(MOVED)), say)
    dense = fitted(bench.dense())
    attention = fitted(bench.attention(lengths))
    merging = fitted(bench.merging())
    prefill = bench.prefill(prompt)
    with _lender(settings, path, dtype, device, cache, say) as address:
        about_to_ask = Cost(dense, attention, _nothing(), merging, _nothing(), prefill, 1, 1)
        question, move = bench.wire(address, about_to_ask)
    say("ready", 1.0)
    question_bytes, token_bytes = shape.layers * shape.question_bytes, shape.block_bytes // shape.block_size
    cost = Cost(dense, attention, question, merging, move, prefill, question_bytes, token_bytes)
    about = {
        "model": files.served_name(settings.model or None),
        "revision": files.revision(path),
        "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": settings.threads,
        "lender": settings.lender or "a process on this machine",
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }
    return cost, about


def summary(cost: Cost) -> str:
    """The curves in lines that people read."""

    def row(name: str, curve: Curve, unit: str) -> str:
        points = " ".join(f"{amount:>8,.0f}: {seconds * 1e3:<8.3g}" for amount, seconds in curve.points if amount)
        return f"{name:34}{points} {unit}"

    (first, *_, (tokens, seconds)) = cost.prefill.points
    return "\n".join(
        [
            row("a step without attention, by rows", cost.dense, "ms"),
            row("attention, by tokens of context", cost.attention, "ms"),
            row("asking a node, by rows", cost.question, "ms"),
            row("moving K/V, by tokens", cost.move, "ms"),
            f"reading a token of context: {cost.seconds_per_token * 1e6:.3g} us",
            f"prefill: {(tokens - first[0]) / (seconds - first[1]):,.0f} tokens/s",
            f"one question row: {cost.question_bytes:,} bytes; K/V of a token: {cost.token_bytes:,} bytes",
            f"asking another node hides behind reading from {cost.spreading_pays_from(1):,.0f} tokens of context on",
        ]
    )


def _nothing() -> Curve:
    return Curve(((0.0, 0.0), (1.0, 0.0)))


class _Bench:
    """Measures one model on one device; `seconds` for each point."""

    def __init__(self, runner: Runner, store: Store, seconds: float, say: Say):
        self.runner, self.store, self.seconds, self.say = runner, store, seconds, say
        self.spec = runner.decoder.spec
        self.device, self.dtype = store.device, store.dtype
        self.ids = random.Random(0).sample(range(store.blocks), store.blocks)  # a pool in use is not in order

    def times(self, call: Callable[[], object]) -> list[float]:
        """Seconds of each of some calls, after one that does not count."""
        self._once(call)
        found: list[float] = []
        while len(found) < LEAST or (sum(found) < self.seconds and len(found) < MOST):
            found.append(self._once(call))
        return found

    def _once(self, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def each(self, what: str, amounts: Sequence[int], make: Callable[[int], Callable[[], object]]) -> Samples:
        found: Samples = {}
        for n, amount in enumerate(amounts):
            self.say(what, n / len(amounts))
            found[amount] = self.times(make(amount))
        return found

    # --- this node -----------------------------------------------------------------------------------------------

    def pass_over(self, chunks: Sequence[tuple[int, int]], attend: Attend) -> None:
        """One pass over chunks [start, stop), each of a sequence of its own; a chunk that ends its sequence samples."""
        sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
        sequences = {}
        for n, (_, stop) in enumerate(chunks):
            tokens = [(7 * at + n) % self.spec.vocab for at in range(stop)]
            sequences[str(n)] = Running(Request(str(n), tuple(tokens), sampling), tokens, state="running")
        self.runner.run([Chunk(str(n), *chunk) for n, chunk in enumerate(chunks)], sequences, attend)

    def dense(self) -> Samples:
        def make(rows: int) -> Callable[[], object]:
            return lambda: self.pass_over([(15, 16)] * rows, lambda layer, q, k, v: q)

        return self.each("measuring steps without attention", BATCHES, make)

    def rows(self, count: int, heads: int) -> Tensor:
        return torch.ones(count, heads, self.spec.head_dim, dtype=self.dtype, device=self.device)

    def attention(self, lengths: Sequence[int]) -> Samples:
        shape, store = self.store.shape, self.store
        q, k = self.rows(1, shape.heads), self.rows(1, shape.kv_heads)

        def make(length: int) -> Callable[[], object]:
            attend = self.attend(length - 1, length)
            return lambda: [attend(layer, q, k, k) for layer in range(shape.layers)]

        store.pool.uniform_(-1, 1)
        return self.each("measuring attention", lengths, make)

    def attend(self, start: int, stop: int) -> Attend:
        """Attention of a chunk of the one sequence that the store holds."""
        store, size = self.store, self.store.shape.block_size
        held = self.ids[: -(-stop // size)]
        table = build_table([range(start, stop)], [(held, range(0, size * len(held), size))], self.device)
        slots = [held[at // size] * size + at % size for at in range(start, stop)]
        where = torch.tensor(slots, dtype=torch.int64, device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            store.write(layer, k, v, where)
            return store.attend(layer, q, table).o

        return attend

    def merging(self) -> Samples:
        shape, merge = self.store.shape, self.store.body.merge

        def make(rows: int) -> Callable[[], object]:
            o = self.rows(rows, shape.heads)
            lse = torch.zeros(rows, shape.heads, dtype=torch.float32, device=self.device)
            return lambda: [merge(o, lse, o, lse) for _ in range(shape.layers)]

        return self.each("measuring merges", ASKED, make)

    def prefill(self, tokens: int) -> Curve:
        """One prompt, chunk by chunk: the time after each."""
        points, spent = [(0.0, 0.0)], 0.0
        size = min(CHUNK, tokens // 2)
        for start in range(0, tokens, size):
            self.say("measuring prefill", start / tokens)
            chunk = (start, min(start + size, tokens))
            spent += self._once(lambda chunk=chunk: self.pass_over([chunk], self.attend(*chunk)))  # type: ignore[misc]
            points.append((float(chunk[1]), spent))
        return Curve(tuple(points))

    # --- the way to another --------------------------------------------------------------------------------------

    def wire(self, address: str, known: Cost) -> tuple[Curve, Curve]:
        """Asking, and moving: what is left of the time when what is `known` is taken away."""
        shape, size = self.store.shape, self.store.shape.block_size
        metrics = Metrics("profile")
        lanes = Lanes(host="127.0.0.1", patience=10.0, device=self.device, dial=rpc.blocking_channel)
        memory = Memory(Blocks("profile", self.store.blocks, size, 0), self.store)
        lenders = Lenders("profile", f"{time.time_ns():016x}", memory, lanes=lanes, port_kind="", metrics=metrics)
        need = _lent_blocks(size)
        got = asyncio.run(lenders.borrow(need, need, [(LENDER, address, need)], AT_ONCE))
        if isinstance(got, Refused):
            raise Unavailable(f"{address} lends nothing to measure with: {got.reason}")
        remote = PooledAttention("profile", memory, lenders, metrics)
        grown = [Grow(f"asked-{n}", LENDER, 0, 1) for n in range(max(ASKED))]
        grown.append(Grow("moved", LENDER, 0, max(MOVED) // size + 1))
        for each in grown:
            lenders.grow(each)
        step = 1
        remote.begin([], {LENDER: Plan(step, tuple(grown), ())})

        def exchange(chunks: Sequence[Chunk], parts: Sequence[Part]) -> None:
            nonlocal step
            step += 1
            total = sum(chunk.stop - chunk.start for chunk in chunks)
            q, k = self.rows(total, shape.heads), self.rows(total, shape.kv_heads)
            remote.begin(chunks, {LENDER: Plan(step, (), tuple(parts))})
            for layer in range(shape.layers):
                remote(layer, q, k, k)

        def ask(rows: int) -> None:
            """Each of so many sequences, whose one block is there, asks at the position after it."""
            names = [f"asked-{n}" for n in range(rows)]
            exchange(
                [Chunk(name, size, size + 1) for name in names],
                [Part(name, size, size + 1, size + 1, size + 1, 1) for name in names],
            )

        def move(tokens: int) -> None:
            """K/V is kept there and nothing asked; the question after it waits until all has come."""
            exchange([Chunk("moved", 0, tokens)], [Part("moved", tokens, tokens, 0, tokens, 0)])
            ask(1)

        def both(what: str, amounts: Sequence[int], call: Callable[[int], None]) -> Samples:
            lenders.renew()
            return self.each(what, amounts, lambda amount: lambda: call(amount))

        try:
            asked = both("measuring questions", ASKED, ask)
            moved = both("measuring moves", MOVED, move)
        finally:
            asyncio.run(lenders.close())
        once = fitted(asked)(1)
        return (
            fitted(_less(asked, lambda rows: known.merging(rows) + known.attend(rows * size, rows))),
            fitted(_less(moved, lambda tokens: once)),
        )


def _less(samples: Mapping[int, Sequence[float]], known: Callable[[int], float]) -> Samples:
    return {amount: [max(s - known(amount), 0.0) for s in taken] for amount, taken in samples.items()}


def _lent_blocks(size: int) -> int:
    return max(ASKED) + max(MOVED) // size + 1


@contextmanager
def _lender(
    settings: config.Profile, path: Path, dtype: str, device: torch.device, cache: Path, say: Say
) -> Iterator[str]:
    """The address of a node to ask: the one named, else a memory worker of our own while the block runs."""
    if settings.lender:
        yield settings.lender
        return
    say("starting a memory worker", 0.0)
    worker = config.Worker(
        model=str(path),
        id=LENDER,
        kv_blocks=_lent_blocks(settings.block_size),
        block_size=settings.block_size,
        dtype=dtype,
        threads=settings.threads,
        device=device.type,
        memory_only=True,
        loan_seconds=LOAN_SECONDS,
        metrics_port=-1,
        cache_dir=str(cache),
        log_level="error",
    )
    argv = [sys.executable, "-m", "infinillm", "worker", "--dies-with", str(os.getpid()), *config.arguments(worker)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    with closing(process.stdout), closing(process.stderr):
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "ready" in said:
                    yield str(said["address"])
                    return
            raise Unavailable(f"the memory worker could not start: {process.stderr.read().strip()}")
        finally:
            process.terminate()
            process.wait()
