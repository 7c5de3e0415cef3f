"""Stop strings and transcripts: what a client may see of the tokens so far."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm.model.tokenizer import Tokenizer
from infinillm.servers.inference_text import StopStrings, Transcript
from tests import tiny
from tests.servers.fake_shard import encode


def cut(pieces: Sequence[str], stops: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    watch, out = StopStrings(stops, include), ""
    for piece in pieces:
        text, stop = watch.push(piece, armed=True)
        out += text
        if stop is not None:
            return out, stop
    return out + watch.end(), None


def plainly(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The definition: the first end of any stop string; of several, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


letters = st.text("ab", min_size=1, max_size=5)


@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=4), st.booleans())
def test_cutting_into_pieces_makes_no_difference(pieces: list[str], stops: list[str], include: bool) -> None:
    assert cut(pieces, stops, include) == plainly("".join(pieces), stops, include)


@given(st.lists(letters, max_size=12), st.lists(letters, min_size=1, max_size=4))
def test_what_is_released_is_never_taken_back(pieces: list[str], stops: list[str]) -> None:
    whole, _ = plainly("".join(pieces), stops, include=False)
    watch, out = StopStrings(stops, include=False), ""
    for piece in pieces:
        text, stop = watch.push(piece, armed=True)
        out += text
        assert whole.startswith(out)
        if stop is not None:
            break


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["END"], include=False)
    assert watch.push("the E", armed=True) == ("the ", None)
    assert watch.push("vening EN", armed=True) == ("Evening ", None)
    assert watch.end() == "EN"


def test_stop_strings_before_the_least_length_do_not_count() -> None:
    watch = StopStrings(["aa"], include=False)
    assert watch.push("aa", armed=False)[1] is None
    assert watch.push("b", armed=True)[1] is None
    assert watch.push("aa", armed=True) == ("", "aa")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return Tokenizer.load(folder)


def transcript(tokenizer: Tokenizer, stops: Sequence[str], *, include: bool = False, least: int = 0) -> Transcript:
    return Transcript(tokenizer, stops, include_stop=include, skip_special=True, min_tokens=least)


def test_a_character_is_whole_or_absent(tokenizer: Tokenizer) -> None:
    spoken = transcript(tokenizer, [])
    pieces = [spoken.push(token)[0] for token in encode("日本語🦊!")]
    assert "".join(pieces) + spoken.end()[0] == "日本語🦊!"
    assert "" in pieces  # some tokens are but part of a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_across_tokens(tokenizer: Tokenizer) -> None:
    spoken, out = transcript(tokenizer, ["本語🦊"]), ""
    for token in encode("日本語🦊!"):
        text, stop = spoken.push(token)
        out += text
        if stop is not None:
            break
    assert (out, stop) == ("日", "本語🦊")


def test_min_tokens_counts_tokens(tokenizer: Tokenizer) -> None:
    tokens = encode("x.x.x.x.")
    assert len(tokens) == 8
    spoken = transcript(tokenizer, ["."], least=3)
    stops = [spoken.push(token)[1] for token in tokens]
    assert stops.index(".") == 3


def test_the_token_that_stops_is_no_text_unless_included(tokenizer: Tokenizer) -> None:
    (token,) = encode("x")
    assert transcript(tokenizer, []).stop(token) == ("", None)
    assert transcript(tokenizer, [], include=True).stop(token) == ("x", None)


def test_unfinished_characters_are_told_at_the_end(tokenizer: Tokenizer) -> None:
    spoken = transcript(tokenizer, [])
    first = encode("🦊")[0]
    assert spoken.push(first) == ("", None)
    assert spoken.end() == ("\ufffd", None)
