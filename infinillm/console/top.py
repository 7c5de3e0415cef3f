"""`infinillm top`: the pool, live in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infinillm import config
from infinillm.console.api import Api
from infinillm.errors import Unavailable

# A state of blocks, its colour and its glyph (for terminals without colours).
STATES = (("used", "cyan", "█"), ("cached", "blue", "▓"), ("lent", "magenta", "▒"), ("free", "bright_black", "·"))
BAR_WIDTH = 40  # at most; a narrow terminal gets less
FIGURES_WIDTH = 82  # of the table without its bar
PIPE_WIDTH = 120  # where there is no terminal to measure
Node = Mapping[str, Any]


def blocks_of(node: Node) -> dict[str, int]:
    """A node's own blocks by state, and what it borrows; cached blocks are room, but not empty."""
    count = {key: int(node.get(key) or 0) for key in ("blocks", "used", "cached", "lent", "borrowed")}
    count["free"] = max(count["blocks"] - count["used"] - count["lent"] - count["cached"], 0)
    return count


def bar(counts: Sequence[tuple[int, str, str]], width: int = BAR_WIDTH) -> Text:
    """Counts as one bar: each with its colour and glyph, and at least one cell if it is not zero."""
    total = sum(count for count, _, _ in counts) or 1
    cells = [max(round(count * width / total), count > 0) for count, _, _ in counts]
    while sum(cells) > width:  # rounding went over: the longest gives
        cells[cells.index(max(cells))] -= 1
    while 0 < sum(cells) < width:
        cells[cells.index(max(cells))] += 1
    text = Text()
    for cell, (_, colour, glyph) in zip(cells, counts, strict=True):
        text.append(glyph * cell, style=colour)
    return text


def legend() -> Text:
    return Text("   ").join(Text(f"{glyph} {state}", style=colour) for state, colour, glyph in STATES)


def console() -> Console:
    """Standard output, wide enough for the picture where nobody's terminal sets its width."""
    found = Console()
    return found if found.is_terminal else Console(width=PIPE_WIDTH)


def picture(pool: Mapping[str, Any], width: int) -> RenderableType:
    """The pool as the controller knows it: every node's blocks, the loans between them, who works on what.

    `width` is the terminal's, in columns.
    """
    room = min(max(width - FIGURES_WIDTH, 6), BAR_WIDTH)
    nodes: Sequence[Node] = sorted(pool.get("nodes") or (), key=lambda node: str(node["id"]))
    table = Table(box=box.SIMPLE, pad_edge=False, expand=False)
    for title in ("node", "blocks"):
        table.add_column(title, no_wrap=True)
    for title in ("used", "cached", "lent", "free", "borrowed", "running", "waiting"):
        table.add_column(title, justify="right", no_wrap=True)
    for node in nodes:
        count = blocks_of(node)
        drawn = bar([(count[state], colour, glyph) for state, colour, glyph in STATES], room)
        name = (
            str(node["id"])
            + ("" if node.get("serves") else " (memory)")
            + (" (draining)" if node.get("draining") else "")
        )
        figures = [f"{count[key]:,}" for key in ("used", "cached", "lent", "free", "borrowed")]
        table.add_row(name, drawn, *figures, f"{node.get('running') or 0}", f"{node.get('waiting') or 0}")
    parts: list[RenderableType] = [_headline(pool, nodes), table, legend()]
    if loans := list(pool.get("loans") or ()):
        parts += [Text(), *(_loan(loan) for loan in loans)]
    return Group(*parts)


def _headline(pool: Mapping[str, Any], nodes: Sequence[Node]) -> Text:
    model = pool.get("model") or {}
    name = model.get("name", "") if isinstance(model, Mapping) else str(model)
    total = sum(blocks_of(node)["blocks"] for node in nodes)
    longest = int(pool.get("max_tokens") or 0)
    facts = (str(name), f"{len(nodes)} nodes", f"{total:,} blocks", f"policy {pool.get('policy', '')}")
    return Text(" · ".join(fact for fact in (*facts, f"longest request now {longest:,} tokens") if fact), style="bold")


def _loan(loan: Mapping[str, Any]) -> Text:
    text = Text("  ")
    text.append(str(loan["lender"]), style="magenta").append(" lends ").append(str(loan["borrower"]), style="cyan")
    return text.append(f" {int(loan['blocks']):,} blocks, {int(loan.get('used') or 0):,} in use")


async def _watch(settings: config.Top) -> None:
    screen = console()
    async with Api(settings.url) as api:
        seen = await api.pool()
        if settings.once:
            screen.print(picture(seen, screen.width))
            return
        with Live(picture(seen, screen.width), console=screen, screen=True, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(settings.seconds)
                try:
                    live.update(picture(await api.pool(), screen.width), refresh=True)
                except Unavailable as error:
                    live.update(Text(error.message, style="red"), refresh=True)


def run(settings: config.Top) -> None:
    asyncio.run(_watch(settings))
