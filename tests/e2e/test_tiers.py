"""Memory of other kinds: blocks spill to the host and come back, and a shard that has none borrows all it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests import tiny
from tests.e2e import client
from tests.e2e.conftest import BLOCK, FLAGS, MODEL, truth
from tests.e2e.processes import Cluster, cluster, until

SOON = 20.0
BLOCKS, HOST = 70, 200
KNOWN = 600  # tokens of the long answer that are compared
MEMORY = ("--memory-only", "--kv-blocks", str(HOST))


def of(flags: dict[str, tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    return lambda name: flags.get(name, ())


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers of 70 blocks, the second of which lends none, and a third with 200 blocks of host memory."""
    flags = {**FLAGS, "controller": ("--heartbeat-seconds", "0.15")}
    folder = tmp_path_factory.mktemp("tiers")
    kinds = {"worker-1": ("--lend-fraction", "0"), "worker-2": ("--tier", "host", *MEMORY)}
    with cluster(folder, str(tiny.folder(MODEL)), blocks=BLOCKS, flags=flags, of_worker=of(kinds)) as made:
        yield made


def tokens_on(cluster: Cluster, id: str) -> dict[str, int]:
    """Where the tokens of a request are."""
    sequence = cluster.placement(id)
    found: dict[str, int] = {}
    for span in sequence["spans"]:
        found[str(span["node"])] = found.get(str(span["node"]), 0) + int(span["stop"]) - int(span["start"])
    return found


def test_what_fits_no_device_spills_to_the_host_and_comes_back_once_another_request_is_over(tiered: Cluster) -> None:
    """Beside the other, which fills its node, there are 70 blocks on devices for the 72 to 125 it needs; then 133."""
    assert {node["id"]: node["tier"] for node in tiered.get("/v1/pool")["nodes"]} == {
        "worker-0": "device",
        "worker-1": "device",
        "worker-2": "host",
    }
    prompt, want = truth(1150, 71, KNOWN)
    with ExitStack() as both:
        with client.streaming(tiered.url, tiny.prompt(1100, 72), 900) as crowd:
            crowd.read(1)
            theirs, *_ = tokens_on(tiered, crowd.id)
            (home,) = set(tiered.workers) - {theirs, "worker-2"}
            stream = both.enter_context(client.streaming(tiered.url, prompt, 850))
            stream.read(20)
            spilled = tokens_on(tiered, stream.id)
            assert spilled[home] == BLOCKS * BLOCK
            assert spilled["worker-2"] > 0
            assert theirs not in spilled
        until(lambda: "worker-2" not in tokens_on(tiered, stream.id), "the blocks are on devices again", SOON)
        now = tokens_on(tiered, stream.id)
        assert set(now) == {home, theirs}
        stream.read(min(sum(now.values()) - len(prompt), KNOWN))
    assert stream.tokens[:KNOWN] == want[: len(stream.tokens)]
    assert tiered.total("preemptions_total") == 0
    reasons = {event["reason"] for event in tiered.controller.events if event["event"] == "ordered"}
    assert reasons == {"room for what comes back from worker-2", "back from worker-2"}
    tiered.settle()


def test_a_shard_without_memory_borrows_all_it_needs_and_answers_with_the_right_tokens(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("bare")
    kinds = of({"worker-0": MEMORY, "worker-1": ("--kv-blocks", "0", "--kv-memory-gib", "0")})
    model = str(tiny.folder(MODEL))
    with cluster(folder, model, blocks=BLOCKS, workers=2, flags=FLAGS, of_worker=kinds) as made:
        assert made.books("worker-1").node.blocks == 0
        assert made.get("/v1/models")["data"][0]["max_model_len"] == 2048
        for seed, (length, count) in enumerate([(20, 8), (1100, 40), (300, 3)], 73):
            prompt, want = truth(length, seed, count)
            got = client.complete(made.url, prompt, count)
            assert (got.error, got.tokens) == (None, want)
            assert tokens_on(made, got.id) == {"worker-0": length + count - 1}
        made.settle()
