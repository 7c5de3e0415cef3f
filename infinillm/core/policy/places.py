"""Which nodes are too far to lend: those of other places where asking costs a node more than waiting."""

from __future__ import annotations

from dataclasses import replace

from infinillm.core.cost import Cost, Costs
from infinillm.core.policy.site import Site, site_of
from infinillm.core.policy.tiers import STEPS
from infinillm.core.types import Ledger, NodeId


def too_far(ledger: Ledger, costs: Costs, node: NodeId, block_size: int) -> frozenset[NodeId]:
    """Nodes of other places on which a request that fits `node` had better not lie: it waits for room at home.

    One request more brings a token a step; a step that asks for its K/V over a slow way keeps all the others waiting.
    Where the model says that fewer tokens a second come of it, the node is too far. One that waits sends all of its
    prompt there besides, while the others stand still: that has to pay within `STEPS` steps, as nobody knows how many
    it has. None is too far where nobody measured.
    """
    home = ledger.nodes.get(node)
    if home is None or not home.running or costs.of(node) is None:
        return frozenset()
    site = site_of(ledger, home, costs, block_size)
    prompt = site.each * block_size if site.waiting else 0
    site = replace(site, waiting=0)
    before, tokens = site.rate(block_size), home.used * block_size // home.running
    found: dict[NodeId, bool] = {}
    alike: dict[int, bool] = {}  # by the way: nodes at the end of equal ways that lend nothing yet

    def slower(here: Site, lender: NodeId, way: Cost) -> bool:
        if prompt and (way.question(prompt) + way.move(prompt)) * before > STEPS:
            return True
        return _with_one_more(here, lender, tokens).rate(block_size) < before

    for other in ledger.nodes.values():
        way = costs.between(home, other)
        if other.place == home.place or way is None:
            continue
        if other.id in site.away:
            found[other.id] = slower(site, other.id, way)
            continue
        if id(way) not in alike:
            there = replace(site, away={**site.away, other.id: (way, frozenset(), 0)})
            alike[id(way)] = slower(there, other.id, way)
        found[other.id] = alike[id(way)]
    return frozenset(name for name, far in found.items() if far)


def _with_one_more(site: Site, lender: NodeId, tokens: int) -> Site:
    """The node with one more request, all of whose tokens lie at the lender."""
    way, seqs, there = site.away[lender]
    return replace(
        site, running=site.running + 1, away={**site.away, lender: (way, seqs | {"one more"}, there + tokens)}
    )
