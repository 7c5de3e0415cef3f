"""The books of a node: they balance after anything, and what is promised is there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infinillm.core.blocks import Blocks
from infinillm.core.holding import Holding, slots
from infinillm.core.names import marks, prefix_hashes
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
    assert isinstance(b.lend("x", -1, 1.0, "1"), Refused)
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


def sealed(b: Blocks, seq: str, names: list[bytes], owner: str = "") -> None:
    for i, name in enumerate(names):
        b.seal(seq, i * 4, name, owner)


def test_full_blocks_are_shared_by_name_and_evicted_last_used_first():
    b = books(count=4)
    names = prefix_hashes(range(8), 4)
    b.grow("one", 0, 2)
    sealed(b, "one", names)
    assert b.match("s", names) == ([0, 1], 0)
    assert b.share("two", {0: names[0], 4: names[1], 8: b"nowhere"}) == [0, 4]
    assert b.holding("two").blocks == b.holding("one").blocks and b.used == 2
    b.release("one")
    b.release("two")
    assert (b.cached, b.room, b.match("s", names)) == (2, 4, ([0, 1], 2))
    b.grow("three", 0, 3)  # evicts the end of a prefix before its beginning
    assert b.match("s", names) == ([0], 1)
    b.check()


def test_a_borrower_shares_as_a_guest_beside_its_loan():
    b = books(count=8, lendable=6)
    names = prefix_hashes(range(16), 4)
    b.grow("mine", 0, 4)
    sealed(b, "mine", names)
    shared = {4 * i: name for i, name in enumerate(names)}
    assert b.share("theirs", shared, "x") == []  # without a loan
    b.lend("x", 2, 9.0, "1")
    assert b.share("theirs", shared, "x") == [0, 4, 8, 12] and b.share("theirs", shared, "x") == []
    assert (b.used, b.room, b.loans["x"].used) == (4, 2, 0)
    assert b.grow("theirs", 16, 2, "x") is None and b.loans["x"].used == 2
    b.release("mine")  # it is kept for the guest
    assert (b.used, b.room) == (4, 2)
    assert b.leave("theirs", 8, 3, "x") is None
    assert (b.used, b.room, b.loans["x"].used) == (2, 4, 1)
    b.check()
    b.give_back("x")
    assert (b.used, b.room, b.cached) == (0, 8, 4)
    b.check()


def test_what_a_loan_held_outlives_it_for_whoever_shares_it():
    b = books(count=4, lendable=4)
    names = prefix_hashes(range(8), 4)
    b.lend("x", 2, 9.0, "1")
    b.grow("s", 0, 2, "x")
    sealed(b, "s", names, "x")
    assert b.match("u", names) == ([0, 1], 2)  # either may outlive the other, so sharing costs room
    b.lend("y", 1, 9.0, "2")
    assert b.share("u", {0: names[0], 4: names[1]}, "y") == [0]  # as far as room and cap last
    assert b.room == 0
    b.release("s", "x")
    assert b.grow("t", 0, 2, "x") is None  # the promise to x still holds
    b.check()
    b.give_back("x")
    assert b.holding("u", "y").firsts == [0] and b.room == 2
    b.check()


def test_whoever_goes_on_with_a_sequence_gets_it_out_of_the_loan_it_was_in():
    b = books(count=4, lendable=4)
    names = prefix_hashes(range(16), 4)
    b.lend("x", 4, 9.0, "1")
    b.grow("s", 0, 3, "x")
    b.grow("t", 12, 1, "x")
    sealed(b, "s", names[:3], "x")
    b.seal("t", 12, names[3], "x")
    b.lend("y", 0, 9.0, "2")  # there is no room at all, and none is needed
    assert b.share("s", {4 * i: name for i, name in enumerate(names)}, "y") == [0, 4, 8]
    assert (b.used, b.lent, b.room, b.loans["x"].blocks, b.loans["x"].used) == (3, 1, 0, 1, 1)
    b.check()
    assert b.match("s", names) == ([0, 1, 2, 3], 1) and b.match("t", names)[1] == 0
    b.release("s", "y")
    assert b.give_back("y", 0) == 0 and "y" not in b.loans
    b.lend("z", 0, 9.0, "3")
    assert b.share("u", {0: names[0]}, "z") == [0]
    assert b.give_back("z", 0) == 0 and "z" in b.loans  # it shares something
    b.check()


def test_guests_stay_within_the_cap_on_what_is_lent():
    b = books(count=8, lendable=3)
    names = prefix_hashes(range(16), 4)
    b.grow("mine", 0, 4)
    sealed(b, "mine", names)
    b.lend("x", 1, 9.0, "1")
    assert b.share("theirs", {4 * i: name for i, name in enumerate(names)}, "x") == [0, 4]
    b.release("theirs", "x")
    assert b.share("other", {12: names[3]}, "x") == [12]
    b.check()


def test_landmarks_come_with_their_block_and_go_with_it():
    b = Blocks("a", 16, 4, 16)
    names = prefix_hashes(range(68), 4)
    b.grow("s", 0, 16)
    sealed(b, "s", names[:16])
    assert b.marks == set(marks(names)) and len(b.marks) == 2
    b.release("s")
    b.grow("t", 0, 1)  # evicts the last block, a landmark
    assert b.marks == set(marks(names[:8]))
    b.check()


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
    st.tuples(st.just("seal"), st.sampled_from(["", "x", "y"]), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("share"), st.sampled_from(["", "x", "y"]), st.integers(0, 3), st.integers(0, 3)),
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
                b.seal(seq, number * 4, names[number], owner)
            case "share":
                if b.holding(seq, owner) is None:
                    wanted = b.match(seq, names[number:])[0]
                    if shared := b.share(seq, {4 * (number + i): names[number + i] for i in wanted}, owner):
                        ends[owner, seq] = shared[-1] + 4
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
    b.share("t", {0: names[0], 4: names[1]})
    assert b.leave("t", 0, 1) is None and b.match("s", names) == ([0, 1], 0)
    assert b.leave("s", 0, 2) is None and b.holding("s").firsts == [8]
    assert b.match("s", names) == ([0, 1], 1) and b.room == 6
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
