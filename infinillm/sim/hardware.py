"""Hardware, models and clusters as data: what a simulated node holds, and what everything costs it.

A `Chip` is the figures of a data sheet, the shares of them that an engine reaches, and what is paid however little
there is to do. `A100` is the data sheet with shares measured elsewhere; `A100@infinite-llm` is the same with those a
calibration found, which `python -m bench.fit` writes and which says what was fitted to what.

A node is `degree` devices that act as one (tensor parallel). They divide weights, K/V heads and work between them. What
is fixed is not divided, K/V heads are repeated where there are fewer than devices, and each layer adds two all-reduces
of its rows. A link inside a server belongs to a device, so two nodes have `degree` of them side by side; the link
between servers belongs to a server. Bandwidths are bytes per second one way, times seconds, sizes bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from infinillm.core.cost import Cost, Curve, Dense, Device, Link, from_plain, roofline
from infinillm.core.types import AttentionShape, NodeId
from infinillm.errors import BadRequest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
OCTAVE = 8  # points of a prefill curve in which tokens double: the square between them is right to 0.2 %
LONGEST = 22  # doublings of tokens it has
CLUSTER = re.compile(r"(\d+)x(\d+)x([\w.@-]+?)(?::tp(\d+))?")


def data(name: str) -> str:
    """The text of a file of this room."""
    return resources.files("infinillm.sim").joinpath(f"data/{name}").read_text(encoding="utf-8")


def named(kind: str, name: str) -> dict[str, Any]:
    """One entry of a table: devices, links or models."""
    table = json.loads(data(f"{kind}s.json"))
    if name not in table:
        raise BadRequest(f"there is no {kind} {name!r}; there are: {', '.join(table)}", field=kind)
    found: dict[str, Any] = table[name]
    return found


# --- devices and links -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chip:
    """One device under one engine."""

    name: str
    bandwidth: float  # read, per second
    flops: float  # per second, dense, in 16 bits (a CPU: in float32)
    memory: float
    memory_share: float  # of memory, weights and K/V together
    weights_share: float  # of bandwidth, streaming weights
    attention_share: float  # of bandwidth, paged attention over much context
    flops_share: float  # of flops, matrices of a prefill and of large batches
    prompt_attention_share: float  # of flops, attention of a prefill
    attention_seconds: float  # fixed, of one layer's decode attention
    layer_seconds: float  # fixed, of everything else in a layer of a decode
    merge_seconds: float  # of merging partials in one layer
    prompt_seconds: float  # fixed, of a layer of a prefill
    row_seconds: float  # of one row of a step outside the device: sampling, books, words
    inside: str  # the link its servers have
    between: str  # and the one between them

    @property
    def device(self) -> Device:
        return Device(**{each.name: getattr(self, each.name) for each in fields(Device)})


def chip(name: str) -> Chip:
    """`A100`, or `A100@infinite-llm` with the figures of that calibration."""
    device, _, calibration = name.partition("@")
    found = named("device", device)
    if calibration:
        fit = calibrated(calibration)
        if fit["device"] != device:
            raise BadRequest(f"calibration {calibration!r} is of {fit['device']}, not of {device}", field="device")
        found |= fit["links"] | fit["taken"] | fit["fitted"]
    return Chip(name, **{each.name: found[each.name] for each in fields(Chip) if each.name != "name"})


def calibrated(name: str) -> dict[str, Any]:
    """What was fitted, to what, and how far every point is off."""
    folder = resources.files("infinillm.sim").joinpath("data")
    known = {each.name[12:-5] for each in folder.iterdir() if each.name.startswith("calibration-")}
    if name not in known:
        raise BadRequest(f"there is no calibration {name!r}; there are: {', '.join(sorted(known))}", field="device")
    found: dict[str, Any] = json.loads(data(f"calibration-{name}.json"))
    return found


def link(name: str) -> Link:
    found = named("link", name)
    return Link(name, found["latency"], found["bandwidth"])


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """One model, as far as its costs go; `hidden` elements of a row, `weights` bytes of all parameters."""

    name: str
    hidden: int
    dense: Dense
    shape: AttentionShape
    weights: float


def size_of(name: str, config: Mapping[str, Any], block_size: int, dtype: str) -> Size:
    dense, shape = dense_of(config, dtype), shape_of(config, block_size, dtype)
    embeddings = 0 if config.get("tie_word_embeddings", False) else dense.head_parameters
    parameters = shape.layers * dense.layer_parameters + dense.head_parameters + embeddings
    return Size(name, config["hidden_size"], dense, shape, parameters * dense.element_bytes)


def read_size(model: str, block_size: int, dtype: str) -> Size:
    """A model of the table by name, else the config.json at a path, or in the folder there."""
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        return size_of(model, named("model", model), block_size, dtype)
    return size_of(model, _read(path, "model"), block_size, dtype)


def dense_of(config: Mapping[str, Any], dtype: str) -> Dense:
    """Everything but attention, from the keys of a Hugging Face config.json. Raises BadRequest, naming the key."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BadRequest(f"models of type {family!r} are not simulated; {', '.join(FAMILIES)} are", field="model_type")
    hidden, heads, kv_heads, head_dim = _heads(config)
    attention = 2 * hidden * (heads + kv_heads) * head_dim
    mlp = 3 * hidden * _whole(config, "intermediate_size")
    return Dense(attention + mlp, _whole(config, "vocab_size") * hidden, _element_bytes(dtype))


def shape_of(config: Mapping[str, Any], block_size: int, dtype: str) -> AttentionShape:
    """Attention, from the same keys; K/V in `dtype`."""
    _element_bytes(dtype)
    _, heads, kv_heads, head_dim = _heads(config)
    windowed = config.get("use_sliding_window", config.get("model_type") == "mistral")
    window = (config.get("sliding_window") or 0) if windowed else 0
    layers = _whole(config, "num_hidden_layers")
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return AttentionShape(heads, kv_heads, head_dim, block_size, dtype, head_dim**-0.5, windows)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    kv_heads = _whole(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    head_dim = _whole(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    return hidden, heads, kv_heads, head_dim


def _element_bytes(dtype: str) -> float:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BadRequest(f"dtype must be float32, bfloat16 or float16, not {dtype!r}", field="dtype")
    return 4.0 if dtype == "float32" else 2.0


def _whole(values: Mapping[str, Any], key: str) -> int:
    found = values.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise BadRequest(f"{key} must be a whole number of 1 or more, not {found!r}", field=key)
    return found


# --- nodes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hardware:
    """A node of `degree` devices, in servers of `devices`; a node larger than a server is of whole servers."""

    chip: Chip
    degree: int
    devices: int
    inside: Link  # of one device to another in its server
    between: Link  # of one server to another

    def __post_init__(self) -> None:
        if max(self.degree, self.devices) % min(self.degree, self.devices):
            raise BadRequest(f"tp{self.degree} does not fit servers of {self.devices} devices", field="tensor_parallel")

    @property
    def servers(self) -> int:
        """Servers one node takes up."""
        return max(self.degree // self.devices, 1)

    @property
    def near(self) -> Link:
        """To a node of the same server."""
        return replace(self.inside, bandwidth=self.degree * self.inside.bandwidth)

    @property
    def far(self) -> Link:
        """To a node of another server, when no other node uses the link."""
        return replace(self.between, bandwidth=self.servers * self.between.bandwidth)

    def kv_bytes(self, size: Size) -> float:
        """What the weights leave for K/V, each token counted once."""
        left = self.degree * self.chip.memory * self.chip.memory_share - size.weights
        return max(left, 0.0) * self._spread(size)

    def reduce(self, rows: float, size: Size) -> float:
        """One all-reduce of `rows` rows: in rings, inside servers, and then between them."""
        sent = 2 * rows * size.hidden * size.dense.element_bytes
        rings = ((self.degree // self.servers, self.inside), (self.servers, self.between))
        return sum(way.latency + sent * (n - 1) / n / way.bandwidth for n, way in rings if n > 1)

    def cost(self, size: Size, way: Link) -> Cost:
        """The cost of a model on this node, with equal nodes at the end of `way`."""
        one = self.chip.device
        together = replace(
            one,
            bandwidth=self.degree * one.bandwidth,
            flops=self.degree * one.flops,
            attention_share=self._spread(size) * one.attention_share,
        )
        found = roofline(together, way, size.dense, size.shape)
        reduces = 2 * size.shape.layers

        def more(rows: float, seconds: float) -> float:
            return seconds + rows * self.chip.row_seconds + reduces * self.reduce(rows, size)

        lengths = (2.0 ** (k / OCTAVE) for k in range(LONGEST * OCTAVE))
        return replace(
            found,
            dense=Curve(tuple((rows, more(rows, seconds)) for rows, seconds in found.dense.points)),
            prefill=Curve(tuple((n, self._prompt(n, size)) for n in (0.0, *lengths))),
        )

    def _prompt(self, tokens: float, size: Size) -> float:
        shape, speed = size.shape, self.degree * self.chip.flops
        matrices = 2 * shape.layers * size.dense.layer_parameters * tokens / (self.chip.flops_share * speed)
        scores = 2 * shape.layers * shape.heads * shape.head_dim * tokens**2
        attention = scores / (self.chip.prompt_attention_share * speed)
        fixed = shape.layers * self.chip.prompt_seconds
        return fixed + matrices + attention + 2 * shape.layers * self.reduce(tokens, size)

    def _spread(self, size: Size) -> float:
        """The share of its devices that hold different K/V heads."""
        return min(self.degree, size.shape.kv_heads) / self.degree


def hardware(name: str, degree: int, devices: int) -> Hardware:
    """Nodes of the device of that name, with the links it usually has."""
    found = chip(name)
    return Hardware(found, degree, devices, link(found.inside), link(found.between))


# --- clusters --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Site:
    """One node: its server, its blocks, and its costs with nodes of the same server and of others."""

    id: NodeId
    server: int
    blocks: int
    near: Cost
    far: Cost


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes, and the two kinds of links between them."""

    sites: tuple[Site, ...]
    near: Link
    far: Link

    def link(self, one: Site, other: Site) -> Link:
        return self.near if one.server == other.server else self.far

    def cost(self, one: Site, other: Site) -> Cost:
        """What `one` pays, where it asks `other` or moves blocks there."""
        return one.near if one.server == other.server else one.far


def cluster(text: str, size: Size) -> Cluster:
    """`4x8xA100`, `4x8xA100@infinite-llm:tp8` (servers, devices of each, what they are), or the path of a JSON file.

    The file has `servers` and `devices`, and either `device` and `tensor_parallel`, or `profile` (the file that
    `infinillm profile` wrote, by its path from there) and `blocks` of a worker. `inside` and `between` name links; with
    a `device` they may be left out. A profile counts the way it was measured over, whatever the links.
    """
    if text.endswith(".json"):
        path = Path(text)
        return _from_plain(_read(path, "cluster"), path.parent, size)
    if (found := CLUSTER.fullmatch(text)) is None:
        message = f"a cluster is a JSON file or like 4x8xA100 or 4x8xA100@infinite-llm:tp8, not {text!r}"
        raise BadRequest(message, field="cluster")
    servers, devices, device, degree = found.groups()
    plain = {"servers": int(servers), "devices": int(devices), "device": device, "tensor_parallel": int(degree or 1)}
    return _from_plain(plain, Path(), size)


def _from_plain(plain: Mapping[str, Any], folder: Path, size: Size) -> Cluster:
    servers, devices = _whole(plain, "servers"), _whole(plain, "devices")
    if "profile" in plain:
        cost = from_plain(_read(folder / str(plain["profile"]), "profile"))
        ways = link(plain.get("inside", "")), link(plain.get("between", ""))
        return _laid_out(servers * devices, devices, _whole(plain, "blocks"), (cost, cost), ways)
    found = chip(str(plain.get("device")))
    inside, between = (link(str(plain.get(name, getattr(found, name)))) for name in ("inside", "between"))
    node = Hardware(found, _whole(plain, "tensor_parallel"), devices, inside, between)
    blocks = int(node.kv_bytes(size) // size.shape.block_bytes)
    nodes, left = divmod(servers * devices, node.degree)
    if left or not blocks:
        why = f"{servers * devices} devices" if left else f"{size.name}, whose weights leave no room for K/V"
        raise BadRequest(f"tp{node.degree} on {found.name} does not fit {why}", field="tensor_parallel")
    costs = node.cost(size, node.near), node.cost(size, node.far)
    return _laid_out(nodes, max(devices // node.degree, 1), blocks, costs, (node.near, node.far))


def _laid_out(nodes: int, of_server: int, blocks: int, costs: tuple[Cost, Cost], ways: tuple[Link, Link]) -> Cluster:
    width = len(str(nodes - 1))
    sites = tuple(Site(f"n{n:0{width}}", n // of_server, blocks, *costs) for n in range(nodes))
    return Cluster(sites, *ways)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"cannot read {path}: {error}", field=what) from None
    if not isinstance(found, dict):
        raise BadRequest(f"{path} must hold an object of JSON", field=what)
    return found
