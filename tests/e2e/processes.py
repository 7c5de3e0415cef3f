"""The processes of a cluster, started one by one as people start them, heard, killed and ended; none is left behind."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from infinillm import rpc
from infinillm.protos import controller_pb2, pool_pb2
from tests.e2e.warm import Child, Warm

CONTROLLER = controller_pb2.DESCRIPTOR.services_by_name["ControllerService"]
POOL = pool_pb2.DESCRIPTOR.services_by_name["PoolService"]
START_SECONDS, END_SECONDS, ANSWER_SECONDS = 90.0, 30.0, 10.0
LOOK_SECONDS = 0.02  # between two looks at something that changes by itself
SAMPLE = re.compile(r"^infinillm_(\w+?)(\{.*\})? (\S+)$", re.MULTILINE)


def until(seen: Callable[[], Any], what: str, seconds: float) -> Any:
    """What `seen` gives as soon as it is true; fails, saying what was waited for, after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (found := seen()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} seconds"
        pause.wait(LOOK_SECONDS)
    return found


class Process:
    """One `python -m infinillm ...`, its ready line, and its log in a file. It dies with the thread that made it.

    Where a `warm` process is given it is forked from that, and dies with that.
    """

    def __init__(self, name: str, *argv: str, log: Path, warm: Warm | None = None):
        self.name, self.log = name, log
        self.said: dict[str, Any] = {}
        self.popen: Child | subprocess.Popen[bytes]
        with log.open("ab") as out:
            if warm is not None:
                self.popen = warm.start([argv[0], "--dies-with", str(warm.pid), *argv[1:]], out)
            else:
                self.popen = subprocess.Popen(
                    [sys.executable, "-m", "infinillm", argv[0], "--dies-with", str(os.getpid()), *argv[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    start_new_session=True,
                )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as out:
            for line in out:
                self._lines.put(line.decode())
        self._lines.put(None)

    def ready(self, seconds: float = START_SECONDS) -> dict[str, Any]:
        """What the process said when it was ready."""
        while not self.said:
            line = self._lines.get(timeout=seconds)
            assert line is not None, f"{self.name} ended before it was ready: {self.last_words}"
            if line.startswith("{") and "ready" in (said := json.loads(line)):
                self.said = said
        return self.said

    @property
    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was logged, one JSON object a line."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def wait(self, seconds: float = END_SECONDS) -> int:
        code = self.popen.wait(seconds)
        self._reader.join(seconds)
        return code

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, whatever state it is in."""
        self.popen.kill()
        self.wait()

    def metrics(self) -> dict[str, float]:
        """The process's own samples, as they stand: `name{labels}` without the prefix."""
        address = self.said.get("metrics") or self.said["http"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=ANSWER_SECONDS) as reply:
            text = reply.read().decode()
        return {name + labels: float(value) for name, labels, value in SAMPLE.findall(text)}


class Cluster:
    """A controller, workers by name and a gateway, on loopback and ports of their own choice. Ends by `end`."""

    warm: ClassVar[Warm | None] = None  # what all processes are forked from; None: each starts as people start it

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        blocks: int,
        flags: dict[str, tuple[str, ...]] | None = None,
        of_worker: Callable[[str], tuple[str, ...]] = lambda name: (),
    ):
        """`flags` are more flags for "controller", "worker" and "gateway"; `of_worker` gives those of one, by name."""
        self.folder, self.model, self.blocks = folder, model, blocks
        self.flags, self.of_worker = flags or {}, of_worker
        self.workers: dict[str, Process] = {}
        self.started: list[Process] = []

    def start(self, workers: int) -> None:
        """A controller, a gateway, and worker-0 and so on."""
        self.start_controllers()
        self.gateway = self._start("gateway", "gateway", "--port", "0", "--controller", self.address, *self._model)
        for index in range(workers):
            self.add_worker(f"worker-{index}")
        self.ready()

    def start_controllers(self) -> None:
        self.controller = self._start("controller", "controller", "--port", "0")
        self.address = self.controller.ready()["address"]

    @property
    def keepers(self) -> list[Process]:
        """Who keeps the ledger."""
        return [self.controller]

    @property
    def _model(self) -> tuple[str, ...]:
        return (self.model,) if self.model else ()

    def _start(self, name: str, command: str, *argv: str) -> Process:
        more = self.flags.get(command, ())
        log = self.folder / f"{name}.log"
        self.started.append(Process(name, command, *argv, *more, log=log, warm=self.warm))
        return self.started[-1]

    def add_worker(self, name: str) -> Process:
        """Start a worker; it is not waited for."""
        at = ("--controller", self.address, "--id", name, "--kv-blocks", str(self.blocks))
        self.workers[name] = self._start(name, "worker", *at, *self.of_worker(name), *self._model)
        return self.workers[name]

    def ready(self) -> None:
        """Every process has said so, and the gateway knows of every worker."""
        for process in self.processes:
            process.ready()
        until(lambda: len(self.ledger().nodes) == len(self.workers), "every worker in the ledger", 10)
        said = self.ledger()
        most = min(said.max_tokens, said.model.max_position)
        until(lambda: self.get("/v1/models")["data"][0]["max_model_len"] == most, "the gateway knows it", 10)

    @property
    def processes(self) -> list[Process]:
        return [self.gateway, *self.workers.values(), *self.keepers]

    @property
    def url(self) -> str:
        return f"http://{self.gateway.said['http']}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as reply:
            return json.load(reply)

    def placement(self, request: str) -> dict[str, Any]:
        """Where the only sequence of a request is."""
        (sequence,) = self.get(f"/v1/requests/{request}/placement")["data"]
        found: dict[str, Any] = sequence
        return found

    def start_controller_again(self) -> Process:
        """Where it was; the old one must be dead. The new one is not waited for."""
        self.controller = self._start("controller", "controller", "--port", self.address.rpartition(":")[2])
        return self.controller

    def start_worker_again(self, name: str) -> None:
        """Under its old name; returns when it is in the ledger."""
        said = self.add_worker(name).ready()
        until(lambda: said["address"] in {node.address for node in self.ledger().nodes}, f"{name} in the ledger", 10)

    # --- the books -----------------------------------------------------------------------------------------------

    def ledger(self) -> controller_pb2.SnapshotResponse:
        with rpc.blocking_channel(self.address) as channel:
            return rpc.BlockingClient(channel, CONTROLLER).Snapshot(
                controller_pb2.SnapshotRequest(), timeout=ANSWER_SECONDS
            )

    def books(self, name: str) -> pool_pb2.DescribeResponse:
        """What one node says of itself, now."""
        with rpc.blocking_channel(self.workers[name].said["address"]) as channel:
            return rpc.BlockingClient(channel, POOL).Describe(pool_pb2.DescribeRequest(), timeout=ANSWER_SECONDS)

    def total(self, name: str) -> float:
        """One sample summed over all workers and all its labels."""
        told = [worker.metrics() for worker in self.workers.values()]
        return sum(value for samples in told for key, value in samples.items() if key.partition("{")[0] == name)

    def leaks(self) -> str:
        """What is not as it should be once nothing runs; empty where every block is free again and all books agree."""
        ledger = self.ledger()
        nodes = {node.id: node for node in ledger.nodes}
        if set(nodes) != set(self.workers) or ledger.loans or ledger.layouts:
            return f"the ledger has nodes {sorted(nodes)}, loans {list(ledger.loans)}, layouts {list(ledger.layouts)}"
        for name, worker in self.workers.items():
            said = self.books(name)
            if said.node != nodes[name] or said.loans:
                return f"{name} says {said.node} and {list(said.loans)}; the ledger {nodes[name]}"
            held = (said.node.used, said.node.lent, said.node.borrowed, said.node.running, said.node.waiting)
            if any(held) or said.node.cached > said.node.blocks:
                return f"{name} still has {said.node}"
            samples = worker.metrics()
            for state in ("used", "lent", "borrowed"):
                if samples[f'kv_blocks{{node="{name}",state="{state}"}}']:
                    return f"/metrics of {name} still has blocks {state}"
            free, cached = (samples[f'kv_blocks{{node="{name}",state="{state}"}}'] for state in ("free", "cached"))
            if free + cached != samples[f'kv_blocks_capacity{{node="{name}"}}'] or any(
                value for key, value in samples.items() if key.startswith("loans{")
            ):
                return f"/metrics of {name}: {free} free, {cached} cached, or loans left"
        return ""

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until nothing is left of what ran."""
        last = ""

        def clean() -> bool:
            nonlocal last
            last = self.leaks()
            return not last

        try:
            until(clean, "every block free again", seconds)
        except AssertionError as late:
            raise AssertionError(f"{late}; {last}") from None

    # --- the end -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """SIGTERM to who asks before who is asked; each must end with 0, and none stay."""
        codes = {}
        for those in ([self.gateway], list(self.workers.values()), self.keepers):
            for process in those:
                process.signal(signal.SIGTERM)
            codes |= {process.name: process.wait() for process in those}
        assert codes == dict.fromkeys(codes, 0), [p.last_words for p in self.processes if codes[p.name]]

    def kill(self) -> None:
        for process in self.started:
            process.kill()


@contextmanager
def cluster(
    folder: Path,
    model: str,
    *,
    blocks: int,
    workers: int = 3,
    flags: dict[str, tuple[str, ...]] | None = None,
    of_worker: Callable[[str], tuple[str, ...]] = lambda name: (),
) -> Iterator[Cluster]:
    """A cluster while the block runs; nothing of it is left afterwards, whatever happens."""
    made = Cluster(folder, model, blocks=blocks, flags=flags, of_worker=of_worker)
    try:
        made.start(workers)
        yield made
        made.end()
    finally:
        made.kill()
