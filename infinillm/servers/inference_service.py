"""The gRPC face of the gateway: InferenceService over the generation core."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from infinillm import wire
from infinillm.core.request import Sampling
from infinillm.errors import BadRequest, InfinillmError
from infinillm.protos import inference_pb2 as pb
from infinillm.servers.inference import Ask, Inference
from infinillm.servers.openai_errors import reason

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"]
DEFAULT_TOKENS = 16
FIELDS = (
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "logprobs",
)


class InferenceService:
    """Text or tokens in, a stream of text and tokens out."""

    def __init__(self, inference: Inference):
        self._inference = inference

    async def Generate(self, request: pb.GenerateRequest, call: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        try:
            async with aclosing(self._responses(await self._ask(request))) as responses:
                async for response in responses:
                    yield response
        except InfinillmError as error:
            self._inference.metrics.add("refusals_total", reason=reason(error))
            raise

    async def _responses(self, ask: Ask) -> AsyncGenerator[pb.GenerateResponse, None]:
        produced = cached = 0
        async with aclosing(self._inference.generate(ask)) as pieces:
            async for piece in pieces:
                produced += len(piece.tokens)
                cached = max(cached, piece.cached)
                response = pb.GenerateResponse(
                    id=ask.request,
                    text=piece.text,
                    tokens=piece.tokens,
                    logprobs=[wire.token_logprob_to_wire(value) for value in piece.logprobs],
                    finish_reason=piece.finish_reason,
                )
                if piece.finish_reason:
                    response.prompt_tokens = len(ask.prompt)
                    response.completion_tokens, response.cached_tokens = produced, cached
                yield response

    async def ListModels(self, request: pb.ListModelsRequest, call: Any) -> pb.ListModelsResponse:
        await self._inference.pool.try_refresh()
        card = pb.ModelCard(id=self._inference.model, max_tokens=self._inference.pool.capacity)
        return pb.ListModelsResponse(models=[card])

    async def _ask(self, request: pb.GenerateRequest) -> Ask:
        self._inference.check_model(request.model)
        match request.WhichOneof("prompt"):
            case "text":
                prompt = tuple(await self._inference.encode(request.text))
            case "tokens":
                prompt = self._inference.check_tokens(request.tokens.ids)
            case _:
                raise BadRequest("prompt must be set: text or tokens", field="prompt")
        asked = request.parameters
        given = {name: getattr(asked, name) for name in FIELDS if asked.HasField(name)}
        wanted = asked.max_tokens if asked.HasField("max_tokens") else None
        sampling = Sampling(
            max_tokens=await self._inference.room(len(prompt), wanted, DEFAULT_TOKENS, ("prompt", "max_tokens")),
            logit_bias=tuple(sorted(asked.logit_bias.items())),
            stop_token_ids=tuple(asked.stop_token_ids),
            **given,
        )
        return Ask(
            request=f"grpc-{secrets.token_hex(16)}",
            index=0,
            prompt=prompt,
            sampling=sampling,
            stop=tuple(asked.stop),
            include_stop=False,
            skip_special=True,
            cache_salt="",
        )
