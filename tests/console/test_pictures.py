"""What is drawn of the pool: bars that add up, and words for what bars cannot say."""

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from infinillm import config
from infinillm.console import demo, top
from infinillm.errors import BadRequest


def shown(what: Any) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def node(id: str, **counts: Any) -> dict[str, Any]:
    zero = dict.fromkeys(("used", "cached", "lent", "borrowed", "running", "waiting", "wanted"), 0)
    return {
        "id": id,
        "incarnation": "1",
        "address": "",
        "blocks": 100,
        "lendable": 90,
        "serves": True,
        **zero,
        **counts,
    }


POOL = {
    "policy": "pooled",
    "max_tokens": 4480,
    "model": {"name": "SmolLM2"},
    "nodes": [node("b", lent=60, cached=7), node("a", used=98, borrowed=60, running=1), node("m", serves=False)],
    "loans": [{"id": "l", "lender": "b", "borrower": "a", "blocks": 60, "used": 12}],
    "layouts": [
        {
            "sequence": "x-0",
            "spans": [{"node": "a", "start": 0, "stop": 1568}, {"node": "b", "start": 1568, "stop": 1760}],
        }
    ],
}


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6), st.integers(10, 100))
def test_a_bar_has_its_width_and_shows_whatever_is_there(counts: list[int], width: int) -> None:
    drawn = top.bar([(count, "red", chr(ord("a") + index)) for index, count in enumerate(counts)], width).plain
    assert len(drawn) == (width if any(counts) else 0)
    assert set(drawn) == {chr(ord("a") + index) for index, count in enumerate(counts) if count}


def test_the_pool_is_told_in_full() -> None:
    text = shown(top.picture(POOL, 120))
    assert "SmolLM2 · 3 nodes · 300 blocks · policy pooled · longest request now 4,480 tokens" in text
    assert "b lends a 60 blocks, 12 in use" in text
    assert "m (memory)" in text
    rows = {line.split()[0]: line.split()[-7:] for line in text.splitlines() if line.strip()[:2] in {"a ", "b ", "m "}}
    assert rows["a"] == ["98", "0", "0", "2", "60", "1", "0"]
    assert text.index("\n a ") < text.index("\n b ")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_names_and_figures_survive_a_narrow_terminal(width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    screen.print(top.picture({**POOL, "nodes": [node("worker-0", used=98)]}, width))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "worker-0" in text
    assert " 98 " in text


def test_a_pool_of_nobody_is_drawn_too() -> None:
    assert "0 nodes" in shown(top.picture({"nodes": [], "loans": [], "policy": "pooled", "max_tokens": 0}, 80))


def test_the_demo_knows_where_a_request_lies() -> None:
    seen = demo.Seen(prompt=1760)
    seen.look(POOL)
    assert seen.held == {"a": 98, "b": 12}
    seen.look({**POOL, "layouts": [], "loans": []})
    assert seen.held == {"a": 98, "b": 12}, "what was seen at its largest stays"
    text = shown(demo.drawn(seen))
    assert "a: 98 blocks, 89%" in text
    assert "b: 12 blocks, 11%" in text
    assert "4,000" not in text


def test_the_demo_tells_what_isolation_would_do_in_the_policys_own_words() -> None:
    reason = demo.refused_alone(POOL, 1760, 1800)
    assert "113 blocks" in reason
    assert "policy isolated offers 100" in reason
    assert demo.refused_alone(POOL, 100, 200) == ""


def test_the_demos_document_is_long_and_says_the_answer_once() -> None:
    question, (message,) = demo.asked(config.Demo())
    assert message["content"].endswith(f"Question: {question}")
    assert message["content"].count("Kittiwake") == 1
    assert message["content"].index("Kittiwake") < len(message["content"]) / 4
    assert len(message["content"].split()) > 3500
    with pytest.raises(BadRequest, match="--document /nowhere"):
        demo.asked(config.Demo(document="/nowhere"))
