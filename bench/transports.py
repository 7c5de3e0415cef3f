"""Round trips between two processes over every port: how long one question and its answer take.

    python bench/transports.py [--seconds 0.6] [--out bench/results/transports.json]

Each row is one port. `idle` columns answer at once; `busy` is the answer of a peer that computes for 50 us first, less
those 50 us; `token` is 30 layers of 2 KB each way, as one decoded token of a 30-layer model costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from infinillm.errors import PortClosed
from infinillm.transport import Lanes, Port
from infinillm.transport.stream import options, plain

KINDS = ("shm", "tcp", "collective", "stream")
SIZES = {"2 KB": 2048, "64 KB": 65536, "1 MB": 1 << 20, "16 MB": 1 << 24}
PATIENCE = 20.0
WORK = 50e-6
LAYERS = 30


def lanes() -> Lanes:
    return Lanes(host="127.0.0.1", patience=PATIENCE, device=torch.device("cpu"), dial=plain(PATIENCE))


def question(size: int) -> list[torch.Tensor]:
    """q, k and v rows: three tensors of `size` bytes together."""
    k = size // 5
    return [torch.zeros(n, dtype=torch.uint8) for n in (size - 2 * k, k, k)]


def answer(size: int) -> list[torch.Tensor]:
    """o and lse: two tensors of `size` bytes together."""
    return [torch.zeros(n, dtype=torch.uint8) for n in (size - size // 64, size // 64)]


def node(pipe: Connection) -> None:
    """The far process: offers a port of each kind asked for, and answers over it until it is closed."""
    torch.set_num_threads(1)
    ours = lanes()
    loop = asyncio.new_event_loop()

    async def serve() -> grpc.aio.Server:
        server = grpc.aio.server(options=options(PATIENCE))
        server.add_generic_rpc_handlers((ours.service(),))
        ours.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server

    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(serve(), loop).result()
    while asked := pipe.recv():
        kind, size, work = asked
        listener = ours.listen(kind)
        pipe.send(listener.ticket)
        port = listener.accept(PATIENCE)
        heard, said = question(size), answer(size)
        try:
            while True:
                port.recv(heard)
                if work:
                    until = time.perf_counter() + work
                    while time.perf_counter() < until:
                        pass
                port.send(said)
        except PortClosed:
            pass
    asyncio.run_coroutine_threadsafe(server.stop(None), loop).result()
    loop.call_soon_threadsafe(loop.stop)


def trips(port: Port, size: int, seconds: float, rounds: int) -> list[float]:
    """Seconds of each group of `rounds` exchanges, for `seconds` after a short warm-up."""
    said, heard = question(size), answer(size)
    found: list[float] = []
    begin = time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds or len(found) < 8:
        for _ in range(rounds):
            port.send(said)
            port.recv(heard)
        found.append(time.perf_counter() - now)
    return found[len(found) // 10 :]


def figures(times: list[float], less: float = 0.0) -> dict[str, float]:
    """Median and 99th percentile in microseconds."""
    us = sorted((t - less) * 1e6 for t in times)
    return {"p50": round(statistics.median(us), 1), "p99": round(us[int(len(us) * 0.99)], 1), "count": len(us)}


def measure(pipe: Connection, seconds: float) -> dict[str, dict[str, Any]]:
    ours = lanes()
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    cases = [(name, size, 0.0, 1) for name, size in SIZES.items()]
    cases += [("2 KB busy", 2048, WORK, 1), ("64 KB busy", 65536, WORK, 1), ("token", 2048, 0.0, LAYERS)]
    for name, size, work, rounds in cases:
        for kind in KINDS:
            pipe.send((kind, size, work))
            port = ours.connect(pipe.recv())
            found[kind][name] = figures(trips(port, size, seconds, rounds), work * rounds)
            port.close()
    pipe.send(None)
    return found


def draw(found: dict[str, dict[str, Any]]) -> None:
    names = list(next(iter(found.values())))
    print("round trip in us, median / p99".ljust(34), *(name.rjust(17) for name in names), sep="")
    for kind, row in found.items():
        cells = (f"{row[name]['p50']:.0f} / {row[name]['p99']:.0f}".rjust(17) for name in names)
        print(kind.ljust(34), *cells, sep="")


def machine() -> dict[str, Any]:
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grpc": grpc.__version__,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=0.6, help="how long to measure each figure")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transports.json")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    near, far = multiprocessing.Pipe()
    peer = multiprocessing.get_context("spawn").Process(target=node, args=(far,))
    peer.start()
    facts = machine()
    found = measure(near, chosen.seconds)
    peer.join()
    draw(found)
    report = {"command": " ".join(["python", *sys.argv]), "machine": facts, "unit": "microseconds", "ports": found}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
