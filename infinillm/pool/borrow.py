"""The accounts of a borrower: which nodes lend us how many blocks, and the conversation with each.

Theory of operation. `Lenders` keeps one `Lender` per node we borrow from: a loan (a number of blocks), a port for
tensors and a stream for words. Blocks of a loan are used by sequences without asking again, because the lender has
reserved them; the plan of the next step tells it. A conversation opens by saying which blocks we have there; the
lender lets go of all others, so that whatever was lost with an earlier conversation is mended by the next.

A lost lender is dropped with everything it held; the engine then sees holes in layouts, which are ordinary pending
work. Should it turn out to be alive and lend again, it first forgets what it held for us: we say that we know of no
loan.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLate

from infinillm import rpc, wire
from infinillm.core.layout import firsts, stretches
from infinillm.core.recall import AT_ONCE, Terms
from infinillm.core.types import Grow, LoanId, NodeId, Refused, SeqId, Stretch
from infinillm.errors import InfinillmError, NodeLost, Unavailable
from infinillm.pool.lender import RPC_SECONDS, Candidates, Lender, ask_to_lend, give_back
from infinillm.pool.memory import Memory
from infinillm.pool.talk import POOL, REOPEN_SECONDS, Conversation
from infinillm.protos import pool_pb2 as pb
from infinillm.telemetry import Metrics, log
from infinillm.transport.lanes import Lanes, host_key

ENDING = -1  # everything is wanted back
DOUBT_SECONDS = 60.0  # for which a node that answered nonsense is not asked for memory


class Lenders:
    """All the nodes we borrow from. Accounts change under a lock; the network is never awaited with it held."""

    def __init__(
        self, node: NodeId, incarnation: str, memory: Memory, *, lanes: Lanes, port_kind: str, metrics: Metrics
    ):
        self.node, self.incarnation, self.memory = node, incarnation, memory
        self.lanes, self.port_kind, self.metrics = lanes, port_kind, metrics
        self.accounts: dict[NodeId, Lender] = {}
        self.saved_until = 0.0  # what is saved up is not idle before that
        self.doubted: dict[NodeId, float] = {}  # who answered nonsense, and until when nobody asks it
        self._early: dict[NodeId, int] = {}  # what lenders want back whose loans are not entered yet
        self.lock = threading.RLock()
        self._dealing = asyncio.Lock()  # one borrowing or returning at a time: both speak of whole loans
        self._opening = ThreadPoolExecutor(thread_name_prefix="open-port")

    # --- accounts, called by the engine --------------------------------------------------------------------------

    def room(self) -> dict[NodeId, int]:
        with self.lock:
            return {node: lender.room for node, lender in self.accounts.items()}

    def hears(self, node: NodeId) -> bool:
        """Whether there is a conversation with this lender; one that opens begins with all there is to know."""
        with self.lock:
            lender = self.accounts.get(node)
            return lender is not None and lender.conversation is not None

    def owed(self) -> dict[NodeId, int]:
        """How many blocks must come free before the lenders that want some back can have them."""
        with self.lock:
            return {lender.node: lender.owed for lender in self.accounts.values() if lender.owed}

    @property
    def saved(self) -> set[NodeId]:
        """The lenders whose blocks are for sequences that outgrow home."""
        with self.lock:
            return {lender.node for lender in self.accounts.values() if lender.saved}

    @property
    def recalling(self) -> list[NodeId]:
        """The lenders that want blocks back."""
        with self.lock:
            return [lender.node for lender in self.accounts.values() if lender.recalled or lender.ending]

    def recalled(self, node: NodeId, blocks: int) -> None:
        """A lender wants blocks back; called by the thread that hears it."""
        with self.lock:
            if (lender := self.accounts.get(node)) is None:
                self._early[node] = blocks
            else:
                lender.recalled = max(lender.recalled, min(blocks, lender.blocks))
                log("recall_heard", lender=node, blocks=blocks)

    def ending(self, node: NodeId) -> None:
        """A lender ends, and all that lies there has to come home; called by the thread that hears it."""
        with self.lock:
            if (lender := self.accounts.get(node)) is None:
                self._early[node] = ENDING
            else:
                lender.ending, lender.recalled = True, lender.blocks

    @property
    def borrowed(self) -> int:
        with self.lock:
            return sum(lender.blocks for lender in self.accounts.values())

    def grow(self, grow: Grow) -> None:
        with self.lock:
            lender = self.accounts[grow.node]
            lender.held.setdefault(grow.seq, set()).update(self._firsts(grow.first, grow.blocks))
            lender.idle_since = time.monotonic()

    def stage(self, node: NodeId, stretch: Stretch) -> None:
        """Reserve blocks of a loan for content on its way there."""
        with self.lock:
            reserved = self._firsts(stretch.first, stretch.blocks)
            self.accounts[node].staged.setdefault(stretch.seq, set()).update(reserved)

    def adopt(self) -> None:
        """What was staged has come, and what the lenders were told before they have heard."""
        with self.lock:
            for lender in self.accounts.values():
                lender.leaving.clear()
                for seq, staged in lender.staged.items():
                    lender.held.setdefault(seq, set()).update(staged)
                lender.staged.clear()

    def abandon(self) -> None:
        """What was staged will not come."""
        with self.lock:
            for lender in self.accounts.values():
                lender.staged.clear()

    def leave(self, node: NodeId, stretch: Stretch) -> None:
        """Blocks are elsewhere now; the next plan tells the lender."""
        with self.lock:
            lender = self.accounts[node]
            gone = set(self._firsts(stretch.first, stretch.blocks))
            shared = len(gone & lender.guests.get(stretch.seq, set()))
            for blocks in (lender.held, lender.guests):
                if stretch.seq in blocks:
                    blocks[stretch.seq] -= gone
                    if not blocks[stretch.seq]:
                        del blocks[stretch.seq]
            lender.leaving[stretch.seq] = lender.leaving.get(stretch.seq, 0) + stretch.blocks - shared
            lender.idle_since = time.monotonic()

    def _firsts(self, first: int, blocks: int) -> range:
        return firsts(first, blocks, self.memory.blocks.block_size)

    def release(self, seq: SeqId) -> None:
        """Give the blocks of a sequence back to the loans they came from."""
        with self.lock:
            touched = [x for x in self.accounts.values() if any([x.held.pop(seq, None), x.staged.pop(seq, None)])]
            for lender in self.accounts.values():
                lender.guests.pop(seq, None)
                lender.leaving.pop(seq, None)
            for lender in touched:
                lender.idle_since = time.monotonic()
        for lender in touched:
            if lender.conversation is not None:
                lender.conversation.release(seq)
            else:
                lender.unsaid.add(seq)

    def name(self, node: NodeId, seq: SeqId, first: int, names: Sequence[bytes]) -> None:
        """Full blocks of a sequence that lie there can be found under these names."""
        with self.lock:
            lender = self.accounts.get(node)
            if lender is not None and lender.conversation is not None:
                lender.conversation.name(seq, first, names)

    def shared(self, conversation: Conversation, blocks: Iterable[Stretch]) -> None:
        """A lender keeps these for us beside the loan; called by the thread that hears it."""
        with self.lock:
            lender = self.accounts.get(conversation.node)
            if lender is None or lender.conversation is not conversation:
                return  # the next conversation says what we have there, and this is not among it
            for seq, first, count in blocks:
                for kept in (lender.held, lender.guests):
                    kept.setdefault(seq, set()).update(self._firsts(first, count))
            lender.idle_since = time.monotonic()

    def conversation(self, node: NodeId) -> Conversation:
        """The open conversation with a lender; opened again if a failed step closed it. Raises NodeLost.

        The engine waits, and with it every request: so a lender that takes longer than REOPEN_SECONDS is lost.
        """
        with self.lock:
            lender = self.accounts.get(node)
        if lender is None:
            raise NodeLost(f"no loan from {node}", node=node)
        if lender.conversation is None:
            size = self.memory.blocks.block_size
            held = [
                stretch
                for seq, there in lender.held.items()
                if seq not in lender.unsaid  # what came back since is grown anew
                for stretch in stretches(seq, there, size)
            ]
            opening = self._opening.submit(self._open, node, lender.address, lender.loan, held)
            try:
                lender.conversation = opening.result(REOPEN_SECONDS)
            except InfinillmError as error:
                raise NodeLost(error.message, node=node) from error
            except TooLate:
                opening.add_done_callback(_close_late)
                raise NodeLost(f"{node} opened no port within {REOPEN_SECONDS:g} s", node=node) from None
            lender.unsaid.clear()
        return lender.conversation

    def reset(self, nodes: Iterable[NodeId]) -> None:
        """End these conversations, not the loans: a step that failed half-way left them out of step."""
        for node in nodes:
            lender = self.accounts.get(node)
            if lender is not None and lender.conversation is not None:
                lender.conversation.close()
                lender.conversation = None

    def drop(self, node: NodeId) -> None:
        """Forget a lender that was lost, and everything it held for us."""
        with self.lock:
            lender = self.accounts.pop(node, None)
        if lender is not None and lender.conversation is not None:
            lender.conversation.close()

    def doubt(self, node: NodeId) -> None:
        """Borrow nothing from a node for a while: what it answers cannot be used."""
        with self.lock:
            self.doubted[node] = time.monotonic() + DOUBT_SECONDS

    # --- borrowing, called from the event loop -------------------------------------------------------------------

    async def borrow(self, least: int, wanted: int, candidates: Candidates, terms: Terms) -> int | Refused:
        """Reserve `least` to `wanted` blocks, as ranked, all or nothing."""
        async with self._dealing:
            return await self._reserve(least, wanted, candidates, terms)

    async def _reserve(self, least: int, wanted: int, candidates: Candidates, terms: Terms) -> int | Refused:
        got: list[tuple[NodeId, str, LoanId, int]] = []
        reasons: list[str] = []
        total = 0
        for node, address, offered in candidates:
            if self.doubted.get(node, 0.0) > time.monotonic():
                reasons.append(f"{node} answered nonsense a while ago")
                continue
            if (asked := min(wanted - total, offered)) < 1:
                break
            try:
                answer = await self._lend(node, address, asked, terms)
            except InfinillmError as error:
                answer = Refused(f"{node}: {error.message}")
            if isinstance(answer, Refused):
                reasons.append(answer.reason)
                continue
            got.append((node, address, *answer))
            total += answer[1]
        if total < least:
            for _, address, loan, asked in got:
                await give_back(address, loan, asked)
            return Refused("; ".join(reasons) or f"{total} of {least} blocks could be borrowed")
        for node, address, loan, asked in got:
            try:
                await self._enter(node, address, loan, asked)
                self.accounts[node].saved = terms.save
            except InfinillmError as error:
                total -= asked
                reasons.append(f"{node}: {error.message}")
        return total if total >= least else Refused("; ".join(reasons))

    async def _enter(self, node: NodeId, address: str, loan: LoanId, blocks: int) -> None:
        """Enter a loan, or more of one, once there is a conversation: the engine may use it from then on.

        Raises what opening one raises; the lender has got the blocks back then.
        """
        opened = None
        if node not in self.accounts:
            self._early.pop(node, None)
            try:
                opened = await asyncio.to_thread(self._open, node, address, loan, ())
            except InfinillmError:
                await give_back(address, loan, blocks)
                raise
        with self.lock:
            lender = self.accounts.setdefault(node, Lender(node, address, loan, 0, conversation=opened))
            lender.blocks += blocks
            lender.idle_since = time.monotonic()
            if (early := self._early.pop(node, 0)) == ENDING:
                self.ending(node)
            elif early:
                self.recalled(node, early)
        self.metrics.add("loan_operations_total", operation="borrow")
        log("borrowed", lender=node, blocks=blocks, total=lender.blocks)

    async def meet(self, node: NodeId, address: str) -> None:
        """Have a conversation with a node, if only over a loan of nothing. Raises NodeLost, Unavailable."""
        async with self._dealing:
            if node not in self.accounts:
                lent = await self._lend(node, address, 0, AT_ONCE)
                if isinstance(lent, Refused):
                    raise Unavailable(lent.reason)
                await self._enter(node, address, *lent)

    async def share(
        self, node: NodeId, address: str, seq: SeqId, runs: Iterable[tuple[int, Sequence[bytes]]]
    ) -> list[Stretch]:
        """Have a node keep what it has of a sequence's blocks, by runs of names from some position on.

        Returns what it has. It keeps that beside the loan, which may be one of nothing. Raises NodeLost, Unavailable.
        """
        await self.meet(node, address)
        with self.lock:
            talk = lender.conversation if (lender := self.accounts.get(node)) is not None else None
        if talk is None:
            return []  # the next step opens it again; this request can do without
        answers = [talk.share(seq, first, names) for first, names in runs]
        return [stretch for answer in answers for stretch in await asyncio.wrap_future(answer)]

    async def give_back_idle(self, idle_seconds: float) -> None:
        """Return what no sequence has used for a while: whole loans, and what is left over of others.

        What a lender wants back it gets as soon as it is free.
        """
        async with self._dealing:
            now = time.monotonic()
            with self.lock:
                idle: list[Lender] = []
                spare: list[tuple[Lender, int]] = []
                for lender in list(self.accounts.values()):
                    left, rests = lender.spare - sum(lender.leaving.values()), True
                    if now < max(lender.idle_since + idle_seconds, self.saved_until if lender.saved else 0.0):
                        left, rests = min(left, lender.recalled), lender.ending or 0 < lender.blocks <= lender.recalled
                    if left == lender.blocks and rests and not lender.held:
                        idle.append(self.accounts.pop(lender.node))
                    elif left > 0:
                        spare.append((lender, left))
                        lender.blocks -= left
                        lender.recalled = max(0, lender.recalled - left)
            await self._end(idle)
            for lender, room in spare:
                log("gave_back", lender=lender.node, blocks=room)
                await give_back(lender.address, lender.loan, room)

    def renew(self) -> None:
        for talk in self._talks:
            talk.renew()

    def measure(self) -> None:
        with self.lock:
            recalled = sum(lender.recalled for lender in self.accounts.values())
        self.metrics.set("recalled_blocks", recalled, side="borrower")
        for talk in self._talks:
            talk.measure(self.metrics)

    @property
    def _talks(self) -> list[Conversation]:
        with self.lock:
            return [x.conversation for x in self.accounts.values() if x.conversation]

    async def close(self) -> None:
        async with self._dealing:
            with self.lock:
                lenders, self.accounts = list(self.accounts.values()), {}
            await self._end(lenders)
        self._opening.shutdown(wait=False)

    async def _end(self, lenders: Sequence[Lender]) -> None:
        for lender in lenders:
            log("gave_back", lender=lender.node, blocks=lender.blocks)
            if lender.conversation is not None:
                await asyncio.to_thread(lender.conversation.close)
            await give_back(lender.address, lender.loan, 0)

    # --- the wire ------------------------------------------------------------------------------------------------

    async def _lend(self, node: NodeId, address: str, blocks: int, terms: Terms) -> tuple[LoanId, int] | Refused:
        known = self.accounts.get(node)
        loan, held = (known.loan, known.blocks) if known is not None else ("", 0)
        request = pb.LendRequest(borrower=self.node, borrower_incarnation=self.incarnation, blocks=blocks, loan=loan)
        request.least, request.hold_seconds = int(terms.save), terms.hold
        lent = await ask_to_lend(address, request)
        return lent if isinstance(lent, Refused) else (lent.id, lent.blocks - held)

    def _open(self, node: NodeId, address: str, loan: LoanId, held: Iterable[Stretch]) -> Conversation:
        with rpc.blocking_channel(address) as channel:
            reply = rpc.BlockingClient(channel, POOL).OpenPort(
                pb.OpenPortRequest(
                    loan=loan,
                    shape=wire.shape_to_wire(self.memory.store.shape),
                    kind=self.port_kind,
                    host_key=host_key(),
                ),
                timeout=RPC_SECONDS,
            )
        port = self.lanes.connect(reply.ticket)
        log("port_opened", node=node, kind=port.kind)
        return Conversation(node, address, reply.conversation, port, held, self)


def _close_late(opening: Future[Conversation]) -> None:
    if opening.exception() is None:
        opening.result().close()
