"""Attention of the CPU body: decode as a share of the read bandwidth of the same run, chunks as a share of a matmul.

    python -m bench.attention [--threads 1 2] [--seconds 0.6] [--out bench/results/attention-cpu.json]

Each sample of a decode is followed by reading as many bytes of another buffer, so that both see the same machine; a
share is the quotient of the two lower quartiles, as whoever else uses the machine can only slow a sample. K/V rotate
through a pool far larger than a core's caches. `flash` is torch's CPU flash attention with the group packed as rows,
`sdpa` is F.scaled_dot_product_attention with enable_gqa; both are given contiguous K/V, which paged K/V would first
have to be gathered into. `torch body` does gather.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import facts, say
from infinillm.attention.store import DTYPES, Store, build_table, want_huge_pages
from infinillm.core.types import AttentionShape
from infinillm.kernels import native, torch_body
from infinillm.kernels.native import Native


class Heads(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dim: int


SMALL = Heads("S", 9, 3, 64)  # SmolLM2-135M
LARGE = Heads("L", 32, 8, 128)  # Llama-3-8B
DECODES = [
    (heads, batch, context)
    for heads, some in ((SMALL, 16), (LARGE, 4))
    for batch, context in ((1, 1024), (1, 8192), (some, 8192), (1, 131072))
]
CHUNKS = [(rows, context) for context in (2048, 8192) for rows in (16, 256, 2048)]
MATRICES = [(960, 576), (3072, 576), (576, 1536), (49152, 576), (4096, 4096)]
POOL_BYTES = 768 << 20
AT_LEAST, AT_MOST = 7, 200  # samples


def store(body: Native, heads: Heads, dtype: str, size: int, blocks: int, layers: int) -> Store:
    shape = AttentionShape(heads.heads, heads.kv_heads, heads.dim, size, dtype, heads.dim**-0.5, (0,) * layers)
    made = Store(shape, blocks, torch.device("cpu"), body)
    made.pool.uniform_(-1, 1)
    return made


def sample(calls: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """The lower quartile of the times of each call, taken in turns; a slow call is sampled less often."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    started, turn = time.perf_counter(), 0
    while turn < AT_LEAST or (turn < AT_MOST and time.perf_counter() - started < seconds):
        turn += 1
        for name, call in calls.items():
            if sum(times[name]) > seconds and len(times[name]) >= 3:
                continue
            begun = time.perf_counter()
            call(turn)
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.quantiles(taken, n=4)[0] for name, taken in times.items()}


def decode(body: Native, heads: Heads, dtype: str, size: int, batch: int, context: int, buffer: Tensor, seconds: float):
    used = 2 * heads.kv_heads * heads.dim * context * batch * DTYPES[dtype].itemsize
    layers = max(1, min(64, POOL_BYTES // used))
    blocks = batch * context // size
    made = store(body, heads, dtype, size, blocks, layers)
    ids = random.Random(0).sample(range(blocks), blocks)
    share = blocks // batch
    held = [(ids[i * share : (i + 1) * share], list(range(0, context, size))) for i in range(batch)]
    table = build_table([[context - 1]] * batch, held, torch.device("cpu"))
    q = torch.randn(batch, heads.heads, heads.dim).to(made.dtype)
    group = q.view(batch, heads.kv_heads, -1, heads.dim)
    plain = made.pool.reshape(layers, 2, batch, heads.kv_heads, context, heads.dim)
    pieces = buffer.split(used // 4)
    pieces = pieces[:-1] if len(pieces) > 1 else pieces
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    calls: dict[str, Callable[[int], object]] = {
        "native": lambda i: made.attend(i % layers, q, table),
        "read": lambda i: body.read(pieces[i % len(pieces)]),
        "flash": lambda i: flash(group, *plain[(i + layers // 4) % layers]),  # not what was just read
        "sdpa": lambda i: torch.nn.functional.scaled_dot_product_attention(
            q.unsqueeze(2), *plain[(i + layers // 2) % layers], enable_gqa=True
        ),
        "torch body": lambda i: torch_body.attend_blocks(q, *made.pool[i % layers], table, scale=made.shape.scale),
    }
    times = sample(calls, seconds)
    gb = {name: used / taken / 1e9 for name, taken in times.items()}
    read = times["read"] * used / (4 * pieces[0].numel())  # a buffer smaller than the K/V is read at its own length
    return {
        "read GB/s": used / read / 1e9,
        "native us": times["native"] * 1e6,
        "native GB/s": gb["native"],
        **{f"{name} %": 100 * read / times[name] for name in calls if name != "read"},
    }


def chunk(body: Native, heads: Heads, dtype: str, rows: int, context: int, seconds: float) -> dict[str, float]:
    made = store(body, heads, dtype, 16, context // 16, 1)
    ids = random.Random(1).sample(range(context // 16), context // 16)
    table = build_table([range(context - rows, context)], [(ids, list(range(0, context, 16)))], torch.device("cpu"))
    q = torch.randn(rows, heads.heads, heads.dim).to(made.dtype)
    left, right = torch.randn(2, 1024, 1024).to(made.dtype)
    calls: dict[str, Callable[[int], object]] = {
        "native": lambda i: made.attend(0, q, table),
        "matmul": lambda i: left @ right,
        "torch body": lambda i: torch_body.attend_blocks(q, *made.pool[0], table, scale=made.shape.scale),
    }
    times = sample(calls, seconds)
    flops = 4 * heads.heads * heads.dim * sum(range(context - rows + 1, context + 1))
    work = {"native": flops, "torch body": flops, "matmul": 2 * 1024**3}
    return {"native ms": times["native"] * 1e3, **{f"{n} GFLOP/s": work[n] / times[n] / 1e9 for n in calls}}


def linear(body: Native, dtype: str, features: int, width: int, rows: int, buffer: Tensor, seconds: float):
    used = features * width * DTYPES[dtype].itemsize
    weights = [torch.randn(features, width).to(DTYPES[dtype]) for _ in range(max(2, min(40, POOL_BYTES // 4 // used)))]
    x = torch.randn(rows, width).to(DTYPES[dtype])
    pieces = buffer.split(used // 4)[:-1]
    calls: dict[str, Callable[[int], object]] = {
        "native": lambda i: body.linear(x, weights[i % len(weights)]),
        "read": lambda i: body.read(pieces[i % len(pieces)]),
        "torch": lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]),
    }
    times = sample(calls, seconds)
    return {
        "native us": times["native"] * 1e6,
        **{f"{n} %": 100 * times["read"] / times[n] for n in ("native", "torch")},
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table whose columns are the keys of the first row."""
    cells = [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    wide = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(rows[0])]
    for line in [list(rows[0]), *cells]:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, wide, strict=True)))
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--seconds", type=float, default=0.6, help="about how long one call of a row is sampled")
    parser.add_argument("--out", type=Path, default=Path("bench/results/attention-cpu.json"))
    chosen = parser.parse_args()
    body = native.load(None)
    if not isinstance(body, Native):
        raise SystemExit("no C++ compiler: there is no native body to measure")
    torch.manual_seed(0)
    buffer = torch.empty(POOL_BYTES // 4)
    want_huge_pages(buffer)
    buffer.fill_(1.0)
    result: dict[str, Any] = facts(" ".join(["python -m bench.attention", *sys.argv[1:]]), packages=("torch",))
    result["load average before"] = os.getloadavg()[0]
    decodes, chunks, matrices = [], [], []
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        for dtype in chosen.dtypes:
            for heads, batch, context in DECODES:
                for size in chosen.block_sizes:
                    key = {"dtype": dtype, "threads": threads, "shape": heads.name, "block": size}
                    key |= {"batch": batch, "context": context}
                    say(" ".join(map(str, key.values())))
                    decodes.append(key | decode(body, heads, dtype, size, batch, context, buffer, chosen.seconds))
            for heads in (SMALL, LARGE):
                for rows, context in CHUNKS:
                    key = {"dtype": dtype, "threads": threads, "shape": heads.name, "rows": rows, "context": context}
                    say("chunk " + " ".join(map(str, key.values())))
                    chunks.append(key | chunk(body, heads, dtype, rows, context, chosen.seconds))
            for features, width in MATRICES:
                for rows in (1, 4, 16):
                    key = {"dtype": dtype, "threads": threads, "matrix": f"{features}x{width}", "rows": rows}
                    matrices.append(key | linear(body, dtype, features, width, rows, buffer, chosen.seconds))
    result["load average after"] = os.getloadavg()[0]
    result |= {"decode": decodes, "chunk": chunks, "linear": matrices}
    print("decode: % of the read bandwidth measured in the same turns")
    show(decodes)
    print("a chunk of a prompt")
    show(chunks)
    print("linear: % of the read bandwidth")
    show(matrices)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1, default=lambda x: round(x, 2)) + "\n")


if __name__ == "__main__":
    main()
