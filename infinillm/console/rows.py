"""One row a policy: what the terminal, the JSON and the report page say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infinillm.sim.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Row:
    """One policy's outcome, and how it was found.

    Where the highest rate was searched for, `tried` are all rates, with the share of requests that kept the objective,
    and whether that was good enough; `outcome` is that of the highest good one, None where there is none, and `most`
    says that no rate was too high. `took` seconds of this machine.
    """

    policy: str
    outcome: Outcome | None
    took: float
    tried: tuple[tuple[float, float, bool], ...] = ()
    most: bool = False

    def told(self) -> dict[str, Any]:
        """As JSON."""
        found = {"policy": self.policy, "rate": 0.0} if self.outcome is None else self.outcome.told()
        if self.tried:
            found |= {"tried": [[float(f"{rate:.4g}"), round(share, 4), good] for rate, share, good in self.tried]}
            found |= {"more": self.most}
        return found | {"simulated in": round(self.took, 2)}

    @property
    def remark(self) -> str:
        """What a table has no room for."""
        if self.tried and self.outcome is None:
            rate, share, _ = max(self.tried, key=lambda each: each[1])
            return f"{self.policy} keeps it at no rate: at {rate:.3g} a second {100 * share:.3g} % of the requests do"
        if self.most:
            return f"{self.policy} keeps it at every rate tried; with more --requests some rate may be too high"
        return ""


def heads(rows: Sequence[Row]) -> list[str]:
    """Of the columns after the policy."""
    return [
        *(["requests/s"] if any(row.tried for row in rows) else []),
        "tokens/s",
        "served",
        "refused",
        *(["kept"] if _judged(rows) else []),
        *("first p50", "p99", "token p50", "p99", "latency p50", "p99", "gave way"),
    ]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What stands in them for one of these rows."""
    if row.outcome is None:
        return ["none"]
    outcome, tally, judge = row.outcome, row.outcome.tally, row.outcome.judge
    spreads = (tally.first, tally.each, tally.latency)
    return [
        *([f"{outcome.traffic.rate:.4g}"] if row.tried else []),
        f"{outcome.tokens_per_second:,.0f}",
        f"{tally.served:,}",
        f"{tally.refused:,}",
        *([f"{100 * judge.share:.4g} %" if judge else ""] if _judged(rows) else []),
        *(seconds(spread.quantile(share)) for spread in spreads for share in (0.5, 0.99)),
        f"{outcome.totals.preemptions:,}",
    ]


def _judged(rows: Sequence[Row]) -> bool:
    return any(row.outcome is not None and row.outcome.judge is not None for row in rows)


def seconds(amount: float) -> str:
    """For people: three digits and a unit."""
    if amount < 1.0:
        return f"{1e3 * amount:.3g} ms"
    return f"{amount:.3g} s" if amount < 1000 else f"{amount:,.0f} s"
