"""Everything a GPU can show in one call without network: answers, attention's bandwidth and speed, a step of a model.

    python -m bench.gpu [--seconds 420] [--out bench/results/gpu.json]

Yardsticks are measured in the same run: a copy (bytes read and written) for decodes, a matrix product for prefill.
Times are of the device, from a CUDA graph, with its cache flushed before each repeat; the median. Parts that do not fit
the memory or the time are named under `left_out`; a part that fails is told with its error, and the others go on.
`TRITON_INTERPRET=1 python -m bench.gpu --rehearse` runs tiny sizes in Triton's interpreter and writes nothing: it shows
that this file works. Exits with 2 where there is no GPU, with 1 where an answer was wrong or a part failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.gpu_timing import Clock, table_of
from infinillm.kernels import paged_triton, reference, triton_body
from tests.kernels.questions import MASKS, SEQUENCES, SHAPES, TOLERANCE, ask, differ, widened

OUT = Path(__file__).parent / "results" / "gpu.json"
BLOCK = 16


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int


S, L = Shape(9, 3, 64), Shape(32, 8, 128)
NAMES = {S: "S", L: "L"}
RAGGED = (131072, *[1024] * 63)
DECODES = [(shape, (c,) * b) for shape in (S, L) for b in (1, 16, 64) for c in (1024, 8192, 32768, 131072)]
DECODES += [(S, RAGGED), (L, RAGGED)]
PREFILLS = [(shape, rows, past) for shape in (S, L) for rows, past in ((512, 0), (2048, 0), (8192, 0), (16384, 0))]
PREFILLS += [(shape, rows, past) for shape in (S, L) for rows, past in ((64, 32768), (512, 32768), (2048, 32768))]
STEPS = [(1, 8192), (16, 8192), (1, 131072), (64, 1024), (64, 8192)]  # batch, context
TINY_DECODES, TINY_PREFILLS = [(S, (300, 40))], [(S, 20, 30), (S, 20, 0)]


def answers(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Bodies against the definition in float64, from the tests' table of shapes; `wrong` names what is too far off."""
    sequences = SEQUENCES[:3] if tiny else SEQUENCES
    cases = list(itertools.product(SHAPES[:1], MASKS[:1]) if tiny else itertools.product(SHAPES, MASKS))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        worst, wrong = 0.0, []
        for shape, (window, soft_cap) in cases:
            question = ask(shape, sequences, dtype, seed=1, device=str(device))
            how = {"scale": shape.dim**-0.5, "window": window, "soft_cap": soft_cap}
            part = triton_body.attend_blocks(*question, **how)
            off = differ(part, reference.attend_blocks(*widened(question), **how))
            other = part[0].flip(0), part[1].flip(0)
            wide = reference.merge(part[0].double(), part[1], other[0].double(), other[1])
            off = max(off, differ(triton_body.merge(*part, *other), wide))
            worst = max(worst, off)
            if off >= TOLERANCE[dtype]:
                wrong.append(f"{tuple(shape)} window {window} cap {soft_cap}: {off:.2g}")
        yield {"dtype": str(dtype), "questions": len(cases), "largest_difference": worst, "wrong": wrong}
    yield far_away(device, tiny)


def far_away(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The same blocks at the end of a pool of more than 2 ** 31 elements: the same answer."""
    question = ask(SHAPES[0], SEQUENCES[:3], torch.float16, seed=1, device=str(device))
    few, *block = question.k_blocks.shape
    blocks = few + (1 if tiny else 2**31 // math.prod(block))
    pools = torch.empty((2, blocks, *block), dtype=torch.float16, device=device)
    pools[0, -few:], pools[1, -few:] = question.k_blocks, question.v_blocks
    table = question.table._replace(blocks=question.table.blocks + (blocks - few))
    near = triton_body.attend_blocks(*question, scale=0.1)
    far = triton_body.attend_blocks(question.q, pools[0], pools[1], table, scale=0.1)
    off = differ(near, far)
    return {"a pool of so many elements": pools[0].numel(), "wrong": [f"{off:.2g}"] if off else []}


def pool(shape: Shape, blocks: int, device: torch.device) -> Tensor:
    """Random K and V of one layer, [2, N, K, B, D] bfloat16."""
    return torch.empty((2, blocks, shape.kv_heads, BLOCK, shape.dim), device=device, dtype=torch.bfloat16).normal_()


def decode(clock: Clock, shape: Shape, contexts: tuple[int, ...]) -> dict[str, Any]:
    """One new row for each sequence: time, and its gigabytes of K and V a second as a share of the copy's."""
    q = torch.randn((len(contexts), shape.heads, shape.dim), device=clock.device).to(torch.bfloat16)
    found = decode_ours(clock, shape, q, contexts)
    if len(set(contexts)) == 1:
        found |= decode_torch(clock, shape, q, contexts[0])
    moved = 2 * sum(contexts) * shape.kv_heads * shape.dim * q.element_size()
    shares = {name.replace("us", "share_of_copy", 1): moved / us / 1e3 / clock.copy for name, us in found.items() if us}
    return {"kv_MB": moved / 1e6, **found, **shares}


def decode_ours(clock: Clock, shape: Shape, q: Tensor, contexts: tuple[int, ...]) -> dict[str, float | None]:
    held = [-(-c // BLOCK) for c in contexts]
    k, v = pool(shape, sum(held), clock.device)
    table = table_of([[c - 1] for c in contexts], held, BLOCK, clock.device)
    scale = shape.dim**-0.5

    def ours() -> object:
        return triton_body.attend_blocks(q, k, v, table, scale=scale)

    found: dict[str, float | None] = {"us": clock.time(ours) * 1e6, "us_from_python": clock.time(ours, False) * 1e6}
    if not clock.rehearsing:
        for times in (0.5, 2):  # is work cut into the right number of units?
            n = int(clock.processors * times)
            again = clock.time(lambda n=n: paged_triton.attend(q, k, v, table, scale, 0, 0.0, n, False))
            found[f"us_with_{times:g}x_units"] = again * 1e6
    return found


def decode_torch(clock: Clock, shape: Shape, q: Tensor, length: int) -> dict[str, float | None]:
    """Torch's own, over K and V that lie contiguous in memory: grouped heads, and the group packed as rows."""
    size = (q.shape[0], shape.kv_heads, length, shape.dim)
    k, v = (torch.empty(size, device=q.device, dtype=q.dtype).normal_() for _ in "kv")
    packed = q.view(q.shape[0], shape.kv_heads, -1, shape.dim)
    return {
        "us_torch_sdpa": peer(clock, lambda: sdpa(q[:, :, None], k, v, enable_gqa=True)),
        "us_torch_sdpa_packed": peer(clock, lambda: sdpa(packed, k, v)),
    }


def peer(clock: Clock, call: Callable[[], object]) -> float | None:
    """Microseconds, or None where it cannot be run here: a peer's failure costs us no figure of ours."""
    try:
        return clock.time(call) * 1e6
    except RuntimeError as error:  # out of memory too
        print(f"         peer: {str(error)[:200]}", flush=True)
        return None


def prefill(clock: Clock, shape: Shape, rows: int, past: int) -> dict[str, Any]:
    """A chunk of one sequence after `past` tokens: TFLOP/s over what is visible."""
    device, dtype, total = clock.device, torch.bfloat16, rows + past
    held = -(-total // BLOCK)
    kv = pool(shape, held, device)
    table = table_of([range(past, total)], [held], BLOCK, device)
    q = torch.randn((rows, shape.heads, shape.dim), device=device).to(dtype)
    work = 4 * shape.heads * shape.dim * (rows * past + rows * (rows + 1) / 2)
    us = clock.time(lambda: triton_body.attend_blocks(q, kv[0], kv[1], table, scale=shape.dim**-0.5)) * 1e6
    k, v = (torch.randn((1, shape.heads, total, shape.dim), device=device).to(dtype) for _ in "kv")
    q_HTD = q.transpose(0, 1)[None].contiguous()
    if past:
        theirs = peer(clock, lambda: sdpa(q_HTD, k, v, attn_mask=causal_lower_right(rows, total)))
    else:
        theirs = peer(clock, lambda: sdpa(q_HTD, k, v, is_causal=True))
    speed = work / us / 1e6
    found = {"us": us, "us_torch_sdpa": theirs, "tflops": speed, "share_of_matmul": speed / clock.matmul}
    return found if theirs is None else {**found, "tflops_torch_sdpa": work / theirs / 1e6}


def facts() -> dict[str, Any]:
    def told(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"

    found = {
        "command": f"python -m bench.gpu {' '.join(sys.argv[1:])}".strip(),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "commit": told("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "capability": f"{device.major}.{device.minor}"}
        found |= {"gib": round(device.total_memory / 2**30, 1), "processors": device.multi_processor_count}
        asked = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        found["driver, power limit, clocks"] = told("nvidia-smi", asked, "--format=csv,noheader")
    return found


def needed(shape: Shape, contexts: tuple[int, ...]) -> int:
    """Bytes of a decode's K and V."""
    return 2 * 2 * sum(contexts) * shape.kv_heads * shape.dim


def step(clock: Clock, batch: int, context: int) -> dict[str, Any]:
    from bench.gpu_step import step as run  # needs transformers, which a GPU's image may lack

    return run(clock, batch, context)


def parts(clock: Clock) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """Section, name, bytes it takes and what to call, in order of worth."""
    tiny = clock.rehearsing
    steps = [(b, c, f"batch {b}, context {c}") for b, c in ([(2, 20)] if tiny else STEPS)]
    yield "answers", "bodies", 0, lambda: list(answers(clock.device, tiny))
    for batch, context, name in steps[:1]:
        yield "step", name, 0, lambda b=batch, c=context: step(clock, b, c)
    for shape, contexts in TINY_DECODES if tiny else DECODES:
        name = f"{NAMES[shape]}, batch {len(contexts)}, context " + " and ".join(map(str, dict.fromkeys(contexts)))
        yield "decode", name, needed(shape, contexts), lambda s=shape, c=contexts: decode(clock, s, c)
    for shape, rows, past in TINY_PREFILLS if tiny else PREFILLS:
        name = f"{NAMES[shape]}, {rows} rows after {past}"
        yield "prefill", name, 0, lambda s=shape, r=rows, p=past: prefill(clock, s, r, p)
    for batch, context, name in steps[1:]:
        yield "step", name, 0, lambda b=batch, c=context: step(clock, b, c)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="start no part after so long")
    parser.add_argument("--rehearse", action="store_true", help="tiny, in Triton's interpreter; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.gpu needs an NVIDIA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    if args.rehearse and not triton.knobs.runtime.interpret:
        parser.error("a rehearsal needs TRITON_INTERPRET=1")
    began = time.monotonic()
    clock = Clock(torch.device("cpu" if args.rehearse else "cuda"))
    yardsticks = {"copy_GB_per_s": clock.copy, "matmul_TFLOPs": clock.matmul}
    found: dict[str, Any] = {"machine": facts(), "yardsticks": yardsticks}
    left_out: list[str] = []
    failed = 0
    for section, name, size, call in parts(clock):
        if time.monotonic() - began > args.seconds:
            left_out.append(f"{section}: {name}: no time left")
            continue
        if size > clock.room() * 0.9:
            left_out.append(f"{section}: {name}: {size / 1e9:.0f} GB do not fit")
            continue
        try:
            told = call()
        except (torch.cuda.OutOfMemoryError, ImportError) as error:
            left_out.append(f"{section}: {name}: {str(error)[:200]}")
            continue
        except Exception as error:  # noqa: BLE001  the other parts go on
            failed += 1
            told = {"error": f"{type(error).__name__}: {error}"[:600]}
        finally:
            clock.tidy()
        found.setdefault(section, {})[name] = rounded(told)
        print(f"{time.monotonic() - began:5.0f} s  {section}: {name}: {json.dumps(rounded(told))}", flush=True)
        save(args, found | {"left_out": left_out, "seconds": round(time.monotonic() - began)})
    save(args, found | {"left_out": left_out, "seconds": round(time.monotonic() - began)})
    wrong = [each for each in found.get("answers", {}).get("bodies", []) if isinstance(each, dict) and each["wrong"]]
    return 1 if failed or wrong else 0


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """After each part: whatever ends this run, what was measured is kept."""
    if not args.rehearse:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rounded(found), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
