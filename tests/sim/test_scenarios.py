"""Scenarios: a file says what is done to a cluster, and exactly what happens then."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

import pytest

from infinillm.errors import Broken
from infinillm.sim.simulation import Simulation
from tests.sim.scenarios.script import rewritten

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
ONE = "cluster 1x1xCPU1 policy=isolated blocks=24\nask one prompt=100 output=5\nrun\n----\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_written_is_what_happens(path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    happens = rewritten(written)
    changed = unified_diff(written.splitlines(), happens.splitlines(), "expected", "actual", lineterm="", n=2)
    assert written == happens, "\n".join([f"python -m tests.sim.scenarios {path.name} would write this:", *changed])


def test_there_are_scenarios_and_each_expects_something() -> None:
    assert len(FILES) >= 10
    assert all(path.read_text(encoding="utf-8").count("is answered") for path in FILES)


def test_what_was_expected_is_not_read() -> None:
    told = rewritten(ONE)
    assert told.count("\n") == 8 and "one      is answered: 5 tokens" in told
    assert rewritten(told) == told == rewritten(ONE + "   9.99  one      flies\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("jump n0", "line 3, 'jump n0': a command is one of cluster, ask,"),
        ("ask two prompt=5 result=1", "it has prompt, output, session, shared, not result"),
        ("ask two prompt=five output=1", "line 3"),
        ("ask two", "line 3"),
        ("at 5 run", "'run' is done at once"),
        ("lose n7", "there is no node 'n7'"),
    ],
)
def test_a_line_that_cannot_be_is_named(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rewritten(f"cluster 1x1xCPU1 blocks=24\n\n{line}\n----\n")


def test_books_are_checked_after_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(simulation: Simulation) -> None:
        if simulation.now > 0.3:
            raise Broken("a block is lost")

    monkeypatch.setattr(Simulation, "check", check)
    with pytest.raises(Broken, match="a block is lost"):
        rewritten(ONE)
