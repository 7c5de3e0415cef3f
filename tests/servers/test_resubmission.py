"""A worker that is lost, or leaves, in the middle of an answer: another one goes on, and the client does not notice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infinillm import rpc
from infinillm.errors import BadRequest, InfinillmError, TooLong, Unavailable
from infinillm.protos import inference_pb2 as pb
from infinillm.servers.inference import MOST_LOSSES
from infinillm.servers.inference_service import INFERENCE
from tests.e2e.processes import until
from tests.servers.fake_shard import MODEL, TEXT, Site, encode

ASKED: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 200, "return_token_ids": True}
PATH = "/v1/completions"
FIRST, SECOND = 1, 0  # the shards in the order they are routed to


pytestmark = pytest.mark.usefixtures("fresh")


def change(site: Site, which: int, **changed: Any) -> None:
    async def now() -> None:
        for name, value in changed.items():
            setattr(site.shards[which], name, value)

    site.call(now())


def streamed(site: Site, **more: Any) -> list[dict[str, Any]]:
    """Every chunk but its id and its time."""
    with site.http.stream("POST", PATH, json={**ASKED, **more, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [{k: v for k, v in json.loads(line).items() if k not in ("id", "created")} for line in lines]


ALIKE: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"stop": ["decides"], "include_stop_str_in_output": True},
    {"max_tokens": 7, "min_tokens": 6},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]


@pytest.mark.parametrize("after", [1, 4, 5])
@pytest.mark.parametrize("more", ALIKE, ids=lambda more: next(iter(more), "plain"))
def test_the_stream_is_as_if_nothing_had_happened(site: Site, more: dict[str, Any], after: int) -> None:
    want = streamed(site, **more)
    assert len(site.asked) == 1
    site.reset()
    change(site, FIRST, fail_after=after)
    change(site, SECOND, cached=2)  # what it finds in its cache is no affair of the client's
    assert streamed(site, **more) == want
    assert [list(asked.already) for asked in site.shards[FIRST].asked] == [[]]
    assert [list(asked.already) for asked in site.shards[SECOND].asked] == [encode(TEXT)[:after]]
    assert len({asked.id for asked in site.asked}) == 1
    length, first, second = len(encode("Hi")), *site.controller.routed
    assert (list(first.exclude), first.prompt_tokens) == ([], length)
    assert (list(second.exclude), second.prompt_tokens) == (["worker-1"], length + after)
    assert first.longest_tokens == second.longest_tokens


def test_prompt_logprobs_are_asked_for_until_they_came(site: Site) -> None:
    asking = {**ASKED, "prompt_logprobs": 1}
    change(site, FIRST, fail_after=0)
    want = site.http.post(PATH, json=asking).json()["choices"]
    assert want[0]["prompt_logprobs"]
    assert all(asked.sampling.HasField("prompt_logprobs") for asked in site.asked)
    site.reset()
    change(site, FIRST, fail_after=2)
    assert site.http.post(PATH, json=asking).json()["choices"] == want
    asked = {bool(asked.already): asked.sampling.HasField("prompt_logprobs") for asked in site.asked}
    assert asked == {False: True, True: False}


def test_messages_of_several_tokens(site: Site) -> None:
    site.change(batch=3)
    change(site, FIRST, fail_after=5)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed(site)) == TEXT
    assert [len(asked.already) for asked in site.shards[SECOND].asked] == [6]


def test_an_answer_in_one_piece_counts_each_token_once(site: Site) -> None:
    want = site.http.post(PATH, json=ASKED).json()
    site.reset()
    change(site, FIRST, fail_after=4)
    got = site.http.post(PATH, json=ASKED).json()
    assert (got["choices"], got["usage"]) == (want["choices"], want["usage"])
    assert len(site.asked) == 2


def test_over_grpc(site: Site) -> None:
    change(site, FIRST, fail_after=4, cached=1)
    change(site, SECOND, cached=2)
    with rpc.blocking_channel(site.gateway.grpc_address) as channel:
        asked = pb.GenerateRequest(text="Hi", parameters=pb.GenerateParameters(max_tokens=200))
        answers = list(rpc.BlockingClient(channel, INFERENCE).Generate(asked))
    tokens = [token for answer in answers for token in answer.tokens]
    assert tokens[:-1] == encode(TEXT)
    assert (answers[-1].completion_tokens, answers[-1].cached_tokens) == (len(tokens), 1)


def test_losses_are_bounded(site: Site) -> None:
    site.change(fail_after=3)
    *_, last = streamed(site)
    assert last["error"]["message"] == "the worker is gone"
    assert sorted(len(asked.already) for asked in site.asked) == [0, *range(3, 3 + MOST_LOSSES)]


def test_a_worker_that_hands_over_is_no_loss(site: Site) -> None:
    """As in a rolling restart: each worker in turn, more often than workers may be lost."""
    site.change(move_after=1)
    chunks = streamed(site)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks} == {None, "stop"}
    assert len(site.asked) == len(encode(TEXT)) + 1 > MOST_LOSSES + 1
    assert {len(routed.exclude) for routed in site.controller.routed[1:]} == {1}, "only the one that said so"


def test_tokens_still_come_while_another_worker_meets_the_one_that_leaves(site: Site) -> None:
    change(site, FIRST, leave_after=2)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed(site)) == TEXT
    (second,) = site.shards[SECOND].asked
    assert site.shards[SECOND].met == ["worker-1"] == [each.node for each in second.holders]
    assert (len(second.already), site.shards[FIRST].passed) == (2, {second.id})
    assert [list(routed.exclude) for routed in site.controller.routed] == [[], ["worker-1"]]


def test_who_is_met_by_nobody_hands_over_all_the_same(site: Site) -> None:
    change(site, SECOND, meeting=Unavailable("it does not answer"))
    change(site, FIRST, leave_after=2, move_after=6)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        lines = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        heard = [next(lines), next(lines)]
        site.until(lambda: bool(site.shards[SECOND].met))
        site.release()
        heard += lines
    assert "".join(json.loads(line)["choices"][0]["text"] for line in heard[:-1]) == TEXT
    assert [len(asked.already) for asked in site.shards[SECOND].asked] == [6]
    assert not site.shards[FIRST].passed


@pytest.mark.parametrize("failure", [BadRequest("no", field="prompt"), TooLong("no"), InfinillmError("no")])
def test_a_request_that_is_refused_for_what_it_is_ends(site: Site, failure: InfinillmError) -> None:
    site.change(fail_after=3, failure=failure)
    assert streamed(site)[-1]["error"]["message"] == "no"
    assert len(site.asked) == 1


@pytest.mark.parametrize("refusal", [TooLong("the pool has become too small"), Unavailable("nobody is there")])
def test_nobody_to_go_on_is_told_in_the_stream(
    site: Site, refusal: InfinillmError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infinillm.servers.inference.GO_ON_SECONDS", 0.4)
    change(site, FIRST, hold_after=2, fail_after=3)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        lines = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        heard = [next(lines), next(lines)]
        site.call(_refuse(site, refusal))
        site.release()
        heard += lines
    assert [bool(json.loads(line).get("error")) for line in heard[:-1]] == [False, False, False, True]
    error = json.loads(heard[-2])["error"]
    assert error["code"] == "service_unavailable"
    assert error["message"] == f"the worker is gone (after 3 tokens); nobody else can go on: {refusal.message}"


@pytest.mark.parametrize("forgiven", [0.0, 60.0])
@pytest.mark.parametrize("refusal", [TooLong("the pool has become too small"), Unavailable("nobody is there")])
def test_who_went_away_for_a_moment_is_waited_for(
    site: Site, refusal: InfinillmError, forgiven: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while a worker of the name that was lost may go on: it was started again."""
    monkeypatch.setattr("infinillm.servers.inference.FORGIVEN_SECONDS", forgiven)
    change(site, FIRST, hold_after=2, fail_after=3)
    asked = len(site.controller.routed)
    with site.http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
        lines = (line[6:] for line in answer.iter_lines() if line.startswith("data: "))
        heard = [next(lines), next(lines)]
        site.call(_refuse(site, refusal))
        site.release()
        until(lambda: len(site.controller.routed) > asked + 3, "the gateway asks again", 5)
        site.call(_refuse(site, None))
        heard += lines
    assert "".join(json.loads(line)["choices"][0]["text"] for line in heard[:-1]) == TEXT
    excluded = [list(routed.exclude) for routed in site.controller.routed[2:]]
    assert excluded == [["worker-1"] if forgiven else []] * len(excluded)


async def _refuse(site: Site, refusal: InfinillmError | None) -> None:
    site.controller.refusal = refusal


def test_a_length_nobody_asked_for_follows_the_pool(site: Site) -> None:
    """Where the pool has shrunk since, so has what may be produced; below what there is, it is an error."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    change(site, FIRST, fail_after=3)
    answer = site.http.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["message"]["content"] == TEXT
    first, second = site.controller.routed
    assert first.longest_tokens == first.prompt_tokens + 1
    assert (second.prompt_tokens, second.longest_tokens) == (first.prompt_tokens + 3, first.prompt_tokens + 4)
    assert len({request.sampling.max_tokens for request in site.asked}) == 1
