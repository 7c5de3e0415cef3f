"""`infinillm top`: the pool, live in the terminal."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from infinillm import config
from infinillm.console.api import Api
from infinillm.console.changes import changes, short
from infinillm.errors import Unavailable

# A state of blocks, its colour and its glyph (for terminals without colours).
STATES = (
    ("used", "cyan", "█"),
    ("cached", "blue", "▓"),
    ("lent", "magenta", "▒"),
    ("free", "bright_black", "·"),
    ("borrowed", "yellow", "░"),
)
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")  # of nodes, in the bars of requests
BAR_WIDTH = 40  # at most; a narrow terminal gets less
SMALL_WIDTH = 16  # of a bar in a list
FIGURES_WIDTH = 82  # of the table without its bar
PIPE_WIDTH = 120  # where there is no terminal to measure
MOST_REQUESTS = 8  # that are drawn one by one: the longest
MOST_NEWS, NEWS_SECONDS = 6, 30.0
Node = Mapping[str, Any]


class News(NamedTuple):
    """A line about what happened, and when it was seen: `at` seconds, monotonic, and the time of day."""

    at: float
    clock: str
    text: str


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


def picture(pool: Mapping[str, Any], width: int, news: Sequence[News] = ()) -> RenderableType:
    """The pool as the controller knows it: every node's blocks, who lends to whom, where requests lie, what happened.

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
        figures = [f"{count[key]:,}" for key in ("used", "cached", "lent", "free", "borrowed")]
        table.add_row(_name(node), drawn, *figures, f"{node.get('running') or 0}", f"{node.get('waiting') or 0}")
    parts: list[RenderableType] = [_headline(pool, nodes), table, legend()]
    if loans := list(pool.get("loans") or ()):
        parts += [Text(), *(_loan(loan) for loan in loans)]
    if layouts := list(pool.get("layouts") or ()):
        parts += [Text(), _requests(layouts, [str(node["id"]) for node in nodes])]
    if news:
        parts += [Text(), *(Text(f"  {each.clock}  {each.text}", style="dim") for each in news)]
    return Group(*parts)


def _name(node: Node) -> str:
    tier = str(node.get("tier") or "device")
    kind = f" ({tier})" if tier != "device" else "" if node.get("serves") else " (memory)"
    return str(node["id"]) + kind + (" (draining)" if node.get("draining") else "")


def _headline(pool: Mapping[str, Any], nodes: Sequence[Node]) -> Text:
    model = pool.get("model") or {}
    name = model.get("name", "") if isinstance(model, Mapping) else str(model)
    total = sum(blocks_of(node)["blocks"] for node in nodes)
    longest = int(pool.get("max_tokens") or 0)
    facts = (str(name), f"{len(nodes)} nodes", f"{total:,} blocks", f"policy {pool.get('policy', '')}")
    return Text(" · ".join(fact for fact in (*facts, f"longest request now {longest:,} tokens") if fact), style="bold")


def _loan(loan: Mapping[str, Any]) -> Text:
    blocks, used, wanted = (int(loan.get(key) or 0) for key in ("blocks", "used", "recalled"))
    text = Text("  ").append_text(bar([(used, "magenta", "█"), (blocks - used, "bright_black", "·")], SMALL_WIDTH))
    text.append(f"  {loan['lender']}", style="magenta").append(" ─▶ ").append(str(loan["borrower"]), style="cyan")
    text.append(f"  {used:,} of {blocks:,} blocks in use")
    return text.append(f", {wanted:,} wanted back", style="bold red") if wanted else text


def _requests(layouts: Sequence[Mapping[str, Any]], nodes: Sequence[str]) -> RenderableType:
    """The longest requests that run, each with the nodes its tokens are on."""
    held = {str(layout["sequence"]): tokens_by_node(layout["spans"]) for layout in layouts}
    homes = {str(layout["sequence"]): str(layout.get("home") or "") for layout in layouts}
    everybody = list(dict.fromkeys([*nodes, *(node for each in held.values() for node in each)]))
    colours = {node: COLOURS[index % len(COLOURS)] for index, node in enumerate(everybody)}
    ranked = sorted(held, key=lambda sequence: (-sum(held[sequence].values()), sequence))
    grid = Table.grid(padding=(0, 2))
    for _ in range(4):
        grid.add_column(no_wrap=True)
    for sequence in ranked[:MOST_REQUESTS]:
        where = held[sequence]
        drawn = bar([(tokens, colours[node], "█") for node, tokens in where.items()], SMALL_WIDTH)
        told = Text(" + ").join(Text(f"{tokens:,} on {node}", style=colours[node]) for node, tokens in where.items())
        served = Text(f"at {homes[sequence]}") if homes[sequence] else Text()
        grid.add_row(Text("  ").append_text(drawn), short(sequence), served, told)
    more = len(ranked) - MOST_REQUESTS
    return Group(grid, Text(f"  and {more:,} shorter requests")) if more > 0 else grid


def tokens_by_node(spans: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Tokens of a layout on each node, in the order of the nodes' first spans."""
    held: dict[str, int] = {}
    for span in spans:
        held[str(span["node"])] = held.get(str(span["node"]), 0) + int(span["stop"]) - int(span["start"])
    return held


def told(pool: Mapping[str, Any], happened: Sequence[str]) -> str:
    """One look as a line of JSON: what GET /v1/pool answers, and what happened since the look before."""
    return json.dumps({**pool, "happened": list(happened)}, ensure_ascii=False)


async def _watch(settings: config.Top) -> None:
    screen = console()
    async with Api(settings.url) as api:
        seen = await api.pool()
        if settings.once:
            print(told(seen, ())) if settings.json else screen.print(picture(seen, screen.width))
        elif settings.json:
            await _tell(api, settings.seconds, seen)
        else:
            await _draw(api, settings.seconds, seen, screen)


async def _tell(api: Api, seconds: float, seen: Mapping[str, Any]) -> None:
    """A line for every look, for as long as there is a gateway to ask."""
    print(told(seen, ()), flush=True)
    while True:
        await asyncio.sleep(seconds)
        before, seen = seen, await api.pool()
        print(told(seen, changes(before, seen)), flush=True)


async def _draw(api: Api, seconds: float, seen: Mapping[str, Any], screen: Console) -> None:
    news: deque[News] = deque(maxlen=MOST_NEWS)
    with Live(picture(seen, screen.width), console=screen, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(seconds)
            now = time.monotonic()
            try:
                before, seen = seen, await api.pool()
            except Unavailable as error:
                live.update(Text(error.message, style="red"), refresh=True)
                continue
            clock = time.strftime("%H:%M:%S")
            news.extend(News(now, clock, line) for line in changes(before, seen))
            fresh = [each for each in news if now - each.at <= NEWS_SECONDS]
            live.update(picture(seen, screen.width, fresh), refresh=True)


def run(settings: config.Top) -> None:
    asyncio.run(_watch(settings))
