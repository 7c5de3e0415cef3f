"""Folders of safetensors: one file, shards, damage, and tensors nobody wants."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infinillm.errors import BadRequest
from infinillm.model.spec import dtype_of, spec_of
from infinillm.model.weights import load, read_config
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a tiny model, to spoil."""
    return Path(shutil.copytree(tiny.folder("llama"), tmp_path / "model"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def test_shards_are_one_model(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, shards = load(tmp_path, "auto", CPU, tiny.silent)
    _, whole = load(tiny.folder("llama"), "auto", CPU, tiny.silent)
    for one, other in zip(shards.layers, whole.layers, strict=True):
        assert torch.equal(one.qkv, other.qkv)
        assert torch.equal(one.mlp.down, other.mlp.down)
    assert torch.equal(shards.head, whole.head)


def test_dtype_is_the_models_own_or_the_one_asked_for(folder: Path) -> None:
    assert load(folder, "auto", CPU, tiny.silent)[1].head.dtype == torch.float32
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    assert load(folder, "auto", CPU, tiny.silent)[1].layers[0].qkv.dtype == torch.bfloat16
    assert load(folder, "float16", CPU, tiny.silent)[1].norm.dtype == torch.float16
    with pytest.raises(BadRequest, match="int8") as caught:
        dtype_of(spec_of(tiny.config("llama")), "int8")
    assert caught.value.field == "dtype"


def test_tied_weights_are_one_tensor() -> None:
    _, weights = load(tiny.folder("llama-tied"), "auto", CPU, tiny.silent)
    assert weights.head is weights.embedding
    assert weights.layers[0].qkv_bias is not None
    assert weights.layers[0].mlp.gate_up_bias is not None
    stored = load_file(tiny.folder("llama-tied") / "model.safetensors")
    assert weights.bytes == sum(tensor.nbytes for tensor in stored.values())


def test_progress_goes_from_nothing_to_all() -> None:
    told: list[float] = []
    load(tiny.folder("llama"), "auto", CPU, lambda what, share: told.append(share))
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert told == sorted(told)


def test_weights_do_not_depend_on_the_files_afterwards(folder: Path) -> None:
    _, weights = load(folder, "float32", CPU, tiny.silent)
    before = weights.norm.clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(weights.norm, before)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(BadRequest, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, "auto", CPU, tiny.silent)


def test_a_tensor_we_would_ignore_is_refused(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(folder, "auto", CPU, tiny.silent)
    rewrite(folder, **{"model.layers.0.self_attn.sinks": torch.ones(4)})
    with pytest.raises(BadRequest, match=r"no use for: model\.layers\.0\.self_attn\.sinks"):
        load(folder, "auto", CPU, tiny.silent)


def test_damage_is_a_bad_request(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadRequest, match="cannot be read"):
        load(folder, "auto", CPU, tiny.silent)
    weights.unlink()
    with pytest.raises(BadRequest, match="no weights"):
        load(folder, "auto", CPU, tiny.silent)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(BadRequest) as caught:
        read_config(folder)
    assert caught.value.field == "model"
    (folder / "config.json").unlink()
    with pytest.raises(BadRequest, match=r"no config\.json"):
        read_config(folder)
