"""What goes back to lenders that want blocks: home, elsewhere first, or the youngest gives way."""

from __future__ import annotations

from infinillm.core.moves import Wish
from infinillm.core.recall import RECALLED, ROOM, Repayment, beside, repay
from infinillm.core.request import Sequence
from infinillm.core.types import Move, Span
from tests.core.test_scheduler import SIZE, running


def lying(id: str, there: int, home: int = 0, length: int | None = None, more: int = 0) -> Sequence:
    """A sequence of so many blocks at home and `there`, all but its last token computed, with `more` reserved there."""
    tokens = length if length is not None else (home + there) * SIZE
    s = running(id, tokens, tokens - 1)
    spans = (Span("home", 0, home * SIZE), Span("there", home * SIZE, (home + there + more) * SIZE))
    s.layout = tuple(span for span in spans if span.start < span.stop)
    return s


def back(
    *run: Sequence,
    owed: int,
    room: dict[str, int],
    late: bool = False,
    most: int = 4,
    refused: bool = False,
    wishes: tuple[Wish, ...] = (),
) -> Repayment:
    return repay(run, {"there": owed}, ["there"] if late else [], wishes, {**room, "there": 0}, most, refused, SIZE)


def test_it_comes_home_as_far_as_there_is_room() -> None:
    found = back(lying("s", 5, home=1), owed=4, room={"home": 3})
    assert found == Repayment(wishes=(Wish(Move("s", "there", "home", SIZE, 3), RECALLED),))
    again = back(lying("s", 5, home=1), owed=4, room={"home": 3}, wishes=found.wishes)
    assert again == Repayment(), "one thing after another"


def test_of_the_youngest_first_and_the_block_it_writes_into_stays() -> None:
    found = back(lying("old", 5), lying("young", 3), owed=9, room={"home": 9})
    assert [wish.move for wish in found.wishes] == [
        Move("young", "there", "home", 0, 2),
        Move("old", "there", "home", 0, 4),
    ]


def test_where_home_is_full_blocks_of_home_go_to_the_roomiest_lender_first() -> None:
    found = back(lying("s", 4, home=3), owed=2, room={"home": 0, "b": 1, "c": 7})
    assert found == Repayment(wishes=(Wish(Move("s", "home", "c", 0, 2), ROOM),))
    assert back(lying("s", 4, home=3), owed=2, room={"home": 0}) == Repayment(homeless=2), "others are asked for room"


def test_after_the_grace_the_youngest_gives_way_where_nobody_lends() -> None:
    pair = lying("old", 4, home=3), lying("young", 2, home=1)
    assert back(*pair, owed=3, room={"home": 0}, refused=True).give_way == ()
    assert back(*pair, owed=3, room={"home": 0}, late=True).give_way == (), "nobody was asked yet"
    assert back(*pair, owed=3, room={"home": 0}, late=True, refused=True).give_way == ("young",)
    assert back(*pair, owed=3, room={"home": 0}, late=True, most=0).give_way == ("young",), "nothing moves at all"


def test_what_is_reserved_for_tokens_to_come_is_let_go_of() -> None:
    s = lying("s", 2, more=3)
    assert back(s, owed=3, room={"home": 1}).empty == (), "home has no room for these tokens, and there is time"
    for found in (back(s, owed=3, room={"home": 3}), back(s, owed=3, room={"home": 0}, late=True)):
        assert found.empty == (Move("s", "there", "home", 2 * SIZE, 3),)
        assert found.layouts == {"s": (Span("there", 0, 2 * SIZE),)}
        assert not found.wishes and not found.homeless and s.layout[-1].stop == 5 * SIZE


def test_the_room_for_it_is_kept() -> None:
    wishes = (Wish(Move("s", "there", "home", 0, 3), RECALLED), Wish(Move("s", "home", "b", 0, 9), ROOM))
    assert beside({"home": 5, "b": 4, "c": 1}, wishes) == {"home": 2, "b": 0, "c": 1}
    assert beside({"home": 5}, [Wish(Move("s", "b", "home", 0, 3), "an order")]) == {"home": 5}
