"""What is drawn of the pool: bars that add up, and words for what bars cannot say."""

import asyncio
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from infinillm import config
from infinillm.console import demo, top
from infinillm.errors import BadRequest, Unavailable


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
        "draining": False,
        **zero,
        **counts,
    }


POOL: dict[str, Any] = {
    "epoch": 1,
    "policy": "pooled",
    "max_tokens": 4480,
    "model": {"name": "SmolLM2"},
    "nodes": [node("b", lent=60, cached=7), node("a", used=98, borrowed=60, running=1), node("m", serves=False)],
    "loans": [{"id": "l", "lender": "b", "borrower": "a", "blocks": 60, "used": 12, "recalled": 0}],
    "layouts": [
        {
            "sequence": "x-0",
            "home": "a",
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
    assert "b ─▶ a  12 of 60 blocks in use\n" in text
    assert "x-0  at a  1,568 on a + 192 on b" in text
    assert "m (memory)" in text
    rows = {line.split()[0]: line.split()[-7:] for line in text.splitlines() if line.strip()[:2] in {"a ", "b ", "m "}}
    assert rows["a"] == ["98", "0", "0", "2", "60", "1", "0"]
    assert text.index("\n a ") < text.index("\n b ")


def test_what_a_lender_wants_back_is_told_beside_its_loan() -> None:
    (loan,) = POOL["loans"]
    assert "12 of 60 blocks in use, 7 wanted back" in shown(
        top.picture({**POOL, "loans": [{**loan, "recalled": 7}]}, 120)
    )


def test_a_bar_shows_what_is_borrowed_beside_what_is_owned() -> None:
    drawn = next(line for line in shown(top.picture(POOL, 120)).splitlines() if line.startswith(" a "))
    assert (drawn.count("█"), drawn.count("·"), drawn.count("░")) == (23, 1, 14)


def test_the_longest_requests_are_drawn_and_the_others_counted() -> None:
    layouts = [
        {"sequence": f"r{n}-0", "home": "a", "spans": [{"node": "a", "start": 0, "stop": n}]} for n in range(1, 21)
    ]
    text = shown(top.picture({**POOL, "layouts": layouts}, 120))
    assert [n for n in range(1, 21) if f" r{n}-0 " in text] == list(range(13, 21))
    assert text.index(" r20-0 ") < text.index(" r13-0 ")
    assert "and 12 shorter requests" in text


def test_nodes_of_another_tier_are_named() -> None:
    pool = {**POOL, "nodes": [node("h", serves=False, tier="host", draining=True), node("d", tier="device")]}
    text = shown(top.picture(pool, 120))
    assert "h (host) (draining)" in text
    assert "device" not in text


def test_news_stand_below_with_their_time() -> None:
    text = shown(top.picture(POOL, 120, [top.News(1.0, "12:00:01", "c joined with 5 blocks")]))
    assert text.rstrip().endswith("12:00:01  c joined with 5 blocks")


class Gateway:
    """Answers with one pool after the other, and is gone in between; then there is nothing more to see."""

    def __init__(self, *pools: dict[str, Any] | Exception):
        self.pools = iter(pools)

    async def pool(self) -> dict[str, Any]:
        answer = next(self.pools, EOFError())
        if isinstance(answer, Exception):
            raise answer
        return answer


LATER = {**POOL, "nodes": [*POOL["nodes"], node("new")]}


def test_the_screen_shows_what_happened_and_outlives_a_gateway() -> None:
    screen = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    api: Any = Gateway(Unavailable("no gateway answers"), LATER)
    with pytest.raises(EOFError):
        asyncio.run(top._draw(api, 0.0, POOL, screen))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("no gateway answers") < text.index("new joined with 100 blocks")


def test_scripts_get_a_line_for_every_look(capsys: pytest.CaptureFixture[str]) -> None:
    api: Any = Gateway(POOL, LATER)
    with pytest.raises(EOFError):
        asyncio.run(top._tell(api, 0.0, POOL))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["happened"] for line in lines] == [[], [], ["new joined with 100 blocks"]]


def test_a_look_is_one_line_of_json() -> None:
    line = top.told(POOL, ["c left"])
    assert "\n" not in line
    assert json.loads(line) == {**POOL, "happened": ["c left"]}


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
