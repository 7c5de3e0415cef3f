"""What a step did, as metrics."""

from __future__ import annotations

from collections.abc import Mapping

from infinillm.core.request import Sequence
from infinillm.core.types import NodeId, SeqId, Step
from infinillm.telemetry import Metrics


def count(metrics: Metrics, home: NodeId, step: Step, sequences: Mapping[SeqId, Sequence], seconds: float) -> None:
    """Count a step that succeeded: its time, its tokens, and where the tokens lay that its attention read."""
    metrics.add("steps_total")
    metrics.observe("step_seconds", seconds)
    metrics.observe("step_tokens", sum(chunk.stop - chunk.start for chunk in step.chunks))
    local = remote = 0
    for chunk in step.chunks:
        if (sequence := sequences.get(chunk.seq)) is None:
            continue
        for span in sequence.layout:
            seen = max(0, min(span.stop, chunk.stop) - span.start)
            local, remote = (local + seen, remote) if span.node == home else (local, remote + seen)
    metrics.add("attention_tokens_total", local, place="local")
    metrics.add("attention_tokens_total", remote, place="remote")
