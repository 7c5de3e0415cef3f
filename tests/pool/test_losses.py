"""Lenders that are lost, or answer nonsense: what they held is computed again, and only that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from infinillm.core.types import Span
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import LENGTH, OUTPUT, agree, decoder, truth

KINDS = ("shm", "tcp", "stream")


def counted(cluster: Cluster, name: str) -> float:
    lines = cluster.home.metrics.exposition().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"infinillm_{name}"))


def holes(cluster: Cluster) -> tuple[float, float, float]:
    """Positions lost, those computed again, and all that were computed beyond what one plain run computes."""
    computed = counted(cluster, "step_tokens_sum") - (LENGTH + OUTPUT - 1)
    return counted(cluster, "hole_tokens_total"), counted(cluster, "repaired_tokens_total"), computed


def begin(cluster: Cluster, **lent: int) -> None:
    """A sequence that lies at home and then with each lender, until it has produced a few tokens."""
    for node, blocks in lent.items():
        cluster.lend(node, blocks)
    cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0)
    while len(cluster.home.outputs) < 4:
        cluster.turn()
    layout = cluster.engine.sequences["s"].layout
    assert {span.node for span in layout} == {"a", *lent}


def cut(cluster: Cluster, node: str) -> None:
    """The lane to a lender is cut from outside, at both ends; the lender lives."""
    conversation = cluster.home.lenders.accounts[node].conversation
    assert conversation is not None
    conversation.port.close()


@pytest.mark.parametrize("kind", KINDS)
def test_two_lanes_that_are_cut_at_once(kind: str) -> None:
    """The first costs its lender; the other's conversation is opened again, as after any pass that failed."""
    with Cluster(decoder("llama"), {"a": 4, "b": 8, "c": 12, "d": 30}, port_kind=kind, patience=2.0) as cluster:
        begin(cluster, b=8, c=12)
        held = {span.node: min(span.stop, LENGTH + 4 - 1) - span.start for span in cluster.engine.sequences["s"].layout}
        cut(cluster, "b")
        cut(cluster, "c")
        agree(cluster.finish()["s"], truth("llama"))
        (lost,) = {held[node] for node in "bc" if node not in cluster.home.lenders.accounts}
        assert holes(cluster) == (lost, lost, lost)


@pytest.mark.parametrize("kind", KINDS)
def test_two_lenders_that_die_at_once(kind: str) -> None:
    """Both are noticed, one after the other; the tokens they held are counted as lost and as repaired."""
    blocks = {"a": 4, "b": 8, "c": 12, "d": 30}
    with Cluster(decoder("llama"), blocks, port_kind=kind, patience=2.0) as cluster:
        begin(cluster, b=8, c=12)
        cluster.kill("b")
        cluster.kill("c")
        agree(cluster.finish()["s"], truth("llama"))
        lost = LENGTH + 4 - 1 - 32  # all but what is at home; the last token produced is never stored
        assert holes(cluster) == (lost, lost, lost)
        cluster.settle()


def test_a_second_loss_while_the_first_hole_is_filled() -> None:
    """A hole is computed again in chunks; what was repaired and is lost again counts again."""
    with Cluster(decoder("llama"), {"a": 4, "b": 20, "c": 25, "d": 30}, patience=2.0, step_tokens=16) as cluster:
        begin(cluster, b=20)
        cluster.kill("b")
        while not counted(cluster, "repaired_tokens_total"):
            cluster.turn()
        lost, first = LENGTH + 4 - 1 - 32, counted(cluster, "repaired_tokens_total")
        assert counted(cluster, "hole_tokens_total") == lost > first == 16
        (again,) = {span.node for span in cluster.engine.sequences["s"].layout} - {"a"}
        cut(cluster, again)
        agree(cluster.finish()["s"], truth("llama"))
        assert holes(cluster) == (lost + first, lost + first, lost + first)


def test_what_a_preempted_sequence_computes_again_is_no_repair() -> None:
    with Cluster(decoder("llama"), {"a": 4, "b": 20, "c": 30}, patience=2.0, step_tokens=16) as cluster:
        begin(cluster, b=20)
        cut(cluster, "b")
        while not counted(cluster, "hole_tokens_total"):
            cluster.turn()
        with cluster.home.memory.lock, cluster.home.lenders.lock:
            for sequence in list(cluster.engine.running):
                cluster.engine._preempt(sequence)
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "hole_tokens_total") > 0 == counted(cluster, "repaired_tokens_total")


# --- nonsense ---------------------------------------------------------------------------------------------------------


def a_number(what: float, index: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """One element of o (0) or lse (1) is `what`."""

    def spoil(said: list[Tensor]) -> list[Tensor]:
        said = [tensor.clone() for tensor in said]
        said[index].view(-1)[-1] = what
        return said

    return spoil


def noise(said: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    drawn = [torch.randint(0, 256, (tensor.nbytes,), generator=draw, dtype=torch.uint8) for tensor in said]
    return [bits.view(tensor.dtype).view(tensor.shape) for bits, tensor in zip(drawn, said, strict=True)]


NONSENSE: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "o is NaN": a_number(float("nan"), 0),
    "o is infinite": a_number(float("-inf"), 0),
    "lse is NaN": a_number(float("nan"), 1),
    "lse is infinite": a_number(float("inf"), 1),
    "random bytes": noise,
    "too much": lambda said: [*said, torch.zeros(3)],
}


@contextmanager
def lying(cluster: Cluster, node: str, lie: Callable[[list[Tensor]], list[Tensor]]) -> Iterator[list[int]]:
    """The answers of a node from the second on are not what they should be; gives how many there were."""
    (talk,) = cluster.peers[node].service.conversations.values()
    assert talk.port is not None
    port, send, said = talk.port, talk.port.send, [0]

    def spoilt(tensors: Any) -> None:
        said[0] += 1
        send(lie(list(tensors)) if said[0] > 1 else tensors)

    port.send = spoilt  # type: ignore[method-assign]
    yield said
    assert said[0] > 1, "nobody asked"


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("lie", NONSENSE.values(), ids=NONSENSE)
def test_a_lender_that_answers_nonsense_is_lost(kind: str, lie: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """What it held is computed again elsewhere, and it is not asked for memory again, though it offers the most."""
    with Cluster(decoder("llama"), {"a": 10, "b": 40, "c": 20}, port_kind=kind, patience=0.5) as cluster:
        begin(cluster, b=13)
        lost = LENGTH + 3 - 80
        with lying(cluster, "b", lie):
            agree(cluster.finish()["s"], truth("llama"))
        assert holes(cluster) == (lost, lost, lost)
        assert cluster.engine.finished["s"][1] == (Span("a", 0, 80), Span("c", 80, LENGTH + OUTPUT - 1))


def test_a_lender_that_answers_too_little_is_lost_when_patience_ends() -> None:
    with Cluster(decoder("llama"), {"a": 10, "b": 40, "c": 20}, port_kind="tcp", patience=0.5) as cluster:
        begin(cluster, b=13)
        lost = LENGTH + 3 - 80
        with lying(cluster, "b", lambda said: [said[0].view(-1)[1:], *said[1:]]):
            agree(cluster.finish()["s"], truth("llama"))
        assert holes(cluster) == (lost, lost, lost)


def test_numbers_that_are_not_finite_because_the_question_was_not_are_nobodys_fault() -> None:
    with Cluster(decoder("llama"), {"a": 10, "b": 20}) as cluster:
        begin(cluster, b=13)
        whole = cluster.engine.runner.decoder.forward

        def overflow(tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
            return whole(tokens, positions, lambda layer, q, k, v: attend(layer, q * float("nan"), k, v))

        cluster.engine.runner.decoder.forward = overflow  # type: ignore[method-assign]
        try:
            (*_, last) = cluster.finish()["s"]
        finally:
            del cluster.engine.runner.decoder.forward
        assert last.error is not None and "not finite" in last.error.message
        assert counted(cluster, "hole_tokens_total") == 0 and not cluster.home.lenders.doubted
        cluster.settle()
