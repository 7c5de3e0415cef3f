"""Peers in other processes, that the tests of ports can kill or stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from infinillm.transport import Lanes, Port

ROOT = Path(__file__).parents[2]


class Far(NamedTuple):
    """A port whose other end lives in the process `pid`."""

    port: Port
    pid: int


class Zygote:
    """A process that forks peers, so that torch is imported once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transport.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin
        assert self.process.stdout
        self.said, self.heard = self.process.stdin, self.process.stdout

    def ask(self, *words: str) -> list[str]:
        print(*words, file=self.said, flush=True)
        return self.heard.readline().split()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    one = Zygote()
    yield one
    one.said.close()
    one.process.wait(10)
    one.heard.close()


@pytest.fixture
def far(zygote: Zygote) -> Iterator[Callable[[Lanes, str, str, str], Far]]:
    """far(lanes, kind, role, act): a port to a new process that is its asker or its node."""
    born: list[int] = []
    ports: list[Port] = []

    def make(lanes: Lanes, kind: str, role: str, act: str) -> Far:
        if role == "asker":
            listener = lanes.listen(kind)
            pid, *_ = zygote.ask("asker", act, listener.ticket.hex())
            born.append(int(pid))
            ports.append(listener.accept(10.0))
        else:
            pid, ticket = zygote.ask("node", act, kind)
            born.append(int(pid))
            ports.append(lanes.connect(bytes.fromhex(ticket)))
        return Far(ports[-1], born[-1])

    yield make
    for port in ports:
        port.close()
    for pid in born:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
