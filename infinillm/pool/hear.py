"""What one borrower says, heard and carried out in its order, by one thread.

Theory of operation. For each plan: leave, grow, then layer by layer receive [q, k, v and blocks that move here], write,
attend, send [o, lse and blocks that move home]. Blocks that move here are staged, and adopted with the last layer,
whose answer ends with the number of the step. Everything else a borrower says travels in the same order as its plans:
so nothing is freed under a plan's feet, a block gets its name when its content is final, and what is kept for a
sequence that is to come stays until that sequence is released. A plan that is older than the last, or that the books
refuse, ends the conversation: the borrower's port closes, and it knows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

import torch

from infinillm.core.layout import stretches
from infinillm.core.types import LoanId, NodeId, Plan, SeqId, Stretch
from infinillm.errors import Broken
from infinillm.pool.memory import Memory
from infinillm.protos import pool_pb2 as pb
from infinillm.transport.base import Listener, Port


class Over:
    """No more will be said."""


class Holds(dict[SeqId, set[int]]):
    """Said first: which blocks the borrower has here, by position. All others of its are let go."""


class Release(NamedTuple):
    """A sequence needs nothing here any more."""

    seq: SeqId


class Name(NamedTuple):
    """Blocks that the plans so far have filled can be found under these names, by position."""

    seq: SeqId
    names: dict[int, bytes]


class Share(NamedTuple):
    """What is here under these names is to be kept for a sequence; `tell` what that is."""

    seq: SeqId
    names: dict[int, bytes]
    tell: Callable[[list[Stretch]], None]


Said: TypeAlias = Holds | Plan | Release | Name | Share | Over


@dataclass(eq=False)
class Conversation:
    """What one borrower said, waiting for its thread."""

    borrower: NodeId
    loan: LoanId
    listener: Listener
    ended: asyncio.Future[str]
    opened: threading.Event = field(default_factory=threading.Event)
    inbox: SimpleQueue[Said] = field(default_factory=SimpleQueue)
    news: asyncio.Queue[pb.ConverseResponse] = field(default_factory=asyncio.Queue)  # what the borrower is to hear
    port: Port | None = None
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        self.inbox.put(Over())
        self.opened.set()
        self.listener.close()
        if self.port is not None:
            self.port.close()


def carry_out(memory: Memory, port: Port, talk: Conversation) -> str:
    """Do what a borrower says until it leaves; returns why the conversation ended."""
    with torch.inference_mode():
        last = 0
        while True:
            said = talk.inbox.get()
            if talk.closed:
                return "the conversation was ended"
            match said:
                case Over():
                    return "the borrower left"
                case Plan() as plan:
                    if plan.step <= last:
                        return f"plan {plan.step} came after {last}"
                    last = plan.step
                    if reason := _step(memory, port, plan, talk.borrower):
                        return reason
                case _:
                    _change(memory, said, talk.borrower)


def _change(memory: Memory, said: Holds | Release | Name | Share, borrower: NodeId) -> None:
    """Change the books."""
    blocks = memory.blocks
    with memory.lock:
        match said:
            case Holds() as held:
                blocks.keep(held, borrower)
            case Release(seq):
                blocks.release(seq, borrower)
            case Name(seq, names):
                for first, name in names.items():
                    blocks.seal(seq, first, name, borrower)
            case Share(seq, names, tell):
                tell(stretches(seq, blocks.share(seq, names, borrower), blocks.block_size))


def _step(memory: Memory, port: Port, plan: Plan, borrower: NodeId) -> str:
    """Answer one step; returns why that cannot be done, if so."""
    shape, store = memory.store.shape, memory.store
    dtype, device = store.dtype, store.device
    if refused := memory.accept(plan, borrower):
        return refused.reason
    try:
        work = memory.work(plan.parts, borrower)
        taken = memory.found(plan.take, borrower, staged=True)
        given = memory.found(plan.give, borrower, staged=False)
    except Broken as broken:
        return f"plan {plan.step}: {broken.message}"
    if not (work.rows or work.kept or taken or given):
        return ""
    echo = torch.tensor([plan.step], dtype=torch.int64, device=device)
    q = torch.empty(work.rows, shape.heads, shape.head_dim, dtype=dtype, device=device)
    k = torch.empty(work.kept, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
    v = torch.empty_like(k)
    for layer in range(shape.layers):
        port.recv([q, k, v, *store.whole(layer, taken)])
        if work.kept:
            store.write(layer, k, v, work.slots)
        back = [*store.attend(layer, q, work.table)] if work.rows else []
        back += store.whole(layer, given)
        if layer == shape.layers - 1:
            memory.adopt(plan.take, borrower)
            back.append(echo)
        port.send(back)
    return ""
