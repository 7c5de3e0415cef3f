"""A node's half of the conversation: lending blocks, keeping K/V, answering questions with partials.

Theory of operation. A borrower first gets a loan (Lend), then a lane (OpenPort), then opens Converse; what it says from
there on, one thread per borrower carries out (see `hear`). Loans outlive conversations: a borrower that reconnects
before its loan lapses finds its blocks where they were.

Everything after Lend names the loan. A loan belongs to one incarnation of its borrower: a later one ends it, and an
earlier one is Stale. What is remembered of borrowers ends with their loans.

A node that needs its own memory recalls some: it says so in the conversation, and the borrower brings home what lies
here, as it can, and returns it. A loan of which too much is still out after `patience` ends.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import torch

from infinillm import wire
from infinillm.core.claims import Claims
from infinillm.core.layout import firsts
from infinillm.core.pace import DOUBT_SECONDS
from infinillm.core.policy.saving import KEPT_SECONDS
from infinillm.core.types import Loan, LoanId, Node, NodeId, Refused, Stretch, difference
from infinillm.errors import BadRequest, DeadlineExceeded, NotFound, PortClosed, Stale
from infinillm.pool.hear import Conversation, Holds, Name, Over, Release, Share, carry_out
from infinillm.pool.memory import Memory
from infinillm.protos import pool_pb2 as pb
from infinillm.telemetry import Metrics, log
from infinillm.transport.lanes import Lanes, choose, host_key

POOL = pb.DESCRIPTOR.services_by_name["PoolService"]


class PoolService:
    """The gRPC face of a node."""

    def __init__(
        self,
        memory: Memory,
        *,
        describe: Callable[[], Node],
        model: str,
        lanes: Lanes,
        port_kind: str,
        patience: float,
        loan_seconds: float,
        clock: Callable[[], float],
        metrics: Metrics,
        threads: int,
    ):
        self.memory, self.describe, self.model = memory, describe, model
        self.lanes, self.port_kind, self.patience, self.loan_seconds = lanes, port_kind, patience, loan_seconds
        self.clock, self.metrics, self.threads = clock, metrics, threads
        self.conversations: dict[str, Conversation] = {}
        self.incarnations: dict[NodeId, str] = {}  # of those who have a loan
        self.claims = Claims()
        self.draining = False

    # --- lending -------------------------------------------------------------------------------------------------

    async def Lend(self, request: pb.LendRequest, call: Any) -> pb.LendResponse:
        borrower, incarnation, node = request.borrower, request.borrower_incarnation, self.memory.blocks.node
        if not borrower or not incarnation:
            raise BadRequest("borrower and borrower_incarnation must be set", field="borrower")
        if self.draining and request.blocks:  # who goes on with its requests shares what they have here
            return pb.LendResponse(refused=f"{node} is draining")
        self._check_current(borrower, incarnation)
        if not (known := self.incarnations.get(borrower) == incarnation and bool(request.loan)):
            await self._settle(borrower)
        with self.memory.lock:
            self._check_current(borrower, incarnation)  # others came while we waited
            if not known and (blocks := self.memory.blocks.give_back(borrower)):
                log("returned", borrower=borrower, blocks=blocks, reason="the borrower knows of no loan")
            loan, now = self.memory.blocks.loans.get(borrower), self.clock()
            if request.loan and (loan is None or loan.id != request.loan):
                return pb.LendResponse(refused=f"{node}: the loan {request.loan} is over")
            if reason := self.claims.refusal(loan, request.blocks, now):
                return pb.LendResponse(refused=f"{node} {reason}")
            name = f"{node}>{borrower}#{secrets.token_hex(6)}"
            blocks = min(request.blocks, max(self.memory.blocks.offer, request.least or request.blocks))
            result = self.memory.blocks.lend(borrower, blocks, now + self.loan_seconds, name)
            if request.least:  # it saves up, and asks again for the rest
                lacking = request.blocks - (0 if isinstance(result, Refused) else blocks)
                self.memory.keep_back(lacking, now + KEPT_SECONDS)
            if not isinstance(result, Refused):
                self.incarnations[borrower] = incarnation
                self.claims = self.claims.lent(result.id, request.hold_seconds, now)
        if isinstance(result, Refused):
            log("refused", borrower=borrower, blocks=request.blocks, reason=result.reason)
            self.metrics.add("loan_operations_total", operation="refuse")
            return pb.LendResponse(refused=result.reason)
        log("lent", loan=result.id, borrower=borrower, blocks=blocks, total=result.blocks)
        self.metrics.add("loan_operations_total", operation="lend")
        return pb.LendResponse(loan=wire.loan_to_wire(result, now))

    async def Return(self, request: pb.ReturnRequest, call: Any) -> pb.ReturnResponse:
        with suppress(NotFound):  # it has lapsed already: the same end
            loan = self._loan(request.loan)
            if not request.blocks:
                await self._settle(loan.borrower)
            with self.memory.lock:
                self._loan(loan.id)  # it may have ended while we waited
                blocks = self.memory.blocks.give_back(loan.borrower, request.blocks or None)
            log("returned", loan=loan.id, borrower=loan.borrower, blocks=blocks)
            self.metrics.add("loan_operations_total", operation="return")
        return pb.ReturnResponse()

    def end(self) -> None:
        """Lend no more, and have everybody take away what lies here. Called from the event loop."""
        self.draining = True
        for talk in self.conversations.values():
            talk.news.put_nowait(pb.ConverseResponse(ending=True))

    def recall(self, blocks: int) -> None:
        """Want so many blocks back, and keep them. Called from the event loop."""
        with self.memory.lock:
            self.memory.keep_back(0, 0.0)
            loans = self.memory.blocks.loans.values()
            self.claims, found = self.claims.recall(loans, blocks, self.clock(), self.patience)
        for loan, asked in found:
            log("recalled", loan=loan.id, borrower=loan.borrower, blocks=asked)
            self.metrics.add("loan_operations_total", operation="recall")
            for talk in self._talks(loan.borrower):
                if talk.opened.is_set():  # else it will be said first
                    talk.news.put_nowait(pb.ConverseResponse(recalled=asked))

    def _wanted_from(self, borrower: NodeId) -> int:
        with self.memory.lock:
            loan = self.memory.blocks.loans.get(borrower)
            return self.claims.wanted(loan) if loan is not None else 0

    def expire(self, grace: float) -> None:
        """End the loans nobody renewed; called every now and then. `grace`: seconds we were not there to hear.

        A conversation is ended first, and its blocks are freed when its thread is gone: it may be writing into them.
        """
        now = self.clock()
        with self.memory.lock:
            if grace > 1.0:
                for loan in list(self.memory.blocks.loans.values()):
                    self.memory.blocks.renew(loan.id, loan.until + grace)
            loans = list(self.memory.blocks.loans.values())
            due = [
                *self.memory.blocks.due(now),
                *(loan for loan in self.claims.late(loans, now) if loan.until > now),
            ]
            over = [loan for loan in due if not self._talks(loan.borrower)]
            for loan in over:
                self.memory.blocks.give_back(loan.borrower)
            self.claims = self.claims.after(self.memory.blocks.loans.values())
            self.incarnations = {b: i for b, i in self.incarnations.items() if b in self.memory.blocks.loans}
        for loan in due:
            for talk in self._talks(loan.borrower):
                talk.close()
        for loan in over:
            log("expired", loan=loan.id, borrower=loan.borrower, blocks=loan.blocks)
            self.metrics.add("loan_operations_total", operation="expire")

    def _check_current(self, borrower: NodeId, incarnation: str) -> None:
        """Raise Stale where we lend to a later start of this borrower."""
        known = self.incarnations.get(borrower, incarnation)
        if incarnation < known:
            node = self.memory.blocks.node
            raise Stale(f"{node} lends to {borrower} {known}, which was started after {incarnation}")

    def _talks(self, borrower: NodeId) -> list[Conversation]:
        return [talk for talk in list(self.conversations.values()) if talk.borrower == borrower]

    # --- conversation --------------------------------------------------------------------------------------------

    async def OpenPort(self, request: pb.OpenPortRequest, call: Any) -> pb.OpenPortResponse:
        if differs := difference(self.memory.store.shape, wire.shape_from_wire(request.shape)):
            field, ours, theirs = differs
            raise BadRequest(f"{field} is {ours} on this node, {theirs} on the borrower", field="shape")
        kind = choose(request.kind or self.port_kind, host_key(), request.host_key)
        await self._settle(self._loan(request.loan).borrower)
        loan = self._loan(request.loan)  # it may have ended while we waited
        listener = self.lanes.listen(kind)
        name = secrets.token_hex(16)
        loop = asyncio.get_running_loop()
        talk = self.conversations[name] = Conversation(loan.borrower, loan.id, listener, loop.create_future())
        thread = threading.Thread(
            target=self._serve, args=(name, talk, loop), name=f"answer-{talk.borrower}", daemon=True
        )
        thread.start()
        return pb.OpenPortResponse(conversation=name, kind=kind, ticket=listener.ticket)

    def _loan(self, id: LoanId) -> Loan:
        """The loan of that id. Raises NotFound where it is over: lapsed, returned, or its borrower started again."""
        with self.memory.lock:
            if (loan := self.memory.blocks.loan(id)) is None:
                raise NotFound(f"{self.memory.blocks.node} has no loan {id!r} in force", field="loan")
        return loan

    async def _settle(self, borrower: NodeId) -> None:
        """End the borrower's earlier conversations, and wait until their threads have: there is one at a time."""
        while earlier := self._talks(borrower):
            for talk in earlier:
                talk.close()
            _, alive = await asyncio.wait([talk.ended for talk in earlier], timeout=self.patience)
            if alive:
                raise DeadlineExceeded(f"an earlier conversation with {borrower} has not ended")

    async def Converse(
        self, requests: AsyncIterator[pb.ConverseRequest], call: Any
    ) -> AsyncIterator[pb.ConverseResponse]:
        first = await anext(requests, None)
        name = first.open.conversation if first is not None else ""
        talk = self.conversations.get(name)
        if first is None or talk is None:
            raise NotFound(f"no conversation {name!r} was opened here", field="open")
        self._renew(talk)
        talk.inbox.put(self._holds(first.open))
        talk.opened.set()
        recalled = self._wanted_from(talk.borrower)  # nobody may have been there to hear it
        listening = asyncio.create_task(self._listen(requests, talk))
        news: asyncio.Future[pb.ConverseResponse] = asyncio.create_task(talk.news.get())
        try:
            yield pb.ConverseResponse(open=name)
            if self.draining:
                yield pb.ConverseResponse(ending=True)
            if recalled:
                yield pb.ConverseResponse(recalled=recalled)
            while not talk.ended.done():
                either: list[asyncio.Future[Any]] = [talk.ended, news]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    yield news.result()
                    news = asyncio.create_task(talk.news.get())
            yield pb.ConverseResponse(refused=talk.ended.result())
        finally:
            listening.cancel()
            news.cancel()
            talk.close()

    def _holds(self, said: pb.Open) -> Holds:
        if sum(each.blocks for each in said.held) > self.memory.blocks.count:
            raise BadRequest(f"{self.memory.blocks.node} has not so many blocks", field="open")
        held, size = Holds(), self.memory.blocks.block_size
        for each in said.held:
            held.setdefault(each.sequence, set()).update(firsts(each.first, each.blocks, size))
        return held

    async def _listen(self, requests: AsyncIterator[pb.ConverseRequest], talk: Conversation) -> None:
        size, loop = self.memory.blocks.block_size, asyncio.get_running_loop()

        def shared(blocks: list[Stretch]) -> None:
            reply = pb.ConverseResponse(shared=pb.Shared(blocks=wire.stretches_to_wire(blocks)))
            if not loop.is_closed():
                loop.call_soon_threadsafe(talk.news.put_nowait, reply)

        try:
            async for request in requests:
                match request.WhichOneof("said"):
                    case "plan":
                        talk.inbox.put(wire.plan_from_wire(request.plan))
                    case "release":
                        talk.inbox.put(Release(request.release.sequence))
                    case "name":
                        talk.inbox.put(Name(*wire.names_from_wire(request.name, size)))
                    case "share":
                        talk.inbox.put(Share(*wire.names_from_wire(request.share, size), shared))
                    case "renew":
                        self._renew(talk)
        finally:
            talk.inbox.put(Over())

    def _renew(self, talk: Conversation) -> None:
        with self.memory.lock:
            self.memory.blocks.renew(talk.loan, self.clock() + self.loan_seconds)

    def _serve(self, name: str, talk: Conversation, loop: asyncio.AbstractEventLoop) -> None:
        reason = "nobody came to the port"
        torch.set_num_threads(self.threads)  # OpenMP counts them for each caller
        try:
            talk.port = talk.listener.accept(self.patience)
            if talk.opened.wait(self.patience):
                reason = carry_out(self.memory, talk.port, talk)
            else:
                reason = "the port was taken, but no conversation followed"
        except (PortClosed, DeadlineExceeded) as closed:
            reason = closed.message
        except Exception as defect:
            reason = f"{type(defect).__name__}: {defect}"
            raise
        finally:
            log("conversation_ended", borrower=talk.borrower, reason=reason)
            talk.close()
            self.conversations.pop(name, None)
            with self.memory.lock:  # one that is alive opens another conversation, and renews
                self.memory.blocks.abandon(talk.borrower)
                self.memory.blocks.doubt(talk.loan, self.clock() + min(DOUBT_SECONDS, self.patience))
            if not loop.is_closed():
                loop.call_soon_threadsafe(_tell, talk.ended, reason)

    async def Describe(self, request: pb.DescribeRequest, call: Any) -> pb.DescribeResponse:
        now = self.clock()
        with self.memory.lock:
            loans = [wire.loan_to_wire(loan, now) for loan in self.memory.blocks.loans.values()]
        return pb.DescribeResponse(
            node=wire.node_to_wire(self.describe()),
            shape=wire.shape_to_wire(self.memory.store.shape),
            loans=loans,
            model=self.model,
        )

    def close(self) -> None:
        for talk in list(self.conversations.values()):
            talk.close()


def _tell(ended: asyncio.Future[str], reason: str) -> None:
    if not ended.done():
        ended.set_result(reason)
