"""Text and chat completions as the official client sees them, streamed and not."""

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from infinillm.errors import NotFound, Unavailable
from infinillm.model.tokenizer import Tokenizer
from infinillm.servers.inference_pool import Pool
from tests import tiny
from tests.servers.fake_shard import MODEL, TEXT, Site, encode, logprob, unreachable

PROMPT = "The pool remembers"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def _fresh(site: Site) -> None:
    site.reset()


def template(messages: list[dict[str, Any]]) -> list[int]:
    return list(tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


# --- text -----------------------------------------------------------------------------------------------------------


def test_completion(site: Site, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200)
    tokens = encode(TEXT)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (TEXT, "stop", None)
    assert choice.model_extra["stop_reason"] is None
    assert answer.usage.prompt_tokens == len(encode(PROMPT))
    assert answer.usage.completion_tokens == len(tokens) + 1  # the end of text is a token
    assert answer.usage.total_tokens == len(encode(PROMPT)) + len(tokens) + 1
    (asked,) = site.asked
    assert asked.id == f"{answer.id}-0"
    assert list(asked.prompt) == encode(PROMPT)
    assert list(asked.eos_ids) == [tiny.tokenizer().eos_token_id]
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.max_tokens) == (1.0, 1.0, 200)


def test_completions_have_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text == tiny.tokenizer().decode(encode(TEXT)[:16])


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_streams_join_to_the_whole(site: Site, client: openai.OpenAI, batch: int) -> None:
    site.change(batch=batch)
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=200, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_where_it_was_asked_for(site: Site, client: openai.OpenAI) -> None:
    site.change(cached=2)
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2


def test_several_prompts_and_choices(site: Site, client: openai.OpenAI) -> None:
    site.change(script=lambda prompt: encode(f"{len(prompt)} tokens"))
    prompts = ["a", "a b c d"]
    answer = client.completions.create(model=MODEL, prompt=prompts, n=3, seed=10, max_tokens=50)
    assert [choice.index for choice in answer.choices] == list(range(6))
    lengths = [len(encode(prompt)) for prompt in prompts for _ in range(3)]
    assert [choice.text for choice in answer.choices] == [f"{length} tokens" for length in lengths]
    assert answer.usage.prompt_tokens == sum(len(encode(prompt)) for prompt in prompts)
    seeds = {request.id: request.sampling.seed for request in site.asked}
    assert [seeds[f"{answer.id}-{index}"] for index in range(6)] == [10, 11, 12, 10, 11, 12]


def test_streamed_choices_are_told_apart(site: Site, client: openai.OpenAI) -> None:
    texts = ["", "", ""]
    for chunk in client.completions.create(model=MODEL, prompt=PROMPT, n=3, max_tokens=200, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT] * 3


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8, 9]]])
def test_token_prompts(site: Site, client: openai.OpenAI, prompt: Any) -> None:
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    wanted = prompt if isinstance(prompt[0], list) else [prompt]
    assert sorted(list(request.prompt) for request in site.asked) == sorted(wanted)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, stream: bool) -> None:
    given: dict[str, Any] = {"model": MODEL, "prompt": ["one", [5, 6]], "echo": True, "max_tokens": 2, "stream": stream}
    said = tiny.tokenizer().decode(encode(TEXT)[:2])
    texts = ["", ""]
    answer = client.completions.create(**given)
    for choice in [chunk.choices[0] for chunk in answer] if stream else answer.choices:
        texts[choice.index] += choice.text
    assert texts == ["one" + said, tiny.tokenizer().decode([5, 6]) + said]


# --- log-probabilities ----------------------------------------------------------------------------------------------


def spelled(token: int) -> str:
    return tiny.tokenizer().decode([token])


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, logprobs=2)
    tokens = encode(TEXT)[:4]
    found = answer.choices[0].logprobs
    assert found.tokens == [spelled(token) for token in tokens]
    assert found.token_logprobs == [logprob(token, 0) for token in tokens]
    assert found.text_offset == [len(tiny.tokenizer().decode(tokens[:i])) for i in range(4)]
    for token, top in zip(tokens, found.top_logprobs, strict=True):
        assert top == {spelled(token): logprob(token, 0), spelled(token + 1): logprob(token + 1, 1)}


def test_echo_scores_the_prompt(site: Site, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    prompt = encode(PROMPT)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT
    assert found.tokens == [spelled(token) for token in prompt]
    assert found.token_logprobs == [None, *(logprob(token, 0) for token in prompt[1:])]
    assert found.top_logprobs[0] is None
    assert site.asked[0].sampling.max_tokens == 0
    assert site.asked[0].sampling.prompt_logprobs == 1


def test_echo_scores_the_prompt_in_streams(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, logprobs=0, echo=True, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    tokens = [token for chunk in chunks for token in chunk.logprobs.tokens]
    offsets = [offset for chunk in chunks for offset in chunk.logprobs.text_offset]
    whole = [*encode(PROMPT), *encode(TEXT)[:2]]
    assert tokens == [spelled(token) for token in whole]
    assert offsets == [len(tiny.tokenizer().decode(whole[:i])) for i in range(len(whole))]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_chats(client: openai.OpenAI, stream: bool) -> None:
    tokens = encode(TEXT)[:-2]
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=len(tokens), logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    entries = [entry for choice in choices for entry in choice.logprobs.content]
    assert [entry.logprob for entry in entries] == [logprob(token, 0) for token in tokens]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == tiny.tokenizer().decode(tokens)
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(tokens)
    assert entries[0].top_logprobs[0].token == entries[0].token


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=1, extra_body={"prompt_logprobs": 1})
    nothing, second = answer.choices[0].model_extra["prompt_logprobs"]
    assert nothing is None
    assert second == {"6": {"logprob": logprob(6, 0), "rank": 1, "decoded_token": spelled(6)}}


def test_token_ids(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, logprobs=0, extra_body=extra)
    choice = answer.choices[0]
    tokens = encode(TEXT)[:3]
    assert choice.model_extra["token_ids"] == tokens
    assert choice.model_extra["prompt_token_ids"] == encode(PROMPT)
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in tokens]
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, extra_body=extra)
    assert chat.choices[0].model_extra["token_ids"] == tokens
    assert chat.model_extra["prompt_token_ids"] == template(HELLO)
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, extra_body=extra, stream=True)
    chunks = list(stream)
    assert [token for chunk in chunks for token in chunk.choices[0].model_extra["token_ids"]] == tokens
    assert chunks[0].model_extra["prompt_token_ids"] == template(HELLO)


# --- chat -----------------------------------------------------------------------------------------------------------


def test_chat(site: Site, client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    (asked,) = site.asked
    assert list(asked.prompt) == template(messages)
    assert asked.sampling.max_tokens == 500 - len(asked.prompt)  # all the pool has room for
    assert asked.sampling.temperature == 0


def test_chat_in_text_parts(site: Site, client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert list(site.asked[0].prompt) == template([{"role": "user", "content": "one\ntwo"}])


def test_chat_streams(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options=options))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content for delta in deltas) == TEXT
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(encode(TEXT)) + 1


def test_max_completion_tokens_come_first(site: Site, client: openai.OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3)
    client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=4, max_tokens=9)
    assert sorted(request.sampling.max_tokens for request in site.asked) == [3, 4]


def test_a_turn_can_be_continued(site: Site, client: openai.OpenAI) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    client.chat.completions.create(model=MODEL, messages=messages, extra_body={"continue_final_message": True})
    text = tiny.tokenizer().decode(list(site.asked[0].prompt))
    assert text.endswith("Well")


# --- stops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        ("ledger", False, TEXT.partition("ledger")[0]),
        (["nowhere", "本語 a"], False, TEXT.partition("本語 a")[0]),
        (["🦊"], True, TEXT.partition("🦊")[0] + "🦊"),
    ],
)
def test_stop_strings(
    site: Site, client: openai.OpenAI, stop: Any, include: bool, text: str, stream: bool, batch: int
) -> None:
    site.change(batch=batch, hold_after=60)  # the worker would go on: leaving cancels it
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=400,
        stop=stop,
        stream=stream,
        extra_body={"include_stop_str_in_output": include},
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].model_extra["stop_reason"] == (stop if isinstance(stop, str) else stop[-1])
    site.until(lambda: set(site.ended.values()) <= {"cancelled", "finished"})


def test_stop_tokens(site: Site, client: openai.OpenAI) -> None:
    token = encode(TEXT)[6]
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=99, extra_body={"stop_token_ids": [token], "ignore_eos": True}
    )
    at = encode(TEXT).index(token)
    assert answer.choices[0].text == tiny.tokenizer().decode(encode(TEXT)[:at])
    assert answer.choices[0].model_extra["stop_reason"] == token
    assert answer.usage.completion_tokens == at + 1
    assert site.asked[0].sampling.ignore_eos


def test_special_tokens_can_be_seen(site: Site, client: openai.OpenAI) -> None:
    start, end = tiny.tokenizer().bos_token, tiny.tokenizer().eos_token
    site.change(script=lambda prompt: [*encode("a"), tiny.tokenizer().bos_token_id, *encode("b")])
    hidden = client.completions.create(model=MODEL, prompt=PROMPT)
    assert hidden.choices[0].text == "ab"
    extra = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    seen = client.completions.create(model=MODEL, prompt=PROMPT, extra_body=extra)
    assert seen.choices[0].text == f"a{start}b{end}"


def test_every_sampling_field_reaches_the_worker(site: Site, client: openai.OpenAI) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "seed": -3,
        "max_tokens": 7,
    }
    extra = {"top_k": 5, "min_p": 0.125, "repetition_penalty": 1.25, "min_tokens": 2, "ignore_eos": True}
    client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        logit_bias={"5": -100, "6": 1.5},
        user="somebody",
        extra_body={**extra, "stop_token_ids": [3], "cache_salt": "mine", "priority": 0, "unheard_of": [1]},
        **given,
    )
    (asked,) = site.asked
    for name, value in {**given, **extra}.items():
        assert getattr(asked.sampling, name) == value, name
    assert dict(asked.sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert list(asked.sampling.stop_token_ids) == [3]
    assert asked.cache_salt == "mine"


# --- the rest of the API --------------------------------------------------------------------------------------------


def test_models_say_what_the_pool_can_serve_now(site: Site, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.model_extra["max_model_len"] == 500
    site.controller.max_tokens = 5000
    assert client.models.retrieve(MODEL).model_extra["max_model_len"] == 1000  # what the model was made for


def test_placement(site: Site, client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=PROMPT)
    many = client.completions.create(model=MODEL, prompt=PROMPT, n=2)
    found = site.http.get(f"/v1/requests/{one.id}/placement").json()
    (sequence,) = found["data"]
    assert sequence["id"] == f"{one.id}-0"
    assert sequence["node"] in {"worker-0", "worker-1"}
    assert sequence["spans"][1] == {"node": "other", "start": 16, "stop": 20}
    found = site.http.get(f"/v1/requests/{many.id}/placement").json()
    assert [sequence["id"] for sequence in found["data"]] == [f"{many.id}-0", f"{many.id}-1"]
    assert site.http.get("/v1/requests/cmpl-0/placement").status_code == 404


def test_placement_of_what_another_gateway_served(site: Site, client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=PROMPT)
    many = client.completions.create(model=MODEL, prompt=[PROMPT] * 10, n=2)
    nobody = f"cmpl-{'0' * 32}"

    async def ask(*ids: str) -> list[list[tuple[str, str]]]:
        other = Pool(site.controller_address, 0)
        other.start()
        try:
            return [[(place.node, answer.id) for place, answer in await other.placement(id)] for id in ids]
        finally:
            await other.close()

    (alone,), among = site.call(ask(one.id, many.id))
    assert alone[1] == f"{one.id}-0"
    assert all(id in shard.ended for node, id in [alone, *among] for shard in site.shards if shard.id == node)
    assert {id for _, id in among} == {f"{many.id}-{index}" for index in range(20)}
    with pytest.raises(NotFound):
        site.call(ask(nobody))
    asked = sum(shard.placements for shard in site.shards)
    with pytest.raises(NotFound, match="cmpl-0"):
        site.call(ask("cmpl-0" * 1000))
    assert sum(shard.placements for shard in site.shards) == asked  # no id of ours: nobody was asked
    with unreachable(site.shards[1]):
        found = site.call(ask(site.shards[0].asked[-1].id.rpartition("-")[0]))
        assert found[0]  # what one knows is told, though the other does not answer
        with pytest.raises(Unavailable):
            site.call(ask(nobody))


def test_pool(site: Site) -> None:
    found = site.http.get("/v1/pool").json()
    assert (found["epoch"], found["policy"], found["max_tokens"]) == (7, "pooled", 500)
    assert [node["id"] for node in found["nodes"]] == ["worker-0", "worker-1"]
    assert found["nodes"][0]["blocks"] == 40
    assert found["loans"] == []


def test_large_texts_are_spelled_apart(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    for name in ("token_bytes", "decode"):
        kept = getattr(Tokenizer, name)

        def noted(self: Tokenizer, *given: Any, kept: Any = kept, **words: Any) -> Any:
            threads.add(threading.current_thread().name)
            return kept(self, *given, **words)

        monkeypatch.setattr(Tokenizer, name, noted)
    site.controller.max_tokens = 1000
    tokens = encode("word, é🦊 ") * 40
    assert site.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "word, é🦊 " * 40}
    body = {"model": MODEL, "prompt": tokens, "max_tokens": 0, "echo": True, "prompt_logprobs": 2, "logprobs": 2}
    (choice,) = site.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "word, é🦊 " * 40
    site.http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})
    assert threads
    assert site.thread.name not in threads


def test_tokenize(site: Site) -> None:
    def post(path: str, **body: Any) -> Any:
        return site.http.post(path, json=body).raise_for_status().json()

    found = post("/tokenize", prompt="Hé", return_token_strs=True)
    assert found == {
        "count": len(encode("Hé")),
        "max_model_len": 500,
        "tokens": encode("Hé"),
        "token_strs": [spelled(token) for token in encode("Hé")],
    }
    assert post("/tokenize", messages=HELLO)["tokens"] == template(HELLO)
    assert post("/detokenize", tokens=encode(TEXT)) == {"prompt": TEXT}


def test_the_process_speaks_of_itself(site: Site, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt=PROMPT)
    assert site.http.get("/health").status_code == 200
    assert site.http.get("/ready").status_code == 200
    assert site.http.get("/version").json()["version"]
    metrics = site.http.get("/metrics").text
    assert 'infinillm_http_requests_total{route="/v1/completions",status="200"}' in metrics
    assert "infinillm_time_to_first_token_seconds_count" in metrics
    paths = site.http.get("/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["messages"]["items"]["properties"]["role"]["type"] == "string"


def test_not_ready_without_workers(site: Site) -> None:
    site.controller.serves = False
    site.call(site.gateway.pool.refresh())
    assert site.http.get("/ready").status_code == 503
    assert site.http.get("/health").status_code == 200


def test_labels_are_echoed_and_never_used(site: Site) -> None:
    body = {"model": MODEL, "prompt": PROMPT}
    labelled = site.http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    assert labelled.headers["x-request-id"] == "mine"
    assert labelled.json()["id"] != "mine"
    plain = site.http.post("/v1/completions", json=body)
    assert plain.headers["x-request-id"] == plain.json()["id"]
