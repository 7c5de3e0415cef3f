"""Bad input: every mistake gets a 4xx in OpenAI's shape that names the parameter, and the next good request works."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from infinillm.errors import Overloaded, Unavailable
from tests.servers.fake_shard import MODEL, Site

GOOD = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
TALK = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(autouse=True)
def _fresh(site: Site) -> Iterator[None]:
    site.reset()
    yield
    answer = site.http.post("/v1/completions", json=GOOD)
    assert answer.status_code == 200, "the next good request must work"


def refused(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    return error


BAD = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 3}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logit_bias": {"1000000": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1001}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [2**32]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": "5"}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"echo": "yes"}, "echo"),
    ({"priority": 1}, "priority"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "a" * 1025}, "cache_salt"),
    ({"model": 5}, "model"),
    ({"model": "m" * 257}, "model"),
]


@pytest.mark.parametrize(("changed", "param"), BAD, ids=lambda value: json.dumps(value)[:40])
def test_bad_completions(site: Site, changed: dict[str, Any], param: str) -> None:
    body = json.dumps({**GOOD, **changed})
    answer = site.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert refused(answer, 400, param)["type"] == "invalid_request_error"
    assert not site.asked


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_bad_chats(site: Site, changed: dict[str, Any], param: str) -> None:
    answer = site.http.post("/v1/chat/completions", json={**TALK, **changed})
    refused(answer, 400, param)
    assert not site.asked


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": None},
        {"tools": []},
        {"response_format": {"type": "text"}},
        {"n": None, "stop": None, "temperature": None},
        {"reasoning_effort": "low", "store": True, "metadata": {"a": "b"}},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(site: Site, harmless: dict[str, Any]) -> None:
    assert site.http.post("/v1/chat/completions", json={**TALK, **harmless}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_not_ours(site: Site, body: bytes) -> None:
    answer = site.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_other_kinds_of_body(site: Site) -> None:
    answer = site.http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    refused(answer, 415, None)


@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_bodies(site: Site, chunked: bool) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(24):
            yield b"x" * (1 << 16)

    content: Any = parts() if chunked else b"x" * (1 << 20) + b"x"
    answer = site.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 413, None)["code"] == "request_too_large"


def test_a_body_far_too_large_is_not_read(site: Site) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1099511627776\r\nExpect: 100-continue\r\n\r\n"
    )
    host, port = site.gateway.http_address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(head)
        assert line.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_unknown_models(site: Site) -> None:
    for path, body in (("completions", GOOD), ("chat/completions", TALK)):
        error = refused(site.http.post(f"/v1/{path}", json={**body, "model": "gpt"}), 404, "model")
        assert error["code"] == "model_not_found"
        assert MODEL in error["message"]
    refused(site.http.get("/v1/models/org/other"), 404, "model")
    error = refused(site.http.get(f"/v1/models/{'m' * 5000}"), 400, "model")
    assert len(error["message"]) < 100


def test_unknown_routes_and_methods(site: Site) -> None:
    refused(site.http.get("/v2/nothing"), 404, None)
    refused(site.http.get("/v1/completions"), 405, None)


@pytest.mark.parametrize("tokens", [[], [-1], [10**6], [5] * 1001, "x", None])
def test_bad_tokens(site: Site, tokens: Any) -> None:
    answer = site.http.post("/detokenize", json={"tokens": tokens})
    if tokens == []:
        assert answer.json() == {"prompt": ""}
    else:
        refused(answer, 400, "tokens")
    refused(site.http.post("/tokenize", json={}), 400, "prompt")


# --- what the pool refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_longer_than_the_pool(site: Site, stream: bool) -> None:
    answer = site.http.post("/v1/completions", json={**GOOD, "max_tokens": 600, "stream": stream})
    error = refused(answer, 400, "max_tokens")
    assert error["code"] == "context_length_exceeded"
    assert "the pool holds 500" in error["message"]


def test_longer_than_the_model(site: Site) -> None:
    error = refused(site.http.post("/v1/completions", json={**GOOD, "prompt": [5] * 1001}), 400, "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "up to 500 tokens now" in error["message"]
    long = {**TALK, "messages": [{"role": "user", "content": "word " * 200_000}]}
    assert "1,000" in refused(site.http.post("/v1/chat/completions", json=long), 400, "messages")["message"]


def test_the_default_length_shrinks_to_what_fits(site: Site) -> None:
    answer = site.http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * 495})
    assert answer.json()["usage"]["completion_tokens"] == 5
    answer = site.http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * 500})
    refused(answer, 400, "prompt")


def test_no_room_now(site: Site) -> None:
    site.controller.refusal = Overloaded("all workers are busy")
    answer = site.http.post("/v1/completions", json=GOOD)
    assert refused(answer, 429, None)["message"] == "all workers are busy"
    assert answer.headers["retry-after"] == "1"
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.RateLimitError):
        client.completions.create(**GOOD)
    site.controller.refusal = None
    assert 'infinillm_refusals_total{reason="overloaded"} 2.0' in site.http.get("/metrics").text


def test_workers_with_full_queues(site: Site) -> None:
    site.change(fail_after=0, failure=Overloaded("9 requests wait at this worker and 4 run; at most 9 may wait"))
    answer = site.http.post("/v1/completions", json=GOOD)
    assert "9 requests wait" in refused(answer, 429, None)["message"]
    assert answer.headers["retry-after"] == "1"
    assert all(shard.asked for shard in site.shards)  # each was asked before the client heard of it
    site.reset()


def test_nobody_to_serve(site: Site) -> None:
    site.controller.refusal = Unavailable("no worker is ready to serve")
    answer = site.http.post("/v1/completions", json=GOOD)
    assert refused(answer, 503, None)["code"] == "service_unavailable"
    assert "retry-after" in answer.headers
    site.controller.refusal = None


def test_the_default_length_follows_a_pool_that_grew(site: Site) -> None:
    site.controller.max_tokens = 520  # and the last snapshot says 500
    answer = site.http.post("/v1/completions", json={"model": MODEL, "prompt": [5] * 495})
    assert answer.json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("tells", [True, False])
def test_the_default_length_follows_a_pool_that_shrank(site: Site, tells: bool) -> None:
    site.controller.tells = tells
    site.controller.max_tokens = 60  # and the last snapshot says 500
    prompt = {"messages": [{"role": "user", "content": "Hi"}], "model": MODEL}
    answer = site.http.post("/v1/chat/completions", json={**prompt, "ignore_eos": True, "min_tokens": 3})
    assert answer.status_code == 200
    assert site.controller.routed[-1].longest_tokens == site.controller.routed[-1].prompt_tokens + 3
    if tells:
        assert answer.json()["usage"]["total_tokens"] <= 60
        assert site.asked[0].sampling.max_tokens == 60 - len(site.asked[0].prompt)
    refused(site.http.post("/v1/chat/completions", json={**prompt, "max_tokens": 60}), 400, "max_tokens")


def test_headers_without_end(site: Site) -> None:
    host, port = site.gateway.http_address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        try:
            line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * (1 << 20))
            said = line.recv(65536)
        except ConnectionError:
            said = b""
    assert said == b"" or said.startswith(b"HTTP/1.1 400 ")
