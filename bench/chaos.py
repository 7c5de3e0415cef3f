"""A long chaos run: thousands of requests while a seeded schedule of faults shakes a cluster; then an audit.

    python -m bench.chaos [--seed 1] [--requests 3000] [--minutes 0] [--policy proactive]
                          [--out bench/results/chaos-1.json]

Two controllers, a gateway and four workers with a tiny random model, as real processes on loopback. Workers are killed,
one and two at once, stopped, told to end, joined, cut off and held up; either controller is killed and stopped, and
both are killed at once; clients leave. Policy proactive orders moves meanwhile.
Every answer is compared with that of one plain forward pass. Ends with status 1, the seed and what was done, where an
answer was wrong, failed without a reason, or anything was left behind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.machine import facts, say
from tests.e2e import audit, chaos, faults, pair
from tests.e2e.chaos import Case, Result

TOLD = (
    *("request_resubmitted", "node_lost", "expired", "preempted", "controller_lost", "routed_alone", "leads"),
    *("lent", "recalled", "ordered", audit.ROOM_ORDERED, "moved", audit.MOVED),
)


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [heads, *((f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) for row in rows)]
    lines = [list(row) for row in cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def summary(cases: list[Case]) -> list[dict[str, Any]]:
    rows = []
    for kind in chaos.KINDS:
        mine = [case for case in cases if case.kind.partition(":")[0] == kind]
        if mine:
            times = sorted(case.seconds for case in mine)
            found = {"kind": kind, "requests": len(mine), **Counter(case.verdict for case in mine)}
            rows.append(found | {"median s": round(statistics.median(times), 2), "longest s": round(times[-1], 2)})
    return rows


def reasons(cases: list[Case]) -> dict[str, Any]:
    """How many failed for which reason, and the whole words of one."""
    return {
        why: {"requests": count, "for example": next(str(c.ending.error) for c in cases if c.reason == why)}
        for why, count in Counter(case.reason for case in cases).most_common()
    }


def told(result: Result) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "seed": result.seed,
        "policy": result.policy,
        "seconds": round(result.seconds, 1),
        "workers": len(chaos.WORKERS),
        "controllers": len(pair.NAMES),
        "requests": len(result.cases),
        "verdicts": dict(result.verdicts),
        "by kind": summary(result.cases),
        "failed, by reason": reasons(result.failed),
        "faults": dict(Counter(fault.kind for fault in result.faults)),
        "faults skipped, for enough workers to stay well": result.skipped,
        "events": {name: result.events[name] for name in TOLD},
        "gateway's open files, before and after": result.gateway_files,
        "trouble": result.trouble(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=3000, help="at least so many")
    parser.add_argument("--policy", choices=("pooled", "proactive"), default="proactive")
    parser.add_argument("--minutes", type=float, default=0.0, help="at least so long")
    parser.add_argument(
        "--schedule", type=float, default=0.0, metavar="SECONDS", help="print what would be done, and end"
    )
    parser.add_argument(
        "--logs", type=Path, help="an empty folder for the logs of all processes; default: none is kept"
    )
    parser.add_argument("--out", type=Path, help="default: bench/results/chaos-SEED.json")
    chosen = parser.parse_args()
    if chosen.schedule:
        for fault in faults.schedule(chosen.seed, len(chaos.WORKERS)):
            if fault.at > chosen.schedule:
                return 0
            print(fault)
    with tempfile.TemporaryDirectory() as folder:
        result = chaos.run(
            chosen.logs or Path(folder), chosen.seed, chosen.requests, chosen.minutes, chosen.policy, say
        )
    found = told(result)
    print(
        table(
            ("requests", "", "median s", "longest s"),
            [
                (
                    f"{row['requests']:,} {row['kind']}",
                    ", ".join(f"{row[v]:,} {v}" for v in result.verdicts if row.get(v)),
                    row["median s"],
                    row["longest s"],
                )
                for row in found["by kind"]
            ],
        )
    )
    print(table(("times", "fault"), [(count, kind) for kind, count in found["faults"].items()]))
    for found_so in found["failed, by reason"].values():
        print(f"{found_so['requests']:,} failed: {found_so['for example']}")
    out = chosen.out or Path(__file__).parent / "results" / f"chaos-{chosen.seed}.json"
    command = " ".join(["python -m bench.chaos", *sys.argv[1:]])
    out.write_text(json.dumps({**facts(command, packages=("torch", "grpcio")), **found}, indent=1) + "\n")
    if found["trouble"]:
        print(found["trouble"], file=sys.stderr)
        return 1
    say(f"no answer was wrong, and nothing was left behind; {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
