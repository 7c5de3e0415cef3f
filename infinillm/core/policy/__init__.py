"""Policies: pure functions of the ledger, bound into one value each and chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from infinillm.core.cost import Costs
from infinillm.core.policy import isolated, pooled, proactive
from infinillm.core.policy.orders import MoveBlocks, Offers
from infinillm.core.types import Ledger, NodeId, Refused
from infinillm.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Policy:
    """
    route      (ledger, prompt_tokens, longest_tokens, block_size, exclude): the node to serve a request
    reach      (ledger, node, block_size): tokens of the longest sequence a node could come to hold
    capacity   (ledger, block_size): tokens of the longest request, prompt and output, that the nodes of now can hold
    creditors  (ledger, node, blocks, exclude, outgrown): who can lend to a node short of blocks, and how many, best
               first; `outgrown`: for a request that the node cannot hold alone
    plan       (ledger, costs, block_size): what to order without being asked
    shares     whether a request may use what another node has of it
    saves      whether a node may keep less than an outgrown request needs, until it has enough
    """

    name: str
    route: Callable[[Ledger, int, int, int, Collection[NodeId]], NodeId | Refused]
    reach: Callable[[Ledger, NodeId, int], int]
    capacity: Callable[[Ledger, int], int]
    creditors: Callable[[Ledger, NodeId, int, Collection[NodeId], bool], Offers | Refused]
    plan: Callable[[Ledger, Costs, int], tuple[MoveBlocks, ...]]
    shares: bool
    saves: bool


POLICIES = {
    p.NAME: Policy(p.NAME, p.route, p.reach, p.capacity, p.creditors, p.plan, p.SHARES, p.SAVES)
    for p in (isolated, pooled, proactive)
}


def named(name: str) -> Policy:
    """The policy of that name. Raises BadRequest."""
    if name not in POLICIES:
        raise BadRequest(f"policy must be one of {', '.join(POLICIES)}, not {name!r}", field="policy")
    return POLICIES[name]
