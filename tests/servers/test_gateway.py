"""The gateway among failing workers, leaving clients and an absent controller; its end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from infinillm import rpc
from infinillm.errors import BadRequest, Broken, InfinillmError, Overloaded, TooLong, Unavailable, Unreachable
from infinillm.protos import inference_pb2 as pb
from infinillm.servers import gateway, inference
from infinillm.servers.inference_pool import Pool
from infinillm.servers.inference_service import INFERENCE
from tests.servers.fake_shard import (
    CONTROLLER,
    LOCALHOST,
    MODEL,
    TEXT,
    WAIT_SECONDS,
    Site,
    encode,
    settings,
    unreachable,
)

ASKED: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 200}
PATH = "/v1/completions"


pytestmark = pytest.mark.usefixtures("fresh")


def events(lines: Iterator[str]) -> Iterator[Any]:
    """The JSON of a stream, [DONE] as None, comments as text."""
    for line in lines:
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line[6:])
        elif line:
            yield line


# --- clients that leave, or are slow --------------------------------------------------------------------------------


def test_leaving_a_stream_cancels_it_everywhere(site: Site) -> None:
    site.change(hold_after=2)
    with site.http.stream("POST", PATH, json={**ASKED, "n": 3, "stream": True}) as answer:
        next(answer.iter_lines())
        site.until(lambda: len(site.ended) == 3)
    site.until(lambda: list(site.ended.values()) == ["cancelled"] * 3)


def test_leaving_in_the_middle_of_a_body(site: Site) -> None:
    host, port = site.gateway.http_address.split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as line:
        line.sendall(head.encode() + b"{")
    counted = f'infinillm_http_requests_total{{route="{PATH}",status="499"}}'
    site.until(lambda: counted in site.gateway.metrics.exposition().decode())


def test_tokens_are_sent_at_once(site: Site) -> None:
    site.change(hold_after=2)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}):
        for connection in site.gateway.http.server_state.connections:
            line = connection.transport.get_extra_info("socket")
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_leaving_before_the_first_token_cancels(site: Site) -> None:
    site.change(hold_after=0)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        assert answer.status_code == 200  # the headers come early
        assert answer.headers["x-request-id"].startswith("cmpl-")
    site.until(lambda: list(site.ended.values()) == ["cancelled"])


def test_leaving_without_a_stream_cancels(site: Site) -> None:
    site.change(hold_after=2)
    body = json.dumps(ASKED).encode()
    host, port = site.gateway.http_address.split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as line:
        line.sendall(head.encode() + body)
        site.until(lambda: list(site.ended.values()) == ["running"])
    site.until(lambda: list(site.ended.values()) == ["cancelled"])


def test_a_client_that_does_not_read_blocks_nobody(site: Site) -> None:
    site.change(script=lambda prompt: encode("word ") * 60, batch=1)
    body = json.dumps({**ASKED, "max_tokens": 480, "n": 16, "stream": True, "ignore_eos": True}).encode()
    host, port = site.gateway.http_address.split(":")
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=WAIT_SECONDS) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(head.encode() + body)
        site.until(lambda: len(site.ended) == 16)
        assert site.http.post(PATH, json={**ASKED, "max_tokens": 3}).status_code == 200
    site.until(lambda: "running" not in site.ended.values())


def test_sixty_four_streams_at_once(site: Site) -> None:
    site.change(script=lambda prompt: encode("é🦊, ") * len(prompt), hold_after=3)

    async def one(client: openai.AsyncOpenAI, length: int) -> str:
        stream = await client.completions.create(model=MODEL, prompt=[5] * length, max_tokens=400, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, 1 + i % 16) for i in range(64)))

    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.extend(asyncio.run(all_of_them())))
    thread.start()
    site.until(lambda: len(site.ended) == 64)  # all run at the same time
    assert set(site.ended.values()) == {"running"}
    site.release()
    thread.join(2 * WAIT_SECONDS)
    assert texts == ["é🦊, " * (1 + i % 16) for i in range(64)]


def test_a_comment_while_a_long_prompt_is_computed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infinillm.servers.openai_streams.PING_SECONDS", 0.01)
    site.change(hold_after=0)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        heard = events(answer.iter_lines())
        assert next(heard) == ": waiting"
        site.release()
        text = "".join(event["choices"][0]["text"] for event in heard if isinstance(event, dict))
    assert text == TEXT


def test_large_documents_are_tokenised_apart(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, threads = site.gateway.inference.tokenizer, []
    kept = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda *given: threads.append(threading.current_thread().name) or kept(*given)
    )
    site.http.post("/tokenize", json={"prompt": "word " * 600})
    site.http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert [name.partition("_")[0] for name in threads[:1]] == ["tokenise"]


# --- workers that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [Unavailable("gone"), Overloaded("the worker is shutting down")])
def test_a_worker_lost_before_the_first_token_is_replaced(site: Site, failure: InfinillmError) -> None:
    site.change(fail_after=0, failure=failure)
    site.call(_recover(site, 0))
    assert site.http.post(PATH, json=ASKED).json()["choices"][0]["text"] == TEXT
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        heard = [event["choices"][0]["text"] for event in events(answer.iter_lines()) if event]
    assert "".join(heard) == TEXT
    excluded = [list(request.exclude) for request in site.controller.routed if request.exclude]
    assert excluded
    assert all(exclude == ["worker-1"] for exclude in excluded)


async def _recover(site: Site, index: int) -> None:
    site.shards[index].fail_after = None


def test_a_worker_that_is_not_there_is_replaced(site: Site) -> None:
    with unreachable(site.shards[1]):
        answers = [site.http.post(PATH, json=ASKED).status_code for _ in range(2)]
    assert answers == [200, 200]


def test_when_all_workers_fail_the_reason_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infinillm.servers.inference.GO_ON_SECONDS", 0.3)
    site.change(fail_after=0)
    answer = site.http.post(PATH, json=ASKED)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the worker is gone"


@pytest.mark.parametrize("failure", [TooLong("too many blocks"), BadRequest("no", field="prompt")])
def test_refusals_of_a_worker_are_final(site: Site, failure: InfinillmError) -> None:
    site.change(fail_after=0, failure=failure)
    answer = site.http.post(PATH, json={**ASKED, "stream": True})
    assert answer.status_code == 400
    assert len(site.asked) == 1


def test_a_failure_in_the_middle_of_a_stream(site: Site) -> None:
    site.change(fail_after=3)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        heard = list(events(answer.iter_lines()))
    assert heard[-1] is None
    assert heard[-2]["error"]["message"] == "the worker is gone"
    client = openai.OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.APIError, match="gone"):
        list(client.completions.create(**ASKED, stream=True))


def test_a_failure_in_the_middle_without_a_stream(site: Site) -> None:
    site.change(fail_after=3)
    assert site.http.post(PATH, json=ASKED).status_code == 503


def test_one_failing_choice_cancels_the_others(site: Site) -> None:
    site.call(_split(site))
    answer = site.http.post(PATH, json={**ASKED, "n": 2})
    assert answer.status_code == 500
    site.until(lambda: sorted(site.ended.values()) == ["cancelled", "failed"])


async def _split(site: Site) -> None:
    site.shards[0].fail_after, site.shards[1].hold_after = 2, 2
    site.shards[0].failure = Broken("a law failed")


def test_a_silent_worker_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "SILENCE_SECONDS", 0.05)
    site.change(hold_after=2)
    answer = site.http.post(PATH, json=ASKED)
    assert answer.status_code == 504
    assert "said nothing" in answer.json()["error"]["message"]
    site.until(lambda: list(site.ended.values()) == ["cancelled"])


# --- a controller that is away --------------------------------------------------------------------------------------


def test_requests_go_on_without_the_controller(site: Site) -> None:
    site.change(hold_after=2)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as running:
        heard = events(running.iter_lines())
        next(heard)
        port = int(site.controller_address.rpartition(":")[2])
        site.call(site.servers[2].stop(0))
        try:
            site.release()
            assert list(heard)[-1] is None
            site.change(hold_after=None)
            answers = [site.http.post(PATH, json=ASKED) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert all(shard.asked for shard in site.shards)  # they are spread all the same
            assert site.http.post(PATH, json={**ASKED, "max_tokens": 5000}).status_code == 400
            too_long = site.http.post(PATH, json={**ASKED, "prompt": [5] * 900, "max_tokens": 90})
            assert too_long.status_code in {200, 400}
            site.until(lambda: not site.gateway.pool.reachable)
            assert site.http.get("/ready").status_code == 503
            assert site.http.get("/v1/models").json()["data"][0]["max_model_len"] == 500
            assert site.http.get("/v1/pool").status_code == 503
        finally:
            site.servers.pop()
            site.call(site.serve([(CONTROLLER, site.controller)], port))
    site.until(lambda: site.gateway.pool.reachable)
    assert site.http.get("/ready").status_code == 200


def test_a_controller_that_knows_no_worker_yet_is_not_waited_for(site: Site) -> None:
    """It has just begun to lead: what the one before said of the workers stands."""
    site.controller.settling, site.controller.refusal = True, Unavailable("no worker has joined yet")
    answers = [site.http.post(PATH, json=ASKED) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(site.controller.routed) == 4
    assert site.http.get("/ready").status_code == 200
    assert site.http.get("/v1/models").json()["data"][0]["max_model_len"] == 500
    site.controller.settling = False
    assert site.http.post(PATH, json=ASKED).status_code == 503


def test_a_controller_that_was_away_for_a_moment_is_asked_again(site: Site) -> None:
    """Not so one that was there, and had nobody to name."""
    site.controller.once, site.controller.refusal = True, Unreachable("it stood still")
    assert site.http.post(PATH, json=ASKED).status_code == 200
    assert len(site.controller.routed) == 2
    site.controller.refusal = Unavailable("no worker is ready to serve")
    assert site.http.post(PATH, json=ASKED).status_code == 503


def test_without_any_snapshot_nothing_is_routed(site: Site) -> None:
    last, site.gateway.pool.last = site.gateway.pool.last, None
    site.controller.refusal = Unavailable("no worker is ready to serve")
    try:
        assert site.http.post(PATH, json=ASKED).status_code == 503
    finally:
        site.gateway.pool.last = last


# --- the process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def process(site: Site) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    code = (
        "import asyncio, json, sys; from pathlib import Path; from infinillm import config; "
        "from infinillm.servers import gateway; "
        "asyncio.run(gateway.run(config.Gateway(**json.loads(sys.argv[1]))))"
    )
    given = settings(site.folder, site.controller_address)
    chosen = {name: getattr(given, name) for name in ("model", "controller", "port", "grpc_port", "served_model_name")}
    root = Path(__file__).parents[2]
    started = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(chosen)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert started.stdout is not None
    try:
        yield started, json.loads(started.stdout.readline())
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(WAIT_SECONDS)
        started.stdout.close()


def test_the_process_drains(site: Site, process: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    started, ready = process
    assert ready["ready"] == "gateway"
    assert ready["grpc"].startswith(f"{LOCALHOST}:")
    site.change(hold_after=3)
    url = f"http://{ready['http']}"
    with httpx.stream("POST", f"{url}{PATH}", json={**ASKED, "stream": True}, timeout=WAIT_SECONDS) as answer:
        heard = events(answer.iter_lines())
        next(heard)
        started.send_signal(signal.SIGTERM)
        site.until(lambda: _refuses(ready["http"]))  # it takes nothing new
        site.release()
        assert list(heard)[-1] is None  # and finishes what it has
    assert started.wait(WAIT_SECONDS) == 0


def _refuses(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_second_signal_ends_it_at_once(site: Site, process: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    started, ready = process
    site.change(hold_after=3)
    url = f"http://{ready['http']}{PATH}"
    with (
        httpx.stream("POST", url, json={**ASKED, "stream": True}, timeout=WAIT_SECONDS) as answer,
        rpc.blocking_channel(ready["grpc"]) as channel,
    ):
        next(events(answer.iter_lines()))
        next(rpc.BlockingClient(channel, INFERENCE).Generate(pb.GenerateRequest(text="a")))
        started.send_signal(signal.SIGTERM)
        site.until(lambda: _refuses(ready["http"]))
        started.send_signal(signal.SIGTERM)
        assert started.wait(WAIT_SECONDS) == 0
    site.until(lambda: list(site.ended.values()) == ["cancelled"] * 2)


def test_a_crash_is_no_clean_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(self: Pool) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        with pytest.raises(ZeroDivisionError):
            await gateway.run(settings(site.folder, site.controller_address))

    monkeypatch.setattr(Pool, "_refresh_always", crash)
    asyncio.run(run())


def test_a_defect_of_ours_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.gateway.inference, "check_model", lambda name: 1 / 0)
    answer = site.http.post(PATH, json=ASKED)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"


def test_a_taken_port_is_told(site: Site) -> None:
    taken = int(site.gateway.http_address.rpartition(":")[2])
    with pytest.raises(BadRequest, match="cannot listen"):
        site.call(_start(settings(site.folder, site.controller_address, port=taken)))
    with pytest.raises(BadRequest, match="--controller"):
        site.call(_start(settings(site.folder, "")))


async def _start(given: Any) -> None:
    await gateway.Gateway(given).start()
