"""`infinillm demo`: a document that fits no worker, answered by workers that lend each other memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from infinillm import config
from infinillm.console.api import Api, Message
from infinillm.console.progress import Progress
from infinillm.console.top import COLOURS, bar, blocks_of, console, picture
from infinillm.core import policy
from infinillm.core.types import Ledger, Node, Refused
from infinillm.errors import BadRequest, InfinillmError
from infinillm.model.tokenizer import Tokenizer
from infinillm.servers import local

QUESTION = "What is the name of the rescue boat?"  # said once, about a tenth of the way in
BLOCK_SIZE = 16  # tokens
PATIENCE_SECONDS = 60.0  # a busy laptop may take long over one chunk; a dead worker is noticed at once all the same
LOOK_SECONDS = 0.25  # between two looks at the pool
LINE_SECONDS = 5.0  # between two lines where there is no terminal
RETURN_SECONDS = 20.0  # for idle loans to go home


def asked(settings: config.Demo) -> tuple[str, list[Message]]:
    """The question, and the conversation that holds the whole document."""
    if settings.document:
        try:
            document = Path(settings.document).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"--document {settings.document}: {error}", field="document") from None
    else:
        document = resources.files("infinillm.console").joinpath("assets/logbook.txt").read_text(encoding="utf-8")
    question = settings.question or QUESTION
    return question, [{"role": "user", "content": f"{document}\n\nQuestion: {question}"}]


def refused_alone(pool: Mapping[str, Any], prompt: int, longest: int) -> str:
    """What the policy without lending says of the same request to the same nodes; empty if it would serve it."""
    nodes = [Node(**{name: node[name] for name in Node.__dataclass_fields__ if name in node}) for node in pool["nodes"]]
    ledger = Ledger(nodes={node.id: node for node in nodes})
    answer = policy.named("isolated").route(ledger, prompt, longest, BLOCK_SIZE, ())
    return answer.reason if isinstance(answer, Refused) else ""


@dataclass(slots=True)
class Seen:
    """What is known of the request while it runs."""

    prompt: int  # tokens
    since: float = field(default_factory=time.monotonic)
    id: str = ""
    computed: int = 0  # tokens of the prompt read so far
    answer: str = ""
    pieces: int = 0
    first: float = 0.0  # when the first piece came, and the last; seconds, monotonic
    last: float = 0.0
    pool: Mapping[str, Any] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)  # blocks of this request by node: the most seen
    home: str = ""  # the worker that serves it
    usage: Mapping[str, Any] | None = None

    def look(self, pool: Mapping[str, Any]) -> None:
        self.pool = pool
        for layout in pool.get("layouts") or ():
            self.place(layout["spans"])

    def place(self, spans: Sequence[Mapping[str, Any]]) -> None:
        held: dict[str, int] = {}
        for span in spans:
            blocks = -(-(int(span["stop"]) - int(span["start"])) // BLOCK_SIZE)
            held[str(span["node"])] = held.get(str(span["node"]), 0) + blocks
        if sum(held.values()) >= sum(self.held.values()):
            self.held = held

    @property
    def placed(self) -> str:
        return " + ".join(f"{blocks} on {node}" for node, blocks in sorted(self.held.items())) or "nothing yet"


def drawn(seen: Seen) -> RenderableType:
    """The request's own blocks, by the worker that holds them."""
    nodes = sorted(seen.held)
    colours = {node: COLOURS[index % len(COLOURS)] for index, node in enumerate(nodes)}
    wanted = -(-seen.prompt // BLOCK_SIZE)
    counts = [(seen.held[node], colours[node], "█") for node in nodes]
    missing = max(wanted - sum(seen.held.values()), 0)
    text = Text("this request  ").append_text(bar([*counts, (missing, "bright_black", "·")], 48))
    rows = [text]
    for node in nodes:
        share = seen.held[node] / sum(seen.held.values())
        rows.append(
            Text("              ").append("█ ", colours[node]).append(f"{node}: {seen.held[node]} blocks, {share:.0%}")
        )
    return Group(*rows)


def view(seen: Seen, width: int) -> RenderableType:
    """The whole picture while the request runs."""
    spent = time.monotonic() - seen.since
    read = f"{min(seen.computed, seen.prompt):,} of {seen.prompt:,} tokens"
    doing = f"reading the document: {read}, {spent:.0f} s" if not seen.pieces else f"answering, {spent:.0f} s"
    answer = Text(seen.answer or "...", style="bold" if seen.answer else "dim")
    return Group(Panel(answer, title=doing, title_align="left"), drawn(seen), picture(seen.pool, width), Text())


async def _ask(api: Api, settings: config.Demo, messages: Sequence[Message], seen: Seen) -> None:
    answer = api.chat(messages, model=await api.model(), max_tokens=settings.max_tokens, temperature=0.0)
    async for piece in answer:
        seen.id = piece.id
        seen.usage = piece.usage or seen.usage
        if piece.text:
            seen.last = time.monotonic()
            seen.first = seen.first or seen.last
            seen.answer += piece.text
            seen.pieces += 1
            if seen.pieces == 1:  # it is alive: ask its worker itself
                (sequence,) = await api.placement(seen.id)
                seen.home = str(sequence["node"])
                seen.place(sequence["spans"])


async def _show(api: Api, screen: Console, seen: Seen, asking: asyncio.Task[None], addresses: Sequence[str]) -> None:
    """Look at the pool and the workers' metrics while the request runs, and draw what is there."""
    told = time.monotonic()
    with Live(view(seen, screen.width), console=screen, auto_refresh=False, transient=True) as live:
        while not asking.done():
            seen.look(await api.pool())
            counts = await asyncio.gather(*(api.measured(each, "infinillm_step_tokens_sum") for each in addresses))
            seen.computed = int(sum(counts))
            if screen.is_terminal:
                live.update(view(seen, screen.width), refresh=True)
            elif time.monotonic() - told >= LINE_SECONDS:
                told = time.monotonic()
                read = f"{min(seen.computed, seen.prompt):,} of {seen.prompt:,} tokens"
                screen.print(f"  {told - seen.since:3.0f} s  {read}; blocks: {seen.placed}", highlight=False)
            await asyncio.wait([asking], timeout=LOOK_SECONDS)
    await asking


def _room(pool: Mapping[str, Any]) -> tuple[int, int]:
    """Blocks that are free (kept prefixes count as free), and all blocks."""
    counts = [blocks_of(node) for node in pool["nodes"]]
    return sum(count["free"] + count["cached"] for count in counts), sum(count["blocks"] for count in counts)


async def _settle(api: Api) -> Mapping[str, Any]:
    """Wait until every block is home again."""
    deadline = time.monotonic() + RETURN_SECONDS
    while True:
        pool = await api.pool()
        free, total = _room(pool)
        if (free == total and not pool["loans"]) or time.monotonic() > deadline:
            return pool
        await asyncio.sleep(LOOK_SECONDS)


def _outcome(screen: Console, seen: Seen, kv_blocks: int) -> None:
    screen.print(Panel(Text(seen.answer.strip(), style="bold green"), title="answer", title_align="left"))
    screen.print(drawn(seen))
    for node in sorted(set(seen.held) - {seen.home} if seen.home else ()):
        screen.print(f"              {node} lent {seen.home} {seen.held[node]} blocks", highlight=False)
    prompt = int((seen.usage or {}).get("prompt_tokens") or seen.prompt)
    reading = seen.first - seen.since
    screen.print(
        f"\n  {prompt:,} tokens of prompt were read in {reading:.1f} s ({prompt / reading:,.0f} tokens/s); "
        f"one worker alone holds {kv_blocks * BLOCK_SIZE:,}.",
        highlight=False,
    )
    if seen.pieces > 1 and (tokens := int((seen.usage or {}).get("completion_tokens") or 0)) > 1:
        rate = (tokens - 1) / (seen.last - seen.first)
        screen.print(f"  The answer came at {rate:.1f} tokens/s, most of its K/V on other workers.", highlight=False)


async def _play(settings: config.Demo, screen: Console) -> None:
    began = time.monotonic()
    question, messages = asked(settings)
    screen.print(Rule("infinillm: one pool of K/V memory", style="cyan"))
    with Progress() as progress:
        prepare = config.Prepare(model=settings.model, cache_dir=settings.cache_dir)
        folder = await local.prepare(prepare, progress.say)
        progress.say("counting the document's tokens", 0.0)
        prompt = len(await asyncio.to_thread(lambda: Tokenizer.load(folder).chat(messages)))
        kv_blocks = -(-prompt // BLOCK_SIZE // 2)
        serve = config.Serve(
            model=settings.model,
            port=0,
            workers=settings.workers,
            threads=settings.threads,
            dtype=settings.dtype,
            kv_blocks=kv_blocks,
            block_size=BLOCK_SIZE,
            cache_dir=settings.cache_dir,
            patience_seconds=PATIENCE_SECONDS,
            log_level="error",
        )
        async with local.cluster(serve, progress.say, echo=False) as cluster, Api(cluster.url) as api:
            progress.end()
            await _tell(api, screen, settings, prompt, kv_blocks, question)
            seen = Seen(prompt)
            asking = asyncio.create_task(_ask(api, settings, messages, seen))
            dying = asyncio.create_task(cluster.death())
            addresses = [worker["metrics"] for worker in cluster.addresses["workers"]]
            showing = asyncio.create_task(_show(api, screen, seen, asking, addresses))
            try:
                await asyncio.wait([showing, dying], return_when=asyncio.FIRST_COMPLETED)
                if dying.done():
                    raise InfinillmError(f"{dying.result().name} ended; its last words:{dying.result().last_words}")
                await showing
            finally:
                for task in (asking, showing, dying):
                    task.cancel()
            _outcome(screen, seen, kv_blocks)
            free, total = _room(await _settle(api))
            screen.print(f"  Afterwards {free:,} of {total:,} blocks are free again.", highlight=False)
    screen.print(Rule(f"done in {time.monotonic() - began:.0f} s; every process has ended", style="cyan"))


async def _tell(api: Api, screen: Console, settings: config.Demo, prompt: int, kv_blocks: int, question: str) -> None:
    """What is about to happen, with the numbers of this cluster."""
    pool = await api.pool()
    need = -(-prompt // BLOCK_SIZE)
    screen.print(
        f"\n  {settings.workers} workers, each with {kv_blocks} blocks of K/V memory, "
        f"{kv_blocks * BLOCK_SIZE:,} tokens.\n"
        f"  The document and the question are {prompt:,} tokens: {need} blocks, more than any worker has.",
        highlight=False,
    )
    if reason := refused_alone(pool, prompt, prompt + settings.max_tokens - 1):
        screen.print("  Without lending (--policy isolated) the same nodes would refuse it:", highlight=False)
        screen.print(f"    [red]{reason}[/]", highlight=False)
    screen.print(
        f"  With lending the pool takes requests of up to {int(pool['max_tokens']):,} tokens.", highlight=False
    )
    screen.print(f"\n  [bold]{question}[/]\n", highlight=False)


def run(settings: config.Demo) -> None:
    asyncio.run(_play(settings, console()))
