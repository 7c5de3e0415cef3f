"""What a step takes: prompts that lie elsewhere pay for their way there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infinillm.core.cost import Curve
from infinillm.core.types import Chunk, Span
from infinillm.sim.timing import step_seconds
from tests.core.test_cost import LLAMA_H100

COST = replace(LLAMA_H100, question_bytes=1000, token_bytes=500, merging=Curve(((0, 0.0), (1, 0.0))))


@pytest.mark.parametrize(
    ("chunk", "asked"),
    [
        (Chunk("s", 0, 32), {}),
        (Chunk("s", 0, 96), {"far": 64 + 32}),  # of 96 rows 64 see what is there; the K/V of those is half as large
        (Chunk("s", 64, 96), {"far": 32 + 16}),
        (Chunk("s", 96, 128), {"far": 32}),  # all is there already
        (Chunk("s", 127, 128), {"far": 1}),
    ],
)
def test_a_prompt_sends_its_rows_and_what_is_to_be_kept(chunk: Chunk, asked: dict[str, int]) -> None:
    layout = (Span("home", 0, 32), Span("far", 32, 96), Span("home", 96, 128))
    found: dict[str, int] = {}

    def answer(node: str, rows: int, tokens: int) -> float:
        found[node] = rows
        return 100.0

    seconds = step_seconds("home", COST, [(chunk, layout)], 0, answer)
    assert found == asked
    assert (seconds > 100.0) == bool(asked)


def test_weights_are_read_once_a_step() -> None:
    """Prompts pay together for what is fixed, and rows beside them for their attention."""
    cost = replace(COST, prefill=Curve(((0, 2.0), (100, 3.0))), dense=Curve(((0, 1.0), (100, 2.0))))
    cost = replace(cost, attention=Curve(((0, 0.0), (100, 1.0))))

    def seconds(*chunks: Chunk) -> float:
        return step_seconds("home", cost, [(chunk, ()) for chunk in chunks], 0, lambda *_: 0.0)

    row, prompt = Chunk("r", 99, 100), Chunk("p", 0, 50)
    assert seconds(prompt) == pytest.approx(2.5)
    assert seconds(prompt, Chunk("q", 50, 100)) == pytest.approx(3.0)
    assert seconds(prompt, row) == pytest.approx(2.5 + 1.0)
    rows = [row] * 400
    assert seconds(*rows) == pytest.approx(5.0 + 400.0)
    assert seconds(prompt, *rows) == pytest.approx(seconds(*rows))
