"""Scores to tokens: penalties, temperature, top-k, top-p, min-p, seeds and log-probabilities.

The order is vLLM's: bias, end tokens below `min_tokens`, penalties; then, for rows that are not greedy, temperature,
min-p, top-k, top-p. A row's choice depends on its scores, its seed and how many tokens it has produced, on nothing
else: the same request goes on alike on another worker, or in another batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from infinillm.core.request import Sampling
from infinillm.errors import BadRequest

SHORTLIST = 1024  # a nucleus (top-p) is nearly always among so many best tokens; if not, all are sorted
COLDEST = 1e-6  # temperatures below are as good as greedy
NEVER = float("-inf")


class Row(NamedTuple):
    """One sequence that needs a token. `tokens` is prompt and output; the last `produced` of them are output.

    `seed` is the request's, or one drawn for it when it was accepted; `eos_ids` are banned below `min_tokens`.
    """

    sampling: Sampling
    tokens: Sequence[int]
    produced: int
    seed: int
    eos_ids: tuple[int, ...]


class Choice(NamedTuple):
    """A token, and where asked its log-probability (natural) and the best (token, log-probability) alternatives.

    Log-probabilities are the model's own, before penalties and temperature.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check(sampling: Sampling, vocab: int, eos_ids: Sequence[int]) -> None:
    """Refuse ids outside the vocabulary, and stops that leave nothing to say. Raises BadRequest naming the field."""
    if sampling.min_tokens and len({*sampling.stop_token_ids, *eos_ids}) >= vocab:
        raise BadRequest("min_tokens with every token a stop leaves no token to choose", field="stop_token_ids")
    named = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
    for field, ids in named.items():
        for token in ids:
            if not 0 <= token < vocab:
                raise BadRequest(f"{field} names token {token}, outside the vocabulary of {vocab}", field=field)


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """One token for each row; logits [R, V] float32, left as they are."""
    if len(rows) != logits.shape[0]:
        raise ValueError(f"{len(rows)} rows for logits {list(logits.shape)}")
    scores = _adjusted(logits, rows)
    tokens: list[int] = scores.argmax(-1).tolist() if len(rows) else []
    chance = [n for n, row in enumerate(rows) if not row.sampling.greedy]
    if chance:
        for n, token in zip(chance, _draw(scores[chance], [rows[n] for n in chance]), strict=True):
            tokens[n] = token
    wants = [n for n, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not wants:
        return [Choice(token) for token in tokens]
    scored = score(logits[wants], [tokens[n] for n in wants], [rows[n].sampling.logprobs or 0 for n in wants])
    found = dict(zip(wants, scored, strict=True))
    return [found.get(n) or Choice(token) for n, token in enumerate(tokens)]


def score(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Choice]:
    """The log-probability of each given token and of the `tops[r]` best; logits [R, V] float32."""
    if not tokens:
        return []
    total = logits.logsumexp(-1, keepdim=True)
    picks = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    own = (logits.gather(-1, picks) - total).flatten().tolist()
    best, ids = logits.topk(min(max(tops), logits.shape[-1]), -1)
    values, names = (best - total).tolist(), ids.tolist()
    return [
        Choice(token, own[n], tuple(zip(names[n][:top], values[n][:top], strict=True)))
        for n, (token, top) in enumerate(zip(tokens, tops, strict=True))
    ]


def uniform(seed: int, count: int) -> float:
    """A number in [0, 1) that depends on both integers alone (SplitMix64's finaliser, twice)."""
    mask = (1 << 64) - 1
    x = seed & mask
    for step in (0x9E3779B97F4A7C15, 0x9E3779B97F4A7C15 * (count + 1)):
        x = (x + step) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return float((x >> 11) / (1 << 53))


def _adjusted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Scores after what greedy rows feel too; `logits` itself where no row asks for any of it."""
    scores, device = logits, logits.device
    for n, row in enumerate(rows):
        s = row.sampling
        early = row.produced < s.min_tokens
        if not (s.logit_bias or early or _penalised(s)):
            continue
        if scores is logits:
            scores = logits.clone()
        if s.logit_bias:
            ids, biases = zip(*s.logit_bias, strict=True)
            scores[n].index_add_(
                0, torch.tensor(ids, device=device), torch.tensor(biases, dtype=scores.dtype, device=device)
            )
        if early and (banned := [*row.eos_ids, *s.stop_token_ids]):
            scores[n, torch.tensor(banned, device=device)] = NEVER
        if _penalised(s):
            _penalise(scores[n], row)
    return scores


def _penalised(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0


def _penalise(scores: Tensor, row: Row) -> None:
    """Change scores [V] in place: repetition looks at prompt and output, the other two at output alone."""
    s, device = row.sampling, scores.device
    if s.repetition_penalty != 1.0:
        seen = torch.tensor(row.tokens, dtype=torch.int64, device=device).unique()
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / s.repetition_penalty, old * s.repetition_penalty)
    if row.produced and (s.presence_penalty or s.frequency_penalty):
        output = torch.tensor(row.tokens[-row.produced :], dtype=torch.int64, device=device)
        said, times = output.unique(return_counts=True)
        scores[said] -= s.presence_penalty + s.frequency_penalty * times.to(scores.dtype)


def _draw(scores: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token by chance for each row of scores [R, V]; rows are grouped by what they ask, not by who is near."""
    heat = _column(scores, [max(row.sampling.temperature, COLDEST) for row in rows], torch.float32)
    wide = (scores - scores.amax(-1, keepdim=True)) / heat  # 0 at the best token: no overflow, however cold
    if any(row.sampling.min_p > 0.0 for row in rows):
        floor = [math.log(row.sampling.min_p) if row.sampling.min_p > 0.0 else NEVER for row in rows]
        wide = wide.masked_fill(wide < _column(scores, floor, torch.float32), NEVER)
    luck = _column(scores, [uniform(row.seed, row.produced) for row in rows], torch.float64)
    groups: dict[tuple[int, bool], list[int]] = {}
    for n, row in enumerate(rows):
        groups.setdefault(_shortlist(row.sampling, scores.shape[-1]), []).append(n)
    tokens = [0] * len(rows)
    for (size, capped), members in groups.items():
        part, lucky = (wide, luck) if len(groups) == 1 else (wide[members], luck[members])
        if size:
            found = _pick_best(part, lucky, [rows[n].sampling.top_p for n in members], size, capped)
        else:
            found = _pick(part.exp(), lucky).tolist()
        for n, token in zip(members, found, strict=True):
            tokens[n] = token
    return tokens


def _shortlist(s: Sampling, vocab: int) -> tuple[int, bool]:
    """How many of the best tokens to look at, 0 where all are candidates; and whether no others can be."""
    if 0 < s.top_k < vocab:
        return s.top_k, True
    return (min(SHORTLIST, vocab) if s.top_p < 1.0 else 0), False


def _column(like: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _pick(mass: Tensor, luck: Tensor) -> Tensor:
    """The index [R] where luck [R, 1] falls in mass [R, N]; entries of mass 0 are never picked."""
    heap = mass.cumsum(-1, dtype=torch.float64)
    top = heap[:, -1:]
    return torch.searchsorted(heap, torch.minimum(luck * top, top.nextafter(-top)), right=True).flatten()


def _pick_best(wide: Tensor, luck: Tensor, top_p: Sequence[float], size: int, capped: bool) -> list[int]:
    """Among the `size` best of wide [R, V], which are all there is where `capped`, else where to look first."""
    vocab = wide.shape[-1]
    best, ids = wide.topk(size, -1)
    mass = best.exp()
    heap = mass.cumsum(-1, dtype=torch.float64)
    total = heap[:, -1:] if capped or size == vocab else wide.exp().sum(-1, keepdim=True, dtype=torch.float64)
    share = _column(wide, top_p, torch.float64) * total
    kept = mass.masked_fill(heap - mass >= share, 0.0)  # without what lies wholly beyond the nucleus
    tokens: list[int] = ids.gather(-1, _pick(kept, luck)[:, None]).flatten().tolist()
    if size < vocab and not capped:
        for n in (heap[:, -1:] < share).flatten().nonzero().flatten().tolist():  # the nucleus is wider still
            tokens[n] = _pick_best(wide[n : n + 1], luck[n : n + 1], [top_p[n]], min(16 * size, vocab), False)[0]
    return tokens
