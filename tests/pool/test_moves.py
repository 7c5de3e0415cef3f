"""Live moves: wherever blocks of running sequences go between two steps, greedy output stays that of a plain pass."""

from __future__ import annotations

import random
from typing import Any

import pytest

from infinillm.core.moves import place
from infinillm.core.types import Grow, Move, Plan, Refused, Span, Stretch
from infinillm.engine.messages import MoveBlocks
from infinillm.errors import Broken
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import LENGTH, OUTPUT, agree, decoder, truth

SIZE = 8


def wish(cluster: Cluster, source: str, target: str, first: int, blocks: int = 1, seq: str = "s") -> None:
    cluster.engine.moves.wish(Move(seq, source, target, first, blocks), "a test")


def stir(cluster: Cluster, draw: random.Random, blocks: int = 2) -> None:
    """Wish that some computed blocks of every running sequence lie elsewhere."""
    nodes = list(cluster.peers)
    for sequence in cluster.engine.running:
        firsts = [at for a, b in sequence.done for at in range(-(-a // SIZE) * SIZE, b - SIZE + 1, SIZE)]
        for first in draw.sample(firsts, min(blocks, len(firsts))):
            source = place(sequence.layout, first)
            assert source is not None
            wish(cluster, source, draw.choice([node for node in nodes if node != source]), first, seq=sequence.id)


def start(cluster: Cluster, tokens: int = 3, **sampling: Any) -> None:
    """A sequence of LENGTH tokens, until it has produced a few."""
    before = len(cluster.home.outputs)
    cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0, **sampling)
    while len(cluster.home.outputs) < before + tokens:
        cluster.turn()


def layout(cluster: Cluster) -> tuple[Span, ...]:
    return cluster.engine.sequences["s"].layout


def books(cluster: Cluster) -> Any:
    """What every node holds of every sequence, and what home believes."""
    for peer in cluster.peers.values():
        peer.memory.blocks.check()
    held = {
        (id, owner, seq): (holding.firsts, holding.blocks)
        for id, peer in cluster.peers.items()
        for (owner, seq), holding in (*peer.memory.blocks._holdings.items(), *peer.memory.blocks._staged.items())
    }
    return held, {node: lender.held for node, lender in cluster.home.lenders.accounts.items()}, layout(cluster)


def agreed(cluster: Cluster) -> bool:
    """Every node holds exactly what the layout says."""
    for id, peer in cluster.peers.items():
        holding = peer.memory.blocks.holding("s", "" if peer is cluster.home else "a")
        says = [at for span in layout(cluster) if span.node == id for at in range(span.start, span.stop, SIZE)]
        if (holding.firsts if holding else []) != says:
            return False
    return True


def counted(cluster: Cluster, name: str) -> float:
    lines = cluster.home.metrics.exposition().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def moved(cluster: Cluster, direction: str) -> float:
    return counted(cluster, f'infinillm_moved_tokens_total{{direction="{direction}"')


@pytest.mark.parametrize("kind", ["local", "shm", "tcp", "stream", "collective"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_step_moves_blocks_of_every_running_sequence_and_no_token_changes(name, kind):
    draw = random.Random(f"{name} {kind}")
    lengths = {"s": (LENGTH, 1), "t": (70, 2), "u": (21, 3)}
    with Cluster(decoder(name), {"a": 40, "b": 40, "c": 40}, port_kind=kind, step_tokens=48) as cluster:
        cluster.lend("b", 30)
        cluster.lend("c", 30)
        for arrival, (id, (length, seed)) in enumerate(lengths.items()):
            cluster.submit(tiny.prompt(length, seed), id=id, arrival=float(arrival), max_tokens=OUTPUT, logprobs=0)
        found: dict[str, list] = {}
        cluster.engine.hear(block=False)
        while cluster.engine.sequences:
            stir(cluster, draw)
            cluster.turn()
            for peer in cluster.peers.values():
                with peer.memory.lock:
                    peer.memory.blocks.check()
        for output in cluster.home.outputs:
            found.setdefault(output.id, []).append(output)
        for id, (length, seed) in lengths.items():
            agree(found[id], truth(name, length, OUTPUT, seed))
        assert moved(cluster, "home") > 200 and moved(cluster, "away") > 200
        assert 'infinillm_step_tokens_sum{node="a"} ' + str(
            float(sum(n + OUTPUT - 1 for n, _ in lengths.values()))
        ) in (cluster.home.metrics.exposition().decode())
        cluster.settle()


def test_conversations_that_break_between_steps_are_mended_and_nothing_is_computed_twice():
    draw = random.Random(7)
    with Cluster(decoder("llama"), {"a": 30, "b": 30, "c": 30}, port_kind="local") as cluster:
        cluster.lend("b", 25)
        cluster.lend("c", 25)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0)
        cluster.engine.hear(block=False)
        while cluster.engine.sequences:
            stir(cluster, draw, blocks=3)
            cluster.turn()
            cluster.home.lenders.reset(draw.sample(["b", "c"], draw.randrange(3)))
        agree(cluster.home.outputs, truth("llama"))
        assert counted(cluster, "infinillm_step_tokens_sum") == LENGTH + OUTPUT - 1
        cluster.settle()


def test_a_move_takes_one_step_and_its_source_is_free_after_the_next():
    with Cluster(decoder("llama"), {"a": 30, "b": 10}, port_kind="local") as cluster:
        cluster.lend("b", 10)
        start(cluster)
        cluster.engine.inbox.put(MoveBlocks("a", "s", "a", "b", 3, "a test"))
        cluster.turn()
        assert layout(cluster) == (Span("b", 0, 24), Span("a", 24, 160)) and agreed(cluster)
        cluster.engine.inbox.put(MoveBlocks("a", "s", "b", "a", 1, "a test"))
        cluster.turn()
        assert layout(cluster) == (Span("a", 0, 8), Span("b", 8, 24), Span("a", 24, 160))
        assert not agreed(cluster)  # b has not heard yet that it may let go
        assert cluster.home.lenders.room() == {"b": 8}
        cluster.turn()
        assert agreed(cluster) and (moved(cluster, "away"), moved(cluster, "home")) == (24, 8)
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


def test_an_order_takes_the_place_of_an_earlier_one_like_it():
    with Cluster(decoder("llama"), {"a": 30, "b": 20}, port_kind="local", moves=8) as cluster:
        cluster.lend("b", 15)
        start(cluster)
        for blocks in (8, 3):
            cluster.engine.inbox.put(MoveBlocks("a", "s", "a", "b", blocks, "a test"))
            cluster.turn()
        agree(cluster.finish()["s"], truth("llama"))
        assert moved(cluster, "away") == (1 + 3) * SIZE
        cluster.settle()


def test_the_budget_bounds_what_moves_beside_one_step():
    with Cluster(decoder("llama"), {"a": 30, "b": 30}, port_kind="local", moves=12) as cluster:
        cluster.lend("b", 20)
        start(cluster)
        wish(cluster, "a", "b", 0, 5)
        for tokens in (16, 32, 40, 40):  # 12 tokens are two blocks
            cluster.turn()
            assert moved(cluster, "away") == tokens
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


def test_from_lender_to_lender_by_way_of_home():
    with Cluster(decoder("llama"), {"a": 21, "b": 5, "c": 5}, port_kind="local", moves=8) as cluster:
        cluster.lend("b", 3)
        cluster.lend("c", 3)
        start(cluster)
        wish(cluster, "a", "b", 0, 2)
        for _ in range(3):
            cluster.turn()
        wish(cluster, "b", "c", 0, 2)
        ways = []
        for _ in range(5):
            cluster.turn()
            ways.append("".join(place(layout(cluster), at) or "-" for at in (0, 8)))
        assert ways == ["ab", "cb", "ca", "cc", "cc"] and agreed(cluster)
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


def test_a_wish_that_cannot_be_changes_nothing():
    with Cluster(decoder("llama"), {"a": 30, "b": 10}, port_kind="local") as cluster:
        cluster.lend("b", 2)
        start(cluster, 4)
        wish(cluster, "a", "b", 0, 2)
        cluster.turn()
        before = books(cluster)
        wish(cluster, "a", "b", 16, 1)  # there is no room
        wish(cluster, "a", "nobody", 16, 1)
        wish(cluster, "a", "a", 16, 1)
        wish(cluster, "b", "a", 16, 1)  # it is not there
        wish(cluster, "a", "b", 152, 1)  # it is not full
        wish(cluster, "a", "b", 16, 1, seq="unknown")
        cluster.turn()
        assert books(cluster) == before and not cluster.engine.moves.wishes
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("source", "target", "first"), [("a", "b", 0), ("b", "a", 80), ("b", "c", 80), ("a", "c", 0)])
def test_a_node_lost_in_the_middle_of_a_move(source, target, first, layer):
    """What was on its way is dropped at both ends, the sequence is where it was, and only the lost hole is computed."""
    with Cluster(decoder("llama"), {"a": 14, "b": 20, "c": 10}, port_kind="tcp", patience=5.0) as cluster:
        cluster.home.memory.blocks.grow("somebody", 0, 4)
        cluster.lend("b", 8)
        cluster.lend("c", 5)
        start(cluster, 4)
        assert layout(cluster) == (Span("a", 0, 80), Span("b", 80, 144), Span("c", 144, 160))
        cluster.home.memory.blocks.release("somebody")
        cluster.lend("b", 4)
        before = books(cluster)[0]
        port = cluster.home.lenders.accounts["c"].conversation.port  # type: ignore[union-attr]
        sends, send = iter(range(99)), port.send

        def dying(tensors: Any) -> None:
            if next(sends) == layer:
                cluster.kill("c")
            send(tensors)

        port.send = dying  # type: ignore[method-assign]
        wish(cluster, source, target, first, 2)
        cluster.turn()
        assert "c" not in cluster.peers and layout(cluster) == (Span("a", 0, 80), Span("b", 80, 144))
        assert {key: held for key, held in books(cluster)[0].items() if key[0] == "a"} == {
            ("a", "", "s"): before["a", "", "s"]
        }
        cluster.turn()
        assert agreed(cluster) and not cluster.peers["b"].memory.blocks.staged("s", "a")
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "infinillm_step_tokens_sum") == LENGTH + OUTPUT - 1 + 153 - 144
        assert moved(cluster, "away") == moved(cluster, "home") == 0
        cluster.settle()


def test_a_pass_that_raises_drops_what_was_on_its_way():
    with Cluster(decoder("llama"), {"a": 30, "b": 10}, port_kind="local") as cluster:
        cluster.lend("b", 8)
        start(cluster)
        wish(cluster, "a", "b", 0, 2)
        run = cluster.engine.runner.run
        cluster.engine.runner.run = lambda *_: 1 / 0  # type: ignore[method-assign]
        cluster.turn()
        cluster.engine.runner.run = run  # type: ignore[method-assign]
        assert cluster.home.memory.blocks.room == 30 and cluster.home.lenders.room() == {"b": 8}
        assert not cluster.engine.moves.now
        cluster.home.outputs.clear()
        cluster.submit(tiny.prompt(LENGTH), id="t", max_tokens=OUTPUT, logprobs=0)
        agree(cluster.finish()["t"], truth("llama"))
        cluster.settle()


def test_a_shared_prefix_moves_away_for_one_and_stays_for_the_others():
    with Cluster(decoder("qwen3"), {"a": 60, "b": 30}, port_kind="local") as cluster:
        cluster.lend("b", 20)
        for id in "st":
            start(cluster, 3, id=id)
        assert cluster.home.outputs[-1].cached == 144
        shared = list(cluster.home.memory.blocks.holding("s").blocks)  # type: ignore[union-attr]
        cluster.engine.inbox.put(MoveBlocks("a", "t", "a", "b", 12, "a test"))
        for _ in range(3):
            cluster.turn()
        assert cluster.engine.sequences["t"].layout[0] == Span("b", 0, 96)
        assert cluster.home.memory.blocks.holding("s").blocks[:19] == shared[:19]  # type: ignore[union-attr]
        cluster.submit(tiny.prompt(LENGTH), id="u", max_tokens=OUTPUT, logprobs=0)
        got = cluster.finish()
        for id in "stu":
            agree(got[id], truth("qwen3"))
        assert got["u"][0].cached == 144
        cluster.settle()


def test_a_prompt_that_came_home_is_found_there_by_the_next():
    with Cluster(decoder("llama"), {"a": 30, "b": 30}, port_kind="local") as cluster:
        cluster.home.memory.blocks.grow("somebody", 0, 28)
        cluster.lend("b", 28)
        start(cluster)
        cluster.home.memory.blocks.release("somebody")
        cluster.engine.inbox.put(MoveBlocks("a", "s", "b", "a", 16, "a test"))
        agree(cluster.finish()["s"], truth("llama"))
        cluster.submit(tiny.prompt(LENGTH), id="t", max_tokens=OUTPUT, logprobs=0)
        got = cluster.finish()["t"]
        agree(got, truth("llama"))
        assert got[0].cached == 144
        cluster.settle()


def test_a_lender_believes_no_plan():
    """Blocks that are not there, too many, or here already: the books stay as they were."""
    with Cluster(decoder("llama"), {"b": 8}) as cluster:
        memory = cluster.home.memory
        memory.blocks.lend("x", 4, 1e12, "1")
        memory.accept(Plan(1, (Grow("s", "", 0, 2),), ()), "x")

        def refused(**what: tuple[Stretch, ...]) -> bool:
            return isinstance(memory.accept(Plan(2, (), (), **what), "x"), Refused)

        assert refused(leave=(Stretch("s", 8, 2),)) and refused(leave=(Stretch("t", 0, 1),))
        assert refused(leave=(Stretch("s", 0, 2**32 - 1),)) and refused(take=(Stretch("s", 16, 2**32 - 1),))
        assert refused(take=(Stretch("s", 16, 3),)) and refused(take=(Stretch("s", 8, 2),))
        assert refused(give=(Stretch("s", 0, 2),) * 13)
        for stretch in (Stretch("s", 8, 2), Stretch("t", 0, 1), Stretch("s", 0, 2**32 - 1), Stretch("s", 4, 1)):
            for owner, staged in (("x", False), ("x", True), ("", False)):
                with pytest.raises(Broken):
                    memory.found([stretch], owner, staged=staged)
        assert memory.blocks.loans["x"].used == 2
        memory.blocks.check()
        memory.blocks.give_back("x")
