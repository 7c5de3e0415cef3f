"""From tokens to the text a client sees: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from infinillm.model.tokenizer import Detokenizer, Tokenizer


class StopStrings:
    """Looks for stop strings in text that comes in pieces; how it is cut into pieces makes no difference.

    Theory of operation. For each stop string the longest prefix that ends the text so far is kept (Knuth, Morris and
    Pratt), so a character costs the same however long the stop strings are. Text that may be the beginning of one is
    held back. The stop string that ends first wins; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str], include: bool):
        self._stops = sorted(stops, key=len, reverse=True)
        self._falls = [_falls(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""

    def push(self, text: str, armed: bool) -> tuple[str, str | None]:
        """Text that may be released, and the stop string that ended it. Not `armed`, none ends it."""
        if not self._stops:
            return text, None
        self._held += text
        start = len(self._held) - len(text)
        for at, char in enumerate(text, start + 1):
            for i, stop in enumerate(self._stops):
                matched, falls = self._matched[i], self._falls[i]
                while matched and stop[matched] != char:
                    matched = falls[matched - 1]
                if stop[matched] == char:
                    matched += 1
                if matched == len(stop):
                    if armed:
                        return self._held[: at if self._include else at - len(stop)], stop
                    matched = falls[matched - 1]
                self._matched[i] = matched
        keep = len(self._held) - max(self._matched)
        released, self._held = self._held[:keep], self._held[keep:]
        return released, None

    def end(self) -> str:
        """What was held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def _falls(stop: str) -> list[int]:
    """For each prefix of `stop`, the longest shorter prefix that is also its end."""
    falls, length = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = falls[length - 1]
        if stop[i] == stop[length]:
            length += 1
        falls[i] = length
    return falls


class Transcript:
    """The text of one sequence as it grows. A stop string before `min_tokens` tokens does not count."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, include_stop: bool, skip_special: bool, min_tokens: int
    ):
        self._detokenizer = Detokenizer(tokenizer, skip_special)
        self._stops = StopStrings(stops, include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self.tokens = 0

    def push(self, token: int) -> tuple[str, str | None]:
        """The text this token releases, and the stop string it completed."""
        self.tokens += 1
        return self._stops.push(self._detokenizer.add(token), self.tokens >= self._min_tokens)

    def stop(self, token: int) -> tuple[str, str | None]:
        """Like push, for a token that ends the sequence: not part of the text unless stops are to be included."""
        if self._include_stop:
            return self.push(token)
        self.tokens += 1
        return "", None

    def end(self) -> tuple[str, str | None]:
        """The text that was held back; its last character may complete a stop string."""
        text, stop = self._stops.push(self._detokenizer.end(), self.tokens >= self._min_tokens)
        return (text, stop) if stop is not None else (text + self._stops.end(), None)
