"""A request as accepted: its tokens, how to sample, when to stop. Everything is checked here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infinillm.core.types import Chunk, Layout, SeqId, Span
from infinillm.errors import BadRequest

MOST_LOGPROBS = 20
MOST_STOP_TOKENS = 1024
MOST_SEQUENCES = 16
MOST_BIASES = 1024
MOVED = "moved"  # the finish reason of a request that a worker hands over: it is to go on elsewhere


def _within(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise BadRequest(f"{name} must be a number, not {value!r}", field=name)
    if not low <= value <= high:
        raise BadRequest(f"{name} must be between {low:g} and {high:g}, not {value:g}", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop. `temperature` 0 is greedy; `top_k` 0 and `seed` None mean unset.

    Field names follow OpenAI's API and, beyond it, vLLM's.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the chosen token; None: no logprobs at all
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.min_tokens > self.max_tokens:
            raise BadRequest(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", field="min_tokens")
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, -1, 2**31 - 1)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise BadRequest("top_p must be above 0", field="top_p")
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        _within("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if len(self.logit_bias) > MOST_BIASES:
            raise BadRequest(f"logit_bias has more than {MOST_BIASES} entries", field="logit_bias")
        if len(self.stop_token_ids) > MOST_STOP_TOKENS:
            raise BadRequest(f"stop_token_ids has more than {MOST_STOP_TOKENS} entries", field="stop_token_ids")
        for token, bias in self.logit_bias:
            _within("logit_bias", token, 0, 2**31 - 1)
            _within("logit_bias", bias, -100.0, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _within(name, count, 0, MOST_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue. `arrival` orders requests; it is any increasing number."""

    id: SeqId
    prompt: tuple[int, ...]
    sampling: Sampling
    arrival: float = 0.0
    eos_ids: tuple[int, ...] = ()
    cache_salt: str = ""  # prefixes are shared only among requests with the same salt
    seed: int = 0  # the caller's, or one drawn when the request was accepted
    already: tuple[int, ...] = ()  # output that another worker produced: it counts as produced

    def __post_init__(self) -> None:
        if not self.prompt:
            raise BadRequest("prompt must have at least one token", field="prompt")
        if self.already and len(self.already) >= self.sampling.max_tokens:
            most = self.sampling.max_tokens
            raise BadRequest(f"{len(self.already)} of {most} tokens exist already: none is left", field="already")

    @property
    def longest(self) -> int:
        """Tokens whose K/V the request may come to need; the last token produced is never stored."""
        return len(self.prompt) + max(self.sampling.max_tokens - 1, 0)


Interval = tuple[int, int]


def add(done: tuple[Interval, ...], start: int, stop: int) -> tuple[Interval, ...]:
    """`done` with [start, stop) in it, merged where intervals touch."""
    if start >= stop:
        return done
    kept: list[Interval] = []
    for a, b in done:
        if b < start or a > stop:
            kept.append((a, b))
        else:
            start, stop = min(a, start), max(b, stop)
    return tuple(sorted([*kept, (start, stop)]))


def remove(done: tuple[Interval, ...], start: int, stop: int) -> tuple[Interval, ...]:
    """`done` without [start, stop): a span that was lost is a hole, and a hole is pending work."""
    if start >= stop:
        return done
    kept: list[Interval] = []
    for a, b in done:
        if a < min(b, start):
            kept.append((a, min(b, start)))
        if max(a, stop) < b:
            kept.append((max(a, stop), b))
    return tuple(kept)


def total(done: tuple[Interval, ...]) -> int:
    """How many positions these are."""
    return sum(stop - start for start, stop in done)


def first_gap(done: tuple[Interval, ...], length: int) -> Interval | None:
    """The first run of positions below `length` that nobody has computed, or None."""
    start = 0
    for a, b in done:
        if a > start:
            return (start, min(a, length)) if start < length else None
        start = max(start, b)
    return (start, length) if start < length else None


# Theory of operation. A sequence is WAITING until a step admits it, RUNNING while steps compute chunks of it, and ends
# FINISHED. Preemption gives its blocks back and makes it WAITING again with nothing done. `done` says which positions
# have K/V somewhere in the pool; pending work is the complement below the length. A sequence has a token to sample
# exactly when a chunk reached the end of its tokens.
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
TRANSITIONS = {
    (WAITING, "admit"): RUNNING,
    (RUNNING, "preempt"): WAITING,
    (RUNNING, "finish"): FINISHED,
    (WAITING, "finish"): FINISHED,
}


@dataclass(slots=True, eq=False)
class Sequence:
    """The engine's record of one request in progress; changed only through its methods."""

    request: Request
    tokens: list[int]  # prompt, then output
    state: str = WAITING
    done: tuple[Interval, ...] = ()
    layout: Layout = ()  # what is reserved, block by block: spans tile, whole blocks, ordered by start
    cached: int = 0  # tokens of the prompt found in the prefix cache at admission
    holes: tuple[Interval, ...] = ()  # what was computed, then lost with a node, and not computed again yet
    preemptions: int = 0

    @property
    def id(self) -> SeqId:
        return self.request.id

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def produced(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def gap(self) -> Interval | None:
        return first_gap(self.done, self.length)

    @property
    def computed(self) -> int:
        """Tokens that have K/V somewhere."""
        return total(self.done)

    def ends_with(self, token: int) -> tuple[str, int | None]:
        """Why the sequence is over with the token it has just got, if it is, and the token that was to stop it."""
        request, sampling = self.request, self.request.sampling
        if self.produced >= sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return "stop", token
            if token in request.eos_ids and not sampling.ignore_eos:
                return "stop", token
        return ("length", None) if self.produced >= sampling.max_tokens else ("", None)

    def pass_through(self, verb: str) -> None:
        """Take one transition; an illegal one is a missing key, and a defect of ours."""
        self.state = TRANSITIONS[self.state, verb]

    def compute(self, chunk: Chunk) -> int:
        """The chunk's positions have K/V now; returns how many of them had been lost."""
        before = total(self.holes)
        self.done = add(self.done, chunk.start, chunk.stop)
        self.holes = remove(self.holes, chunk.start, chunk.stop)
        return before - total(self.holes)

    def have(self, span: Span) -> None:
        """Whole blocks of the sequence are there already."""
        self.done = add(self.done, span.start, span.stop)
        self.layout = tuple(sorted((*self.layout, span), key=lambda each: each.start))

    def lose(self, start: int, stop: int) -> int:
        """These positions have no K/V any more; returns how many of them had."""
        before = self.done
        self.done = remove(self.done, start, stop)
        for a, b in before:
            self.holes = add(self.holes, max(a, start), min(b, stop))
        return total(before) - total(self.done)

    def forget(self) -> None:
        """Preemption: nothing is computed any more, nothing reserved."""
        self.pass_through("preempt")
        self.let_go()
        self.preemptions += 1

    def let_go(self) -> None:
        """Of all it has, wherever that is."""
        self.done, self.layout, self.holes = (), (), ()
