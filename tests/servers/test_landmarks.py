"""The controller hears of landmarks, and sends requests near them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from infinillm import rpc
from infinillm.core.ledger import Report
from infinillm.protos import controller_pb2 as pb
from tests.servers.test_controller import SOON, Member, World, living, node


@pytest.mark.parametrize("policy", ["pooled", "isolated"])
def test_requests_go_where_their_landmarks_are_and_hear_who_else_has_some(policy: str) -> None:
    async def test(world: World, client: rpc.Client) -> None:
        for name, marks in (("a", {1, 2, 3}), ("b", {2}), ("c", set[int]())):
            Member(world, Report(node(name), marks=frozenset(marks)))
        await world.settled()

        async def asked(*marks: int) -> tuple[str, list[str]]:
            request = pb.RouteRequest(prompt_tokens=400, longest_tokens=500, marks=marks)
            answer = await client.Route(request, timeout=SOON)
            return answer.node, [holder.node for holder in answer.holders]

        assert await asked(1, 2, 3) == ("a", ["b"] if policy == "pooled" else [])
        assert (await asked(7))[1] == []
        gone = world.members[0]
        gone.report = replace(gone.report, marks=frozenset({3}))
        until = asyncio.get_running_loop().time() + SOON
        while (found := await asked(2)) != ("b", []) and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
        assert found == ("b", [])

    living(test, policy)
