"""What a step takes, by the cost model: rows and prompts computed here, and K/V read here and elsewhere.

Theory of operation. Weights are read once a step, whatever is computed with them. So prompts pay together for what is
fixed, and rows beside them for their attention only; but no step is quicker than that of its rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from infinillm.core.cost import Cost
from infinillm.core.layout import reserved
from infinillm.core.types import Chunk, Layout, NodeId, Span


def step_seconds(
    home: NodeId,
    cost: Cost,
    chunks: Iterable[tuple[Chunk, Layout]],
    later: int,
    answer: Callable[[NodeId, int, int], float],
) -> float:
    """Seconds of a step of these chunks, so many steps alike later; tokens for which there is no place yet come home.

    `answer`: from a question to a node, of so many rows, to the answer: it has so many tokens of their context.
    """
    rows = local = 0
    away: dict[NodeId, tuple[int, int]] = {}
    computing, prompts = cost.prefill(0), False
    for chunk, layout in chunks:
        alone, stop = chunk.stop - chunk.start == 1, chunk.stop + later
        if alone:
            rows += 1
            local += max(stop - reserved(layout), 0)
        else:
            computing += cost.prefill(chunk.stop) - cost.prefill(chunk.start)
            prompts = True
        for span in layout:
            if span.start >= stop:
                break
            tokens = min(span.stop, stop) - span.start
            if span.node != home:
                asked, there = away.get(span.node, (0, 0))
                away[span.node] = asked + (1 if alone else _sent(cost, chunk, span)), there + tokens
            elif alone:
                local += tokens
    answers = [answer(node, asked, tokens) for node, (asked, tokens) in away.items()]
    step, dense = cost.decode_step(rows, local, answers), cost.dense(rows)
    return step + max(computing - dense, 0.0) if prompts else step


def _sent(cost: Cost, chunk: Chunk, span: Span) -> int:
    """What goes to a node of a prompt, in rows: those that see what lies there, and the K/V it is to keep."""
    kept = max(min(span.stop, chunk.stop) - max(span.start, chunk.start), 0)
    return chunk.stop - max(span.start, chunk.start) + kept * cost.token_bytes // cost.question_bytes
