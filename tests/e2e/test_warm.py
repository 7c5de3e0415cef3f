"""Processes that are forked from a warm one are as those that people start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.processes import Process, until
from tests.e2e.warm import Warm

ENDED_SECONDS = 5.0


@pytest.fixture
def cold() -> Iterator[Warm]:
    """Nothing is imported in it, so that it is there at once."""
    made = Warm(None)
    yield made
    made.end()


@contextmanager
def controller(log: Path, warm: Warm | None, *flags: str) -> Iterator[Process]:
    made = Process("controller", "controller", "--port", "0", *flags, log=log / "controller.log", warm=warm)
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize("forked", [True, False])
def test_what_is_seen_from_outside(tmp_path: Path, cold: Warm, forked: bool) -> None:
    with controller(tmp_path, cold if forked else None) as process:
        process.ready()
        pid = process.popen.pid
        seen = psutil.Process(pid)
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert Path(seen.cwd()) == Path.cwd()
        assert {file.path for file in seen.open_files()} == {str(process.log)}
        process.signal(signal.SIGSTOP)
        until(lambda: seen.status() == psutil.STATUS_STOPPED, "it stands still", ENDED_SECONDS)
        process.signal(signal.SIGCONT)
        assert process.metrics()["controller_epoch"] > 0
        assert process.end() == 0
        assert not psutil.pid_exists(pid)
        assert [event["event"] for event in process.events] == ["leads", "stands_by"]


@pytest.mark.parametrize("forked", [True, False])
def test_how_it_ends_is_told(tmp_path: Path, cold: Warm, forked: bool) -> None:
    warm = cold if forked else None
    with controller(tmp_path, warm, "--no-such-flag") as refused:
        assert refused.wait() == 2
        assert "no-such-flag" in refused.last_words.splitlines()[-1]
    with controller(tmp_path, warm) as killed:
        killed.ready()
        killed.kill()
        assert killed.wait() == -signal.SIGKILL


def test_the_environment_is_that_of_the_moment(tmp_path: Path, cold: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFINILLM_CONTROLLER_POLICY", "no-such-policy")
    with controller(tmp_path, cold) as refused:
        assert refused.wait() == 2
        assert "no-such-policy" in refused.last_words


def test_none_outlives_the_process_it_was_forked_from(tmp_path: Path) -> None:
    warm = Warm(None)
    with controller(tmp_path, warm) as process:
        process.ready()
        assert psutil.Process(process.popen.pid) in psutil.Process().children(recursive=True)
        warm.end()
        assert process.wait(ENDED_SECONDS) == -signal.SIGKILL
