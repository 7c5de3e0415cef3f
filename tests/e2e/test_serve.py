"""`infinillm serve` with the default model: one command, a prompt no worker holds, and a crash that is not hidden."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from infinillm.model import files
from tests import tiny
from tests.e2e import client
from tests.e2e.processes import END_SECONDS, Process, until

BLOCKS, COUNT = 14, 16  # 224 tokens a worker
TEXT = "The keeper of the lighthouse wrote in his log that night: the lamp is lit, the sea is calm. " * 18


@contextmanager
def serving(folder: Path, model: str, workers: int) -> Iterator[Process]:
    at = ("--port", "0", "--workers", str(workers), "--kv-blocks", str(BLOCKS), "--dtype", "float32")
    process = Process("serve", "serve", *at, *([model] if model else []), log=folder / "serve.log")
    try:
        process.ready()
        yield process
    finally:
        process.kill()


def family(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.popen.pid).children(recursive=True)


def test_the_default_model_answers_a_prompt_that_fits_no_worker_as_transformers_does(tmp_path: Path) -> None:
    path = files.resolve(None, Path.home() / ".cache" / "infinillm", tiny.silent)
    prompt = transformers.AutoTokenizer.from_pretrained(path)(TEXT).input_ids
    assert BLOCKS * 16 < len(prompt) < 2 * BLOCKS * 16
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    want = tiny.oracle(model, prompt, COUNT)[0]
    with serving(tmp_path, "", 3) as process:
        url = f"http://{process.said['http']}"
        got = client.complete(url, prompt, COUNT)
        assert (got.error, got.tokens) == (None, want)
        assert client.complete(url, TEXT, COUNT).tokens == want, "as text"
        children = family(process)
        assert len(children) == 5
        assert process.end() == 0
        assert not psutil.wait_procs(children, timeout=1)[1]


def test_a_process_that_crashes_takes_the_cluster_with_it_and_is_named(tmp_path: Path) -> None:
    with serving(tmp_path, str(tiny.folder("llama")), 2) as process:
        children = family(process)
        (victim,) = (child for child in children if "--id=worker-1" in child.cmdline())
        victim.kill()
        assert process.wait() not in {0, -signal.SIGKILL}
        assert "worker-1 ended with status -9" in process.last_words
        assert not psutil.wait_procs(children, timeout=1)[1]


def test_a_supervisor_that_is_killed_leaves_nobody_behind(tmp_path: Path) -> None:
    with serving(tmp_path, str(tiny.folder("llama")), 1) as process:
        children = family(process)
        process.kill()
        assert not psutil.wait_procs(children, timeout=5)[1]


def test_told_to_end_while_it_starts_it_ends(tmp_path: Path) -> None:
    process = Process("serve", "serve", "--port", "0", str(tiny.folder("llama")), log=tmp_path / "serve.log")
    try:
        children = until(lambda: family(process), "it has started something", END_SECONDS)
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert time.monotonic() - began < END_SECONDS
        assert not psutil.wait_procs(children, timeout=1)[1]
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--kv-blocks", "-1"), "kv-blocks"),
        (("--workers", "none"), "workers"),
        (("--policy", "generous"), "policy"),
        (("--port", "70000"), "port"),
        (("--no-such-flag",), "no-such-flag"),
        (("/no/such/model",), "/no/such/model"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_that_names_it(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    if flags[0].startswith("/"):
        argv = ("serve", "--port", "0", *flags)
    else:
        argv = ("serve", "--port", "0", *flags, str(tiny.folder("llama")))
    process = Process("serve", *argv, log=tmp_path / "serve.log")
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert code == 2, process.last_words
    assert named in process.last_words.strip().splitlines()[-1] and "Traceback" not in process.last_words


def test_a_taken_port_is_told_before_any_worker_has_loaded(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        process = Process("serve", "serve", "--port", port, str(tiny.folder("llama")), log=tmp_path / "serve.log")
        try:
            assert process.wait() == 2
        finally:
            process.kill()
    assert port in process.last_words.strip().splitlines()[-1] and "Traceback" not in process.last_words
    assert not [event for event in process.events if event["event"] == "joined"], "it could have been told earlier"
