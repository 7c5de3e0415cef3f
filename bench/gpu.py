"""Everything a GPU can show, in one call without network: the Triton bodies against the reference, and their speed.

    python -m bench.gpu [--out bench/results/gpu.json] [--rehearse]

Prints and writes: whether every question of the test table is answered right in float32, float16 and bfloat16; decode
attention as a share of the copy bandwidth measured in the same run; chunks in TFLOP/s beside a matmul of the same run;
and one decode step of Llama-3-8B's shapes, dense layers, writes and attention, launched one by one and as a CUDA graph.
`--rehearse` runs all of it in miniature on the CPU, in Triton's interpreter, where its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.machine import facts, say
from infinillm.attention.store import DTYPES, Store, build_table
from infinillm.core.types import AttentionShape
from infinillm.kernels import reference
from infinillm.kernels.bodies import Body
from infinillm.kernels.reference import Table


class Model(NamedTuple):
    """The sizes of a decoder."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int


class Scale(NamedTuple):
    """How large everything is: as it should be on a GPU, or in miniature."""

    decodes: list[tuple[int, int]]  # sequences, context
    chunks: list[tuple[int, int]]  # rows, context
    steps: list[tuple[int, int]]  # sequences, context
    model: Model
    copy_bytes: int
    matmul: int
    samples: int


LLAMA = Model(32, 4096, 14336, 32, 8, 128, 128256)
FULL = Scale(
    [(1, 8192), (1, 131072), (16, 8192), (64, 2048), (64, 8192)],
    [(512, 512), (2048, 2048), (2048, 16384), (8192, 8192), (16384, 16384)],
    [(1, 1024), (1, 8192), (16, 4096), (64, 2048)],
    LLAMA,
    1 << 30,
    8192,
    30,
)
TINY = Scale([(1, 300), (2, 64)], [(24, 40)], [(2, 40)], Model(2, 64, 96, 4, 2, 32, 128), 1 << 16, 64, 1)
QUESTIONS = [  # heads, K/V heads, dimension, block size, window, soft cap
    (32, 8, 128, 16, 0, 0.0),
    (9, 3, 64, 16, 0, 0.0),
    (8, 4, 256, 32, 33, 50.0),
    (8, 1, 80, 8, 0, 0.0),
    (16, 16, 96, 64, 20, 0.0),
]
CLOSE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Bench:
    """One device, one body, one scale."""

    def __init__(self, device: torch.device, body: Body, scale: Scale):
        self.device, self.body, self.scale = device, body, scale

    def seconds(self, call: Callable[[], object]) -> float:
        """The median time of one call, by the device's own clock where it has one."""
        for _ in range(2 if self.device.type == "cuda" else 1):
            call()
        taken = []
        for _ in range(self.scale.samples):
            if self.device.type == "cuda":
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                call()
                ended.record()
                ended.synchronize()
                taken.append(begun.elapsed_time(ended) / 1e3)
            else:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def store(self, heads: int, kv_heads: int, dim: int, dtype: str, size: int, blocks: int, layers: int) -> Store:
        shape = AttentionShape(heads, kv_heads, dim, size, dtype, dim**-0.5, (0,) * layers)
        return Store(shape, blocks, self.device, self.body)

    def table(self, sequences: int, context: int, rows: int, size: int) -> Table:
        """Every sequence has `context` tokens in shuffled blocks and asks from its last `rows`."""
        each = -(-context // size)
        ids = torch.randperm(sequences * each).view(sequences, each).tolist()
        held = [(blocks, list(range(0, context, size))) for blocks in ids]
        return build_table([range(context - rows, context)] * sequences, held, self.device)

    def right(self) -> list[dict[str, Any]]:
        """Chunks, decodes and holes together, against the reference in float64."""
        found = []
        for heads, kv_heads, dim, size, window, soft_cap in QUESTIONS:
            for dtype in DTYPES.values():
                made = torch.Generator().manual_seed(0)
                held = [([7, 2, 9, 4], [0, 1, 2, 3]), ([1, 5], [0, 3]), ([], []), ([3, 0, 8], [0, 1, 2])]
                asked = [[4 * size - 3], list(range(2 * size, 4 * size)), [5], [3 * size - 1]]
                blocks = [(ids, [size * i for i in at]) for ids, at in held]
                table = build_table(asked, blocks, torch.device("cpu"))
                pool = torch.randn(2, 10, kv_heads, size, dim, generator=made).to(dtype)
                q = torch.randn(table.positions.shape[0], heads, dim, generator=made).to(dtype)
                how = {"scale": dim**-0.5, "window": window, "soft_cap": soft_cap}
                o, lse = reference.attend_blocks(q.double(), *pool.double(), table, **how)
                there = Table(*(ids.to(self.device) for ids in table))
                answer = self.body.attend_blocks(q.to(self.device), *pool.to(self.device), there, **how)
                gaps = [
                    (a.cpu().double().nan_to_num(neginf=0) - b.nan_to_num(neginf=0)).abs().max().item()
                    for a, b in zip(answer, (o, lse), strict=True)
                ]
                same = torch.equal(answer[1].cpu().isneginf(), lse.isneginf())
                key = {"dtype": str(dtype)[6:], "heads": f"{heads}/{kv_heads}", "dim": dim, "block": size}
                good = same and max(gaps) < CLOSE[dtype]
                found.append({**key, "window": window, "cap": soft_cap, "o": gaps[0], "lse": gaps[1], "right": good})
        return found

    def copying(self) -> float:
        """Bytes read and written per second by a copy."""
        source = torch.empty(self.scale.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def multiplying(self) -> float:
        """Floating point operations per second of a bfloat16 matmul."""
        a, b = torch.randn(2, self.scale.matmul, self.scale.matmul, device=self.device).bfloat16()
        return 2 * self.scale.matmul**3 / self.seconds(lambda: a @ b)

    def decode(self, copy: float) -> list[dict[str, Any]]:
        """Decode attention as a share of the copy's bandwidth, K/V rotating through layers beyond the caches."""
        model, found = self.scale.model, []
        for sequences, context in self.scale.decodes:
            for size in (16, 32):
                table = self.table(sequences, context, 1, size)
                count = int(table.blocks.shape[0])
                used = 2 * count * size * model.kv_heads * model.dim * 2
                layers = max(1, min(32, self.scale.copy_bytes // used))
                made = self.store(model.heads, model.kv_heads, model.dim, "bfloat16", size, count, layers)
                q = torch.randn(sequences, model.heads, model.dim, device=self.device).bfloat16()

                def all_layers(made: Store = made, q: Tensor = q, table: Table = table, layers: int = layers) -> None:
                    for layer in range(layers):
                        made.attend(layer, q, table)

                taken = self.replayed(all_layers) / layers
                key = {"sequences": sequences, "context": context, "block": size}
                found.append(
                    {**key, "us": taken * 1e6, "GB/s": used / taken / 1e9, "% of copy": 100 * used / taken / copy}
                )
                say(str(found[-1]))
        return found

    def chunk(self, matmul: float) -> list[dict[str, Any]]:
        """Chunks of a prompt over what came before, in TFLOP/s of what a causal mask leaves."""
        model, found = self.scale.model, []
        for rows, context in self.scale.chunks:
            table = self.table(1, context, rows, 16)
            made = self.store(model.heads, model.kv_heads, model.dim, "bfloat16", 16, int(table.blocks.shape[0]), 1)
            q = torch.randn(rows, model.heads, model.dim, device=self.device).bfloat16()
            taken = self.seconds(lambda made=made, q=q, table=table: made.attend(0, q, table))
            flops = 4 * model.heads * model.dim * sum(range(context - rows + 1, context + 1))
            key = {"rows": rows, "context": context, "ms": taken * 1e3, "TFLOP/s": flops / taken / 1e12}
            found.append(key | {"% of matmul": 100 * flops / taken / matmul})
            say(str(found[-1]))
        return found

    def replayed(self, call: Callable[[], object]) -> float:
        """The time of a call whose launches cost nothing: a CUDA graph replayed."""
        if self.device.type != "cuda":
            return self.seconds(call)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()  # compiled and warm before it is captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.seconds(graph.replay)

    def step(self) -> list[dict[str, Any]]:
        """One decode step of a whole decoder: its weights read once, K/V written and asked in every layer."""
        model, body, found = self.scale.model, self.body, []

        def weight(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)

        qkv = (model.heads + 2 * model.kv_heads) * model.dim
        layers = [
            (
                weight(qkv, model.width),
                weight(model.width, model.heads * model.dim),
                weight(2 * model.inner, model.width),
                weight(model.width, model.inner),
            )
            for _ in range(model.layers)
        ]
        head, norm = weight(model.vocabulary, model.width), weight(model.width)
        read = sum(w.nbytes for some in layers for w in some) + head.nbytes
        for sequences, context in self.scale.steps:
            table = self.table(sequences, context, 1, 16)
            blocks = int(table.blocks.shape[0])
            made = self.store(model.heads, model.kv_heads, model.dim, "bfloat16", 16, blocks, model.layers)
            last = table.blocks[table.spans[1:].long() - 1].long()
            slots = last * 16 + (context - 1) % 16
            x = weight(sequences, model.width)
            cos = torch.ones(sequences, model.dim // 2, device=self.device)
            sin = torch.zeros_like(cos)

            def forward(
                made: Store = made, table: Table = table, slots: Tensor = slots, x: Tensor = x,
                cos: Tensor = cos, sin: Tensor = sin,
            ) -> Tensor:  # fmt: skip
                normed, residual = body.rms_norm(x, norm, 1e-5), x
                for layer, (in_weight, out_weight, gate_up, down) in enumerate(layers):
                    mixed = body.linear(normed, in_weight).view(-1, model.heads + 2 * model.kv_heads, model.dim)
                    q, k, v = mixed.split((model.heads, model.kv_heads, model.kv_heads), 1)
                    body.rotate(q, k, cos, sin)
                    made.write(layer, k, v, slots)
                    o = made.attend(layer, q, table).o
                    normed, residual = body.add_rms_norm(body.linear(o.flatten(1), out_weight), residual, norm, 1e-5)
                    inner = body.silu_mul(body.linear(normed, gate_up))
                    normed, residual = body.add_rms_norm(body.linear(inner, down), residual, norm, 1e-5)
                return body.linear(normed, head)

            kv = 2 * blocks * 16 * model.kv_heads * model.dim * 2 * model.layers
            launched, graphed = self.seconds(forward), self.replayed(forward)
            key = {"sequences": sequences, "context": context, "ms launched": launched * 1e3, "ms graph": graphed * 1e3}
            found.append(key | {"graph GB/s": (read + kv) / graphed / 1e9, "tokens/s": sequences / graphed})
            say(str(found[-1]))
        return found


def run(bench: Bench) -> dict[str, Any]:
    say("against the reference")
    right = bench.right()
    wrong = [each for each in right if not each["right"]]
    say(f"{len(right) - len(wrong)} of {len(right)} right {wrong or ''}")
    copy, matmul = bench.copying(), bench.multiplying()
    say(f"copy {copy / 1e9:.0f} GB/s, matmul {matmul / 1e12:.0f} TFLOP/s")
    result = {"right": right, "copy GB/s": copy / 1e9, "matmul TFLOP/s": matmul / 1e12}
    return result | {"decode": bench.decode(copy), "chunk": bench.chunk(matmul), "step": bench.step()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on the CPU, in Triton's interpreter")
    chosen = parser.parse_args()
    if chosen.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    elif not torch.cuda.is_available():
        raise SystemExit("bench.gpu needs a GPU that torch can use (CUDA); --rehearse runs it in miniature without one")
    from infinillm.kernels import triton_body

    torch.manual_seed(0)
    if chosen.rehearse:
        run(Bench(torch.device("cpu"), triton_body, TINY))
        print("the rehearsal ran to its end; its figures mean nothing and are not written")
        return
    device = torch.device("cuda")
    result = facts(" ".join(["python -m bench.gpu", *sys.argv[1:]]), packages=("torch", "triton"))
    result["device"] = torch.cuda.get_device_name(device)
    with torch.inference_mode():
        result |= run(Bench(device, triton_body, FULL))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "right"}, indent=1))
    if not all(each["right"] for each in result["right"]):
        raise SystemExit("some answers were wrong: see 'right' in the results")


if __name__ == "__main__":
    main()
