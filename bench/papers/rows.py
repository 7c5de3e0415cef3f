"""Rows of a table: what a paper says, what we find, and how far apart they are; kept as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FITTED, PREDICTED, BUILT = "fitted", "predicted", "by construction"
DIGITS = 4


class Row(NamedTuple):
    """One figure. The paper's is a range where it gives no more; `group` is what rows are drawn together by."""

    group: str
    what: str
    unit: str
    paper: tuple[float, float] | None
    ours: float
    use: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's, over the nearer end of a range; 1 inside it."""
        if self.paper is None:
            return None
        low, high = self.paper
        return self.ours / min(max(self.ours, low), high)


HEADS = ("group", "what", "unit", "paper", "paper to", "ours", "ratio", "use", "note")


def one(value: float) -> tuple[float, float]:
    """A figure that is no range."""
    return value, value


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADS)
        for row in rows:
            low, high = row.paper or (None, None)
            ends = (text(low), text(high) if high != low else "")
            writer.writerow((row.group, row.what, row.unit, *ends, text(row.ours), text(row.ratio), row.use, row.note))


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [_row(each) for each in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Row:
    low, high = cells["paper"], cells["paper to"] or cells["paper"]
    paper = (float(low), float(high)) if low else None
    return Row(cells["group"], cells["what"], cells["unit"], paper, float(cells["ours"]), cells["use"], cells["note"])


def text(value: float | None) -> str:
    """A number in a few digits; nothing for None."""
    if value is None:
        return ""
    short = float(f"{value:.{DIGITS}g}")
    return f"{short:.0f}" if abs(short) >= 10**DIGITS else f"{short:g}"


def table(rows: Iterable[Row]) -> str:
    """As Markdown."""
    lines = ["| | | paper | ours | ratio | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    before = ""
    for row in rows:
        low, high = row.paper or (None, None)
        paper = text(low) if low == high else f"{text(low)} to {text(high)}"
        use = f"{row.use}; {row.note}" if row.note else row.use
        group = row.group if row.group != before else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {group} | {row.what} | {paper} | {text(row.ours)} {row.unit} | {ratio} | {use} |")
        before = row.group
    return "\n".join(lines)
