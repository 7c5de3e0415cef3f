"""Where a lease lies in tests: an API server that swaps like that of Kubernetes, and a real etcd of three members."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

SOON = 20.0
ETCDS = 3


class Api(ThreadingHTTPServer):
    """Leases of one namespace, over HTTP: create, get, merge-patch; a resourceVersion that does not stand conflicts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.leases: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.version = 0
        self.token = "first"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Call(BaseHTTPRequestHandler):
    """One request to the Api."""

    server: Api
    PATH = "/apis/coordination.k8s.io/v1/namespaces/here/leases"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        name = self.path.removeprefix(self.PATH).strip("/")
        with self.server.lock:
            if self.headers["Authorization"] != f"Bearer {self.server.token}":
                return self.answer(401, {"kind": "Status", "message": "Unauthorized"})
            found = self.server.leases.get(name)
            if self.command == "POST":
                name = said["metadata"]["name"]
                if name in self.server.leases:
                    return self.answer(409, {"kind": "Status", "reason": "AlreadyExists"})
                return self.answer(201, self.write(name, {}, said))
            if found is None:
                return self.answer(404, {"kind": "Status", "reason": "NotFound"})
            if self.command == "GET":
                return self.answer(200, found)
            assert self.headers["Content-Type"] == "application/merge-patch+json"
            if said["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
                return self.answer(409, {"kind": "Status", "reason": "Conflict"})
            return self.answer(200, self.write(name, found, said))

    do_POST = do_PATCH = do_GET  # noqa: N815 as the standard library calls them

    def write(self, name: str, old: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
        seconds = said["spec"]["leaseDurationSeconds"]
        assert isinstance(seconds, int), said
        assert seconds > 0, said
        self.server.version += 1
        new: dict[str, Any] = _merged(old, said)
        new["metadata"]["resourceVersion"] = str(self.server.version)
        self.server.leases[name] = new
        return new


def _merged(old: Any, said: Any) -> Any:
    """RFC 7396."""
    if not isinstance(said, dict):
        return said
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in said.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = _merged(new.get(key), value)
    return new


@contextmanager
def api() -> Iterator[Api]:
    server = Api()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(slots=True)
class Etcd:
    """Three members of one etcd."""

    endpoints: list[str]
    processes: list[subprocess.Popen[bytes]]

    def ask(self, endpoint: str, path: str) -> dict[str, Any]:
        return dict(httpx.post(f"http://{endpoint}/v3/{path}", json={}, timeout=1.0).json())

    def leader(self) -> int:
        """Which of those that answer leads; -1: none yet."""
        for at, endpoint in enumerate(self.endpoints):
            try:
                said = self.ask(endpoint, "maintenance/status")
            except httpx.HTTPError:
                continue
            if said.get("leader", "0") != "0" and said["leader"] == said["header"]["member_id"]:
                return at
        return -1


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def etcd(binary: str, folder: Path) -> Iterator[Etcd]:
    """Three members while the block runs; it begins when one of them leads."""
    ports = free_ports(2 * ETCDS)
    clients, peers = ([f"127.0.0.1:{port}" for port in some] for some in (ports[:ETCDS], ports[ETCDS:]))
    members = ",".join(f"m{at}=http://{peer}" for at, peer in enumerate(peers))
    made = Etcd(clients, [])
    try:
        for at in range(ETCDS):
            client, peer = f"http://{clients[at]}", f"http://{peers[at]}"
            argv = ["--name", f"m{at}", "--data-dir", str(folder / f"m{at}"), "--initial-cluster", members]
            argv += ["--listen-client-urls", client, "--advertise-client-urls", client]
            argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
            argv += ["--heartbeat-interval", "100", "--election-timeout", "600"]
            with (folder / f"m{at}.log").open("wb") as log:
                made.processes.append(
                    subprocess.Popen([binary, *argv], stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"})
                )
        deadline = time.monotonic() + SOON
        pause = threading.Event()
        while made.leader() < 0:
            assert time.monotonic() < deadline, (folder / "m0.log").read_text()[-2000:]
            pause.wait(0.05)
        yield made
    finally:
        for process in made.processes:
            process.kill()
            process.wait()
