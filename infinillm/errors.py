"""Every failure a caller can meet, with the status it travels as and whether trying again can help.

InfinillmError
  BadRequest     INVALID_ARGUMENT    400  no retry   the caller must change the named field
  NotFound       NOT_FOUND           404  no retry   no such model or request
  TooLong        OUT_OF_RANGE        400  no retry   no pool of this size can hold the request
  Overloaded     RESOURCE_EXHAUSTED  429  retry      no room now
  Unavailable    UNAVAILABLE         503  retry      a process we need is not there (yet)
    PortClosed                                       the other end of a port is gone
    NodeLost                                         a node stopped answering
    Unreachable                                      nobody answers at an address
    StandsBy                                         another controller leads
  DeadlineExceeded DEADLINE_EXCEEDED 504  retry      nobody answered in time
  Cancelled      CANCELLED           499  no retry   the caller left
  Stale          ABORTED             409  no retry   the sender's epoch or incarnation has been superseded
  Broken         INTERNAL            500  no retry   a law of ours failed
"""

from __future__ import annotations


class InfinillmError(Exception):
    """Root of the tree. `field` names the offending input where there is one."""

    grpc_status = "INTERNAL"
    http_status = 500
    retry = False

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.message = message
        self.field = field


class BadRequest(InfinillmError):
    """The caller must change something; `field` says what."""

    grpc_status, http_status = "INVALID_ARGUMENT", 400


class NotFound(InfinillmError):
    """No model or request goes by that name."""

    grpc_status, http_status = "NOT_FOUND", 404


class TooLong(InfinillmError):
    """The request needs more K/V memory than the whole pool has."""

    grpc_status, http_status = "OUT_OF_RANGE", 400


class Overloaded(InfinillmError):
    """There is no room now; later there may be."""

    grpc_status, http_status, retry = "RESOURCE_EXHAUSTED", 429, True


class Unavailable(InfinillmError):
    """A process this request needs is not there."""

    grpc_status, http_status, retry = "UNAVAILABLE", 503, True


class PortClosed(Unavailable):
    """The other end of a port is gone; raised at both ends."""


class NodeLost(Unavailable):
    """A node stopped answering; what it held is a hole in the layouts."""

    def __init__(self, message: str, *, node: str = ""):
        super().__init__(message)
        self.node = node


class Unreachable(Unavailable):
    """Nobody answers at an address; whoever does answer and cannot help is merely Unavailable."""


class StandsBy(Unavailable):
    """This controller does not lead; another one does."""


class DeadlineExceeded(InfinillmError):
    """Nobody answered in time."""

    grpc_status, http_status, retry = "DEADLINE_EXCEEDED", 504, True


class Cancelled(InfinillmError):
    """The caller left before the answer was complete."""

    grpc_status, http_status = "CANCELLED", 499


class Stale(InfinillmError):
    """The sender speaks for an epoch or an incarnation that is over."""

    grpc_status, http_status = "ABORTED", 409


class Broken(InfinillmError):
    """A law of ours failed: the books do not balance, a plan contradicts a layout."""


def tree(root: type[InfinillmError] = InfinillmError) -> list[type[InfinillmError]]:
    """Every class of the tree above, parents first. What a room derives for itself travels as its parent."""
    mine = (child for child in root.__subclasses__() if child.__module__ == __name__)
    return [root, *(found for child in mine for found in tree(child))]
