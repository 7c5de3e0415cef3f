"""The wishes of a simulated worker for blocks, and what follows from the answers.

As `engine.loop` and `servers.worker`: it asks for room for what lenders want back, else for what a step was short of. A
request that waits alone and is refused for long has what this worker lent wanted back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from infinillm.core.pace import MOST_REFUSED, RETRY_SECONDS
from infinillm.core.request import Request
from infinillm.core.scheduler import NEVER, Shortage, need, shortage
from infinillm.core.types import Step

if TYPE_CHECKING:
    from infinillm.sim.worker import Worker

ASK_SECONDS = 0.02  # from a wish for blocks to the answer


def still(worker: Worker) -> object:
    """Where nothing runs, all that decides the next step; else something that equals nothing."""
    first, b = worker.waiting[0] if worker.waiting else None, worker.borrower
    if first is None or worker.running or worker.moves.busy or first.id in worker.names:
        return object()
    kept = worker.lender.kept_back(worker.world.now)
    loans = [(account.recalled, account.saved, loan) for _, account, loan in b.loans()]
    return first, first.layout, worker.blocks.room, kept, loans


def wish(worker: Worker, step: Step) -> None:
    """Ask after a step was decided, unless an answer is awaited or came just now."""
    b, moves, world = worker.borrower, worker.moves, worker.world
    wishes = bool(step.short or moves.homeless)
    b.denied_since = b.denied_since if wishes else NEVER
    if not wishes or b.asking:
        return
    if world.now < b.ask_again:
        if not step.chunks and b.woken < b.ask_again:  # else it asks after some step
            b.woken = b.ask_again
            world.at(b.ask_again, worker.begin)
        return
    b.asking = True
    alone: Request | None = None
    short = Shortage(1, moves.homeless, moves.homeless, 0.0)
    if not moves.ask():
        alone = worker.waiting[0].request if worker.waiting and not worker.running else None
        short = _shortage(worker, step)
    world.at(world.now + ASK_SECONDS, partial(_ask, worker, short, alone))


def _shortage(worker: Worker, step: Step) -> Shortage:
    """What to ask for after a step; where that was decided before (`still`), it is remembered."""
    b, now = worker.borrower, (worker.blocks.lent, len(worker.waiting))
    decided, then, short = b.wished
    if step is not decided or now != then:
        own, more = worker.blocks.count, b.blocks - worker.blocks.lent
        short = shortage(step, worker.running, worker.waiting, worker.size, own, more, worker.cost)
        b.wished = step, now, short
    return short


def _ask(worker: Worker, short: Shortage, alone: Request | None) -> None:
    if worker.dead:
        return
    b, now = worker.borrower, worker.world.now
    worker.settle()
    known = b.denied_since < NEVER  # then another refusal changes nothing for what runs
    enough, another_saves = b.borrow(short)
    b.asking, b.ask_again, b.denied_since = False, now + RETRY_SECONDS, NEVER if enough else min(b.denied_since, now)
    worker.moves.hear_lent(not enough)
    if not enough and alone is not None:
        _starve(worker, alone, short.least, another_saves)
    b.refused = b.refused + 1 if not enough and not worker.running else 0
    for sequence in worker.waiting if b.refused > MOST_REFUSED else ():
        if sequence.layout:  # what it keeps at other nodes may be all that others wait for
            worker.release(sequence.id)
            sequence.let_go()
            worker.needs[sequence.id] = need(sequence, worker.size, 0)
    if not enough and known and worker.going is not None and not worker.moves.busy:
        worker.until(b.ask_again)
    else:
        worker.cut()
        worker.begin()


def _starve(worker: Worker, alone: Request, least: int, another_saves: bool) -> None:
    """A request that waits alone was refused."""
    b, world = worker.borrower, worker.world
    b.starving = b.starving.after(alone.id, world.now)
    if b.starving.long(world.now) and not another_saves:
        for borrower, blocks in worker.lender.recall(least, world.now):
            world.stir(worker.id)
            world.worker(borrower).hear(worker.id, blocks)
    if alone.longest > world.capacity and (first := worker.sequences.get(alone.id)) in worker.waiting:
        assert first is not None
        worker.finish(first, worker.waiting)
        why = "the pool has become too small for this request since it was accepted"
        world.ended(worker, first, worker.firsts.pop(first.id, None), why)
