"""The gRPC face of the gateway: what HTTP has, by the same bounds."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from infinillm import rpc
from infinillm.core.request import Sampling
from infinillm.errors import BadRequest, NotFound, Overloaded, TooLong
from infinillm.protos import inference_pb2 as pb
from infinillm.servers.inference_service import INFERENCE
from tests import tiny
from tests.servers.fake_shard import MODEL, TEXT, WAIT_SECONDS, Site, encode

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def channel(site: Site) -> Iterator[grpc.Channel]:
    with rpc.blocking_channel(site.gateway.grpc_address) as channel:
        yield channel


@pytest.fixture(scope="module")
def client(channel: grpc.Channel) -> Any:
    return rpc.BlockingClient(channel, INFERENCE)


def test_generate_over_grpc(site: Site, client: Any) -> None:
    site.change(cached=1)
    parameters = pb.GenerateParameters(
        max_tokens=200, temperature=0, stop=["🦊"], logprobs=1, logit_bias={5: -100}, stop_token_ids=[3], seed=4
    )
    answers = list(client.Generate(pb.GenerateRequest(text="Hi", parameters=parameters)))
    assert "".join(answer.text for answer in answers) == TEXT.partition("🦊")[0]
    assert [answer.finish_reason for answer in answers] == [*[""] * (len(answers) - 1), "stop"]
    tokens = [token for answer in answers for token in answer.tokens]
    assert tokens == encode(TEXT)[: len(tokens)]
    last = answers[-1]
    assert (last.prompt_tokens, last.completion_tokens, last.cached_tokens) == (len(encode("Hi")), len(tokens), 1)
    assert [value.token for answer in answers for value in answer.logprobs] == tokens
    sampling = site.asked[0].sampling
    assert (sampling.temperature, sampling.seed, dict(sampling.logit_bias)) == (0, 4, {5: -100.0})


def test_grpc_defaults_are_those_of_openai(site: Site, client: Any) -> None:
    list(client.Generate(pb.GenerateRequest(model=MODEL, tokens=pb.TokenIds(ids=[5, 6]))))
    sampling = site.asked[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.HasField("seed")) == (16, 1.0, False)
    assert list(site.asked[0].prompt) == [5, 6]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[10**6])), "prompt"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(temperature=-1)), "temperature"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(temperature=float("nan"))), "temperature"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(top_p=2)), "top_p"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(stop=[""])), "stop"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(stop=["a"] * 17)), "stop"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(logprobs=21)), "logprobs"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(logit_bias={1: 1000})), "logit_bias"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(logit_bias={10**6: 1})), "logit_bias"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(stop_token_ids=[2**32 - 1])), "stop_token_ids"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(n=0)), "n"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(n=17)), "n"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(prompt_logprobs=21)), "prompt_logprobs"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(cache_salt="")), "cache_salt"),
        (pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(cache_salt="a" * 1025)), "cache_salt"),
        (pb.GenerateRequest(text="a", model="m" * 257), "model"),
    ],
)
def test_bad_input_over_grpc(site: Site, client: Any, request_: Any, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        list(client.Generate(request_))
    assert caught.value.field == field
    assert not site.asked


def test_choices_over_grpc(site: Site, client: Any) -> None:
    parameters = pb.GenerateParameters(
        max_tokens=200, n=3, seed=2**63 - 1, cache_salt="mine", prompt_logprobs=1, stop=["🦊"]
    )
    parameters.include_stop_str_in_output = True
    answers = list(client.Generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6, 7]), parameters=parameters)))
    assert len({answer.id for answer in answers}) == 1
    for index in range(3):
        mine = [answer for answer in answers if answer.index == index]
        assert "".join(answer.text for answer in mine) == TEXT.partition("🦊")[0] + "🦊"
        assert [value.token for answer in mine for value in answer.prompt_logprobs] == [6, 7]
        assert [answer.WhichOneof("stop_reason") for answer in mine] == [*[None] * (len(mine) - 1), "stop_string"]
        assert (mine[-1].finish_reason, mine[-1].stop_string, mine[-1].prompt_tokens) == ("stop", "🦊", 3)
        assert mine[-1].completion_tokens == sum(len(answer.tokens) for answer in mine)
    assert sorted(request.sampling.seed for request in site.asked) == [-(2**63), 1 - 2**63, 2**63 - 1]
    assert {request.cache_salt for request in site.asked} == {"mine"}


def test_special_tokens_over_grpc(site: Site, client: Any) -> None:
    token = encode("b")[0]
    site.change(script=lambda prompt: [*encode("a"), tiny.tokenizer().bos_token_id, token])
    parameters = pb.GenerateParameters(stop_token_ids=[token], skip_special_tokens=False, add_special_tokens=False)
    answers = list(client.Generate(pb.GenerateRequest(text="Hi", parameters=parameters)))
    assert "".join(answer.text for answer in answers) == f"a{tiny.tokenizer().bos_token}"
    assert answers[-1].stop_token == token
    assert list(site.asked[0].prompt) == encode("Hi")


def test_every_field_of_sampling_can_be_asked_for_over_grpc() -> None:
    assert set(Sampling.__dataclass_fields__) <= set(pb.GenerateParameters.DESCRIPTOR.fields_by_name)


def test_other_refusals_over_grpc(site: Site, client: Any) -> None:
    with pytest.raises(NotFound):
        list(client.Generate(pb.GenerateRequest(model="gpt", text="a")))
    with pytest.raises(TooLong) as caught:
        list(client.Generate(pb.GenerateRequest(text="a", parameters=pb.GenerateParameters(max_tokens=600))))
    assert caught.value.field == "max_tokens"
    site.change(fail_after=0, failure=Overloaded("9 requests wait"))
    with pytest.raises(Overloaded, match="9 requests wait"):
        list(client.Generate(pb.GenerateRequest(text="a")))
    assert 'infinillm_refusals_total{reason="not_found"}' in site.gateway.metrics.exposition().decode()


def test_malformed_protobuf(site: Site, channel: grpc.Channel, client: Any) -> None:
    raw = channel.unary_stream(f"/{INFERENCE.full_name}/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        list(raw(b"\xff\xff\xff", timeout=WAIT_SECONDS))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "".join(answer.text for answer in client.Generate(pb.GenerateRequest(text="a")))


def test_leaving_over_grpc_cancels(site: Site, client: Any) -> None:
    site.change(hold_after=2)
    stream = client.Generate(pb.GenerateRequest(text="a"))
    next(stream)
    stream.cancel()
    site.until(lambda: list(site.ended.values()) == ["cancelled"])


def test_models_health_and_reflection(site: Site, channel: grpc.Channel, client: Any) -> None:
    (card,) = client.ListModels(pb.ListModelsRequest(), timeout=WAIT_SECONDS).models
    assert (card.id, card.max_tokens) == (MODEL, 500)
    health = rpc.BlockingClient(channel, rpc.HEALTH)

    watch = health.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=WAIT_SECONDS)
    assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)
    watch.cancel()
    names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert INFERENCE.full_name in names
    found = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(INFERENCE.full_name)
    assert [method.name for method in found.methods] == ["Generate", "ListModels"]
