"""What a measurement ran on: the machine, the versions, and how much of it others used meanwhile."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
PACKAGES = ("torch", "transformers", "grpcio", "fastapi", "numpy")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(command: str, packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """All one needs to judge, or to repeat, a measurement."""
    return {
        "command": command,
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in rows.items()}
    flags = named.get("flags", named.get("Features", "")).split()
    model = named.get("model name", platform.machine())
    return f"{model} ({', '.join(x for x in FEATURES if x in flags)})"


def _commit() -> str:
    try:
        words = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@dataclass(slots=True)
class Quiet:
    """Sees to it that others leave the machine alone while something is measured.

    limit     cores others may use during a sample; one that was disturbed is taken again
    tries     how often in all; then the least disturbed counts
    patience  seconds to wait before a sample for others to be done
    """

    limit: float
    tries: int
    patience: float
    waited: float = field(default=0.0, init=False)

    async def take(self, sample: Callable[[int], Awaitable[T]]) -> tuple[T, float]:
        """`sample(attempt)` and how many cores others used meanwhile."""
        found: list[tuple[T, float]] = []
        for attempt in range(self.tries):
            await self._settle()
            before, began = _used(), time.monotonic()
            result = await sample(attempt)
            found.append((result, _others(before, _used(), time.monotonic() - began)))
            if found[-1][1] <= self.limit:
                break
        return min(found, key=lambda each: each[1])

    async def _settle(self) -> None:
        while self.waited < self.patience:
            before = _used()
            await asyncio.sleep(1.0)
            if _others(before, _used(), 1.0) <= self.limit:
                return
            self.waited += 1.0


def _used() -> tuple[float, float]:
    """Seconds of processor time used so far: by everybody, and by this process and its descendants."""
    times = psutil.cpu_times()
    everybody = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    own = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        own += spent.user + spent.system
    return everybody, own


def _others(before: tuple[float, float], after: tuple[float, float], seconds: float) -> float:
    everybody, own = (b - a for a, b in zip(before, after, strict=True))
    return round(max(0.0, everybody - own) / seconds, 2)
