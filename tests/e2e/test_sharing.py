"""What one worker has computed another does not compute again, be its owner there or gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from infinillm import rpc, wire
from infinillm.core.request import Sampling
from infinillm.errors import Unavailable
from infinillm.protos import shard_pb2
from infinillm.servers.shard import SHARD
from tests.e2e import client
from tests.e2e.conftest import BLOCK, BLOCKS, truth
from tests.e2e.processes import Cluster, until
from tests.e2e.test_owners import computed

LONG, COUNT = (BLOCKS + 4) * BLOCK + 2, 130  # tokens: more than one worker holds, and steps for many heartbeats


def node(pool: Cluster, name: str) -> Any:
    return next(each for each in pool.ledger().nodes if each.id == name)


def ask(id: str, prompt: list[int], count: int, already: list[int], *holders: Any) -> shard_pb2.ShardGenerateRequest:
    """What a gateway asks a worker, which it tells who may have computed some of it."""
    return shard_pb2.ShardGenerateRequest(
        id=id,
        prompt=prompt,
        sampling=wire.sampling_to_wire(Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)),
        already=already,
        holders=[{"node": holder.id, "address": holder.address} for holder in holders],
    )


@contextmanager
def generating(pool: Cluster, name: str, asked: shard_pb2.ShardGenerateRequest) -> Iterator[Iterator[Any]]:
    with rpc.blocking_channel(node(pool, name).address) as channel:
        yield iter(rpc.BlockingClient(channel, SHARD).Generate(asked))


def test_a_prefix_that_another_worker_computed_is_used_there(pool: Cluster) -> None:
    """A worker that is told who has the beginning of a prompt computes only what is its own."""
    prompt, want = truth(10 * BLOCK + 2, 41, 8)
    with client.streaming(pool.url, prompt[:-2], 8) as first:
        first.finish()
        home = pool.placement(first.id)["node"]
    other = next(name for name in pool.workers if name != home)
    before = computed(pool, other)
    with generating(pool, other, ask("shared", prompt, 8, [], node(pool, home))) as stream:
        said = list(stream)
    assert [token for each in said for token in each.tokens] == want
    assert computed(pool, other) - before == 2 + 8 - 1
    assert max(each.cached_tokens for each in said) == 10 * BLOCK


def test_what_survives_of_a_lost_worker_is_not_computed_again(pool: Cluster) -> None:
    """A request lies on two nodes, and its owner dies. Whoever goes on finds the rest, and computes the hole."""
    prompt, want = truth(LONG, 42, COUNT)
    home, other = "worker-0", "worker-2"
    with generating(pool, home, ask("survives", prompt, COUNT, [])) as stream, suppress(Unavailable):
        already = [token for _ in range(5) for token in next(stream).tokens]
        until(lambda: any(each.sequence == "survives" for each in pool.ledger().layouts), "it is told", 5)
        (layout,) = (each for each in pool.ledger().layouts if each.sequence == "survives")
        pool.workers[home].kill()
        already += [token for each in stream for token in each.tokens]
    assert already == want[: len(already)] and len(already) < COUNT
    holders = [node(pool, span.node) for span in layout.spans if span.node != home]
    before = computed(pool, other)
    with generating(pool, other, ask("survives", prompt, COUNT, already, *holders)) as stream:
        assert [token for each in stream for token in each.tokens] == want[len(already) :]
    hole = sum(span.stop - span.start for span in layout.spans if span.node == home)
    whole = (LONG + len(already) - 1) // BLOCK * BLOCK
    assert computed(pool, other) - before == hole + LONG + COUNT - 1 - whole
    pool.start_worker_again(home)
