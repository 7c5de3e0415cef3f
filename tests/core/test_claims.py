"""What a lender wants back: of whom, when, and what it has said of its loans."""

from __future__ import annotations

from infinillm.core.claims import NOBODY, Claims, Recall, wanted_from
from infinillm.core.pace import MOST_HELD_SECONDS, RECALL_AFTER_SECONDS, REST_SECONDS
from infinillm.core.types import Loan

SMALL, LARGE, NONE = Loan("small", "a", "b", 3, 1.0), Loan("large", "a", "c", 9, 1.0), Loan("none", "a", "d", 0, 1.0)
LOANS = [SMALL, LARGE, NONE]


def test_what_is_wanted_comes_of_the_largest_loans_and_not_twice() -> None:
    assert wanted_from(LOANS, 10, ()) == [(LARGE, 9), (SMALL, 1)]
    assert wanted_from(LOANS, 10, ("large",)) == [(SMALL, 1)], "the rest has been asked for"
    assert wanted_from(LOANS, 0, ()) == []


def test_who_starves_for_long_and_another_begins_anew() -> None:
    one = NOBODY.after("s", 5.0)
    assert one.after("s", 9.0) == one == ("s", 5.0)
    assert one.after("t", 9.0) == ("t", 9.0)
    assert [one.long(5.0 + seconds) for seconds in (RECALL_AFTER_SECONDS - 1, RECALL_AFTER_SECONDS)] == [False, True]


def test_after_a_recall_it_rests_and_a_loan_of_which_some_is_wanted_grows_no_more() -> None:
    claims, found = Claims().recall(LOANS, 4, 100.0, 15.0)
    assert found == [(LARGE, 4)] and claims.recalls == {"large": Recall(5, 115.0)}
    assert (claims.wanted(LARGE), claims.wanted(SMALL)) == (4, 0)
    assert claims.refusal(LARGE, 0, 100.0 + REST_SECONDS) == "wants blocks back from c"
    for loan in (None, SMALL):
        assert claims.refusal(loan, 1, 99.9 + REST_SECONDS) == "has just wanted blocks back for its own requests"
        assert claims.refusal(loan, 1, 100.0 + REST_SECONDS) == ""
        assert claims.refusal(loan, 0, 100.0) == "", "who only shares takes no blocks"


def test_a_recall_of_nothing_changes_nothing() -> None:
    claims, _ = Claims().recall(LOANS, 4, 100.0, 15.0)
    for loans, blocks in ((LOANS, 0), ([LARGE, NONE], 4), ([], 4)):
        assert claims.recall(loans, blocks, 105.0, 15.0) == (claims, [])


def test_what_has_not_come_in_time_is_late_and_what_has_come_is_wanted_no_more() -> None:
    claims, _ = Claims().recall(LOANS, 12, 100.0, 15.0)
    assert claims.late(LOANS, 114.9) == []
    assert claims.late(LOANS, 115.0) == [SMALL, LARGE]
    back = Loan("small", "a", "b", 0, 1.0)
    assert claims.late([back, LARGE], 115.0) == [LARGE]
    later = claims.after([back, LARGE])
    assert later.recalls.keys() == {"large"} and later.rests_until == claims.rests_until
    assert later.refusal(back, 1, 115.0) == "", "it may borrow again"
    assert claims.after([]).recalls == {}


def test_what_is_held_is_not_wanted_back_before_and_the_longest_hold_counts() -> None:
    claims = Claims().lent("large", 8.0, 100.0).lent("large", 2.0, 101.0).lent("small", 0.0, 100.0)
    assert claims.held == {"large": 108.0}
    assert claims.recall(LOANS, 4, 107.9, 15.0)[1] == [(SMALL, 3)]
    assert claims.recall(LOANS, 4, 108.0, 15.0)[1] == [(LARGE, 4)]
    assert claims.after([SMALL]).held == {} and claims.after([LARGE]).held == claims.held
    for said in (-1.0, float("nan")):
        assert Claims().lent("large", said, 100.0) == Claims()
    assert Claims().lent("large", float("inf"), 100.0).held == {"large": 100.0 + MOST_HELD_SECONDS}
