"""What clients of the OpenAI API may ask, field by field, vLLM's extensions included.

Fields nobody knows are accepted in silence, as vLLM does; those we know but cannot honour are refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from infinillm import wire
from infinillm.core.request import MOST_BIASES, MOST_LOGPROBS, MOST_SEQUENCES, MOST_STOP_TOKENS, Sampling
from infinillm.errors import BadRequest
from infinillm.servers.inference import MOST_SALT_CHARS, MOST_STOP_CHARS, MOST_STOP_STRINGS, choice_seed
from infinillm.servers.inference_pool import MOST_CHOICES

MOST_PROMPTS = 256
MOST_MESSAGES = 65536

# Fields we do not honour, and the values of them that ask for nothing.
NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None,),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "priority": (None, 0),
    "prompt_embeds": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}

# Keywords that decide how a chat template is applied, and not what it says.
TEMPLATE_OWN = """
    add_generation_prompt chat_template continue_final_message conversation documents max_length messages padding
    return_assistant_tokens_mask return_dict return_tensors tokenize tokenizer_kwargs tools truncation
"""

Int: TypeAlias = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Token: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARS)]
Prompt: TypeAlias = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One text, several texts, one list of token ids or several, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be text, a list of texts, a list of token ids or a list of such lists")
    if type(value[0]) is int:
        value = [value]
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"must be at most {MOST_PROMPTS} prompts, not {len(value)}")
    for prompt in value:
        if isinstance(prompt, list):
            if not prompt or not all(type(token) is int for token in prompt):
                raise ValueError("must be made of non-empty lists of token ids, which are whole numbers")
        elif not isinstance(prompt, str):
            raise ValueError(f"must be made of texts or lists of token ids, not of {type(prompt).__name__}")
    return value


Prompts: TypeAlias = Annotated[
    Any, PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Asked(BaseModel):
    """What both endpoints have in common. None, and what is left out, is the default."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MOST_BIASES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MOST_SALT_CHARS)] | None = None
    user: str | None = None

    def check(self) -> None:
        """What no single field shows. Raises BadRequest."""
        for name, harmless in NOT_SUPPORTED.items():
            if (value := (self.model_extra or {}).get(name)) not in harmless:
                shown = json.dumps(value)
                shown = shown if len(shown) <= 80 else shown[:77] + "..."
                raise BadRequest(f"{name} is not supported here (it was {shown})", field=name)
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options has a meaning only with stream: true", field="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise BadRequest("prompt_logprobs cannot be streamed", field="prompt_logprobs")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        return bool(self.usage_wanted and self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None, choice: int) -> Sampling:
        """How to sample the choice of this number; a seed gives each choice another one."""
        given = {name: value for name in wire.SAMPLING_NUMBERS if (value := getattr(self, name)) is not None}
        return Sampling(
            **{**given, "max_tokens": max_tokens},
            seed=choice_seed(self.seed, choice),
            logit_bias=_biases(self.logit_bias or {}),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _biases(asked: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token in asked:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            message = f"logit_bias must map token ids to numbers; {token[:20]!r} is no token id"
            raise BadRequest(message, field="logit_bias")
    return tuple(sorted((int(token), float(bias)) for token, bias in asked.items()))


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Int | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise BadRequest("best_of is supported only where it equals n", field="best_of")
        if len(self.prompt) * (self.n or 1) > MOST_CHOICES:
            raise BadRequest(f"n times the number of prompts must be at most {MOST_CHOICES}", field="n")


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def spoken(self) -> dict[str, Any]:
        """As a chat template reads it."""
        return {**self.model_dump(exclude={"tool_calls"}), "content": self._content()}

    def _content(self) -> Any:
        return [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content or ""


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    echo: Literal[False] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs has a meaning only with logprobs: true", field="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise BadRequest("a conversation either goes on or takes a new turn", field="continue_final_message")

    def template(self) -> dict[str, Any]:
        """Keywords for the chat template; what decides how it is applied cannot be among them."""
        options = dict(self.chat_template_kwargs or {})
        for name in options:
            if not name.isidentifier() or name in TEMPLATE_OWN.split():
                raise BadRequest(f"chat_template_kwargs cannot set {name!r}", field="chat_template_kwargs")
        carry_on = bool(self.continue_final_message)
        return {
            **options,
            "continue_final_message": carry_on,
            "add_generation_prompt": not carry_on if self.add_generation_prompt is None else self.add_generation_prompt,
        }


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize"""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[Int]
