"""One node we borrow from: the account of its loan, what of our sequences lies there, and how to ask it for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from infinillm import rpc
from infinillm.core.types import LoanId, NodeId, Refused, SeqId
from infinillm.errors import InfinillmError
from infinillm.pool.talk import POOL, Conversation
from infinillm.protos import pool_pb2 as pb
from infinillm.protos import types_pb2
from infinillm.telemetry import log

RPC_SECONDS = 5.0
Candidates: TypeAlias = Sequence[tuple[NodeId, str, int]]  # who may lend, its address, and how many blocks


@dataclass(slots=True)
class Lender:
    """One node we borrow from."""

    node: NodeId
    address: str
    loan: LoanId
    blocks: int
    held: dict[SeqId, set[int]] = field(default_factory=dict)  # blocks by the position of their first token
    guests: dict[SeqId, set[int]] = field(default_factory=dict)  # those of `held` that are not of the loan
    staged: dict[SeqId, set[int]] = field(default_factory=dict)  # those on their way there
    conversation: Conversation | None = None
    leaving: dict[SeqId, int] = field(default_factory=dict)  # blocks that left, which the lender may not have heard
    recalled: int = 0  # blocks the lender wants back
    ending: bool = False  # it wants everything back
    unsaid: set[SeqId] = field(default_factory=set)  # released while there was no conversation to say it in
    idle_since: float = 0.0
    saved: bool = False  # for sequences that outgrow home only

    @property
    def room(self) -> int:
        """Blocks that sequences may take."""
        return max(0, self.spare - self.recalled)

    @property
    def spare(self) -> int:
        return self.blocks - self.used

    @property
    def used(self) -> int:
        """Blocks of the loan that sequences have."""
        held, staged, guests = (sum(map(len, each.values())) for each in (self.held, self.staged, self.guests))
        return held + staged - guests

    @property
    def owed(self) -> int:
        """Blocks that must come home before the lender has what it wants: all that lie there, where it ends."""
        if self.ending:
            return sum(map(len, self.held.values())) + sum(map(len, self.staged.values()))
        return max(0, self.recalled - self.spare)


async def ask_to_lend(address: str, request: pb.LendRequest) -> types_pb2.Loan | Refused:
    """The whole loan there is now. Raises what a call raises."""
    async with rpc.channel(address) as channel:
        reply = await rpc.Client(channel, POOL).Lend(request, timeout=RPC_SECONDS)
    return reply.loan if reply.WhichOneof("result") == "loan" else Refused(reply.refused)


async def give_back(address: str, loan: LoanId, blocks: int) -> None:
    """So many blocks of a loan; 0: all of it. A lender that does not hear it lets the loan lapse."""
    try:
        async with rpc.channel(address) as channel:
            await rpc.Client(channel, POOL).Return(pb.ReturnRequest(loan=loan, blocks=blocks), timeout=RPC_SECONDS)
    except InfinillmError as error:
        log("return_failed", loan=loan, reason=error.message)
