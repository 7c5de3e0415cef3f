"""From a step to tokens: one forward pass, and a token for every sequence whose end it reached."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from infinillm.core.request import Sequence
from infinillm.core.types import Chunk, SeqId, TokenLogprob
from infinillm.model.decoder import Attend, Decoder
from infinillm.model.sampler import Choice, Row, sample, score


class Runner:
    """Holds the model; keeps nothing about sequences."""

    def __init__(self, decoder: Decoder, threads: int):
        self.decoder, self.threads = decoder, threads

    def settle(self) -> None:
        """Called once, first, by the thread that runs steps: OpenMP counts threads for each caller of its own.

        No other thread may have asked for more than one: the teams they leave behind count as busy, and where they
        outnumber the cores, ours would sleep and wake at every barrier.
        """
        torch.set_num_threads(self.threads)

    @torch.inference_mode()
    def run(
        self, chunks: Seq[Chunk], sequences: Mapping[SeqId, Sequence], attend: Attend
    ) -> tuple[dict[SeqId, Choice], dict[SeqId, list[TokenLogprob]]]:
        """One pass over the chunks, in order.

        Returns the next token of every sequence whose last token was in its chunk (none where the model computed NaN or
        infinity), and the log-probabilities of prompt tokens for those that asked. Whatever `attend` raises comes
        through; nothing has changed then.
        """
        tokens: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        ending: list[Sequence] = []
        for chunk in chunks:
            sequence = sequences[chunk.seq]
            tokens.extend(sequence.tokens[chunk.start : chunk.stop])
            positions.extend(range(chunk.start, chunk.stop))
            if chunk.stop == sequence.length and sequence.produced < sequence.request.sampling.max_tokens:
                ends.append(len(tokens) - 1)
                ending.append(sequence)
        device = self.decoder.device
        hidden = self.decoder.forward(
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            attend,
        )
        prompts = self._prompts(chunks, sequences, hidden)
        if not ends:
            return {}, prompts
        rows = hidden if len(ends) == len(tokens) else hidden[torch.tensor(ends, device=device)]
        logits = self.decoder.logits(rows)
        sound = logits.sum(-1).isfinite()
        if not bool(sound.all()):  # such a row has no next token; the others do
            ending = [s for s, good in zip(ending, sound.tolist(), strict=True) if good]
            logits = logits[sound]
        choices = sample(logits, [_row(sequence) for sequence in ending])
        return {s.id: choice for s, choice in zip(ending, choices, strict=True)}, prompts

    def _prompts(
        self, chunks: Seq[Chunk], sequences: Mapping[SeqId, Sequence], hidden: Tensor
    ) -> dict[SeqId, list[TokenLogprob]]:
        """Log-probability of each prompt token after the chunk's first position, for sequences that want them."""
        wanted: dict[SeqId, list[TokenLogprob]] = {}
        at = 0
        for chunk in chunks:
            sequence = sequences[chunk.seq]
            count = sequence.request.sampling.prompt_logprobs
            rows = min(chunk.stop, len(sequence.request.prompt) - 1) - chunk.start
            if count is not None and rows > 0:
                told = sequence.tokens[chunk.start + 1 : chunk.start + 1 + rows]
                scored = score(self.decoder.logits(hidden[at : at + rows]), told, [count] * rows)
                wanted[chunk.seq] = [logprob for choice in scored if (logprob := told_logprob(choice)) is not None]
            at += chunk.stop - chunk.start
        return wanted


def told_logprob(choice: Choice) -> TokenLogprob | None:
    """What the caller asked to know about a token, if anything."""
    return None if choice.logprob is None else TokenLogprob(choice.token, choice.logprob, choice.top)


def _row(sequence: Sequence) -> Row:
    request = sequence.request
    return Row(request.sampling, sequence.tokens, sequence.produced, request.seed, request.eos_ids)
