"""Many steps at a time: the same steps, and the same blocks in the same places, as the scheduler has one by one."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from infinillm.core.coast import coast, fits
from infinillm.core.layout import grown
from infinillm.core.request import Sampling, Sequence, add
from infinillm.core.scheduler import NO_MATCH, Budget, Here, schedule
from infinillm.core.types import Grow, Span
from tests.core.test_scheduler import SIZE, running

NODES = ("home", "a", "b", "c")


@st.composite
def batches(draw: st.DrawFn) -> list[Sequence]:
    found = []
    for n in range(draw(st.integers(1, 6))):
        length, spare = draw(st.integers(1, 40)), draw(st.integers(0, 2))
        s = running(f"s{n}", length, length - 1)
        s.request = type(s.request)(
            s.id, s.request.prompt, type(s.request.sampling)(max_tokens=draw(st.integers(1, 70)))
        )
        blocks = -(-length // SIZE) + spare
        cut = draw(st.integers(0, blocks))
        spans = (Span("home", 0, cut * SIZE), Span(draw(st.sampled_from("abc")), cut * SIZE, blocks * SIZE))
        s.layout = tuple(span for span in spans if span.start < span.stop)
        found.append(s)
    return found


def one_by_one(run: list[Sequence], room: dict[str, int], here: Here, steps: int) -> list[tuple[int, Grow]]:
    """The blocks that the following steps take, decided one after the other; each must compute a token of all."""
    taken: list[tuple[int, Grow]] = []
    for step in range(1, steps):
        for s in run:
            s.done = add(s.done, s.length - 1, s.length)
            s.tokens.append(0)
        found = schedule(step, run, [], room, Budget(1000, 1000, SIZE), here, lambda _: NO_MATCH)
        assert len(found.chunks) == len(run) and not found.short and not found.preempt
        for grow in found.grow:
            (s,) = (s for s in run if s.id == grow.seq)
            s.layout = grown(s.layout, [grow], SIZE)
            room[grow.node] -= grow.blocks
            taken.append((step, grow))
    return taken


@settings(max_examples=200, deadline=None)
@given(batches(), st.data())
def test_steps_at_a_time_are_those_of_the_scheduler(run: list[Sequence], data: st.DataObject) -> None:
    room = {node: data.draw(st.integers(0, 12), label=node) for node in NODES[: data.draw(st.integers(1, 4))]}
    saved = data.draw(st.sets(st.sampled_from("abc")), label="saved")
    here = Here(data.draw(st.integers(1, 30), label="own"), 0, saved, -inf, None)
    steps, told = coast(run, room, here, SIZE)
    most = min(s.request.sampling.max_tokens for s in run)
    assert 1 <= steps <= most
    short = [s.length for s in run]
    taken = one_by_one(run, dict(room), here, steps)
    assert told == taken or (not told and {grow.node for _, grow in taken} <= {"home"})
    assert [s.length for s in run] == [n + steps - 1 for n in short]


def test_it_ends_where_a_block_is_not_to_be_had() -> None:
    s = running("s", 9, 8, room=12)
    s.request = replace(s.request, sampling=Sampling(max_tokens=50))
    here = Here(100, 0, (), -inf, None)
    assert coast([s], {"home": 0}, here, SIZE) == (4, [])
    assert coast([s], {"home": 0, "a": 2}, here, SIZE) == (12, [(4, Grow("s", "a", 12, 1)), (8, Grow("s", "a", 16, 1))])
    assert coast([s], {"home": 1, "a": 1}, here, SIZE) == (8, [])
    assert coast([s], {"home": 9, "a": 2}, here, SIZE) == (40, [])
    assert fits([s], 40, 9, SIZE) and not fits([s], 41, 9, SIZE)
