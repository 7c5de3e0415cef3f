"""Layouts and plans: every row is answered by whoever holds something it sees, and every K/V row is kept once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.layout import filled, grown, parts, plan, uncovered, without
from infinillm.core.request import add, first_gap, remove
from infinillm.core.types import Chunk, Grow, Part, Span, Step

SIZE = 4
A, B = Span("a", 0, 8), Span("b", 8, 16)


def test_neighbouring_spans_of_one_node_become_one():
    layout = grown((A,), [Grow("s", "a", 8, 1), Grow("s", "b", 12, 2)], SIZE)
    assert layout == (Span("a", 0, 12), Span("b", 12, 20))


def test_what_has_no_place_yet():
    layout = (A, Span("b", 12, 16))
    assert uncovered(layout, 0, 20) == [(8, 12), (16, 20)]
    assert uncovered(layout, 2, 8) == []
    assert uncovered((), 3, 5) == [(3, 5)]


def test_losing_a_node_leaves_a_hole():
    layout, gone = without((A, B, Span("a", 16, 20)), "a")
    assert layout == (B,) and gone == [A, Span("a", 16, 20)]


def test_filled_ends_where_the_tokens_end():
    assert filled((A, B), 9) == (A, Span("b", 8, 9))
    assert filled((A, B), 8) == (A,)


def test_a_decode_asks_all_and_is_kept_by_one():
    assert parts(Chunk("s", 9, 10), (A, B), SIZE) == {
        "a": [Part("s", 9, 10, 10, 10, 2)],
        "b": [Part("s", 9, 10, 9, 10, 1)],
    }


def test_a_node_holding_only_later_positions_is_not_asked():
    assert list(parts(Chunk("s", 2, 6), (A, B), SIZE)) == ["a"]


def test_rows_before_a_span_do_not_ask_it():
    got = parts(Chunk("s", 4, 12), (A, B), SIZE)
    assert got["b"] == [Part("s", 8, 12, 8, 12, 1)] and got["a"] == [Part("s", 4, 12, 4, 8, 2)]


def test_two_spans_on_one_node_are_asked_once():
    layout = (A, B, Span("a", 16, 24))
    assert parts(Chunk("s", 14, 18), layout, SIZE)["a"] == [Part("s", 14, 18, 18, 18, 3), Part("s", 18, 18, 16, 18, 3)]


def test_a_plan_says_what_to_grow_even_where_nothing_is_asked():
    step = Step(3, (Chunk("s", 0, 4),), (Grow("s", "a", 0, 2), Grow("s", "b", 8, 2)))
    plans = plan(step, {"s": (A, B)}, SIZE)
    assert plans["b"].grow == (Grow("s", "b", 8, 2),) and plans["b"].parts == ()
    assert plans["a"].parts == (Part("s", 0, 4, 0, 4, 1),) and plans["a"].step == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=8), st.data())
def test_every_row_is_kept_once_and_sees_everything_before_it(pieces, data):
    layout = ()
    for node, blocks in pieces:
        layout = grown(layout, [Grow("s", node, layout[-1].stop if layout else 0, blocks)], SIZE)
    end = layout[-1].stop
    start = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(start + 1, end))
    got = parts(Chunk("s", start, stop), layout, SIZE)
    kept = [(p, node) for node, mine in got.items() for part in mine for p in range(part.keep_start, part.keep_stop)]
    assert sorted(p for p, _ in kept) == list(range(start, stop))
    assert all(any(s.node == node and s.start <= p < s.stop for s in layout) for p, node in kept)
    for node, mine in got.items():
        rows = [p for part in mine for p in range(part.start, part.stop)]
        seen_from = min(s.start for s in layout if s.node == node)
        assert rows == [p for p in range(start, stop) if p >= seen_from]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(0, 20)), max_size=20))
def test_intervals_are_a_set_of_positions(changes):
    done, positions = (), set()
    for put, a, b in changes:
        start, stop = min(a, b), max(a, b)
        done = add(done, start, stop) if put else remove(done, start, stop)
        positions = positions | set(range(start, stop)) if put else positions - set(range(start, stop))
        assert {p for a, b in done for p in range(a, b)} == positions
        assert all(x[1] < y[0] for x, y in pairwise(done))
        gap = first_gap(done, 20)
        missing = sorted(set(range(20)) - positions)
        assert gap is None if not missing else gap is not None and gap[0] == missing[0] and gap[1] - 1 in missing
