"""The step loop with a model one can compute by hand: the next token is the sum of all tokens so far, modulo ten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infinillm.attention.store import Store
from infinillm.core.blocks import Blocks
from infinillm.core.cost import Cost
from infinillm.core.pace import MOST_REFUSED
from infinillm.core.request import Request, Sampling
from infinillm.core.scheduler import Budget, Shortage
from infinillm.core.types import AttentionShape, Refused, Span
from infinillm.engine import loop
from infinillm.engine.loop import Engine
from infinillm.engine.messages import Borrowed, Cancel, Output, Pass, Submit
from infinillm.errors import InfinillmError, Overloaded, Unavailable
from infinillm.kernels import reference
from infinillm.model.sampler import Choice
from infinillm.pool.borrow import Lenders
from infinillm.pool.lender import Lender
from infinillm.pool.memory import Memory
from infinillm.telemetry import Metrics
from tests.core.test_scheduler import computing

SHAPE = AttentionShape(1, 1, 8, 4, "float32", 1.0, (0,))


class Sum:
    """A runner whose model is addition."""

    def __init__(self) -> None:
        self.computed: list[tuple[str, int, int]] = []

    def settle(self):
        pass

    def run(self, chunks, sequences, attend):
        self.computed += chunks
        ends = [sequences[c.seq] for c in chunks if c.stop == sequences[c.seq].length]
        return {s.id: Choice(sum(s.tokens) % 10) for s in ends if s.request.sampling.max_tokens > s.produced}, {}


class Bench:
    """One engine, turned by hand."""

    def __init__(self, blocks: int = 8, tokens: int = 16, sequences: int = 4, cost: Cost | None = None):
        self.published: list[Output] = []
        self.wishes: list[tuple[Shortage, Request | None]] = []
        metrics = Metrics("worker", node="a")
        memory = Memory(Blocks("a", blocks, 4, blocks), Store(SHAPE, blocks, torch.device("cpu"), reference))
        lenders = Lenders("a", "a-1", memory, lanes=None, port_kind="", metrics=metrics)  # type: ignore[arg-type]
        self.runner, self.memory = Sum(), memory
        self.engine = Engine(
            "a",
            self.runner,  # type: ignore[arg-type]
            memory,
            lenders,
            Budget(tokens, sequences, 4),
            publish=self.published.extend,
            borrow=lambda *wish: self.wishes.append(wish),
            cost=cost,
            metrics=metrics,
        )

    def submit(
        self,
        id: str,
        prompt: list[int],
        eos: tuple[int, ...] = (),
        arrival: float = 0.0,
        already: tuple[int, ...] = (),
        **sampling: Any,
    ) -> None:
        wanted = Sampling(**{"temperature": 0.0, "max_tokens": 4, **sampling})
        self.engine.inbox.put(Submit(Request(id, tuple(prompt), wanted, arrival, eos, already=already)))

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.hear(block=False)
            self.engine.turn()

    def of(self, id: str) -> tuple[list[int], str]:
        mine = [o for o in self.published if o.id == id]
        for output in mine:
            if output.error is not None:
                raise output.error
        return [t for o in mine for t in o.tokens], mine[-1].finish_reason


def test_one_request_by_hand():
    b = Bench()
    b.submit("s", [1, 2, 3])
    b.turn(4)
    assert b.of("s") == ([6, 2, 4, 8], "length")
    assert b.runner.computed == [("s", 0, 3), ("s", 3, 4), ("s", 4, 5), ("s", 5, 6)]
    assert b.memory.blocks.room == 8


def test_one_request_is_passed_on_and_the_others_stay():
    b = Bench()
    b.submit("s", [1, 2, 3])
    b.submit("t", [1, 2, 3])
    b.turn(2)
    b.engine.inbox.put(Pass("s"))
    b.engine.inbox.put(Pass("nobody"))
    b.turn(2)
    assert (b.of("s"), b.of("t")) == (([6, 2], "moved"), ([6, 2, 4, 8], "length"))
    assert b.memory.blocks.room == 8


@pytest.mark.parametrize("sampling", [{}, {"min_tokens": 4, "stop_token_ids": (4,)}, {"stop_token_ids": (4,)}])
def test_a_request_goes_on_after_what_another_worker_produced(sampling: dict[str, Any]):
    whole = Bench()
    whole.submit("s", [1, 2, 3], **sampling)
    whole.turn(4)
    tokens, reason = whole.of("s")
    for count in range(1, len(tokens)):
        b = Bench()
        b.submit("s", [1, 2, 3], already=tuple(tokens[:count]), **sampling)
        b.turn(4)
        assert b.of("s") == (tokens[count:], reason)
        assert b.runner.computed[0] == ("s", 0, 3 + count)
        assert b.memory.blocks.room == 8


def test_a_long_prompt_is_computed_in_chunks_beside_a_decode():
    b = Bench(blocks=20)
    b.submit("d", [5])
    b.turn()
    b.submit("p", [1] * 30)
    b.turn(2)
    assert b.runner.computed[1:] == [("d", 1, 2), ("p", 0, 15), ("d", 2, 3), ("p", 15, 30)]


@pytest.mark.parametrize(
    ("sampling", "eos", "tokens", "reason", "stop"),
    [
        ({}, (2,), [6, 2], "stop", 2),
        ({"ignore_eos": True}, (2,), [6, 2, 4, 8], "length", None),
        ({"stop_token_ids": (4,)}, (), [6, 2, 4], "stop", 4),
        ({"min_tokens": 3, "stop_token_ids": (8,)}, (2,), [6, 2, 4, 8], "stop", 8),
        ({"max_tokens": 1}, (), [6], "length", None),
        ({"max_tokens": 0}, (), [], "length", None),
    ],
)
def test_why_a_request_ends(sampling, eos, tokens, reason, stop):
    b = Bench()
    b.submit("s", [1, 2, 3], eos, **sampling)
    b.turn(5)
    assert b.of("s") == (tokens, reason)
    assert b.published[-1].stop_token == stop
    assert b.memory.blocks.room == 8 and not b.engine.sequences


def test_a_cancelled_request_leaves_nothing():
    b = Bench()
    b.submit("s", [1, 2, 3])
    b.submit("w", [1] * 29, arrival=1.0)
    b.turn()
    for id in ("s", "w", "nobody"):
        b.engine.inbox.put(Cancel(id))
    b.turn()
    assert b.memory.blocks.room == 8 and not b.engine.sequences


def test_short_of_blocks_it_wishes_once_and_waits_for_the_answer():
    b = Bench(blocks=4)
    b.submit("s", [1] * 20)
    b.turn(3)
    ((short, alone),) = b.wishes
    assert (short, alone.id) == (Shortage(1, 2, 2, 0.0), "s") and b.runner.computed == []
    b.engine.inbox.put(Borrowed(Refused("nobody has any"), never="another"))
    b.turn()
    assert "s" in b.engine.sequences
    b.engine.inbox.put(Borrowed(Refused("nobody has any"), never="s"))
    b.turn()
    with pytest.raises(Unavailable, match="nobody has any"):
        b.of("s")


def test_a_refusal_that_may_pass_keeps_the_request_waiting():
    b = Bench(blocks=8)
    b.submit("one", [1] * 16)
    b.submit("two", [1] * 24, arrival=1.0)
    b.turn()
    b.engine.inbox.put(Borrowed(Refused("not now")))
    b.turn(8)
    assert b.of("one")[1] == "length" and b.of("two") == ([4, 8, 6, 2], "length")


def test_the_youngest_gives_way_when_borrowing_is_refused_and_comes_back():
    b = Bench(blocks=8)
    b.submit("old", [1] * 12, max_tokens=16)
    b.submit("young", [1] * 16, arrival=1.0, max_tokens=12)
    b.turn(3)
    b.engine.inbox.put(Borrowed(Refused("no")))
    b.turn(40)
    assert b.of("old")[1] == b.of("young")[1] == "length"
    assert len(b.of("young")[0]) == 12 and len(b.of("old")[0]) == 16
    alone = Bench(blocks=8)
    alone.submit("young", [1] * 16, max_tokens=12)
    alone.turn(12)
    assert alone.of("young") == b.of("young")
    assert 'infinillm_preemptions_total{node="a"} 1.0' in b.engine.metrics.exposition().decode()


def test_nobody_gives_way_while_waiting_is_cheaper_than_computing_again(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    b = Bench(blocks=8, cost=computing(16, 9.0))
    b.engine.lenders.accounts["b"] = Lender("b", "b:1", "b>a#1", 0)
    b.submit("old", [1] * 12, max_tokens=16)
    b.submit("young", [1] * 16, arrival=1.0, max_tokens=12)
    b.turn(3)
    assert b.wishes and b.engine.load.running == 2

    def refused(seconds: float) -> int:
        nonlocal now
        now += seconds
        b.engine.inbox.put(Borrowed(Refused("no")))
        b.turn(2)
        return b.engine.load.waiting

    assert [refused(0.0), refused(8.9), refused(0.1)] == [0, 0, 1]
    b.turn(40)
    assert len(b.of("old")[0]) - 4 == len(b.of("young")[0]) == 12


def test_stopping_fails_what_was_running_with_a_reason():
    b = Bench()
    b.submit("s", [1, 2, 3], max_tokens=1000)
    b.engine.start()
    b.engine.stop()
    with pytest.raises(Overloaded, match="shutting down"):
        b.of("s")
    assert b.memory.blocks.room == 8 and not b.engine.alive


def test_a_pass_that_raises_fails_its_requests_and_the_next_one_works():
    b = Bench()
    works, b.runner.run = b.runner.run, lambda *_: 1 / 0  # type: ignore[method-assign]
    b.submit("bad", [1, 2, 3])
    b.turn()
    b.runner.run = works  # type: ignore[method-assign]
    b.submit("good", [1, 2, 3])
    b.turn(4)
    with pytest.raises(InfinillmError, match="ZeroDivisionError"):
        b.of("bad")
    assert b.of("good") == ([6, 2, 4, 8], "length")
    assert b.memory.blocks.room == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_in_which_nothing_succeeds_ends_and_says_why():
    b = Bench()
    b.runner.run = lambda *_: 1 / 0  # type: ignore[method-assign]
    for name in ("one", "two", "three"):
        b.submit(name, [1, 2, 3])
        b.engine.start() if name == "one" else None
        while b.engine.alive and not any(o.id == name for o in b.published):
            b.engine._thread.join(0.01)
    b.engine._thread.join()
    for name in ("one", "two", "three"):
        with pytest.raises(InfinillmError, match="ZeroDivisionError"):
            b.of(name)
    assert not b.engine.alive and isinstance(b.engine.failure, ZeroDivisionError)


def test_where_a_request_is_and_was():
    b = Bench()
    b.submit("s", [1] * 6)
    b.turn()
    state, tokens, layout, holes, moving = b.engine.placement("s")
    assert (state, tokens, [(x.start, x.stop) for x in layout]) == ("running", 7, [(0, 7)])
    assert (holes, moving) == ((), ())
    b.turn(4)
    assert b.engine.placement("s")[0] == "finished" and b.engine.placement("nobody") is None


def test_a_number_that_is_not_finite_ends_one_request_and_not_its_neighbour():
    b = Bench()
    works = b.runner.run
    b.runner.run = lambda chunks, sequences, attend: (  # type: ignore[method-assign]
        {seq: choice for seq, choice in works(chunks, sequences, attend)[0].items() if seq != "bad"},
        {},
    )
    b.submit("bad", [1])
    b.submit("good", [1, 2, 3], arrival=1.0)
    b.turn(5)
    with pytest.raises(InfinillmError, match="not finite"):
        b.of("bad")
    assert b.of("good") == ([6, 2, 4, 8], "length")


def test_what_others_keep_for_a_request_that_waits_is_let_go_of_when_nobody_lends_for_long():
    """Two nodes whose waiting requests keep each other's blocks would else wait for ever."""
    b = Bench()
    kept = Span("b", 0, 8)
    sampling = Sampling(temperature=0.0, max_tokens=4)
    b.engine.inbox.put(Submit(Request("s", tuple([1] * 60), sampling, 0.0), shared=(kept,)))
    b.turn()
    sequence = b.engine.sequences["s"]
    for refused in range(MOST_REFUSED + 1):
        assert (sequence.layout, sequence.done) == ((kept,), ((0, 8),)), refused
        b.engine.inbox.put(Borrowed(Refused("nobody has room")))
        b.turn()
    assert (sequence.layout, sequence.done) == ((), ())
    assert b.engine.waiting == [sequence]
