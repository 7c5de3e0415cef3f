"""Compiles every shipped Triton configuration for GPUs that are not here; prints one JSON line for each."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infinillm.kernels import merge_triton, paged_triton

ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


def source(function, pointers: dict[str, str], integers: str, floats: str, constants: dict[str, object]) -> ASTSource:
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= {name: "i32" for name in integers.split() if name in function.arg_names} | dict.fromkeys(
        floats.split(), "fp32"
    )
    signature = {name: signature.get(name, "constexpr") for name in function.arg_names}
    # Tensors of torch lie at multiples of 16 bytes, and so do rows of heads and blocks.
    aligned = [i for i, name in enumerate(function.arg_names) if name in pointers or name.endswith("_stride")]
    return ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def attention(kind: str, dim: int, group: int, rows: int, size: int, windowed: bool, capped: bool):
    cut = paged_triton.tiling(rows, group, dim, ELEMENT[kind])
    pointers = dict.fromkeys("qkvo", kind) | dict.fromkeys(("lse", "o_part", "lse_part"), "fp32")
    pointers |= dict.fromkeys(("rows", "positions", "spans", "blocks", "firsts"), "i32")
    constants = {"KV_HEADS": 8, "GROUP": group, "DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "SIZE": size}
    constants |= {"BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "WINDOWED": windowed, "CAPPED": capped, "WIDE": False}
    integers = "q_stride k_stride v_stride head_stride window sequences chunk only tokens few"
    kernel = paged_triton.attend_few if rows == 1 else paged_triton.attend_many
    return source(kernel, pointers, integers, "scale soft_cap", constants), {
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }


def merging(kind: str, dim: int):
    pointers = dict.fromkeys(("o_a", "o_b", "o"), kind) | dict.fromkeys(("lse_a", "lse_b", "lse"), "fp32")
    constants = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "ROWS": merge_triton.rows_per_program(dim)}
    return source(merge_triton.merge_rows, pointers, "rows", "", constants), {}


def combining(kind: str, dim: int, few: int):
    pointers = {"o_part": "fp32", "lse_part": "fp32", "o": kind, "lse": "fp32", "rows": "i32", "spans": "i32"}
    constants = {"DIM": dim, "DIM_PAD": triton.next_power_of_2(dim), "FEW": few, "AT_ONCE": merge_triton.AT_ONCE}
    return source(merge_triton.combine_rows, pointers, "tokens sequences parts chunk", "", constants), {}


CONFIGURATIONS = {
    "decode 8B": attention("bf16", 128, 4, 1, 16, False, False),
    "prefill 8B": attention("bf16", 128, 4, 512, 16, False, False),
    "short chunk 8B": attention("bf16", 128, 4, 16, 16, False, False),
    "decode d64 fp16": attention("fp16", 64, 3, 1, 32, False, False),
    "prefill d64 fp16": attention("fp16", 64, 3, 512, 8, True, False),
    "decode d256 Gemma": attention("bf16", 256, 2, 1, 16, True, True),
    "prefill d256 Gemma": attention("bf16", 256, 2, 512, 64, True, True),
    "decode fp32": attention("fp32", 64, 3, 1, 16, False, False),
    "prefill fp32": attention("fp32", 64, 3, 512, 16, False, False),
    "merge": merging("bf16", 128),
    "combine few": combining("bf16", 128, 4),
    "combine many": combining("bf16", 256, 0),
}


def main() -> None:
    nvidia = triton.knobs.nvidia
    for capability in map(int, sys.argv[1:]):
        for name, (made, options) in CONFIGURATIONS.items():
            compiled = triton.compile(
                made, target=GPUTarget("cuda", capability, 32), options={**options, "enable_fp_fusion": True}
            )
            with tempfile.TemporaryDirectory() as folder:
                binary = Path(folder) / "kernel.cubin"
                binary.write_bytes(compiled.asm["cubin"])
                used = subprocess.run(
                    [nvidia.cuobjdump.path, "-res-usage", binary], capture_output=True, text=True, check=True
                ).stdout
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
            found = {"capability": capability, "name": name, "shared": compiled.metadata.shared, **numbers}
            print(json.dumps(found), flush=True)


def missing() -> str:
    """The program of NVIDIA's that this Triton does not bundle, if any."""
    for name in ("ptxas", "cuobjdump"):
        try:
            getattr(triton.knobs.nvidia, name)
        except RuntimeError:
            return name
    return ""


if __name__ == "__main__":
    if gone := missing():
        print(f"this Triton bundles no {gone}")
        sys.exit(3)
    main()
