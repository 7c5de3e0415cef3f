"""Content names, and who has told of which landmarks."""

from __future__ import annotations

from infinillm.core.names import MARK_EVERY, MOST_HOLDERS, Landmarks, Uses, marks, prefix_hashes


def test_names_depend_on_everything_before_them_and_on_the_salt():
    a, c = prefix_hashes([1, 2, 3, 4, 5], 2), prefix_hashes([9, 2, 3, 4, 5], 2)
    assert len(a) == 2 and set(a).isdisjoint(c)
    assert set(a).isdisjoint(prefix_hashes([1, 2, 3, 4, 5], 2, salt="tenant"))
    assert prefix_hashes([1, 2, 3, 4], 2) == a


def test_names_grow_with_their_sequence():
    whole = prefix_hashes(range(32), 4, "salt")
    assert whole[:5] + prefix_hashes(range(32), 4, "salt", whole[:5]) == whole
    assert prefix_hashes(range(32), 4, "salt", whole) == []


def test_every_so_manieth_block_is_a_landmark():
    names = prefix_hashes(range(2 * (2 * MARK_EVERY + 3)), 2)
    assert marks(names) == marks(names[: 2 * MARK_EVERY]) and len(marks(names)) == 2
    assert marks(names[: MARK_EVERY - 1]) == []


def test_whoever_told_of_most_landmarks_is_asked_first():
    known = Landmarks()
    known.tell("a", [1, 2, 3], [])
    known.tell("b", [1, 2, 3, 4], [])
    known.tell("c", [3], [7])  # going, and never told of
    assert known.holders([1, 2, 3, 4, 9]) == [("b", 4), ("a", 3), ("c", 1)]
    known.tell("b", [], [1, 2, 3])
    known.forget("a")
    known.forget("nobody")
    assert known.holders([1, 2, 3, 4]) == [("b", 1), ("c", 1)] and known.holders([1, 2]) == []
    for i in range(2 * MOST_HOLDERS):
        known.tell(f"n{i}", [5], [])
    assert len(known.holders([5])) == MOST_HOLDERS


def test_uses_are_counted_of_the_latest():
    uses = Uses(2)
    assert [uses.count(name) for name in (b"a", b"b", b"a", b"c", b"a", b"b")] == [1, 1, 2, 1, 3, 1]
