"""A cluster with two controllers, one of which leads by a lease in the cluster's folder."""

from __future__ import annotations

import random
import signal
import socket
from contextlib import suppress

from infinillm import rpc
from infinillm.errors import Unavailable
from infinillm.protos import controller_pb2 as pb
from tests.e2e.processes import ANSWER_SECONDS, CONTROLLER, Cluster, Process, until

LEASE_SECONDS = 2.0
SOON = 3 * LEASE_SECONDS  # for another one to lead: the lease, a look, and a busy machine
NAMES = ("one", "two")
OWN_PORTS = range(20_000, 30_000)  # nobody is given one of these who does not ask for it


def free_port() -> int:
    """A port to start, and start again, something at."""
    while True:
        port = random.choice(OWN_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Pair(Cluster):
    """See `Cluster`; everybody is told of both controllers."""

    def start_controllers(self) -> None:
        self.lease = ("--lease", f"file:{self.folder}/lease", "--lease-seconds", str(LEASE_SECONDS))
        self.controllers: dict[str, Process] = {}
        self.ports: dict[str, str] = {}
        for name in NAMES:  # one after the other: the first one leads first
            self.ports[name] = str(free_port())
            self.start_controller(name).ready()
        self.address = ",".join(each.said["address"] for each in self.keepers)

    def start_controller(self, name: str) -> Process:
        """Where it was, if it was; the old one must be dead. The new one is not waited for."""
        at = ("--port", self.ports[name], *self.lease)
        self.controllers[name] = self._start(f"controller-{name}", "controller", *at)
        return self.controllers[name]

    @property
    def keepers(self) -> list[Process]:
        return list(self.controllers.values())

    def asked(self, name: str) -> pb.SnapshotResponse:
        """The ledger of one of the two. Raises Unavailable where it does not lead, or is not there."""
        with rpc.blocking_channel(f"127.0.0.1:{self.ports[name]}") as channel:
            found: pb.SnapshotResponse = rpc.BlockingClient(channel, CONTROLLER).Snapshot(
                pb.SnapshotRequest(), timeout=ANSWER_SECONDS
            )
            return found

    def leading(self, *among: str) -> dict[str, pb.SnapshotResponse]:
        """The ledger of the one who leads now, by its name; empty: nobody of these. There are never two."""
        found = {}
        for name in among or tuple(self.controllers):
            with suppress(Unavailable):
                found[name] = self.asked(name)
        assert len(found) < 2, list(found)
        return found

    def leader(self, *among: str) -> str:
        """Who leads now; empty: nobody of these."""
        return "".join(self.leading(*among))

    def ledger(self) -> pb.SnapshotResponse:
        (found,) = until(self.leading, "a leader", SOON).values()
        return found

    def end(self) -> None:
        for each in self.controllers.values():
            each.signal(signal.SIGCONT)
        super().end()
