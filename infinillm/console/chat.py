"""`infinillm chat`: a conversation with the served model."""

from __future__ import annotations

import asyncio
import sys

from infinillm import config
from infinillm.console.api import Api, Message
from infinillm.errors import InfinillmError

HELP = "  /new begins again, /quit (or Ctrl-D) ends"


async def _answer(api: Api, settings: config.Chat, model: str, messages: list[Message]) -> str:
    """Stream the answer to standard output, and return it whole."""
    said = []
    answer = api.chat(messages, model=model, max_tokens=settings.max_tokens, temperature=settings.temperature)
    async for piece in answer:
        said.append(piece.text)
        print(piece.text, end="", flush=True)
    print()
    return "".join(said)


async def _talk(settings: config.Chat) -> None:
    first: list[Message] = [{"role": "system", "content": settings.system}] if settings.system else []
    async with Api(settings.url) as api:
        model = settings.model or await api.model()
        if settings.once:
            await _answer(api, settings, model, [*first, {"role": "user", "content": settings.once}])
            return
        print(f"{model} at {api.url}\n{HELP}", file=sys.stderr)
        messages = list(first)
        while (line := _ask()) is not None:
            if line == "/new":
                messages = list(first)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    messages.append({"role": "assistant", "content": await _answer(api, settings, model, messages)})
                except InfinillmError as error:
                    messages.pop()
                    print(f"\n{error.message}", file=sys.stderr)


def _ask() -> str | None:
    """What the person types; None when they are done."""
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line in {"/quit", "/exit"} else line


def run(settings: config.Chat) -> None:
    asyncio.run(_talk(settings))
