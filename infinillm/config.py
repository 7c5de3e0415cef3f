"""The settings of every process, one frozen dataclass each; a field is one line with its unit and its only default."""

from __future__ import annotations

import importlib
import json
import os
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from infinillm import options
from infinillm.core import policy as policies
from infinillm.core.cost import Cost, from_plain
from infinillm.core.policy import Policy, own
from infinillm.errors import BadRequest
from infinillm.options import arguments, check, explain, option, parser, sources

__all__ = ["PROCESSES", "arguments", "cost", "explain", "load", "parser", "policy"]

POLICIES = ("pooled", "proactive", "isolated")
OWN = {"FILE.py": r".+\.py", "MODULE:NAME": r"[\w.]+:\w+"}  # a policy of one's own
DTYPES = ("auto", "float32", "bfloat16", "float16")
PORTS = ("auto", "shm", "tcp", "stream", "collective")
DEVICES = ("auto", "cpu", "cuda")
TIERS = ("device", "host")
LEVELS = ("debug", "info", "warning", "error")
MIB = 1 << 20


# What several processes are told in the same words.
_HOST = "address to bind; loopback unless you say otherwise"
_METRICS = "port of /metrics, on --host; 0 takes a free one, -1 serves none"
_CONTROLLER = "HOST:PORT of the controller; of several, one of which leads, with commas between"
_LEASE = (
    "where several controllers agree on which one leads: file:/PATH, etcd://HOST:PORT,HOST:PORT/KEY or "
    "kubernetes:NAMESPACE/NAME; empty: there is only this one"
)
_MODEL = "a Hugging Face folder or hub id, or a GGUF file; empty: the small embedded default model"
_LONGEST = "most tokens of one request, prompt and output; 0: what the model was made for"
_CACHE = "folder for converted models and compiled kernels; empty: ~/.cache/infinillm"
_LEVEL = "least level of the events logged to stderr"
_NAME = "the name clients call the model by; empty: derived from MODEL"
_PATIENCE = "seconds of silence in the middle of an exchange after which a peer is lost"
_DRAIN = "seconds a worker told to end has for that; in the last quarter it hands over what still runs"
_POLICY = (
    "pooled: workers lend each other memory; proactive: ahead of time, too; isolated: none does; or one of your own"
)
_PROFILE = "FILE that `infinillm profile` wrote: what {} costs; policy proactive goes by it"
_LOG = "FILE.jsonl to which lengths and times of requests are added, for `infinillm simulate --trace`; empty: none"
_SLO = (
    "bounds in seconds: of ttft, tpot, latency, per-token or per-input, such as ttft=2,tpot=0.1; mean-...: in the mean"
)
_URL = "where the gateway answers"
_BLOCKS = "K/V blocks each worker owns; 0: as many as --kv-memory-gib holds"
_MEMORY = "GiB of K/V memory each worker owns, when --kv-blocks is 0; 0: none, it borrows all it needs"
_MOVES = "most tokens of K/V that move to another node beside one step, in whole blocks; 0: none"
_BLOCK = "tokens per block; the same in a whole cluster"
_DTYPE = "of weights and K/V; auto: the model's own"
_THREADS = "CPU threads of each worker; more than its share of the cores makes it slower, not faster"
_SHARED_THREADS = "CPU threads of each worker; 0: the machine's cores, divided among the workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """The process that keeps the ledger: who owns, lends and borrows blocks."""

    host: str = option("127.0.0.1", _HOST)
    port: int = option(7000, "port of gRPC; 0 takes a free one", least=0, most=65535)
    metrics_port: int = option(0, _METRICS, least=-1, most=65535)
    policy: str = option("pooled", _POLICY, choices=POLICIES, besides=OWN)
    heartbeat_seconds: float = option(0.5, "seconds between two heartbeats of a worker", least=0.01, most=60)
    profile: str = option("", _PROFILE.format("a worker that brings no profile of its own"))
    lease: str = option("", _LEASE)
    lease_seconds: float = option(5.0, "seconds after which a leader that is gone is replaced", least=0.1, most=3600)
    log_level: str = option("info", _LEVEL, choices=LEVELS)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A process that owns K/V memory and, unless it is memory only, serves the model."""

    model: str = option("", _MODEL, positional=True)
    id: str = option("", "name of this worker in the cluster; empty: the host's name and a random word")
    host: str = option("127.0.0.1", _HOST)
    port: int = option(0, "port of gRPC; 0 takes a free one", least=0, most=65535)
    advertise: str = option("", "HOST:PORT at which others dial this worker; empty: --host and its port")
    controller: str = option("", _CONTROLLER, also=("--join",))
    kv_blocks: int = option(0, _BLOCKS, least=0, most=2**31 - 1)
    kv_memory_gib: float = option(1.0, _MEMORY, least=0, most=65536)
    block_size: int = option(16, _BLOCK, least=1, most=1024)
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    max_model_len: int = option(0, _LONGEST, least=0, most=2**31 - 1)
    max_num_batched_tokens: int = option(512, "most tokens computed in one step", least=1, most=2**20)
    max_num_seqs: int = option(64, "most requests computed in one step", least=1, most=65536)
    move_tokens_per_step: int = option(16, _MOVES, least=0, most=65536)
    max_waiting: int = option(1024, "most requests that wait for their first step", least=1, most=2**20)
    lend_fraction: float = option(0.9, "most of its blocks a worker lends, as a share", least=0, most=1)
    loan_seconds: float = option(45.0, "seconds until a loan lapses unless it is renewed", least=0.1, most=3600)
    port_kind: str = option("auto", "how tensors travel; auto: shm on one host, else tcp", choices=PORTS)
    patience_seconds: float = option(15.0, _PATIENCE, least=0.01, most=3600)
    threads: int = option(1, _THREADS, least=1, most=1024)
    device: str = option("auto", "where the model runs; auto: cuda if there is one", choices=DEVICES)
    profile: str = option("", _PROFILE.format("this worker"))
    memory_only: bool = option(False, "own and lend memory, serve no model")
    tier: str = option("device", "of its memory; host: of the CPU, lent last, with --memory-only", choices=TIERS)
    drain_seconds: float = option(20.0, _DRAIN, least=0, most=86400)
    metrics_port: int = option(0, _METRICS, least=-1, most=65535)
    cache_dir: str = option("", _CACHE)
    log_level: str = option("info", _LEVEL, choices=LEVELS)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The process clients talk to: OpenAI's HTTP API and gRPC."""

    model: str = option("", _MODEL, positional=True)
    host: str = option("127.0.0.1", _HOST)
    port: int = option(8000, "port of HTTP, /metrics included; 0 takes a free one", least=0, most=65535)
    grpc_port: int = option(0, "port of gRPC; 0 takes a free one", least=0, most=65535)
    controller: str = option("", _CONTROLLER)
    served_model_name: str = option("", _NAME)
    max_model_len: int = option(0, _LONGEST, least=0, most=2**31 - 1)
    max_body_bytes: int = option(16 * MIB, "most bytes of one HTTP body", least=1024, most=1 << 31)
    request_log: str = option("", _LOG)
    cache_dir: str = option("", _CACHE)
    log_level: str = option("info", _LEVEL, choices=LEVELS)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Convert a model and compile the CPU kernels ahead of time, so that workers start in seconds."""

    model: str = option("", _MODEL, positional=True)
    cache_dir: str = option("", _CACHE)
    log_level: str = option("info", _LEVEL, choices=LEVELS)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """A whole cluster on this machine: a controller, a gateway and some workers."""

    model: str = option("", _MODEL, positional=True)
    host: str = option("127.0.0.1", "address the gateway binds; the rest stays on loopback")
    port: int = option(8000, "port of HTTP; 0 takes a free one", least=0, most=65535)
    grpc_port: int = option(0, "port of the gateway's gRPC; 0 takes a free one", least=0, most=65535)
    workers: int = option(3, "how many worker processes", least=1, most=1024)
    kv_blocks: int = option(0, _BLOCKS, least=0, most=2**31 - 1)
    kv_memory_gib: float = option(1.0, _MEMORY, least=0, most=65536)
    block_size: int = option(16, _BLOCK, least=1, most=1024)
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    max_model_len: int = option(0, _LONGEST, least=0, most=2**31 - 1)
    served_model_name: str = option("", _NAME)
    policy: str = option("pooled", _POLICY, choices=POLICIES, besides=OWN)
    host_kv_gib: float = option(0.0, "GiB of host memory lent to the workers when they are full", least=0, most=65536)
    profile: str = option("", _PROFILE.format("each worker"))
    threads: int = option(0, _SHARED_THREADS, least=0, most=1024)
    port_kind: str = option("auto", "how tensors travel between workers; auto: shm", choices=PORTS)
    patience_seconds: float = option(15.0, _PATIENCE, least=0.01, most=3600)
    request_log: str = option("", _LOG)
    metrics_port: int = option(
        0, "/metrics of the controller, then of each worker one higher; 0: free ones", least=0, most=64000
    )
    cache_dir: str = option("", _CACHE)
    log_level: str = option("info", _LEVEL, choices=LEVELS)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)

    def controller(self) -> Controller:
        return Controller(
            port=0,
            policy=self.policy,
            profile=self.profile,
            metrics_port=self.metrics_port,
            log_level=self.log_level,
        )

    def worker(self, index: int, controller: str) -> Worker:
        return Worker(
            model=self.model,
            id=f"worker-{index}",
            controller=controller,
            kv_blocks=self.kv_blocks,
            kv_memory_gib=self.kv_memory_gib,
            block_size=self.block_size,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            port_kind=self.port_kind,
            patience_seconds=self.patience_seconds,
            threads=self.threads or max(1, _cores() // self.workers),
            metrics_port=self.metrics_port + 1 + index if self.metrics_port else 0,
            cache_dir=self.cache_dir,
            log_level=self.log_level,
        )

    def host_memory(self, controller: str) -> Worker:
        return replace(
            self.worker(self.workers, controller),
            id="host",
            memory_only=True,
            tier="host",
            device="cpu",
            kv_blocks=0,
            kv_memory_gib=self.host_kv_gib,
        )

    def prepare(self) -> Prepare:
        return Prepare(model=self.model, cache_dir=self.cache_dir, log_level=self.log_level)

    def gateway(self, controller: str) -> Gateway:
        return Gateway(
            model=self.model,
            host=self.host,
            port=self.port,
            grpc_port=self.grpc_port,
            controller=controller,
            served_model_name=self.served_model_name,
            max_model_len=self.max_model_len,
            request_log=self.request_log,
            cache_dir=self.cache_dir,
            log_level=self.log_level,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Talk to a model in the terminal."""

    url: str = option("http://127.0.0.1:8000", _URL)
    once: str = option("", "ask this one question, print the answer and end")
    system: str = option("", "the system message")
    model: str = option("", "name of the model; empty: the one being served")
    max_tokens: int = option(512, "most tokens of one answer", least=1, most=2**20)
    temperature: float = option(0.0, "0 always takes the likeliest token", least=0, most=100)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The pool, live in the terminal: whose blocks are used, cached, lent and borrowed."""

    url: str = option("http://127.0.0.1:8000", _URL)
    once: bool = option(False, "print it once and end")
    json: bool = option(False, "print a line of JSON for every look, with what happened since the one before")
    seconds: float = option(0.5, "seconds between two looks", least=0.05, most=3600)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A document that fits no worker, answered by workers that lend each other memory."""

    model: str = option("", _MODEL, positional=True)
    workers: int = option(3, "how many worker processes", least=2, most=64)
    threads: int = option(0, _SHARED_THREADS, least=0, most=1024)
    dtype: str = option("float32", _DTYPE, choices=DTYPES)
    document: str = option("", "a text file to ask about; empty: a logbook that comes with the demo")
    question: str = option("", "what to ask; empty: what comes with the logbook")
    max_tokens: int = option(64, "most tokens of the answer", least=1, most=4096)
    cache_dir: str = option("", _CACHE)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Measure what a step, a question and a move of K/V cost on this machine, for policy proactive."""

    model: str = option("", _MODEL, positional=True)
    out: str = option("profile.json", "FILE to write; empty: print it")
    seconds: float = option(40.0, "seconds to measure for, beside loading and one prompt", least=0, most=3600)
    lender: str = option("", "HOST:PORT of a worker to ask; empty: one of our own, on this machine")
    block_size: int = option(16, _BLOCK, least=1, most=1024)
    dtype: str = option("auto", _DTYPE, choices=DTYPES)
    threads: int = option(1, _THREADS, least=1, most=1024)
    device: str = option("auto", "where the model runs; auto: cuda if there is one", choices=DEVICES)
    cache_dir: str = option("", _CACHE)
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulate:
    """What a cluster that need not exist would do under some traffic, by policy."""

    trace: str = option("sharegpt", "a workload by name (sharegpt, t0 to t8, ...) or a .csv or .jsonl FILE")
    cluster: str = option("1x8xA100", "SERVERSxDEVICESxKIND, such as 4x8xH100 or 4x8xA100:tp8, or a .json FILE")
    model: str = option("Llama-2-7B", "a model by name, or the config.json of a Hugging Face folder")
    policy: str = option(
        "isolated,pooled,proactive", "one or several, with commas between; FILE.py or MODULE:NAME: your own"
    )
    rate: float = option(20.0, "requests a second; of a file, 0 keeps the times in it", least=0, most=1e6)
    requests: int = option(2000, "how many arrive", least=1, most=10**9)
    seconds: float = option(
        0.0, "seconds of the cluster to simulate at most; 0: until all is answered", least=0, most=1e9
    )
    seed: int = option(0, "of arrivals and lengths; equal seeds give equal histories", least=0, most=2**63 - 1)
    dtype: str = option("bfloat16", "of weights and K/V", choices=DTYPES[1:])
    block_size: int = option(16, "tokens per block", least=1, most=1024)
    max_num_batched_tokens: int = option(2048, "most tokens computed in one step", least=1, most=2**20)
    max_num_seqs: int = option(512, "most requests computed in one step", least=1, most=65536)
    move_tokens_per_step: int = option(16, _MOVES, least=0, most=65536)
    lend_fraction: float = option(0.9, "most of its blocks a worker lends, as a share", least=0, most=1)
    heartbeat_seconds: float = option(0.5, "seconds between two heartbeats of a worker", least=0.01, most=60)
    losses: str = option("", "who is gone from when to when, in seconds, such as n3@60-120,n5@90")
    slo: str = option("", _SLO)
    slo_share: float = option(0.9, "of the requests, that must keep the bounds of each", least=0, most=1)
    find_capacity: bool = option(False, "search for the highest rate at which --slo is kept, from --rate on")
    report: str = option("", "FILE.html: a page with figures of the run")
    json: bool = option(False, "print a line of JSON for each policy")
    sources: Mapping[str, str] = sources()

    def __post_init__(self) -> None:
        check(self)


PROCESSES: dict[str, type[Any]] = {
    each.__name__.lower(): each
    for each in (Controller, Worker, Gateway, Serve, Prepare, Profile, Simulate, Chat, Top, Demo)
}
Config = TypeVar("Config", Controller, Worker, Gateway, Serve, Prepare, Profile, Simulate, Chat, Top, Demo)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cost(file: str) -> Cost | None:
    """The costs in a --profile FILE, none where there is no file. Raises BadRequest."""
    if not file:
        return None
    try:
        return from_plain(json.loads(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BadRequest(f"profile {file}: {error}", field="profile") from None


def policy(text: str) -> Policy:
    """A policy by name, or somebody's own: FILE.py with its functions, or MODULE:NAME of a `Policy` to import.

    That runs their code, which may do all that this process may. Raises BadRequest.
    """
    file, (module, colon, name) = text.endswith(".py"), text.partition(":")
    if not (file or colon):
        return policies.named(text)
    if file and not Path(text).is_file():
        raise BadRequest(f"policy {text}: there is no such file", field="policy")
    stem = Path(text).stem
    try:
        found: Any = (
            runpy.run_path(text, run_name=f"policy_{stem}") if file else getattr(importlib.import_module(module), name)
        )
    except Exception as error:
        raise BadRequest(f"policy {text}: {own.said(error)}", field="policy") from error
    if not (file or isinstance(found, Policy)):
        raise BadRequest(f"policy {text} must be a Policy, not {found!r:.40}", field="policy")
    return own.made(stem, found) if file else found


def load(
    cls: type[Config], argv: Sequence[str], environ: Mapping[str, str], file: str | Path | None = None, **words: str
) -> Config:
    """One process's settings: file < environment < flags, each value's source remembered. Raises BadRequest.

    `words` are what --help says: prog, description, examples.
    """
    return options.load(cls, PROCESSES, argv, environ, file, **words)
