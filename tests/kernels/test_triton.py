"""The GPU body without a GPU: its answers in Triton's interpreter, and that it compiles for the GPUs we mean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the gpu extra is not installed")
HERE = Path(__file__).parent


def test_answers_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "in_interpreter.py")]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    """For A100 (80) and H100 (90): no register spilled, no more shared memory than there is."""
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(capability)]
    folder = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        command,
        cwd=HERE.parents[1],
        env={**os.environ, **folder},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if ran.returncode == 3:
        pytest.skip(ran.stdout.strip())
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == 12
    assert all(each["REG"] for each in found)  # it was measured
    most = {80: 163, 90: 227}[capability] * 1024
    assert [each for each in found if each["STACK"] or each["LOCAL"] or each["shared"] > most] == []


def test_the_benchmark_rehearses() -> None:
    """bench/gpu.py runs through, in tiny sizes."""
    root, command = HERE.parents[1], [sys.executable, "-m", "bench.gpu"]
    ran = subprocess.run(
        [*command, "--rehearse"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
