"""`infinillm profile` on a tiny model: every point it promises, in a file that the other processes read."""

import json
from pathlib import Path

import pytest

from infinillm import config
from infinillm.console import profile
from infinillm.core.cost import Costs, Curve, from_plain, to_plain
from infinillm.core.ledger import Report, rebuild
from infinillm.core.policy import POLICIES
from infinillm.core.types import Node, Span
from infinillm.errors import BadRequest
from infinillm.model.spec import spec_of
from infinillm.model.weights import read_config
from tests import live, tiny
from tests.core.test_cost import LLAMA_H100


def amounts(curve: Curve) -> list[float]:
    return [amount for amount, _ in curve.points]


def test_a_profile_is_measured_and_read_by_whoever_plans_with_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "profile.json", tiny.folder("llama")
    flags = ("--out", str(file), "--seconds", "0.2", "--block-size", "8")
    made = live.cli("profile", str(folder), *flags, seconds=240)
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"written to {file}" in made.stdout
    for piece in ("steps without attention", "attention", "merges", "prefill", "questions", "moves"):
        assert f"measuring {piece}" in made.stderr  # a line each as it is done: progress, where there is no terminal

    cost = config.cost(str(file))
    assert cost is not None
    assert amounts(cost.dense) == [1, 2, 4, 8, 16, 32]
    assert amounts(cost.attention) == [128, 256, 512, 1024, 2048]  # what the model was made for
    assert amounts(cost.question) == amounts(cost.merging) == [1, 4, 16]
    assert amounts(cost.move) == [16, 256, 1024]
    assert amounts(cost.prefill) == [0, 512, 1024, 1536, 2048]
    shape = spec_of(read_config(folder), None).attention(8, "float32")
    assert cost.token_bytes * 8 == shape.block_bytes
    assert cost.question_bytes == shape.layers * shape.question_bytes
    assert cost.prefill(2048) > cost.prefill(512) > 0
    assert cost.dense(1) > 0
    assert cost.attend(2048) > 0
    assert json.loads(file.read_text())["about"]["dtype"] == "float32"

    a = Node("a", "1", "a:1", 256, 200, used=256, running=1, waiting=20, wanted=20)
    told = [Report(a, (), {"long": (Span("a", 0, 2048),)}), Report(Node("b", "1", "b:1", 256, 200), (), {})]
    assert isinstance(POLICIES["proactive"].plan(rebuild(1, told), Costs(cost), 8), tuple)


def test_what_cannot_be_measured_is_said() -> None:
    made = live.cli("profile", str(tiny.folder("llama")), "--lender", "127.0.0.1:1", "--seconds", "0", "--out", "")
    assert made.returncode == 1
    assert "127.0.0.1:1 lends nothing to measure with" in made.stderr
    assert not made.stdout
    assert "Traceback" not in made.stderr


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    assert config.cost("") is None
    file = tmp_path / "profile.json"
    for text, words in (("{", "profile.json"), ("[]", "a mapping"), ('{"dense": 3}', "dense")):
        file.write_text(text)
        with pytest.raises(BadRequest, match=words):
            config.cost(str(file))
    with pytest.raises(BadRequest, match="nowhere"):
        config.cost("/nowhere.json")
    file.write_text(json.dumps(to_plain(LLAMA_H100)))
    assert config.cost(str(file)) == LLAMA_H100


def test_people_read_a_summary() -> None:
    lines = profile.summary(from_plain(to_plain(LLAMA_H100))).splitlines()
    assert any(line.startswith("reading a token of context: 0.046 us") for line in lines)
    assert any("528,384 bytes; K/V of a token: 131,072 bytes" in line for line in lines)
    assert any("from 18,1" in line for line in lines)
