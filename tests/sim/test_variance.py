"""The more the lengths of requests differ, the more a pool gains over instances that take them in turn."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

from infinillm.core.policy import POLICIES, Policy, isolated
from infinillm.core.scheduler import Budget
from infinillm.sim.hardware import read_size
from infinillm.sim.traffic import Arrival
from infinillm.sim.worlds import WHOLE, answered, world

SIZE = read_size("Llama-2-7B", 16, "float16")
BUDGET = Budget(WHOLE, 256, 16, moves=16)
IN_TURN = replace(POLICIES["isolated"], route=isolated.in_turn)
COUNT, RATE, MEAN, OUTPUT = 120, 20.0, 8000, 400  # requests, a second, tokens


def seconds(policy: Policy, arrivals: list[Arrival]) -> float:
    """Until all are answered, on four A100."""
    here = world(policy, "1x4xA100@infinite-llm", SIZE, BUDGET, lend_fraction=0.9, beat_seconds=0.5)
    assert answered(here, iter(arrivals)).served == len(arrivals)
    return here.now


def gain(spread: float) -> float:
    """Of prompts that are so much shorter or longer than the mean, on average of some draws."""
    found = []
    for seed in range(3):
        draw = random.Random(seed)
        prompts = [round(MEAN * (1 + draw.choice((-spread, spread)))) for _ in range(COUNT)]
        arrivals = [Arrival(at / RATE, prompt, OUTPUT) for at, prompt in enumerate(prompts)]
        found.append(seconds(IN_TURN, arrivals) / seconds(POLICIES["proactive"], arrivals))
    return fmean(found)


def test_what_the_pool_gains_rises_with_the_variance_of_lengths() -> None:
    none, some, much = map(gain, (0.0, 0.45, 0.9))
    assert abs(none - 1) < 0.05 and none + 0.05 < some < much, "equal requests gain nothing"
