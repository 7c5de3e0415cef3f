"""The books of a node: they balance after anything, and what is promised is there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinillm.core.blocks import Blocks, Holding, prefix_hashes, slots
from infinillm.core.types import Loan, Refused
from infinillm.errors import Broken


def books(count: int = 8, lendable: int = 6) -> Blocks:
    return Blocks("a", count, 4, lendable)


def test_a_sequence_takes_blocks_and_gives_them_back():
    b = books()
    assert b.grow("s", 0, 3) is None
    assert (b.used, b.room) == (3, 5)
    assert b.holding("s").firsts == [0, 4, 8]
    assert b.release("s") == 3
    assert (b.used, b.room) == (0, 8)
    b.check()


def test_growth_is_refused_whole():
    b = books()
    assert isinstance(b.grow("s", 0, 9), Refused)
    assert b.holding("s") is None and b.room == 8


def test_what_is_lent_is_no_longer_room_and_never_missing():
    b = books()
    assert isinstance(b.lend("x", 5, 10.0, "1"), Loan)
    assert b.room == 3
    assert isinstance(b.grow("mine", 0, 4), Refused)
    assert b.grow("mine", 0, 3) is None
    assert b.grow("theirs", 0, 5, "x") is None
    assert isinstance(b.grow("more", 0, 1, "x"), Refused)
    b.check()
    assert b.used == 3 and b.lent == 5
    b.give_back("x")
    assert b.room == 5 and not b.loans
    b.check()


def test_lending_knows_its_cap_its_room_and_itself():
    b = books(count=8, lendable=4)
    assert isinstance(b.lend("a", 1, 1.0, "1"), Refused)
    assert isinstance(b.lend("x", 5, 1.0, "1"), Refused)
    assert isinstance(b.lend("x", 0, 1.0, "1"), Refused)
    b.grow("mine", 0, 6)
    assert isinstance(b.lend("x", 3, 1.0, "1"), Refused)
    assert isinstance(b.lend("x", 2, 1.0, "1"), Loan)


def test_lending_again_makes_the_one_loan_larger():
    b = books()
    b.lend("x", 2, 5.0, "1")
    loan = b.lend("x", 3, 4.0, "2")
    assert (loan.id, loan.blocks, loan.until) == ("1", 5, 5.0) and len(b.loans) == 1


def test_a_loan_lapses_with_what_it_held_unless_renewed():
    b = books()
    b.lend("x", 4, 10.0, "1")
    b.grow("theirs", 0, 2, "x")
    assert b.due(9.9) == []
    b.renew("1", 12.0)
    b.renew("1", 11.0)  # never shortened
    assert b.due(11.5) == []
    assert [loan.borrower for loan in b.due(12.0)] == ["x"]
    b.give_back("x")
    assert b.room == 8 and b.holding("theirs", "x") is None
    b.check()


def test_a_word_about_a_loan_that_is_over_changes_nothing():
    b = books()
    b.lend("x", 4, 10.0, "1")
    b.give_back("x")
    assert b.loan("1") is None and not b.renew("1", 99.0)
    b.lend("x", 2, 20.0, "2")
    assert not b.renew("1", 99.0)
    b.doubt("1", 5.0)
    assert b.loan("1") is None and b.loan("2") == Loan("2", "a", "x", 2, 20.0)


def test_a_loan_whose_borrower_fell_silent_ends_sooner_unless_it_is_heard_again():
    b = books()
    b.lend("x", 4, 10.0, "1")
    b.doubt("1", 99.0)  # never longer
    b.doubt("1", 5.0)
    b.renew("1", 12.0)
    assert b.due(11.0) == []
    b.doubt("1", 11.5)
    b.doubt("no such loan", 1.0)
    assert [loan.borrower for loan in b.due(11.5)] == ["x"]


def test_only_the_unused_part_of_a_loan_comes_back_early():
    b = books()
    b.lend("x", 5, 1.0, "1")
    b.grow("theirs", 0, 2, "x")
    assert b.give_back("x", 4) == 3
    assert b.loans["x"].blocks == 2
    b.check()


def test_full_blocks_are_shared_by_prefix_and_evicted_last_used_first():
    b = books(count=4)
    names = prefix_hashes(range(8), 4)
    b.grow("one", 0, 2)
    for i, name in enumerate(names):
        b.seal("one", i * 4, name)
    assert b.match(names) == (2, 0)
    b.share("two", names)
    assert b.holding("two").blocks == b.holding("one").blocks and b.used == 2
    b.release("one")
    b.release("two")
    assert (b.cached, b.room, b.match(names)) == (2, 4, (2, 2))
    b.grow("three", 0, 3)  # evicts the end of the prefix before its beginning
    assert b.match(names) == (1, 1)
    b.check()


def test_prefix_names_depend_on_everything_before_them_and_on_the_salt():
    a, c = prefix_hashes([1, 2, 3, 4, 5], 2), prefix_hashes([9, 2, 3, 4, 5], 2)
    assert len(a) == 2 and set(a).isdisjoint(c)
    assert set(a).isdisjoint(prefix_hashes([1, 2, 3, 4, 5], 2, salt="tenant"))
    assert prefix_hashes([1, 2, 3, 4], 2) == a


def test_slots_follow_positions_through_the_table():
    assert slots(Holding([0, 4, 12], [7, 2, 5]), [3, 4, 13], 4) == [31, 8, 21]
    with pytest.raises(KeyError):
        slots(Holding([0], [1]), [4], 4)


def test_blocks_may_fill_a_hole():
    b = books()
    b.grow("s", 0, 1)
    b.grow("s", 12, 1)
    b.grow("s", 4, 2)
    assert b.holding("s").firsts == [0, 4, 8, 12]
    b.check()


def test_check_sees_broken_books():
    b = books()
    b.grow("s", 0, 2)
    b._free.append(b.holding("s").blocks[0])
    with pytest.raises(Broken):
        b.check()


operation = st.one_of(
    st.tuples(st.just("grow"), st.sampled_from(["", "x", "y"]), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("release"), st.sampled_from(["", "x", "y"]), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("lend"), st.sampled_from(["x", "y"]), st.just(0), st.integers(1, 6)),
    st.tuples(st.just("return"), st.sampled_from(["x", "y"]), st.just(0), st.integers(0, 4)),
    st.tuples(st.just("expire"), st.just(""), st.just(0), st.integers(0, 40)),
    st.tuples(st.just("seal"), st.just(""), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("share"), st.just(""), st.integers(0, 3), st.integers(0, 3)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(operation, max_size=60))
def test_the_books_balance_after_anything(operations):
    b = Blocks("a", 16, 4, 10)
    ends: dict[tuple[str, str], int] = {}
    names = prefix_hashes(range(16), 4)
    for clock, (what, owner, which, number) in enumerate(operations):
        seq = f"s{which}"
        match what:
            case "grow":
                start = ends.get((owner, seq), 0)
                if b.grow(seq, start, number, owner) is None:
                    ends[owner, seq] = start + number * 4
            case "release":
                b.release(seq, owner)
                ends.pop((owner, seq), None)
            case "lend":
                b.lend(owner, number, clock + 20.0, f"{clock}")
            case "return":
                b.give_back(owner, number or None)
            case "expire":
                for loan in b.due(float(number)):
                    b.give_back(loan.borrower)
            case "seal":
                b.seal(seq, number * 4, names[number])
            case "share":
                if b.holding(seq) is None and (found := b.match(names)[0]):
                    b.share(seq, names[:found])
                    ends["", seq] = found * 4
        ends = {key: end for key, end in ends.items() if b.holding(key[1], key[0]) is not None}
        b.check()
    for owner, seq in list(ends):
        b.release(seq, owner)
    for borrower in list(b.loans):
        b.give_back(borrower)
    assert b.room == b.count and not b.loans
    b.check()


def test_staged_blocks_are_held_and_seen_only_once_adopted():
    b = books()
    b.lend("x", 5, 1.0, "1")
    b.grow("s", 0, 1, "x")
    assert b.stage("s", 8, 2, "x") is None
    assert b.holding("s", "x").firsts == [0] and b.staged("s", "x").firsts == [8, 12]
    assert b.loans["x"].used == 3
    for first, blocks in ((0, 1), (4, 2), (16, 3), (16, 99)):
        assert isinstance(b.stage("s", first, blocks, "x"), Refused)
    b.check()
    b.adopt("s", "x")
    assert b.holding("s", "x").firsts == [0, 8, 12] and b.staged("s", "x") is None
    b.stage("s", 4, 1, "x")
    b.stage("other", 0, 1, "x")
    b.abandon("x")
    assert b.holding("s", "x").firsts == [0, 8, 12] and b.loans["x"].used == 3
    b.stage("s", 4, 1, "x")
    assert b.release("s", "x") == 4 and b.loans["x"].used == 0
    b.stage("other", 0, 1, "x")
    assert b.holders("x") == ["other"] and b.give_back("x") == 5
    b.check()
    assert b.room == 8


def test_a_sequence_leaves_some_of_its_blocks_and_a_cached_one_stays_cached():
    b = books()
    names = prefix_hashes(range(8), 4)
    b.grow("s", 0, 3)
    for i, name in enumerate(names):
        b.seal("s", 4 * i, name)
    b.share("t", names)
    assert b.leave("t", 0, 1) is None and b.match(names) == (2, 0)
    assert b.leave("s", 0, 2) is None and b.holding("s").firsts == [8]
    assert b.match(names) == (2, 1) and b.room == 6
    for first, blocks in ((0, 1), (8, 2), (9, 1)):
        assert isinstance(b.leave("s", first, blocks), Refused)
    assert b.leave("s", 8, 1) is None and b.holders() == ["t"]
    b.check()


def test_what_an_owner_does_not_name_is_let_go():
    b = books()
    b.lend("x", 6, 1.0, "1")
    b.grow("s", 0, 3, "x")
    b.grow("t", 0, 2, "x")
    b.grow("mine", 0, 1)
    b.keep({"s": {0, 8, 12}}, "x")
    assert b.holding("s", "x").firsts == [0, 8] and b.holders("x") == ["s"] and b.holders() == ["mine"]
    b.check()
