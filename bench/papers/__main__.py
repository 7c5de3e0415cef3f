"""The tables and figures of Infinite-LLM and LoongServe, from the simulator: measured, drawn and written down.

    python -m bench.papers [figures many one loongserve auto] [--quick] [--out docs/papers]

Each part writes its CSV; what is there is drawn, and put together as README.md. `--quick` runs little of everything, to
see that it runs.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

from bench.papers import infinite_llm, loongserve, ours, page, rows
from bench.papers.infinite_llm import Cell
from bench.papers.runs import Rate
from infinillm.console.progress import Progress

OUT = Path("docs/papers")
Say: TypeAlias = Callable[[str], None]
Part: TypeAlias = Callable[[Path, bool, Say], None]
Cells: TypeAlias = Callable[[bool, Say], Iterator[Cell]]


def figures(out: Path, quick: bool, say: Say) -> None:
    rows.write(out / "figure-1a.csv", infinite_llm.figure_1a(quick, say))
    rows.write(out / "figure-4c.csv", infinite_llm.figure_4c())
    rows.write(out / "figure-5.csv", infinite_llm.figure_5())


def throughput(name: str, cells: Cells) -> Part:
    """The part that runs these cells; what is there is written after each, since they take minutes."""

    def part(out: Path, quick: bool, say: Say) -> None:
        found: list[Cell] = []
        with (out / f"throughput-{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*Cell._fields[:-1], *Rate._fields))
            for each in cells(quick, say):
                writer.writerow((*each[:-1], *(rows.text(float(value)) for value in each.run)))
                file.flush()
                found.append(each)
                rows.write(out / f"gains-{name}.csv", infinite_llm.gains(found))

    return part


def loong(out: Path, quick: bool, say: Say) -> None:
    rows.write(out / "loongserve-scaling.csv", loongserve.scaling())
    found: list[rows.Row] = []
    for each in loongserve.rates(quick, say):
        found.append(each)
        rows.write(out / "loongserve-rates.csv", found)
        rows.write(out / "loongserve-speed-ups.csv", loongserve.speed_ups(found))


def auto(out: Path, quick: bool, say: Say) -> None:
    parts = {name: partial(ours.throughput, here) for name, here in ours.SATURATED.items()}
    for name, cells in {"rates": ours.rates, **parts}.items():
        found: list[rows.Row] = []
        for each in cells(quick, say):
            found.append(each)
            rows.write(out / f"auto-{name}.csv", found)
            rows.write(out / f"auto-{name}-over.csv", ours.standing(found))


PARTS: dict[str, Part] = {
    "figures": figures,
    "many": throughput("many", infinite_llm.against_many),
    "one": throughput("one", infinite_llm.against_one),
    "loongserve": loong,
    "auto": auto,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.papers", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is there")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        for name in () if chosen.draw else chosen.parts or PARTS:
            PARTS[name](chosen.out, chosen.quick, lambda what: progress.say(what, 0.0))
        progress.say("figures and README.md", 0.0)
        page.draw(chosen.out)
        (chosen.out / "README.md").write_text(page.text(chosen.out), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
