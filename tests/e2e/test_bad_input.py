"""Bad input on real processes: refused with the field's name, and the next good request works."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from infinillm import rpc
from infinillm.core.request import Sampling
from infinillm.errors import BadRequest, InfinillmError, NotFound
from infinillm.protos import controller_pb2, inference_pb2, pool_pb2, shard_pb2
from infinillm.wire import sampling_to_wire
from tests.e2e import client
from tests.e2e.conftest import truth
from tests.e2e.processes import CONTROLLER, POOL, Cluster, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]
HUGE = 10**400


def asked(**changed: Any) -> bytes:
    return json.dumps({"prompt": "The model asks", "max_tokens": 2, **changed}).encode()


def chat(**changed: Any) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 2, **changed}).encode()


# route, body, status, parameter at fault ("" where the body itself is)
BAD: list[tuple[str, bytes, int, str]] = [
    (COMPLETIONS, asked(prompt=7), 400, "prompt"),
    (COMPLETIONS, asked(prompt=None), 400, "prompt"),
    (COMPLETIONS, asked(prompt={}), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[[]]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[1, "a"]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[1, 2.5]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[True, False]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[-1]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[10**6]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[HUGE]), 400, "prompt"),
    (COMPLETIONS, asked(prompt=[1] * 5000), 400, "prompt"),
    (COMPLETIONS, asked(prompt="word " * 200_000), 400, "prompt"),
    (COMPLETIONS, asked(prompt=["a"] * 1000), 400, "prompt"),
    (COMPLETIONS, b'{"prompt": "\\ud800", "max_tokens": 2}', 400, ""),
    (COMPLETIONS, asked(max_tokens=-1), 400, "max_tokens"),
    (COMPLETIONS, asked(max_tokens=1.5), 400, "max_tokens"),
    (COMPLETIONS, asked(max_tokens="2"), 400, "max_tokens"),
    (COMPLETIONS, asked(max_tokens=True), 400, "max_tokens"),
    (COMPLETIONS, asked(max_tokens=HUGE), 400, "max_tokens"),
    (COMPLETIONS, asked(max_tokens=2**62), 400, "max_tokens"),
    (COMPLETIONS, asked(min_tokens=3), 400, "min_tokens"),
    (COMPLETIONS, asked(min_tokens=-3), 400, "min_tokens"),
    (COMPLETIONS, asked(temperature=-0.1), 400, "temperature"),
    (COMPLETIONS, asked(temperature="hot"), 400, "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    (COMPLETIONS, asked(top_p=0), 400, "top_p"),
    (COMPLETIONS, asked(top_p=1.1), 400, "top_p"),
    (COMPLETIONS, asked(top_k=-5), 400, "top_k"),
    (COMPLETIONS, asked(min_p=2), 400, "min_p"),
    (COMPLETIONS, asked(seed=2**64), 400, "seed"),
    (COMPLETIONS, asked(seed="x"), 400, "seed"),
    (COMPLETIONS, asked(n=0), 400, "n"),
    (COMPLETIONS, asked(n=-1), 400, "n"),
    (COMPLETIONS, asked(n=10**6), 400, "n"),
    (COMPLETIONS, asked(logprobs=-1), 400, "logprobs"),
    (COMPLETIONS, asked(logprobs=1000), 400, "logprobs"),
    (COMPLETIONS, asked(presence_penalty=3), 400, "presence_penalty"),
    (COMPLETIONS, asked(frequency_penalty=-3), 400, "frequency_penalty"),
    (COMPLETIONS, asked(repetition_penalty=0), 400, "repetition_penalty"),
    (COMPLETIONS, asked(stop=""), 400, "stop"),
    (COMPLETIONS, asked(stop=["x"] * 100), 400, "stop"),
    (COMPLETIONS, asked(stop=[1]), 400, "stop[0]"),
    (COMPLETIONS, asked(stop_token_ids=[-1]), 400, "stop_token_ids[0]"),
    (COMPLETIONS, asked(min_tokens=2, stop_token_ids=list(range(384))), 400, "stop_token_ids"),  # no token is left
    (COMPLETIONS, asked(logit_bias={"x": 1}), 400, "logit_bias"),
    (COMPLETIONS, asked(logit_bias={"99999999": 1}), 400, "logit_bias"),
    (COMPLETIONS, asked(logit_bias={"1": 1000}), 400, "logit_bias"),
    (COMPLETIONS, asked(logit_bias=[1]), 400, "logit_bias"),
    (COMPLETIONS, asked(stream="yes"), 400, "stream"),
    (COMPLETIONS, asked(stream_options={"include_usage": 3}, stream=True), 400, "stream_options.include_usage"),
    (COMPLETIONS, asked(model="gpt-17"), 404, "model"),
    (COMPLETIONS, asked(model=3), 400, "model"),
    (COMPLETIONS, asked(suffix="x"), 400, "suffix"),
    (COMPLETIONS, b"", 400, ""),
    (COMPLETIONS, b"[]", 400, ""),
    (COMPLETIONS, b"null", 400, ""),
    (COMPLETIONS, b'{"prompt": "a"', 400, ""),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400, ""),
    (COMPLETIONS, b"\x00\x01\x02", 400, ""),
    (COMPLETIONS, b"[" * 100_000, 400, ""),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, ""),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="hello"), 400, "messages"),
    (CHAT, chat(messages=[{"content": "a"}]), 400, "messages[0].role"),
    (CHAT, chat(messages=[{"role": "user", "content": 3}]), 400, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages[0].content[0].type"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs"),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    (CHAT, chat(messages=[{"role": "user", "content": "word " * 100_000}]), 400, "messages"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', 400, ""),
    ("/tokenize", b'{"prompt": 3}', 400, "prompt"),
    ("/tokenize", b'{"prompt": "\\ud83d"}', 400, ""),
    ("/detokenize", b'{"tokens": [-1]}', 400, "tokens"),
    ("/detokenize", b'{"tokens": [99999999]}', 400, "tokens"),
]


def well(pool: Cluster) -> None:
    """The next good request works."""
    prompt, want = truth(20, 40, 4)
    assert client.complete(pool.url, prompt, 4).tokens == want


@pytest.fixture(scope="module")
def http(shared: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.url, timeout=client.PATIENCE) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def nothing_leaks(shared: Cluster) -> Iterator[None]:
    yield
    shared.settle()


@pytest.mark.parametrize(("route", "sent", "status", "param"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_body_is_refused_by_name(
    shared: Cluster, http: httpx.Client, route: str, sent: bytes, status: int, param: str
) -> None:
    reply = http.post(route, content=sent, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    named = error["param"] or ""
    assert named == param or (param and named.startswith((f"{param}[", f"{param}."))), error
    assert error["message"] and error["type"] and len(error["message"]) < 1000
    assert "Traceback" not in reply.text
    well(shared)


def test_a_body_that_is_too_large_or_of_another_kind_is_refused(shared: Cluster, http: httpx.Client) -> None:
    body = asked(prompt="a" * (17 << 20))
    reply = http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"
    well(shared)
    reply = http.post(COMPLETIONS, content=iter([body]), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413, "without a length too"
    well(shared)
    reply = http.post(COMPLETIONS, content=asked(), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    assert http.get(COMPLETIONS).status_code == 405
    assert http.post("/v1/nothing", content=asked()).status_code == 404
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/v1/requests/none/placement").status_code == 404
    well(shared)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_what_is_no_http_is_refused_or_hung_up_on(shared: Cluster, raw: bytes) -> None:
    host, _, port = shared.gateway.said["http"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(raw)
        with contextlib.suppress(OSError):  # it may have hung up on us already
            line.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while more := line.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    well(shared)


EXTREME: list[dict[str, Any]] = [
    {"temperature": 100},
    {"temperature": 1e-30},
    {"temperature": 5e-324},
    {"temperature": 1, "top_p": 5e-324},
    {"temperature": 1, "top_k": 2**31 - 1, "min_p": 1},
    {"temperature": 1e-9, "top_p": 1e-9, "min_p": 1, "top_k": 1},
    {"temperature": 1, "seed": -(2**63)},
    {"temperature": 1, "seed": 2**63 - 1, "n": 16},
    {"temperature": 1, "repetition_penalty": 100, "presence_penalty": 2, "frequency_penalty": 2},
    {"temperature": 1, "repetition_penalty": 0.001, "presence_penalty": -2, "frequency_penalty": -2},
    {"temperature": 1, "logit_bias": {str(token): -100 for token in range(300)}},
    {"temperature": 5e-324, "logit_bias": {"5": 100}, "logprobs": 20},
    {"logprobs": 20, "prompt_logprobs": 20},
    {"logprobs": 20, "echo": True, "max_tokens": 0},
    {"max_tokens": 0},
    {"max_tokens": 8, "min_tokens": 8, "stop_token_ids": list(range(2, 300)), "ignore_eos": False},
    {"stop": ["\x00", "e", "\U0001f600"]},
    {"prompt": [0] * 900},
    {"prompt": "\x00\x01\U0010ffff\u200b"},
    {"prompt": "<|start|><|end|>" * 20},
    {"prompt": ["a"] * 64, "max_tokens": 1},
    {"cache_salt": "\u00fc" * 1000},
    {"user": "x" * 10**6, "an_unknown_field": {"a": [1]}},
]


@pytest.mark.parametrize("changed", EXTREME, ids=lambda changed: str(changed)[:60])
def test_what_is_extreme_but_allowed_is_served(shared: Cluster, http: httpx.Client, changed: dict[str, Any]) -> None:
    reply = http.post(COMPLETIONS, json={"prompt": "The model asks", "max_tokens": 6, **changed})
    assert reply.status_code == 200, reply.text
    assert all(choice["finish_reason"] in {"stop", "length"} for choice in reply.json()["choices"])
    well(shared)


# --- gRPC ---------------------------------------------------------------------------------------------------------


def message(**changed: Any) -> inference_pb2.GenerateRequest:
    parameters = inference_pb2.GenerateParameters(max_tokens=2, **changed)
    return inference_pb2.GenerateRequest(text="The model asks", parameters=parameters)


def tokens(*ids: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(tokens=inference_pb2.TokenIds(ids=ids))


BAD_MESSAGES: list[tuple[inference_pb2.GenerateRequest, str, str]] = [
    (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
    (inference_pb2.GenerateRequest(text=""), "INVALID_ARGUMENT", "prompt"),
    (tokens(), "INVALID_ARGUMENT", "prompt"),
    (tokens(2**32 - 1), "INVALID_ARGUMENT", "prompt"),
    (tokens(*[1] * 100_000), "OUT_OF_RANGE", "prompt"),
    (inference_pb2.GenerateRequest(model="other", text="a"), "NOT_FOUND", "model"),
    (message(temperature=-1), "INVALID_ARGUMENT", "temperature"),
    (message(temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
    (message(top_p=0), "INVALID_ARGUMENT", "top_p"),
    (message(top_k=-7), "INVALID_ARGUMENT", "top_k"),
    (message(min_p=float("inf")), "INVALID_ARGUMENT", "min_p"),
    (message(min_tokens=2**32 - 1), "INVALID_ARGUMENT", "min_tokens"),
    (message(logit_bias={2**31: 1.0}), "INVALID_ARGUMENT", "logit_bias"),
    (message(logit_bias={9999: 1.0}), "INVALID_ARGUMENT", "logit_bias"),
    (message(logprobs=500), "INVALID_ARGUMENT", "logprobs"),
    (message(min_tokens=2, stop_token_ids=range(384)), "INVALID_ARGUMENT", "stop_token_ids"),
    (message(stop_token_ids=[1] * 10**6), "INVALID_ARGUMENT", "stop_token_ids"),
    (message(stop=[""]), "INVALID_ARGUMENT", "stop"),
    (message(stop=["x"] * 99), "INVALID_ARGUMENT", "stop"),
    (message(repetition_penalty=-1), "INVALID_ARGUMENT", "repetition_penalty"),
]
GENERATE = "/infinillm.v1.InferenceService/Generate"


@pytest.mark.parametrize(("sent", "status", "field"), BAD_MESSAGES, ids=lambda value: str(value)[:50])
def test_a_bad_message_is_refused_by_name(
    shared: Cluster, sent: inference_pb2.GenerateRequest, status: str, field: str
) -> None:
    inference = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    with rpc.blocking_channel(shared.gateway.said["grpc"]) as channel, pytest.raises(InfinillmError) as refused:
        list(rpc.BlockingClient(channel, inference).Generate(sent, timeout=10.0))
    assert (refused.value.grpc_status, refused.value.field) == (status, field), refused.value.message
    well(shared)


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xff\xff\xff", b"\x12\x05abc", b"\x12\x03\xff\xfe\xfd", b"\x0a\x01\xc0", b"\x1a\xff\xff\xff\xff\x0f"],
    ids=["garbage", "cut short", "text is no UTF-8", "model is no UTF-8", "a length of 4 GiB"],
)
def test_what_is_no_protobuf_is_an_invalid_argument_at_every_server(shared: Cluster, raw: bytes) -> None:
    at = {
        GENERATE: shared.gateway.said["grpc"],
        "/infinillm.v1.ControllerService/Join": shared.address,
        "/infinillm.v1.ControllerService/Heartbeat": shared.address,
        "/infinillm.v1.PoolService/OpenPort": shared.workers["worker-0"].said["address"],
        "/infinillm.v1.ShardService/Generate": shared.workers["worker-0"].said["address"],
    }
    for method, address in at.items():
        with rpc.blocking_channel(address) as channel:
            many = method.endswith("Generate")
            call = (channel.unary_stream if many else channel.unary_unary)(method)
            with pytest.raises(grpc.RpcError) as refused:
                list(call(raw, timeout=10.0)) if many else call(raw, timeout=10.0)
        code = refused.value.code()  # type: ignore[attr-defined]
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (method, code, refused.value)
    well(shared)


def test_a_message_that_is_too_large_is_refused(shared: Cluster) -> None:
    raw = b"\x12\x80\x80\x80\x09" + b"a" * (18 << 20)
    with rpc.blocking_channel(shared.gateway.said["grpc"]) as channel, pytest.raises(grpc.RpcError) as refused:
        list(channel.unary_stream(GENERATE)(raw, timeout=20.0))
    code = refused.value.code()  # type: ignore[attr-defined]
    assert code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT}
    well(shared)


def test_a_worker_does_not_believe_everything(shared: Cluster) -> None:
    """What a confused peer may say to a node: refused, and nobody is worse off."""
    lend, open_port = pool_pb2.LendRequest, pool_pb2.OpenPortRequest
    with rpc.blocking_channel(shared.workers["worker-0"].said["address"]) as channel:
        node = rpc.BlockingClient(channel, POOL)
        for refused in (
            lend(borrower="x", borrower_incarnation="1", blocks=2**63),
            lend(borrower="worker-0", borrower_incarnation="1", blocks=1),  # to itself
        ):
            assert node.Lend(refused, timeout=5.0).refused
        for method, request in (
            ("Lend", lend(blocks=1)),
            ("Lend", lend(borrower="x", blocks=1)),
            ("OpenPort", open_port(loan="no such loan")),
        ):
            with pytest.raises(BadRequest) as named:
                getattr(node, method)(request, timeout=5.0)
            assert named.value.field, (method, named.value.message)
        node.Return(pool_pb2.ReturnRequest(loan="no such loan"), timeout=5.0)
        for said in (pool_pb2.ConverseRequest(plan=pool_pb2.Plan(step=1)), pool_pb2.ConverseRequest()):
            with pytest.raises(InfinillmError):
                list(node.Converse(iter([said]), timeout=5.0))
    until(lambda: not shared.books("worker-0").loans, "the stranger has no loan", 1.0)
    well(shared)


def test_a_shard_does_not_believe_everything(shared: Cluster) -> None:
    shard = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
    ask, good = shard_pb2.ShardGenerateRequest, sampling_to_wire(Sampling(max_tokens=2))
    with rpc.blocking_channel(shared.workers["worker-0"].said["address"]) as channel:
        engine = rpc.BlockingClient(channel, shard)
        for wrong in (
            ask(prompt=[1], sampling=good),
            ask(id="a", sampling=good),
            ask(id="a", prompt=[10**6], sampling=good),
            ask(id="a", prompt=[1], sampling=shard_pb2.ShardGenerateRequest().sampling),
        ):
            with pytest.raises(BadRequest) as named:
                list(engine.Generate(wrong, timeout=5.0))
            assert named.value.field, named.value.message
        with pytest.raises(NotFound):
            engine.Placement(shard_pb2.PlacementRequest(id="none"), timeout=5.0)
    well(shared)


def test_a_controller_does_not_believe_everything(shared: Cluster) -> None:
    with rpc.blocking_channel(shared.address) as channel:
        controller = rpc.BlockingClient(channel, CONTROLLER)
        for method, request in (
            ("Join", controller_pb2.JoinRequest()),
            ("Route", controller_pb2.RouteRequest()),
            ("Route", controller_pb2.RouteRequest(prompt_tokens=5, longest_tokens=2)),
            ("Creditors", controller_pb2.CreditorsRequest(node="worker-0")),
        ):
            with pytest.raises(BadRequest) as named:
                getattr(controller, method)(request, timeout=5.0)
            assert named.value.field, (method, named.value.message)
        said = controller.Heartbeat(controller_pb2.HeartbeatRequest(node="stranger", incarnation="1"), timeout=5.0)
        assert not said.known
        controller.Leave(controller_pb2.LeaveRequest(node="stranger"), timeout=5.0)
        controller.Creditors(controller_pb2.CreditorsRequest(node="stranger", blocks=1), timeout=5.0)
    assert {node.id for node in shared.ledger().nodes} == set(shared.workers)
    well(shared)
