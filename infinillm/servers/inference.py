"""The generation core that every face of the gateway shares: a prompt in, pieces of text out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from infinillm import rpc, wire
from infinillm.core.names import marks, prefix_hashes
from infinillm.core.request import MOVED, Sampling
from infinillm.core.types import TokenLogprob
from infinillm.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    InfinillmError,
    NotFound,
    Overloaded,
    TooLong,
    Unavailable,
)
from infinillm.model.tokenizer import Detokenizer, Tokenizer
from infinillm.protos import shard_pb2, types_pb2
from infinillm.servers.inference_pool import Place, Pool
from infinillm.servers.inference_text import Transcript
from infinillm.servers.request_log import RequestLog
from infinillm.telemetry import Metrics, log

SILENCE_SECONDS = 1800.0  # between two messages of a worker; prompts are computed, and queues waited in, silently
MOST_LOSSES = 3  # workers that may be lost to one sequence and replaced; those that hand it over do not count
GO_ON_SECONDS = 20.0  # in which somebody must be found to go on for a worker that was lost
FORGIVEN_SECONDS = 5.0  # after which that may be a worker of the same name
LOOK_SECONDS = 0.25
MEET_SECONDS = 2.0
MOST_STOP_STRINGS, MOST_STOP_CHARS = 16, 1000
SHORT_TEXT = 1024  # characters that are tokenised faster than handed to a thread
TOKENISING_THREADS = 2
SHORT_TOKENS = 256
MOST_TOKENS = 2**31 - 1
MOST_NAME_CHARS = 256
MOST_SALT_CHARS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One sequence to continue, how to choose its tokens, and how its text is cut."""

    request: str  # id of the response it belongs to
    index: int  # of the choice
    prompt: tuple[int, ...]
    sampling: Sampling
    elastic: bool  # nobody asked for a length: `max_tokens` counts as far as the pool can hold that much
    stop: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    cache_salt: str

    def __post_init__(self) -> None:
        if not self.prompt:
            raise BadRequest("prompt must have at least one token", field="prompt")
        if len(self.stop) > MOST_STOP_STRINGS:
            raise BadRequest(f"stop has more than {MOST_STOP_STRINGS} strings", field="stop")
        if not all(0 < len(stop) <= MOST_STOP_CHARS for stop in self.stop):
            raise BadRequest(f"each stop string must have 1 to {MOST_STOP_CHARS} characters", field="stop")
        if len(self.cache_salt) > MOST_SALT_CHARS:
            raise BadRequest(f"cache_salt has more than {MOST_SALT_CHARS} characters", field="cache_salt")

    @property
    def id(self) -> str:
        return f"{self.request}-{self.index}"


@dataclass(frozen=True, slots=True)
class Piece:
    """What came next of one sequence. The last piece, and only that, has a finish reason.

    `tokens` are all tokens produced, those of a stop included; `text` is what the client sees of them.
    `stop_reason` is the stop string or the id in `stop_token_ids` that ended it.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str = ""
    stop_reason: int | str | None = None
    cached: int = 0


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one sequence as one."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        logprobs=tuple(value for piece in pieces for value in piece.logprobs),
        prompt_logprobs=tuple(value for piece in pieces for value in piece.prompt_logprobs),
        cached=max(piece.cached for piece in pieces),
    )


class Inference:
    """Tokenises, routes, streams from the worker, detokenises."""

    def __init__(self, tokenizer: Tokenizer, pool: Pool, model: str, metrics: Metrics, requests: RequestLog):
        self.tokenizer, self.pool, self.model, self.metrics, self.requests = tokenizer, pool, model, metrics, requests
        self._threads = ThreadPoolExecutor(TOKENISING_THREADS, "tokenise")
        self._longest_token = max(len(tokenizer.token_text(token)) for token in range(tokenizer.vocab_size))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def check_model(self, name: str | None) -> None:
        if not name or name == self.model:
            return
        if len(name) > MOST_NAME_CHARS:
            raise BadRequest(f"model has {len(name):,} characters; no name has that many", field="model")
        raise NotFound(f"the model {name!r} does not exist; this server has {self.model!r}", field="model")

    # --- prompts -------------------------------------------------------------------------------------------------

    async def encode(self, text: str, special: bool = True) -> list[int]:
        self._check_characters(len(text), "prompt")
        if len(text) <= SHORT_TEXT:
            return self.tokenizer.encode(text, special)
        return await self._apart(partial(self.tokenizer.encode, text, special))

    async def decode(self, tokens: Sequence[int], skip_special: bool) -> str:
        if len(tokens) <= SHORT_TOKENS:
            return self.tokenizer.decode(tokens, skip_special)
        return await self._apart(partial(_decoded, self.tokenizer, tokens, skip_special))

    async def spell(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        return await self._apart(lambda: [self.tokenizer.token_text(token) for token in tokens])

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        self._check_characters(sum(len(str(message.get("content"))) for message in messages), "messages")
        return await self._apart(partial(self.tokenizer.chat, messages, **options))

    def check_tokens(self, tokens: Sequence[int], field: str) -> tuple[int, ...]:
        """Token ids from outside, as a prompt."""
        size, limit = self.tokenizer.vocab_size, self.pool.limit
        if limit and len(tokens) > limit:
            raise TooLong(
                f"this server takes requests of up to {self.pool.capacity:,} tokens now, not {len(tokens):,}",
                field=field,
            )
        if tokens and (min(tokens) < 0 or max(tokens) >= size):
            raise BadRequest(f"{field} has token ids outside the vocabulary of {size}", field=field)
        return tuple(tokens)

    def _check_characters(self, count: int, field: str) -> None:
        """Refuse, before any work, a text that no number of tokens within the limit can spell."""
        limit = self.pool.limit
        if limit and count > limit * self._longest_token:
            raise TooLong(
                f"{count:,} characters are more than the {self.pool.capacity:,} tokens of now can spell", field=field
            )

    def _check_sampling(self, sampling: Sampling) -> None:
        size = self.tokenizer.vocab_size
        named = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
        for field, tokens in named.items():
            if tokens and max(tokens) >= size:
                raise BadRequest(f"{field} has token ids outside the vocabulary of {size}", field=field)

    async def _apart(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def room(self, prompt_tokens: int, wanted: int | None, default: int | None, fields: tuple[str, str]) -> int:
        """How many tokens a request may produce: what it asks for, or else `default`, or all the model takes.

        Raises TooLong, naming one of `fields` (the prompt's, the length's), where the model does not take that many.
        Whether the pool does, the controller says when it routes.
        """
        limit = self.pool.limit
        least = 1 if wanted is None else wanted
        if limit and prompt_tokens + least > limit:
            asked = f"{prompt_tokens:,} in the prompt and {least:,} to produce"
            raise TooLong(
                f"this server takes requests of up to {self.pool.capacity:,} tokens now; this one has {asked}",
                field=fields[0] if wanted is None or prompt_tokens >= limit else fields[1],
            )
        if wanted is not None:
            return wanted
        left = limit - prompt_tokens if limit else MOST_TOKENS
        return left if default is None else min(default, left)

    # --- generation ----------------------------------------------------------------------------------------------

    async def generate(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The pieces of one sequence; closing the iterator cancels the request at the worker."""
        self._check_sampling(ask.sampling)
        transcript = Transcript(
            self.tokenizer,
            ask.stop,
            include_stop=ask.include_stop,
            skip_special=ask.skip_special,
            min_tokens=ask.sampling.min_tokens,
        )
        began = heard = time.monotonic()
        with self.requests.request(ask.prompt, ask.cache_salt) as entry:
            async with aclosing(self._messages(ask)) as messages:
                async for message in messages:
                    piece = _piece(ask, message, transcript)
                    if piece.tokens:
                        now, count = time.monotonic(), len(piece.tokens)
                        entry.answer += piece.tokens
                        if transcript.tokens == count:
                            self.metrics.observe("time_to_first_token_seconds", now - began)
                        else:
                            self.metrics.observe("inter_token_latency_seconds", (now - heard) / count)
                        heard = now
                    if piece.finish_reason:
                        self.metrics.observe("e2e_request_latency_seconds", time.monotonic() - began)
                    yield piece
                    if piece.finish_reason:
                        return

    async def _messages(self, ask: Ask) -> AsyncGenerator[shard_pb2.ShardGenerateResponse, None]:
        """What the worker says. One that is lost is replaced by another, which goes on after the tokens there are."""
        request = shard_pb2.ShardGenerateRequest(
            id=ask.id,
            prompt=ask.prompt,
            sampling=wire.sampling_to_wire(ask.sampling),
            eos_ids=self.tokenizer.eos_ids,
            cache_salt=ask.cache_salt,
        )
        gone: list[str] = []  # nodes that left the sequence since its last token
        losses = 0
        failure: InfinillmError | None = None
        left: tuple[str, str] | None = None  # who handed it over, and keeps what it had for a while
        found: list[Place] = []  # who is ready to go on
        while True:
            place = found.pop() if found else await self._place(ask, request, gone, failure)
            self.pool.note(ask.request, ask.index, place)
            holders = dict((*([left] if left else []), *place.holders))
            del request.holders[:]
            request.holders.extend(types_pb2.Place(node=node, address=where) for node, where in holders.items())
            moved, left, finding = False, None, None
            try:
                async with aclosing(_heard(self.pool.shard(place.address).Generate(request), place.node)) as stream:
                    async for message in stream:
                        if message.leaving:
                            finding = asyncio.create_task(self._find(ask, request, place, found))
                        elif message.finish_reason != MOVED:
                            if request.already:
                                message.cached_tokens = 0  # the first worker has told
                            yield message
                            if message.finish_reason:
                                return
                            request.already.extend(message.tokens)
                            request.sampling.ClearField("prompt_logprobs")
                            gone.clear()
                        if moved := message.finish_reason == MOVED:
                            left = (place.node, place.address)
                            raise Unavailable(f"worker {place.node} is draining")
                raise Unavailable(f"worker {place.node} ended the stream without a reason")
            except (Unavailable, Overloaded) as error:
                failure = error
                gone.append(place.node)
                losses += not moved
                if losses > MOST_LOSSES:
                    raise
                self.metrics.add("resubmissions_total", reason="moved" if moved else "lost")
                said = len(request.already)
                log("request_resubmitted", request=ask.id, node=place.node, tokens=said, reason=error.message)
            finally:
                if finding is not None:
                    finding.cancel()

    async def _find(
        self, ask: Ask, request: shard_pb2.ShardGenerateRequest, leaving: Place, found: list[Place]
    ) -> None:
        """Add who goes on with a sequence whose worker is leaving, once it has met that worker; then the latter may."""
        left = types_pb2.Place(node=leaving.node, address=leaving.address)
        with suppress(InfinillmError):  # then it is handed over without
            place = await self._place(ask, request, [leaving.node], None)
            await self.pool.shard(place.address).Meet(shard_pb2.MeetRequest(nodes=[left]), timeout=MEET_SECONDS)
            found.append(place)
            wanted = shard_pb2.HandOverRequest(id=ask.id)
            await self.pool.shard(leaving.address).HandOver(wanted, timeout=MEET_SECONDS)

    async def _place(
        self,
        ask: Ask,
        request: shard_pb2.ShardGenerateRequest,
        gone: Sequence[str],
        failure: InfinillmError | None,
    ) -> Place:
        """Who is to serve a sequence from here on, as long as it may become there. Raises why nobody can.

        Where a worker was lost, others may be away for the same reason, and come back: that is waited for.
        """
        prompt, already, most = len(ask.prompt), len(request.already), ask.sampling.max_tokens
        least = max(ask.sampling.min_tokens, already + 1, 1) if ask.elastic else most
        marked, now = await self._marks(ask, request.already), time.monotonic()
        forgiven, patience = now + FORGIVEN_SECONDS, now + GO_ON_SECONDS * isinstance(failure, Unavailable)
        while True:
            try:
                exclude = gone if now < forgiven else ()
                place = await self.pool.route(prompt + already, prompt + least, exclude, marked)
                break
            except InfinillmError as error:
                now = time.monotonic()
                if now < patience and isinstance(error, Unavailable | TooLong):
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                if failure is not None and already:
                    lost = f"{failure.message} (after {already:,} tokens)"
                    raise Unavailable(f"{lost}; nobody else can go on: {error.message}") from None
                raise failure or error from None
        request.sampling.max_tokens = max(least, min(most, place.reach - prompt))
        return place

    async def _marks(self, ask: Ask, already: Sequence[int]) -> list[int]:
        """The landmarks of what is to be computed: whoever has them need not compute it again."""
        size = self.pool.block_size
        if not size:
            return []
        naming = partial(prefix_hashes, (*ask.prompt, *already), size, ask.cache_salt)
        return marks(naming() if len(ask.prompt) <= SHORT_TEXT else await self._apart(naming))


def choice_seed(seed: int | None, choice: int) -> int | None:
    """A seed gives each choice another one, within 64 bits."""
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


def _decoded(tokenizer: Tokenizer, tokens: Sequence[int], skip_special: bool) -> str:
    """Token by token: to decode all at once would hold the interpreter, whatever the thread."""
    pieces = Detokenizer(tokenizer, skip_special)
    return "".join(pieces.add(token) for token in tokens) + pieces.end()


async def _heard(stream: rpc.Stream, node: str) -> AsyncGenerator[Any, None]:
    """The messages of a stream; silence for too long is an error, and leaving cancels it."""
    loop = asyncio.get_running_loop()
    alarm = loop.call_later(SILENCE_SECONDS, stream.cancel)
    try:
        async for message in stream:
            alarm.cancel()
            yield message
            alarm = loop.call_later(SILENCE_SECONDS, stream.cancel)
    except Cancelled:
        if loop.time() >= alarm.when():
            raise DeadlineExceeded(f"worker {node} said nothing for {SILENCE_SECONDS:g} seconds") from None
        raise Unavailable(f"worker {node} broke off") from None  # not we: whoever leaves closes the generator
    finally:
        alarm.cancel()
        stream.cancel()


def _piece(ask: Ask, message: shard_pb2.ShardGenerateResponse, transcript: Transcript) -> Piece:
    """One message of the worker, as the client sees it."""
    reason, text, stop, count = message.finish_reason, "", None, 0
    for count, token in enumerate(message.tokens, 1):
        ends = reason == "stop" and count == len(message.tokens)
        more, stop = (transcript.stop if ends else transcript.push)(token)
        text += more
        if stop is not None:
            break
    if reason and stop is None:
        more, stop = transcript.end()
        text += more
    stop_reason: int | str | None = stop
    if stop is None and reason == "stop" and message.stop_token in ask.sampling.stop_token_ids:
        stop_reason = message.stop_token
    return Piece(
        text,
        tuple(message.tokens[:count]),
        tuple(wire.token_logprob_from_wire(value) for value in message.logprobs[:count]),
        tuple(wire.token_logprob_from_wire(value) for value in message.prompt_logprobs),
        "stop" if stop is not None else reason,
        stop_reason,
        message.cached_tokens,
    )
