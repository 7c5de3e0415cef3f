"""The GPU body without a GPU: its answers in Triton's interpreter, and that it compiles for the GPUs we mean."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the gpu extra is not installed")
HERE = Path(__file__).parent
AT_A_TIME = 2
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
COMMANDS: dict[str, tuple[list[str], dict[str, str]]] = {
    "80": (["tests.kernels.compile_triton", "80"], {"TRITON_INTERPRET": "0"}),
    "90": (["tests.kernels.compile_triton", "90"], {"TRITON_INTERPRET": "0"}),
    "answers": (["pytest", "-q", "-p", "no:cacheprovider", str(HERE / "in_interpreter.py")], INTERPRETED),
    "rehearsal": (["bench.gpu", "--rehearse"], INTERPRETED),
}
Ran = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ran]]]:
    """Each in a process of its own, for the interpreter is chosen when Triton is imported; two at a time."""
    folder = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def run(argv: list[str], environment: dict[str, str]) -> Ran:
        return subprocess.run(
            [sys.executable, "-m", *argv],
            cwd=HERE.parents[1],
            env={**os.environ, **folder, **environment},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {name: pool.submit(run, *command) for name, command in COMMANDS.items()}


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_spills(capability: int, ran: dict[str, Future[Ran]]) -> None:
    """For A100 (80) and H100 (90): no register spilled, no more shared memory than there is."""
    made = ran[str(capability)].result()
    if made.returncode == 3:
        pytest.skip(made.stdout.strip())
    assert made.returncode == 0, made.stderr
    found = [json.loads(line) for line in made.stdout.splitlines()]
    assert len(found) == 12
    assert all(each["REG"] for each in found)  # it was measured
    most = {80: 163, 90: 227}[capability] * 1024
    assert [each for each in found if each["STACK"] or each["LOCAL"] or each["shared"] > most] == []


def test_answers_in_the_interpreter(ran: dict[str, Future[Ran]]) -> None:
    made = ran["answers"].result()
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_benchmark_rehearses(ran: dict[str, Future[Ran]]) -> None:
    """bench/gpu.py runs through, in tiny sizes."""
    made = ran["rehearsal"].result()
    assert made.returncode == 0, made.stdout + made.stderr
