"""What a simulated worker tells the ledger with a heartbeat."""

from __future__ import annotations

from collections.abc import Mapping

from infinillm.core.layout import filled
from infinillm.core.ledger import Report
from infinillm.core.types import Layout, Node, SeqId
from infinillm.sim.worker import Worker


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
