"""A process that forks peers for the tests of ports: one for every line on its standard input.

`asker ACT TICKET` takes up an offer, `node ACT KIND` makes one; the reply is the new process's id, and a node's ticket.
ACT is `hold` (wait for bytes that never come), `echo` (give back 16 bytes for 16 bytes) or `say` (send 16, then hold).
"""

from __future__ import annotations

import os
import signal
import sys

import torch

from infinillm.errors import PortClosed
from infinillm.transport import Port
from tests.transport.ends import serving

PATIENCE = 20.0


def act(what: str, port: Port) -> None:
    tensor = torch.zeros(4)
    if what == "say":
        port.send([tensor])
    while True:
        port.recv([tensor])
        if what == "echo":
            port.send([tensor])


def run(role: str, what: str, argument: str) -> None:
    with serving(PATIENCE) as lanes:
        if role == "asker":
            print(os.getpid(), flush=True)
            port = lanes.connect(bytes.fromhex(argument))
        else:
            listener = lanes.listen(argument)
            print(os.getpid(), listener.ticket.hex(), flush=True)
            port = listener.accept(10.0)
        act(what, port)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    torch.set_num_threads(1)
    for line in sys.stdin:
        role, what, argument = line.split()
        if os.fork():
            continue
        try:
            run(role, what, argument)
        except PortClosed:
            os._exit(0)
        os._exit(1)


if __name__ == "__main__":
    main()
