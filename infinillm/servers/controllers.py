"""The controllers as workers and gateways call them: several addresses, one of which leads.

Theory of operation. Calls go to the address that answered last, and on to the next one where nobody answers there, or
that controller stands by, or speaks for an epoch that is over. Every request tells the largest epoch heard of, so that
a controller which was stopped, and replaced meanwhile, finds out from whoever calls it first; and no answer of a
smaller epoch than that is believed. What a leader refuses is an answer too: it is raised, and nobody else is asked.
"""

from __future__ import annotations

from typing import Any

import grpc.aio

from infinillm import rpc
from infinillm.errors import BadRequest, DeadlineExceeded, InfinillmError, Stale, StandsBy, Unavailable, Unreachable
from infinillm.protos import controller_pb2 as pb

CONTROLLER = pb.DESCRIPTOR.services_by_name["ControllerService"]
EPOCH = "epoch"  # the field that a Stale of ours names
ELSEWHERE = (Unreachable, StandsBy, DeadlineExceeded)


class Controllers:
    """See the theory of operation above. `addresses` is HOST:PORT, or several with commas between; empty: nobody."""

    def __init__(self, addresses: str):
        self.addresses = [each.strip() for each in addresses.split(",")]
        if (addresses and not all(self.addresses)) or len(set(self.addresses)) < len(self.addresses):
            raise BadRequest(f"--controller must be HOST:PORT[,HOST:PORT...], not {addresses!r}", field="controller")
        self.epoch = 0  # the largest heard of
        self._calls: dict[str, tuple[grpc.aio.Channel, rpc.Client]] = {}

    @property
    def address(self) -> str:
        """Of the one to call first."""
        return self.addresses[0]

    async def ask(self, method: str, request: Any, *, timeout: float) -> Any:
        """The leader's answer, if need be after `timeout` seconds at each of the others.

        Raises what the leader refused with; Unavailable or DeadlineExceeded where no controller was found that leads.
        """
        if not isinstance(request, pb.JoinRequest):  # which tells the epoch it belonged to
            request.epoch = self.epoch
        failures: list[InfinillmError] = []
        untried = list(self.addresses)
        while untried:
            address = next(each for each in self.addresses if each in untried)
            untried.remove(address)
            try:
                answer = await getattr(self._client(address), method)(request, timeout=timeout)
                if answer.epoch < self.epoch:
                    raise Stale(f"{address} speaks for epoch {answer.epoch}, which {self.epoch} ended", field=EPOCH)
            except ELSEWHERE as error:
                failures.append(error)
            except Stale as error:
                if error.field != EPOCH:
                    raise
                failures.append(Unavailable(error.message))
            else:
                self.epoch = answer.epoch
                return answer
            self._turn(address)
        raise next((each for each in failures if not isinstance(each, StandsBy)), failures[0])

    def _turn(self, address: str) -> None:
        """Call the next one first, unless another call has seen to that."""
        if self.addresses[0] == address:
            self.addresses.append(self.addresses.pop(0))

    def _client(self, address: str) -> rpc.Client:
        if address not in self._calls:
            channel = rpc.channel(address)
            self._calls[address] = (channel, rpc.Client(channel, CONTROLLER))
        return self._calls[address][1]

    async def close(self) -> None:
        while self._calls:
            _, (channel, _) = self._calls.popitem()
            await channel.close()
