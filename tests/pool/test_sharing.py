"""What one node computed is used by others where it lies: nobody computes it again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from infinillm.core.names import prefix_hashes
from infinillm.core.request import Request, Sampling
from infinillm.core.types import Layout, Span
from infinillm.engine.messages import Cancel, HandOver, Submit
from infinillm.pool.find import find, kept_or_released
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import LENGTH, OUTPUT, PORTS, agree, decoder, truth

SIZE = 8
FULL = (LENGTH - 1) // SIZE * SIZE  # tokens of the prompt that others may have


def found(cluster: Cluster, holders: Cluster, nodes: str, prompt: list[int], seq: str = "s", salt: str = "") -> Layout:
    """What these nodes of another cluster keep for a sequence of ours."""
    names = prefix_hashes(prompt, SIZE, salt)[: (len(prompt) - 1) // SIZE]
    asked = [(node, holders.peers[node].address if node in holders.peers else "127.0.0.1:1") for node in nodes]
    return cluster.wait(find(cluster.home.lenders, seq, names, 0, asked))


def submit(cluster: Cluster, shared: Layout, already: list[int], *, copy: bool = False) -> None:
    wanted = Sampling(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, logprobs=0)
    cluster.engine.inbox.put(
        Submit(Request("s", tuple(tiny.prompt(LENGTH)), wanted, already=tuple(already)), (), shared, copy)
    )


def count(cluster: Cluster) -> list[int]:
    """Grows by the tokens of every step from now on."""
    computed: list[int] = []
    run = cluster.engine.runner.run

    def counting(chunks: Any, *rest: Any) -> Any:
        computed.extend(chunk.stop - chunk.start for chunk in chunks)
        return run(chunks, *rest)

    cluster.engine.runner.run = counting  # type: ignore[method-assign]
    return computed


def one(blocks: int = 40, **options: Any) -> Cluster:
    return Cluster(decoder("llama"), {"z": blocks}, block_size=SIZE, **options)


@pytest.mark.parametrize("kind", [kind for kind in PORTS if kind not in ("local", "collective")])
def test_a_prefix_is_used_where_it_lies(kind):
    with Cluster(decoder("llama"), {"a": 40}, port_kind=kind) as first, one(port_kind=kind) as second:
        first.generate(tiny.prompt(LENGTH))
        there = found(second, first, "a", tiny.prompt(LENGTH))
        assert there == (Span("a", 0, FULL),)
        computed = count(second)
        submit(second, there, [])
        agree(second.finish()["s"], truth("llama"))
        assert sum(computed) == LENGTH - FULL + OUTPUT - 1
        second.settle()
        first.settle()


def test_a_salt_and_another_prompt_share_nothing():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        assert found(second, first, "a", tiny.prompt(LENGTH), salt="other") == ()
        assert found(second, first, "a", tiny.prompt(LENGTH, 2)) == ()
        assert found(second, first, "q", tiny.prompt(LENGTH)) == ()  # nobody is there
        second.settle()


def test_what_is_shared_stays_while_its_node_is_short_of_memory_and_goes_afterwards():
    with Cluster(decoder("llama"), {"a": 32}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        there = found(second, first, "a", tiny.prompt(LENGTH))
        submit(second, there, [])
        while not second.home.outputs:
            second.turn()
        for seed in range(2, 5):  # each takes what is left
            want = truth("llama", 60, 8, seed)[0]
            assert first.generate(tiny.prompt(60, seed), max_tokens=8) == want
        agree(second.finish()["s"], truth("llama"))
        second.settle()
        first.settle()
        assert first.home.memory.blocks.used == 0


def test_a_holder_that_is_lost_is_a_hole():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        submit(second, found(second, first, "a", tiny.prompt(LENGTH)), [])
        while len(second.home.outputs) < 5:
            second.turn()
        first.kill("a")
        computed = count(second)
        agree(second.finish()["s"], truth("llama"))
        assert sum(computed) == FULL + OUTPUT - 5 + 1  # the pass that failed had one token
        second.settle()


def test_a_holder_that_is_lost_before_its_request_began_is_a_hole():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        submit(second, found(second, first, "a", tiny.prompt(LENGTH)), [])
        first.kill("a")
        agree(second.finish()["s"], truth("llama"))
        second.settle()


def test_whoever_goes_on_with_a_lost_request_computes_only_what_was_lost():
    """Home a dies; b and c keep what they hold of its sequence, and z uses it there: named by content, not by owner."""
    want = truth("llama")[0]
    first = Cluster(decoder("llama"), {"a": 6, "b": 8, "c": 16}, block_size=SIZE)
    with first, one(8) as second:
        first.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        while len(first.home.outputs) < 12:
            first.turn()
        layout = first.engine.sequences["s"].layout
        assert layout[0].node == "a" and {span.node for span in layout[1:]} == {"b", "c"}
        already = want[:12]
        first.wait(first.peers["a"].server.stop(0.0))  # nobody says goodbye
        there = found(second, first, "bc", tiny.prompt(LENGTH) + already)
        tail = (LENGTH + 12 - 1) // SIZE * SIZE
        assert there == (*layout[1:-1], replace(layout[-1], stop=tail))
        computed = count(second)
        submit(second, there, already)
        outputs = second.finish()["s"]
        assert [token for output in outputs for token in output.tokens] == want[12:]
        assert sum(computed) == layout[0].stop + (LENGTH + 12 - tail) + OUTPUT - 12 - 1
        second.settle()
        first.engine.inbox.put(Cancel("s"))
        first.engine.hear(block=False)


def test_what_is_used_often_can_be_brought_home_and_stays_where_it_was_too():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        submit(second, found(second, first, "a", tiny.prompt(LENGTH)), [], copy=True)
        agree(second.finish()["s"], truth("llama"))
        second.settle()
        names = prefix_hashes(tiny.prompt(LENGTH), SIZE)
        for cluster in (first, second):
            assert len(cluster.home.memory.blocks.match("s", names)[0]) == FULL // SIZE


def test_a_node_that_ends_shares_still_and_what_it_shares_comes_home():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        first.loop.call_soon_threadsafe(first.home.service.end)
        submit(second, found(second, first, "a", tiny.prompt(LENGTH)), [])
        while not second.home.outputs:
            second.turn()
        while any(span.node == "a" for span in second.engine.sequences["s"].layout):
            second.turn()
        computed = count(second)
        agree(second.finish()["s"], truth("llama"))
        assert set(computed) == {1}
        second.settle()
        first.settle()


def test_requests_are_handed_over_with_all_they_have():
    """Those that run, those that wait and those that come later end here at once, and go on elsewhere."""
    want = truth("llama")[0]
    with Cluster(decoder("llama"), {"a": 40}, sequences=1) as first, one() as second:
        first.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        first.submit(tiny.prompt(LENGTH, 2), "waits", max_tokens=OUTPUT)
        while len(first.home.outputs) < 9:
            first.turn()
        first.engine.inbox.put(HandOver(waiting=True))
        first.engine.hear(block=False)
        assert [(o.id, o.finish_reason) for o in first.home.outputs if o.finish_reason] == [("waits", "moved")]
        first.engine.inbox.put(HandOver(waiting=False))
        first.submit(tiny.prompt(LENGTH, 3), "late", max_tokens=OUTPUT)
        assert [each.finish_reason for each in first.finish()["late"]] == ["moved"]
        already = want[:9]
        submit(second, found(second, first, "a", tiny.prompt(LENGTH) + already), already)
        computed = count(second)
        assert [token for output in second.finish()["s"] for token in output.tokens] == want[9:]
        assert computed[0] <= SIZE, "what is not a whole block yet is computed again, and that is all"
        second.settle()
        first.settle()


def test_nobody_waits_for_what_is_found_and_it_is_let_go():
    with Cluster(decoder("llama"), {"a": 40}) as first, one() as second:
        first.generate(tiny.prompt(LENGTH))
        lenders = second.home.lenders
        found(second, first, "a", tiny.prompt(LENGTH), seq="other")
        names = prefix_hashes(tiny.prompt(LENGTH), SIZE)

        async def leave() -> None:
            finding = asyncio.create_task(find(lenders, "s", names, 0, [("a", first.home.address)]))
            waiting = asyncio.create_task(kept_or_released(lenders, "s", finding))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await finding
            await asyncio.sleep(0)

        second.wait(leave())
        assert set(lenders.accounts["a"].held) == {"other"}
        lenders.release("other")
        second.settle()
        first.settle()
