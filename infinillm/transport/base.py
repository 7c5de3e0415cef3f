"""The contract of a port: a lane for tensors to one peer.

Four promises, kept by every body and tested by one contract (tests/transport/test_contract.py):

1. order: what is sent first arrives first, each way;
2. silence: no headers; `recv` fills tensors its caller made, because the plan fixed the shapes: one `recv`
   takes what one `send` gave, tensor by tensor;
3. nothing: an empty tensor costs nothing and is not sent;
4. honesty: a lost peer, or one silent for longer than the port's patience, raises PortClosed; nothing hangs.

Patience runs only while a `send` or `recv` is waiting: an idle port stays open. Both ends may send at the same
time, however much, before either receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Port(Protocol):
    """One end of a lane. One thread may send while another receives; `close` may come from any thread."""

    @property
    def kind(self) -> str: ...

    @property
    def sent_bytes(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send contiguous tensors, any dtype. Returns once they may be overwritten. Raises PortClosed."""
        ...

    def recv(self, out: Sequence[Tensor]) -> None:
        """Fill contiguous tensors in place with what the peer sent. Raises PortClosed."""
        ...

    def close(self) -> None:
        """End the lane at both ends. Closing twice is fine."""
        ...


class Listener(Protocol):
    """A lane offered to one peer: give it the ticket, then accept."""

    @property
    def ticket(self) -> bytes: ...

    def accept(self, timeout: float) -> Port:
        """The port to whoever presents the ticket. Raises DeadlineExceeded after `timeout` seconds, or PortClosed."""
        ...

    def close(self) -> None:
        """Withdraw the offer; a blocked accept raises PortClosed. An accepted port is not touched."""
        ...
