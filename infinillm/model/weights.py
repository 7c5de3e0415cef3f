"""The tensors of a model, read from a Hugging Face folder and fused for few, large products."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from infinillm.errors import BadRequest
from infinillm.model.files import Progress
from infinillm.model.spec import Spec, dtype_of, spec_of

IGNORED = ("rotary_emb.inv_freq",)
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
ALIGN = 64  # elements; more than any vector unit asks for


class Mlp(NamedTuple):
    """gate_up [2F, E] holds gate rows, then up rows; down [E, F]."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Experts(NamedTuple):
    """router [X, E]; per expert gate_up [2F, E] and down [E, F]."""

    router: Tensor
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


class Layer(NamedTuple):
    """qkv [(H + 2K) * D, E] holds q rows, then k, then v; out [E, H * D]; norms [E], those of q and k [D]."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    attention_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp | Experts
    mlp_post_norm: Tensor | None


class Weights(NamedTuple):
    """embedding and head [V, E], one tensor where the model ties them; norm [E]."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor

    @property
    def bytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in _tensors(self)}.values())


def load(
    path: Path, dtype: str, device: torch.device, progress: Progress, longest: int | None = None
) -> tuple[Spec, Weights]:
    """Read the model in folder `path` as `dtype` ("auto": as published) onto `device`; `longest` as in `spec_of`.

    Raises BadRequest where the folder is not a model we can run, or holds tensors we would have to ignore.
    """
    spec = spec_of(read_config(path), longest)
    with _Folder(path, getattr(torch, dtype_of(spec, dtype)), device) as folder:
        layers = []
        for n in range(spec.layers):
            progress("reading weights", n / spec.layers)
            layers.append(_layer(folder, spec, n))
        embedding = folder.take("model.embed_tokens.weight")
        norm = folder.take("model.norm.weight")
        if spec.tied:
            folder.skip("lm_head.weight")
        head = embedding if spec.tied else folder.take("lm_head.weight")
        if left := folder.left():
            names = ", ".join(left[:4])
            raise BadRequest(f"{path} holds tensors a {spec.name} model has no use for: {names}", field="model")
    progress("reading weights", 1.0)
    return spec, Weights(embedding, tuple(layers), norm, head)


def read_config(path: Path) -> Any:
    """The transformers config in folder `path`."""
    if not (path / "config.json").is_file():
        raise BadRequest(f"{path} is not a Hugging Face model folder: it has no config.json", field="model")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise BadRequest(f"{path / 'config.json'} cannot be read: {error}", field="model") from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _layer(folder: _Folder, spec: Spec, n: int) -> Layer:
    family, at = spec.family, f"model.layers.{n}."
    qkv = [f"{at}self_attn.{name}" for name in family.qkv]

    def norm(name: str) -> Tensor | None:
        return folder.take(f"{at}{name}.weight") if name else None

    return Layer(
        attention_norm=folder.take(at + "input_layernorm.weight"),
        qkv=folder.stack([name + ".weight" for name in qkv]),
        qkv_bias=folder.maybe_stack([name + ".bias" for name in qkv]),
        q_norm=norm("self_attn.q_norm" if family.qk_norm else ""),
        k_norm=norm("self_attn.k_norm" if family.qk_norm else ""),
        out=folder.take(at + "self_attn.o_proj.weight"),
        out_bias=folder.maybe(at + "self_attn.o_proj.bias"),
        attention_post_norm=norm(family.attention_post_norm),
        mlp_norm=folder.take(f"{at}{family.mlp_norm}.weight"),
        mlp=_experts(folder, spec, at) if spec.mixture and spec.mixture.layers[n] else _mlp(folder, spec, at),
        mlp_post_norm=norm(family.mlp_post_norm),
    )


def _mlp(folder: _Folder, spec: Spec, at: str) -> Mlp:
    gate_up = [f"{at}mlp.{name}" for name in spec.family.gate_up]
    return Mlp(
        gate_up=folder.stack([name + ".weight" for name in gate_up]),
        gate_up_bias=folder.maybe_stack([name + ".bias" for name in gate_up]),
        down=folder.take(at + "mlp.down_proj.weight"),
        down_bias=folder.maybe(at + "mlp.down_proj.bias"),
    )


def _experts(folder: _Folder, spec: Spec, at: str) -> Experts:
    assert spec.mixture is not None
    at += spec.family.sparse + "."
    gate, up, down = spec.family.expert
    each = [f"{at}experts.{x}." for x in range(spec.mixture.experts)]
    return Experts(
        router=folder.take(at + "gate.weight"),
        gate_up=tuple(folder.stack([f"{x}{gate}.weight", f"{x}{up}.weight"]) for x in each),
        down=tuple(folder.take(f"{x}{down}.weight") for x in each),
    )


class _Arena:
    """Room for all weights in one piece: on the CPU in huge pages, which read a sixth faster than small ones."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device):
        self._flat = torch.empty(elements, dtype=dtype, device=device)
        self._at = 0
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        first = -(-self._flat.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (self._flat.data_ptr() + self._flat.nbytes - first) // HUGE_PAGE * HUGE_PAGE
        if device.type == "cpu" and madvise is not None and length > 0:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)

    def take(self, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        start, self._at = self._at, self._at + -(-count // ALIGN) * ALIGN
        return self._flat[start : start + count].view(shape)


class _Folder:
    """The safetensors files of a folder, read tensor by tensor; remembers what nobody took."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device):
        self._path, self._dtype, self._device = path, dtype, device
        self._arena: _Arena
        self._files: list[Any] = []
        self._at: dict[str, Any] = {}

    def __enter__(self) -> _Folder:
        for name in _shards(self._path):
            try:
                file = safe_open(self._path / name, framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise BadRequest(f"{self._path / name} cannot be read: {error}", field="model") from error
            self._files.append(file)
            self._at.update(dict.fromkeys(file.keys(), file))
        counts = (math.prod(file.get_slice(name).get_shape()) for name, file in self._at.items())
        self._arena = _Arena(sum(count + ALIGN for count in counts), self._dtype, self._device)
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.__exit__(*error)

    def _read(self, name: str) -> Tensor:
        if name not in self._at:
            raise BadRequest(f"{self._path} has no tensor {name}", field="model")
        tensor: Tensor = self._at.pop(name).get_tensor(name)
        return tensor

    def take(self, name: str) -> Tensor:
        return self.stack([name])

    def maybe(self, name: str) -> Tensor | None:
        return self.take(name) if name in self._at else None

    def skip(self, name: str) -> None:
        self._at.pop(name, None)

    def stack(self, names: Sequence[str]) -> Tensor:
        """Rows of all the named tensors, in order, as one tensor."""
        parts = [self._read(name) for name in names]
        rows = [part.shape[0] for part in parts]
        out = self._arena.take((sum(rows), *parts[0].shape[1:]))
        for part, piece in zip(parts, out.split(rows), strict=True):
            piece.copy_(part)
        return out

    def maybe_stack(self, names: Sequence[str]) -> Tensor | None:
        return self.stack(names) if names[0] in self._at else None

    def left(self) -> list[str]:
        return sorted(name for name in self._at if not name.endswith(IGNORED))


def _shards(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise BadRequest(f"{path} has no weights: neither model.safetensors nor an index of shards", field="model")
