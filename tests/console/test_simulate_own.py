"""The tutorial of docs/policies.md, as it stands there: its policy, and every one of its commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from infinillm import config
from infinillm.console import serve, simulate
from infinillm.core.ledger import rebuild
from infinillm.errors import BadRequest, Broken
from tests.core.test_policy import ledger, node

TUTORIAL = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
BLOCKS = [block.partition("\n")[::2] for block in TUTORIAL.split("```")[1::2]]
(CODE,) = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [shlex.split(line) for language, text in BLOCKS if not language for line in text.splitlines()]
SIMULATED = [command for command in COMMANDS if command[1] == "simulate"]
STARTED = [command for command in COMMANDS if command[1] != "simulate"]
FEW = ["--requests", "12"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where somebody follows the tutorial."""
    monkeypatch.chdir(tmp_path)
    Path("apart.py").write_text(CODE)
    return tmp_path


def test_it_is_a_policy_of_about_twenty_lines() -> None:
    assert len(CODE.splitlines()) <= 20
    policy = config.policy("apart.py")
    assert policy.name == "apart"
    four = ledger(*(node(name, 100_000) for name in "abcd"))
    long = {policy.route(four, 9000, 12_000, 16, exclude) for exclude in ((), ("a",), ("c",))}
    short = {policy.route(four, 90, 120, 16, exclude) for exclude in ((), ("b",), ("d",))}
    assert (long, short) == ({"a", "c"}, {"b", "d"})
    assert policy.route(four, 90, 120, 16, ("b", "d")) in {"a", "c"}, "where its own kind is not there"
    assert config.policy("pooled").capacity(four, 16) == policy.capacity(four, 16)
    assert policy.route(rebuild(1, []), 90, 120, 16, ()) == config.policy("pooled").route(
        rebuild(1, []), 90, 120, 16, ()
    )


@pytest.mark.parametrize("command", SIMULATED)
def test_what_it_simulates_runs(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate.run(config.load(config.Simulate, [*command[2:], *FEW], {}))
    out = capsys.readouterr().out
    assert "pooled" in out and "apart" in out
    if "--report" in command:
        assert "Memory under apart" in (folder / "apart.html").read_text()


@pytest.mark.parametrize("command", STARTED)
def test_what_it_starts_would_start(command: list[str]) -> None:
    settings = config.load(config.PROCESSES[command[1]], command[2:], {})
    assert config.policy(settings.policy).name == "apart"


def test_the_tutorial_has_commands_of_both_kinds() -> None:
    assert [command[1] for command in COMMANDS] == ["simulate", "simulate", "serve", "controller"]


# --- and where one errs ----------------------------------------------------------------------------------------------


def ran(policy: str) -> None:
    simulate.run(config.Simulate(policy=policy, requests=12, rate=30.0, cluster="1x2xA100", json=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def route(:", r"SyntaxError: .*mine\.py, line 1"),
        ("x = 1\ny = nothing\n", r"NameError: .*nothing.*mine\.py, line 2"),
        ("BASE = 'pooled'\n", "defines none of route"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError: .*no_such_module_anywhere"),
        ("BASE = 'pooled'\ndef route(ledger):\n    return ''\n", r"route of policy mine must take \(ledger, prompt"),
    ],
)
def test_a_file_that_is_no_policy_is_told_by_its_line(text: str, words: str) -> None:
    Path("mine.py").write_text(text)
    with pytest.raises(BadRequest, match=words) as error:
        ran("mine.py")
    assert error.value.field == "policy"


def test_a_function_that_fails_in_the_middle_is_told_by_its_line() -> None:
    Path("mine.py").write_text("BASE = 'pooled'\ndef route(ledger, *more):\n    return ledger.nodes['n9'].id\n")
    with pytest.raises(Broken, match=r"policy mine: route raised KeyError: 'n9' \(mine\.py, line 3\)"):
        ran("mine.py")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("nowhere.py", "policy nowhere.py: there is no such file"),
        ("greedy", "--policy has isolated, pooled, .*, not 'greedy'"),
        ("no_such_module:POLICY", "no_such_module"),
        ("infinillm.core.policy:NOBODY", "NOBODY"),
        ("infinillm.core.policy:POLICIES", "must be a Policy"),
        ("apart.py,apart.py", "one of them twice"),
    ],
)
def test_what_is_named_wrongly_is_told(policy: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as error:
        ran(policy)
    assert error.value.field == "policy"


def test_a_module_may_bring_a_policy_and_a_file_uses_its_own_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine_for_a_test.py").write_text(
        "from dataclasses import replace\nfrom infinillm.core.policy import POLICIES\n"
        "MINE = replace(POLICIES['isolated'], name='brought')\n"
    )
    monkeypatch.syspath_prepend(folder)
    Path("dated.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "BASE = 'pooled'\n@dataclass\nclass Last:\n    node: str = ''\n"
        "def route(ledger, *more):\n    return Last(max(ledger.nodes)).node\n"
    )
    ran("mine_for_a_test:MINE,dated.py")
    rows: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["policy"], row["served"]) for row in rows] == [("brought", 12), ("dated", 12)]


def test_servers_take_the_same_names_and_say_at_once_what_is_wrong() -> None:
    for cls in (config.Controller, config.Serve):
        for policy in ("apart.py", "package.module:NAME", "isolated"):
            assert cls(policy=policy).policy == policy
        with pytest.raises(BadRequest, match=r"must be one of pooled, proactive, isolated, FILE\.py, MODULE:NAME, not"):
            cls(policy="greedy")
    with pytest.raises(BadRequest, match=r"policy nowhere\.py: there is no such file"):
        serve.run(config.Serve(policy="nowhere.py"))
