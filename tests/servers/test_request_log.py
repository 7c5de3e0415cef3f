"""The log of a gateway's requests: lines in order of time, nothing but lengths, and the simulator reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from infinillm.errors import BadRequest
from infinillm.servers.conversations import BLOCK
from infinillm.servers.gateway import Gateway
from infinillm.servers.request_log import RequestLog
from infinillm.sim.traffic import Arrival, workload
from tests.servers.fake_shard import MODEL, Site, settings


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def said(length: int, first: int = 7) -> list[int]:
    """Tokens, others for another `first`."""
    return [first * 1000 + n for n in range(length)]


def read(path: Path) -> list[Arrival]:
    """As the simulator does."""
    return list(workload(str(path), rate=0, seed=0, count=None))


def test_lines_are_in_the_order_in_which_requests_came(tmp_path: Path) -> None:
    path, clock = tmp_path / "log.jsonl", Clock(500.0)
    log = RequestLog(str(path), clock)
    with log.request(said(7), "") as first:
        clock.now = 501.5
        with log.request(said(9, 2), "") as second:
            second.answer += said(3, 3)
        assert not path.read_text(), "the first is not over"
        assert not second.answer, "tokens wait for nobody"
        first.answer += said(2, 4)
    assert read(path) == [Arrival(0.0, 7, 2, "0-1"), Arrival(1.5, 9, 3, "0-2")]
    log.close()


def test_what_got_no_token_is_left_out_and_what_broke_off_counts_as_far_as_it_got(tmp_path: Path) -> None:
    path, clock = tmp_path / "log.jsonl", Clock(0.0)
    log = RequestLog(str(path), clock)
    with log.request(said(5), ""):
        pass
    with suppress(KeyError), log.request(said(6), "") as entry:
        entry.answer += said(4)
        raise KeyError
    log.close()
    assert read(path) == [Arrival(0.0, 6, 4, "0-1")]


def test_a_file_that_is_there_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for began in (1000.0, 5.0):  # another process: its clock is another
        clock = Clock(began)
        log = RequestLog(str(path), clock)
        for _ in range(2):
            clock.now += 2.0
            with log.request(said(5), "") as entry:
                entry.answer.append(1)
        log.close()
    assert [each.at for each in read(path)] == [2.0, 4.0, 6.0, 8.0]
    assert len({each.session for each in read(path)}) == 4


@pytest.mark.parametrize("text", ["no JSON\n", '{"prompt": 3}\n', "[]\n"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(BadRequest, match="does not end with a request") as error:
        RequestLog(str(path), Clock(0.0))
    assert error.value.field == "request_log" and path.read_text() == text
    with pytest.raises(BadRequest, match="--request-log"):
        RequestLog(str(tmp_path / "nowhere" / "log"), Clock(0.0))


class Full:
    def write(self, line: str) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_log_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog("", Clock(0.0))
    log._file = Full()  # type: ignore[assignment]
    told: list[Any] = []
    monkeypatch.setattr("infinillm.servers.request_log.log", lambda event, **more: told.append((event, more)))
    for _ in range(2):
        with log.request(said(3), "") as entry:
            entry.answer.append(1)
    assert [event for event, _ in told] == ["request_log_failed"]
    log.close()


def test_without_a_path_nothing_is_kept() -> None:
    log = RequestLog("", Clock(0.0))
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(log.request(said(1), "")).answer.append(1)
    assert not log._open
    log.close()


@pytest.fixture
def logged(site: Site, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a gateway, and where it logs its requests."""
    path = tmp_path / "log.jsonl"

    async def start() -> Gateway:
        gateway = Gateway(settings(site.folder, site.controller_address, request_log=str(path)))
        await gateway.start()
        await gateway.pool.refresh()
        return gateway

    gateway = site.call(start())
    try:
        yield f"http://{gateway.http_address}/v1", path
    finally:
        site.call(gateway.stop())


def test_what_a_gateway_wrote_the_simulator_reads(site: Site, logged: tuple[str, Path]) -> None:
    site.change(batch=3)  # tokens in one message
    url, path = logged
    lengths = []
    for prompt in ([5] * 3, [5] * 40):
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 200, "n": 2}
        usage = httpx.post(f"{url}/completions", json=asked, timeout=30).json()["usage"]
        lengths += [(len(prompt), usage["completion_tokens"] // 2)] * 2
    found = read(path)
    assert [(each.prompt, each.output) for each in found] == lengths
    assert 0 <= found[0].at <= found[1].at <= found[2].at < 60
    assert {name for line in path.read_text().splitlines() for name in json.loads(line)} == set(Arrival._fields)
    assert [each.shared for each in found] == [0, 0, 0, 32], "two answers to one prompt"


def test_two_turns_of_a_conversation_are_a_session_with_a_shared_prefix(logged: tuple[str, Path]) -> None:
    url, path = logged

    def ask(messages: list[dict[str, str]]) -> dict[str, str]:
        body = {"model": MODEL, "messages": messages, "max_tokens": 100}
        answered = httpx.post(f"{url}/chat/completions", json=body, timeout=30).json()
        message: dict[str, str] = answered["choices"][0]["message"]
        return {"role": message["role"], "content": message["content"]}

    one = [{"role": "user", "content": "Who remembers what was said, and who decides where it is kept? " * 3}]
    other = [{"role": "user", "content": "Something else altogether: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16. " * 3}]
    answer = ask(one)
    ask(other)
    ask([*one, answer, {"role": "user", "content": "And why?"}])
    first, second, third = read(path)
    assert (third.session, third.turn) == (first.session, 1) != (second.session, 0)
    said = first.prompt + first.output
    assert said - 2 * BLOCK < third.shared <= min(said, third.prompt) and first.shared == second.shared == 0
