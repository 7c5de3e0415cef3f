"""Figures of a report page, as text: inline SVG and pictures in it, which need nothing from outside.

Colours are classes (`p0`, `p1`, ... of the policies), so that the page decides them, light or dark. A heat map is a
picture of one colour, the more opaque the larger the value; what a mark says when it is pointed at is its `data-tip`,
and of a heat map its `data-heat`. All text is escaped here.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 900  # of a wide figure, in its own units; the page scales it
LABELS = 130  # of them for names on the left
LINE = 34  # of one policy
HUE = (57, 135, 229)  # of a heat map: seen on light and on dark


class Series(NamedTuple):
    """What one policy has: its class, its name, and points (x, y) in order of x."""

    kind: str
    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    kind: str
    name: str
    value: float
    text: str


class Span(NamedTuple):
    """A policy's quantiles, in order, as (name, value)."""

    kind: str
    name: str
    marks: Sequence[tuple[str, float]]


def svg(width: float, height: float, inside: Sequence[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return head + "".join(inside) + "</svg>"


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# --- figures --------------------------------------------------------------------------------------------------------


def bars(rows: Sequence[Bar], label: str) -> str:
    """One bar a policy, with what it says at its end."""
    longest = max((row.value for row in rows), default=0.0) or 1.0
    inside = []
    for k, row in enumerate(rows):
        y, wide = LINE * k, (WIDTH - LABELS - 150) * row.value / longest
        inside.append(text(LABELS - 12, y + 21, short(row.name), "name", "end"))
        tip = escape(f"{row.name}: {row.text}")
        inside.append(
            f'<rect x="{LABELS}" y="{y + 7}" width="{wide:.1f}" height="20" rx="3" class="{row.kind}" '
            f'data-tip="{tip}"/>' + text(LABELS + wide + 8, y + 21, row.text, "value")
        )
    return svg(WIDTH, LINE * len(rows) + 6, inside, label)


def spans(rows: Sequence[Span], said: Callable[[float], str], label: str) -> str:
    """One line a policy, on a logarithmic scale, from its first quantile to its last; the last one is told."""
    values = [value for row in rows for _, value in row.marks if value > 0] or [1.0]
    low, high = min(values) / 1.6, max(*values, 4 * min(values)) * 1.2
    wide, foot = WIDTH - LABELS - 90, LINE * len(rows) + 4

    def at(value: float) -> float:
        return LABELS + wide * math.log(max(value, low) / low) / math.log(high / low)

    inside = []
    steps = (1, 2, 5) if high < 300 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for value in (step * 10.0**decade for decade in decades for step in steps):
        if low <= value <= high:
            x = at(value)
            inside += [line(x, 0, x, foot, "grid"), text(x, foot + 16, said(value), "tick", "middle")]
    for k, row in enumerate(rows):
        y = LINE * k + 17
        inside.append(text(LABELS - 12, y + 4, short(row.name), "name", "end"))
        if not row.marks:
            continue
        ends = at(row.marks[0][1]), at(row.marks[-1][1])
        inside.append(line(ends[0], y, ends[1], y, f"reach {row.kind}"))
        for n, (mark, value) in enumerate(row.marks):
            tip = escape(f"{row.name}: {mark} {said(value)}")
            inside.append(
                f'<circle cx="{at(value):.1f}" cy="{y}" r="{4 + n}" class="dot {row.kind}" data-tip="{tip}"/>'
            )
        inside.append(text(ends[1] + 12, y + 4, said(row.marks[-1][1]), "value"))
    return svg(WIDTH, foot + 22, inside, label)


def lines(rows: Sequence[Series], x_said: Callable[[float], str], y_said: Callable[[float], str], label: str) -> str:
    """Lines of all policies over one another."""
    points = [point for row in rows for point in row.points]
    right = max((x for x, _ in points), default=0.0) or 1.0
    top = _round(max((y for _, y in points), default=0.0) or 1.0)
    left, wide, high = 64, WIDTH - 64 - 20, 200

    def place(x: float, y: float) -> tuple[float, float]:
        return left + wide * x / right, 8 + high * (1 - y / top)

    inside = []
    for k in range(5):
        y = place(0, top * k / 4)[1]
        inside += [line(left, y, left + wide, y, "grid"), text(left - 8, y + 4, y_said(top * k / 4), "tick", "end")]
    inside += [text(left + wide * x / right, high + 28, x_said(x), "tick", "middle") for x in ticks(right)]
    for row in rows:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in row.points))
        inside.append(f'<polyline points="{path}" class="line {row.kind}"/>')
    inside += [
        f'<circle cx="{place(x, y)[0]:.1f}" cy="{place(x, y)[1]:.1f}" r="{4 if len(row.points) < 60 else 7}" '
        f'class="{"dot" if len(row.points) < 60 else "hidden"} {row.kind}" '
        f'data-tip="{escape(f"{row.name}, {x_said(x)}: {y_said(y)}")}"/>'
        for row in rows
        for x, y in row.points
    ]
    return svg(WIDTH, high + 34, inside, label)


def ticks(right: float) -> list[float]:
    """Round numbers from 0 to there, not more than six."""
    unit = 10.0 ** math.floor(math.log10(right / 5))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n * 5 >= right)
    return [k * step for k in range(6) if k * step <= right * (1 + 1e-9)]


def _round(amount: float) -> float:
    """A round number that is no smaller."""
    unit = 10.0 ** math.floor(math.log10(amount))
    return next(unit * step for step in (1, 2, 4, 6, 8, 10) if unit * step >= amount * (1 - 1e-9))


class Heat(NamedTuple):
    """A heat map: `values` of each row of `names`, from 0 to `most`.

    `columns` are names, too, or the seconds at which they begin; `right` is then where the figure ends. `unit` is what
    values are of, and `joint` what stands between the two names.
    """

    names: Sequence[str]
    columns: Sequence[str] | Sequence[float]
    values: Sequence[Sequence[float]]
    most: float
    unit: str
    joint: str
    width: float
    right: float
    stop: float  # where the last column ends


def heat(map: Heat, label: str) -> str:
    """The map, with names on its left and seconds or names below."""
    named = bool(map.columns) and isinstance(map.columns[0], str)
    left = 12 + 7 * max(len(short(name)) for name in map.names)
    wide = map.width - left - 10
    cell = wide / len(map.columns) if named else min(max(220 / len(map.names), 5), 22)
    high = cell * len(map.names)
    reach = wide if named else wide * map.stop / map.right
    rows = [bytes(min(255, round(255 * value / map.most)) for value in row) for row in map.values]
    inside = [f'<rect x="{left}" y="1" width="{wide:.1f}" height="{high:.1f}" class="frame"/>']
    about = {
        "names": list(map.names),
        "columns": list(map.columns) if named else [after(float(at)) for at in map.columns],
        "values": b64encode(b"".join(rows)).decode(),
        "most": map.most,
        "unit": map.unit,
        "joint": map.joint,
    }
    inside.append(
        f'<image x="{left}" y="1" width="{reach:.1f}" height="{high:.1f}" preserveAspectRatio="none" '
        f'href="{picture(rows)}" data-heat="{escape(json.dumps(about))}"/>'
    )
    shown = range(0, len(map.names), max(1, math.ceil(12 / cell)))
    inside += [text(left - 8, cell * (k + 0.5) + 5, short(map.names[k]), "tick", "end") for k in shown]
    if named:
        below = range(0, len(map.columns), max(1, math.ceil(50 / cell)))
        inside += [
            text(left + cell * (k + 0.5), high + 17, short(_first(map.columns[k]), 8), "tick", "middle") for k in below
        ]
    else:
        inside += [text(left + wide * x / map.right, high + 17, after(x), "tick", "middle") for x in ticks(map.right)]
    return svg(map.width, high + 24, inside, label)


def _first(name: object) -> str:
    return str(name).partition(" to ")[0]


def after(amount: float) -> str:
    """Seconds from the start, for people."""
    if amount < 7200:
        return f"{amount:.3g} s" if amount < 1000 else f"{amount:,.0f} s"
    return f"{amount / 3600:.3g} h"


def picture(rows: Sequence[bytes]) -> str:
    """A PNG, as an address with all of it inside: a byte a pixel, from nothing to the full colour."""

    def part(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    width, height = len(rows[0]), len(rows)
    found = (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + part(b"PLTE", bytes(HUE) * 256)
        + part(b"tRNS", bytes(range(256)))
        + part(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9))
        + part(b"IEND", b"")
    )
    return "data:image/png;base64," + b64encode(found).decode()
