"""The law of laws: placement is invisible. Wherever blocks lie, greedy output is that of one plain forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from infinillm.core.types import Span
from infinillm.errors import InfinillmError
from infinillm.kernels import bodies
from infinillm.model import files
from infinillm.model.decoder import Decoder
from tests import tiny
from tests.cluster import Cluster, tokens

PORTS = ("local", "shm", "tcp", "stream", "collective")
LENGTH, OUTPUT = 150, 24


@cache
def body() -> Any:
    return bodies.body(torch.device("cpu"))


@cache
def decoder(name: str) -> Decoder:
    return tiny.decoder(tiny.folder(name), body())


@cache
def truth(name: str, length: int = LENGTH, output: int = OUTPUT, seed: int = 1) -> tuple[list[int], torch.Tensor]:
    """What transformers' generate says."""
    return tiny.oracle(tiny.model(name), tiny.prompt(length, seed), output)


def blocks_of(tokens: int, size: int) -> int:
    return -(-tokens // size)


def thirds(size: int, total: int) -> dict[str, int]:
    """Three nodes that hold `total` tokens only together."""
    whole = blocks_of(total, size)
    first, second = whole // 3, whole // 3
    return {"a": first, "b": second, "c": whole - first - second}


def agree(outputs: list[Any], want: tuple[list[int], torch.Tensor]) -> None:
    assert tokens(outputs) == want[0]
    told = [x for output in outputs for x in output.logprobs]
    assert len(told) == len(want[0])
    for row, logprob in zip(want[1], told, strict=True):
        assert abs(row[logprob.token].item() - logprob.logprob) < 1e-3
        for token, value in logprob.top:
            assert abs(row[token].item() - value) < 1e-3


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_every_family_spread_over_three_nodes(name, size):
    with Cluster(decoder(name), thirds(size, LENGTH + OUTPUT), block_size=size, port_kind="local") as cluster:
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=3)
        agree(cluster.finish()["s"], truth(name))
        assert {span.node for span in cluster.engine.finished["s"][1]} == {"a", "b", "c"}
        cluster.settle()


@pytest.mark.parametrize("name", list(tiny.MODELS))
def test_every_family_on_one_node(name):
    with Cluster(decoder(name), {"a": 32}, block_size=8, step_tokens=33) as cluster:
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0)
        agree(cluster.finish()["s"], truth(name))
        cluster.settle()


@pytest.mark.parametrize("kind", PORTS)
def test_every_port(kind):
    with Cluster(decoder("gemma2"), thirds(8, LENGTH + OUTPUT), port_kind=kind) as cluster:
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=1)
        agree(cluster.finish()["s"], truth("gemma2"))
        assert {x.conversation.port.kind for x in cluster.home.lenders.accounts.values()} == {kind}
        cluster.settle()


def test_a_shared_prefix_is_used_and_nothing_changes():
    shared, other = tiny.prompt(LENGTH), [*tiny.prompt(LENGTH)[:100], *tiny.prompt(50, seed=2)]
    want = tiny.oracle(tiny.model("qwen3"), other, OUTPUT)
    with Cluster(decoder("qwen3"), {"a": 48, "b": 8}, port_kind="local") as cluster:
        cluster.submit(shared, id="first", max_tokens=OUTPUT, logprobs=0)
        agree(cluster.finish()["first"], truth("qwen3"))
        cluster.submit(other, id="second", max_tokens=OUTPUT, logprobs=0)
        cluster.submit(shared, id="again", max_tokens=OUTPUT, logprobs=0)
        got = cluster.finish()
        agree(got["second"], want)
        agree(got["again"], truth("qwen3"))
        assert got["second"][0].cached == 96 and got["again"][0].cached == 144
        cluster.settle()


def test_a_salt_keeps_prefixes_apart():
    with Cluster(decoder("llama"), {"a": 64}) as cluster:
        for id, salt in (("one", "x"), ("two", "y"), ("three", "x")):
            from infinillm.core.request import Request, Sampling
            from infinillm.engine.messages import Submit

            sampling = Sampling(max_tokens=2, temperature=0.0)
            cluster.engine.inbox.put(Submit(Request(id, tuple(tiny.prompt(40)), sampling, cache_salt=salt)))
            outputs = cluster.finish()[id]
            assert outputs[0].cached == (32 if id == "three" else 0)


def test_preempted_and_resumed():
    """Two sequences that fit one by one, on a node that borrows from nobody."""
    prompts = {f"s{seed}": tiny.prompt(60, seed) for seed in (1, 2)}
    with Cluster(decoder("llama"), {"a": 20}, share=False) as cluster:
        for arrival, (id, prompt) in enumerate(prompts.items()):
            cluster.submit(prompt, id=id, arrival=float(arrival), max_tokens=50, logprobs=0)
        got = cluster.finish()
        assert cluster.home.metrics.exposition().decode().count('infinillm_preemptions_total{node="a"} 0.0') == 0
        for seed, id in enumerate(prompts, 1):
            agree(got[id], truth("llama", 60, 50, seed))
        cluster.settle()


def test_a_decode_that_outgrows_its_node_goes_on_in_borrowed_blocks_and_nothing_is_computed_twice():
    with Cluster(decoder("mistral"), {"a": 20, "b": 10}) as cluster:
        cluster.submit(tiny.prompt(LENGTH), max_tokens=50, logprobs=0)
        agree(cluster.finish()["s"], truth("mistral", LENGTH, 50))
        assert cluster.engine.finished["s"][1] == (Span("a", 0, 160), Span("b", 160, 199))
        said = cluster.home.metrics.exposition().decode()
        assert 'infinillm_step_tokens_sum{node="a"} 199.0' in said  # every position exactly once
        assert 'infinillm_preemptions_total{node="a"} 0.0' in said
        cluster.settle()


def test_many_sequences_at_once_each_as_if_alone():
    lengths = {f"s{seed}": (10 + 37 * seed % 120, seed) for seed in range(1, 9)}
    with Cluster(decoder("llama3-rope"), {"a": 30, "b": 25, "c": 25}, port_kind="shm", step_tokens=48) as cluster:
        for arrival, (id, (length, seed)) in enumerate(lengths.items()):
            cluster.submit(tiny.prompt(length, seed), id=id, arrival=float(arrival), max_tokens=16, logprobs=0)
        got = cluster.finish()
        for id, (length, seed) in lengths.items():
            agree(got[id], truth("llama3-rope", length, 16, seed))
        assert 'place="remote"} 0.0' not in cluster.home.metrics.exposition().decode()
        cluster.settle()


def test_prompt_logprobs_are_those_of_the_model_wherever_the_prompt_lies():
    prompt = tiny.prompt(60)
    with torch.inference_mode():
        want = tiny.model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with Cluster(decoder("llama"), {"a": 4, "b": 6}, step_tokens=25) as cluster:
        cluster.submit(prompt, max_tokens=0, prompt_logprobs=2)
        (output,) = cluster.finish()["s"]
        assert output.finish_reason == "length" and output.tokens == ()
        assert [x.token for x in output.prompt_logprobs] == prompt[1:]
        for position, told in enumerate(output.prompt_logprobs):
            assert abs(want[position, told.token].item() - told.logprob) < 1e-3
        cluster.settle()


def test_bytes_per_decoded_token_do_not_grow_with_the_context():
    sent = {}
    with Cluster(decoder("llama"), {"a": 2, "b": 300}) as cluster:
        for length in (40, 400, 1600):
            cluster.submit(tiny.prompt(length), id=f"s{length}", max_tokens=9)
            while not cluster.home.outputs:
                cluster.turn()
            (lender,) = cluster.home.lenders.accounts.values()
            port = lender.conversation.port
            before = (port.sent_bytes, port.received_bytes)
            cluster.finish()
            sent[length] = (port.sent_bytes - before[0], port.received_bytes - before[1])
    shape = decoder("llama").spec.attention(8, "float32")
    row = shape.heads * shape.head_dim * 4
    kept = 2 * shape.kv_heads * shape.head_dim * 4
    assert set(sent.values()) == {(8 * shape.layers * (row + kept), 8 * (shape.layers * (row + 4 * shape.heads) + 8))}


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_a_lost_lender_is_a_hole_and_only_the_hole_is_computed_again(kind):
    with Cluster(decoder("llama"), {"a": 8, "b": 8, "c": 16}, port_kind=kind, patience=2.0) as cluster:
        cluster.lend("b", 8)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0)
        while len(cluster.home.outputs) < 5:
            cluster.turn()
        before = cluster.engine.sequences["s"].layout
        lost = sum(span.stop - span.start for span in before if span.node == "b")
        cluster.kill("b")
        agree(cluster.finish()["s"], truth("llama"))
        computed = next(
            float(line.split()[-1])
            for line in cluster.home.metrics.exposition().decode().splitlines()
            if line.startswith("infinillm_step_tokens_sum")
        )
        assert computed == LENGTH + OUTPUT - 1 + lost and lost == 64
        cluster.settle()


def test_a_request_that_fits_nowhere_fails_with_a_reason_and_nothing_leaks():
    from infinillm.core.types import Refused
    from infinillm.engine.messages import Borrowed

    with Cluster(decoder("llama"), {"a": 4, "b": 4}) as cluster:
        cluster.submit(tiny.prompt(100))
        cluster.turn()
        cluster.engine.inbox.put(Borrowed(Refused("the pool has 8 blocks, 13 are needed"), never="s"))
        with pytest.raises(InfinillmError, match="13 are needed"):
            tokens(cluster.finish()["s"])
        cluster.settle()


def test_the_default_model_spread_over_three_nodes():
    path = files.resolve(None, Path.home() / ".cache" / "infinillm", tiny.silent)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    text = transformers.AutoTokenizer.from_pretrained(path)
    prompt = text("The lighthouse keeper wrote in his log that night: " * 12).input_ids
    want = tiny.oracle(model, prompt, OUTPUT)
    mine = tiny.decoder(path, body())
    with Cluster(mine, thirds(16, len(prompt) + OUTPUT), block_size=16, port_kind="shm") as cluster:
        cluster.submit(prompt, max_tokens=OUTPUT, logprobs=1)
        agree(cluster.finish()["s"], want)
        assert len(cluster.engine.finished["s"][1]) == 3
        cluster.settle()


def test_a_hole_at_the_beginning_gets_a_place_again():
    """What is left of a layout need not begin at 0: the lost beginning must be kept somewhere before it is computed."""
    with Cluster(decoder("llama"), {"a": 30, "b": 12, "c": 10}, patience=2.0) as cluster:
        cluster.home.memory.blocks.grow("somebody", 0, 30)
        cluster.lend("b", 12)
        cluster.lend("c", 10)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT, logprobs=0)
        while len(cluster.home.outputs) < 3:
            cluster.turn()
        assert [span.node for span in cluster.engine.sequences["s"].layout] == ["b", "c"]
        cluster.home.memory.blocks.release("somebody")
        cluster.kill("b")
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()
