"""The page of docs/papers: figures, tables, and what was fitted, predicted and assumed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from bench.papers import plots, rows
from bench.papers.infinite_llm import IMPLIED, MANY, ONE, PROACTIVE, TURNS
from bench.papers.ours import SATURATED
from bench.papers.rows import Row

DECISIONS = Path("bench/results/decisions-growth.json")
AIM_MS = 10.0

NOTES = Path(__file__).with_name("notes.md")  # what is said, by heading

AUTO = ("auto-rates", *(f"auto-{name}" for name in SATURATED))
SECTIONS = (  # heading in notes.md, tables, figures
    ("Infinite-LLM, figure 1a: layouts of 32 A100", ("figure-1a",), ("figure-1a",)),
    ("Infinite-LLM, figure 4c: ship the query or the K/V", ("figure-4c",), ("figure-4c",)),
    ("Infinite-LLM, figure 5: four instances", ("figure-5",), ("figure-5",)),
    ("Infinite-LLM, throughput against many instances", ("gains-many",), ("gains-many", "throughput-many")),
    ("Infinite-LLM, throughput against one instance", ("gains-one",), ("gains-one",)),
    (
        "LoongServe, largest rate under the limit of latency",
        ("loongserve-rates", "loongserve-speed-ups"),
        ("loongserve-rates",),
    ),
    ("LoongServe, scaling up and down", ("loongserve-scaling",), ("loongserve-scaling",)),
    ("Our own planner beside all others", tuple(f"{name}{of}" for of in ("-over", "") for name in AUTO), AUTO),
    ("What decisions cost", (), ("decisions",)),
)


def draw(folder: Path) -> None:
    """Every figure whose table is there."""

    def each(name: str, figure: str, drawing: Callable[[list[Row], Path], None]) -> None:
        path = folder / f"{name}.csv"
        if path.is_file() and (found := rows.read(path)):
            drawing(found, folder / f"{figure}.svg")

    each("figure-1a", "figure-1a", plots.figure_1a)
    each("figure-4c", "figure-4c", plots.figure_4c)
    each("figure-5", "figure-5", plots.figure_5)
    many = [f"{PROACTIVE} over {MANY}", f"{PROACTIVE} over {TURNS}"]
    ones = [f"{PROACTIVE} over {ONE}", f"{PROACTIVE} over {IMPLIED}"]
    each("gains-many", "gains-many", lambda found, path: plots.gains(found, many, many, path, False))
    each("gains-one", "gains-one", lambda found, path: plots.gains(found, ones, ones, path, True))
    each("loongserve-rates", "loongserve-rates", plots.largest_rates)
    each("loongserve-scaling", "loongserve-scaling", plots.masters)
    for name in AUTO:
        each(name, name, plots.standings)
    if (folder / "throughput-many.csv").is_file():
        plots.curves(_curves(folder / "throughput-many.csv"), folder / "throughput-many.svg")
    if DECISIONS.is_file():
        plots.lines(
            _growth(json.loads(DECISIONS.read_text(encoding="utf-8"))),
            folder / "decisions.svg",
            "Decisions as the cluster grows",
            "nodes",
            "milliseconds, median",
            AIM_MS,
        )


def text(folder: Path) -> str:
    """The notes, with figures and tables below what is said."""
    head, *said = NOTES.read_text(encoding="utf-8").split("\n## ")
    notes = dict(each.split("\n", 1) for each in said)
    parts = [head.strip()]
    for title, tables, figures in SECTIONS:
        parts += [f"## {title}", notes[title].strip()]
        parts += [f"![{name}]({name}.svg)" for name in figures if (folder / f"{name}.svg").is_file()]
        for name in tables:
            if (folder / f"{name}.csv").is_file() and (found := rows.read(folder / f"{name}.csv")):
                parts.append(rows.table(found))
    return "\n\n".join(parts) + "\n"


def _curves(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Of Llama-2-7B on the whole cluster: throughput by rate, system and trace."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] == "Llama-2-7B" and row["instances"] == "32":
                systems = found.setdefault(row["trace"], {})
                systems.setdefault(row["system"], []).append((float(row["rate"]), float(row["tokens"])))
    return found


def _growth(plain: dict[str, dict[str, dict[str, dict[str, float]]]]) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(float(nodes), each["median_ms"]) for nodes, each in points.items()]
        for name, points in plain["decisions"].items()
    }
