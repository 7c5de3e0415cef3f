"""What a simulated worker sees of the cluster around it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple, Protocol

from infinillm.core.policy.orders import Offers
from infinillm.core.request import Sequence
from infinillm.core.types import NodeId, Refused

if TYPE_CHECKING:
    from infinillm.sim.worker import Worker


class Named(NamedTuple):
    """Who could lend; whether it is the turn of who asked to save up, or another's."""

    offers: Offers | Refused
    may_save: bool = False
    another_saves: bool = False


class Around(Protocol):
    """The clock, the other workers, and the controller."""

    @property
    def now(self) -> float: ...

    def at(self, when: float, do: Callable[[], None]) -> None: ...

    def wake(self, node: NodeId) -> None:
        """This node has something to tell from now on."""

    def stir(self, node: NodeId) -> None:
        """Something that this node tells has changed, or something else that may change it later."""

    def worker(self, node: NodeId) -> Worker: ...

    def answer(self, one: NodeId, other: NodeId, rows: int, tokens: int) -> float:
        """Seconds from a question of one node to the answer of another, which has so many tokens of its context."""

    def moving(self, one: NodeId, other: NodeId, tokens: int) -> float:
        """Seconds that K/V of so many tokens takes between two nodes."""

    def creditors(self, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool) -> Named:
        """Whom the policy names to a node that is short of blocks."""

    @property
    def capacity(self) -> int:
        """Tokens of the longest request that the nodes of now could hold."""

    def seconds(self, node: NodeId, seconds: float) -> float:
        """How long this node takes for work of so many seconds, where cores are shared."""

    def ended(self, worker: Worker, sequence: Sequence, first: float | None, refused: str) -> None:
        """A request is answered, or is `refused` after all; when its `first` token came."""
