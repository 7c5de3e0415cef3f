"""Settings: file < environment < flags, nothing unknown let in, every complaint naming what to change."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm import config
from infinillm.errors import BadRequest
from infinillm.options import options

CLASSES = tuple(config.PROCESSES.values())


def values(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Any valid settings of a process."""

    def one(each: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
        about = each.metadata
        if about["choices"]:
            return st.sampled_from(about["choices"])
        match each.default:
            case bool():
                return st.booleans()
            case int():
                return st.integers(int(about["least"]), int(about["most"]))
            case float():
                return st.floats(about["least"], about["most"], allow_nan=False)
        printable = st.characters(min_codepoint=33, max_codepoint=0x2FF)
        return st.text(printable, min_size=1, max_size=12).filter(lambda text: text != "--")  # argparse drops it

    return st.builds(cls, **{each.name: one(each) for each in options(cls)})


@given(st.sampled_from(CLASSES).flatmap(values))
def test_arguments_are_what_load_reads(settings: Any) -> None:
    assert config.load(type(settings), config.arguments(settings), {}) == settings


@given(st.sampled_from(CLASSES).flatmap(values))
def test_the_environment_says_the_same_as_flags(settings: Any) -> None:
    section = type(settings).__name__
    environ = {
        f"INFINILLM_{section}_{each.name}".upper(): str(getattr(settings, each.name))
        for each in options(type(settings))
    }
    assert config.load(type(settings), [], environ) == settings


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("worker: {kv_blocks: 1, block-size: 8, threads: 3}\ncontroller: {port: 7}\n")
    environ = {"INFINILLM_WORKER_KV_BLOCKS": "2", "INFINILLM_WORKER_BLOCK_SIZE": "32", "HOME": "/"}
    found = config.load(config.Worker, ["--kv-blocks", "4", "--config", str(file)], environ)
    assert (found.kv_blocks, found.block_size, found.threads, found.dtype) == (4, 32, 3, "auto")
    assert found.sources == {"kv_blocks": "flag", "block_size": "environment", "threads": "file"}
    lines = dict(line.split(maxsplit=1) for line in config.explain(found).splitlines())
    assert lines["threads"].split() == ["3", "file"]
    assert lines["dtype"].split() == ["'auto'", "default"]


@pytest.mark.parametrize(
    ("argv", "field", "words"),
    [
        (["--kv-blok", "4"], "--kv-blok", "did you mean --kv-blocks?"),
        (["--kv-blocks", "many"], "kv_blocks", "--kv-blocks must be a whole number, not 'many'"),
        (["--kv-blocks", "-1"], "kv_blocks", "--kv-blocks must be between 0 and"),
        (["--port", "70000"], "port", "65535"),
        (["--dtype", "float8"], "dtype", "--dtype must be one of auto, float32"),
        (["--lend-fraction", "nan"], "lend_fraction", "between 0 and 1"),
        (["--kv-memory-gib", "inf"], "kv_memory_gib", "between"),
        (["--host"], None, "expected one argument"),
        (["model", "another"], "another", "unrecognized"),
        (["--kv", "4"], "--kv", "unrecognized"),  # no abbreviations
        (["--config", "/nowhere.yaml"], "config", "No such file"),
    ],
)
def test_bad_flags_are_named(argv: list[str], field: str | None, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        config.load(config.Worker, argv, {})
    assert words in caught.value.message
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("INFINILLM_WORKER_KV_BLOKS", "1", "did you mean INFINILLM_WORKER_KV_BLOCKS"),
        ("INFINILLM_NOBODY", "1", "unknown environment variable"),
        ("INFINILLM_GATEWAY_PRT", "1", "did you mean INFINILLM_GATEWAY_PORT"),  # another process's: still a slip
        ("INFINILLM_WORKER_THREADS", "two", "INFINILLM_WORKER_THREADS must be a whole number"),
        ("INFINILLM_WORKER_MEMORY_ONLY", "maybe", "must be true or false"),
    ],
)
def test_bad_environment_is_named(variable: str, value: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        config.load(config.Worker, [], {variable: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker: {kv_bloks: 1}", "did you mean kv_blocks"),
        ("wrker: {kv_blocks: 1}", "unknown section 'wrker'"),
        ("gateway: {kv_blocks: 1}", "unknown key 'kv_blocks' in 'gateway'"),
        ("worker: {kv_blocks: '1'}", "must be a whole number, not '1'"),
        ("worker: {memory_only: 1}", "must be true or false"),
        ("worker: {kv_blocks: true}", "must be a whole number"),
        ("worker: 5", "must map names to values"),
        ("[1, 2]", "must map names to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadRequest, match=words):
        config.load(config.Worker, [], {}, file)


def test_a_file_may_be_empty_and_numbers_may_be_whole(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("")
    assert config.load(config.Worker, [], {}, file) == config.Worker()
    file.write_text("worker: {kv_memory_gib: 2}")
    assert config.load(config.Worker, [], {}, file).kv_memory_gib == 2.0


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(BadRequest, match="--policy must be one of"):
        config.Controller(policy="greedy")


@pytest.mark.parametrize("cls", CLASSES)
def test_help_explains_every_flag_with_its_default(cls: type[Any]) -> None:
    text = " ".join(config.parser(cls, "infinillm x").format_help().split())
    for each in options(cls):
        assert each.metadata["text"], each.name
        assert " ".join(each.metadata["text"].split()) in text
        if each.default and each.default is not True:
            assert f"(default: {each.default})" in text
    assert (cls.__doc__ or "")[:40] in text


def test_serve_tells_its_processes_the_same_story() -> None:
    serve = config.Serve(model="m", workers=2, kv_blocks=7, block_size=8, policy="isolated", metrics_port=9100, port=1)
    first, second = (serve.worker(index, "c:1") for index in range(2))
    assert (first.id, second.id) == ("worker-0", "worker-1")
    assert (first.metrics_port, second.metrics_port, serve.controller().metrics_port) == (9101, 9102, 9100)
    assert serve.controller().policy == "isolated"
    assert serve.gateway("c:1") == config.Gateway(model="m", port=1, controller="c:1")
    assert (first.kv_blocks, first.block_size, first.controller, first.model) == (7, 8, "c:1", "m")
    for each in (first, serve.controller(), serve.gateway("c:1"), serve.prepare()):
        shared = {f.name for f in options(type(each))} & {f.name for f in options(config.Serve)} - {"host", "port"}
        same = {name for name in shared if getattr(each, name) == getattr(serve, name)}
        assert shared - same <= {"metrics_port", "threads"}, f"{type(each).__name__} does not hear of {shared - same}"


def test_serve_divides_the_cores_among_its_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    for workers, threads, each in ((1, 0, cores), (1000, 0, 1), (1000, 3, 3)):
        assert config.Serve(workers=workers, threads=threads).worker(0, "c:1").threads == each
