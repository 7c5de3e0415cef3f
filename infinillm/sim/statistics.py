"""What a simulation tells: counts and distributions in bounded memory, however long it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from infinillm.sim.simulation import Ending

GROWTH = 1.01  # of a bucket over the one before: quantiles are right within half a per cent
LEAST = 1e-6  # what is smaller counts as this


@dataclass(slots=True)
class Spread:
    """A distribution of positive amounts in logarithmic buckets."""

    count: int = 0
    total: float = 0.0
    most: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, amount: float) -> None:
        self.count += 1
        self.total += amount
        self.most = max(self.most, amount)
        bucket = math.ceil(math.log(max(amount, LEAST), GROWTH))
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The amount that this share of all does not exceed; 0 where there is none."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                return min(math.exp((bucket - 0.5) * math.log(GROWTH)), self.most)
        return 0.0


@dataclass(slots=True)
class Tally:
    """Endings, summed up. Seconds; the per-token figures are those of LoongServe's section 7 (latency over tokens)."""

    served: int = 0
    refused: int = 0
    prompt: int = 0
    output: int = 0
    first: Spread = field(default_factory=Spread)  # seconds to the first token
    latency: Spread = field(default_factory=Spread)
    each: Spread = field(default_factory=Spread)  # seconds per output token after the first
    per_token: Spread = field(default_factory=Spread)  # latency over all tokens of a request
    per_input: Spread = field(default_factory=Spread)  # time to the first token over those of the prompt

    def add(self, ending: Ending) -> None:
        if ending.refused:
            self.refused += 1
            return
        self.served += 1
        self.prompt += ending.prompt
        self.output += ending.output
        waited, took = ending.first - ending.asked, ending.last - ending.asked
        self.first.add(waited)
        self.latency.add(took)
        self.per_input.add(waited / ending.prompt)
        self.per_token.add(took / (ending.prompt + ending.output))
        if ending.output > 1:
            self.each.add((ending.last - ending.first) / (ending.output - 1))
