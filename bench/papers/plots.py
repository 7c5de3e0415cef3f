"""The figures, as SVG that can be read on light and on dark paper; equal tables give equal files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.papers.rows import Row

mpl.use("Agg")

INK, GRID = "#768390", "#76839040"  # as dark on white as light on black
PAPER = "#a3adb8"
COLOURS = ("#2f81f7", "#e3822b", "#2ea67a", "#b168d6", "#d1495b", "#8f8f2a", "#1fa3b5", "#a6761d", "#57606a")
STYLE = {
    "svg.hashsalt": "infinillm",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def drawn(path: Path, width: float, height: float, panels: int = 1, **more: Any) -> Iterator[list[Any]]:
    """The axes of a figure of so many panels side by side, which is written to `path` in the end."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        found = figure.subplots(1, panels, squeeze=False, **more)[0]
        yield list(found)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def short(value: float) -> str:
    """A number for an axis or a bar."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def logarithmic(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_locator(NullLocator())


def bars(axes: Any, names: Sequence[str], series: Mapping[str, Sequence[float | None]], log: bool = False) -> None:
    """Bars side by side for each name, their values on top; the paper's are grey."""
    width = 0.8 / len(series)
    colours = iter(COLOURS)
    for at, (label, values) in enumerate(series.items()):
        colour = PAPER if label == "paper" else next(colours)
        places = [n + (at - (len(series) - 1) / 2) * width for n in range(len(names))]
        known = [(x, value) for x, value in zip(places, values, strict=True) if value is not None]
        axes.bar([x for x, _ in known], [value for _, value in known], width * 0.92, color=colour, label=label)
        for x, value in known:
            axes.annotate(short(value), (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    if log:
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.12)


def pairs(axes: Any, rows: Iterable[Row], title: str, unit: str, log: bool = False) -> None:
    """The paper's and ours, side by side."""
    rows = list(rows)
    bars(
        axes,
        [row.what for row in rows],
        {"paper": [row.paper[0] if row.paper else None for row in rows], "ours": [row.ours for row in rows]},
        log,
    )
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.legend(loc="best")


def group(rows: Iterable[Row], name: str) -> list[Row]:
    return [row for row in rows if row.group == name]


def figure_1a(rows: list[Row], path: Path) -> None:
    with drawn(path, 9.2, 3.4, 2) as (left, right):
        pairs(left, group(rows, "requests of 1K tokens"), "Requests of 1K tokens", "tokens a second", True)
        pairs(right, group(rows, "longest request"), "Longest request", "tokens", True)
        for axes in (left, right):
            axes.tick_params(axis="x", labelsize=8.5)


def figure_4c(rows: list[Row], path: Path) -> None:
    with drawn(path, 6.4, 3.6) as (axes,):
        contexts = [int(row.what.replace(",", "")) for row in group(rows, "ship the K/V")]
        names = ("ship the K/V", "ship the query, 2 devices", "ship the query, 4 devices")
        for colour, name in zip(COLOURS, names, strict=False):
            found = group(rows, name)
            axes.plot(contexts, [row.ours for row in found], "o-", color=colour, label=f"{name}, ours")
        for name, mark in (("ship the K/V", "s"), ("ship the query, 4 devices", "^")):
            said = [row.paper[0] for row in group(rows, name) if row.paper]
            axes.plot(contexts, said, mark, color=PAPER, markersize=7, fillstyle="none", label=f"{name[:14]}, paper")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
        axes.set_xticks(contexts, [f"{each // 1024}K" for each in contexts])
        axes.set_title("One layer of attention, Llama-2-13B")
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("milliseconds")
        axes.legend()


def figure_5(rows: list[Row], path: Path) -> None:
    with drawn(path, 9.2, 3.2, 2) as (left, right):
        pairs(left, group(rows, "batch, proactive"), "Batches of the four instances", "requests")
        pairs(right, group(rows, "busy devices, in sum"), "Busy devices, in sum", "of 4")


def gains(rows: list[Row], names: Sequence[str], titles: Sequence[str], path: Path, log: bool) -> None:
    """Gains by trace and model, and the range that the paper tells."""
    with drawn(path, 4.8 * len(names), 3.4, len(names)) as panels:
        for axes, name, title in zip(panels, names, titles, strict=True):
            found = [row for row in group(rows, name) if row.paper]
            if not found:
                continue
            models = list(dict.fromkeys(row.what.split(", ")[0] for row in found))
            traces = list(dict.fromkeys(row.what.split(", ")[1] for row in found))
            known = {row.what: row.ours for row in found}
            bars(axes, traces, {model: [known.get(f"{model}, {t}") for t in traces] for model in models}, log)
            low, high = found[0].paper or (1.0, 1.0)
            axes.axhspan(low, high, color=PAPER, alpha=0.3, lw=0, label="paper, all cells")
            axes.axhline(1.0, color=INK, lw=0.8, ls=":")
            axes.set_title(title)
            axes.set_ylabel("times its throughput")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], path: Path, title: str, across: str, up: str, limit: float
) -> None:
    """Lines over logarithmic axes, each named at its end; a limit, where it is above 0."""
    with drawn(path, 8.4, 4.4) as (axes,):
        for at, (name, points) in enumerate(series.items()):
            colour, style = COLOURS[at % len(COLOURS)], ("o-", "s--", "^:")[at // len(COLOURS) % 3]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=name)
        if limit:
            axes.axhline(limit, color=INK, lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        logarithmic(axes.yaxis)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def curves(series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Throughput by offered rate: a panel a trace, a line a system."""
    with drawn(path, 3.3 * len(series), 3.2, len(series)) as panels:
        for axes, (trace, systems) in zip(panels, series.items(), strict=True):
            for colour, (name, points) in zip(COLOURS, systems.items(), strict=False):
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
            axes.set_title(trace)
            axes.set_xlabel("requests a second, offered")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        panels[0].set_ylabel("tokens a second")
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def largest_rates(rows: list[Row], path: Path) -> None:
    sets = list(dict.fromkeys(row.group for row in rows))
    with drawn(path, 3.1 * len(sets) + 0.6, 3.4, len(sets)) as panels:
        for axes, name in zip(panels, sets, strict=True):
            pairs(axes, group(rows, name), name, "requests a second" if axes is panels[0] else "")
            axes.set_xticks(axes.get_xticks(), [row.what.replace(" ", "\n") for row in group(rows, name)], fontsize=8)


def standings(rows: list[Row], path: Path) -> None:
    """Each policy's share of what `auto` reaches, workload by workload."""
    names, groups = (list(dict.fromkeys(each)) for each in ((r.what for r in rows), (r.group for r in rows)))
    found = {(row.group, row.what): row.ours for row in rows}
    whole = {name: found.get((name, "auto")) for name in groups}
    series = {
        what: [(found.get((name, what)) or 0.0) / top if (top := whole[name]) else None for name in groups]
        for what in names
    }
    with drawn(path, max(0.42 * len(series) * len(groups), 4.0) + 1.0, 3.4) as (axes,):
        bars(axes, groups, series)
        axes.axhline(1.0, color=INK, lw=0.8, ls=":")
        axes.set_ylabel("of what auto reaches")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def masters(rows: list[Row], path: Path) -> None:
    with drawn(path, 9.6, 3.2, 2, sharey=True) as panels:
        for axes, count in zip(panels, (2, 4), strict=True):
            found = group(rows, f"scale up, {count} masters")
            title = f"A decode step with {count} masters"
            pairs(axes, found, title, "of one master's" if axes is panels[0] else "")
            axes.set_xticks(axes.get_xticks(), [row.what.replace(" x ", "\nx ") for row in found], fontsize=7.5)
            axes.axhline(1.0, color=INK, lw=0.8, ls=":")
