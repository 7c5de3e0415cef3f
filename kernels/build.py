"""Compiling the C++ of kernels/cpu once per machine, and loading it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "cpu"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
QUIET = ("-fPIC", "-w")
COMPILERS = ("g++", "c++", "clang++")
PATIENCE = 300.0  # seconds a compiler may take


def build(cache: Path | None) -> ctypes.CDLL | None:
    """The library, from `cache` or compiled into it; None where there is no compiler that can do it.

    Its name is a hash of all that went into it, and it appears by one rename: processes may start at once.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    sources = sorted(FOLDER.glob("*.cpp"))
    openmp = _openmp_in_use()
    recipe = [compiler, *FLAGS, *QUIET, str(openmp), _processor()]
    recipe += [path.read_text() for path in (*sources, *sorted(FOLDER.glob("*.h")))]
    name = f"body-{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:16]}.so"
    spare = Path(tempfile.gettempdir()) / f"infinillm-{os.getuid()}"
    for folder in (cache or Path.home() / ".cache" / "infinillm", spare):
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                continue
            if not path.exists():
                _compile(compiler, sources, openmp, path)
            return ctypes.CDLL(str(path))
        except OSError:
            continue  # not writable, or mounted without leave to execute
        except subprocess.SubprocessError:
            return None
    return None


def _compile(compiler: str, sources: list[Path], openmp: Path | None, path: Path) -> None:
    parallel = ["-fopenmp"] if openmp else []
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *FLAGS, *QUIET, *parallel, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        running = [
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
        ]
        codes = [process.wait(PATIENCE) for process in running]
        if any(codes):
            raise subprocess.SubprocessError(f"{compiler} failed")
        made = Path(scratch) / path.name
        link = [compiler, "-shared", "-o", str(made), *objects, *([str(openmp)] if openmp else [])]
        subprocess.run(link, check=True, capture_output=True, timeout=PATIENCE)
        os.replace(made, path)


def _openmp_in_use() -> Path | None:
    """The OpenMP library torch runs on: two of them would spin against each other for the same cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps)
    return Path(found.group()) if found else None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept))
