"""A real cluster of real processes, started by the command people use."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psutil

START_SECONDS = 180.0
END_SECONDS = 60.0


class Served(NamedTuple):
    """`infinillm serve`, its ready line, and where its standard error goes."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    errors: Any

    @property
    def url(self) -> str:
        return f"http://{self.ready['http']}"

    @property
    def children(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children())

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(END_SECONDS)

    def said(self) -> str:
        self.errors.seek(0)
        return str(self.errors.read())


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("INFINILLM")}


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "infinillm", *argv]


def cli(*argv: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*argv), capture_output=True, text=True, timeout=seconds, env=environment(), check=False
    )


@contextmanager
def serve(*argv: str) -> Iterator[Served]:
    """A cluster that is ready; killed at the end if it is still there."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command("serve", "--port=0", *argv), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        )
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], START_SECONDS)[0], "not ready in time"
            line = process.stdout.readline()
            errors.seek(0)
            assert line, errors.read()
            errors.seek(0, os.SEEK_END)
            yield Served(process, json.loads(line), errors)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
