"""What all tests share: one thread, fixed search settings, programs found or a reason given, no process left behind."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two cores, several processes
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import psutil
import pytest

hypothesis.settings.register_profile("project", deadline=None, print_blob=True)
hypothesis.settings.load_profile("project")


def program(name: str) -> str:
    """Where a program is, on the PATH or unpacked in the virtual environment; else the test skips, and in CI fails."""
    unpacked = Path(sys.prefix) / "tools" / "usr" / "bin" / name
    if found := shutil.which(name) or (str(unpacked) if unpacked.exists() else None):
        return found
    reason = f"{name} is not here; on Debian `make test` fetches it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_collection_finish() -> None:
    """What has been imported stays: looking through it for garbage stops a test for half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def promtool() -> str:
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> str:
    return program("prometheus")


@pytest.fixture(scope="session")
def etcd_server() -> str:
    return program("etcd")


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever the tests started has ended when they have."""
    yield
    children = psutil.Process().children(recursive=True)
    # What the standard library keeps for itself: multiprocessing's trackers end with us.
    left = [each for each in children if each.is_running() and "resource_tracker" not in " ".join(each.cmdline())]
    for each in left:
        each.kill()
    assert not left, f"processes left behind: {left}"
