"""One warm process that the tests' servers are forked from: what they all import is imported once.

Theory of operation. `python -m tests.e2e.warm` imports what servers import, reads one model's configuration, and then
has one thread, no gRPC object and one socket. For each message on it, with the ends of three pipes, it forks: the child
leads a session of its own, takes them as its standard output and error, and goes on as `python -m infinillm` would. The
third pipe tells whoever asked how the child ended. The warm process ends with the socket, and its children with it.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).parents[2]
MESSAGE, CODE = 1 << 18, struct.Struct("i")


class Child:
    """A forked process, with as much of `subprocess.Popen` as the tests ask for."""

    def __init__(self, pid: int, handle: int, stdout: BinaryIO, ended: BinaryIO):
        self.pid, self.stdout = pid, stdout
        self._handle, self._ended = handle, ended
        self._code: int | None = None

    def send_signal(self, number: int) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, seconds: float) -> int:
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._ended, selectors.EVENT_READ)
                if not selector.select(seconds):
                    raise subprocess.TimeoutExpired(str(self.pid), seconds)
            told = self._ended.read()  # nothing where the warm process is no more: then it was killed
            self._code = CODE.unpack(told)[0] if told else -signal.SIGKILL
            self._ended.close()
            os.close(self._handle)
        return self._code


class Warm:
    """The warm process, from the side of the tests; `model` is the folder of a model, None: nothing is imported."""

    def __init__(self, model: Path | None):
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket, self._asking = ours, threading.Lock()
        with its:
            argv = [sys.executable, "-m", "tests.e2e.warm", str(its.fileno()), *([str(model)] if model else [])]
            # Its standard output is a pipe, as theirs will be.
            self._process = subprocess.Popen(
                argv,
                cwd=ROOT,
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def start(self, argv: list[str], errors: BinaryIO) -> Child:
        """`python -m infinillm ARGV`, in our folder and with our environment."""
        (out, its_out), (ended, its_ended) = os.pipe(), os.pipe()
        try:
            message = json.dumps({"argv": argv, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
            with self._asking:
                socket.send_fds(self._socket, [message], [its_out, errors.fileno(), its_ended])
                said, (handle,), _, _ = socket.recv_fds(self._socket, MESSAGE, 1)
        finally:
            os.close(its_out)
            os.close(its_ended)
        return Child(int(said), handle, os.fdopen(out, "rb"), os.fdopen(ended, "rb"))

    def end(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.communicate()


def _serve(asked: socket.socket) -> list[str] | None:
    """Fork whatever is asked for. Returns its arguments in a child, and None here once nobody asks any more."""
    running: dict[int, tuple[int, int]] = {}
    with asked, selectors.DefaultSelector() as selector:
        selector.register(asked, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is asked:
                    message, fds, _, _ = socket.recv_fds(asked, MESSAGE, 3)
                    if not message:
                        return None
                    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in the child"
                    if not (pid := os.fork()):
                        for fd in (fd for pair in running.items() for fd in (pair[0], pair[1][1])):
                            os.close(fd)
                        return _become(json.loads(message), fds)
                    handle = os.pidfd_open(pid)
                    socket.send_fds(asked, [str(pid).encode()], [handle])
                    selector.register(handle, selectors.EVENT_READ)
                    running[handle] = (pid, fds[2])
                    for fd in fds[:2]:
                        os.close(fd)
                else:
                    selector.unregister(handle := key.fd)
                    pid, ended = running.pop(handle)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with suppress(BrokenPipeError):  # nobody wants to know
                        os.write(ended, CODE.pack(code))
                    os.close(ended)
                    os.close(handle)


def _become(said: dict[str, Any], fds: list[int]) -> list[str]:
    os.setsid()
    for fd, standard in zip(fds, (1, 2), strict=False):
        os.dup2(fd, standard)
    for fd in fds:
        os.close(fd)
    os.chdir(said["folder"])
    os.environ.clear()
    os.environ.update(said["environment"])
    return ["infinillm", *said["argv"]]


def _end(code: int) -> NoReturn:
    """As an interpreter ends, but without taking every module apart, which is most of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _warm(model: Path) -> None:
    """Import what servers import. Some of it is imported when a configuration is read."""
    from infinillm import __main__ as door

    door._prepare_environment()
    from infinillm.model import weights
    from infinillm.servers import controller, gateway, worker  # noqa: F401

    weights.read_config(model)


def _run(argv: list[str]) -> int:
    from infinillm import __main__ as door

    sys.argv = argv
    try:
        return door.main()
    except SystemExit as wrong:  # the command line
        return wrong.code if isinstance(wrong.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        _warm(Path(folder))
    if begun := _serve(socket.socket(fileno=int(sys.argv[1]))):
        _end(_run(begun))
