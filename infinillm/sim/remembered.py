"""Answers of pure functions about one ledger, kept until there is another: many ask the same between two heartbeats."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from infinillm.core.types import Ledger

Found = TypeVar("Found")


class Remembered:
    """See above."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._answers: dict[Hashable, Any] = {}

    def ask(self, ledger: Ledger, question: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` answers, who is asked once for each question and ledger."""
        if ledger is not self._ledger:
            self._ledger, self._answers = ledger, {}
        if question not in self._answers:
            self._answers[question] = find()
        found: Found = self._answers[question]
        return found
