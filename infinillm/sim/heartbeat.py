"""With a heartbeat a simulated worker gives back what it does not use, and tells the ledger what it knows."""

from __future__ import annotations

from collections.abc import Mapping

from infinillm.core.layout import filled
from infinillm.core.ledger import Report
from infinillm.core.types import Layout, Node, SeqId
from infinillm.sim.worker import Worker


def tidy(worker: Worker) -> None:
    """Give back what no sequence has used for a while, and end the loans of those who return nothing."""
    worker.settle()
    for lender, blocks in worker.borrower.spare():
        worker.cut()
        lender.give_back(worker.id, blocks)
    for borrower in worker.lender.late(worker.world.now):
        worker.world.worker(borrower).lose(worker.id)
        worker.give_back(borrower, None)


def quiet(worker: Worker) -> bool:
    """Whether nothing can change here but from outside."""
    return not (worker.sequences or worker.borrower.accounts or worker.blocks.loans or worker.lender.claims.recalls)


def calm(worker: Worker) -> bool:
    """Whether nothing that it tells changes before something stirs it, be it the end of the step in hand."""
    steady = worker.going is None or worker.going.times == 1
    return steady and not worker.lender.claims.recalls and worker.borrower.calm


def report(worker: Worker, layouts: Mapping[SeqId, Layout] | None) -> Report:
    """All that it knows; where the ledger is to keep the `layouts` it has, these."""
    b = worker.blocks
    node = Node(
        worker.id,
        str(worker.start),
        worker.address,
        blocks=b.count,
        lendable=b.lendable,
        used=b.used,
        cached=min(b.cached, b.room),
        lent=b.lent,
        borrowed=worker.borrower.blocks,
        running=len(worker.running),
        waiting=len(worker.waiting),
        wanted=sum(worker.needs.values()),
    )
    if layouts is None:
        layouts = {s.id: filled(s.layout, s.length) for s in worker.running}
    return Report(node, worker.lender.told(), layouts, frozenset(b.marks))
