"""Moves: within the budget, from and to where there are blocks, and no block is lost or doubled whatever is wished."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.blocks import Blocks
from infinillm.core.layout import grown, moved, plan, stretches
from infinillm.core.moves import Chosen, Wish, ahead, choose, pick, place
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.types import Chunk, Grow, Layout, Move, Part, Span, Step, Stretch

SIZE = 4


def sequence(layout: Layout, computed: int, id: str = "s") -> Sequence:
    made = Sequence(Request(id, (1,), Sampling()), [1] * (computed + 1), layout=layout)
    made.compute(Chunk(id, 0, computed))
    return made


def ask(s: Sequence, *moves: Move, room: dict[str, int] | None = None, most: int = 99) -> Chosen:
    left = room or {"home": 99, "b": 99, "c": 99}
    return choose([Wish(move, "why") for move in moves], {s.id: s}, left, most, SIZE)


def test_moved_cuts_a_span_and_joins_neighbours():
    layout = (Span("home", 0, 16), Span("b", 16, 24))
    assert moved(layout, Move("s", "home", "b", 12, 1), SIZE) == (Span("home", 0, 12), Span("b", 12, 24))
    assert moved(layout, Move("s", "home", "b", 4, 2), SIZE) == (
        Span("home", 0, 4),
        Span("b", 4, 12),
        Span("home", 12, 16),
        Span("b", 16, 24),
    )
    assert moved(layout, Move("s", "b", "home", 16, 2), SIZE) == (Span("home", 0, 24),)


def test_a_plan_says_who_gives_takes_and_leaves():
    step = Step(3, (Chunk("s", 8, 9),))
    now, before = Move("s", "home", "b", 0, 1), Move("t", "c", "home", 4, 2)
    plans = plan(step, {"s": (Span("home", 0, 12),)}, SIZE, [now], [before])
    assert plans["b"].take == (Stretch("s", 0, 1),) and plans["b"].parts == ()
    assert plans["home"].give == plans["b"].take
    assert plans["home"].parts == (Part("s", 8, 9, 8, 9, 3),)  # what it gives it still answers for
    assert plans["c"].leave == (Stretch("t", 4, 2),) and not plans["c"].give


def test_what_is_reserved_for_tokens_to_come_is_told_apart():
    s = sequence((Span("home", 0, 8), Span("b", 8, 20), Span("home", 20, 24), Span("b", 24, 32)), 13)
    assert ahead(s, "b", SIZE) == (
        (Span("home", 0, 8), Span("b", 8, 16), Span("home", 20, 24)),
        [Stretch("s", 16, 1), Stretch("s", 24, 2)],
    )
    assert ahead(s, "c", SIZE) == (s.layout, [])
    assert ahead(sequence(s.layout, 31), "b", SIZE) == (s.layout, [])


def test_a_wish_to_a_full_home_waits_for_those_that_leave_it():
    s = sequence((Span("home", 0, 8), Span("b", 8, 16)), 16)
    back, away = Move("s", "b", "home", 8, 2), Move("s", "home", "c", 0, 1)
    full = {"home": 0, "b": 0, "c": 9}
    assert ask(s, back, room=full).refused == ((Wish(back, "why"), "home has no room"),)
    assert ask(s, away, back, room=full) == Chosen((away,), (Wish(back, "why"),))
    assert ask(s, away, back, room=full | {"home": 1}) == Chosen(
        (away, back._replace(blocks=1)), (Wish(Move("s", "b", "home", 12, 1), "why"),)
    )
    nowhere = ask(s, back, away, room=dict.fromkeys(full, 0))
    assert nowhere.wishes == (Wish(back, "why"),)
    assert nowhere.refused == ((Wish(away, "why"), "c has no room"),)


def test_only_full_computed_blocks_that_are_where_they_are_said_to_be():
    s = sequence((Span("home", 0, 8), Span("b", 8, 16)), 14)
    assert ask(s, Move("s", "home", "b", 0, 4)).moves == (Move("s", "home", "b", 0, 2),)
    assert ask(s, Move("s", "b", "home", 8, 2)).moves == (Move("s", "b", "home", 8, 1),)
    s.lose(4, 8)
    assert ask(s, Move("s", "home", "b", 0, 2)).moves == (Move("s", "home", "b", 0, 1),)
    for move in (Move("t", "home", "b", 0, 1), Move("s", "home", "home", 0, 1), Move("s", "home", "b", 2**63, 1)):
        assert ask(s, move) == Chosen()


def test_what_the_budget_leaves_waits_and_what_finds_no_room_is_refused():
    s = sequence((Span("home", 0, 40),), 40)
    chosen = ask(s, Move("s", "home", "b", 0, 4), Move("s", "home", "c", 20, 2), most=3)
    assert chosen.moves == (Move("s", "home", "b", 0, 3),)
    assert [wish.move for wish in chosen.wishes] == [Move("s", "home", "b", 12, 1), Move("s", "home", "c", 20, 2)]
    chosen = ask(s, Move("s", "home", "b", 0, 4), Move("s", "home", "x", 20, 1), room={"home": 0, "b": 3})
    assert chosen.moves == (Move("s", "home", "b", 0, 3),) and not chosen.wishes
    assert [reason for _, reason in chosen.refused] == ["b has no room", "x has no room"]


def test_two_wishes_for_one_block_are_carried_out_one_after_the_other():
    s = sequence((Span("home", 0, 8),), 8)
    chosen = ask(s, Move("s", "home", "b", 0, 1), Move("s", "home", "c", 0, 2))
    assert chosen.moves == (Move("s", "home", "b", 0, 1),)
    assert [wish.move for wish in chosen.wishes] == [Move("s", "home", "c", 0, 2)]


def test_the_first_blocks_are_picked():
    s = sequence((Span("b", 0, 8), Span("home", 8, 16), Span("b", 16, 28)), 25)
    assert pick(s, "b", 3, SIZE) == [Stretch("s", 0, 2), Stretch("s", 16, 1)]
    assert pick(s, "b", 99, SIZE) == [Stretch("s", 0, 2), Stretch("s", 16, 2)]
    assert pick(s, "c", 1, SIZE) == [] and pick(None, "b", 1, SIZE) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=6), st.data())
def test_blocks_are_conserved(pieces, data):
    """Random wishes, carried out as the engine does it: reserve, then switch or abandon. a is home."""
    books = {node: Blocks(node, 12, SIZE, 12) for node in "abc"}
    owner = {"a": "", "b": "a", "c": "a"}
    layout: Layout = ()
    for node in "bc":
        books[node].lend("a", 10, 1.0, node)
    for node, count in pieces:
        first = layout[-1].stop if layout else 0
        if books[node].grow("s", first, count, owner[node]) is None:
            layout = grown(layout, [Grow("s", node, first, count)], SIZE)
    if not layout:
        return
    end = layout[-1].stop
    s = sequence(layout, data.draw(st.integers(0, end)))
    wishes: tuple[Wish, ...] = ()
    for _ in range(data.draw(st.integers(1, 6))):
        drawn = st.builds(
            Move,
            st.just("s"),
            st.sampled_from("abc"),
            st.sampled_from("abc"),
            st.integers(0, end // SIZE).map(lambda i: i * SIZE),
            st.integers(1, 4),
        )
        wishes += tuple(Wish(move, "") for move in data.draw(st.lists(drawn, max_size=3)))
        room = {n: b.room if n == "a" else b.loans["a"].blocks - b.loans["a"].used for n, b in books.items()}
        most = data.draw(st.integers(0, 4))
        chosen = choose(wishes, {"s": s}, room, most, SIZE)
        wishes = chosen.wishes
        assert sum(move.blocks for move in chosen.moves) <= most
        for move in chosen.moves:
            assert "a" in (move.source, move.target)
            assert books[move.target].stage(*move.stretch, owner[move.target]) is None
        if data.draw(st.booleans()):
            for node, each in books.items():
                each.adopt("s", owner[node])
            for move in chosen.moves:
                s.layout = moved(s.layout, move, SIZE)
                assert books[move.source].leave(*move.stretch, owner[move.source]) is None
        else:
            for node, each in books.items():
                each.abandon(owner[node])
        for node, each in books.items():
            each.check()
            holding = each.holding("s", owner[node])
            assert (holding.firsts if holding else []) == [
                at for span in s.layout if span.node == node for at in range(span.start, span.stop, SIZE)
            ]
        assert [place(s.layout, at) for at in range(end)].count(None) == 0


@given(st.sets(st.integers(0, 20)))
def test_stretches_say_the_same_briefly(numbers):
    firsts = {SIZE * number for number in numbers}
    said = stretches("s", firsts, SIZE)
    assert sorted(firsts) == [s.first + i * SIZE for s in said for i in range(s.blocks)]
    assert all(a.first + a.blocks * SIZE < b.first for a, b in pairwise(said))
