"""The gRPC face of the gateway: InferenceService over the generation core."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from infinillm import wire
from infinillm.core.request import MOST_SEQUENCES, Sampling
from infinillm.errors import BadRequest, InfinillmError, TooLong
from infinillm.protos import inference_pb2 as pb
from infinillm.servers.inference import Ask, Inference, Piece, choice_seed
from infinillm.servers.openai_errors import reason
from infinillm.servers.openai_streams import Answers

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"]
DEFAULT_TOKENS = 16


class InferenceService:
    """Text or tokens in, a stream of text and tokens out."""

    def __init__(self, inference: Inference):
        self._inference = inference

    async def Generate(self, request: pb.GenerateRequest, call: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        try:
            async with aclosing(self._responses(await self._asks(request))) as responses:
                async for response in responses:
                    yield response
        except InfinillmError as error:
            if isinstance(error, TooLong) and not error.field:
                error.field = "max_tokens" if request.parameters.HasField("max_tokens") else "prompt"
            self._inference.metrics.add("refusals_total", reason=reason(error))
            raise

    async def _responses(self, asks: Sequence[Ask]) -> AsyncGenerator[pb.GenerateResponse, None]:
        produced, cached = [0] * len(asks), [0] * len(asks)
        answers = Answers(self._inference, asks)
        try:
            while (said := await answers.next()) is not None:
                index, piece = said
                produced[index] += len(piece.tokens)
                cached[index] = max(cached[index], piece.cached)
                response = _response(asks[index], piece)
                if piece.finish_reason:
                    response.prompt_tokens = len(asks[index].prompt)
                    response.completion_tokens, response.cached_tokens = produced[index], cached[index]
                yield response
        finally:
            await answers.close()

    async def ListModels(self, request: pb.ListModelsRequest, call: Any) -> pb.ListModelsResponse:
        await self._inference.pool.try_refresh()
        card = pb.ModelCard(id=self._inference.model, max_tokens=self._inference.pool.capacity)
        return pb.ListModelsResponse(models=[card])

    async def _asks(self, request: pb.GenerateRequest) -> list[Ask]:
        """One for each choice."""
        self._inference.check_model(request.model)
        asked = request.parameters
        n = asked.n if asked.HasField("n") else 1
        if not 1 <= n <= MOST_SEQUENCES:
            raise BadRequest(f"n must be between 1 and {MOST_SEQUENCES}, not {n}", field="n")
        if asked.HasField("cache_salt") and not asked.cache_salt:
            raise BadRequest("cache_salt must have at least one character", field="cache_salt")
        match request.WhichOneof("prompt"):
            case "text":
                special = asked.add_special_tokens or not asked.HasField("add_special_tokens")
                prompt = tuple(await self._inference.encode(request.text, special))
            case "tokens":
                prompt = self._inference.check_tokens(request.tokens.ids, "prompt")
            case _:
                raise BadRequest("prompt must be set: text or tokens", field="prompt")
        wanted = asked.max_tokens if asked.HasField("max_tokens") else None
        length = self._inference.room(len(prompt), wanted, DEFAULT_TOKENS, ("prompt", "max_tokens"))
        response = f"grpc-{secrets.token_hex(16)}"
        return [
            Ask(
                request=response,
                index=choice,
                prompt=prompt,
                sampling=_sampling(asked, length, choice),
                elastic=wanted is None,
                stop=tuple(asked.stop),
                include_stop=asked.include_stop_str_in_output,
                skip_special=asked.skip_special_tokens or not asked.HasField("skip_special_tokens"),
                cache_salt=asked.cache_salt,
            )
            for choice in range(n)
        ]


def _sampling(asked: pb.GenerateParameters, length: int, choice: int) -> Sampling:
    """How to sample the choice of this number: what is set, and else the defaults."""
    names = (name for name in (*wire.SAMPLING_NUMBERS, *wire.SAMPLING_OPTIONS) if asked.HasField(name))
    given: dict[str, Any] = {name: getattr(asked, name) for name in names}
    return Sampling(
        **{**given, "max_tokens": length, "seed": choice_seed(given.get("seed"), choice)},
        logit_bias=tuple(sorted(asked.logit_bias.items())),
        stop_token_ids=tuple(asked.stop_token_ids),
    )


def _response(ask: Ask, piece: Piece) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        id=ask.request,
        index=ask.index,
        text=piece.text,
        tokens=piece.tokens,
        logprobs=[wire.token_logprob_to_wire(value) for value in piece.logprobs],
        prompt_logprobs=[wire.token_logprob_to_wire(value) for value in piece.prompt_logprobs],
        finish_reason=piece.finish_reason,
    )
    match piece.stop_reason:
        case str(text):
            response.stop_string = text
        case int(token):
            response.stop_token = token
    return response
