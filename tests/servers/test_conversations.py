"""Conversations: who goes on with whom, how much they have in common, and bounded memory."""

from __future__ import annotations

from infinillm.servers.conversations import BLOCK, MOST_TOLD, Conversations, Turn, named


def said(blocks: int, first: int) -> list[int]:
    """Tokens, others for another `first`."""
    return [first * 100_000 + n for n in range(blocks * BLOCK)]


class Talk:
    """What `Conversations` says, of tokens."""

    def __init__(self, most: int = 1000) -> None:
        self.conversations = Conversations("s", most)

    def turn(self, prompt: list[int], answer: list[int], salt: str = "") -> Turn:
        return self.conversations.turn(len(prompt), named([*prompt, *answer], salt))


def test_turns_share_what_was_said_and_other_sessions_go_on_between_them() -> None:
    talk, a, b = Talk(), said(5, 1), said(3, 2)
    assert talk.turn(a, said(2, 3)) == Turn("s1", 0, 0)
    assert talk.turn(b, said(2, 4)) == Turn("s2", 0, 0)
    assert talk.turn([*a, *said(2, 3), 9], said(1, 5)) == Turn("s1", 1, 7 * BLOCK)
    assert talk.turn([*b, *said(2, 4), *said(9, 6)], said(1, 5)) == Turn("s2", 1, 5 * BLOCK)
    assert talk.turn([*a, *said(2, 3), 9], said(1, 7)) == Turn("s1", 2, 7 * BLOCK)


def test_another_answer_than_was_given_is_not_shared() -> None:
    talk, prompt = Talk(), said(5, 1)
    talk.turn(prompt, said(4, 2))
    assert talk.turn([*prompt, *said(4, 3)], said(1, 4)) == Turn("s1", 1, 5 * BLOCK)


def test_who_has_little_in_common_begins_a_session_and_ends_none() -> None:
    talk, rules = Talk(), said(2, 1)
    talk.turn([*rules, *said(6, 2)], said(1, 3))
    assert talk.turn([*rules, *said(6, 4)], said(1, 5)) == Turn("s2", 0, 0)
    assert talk.turn([*rules, *said(6, 2), *said(1, 3), 8], said(1, 6)) == Turn("s1", 1, 9 * BLOCK)
    assert talk.turn([*rules, *said(1, 7)], said(1, 6)) == Turn("s1", 2, 2 * BLOCK), "half of its prompt and more"


def test_another_salt_shares_nothing() -> None:
    talk, prompt = Talk(), said(5, 1)
    talk.turn(prompt, said(1, 2), "one")
    assert talk.turn(prompt, said(1, 2), "other") == Turn("s2", 0, 0)
    assert talk.turn(prompt, said(1, 2), "one") == Turn("s1", 1, 5 * BLOCK)


def test_less_than_a_block_is_no_conversation() -> None:
    talk = Talk()
    assert [talk.turn([1, 2, 3], [4]).session for _ in range(2)] == ["s1", "s2"]


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    talk = Talk(most=12)
    for first in (1, 2, 3):
        talk.turn(said(4, first), [])
    talk.turn(said(4, 1), [])
    talk.turn(said(4, 4), [])
    assert talk.turn(said(4, 1), []).turn == 2
    assert talk.turn(said(4, 2), []) == Turn("s5", 0, 0)
    conversations = talk.conversations
    assert len(conversations._where) == conversations._names <= 12
    for first in range(50):
        talk.turn(said(first, first), [])
    assert len(conversations._last) == 0 and not conversations._where and not conversations._names
    assert len(named(range((MOST_TOLD + 5) * BLOCK), "")) == MOST_TOLD


def test_what_a_forgotten_session_had_others_may_have_still() -> None:
    talk, rules = Talk(most=16), said(2, 1)
    talk.turn([*rules, *said(6, 2)], [])
    talk.turn([*rules, *said(6, 3)], [])
    talk.turn(said(4, 4), [])
    assert talk.turn([*rules, *said(1, 5)], []) == Turn("s2", 1, 2 * BLOCK)
