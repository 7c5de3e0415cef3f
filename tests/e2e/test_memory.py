"""A request lives where there is memory: on lenders if it must, refused at once where there is not enough."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from infinillm import rpc
from infinillm.core.request import Sampling
from infinillm.errors import TooLong, Unavailable
from infinillm.protos import inference_pb2 as pb
from infinillm.protos import shard_pb2
from infinillm.wire import sampling_to_wire
from tests import tiny
from tests.e2e import client, processes
from tests.e2e.conftest import BLOCK, BLOCKS, FLAGS, MODEL, truth
from tests.e2e.processes import Cluster

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"]
LENDABLE = int(BLOCKS * 0.9)
MOST = (BLOCKS + 2 * LENDABLE) * BLOCK  # tokens of the longest request the pool can hold
AT_ONCE = 2.0  # seconds; nothing is computed for it


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = {**FLAGS, "controller": (*FLAGS["controller"], "--policy", "isolated")}
    folder = tmp_path_factory.mktemp("isolated")
    with processes.cluster(folder, str(tiny.folder(MODEL)), blocks=BLOCKS, workers=2, flags=flags) as made:
        yield made
        made.settle()


def placement(cluster: Cluster, id: str) -> list[dict[str, object]]:
    sequence = cluster.placement(id)
    return sequence["spans"]


def generate(cluster: Cluster, prompt: list[int], count: int) -> list[int]:
    """By gRPC."""
    asked = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=prompt),
        parameters=pb.GenerateParameters(max_tokens=count, temperature=0, ignore_eos=True),
    )
    with rpc.blocking_channel(cluster.gateway.said["grpc"]) as channel:
        return [token for said in rpc.BlockingClient(channel, INFERENCE).Generate(asked) for token in said.tokens]


def test_a_prompt_that_fits_no_worker_is_answered_by_several(pool: Cluster) -> None:
    prompt, want = truth(600, 1, 20)
    got = client.complete(pool.url, prompt, 20)
    assert (got.error, got.tokens, got.finish_reason) == (None, want, "length")
    spans = placement(pool, got.id)
    assert len({span["node"] for span in spans}) > 1
    assert max(int(span["stop"]) for span in spans) == 600 + 20 - 1, "the last token produced is never stored"
    assert pool.total("loan_operations_total") > 0


def test_it_is_refused_where_nobody_lends_with_the_blocks_it_needs_and_those_there_are(isolated: Cluster) -> None:
    prompt, _ = truth(600, 1, 20)
    began = time.monotonic()
    got = client.complete(isolated.url, prompt, 20)
    assert time.monotonic() - began < AT_ONCE
    assert got.status == 400 and got.error is not None and got.error["code"] == "context_length_exceeded"
    assert got.error["param"] in {"prompt", "max_tokens"}
    assert "39 blocks" in got.error["message"] and "24 on one worker" in got.error["message"], got.error
    assert "384 tokens" in got.error["message"]
    prompt, want = truth(340, 2, 16)
    assert client.complete(isolated.url, prompt, 16).tokens == want, "what fits is still answered"
    assert isolated.total("attention_tokens_total") == sum(
        value
        for worker in isolated.workers.values()
        for key, value in worker.metrics().items()
        if key.startswith("attention_tokens_total") and 'place="local"' in key
    )


def test_the_longest_request_that_is_offered_is_served(pool: Cluster) -> None:
    assert pool.get("/v1/models")["data"][0]["max_model_len"] == MOST
    prompt, want = truth(MOST - 8, 3, 8)
    got = client.complete(pool.url, prompt, 8)
    assert (got.error, got.tokens) == (None, want)


@pytest.mark.parametrize("over", [1, 50, 900, 1500], ids="{} tokens over".format)
def test_a_request_longer_than_the_pool_is_refused_at_once_with_the_longest_there_is(pool: Cluster, over: int) -> None:
    prompt = tiny.prompt(MOST - 8 + over, 4)
    before = pool.total("prompt_tokens_total")
    began = time.monotonic()
    got = client.complete(pool.url, prompt, 8)
    assert time.monotonic() - began < AT_ONCE
    assert got.status == 400 and got.error is not None and got.error["code"] == "context_length_exceeded"
    assert got.error["param"] in {"prompt", "max_tokens"}
    assert f"{MOST:,} tokens" in got.error["message"], got.error
    with pytest.raises(TooLong, match=f"{MOST:,} tokens") as refused:
        generate(pool, prompt, 8)
    assert refused.value.grpc_status == "OUT_OF_RANGE"
    assert pool.total("prompt_tokens_total") == before, "no worker was bothered"


def test_a_worker_that_is_asked_directly_refuses_it_too_and_goes_on(pool: Cluster) -> None:
    """Nobody is forced to come by the gateway; a worker finds out by asking for blocks."""
    shard = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
    asked = shard_pb2.ShardGenerateRequest(
        id="direct", prompt=tiny.prompt(MOST + 1, 4), sampling=sampling_to_wire(Sampling(max_tokens=2))
    )
    with (
        rpc.blocking_channel(pool.workers["worker-0"].said["address"]) as channel,
        pytest.raises(Unavailable, match="too small for this request"),
    ):
        list(rpc.BlockingClient(channel, shard).Generate(asked, timeout=20.0))
    prompt, want = truth(40, 5, 8)
    assert client.complete(pool.url, prompt, 8).tokens == want


def test_a_decode_that_outgrows_its_worker_goes_on_in_borrowed_blocks_and_nothing_is_computed_twice(
    pool: Cluster,
) -> None:
    prompt, want = truth(370, 6, 80)
    names = ("step_tokens_sum", "preemptions_total", "prompt_tokens_cached_total")
    before = {name: pool.total(name) for name in names}
    got = client.complete(pool.url, prompt, 80)
    assert (got.error, got.tokens) == (None, want)
    spans = [(int(span["start"]), int(span["stop"]), span["node"]) for span in placement(pool, got.id)]
    assert [span[:2] for span in spans] == [(0, BLOCKS * BLOCK), (BLOCKS * BLOCK, 370 + 80 - 1)]
    assert spans[0][2] != spans[1][2], "all of its own worker, then somebody else's"
    grown = {name: pool.total(name) - before[name] for name in names}
    assert grown == {"step_tokens_sum": 370 + 80 - 1, "preemptions_total": 0, "prompt_tokens_cached_total": 0}


def test_text_and_tokens_over_grpc_are_those_over_http(pool: Cluster) -> None:
    prompt, want = truth(420, 7, 12)
    assert generate(pool, prompt, 12) == want
