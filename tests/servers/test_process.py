"""The end of a server process, as whoever started it sees it."""

from __future__ import annotations

import subprocess
import sys

LATE = """
import asyncio, os, signal
from infinillm.servers.process import Told, to_its_end

async def server():
    told = Told()
    os.kill(os.getpid(), signal.SIGTERM)
    await told.once.wait()

asyncio.run(to_its_end(server()))
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
print("over")
"""


def test_who_is_told_again_when_he_has_ended_ends_as_before() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr
