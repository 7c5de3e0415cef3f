"""The layering rule: a room imports itself and rooms below it, never sideways, never up."""

import sys
from collections.abc import Callable, Iterator

import pytest

from tests.laws.tree import ROOT, Source, imports, parse, product, within

LAYERS = (
    ("__init__",),  # the version
    ("errors",),
    ("core",),
    ("kernels", "protos"),
    ("options",),
    ("config", "telemetry"),
    ("attention", "model", "transport", "wire", "rpc", "sim"),
    ("pool",),
    ("engine",),
    ("servers",),
    ("console",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# A room, and what it must not import.
BANNED = {
    "core": ("os", "time", "random", "asyncio", "threading", "logging", "socket", "secrets", "datetime", "subprocess"),
    "sim": ("torch",),
    "model": ("torch.distributed", "socket", "grpc"),
}
PICKLES = ("pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "multiprocessing.connection")


def layers(source: Source) -> Iterator[str]:
    for line, name in imports(source):
        if not within(name, ("infinillm",)):
            continue
        room = name.split(".")[1] if name.count(".") and name.split(".")[1] in RANK else "__init__"
        if room != source.room and RANK[room] >= RANK[source.room]:
            yield f"{source.path}:{line} {source.room} imports {name}"


def bans(source: Source) -> Iterator[str]:
    standard = (*sys.stdlib_module_names, "infinillm")
    only = {"core": standard, "kernels": (*standard, "torch", "triton"), "errors": standard}.get(source.room)
    for line, name in imports(source):
        if within(name, BANNED.get(source.room, ())) or (only and not within(name, only)):
            yield f"{source.path}:{line} {source.room} imports {name}"
        if within(name, PICKLES):
            yield f"{source.path}:{line} imports {name}: no pickle, anywhere"


@pytest.mark.parametrize("law", [layers, bans])
def test_every_file_keeps(law: Callable[[Source], Iterator[str]]) -> None:
    assert all(source.room in RANK for source in product()), "a room without a layer"
    faults = [fault for source in product() for fault in law(source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("law", "path", "text"),
    [
        (layers, "infinillm/core/types.py", "from infinillm import wire"),
        (layers, "infinillm/core/types.py", "from ..wire import x"),
        (layers, "infinillm/attention/store.py", "import infinillm.transport.base"),
        (layers, "infinillm/pool/ask.py", "def f():\n    from infinillm.engine.loop import Loop"),
        (layers, "kernels/bodies.py", "import infinillm.model"),
        (bans, "infinillm/core/types.py", "import time"),
        (bans, "infinillm/core/types.py", "from torch import Tensor"),
        (bans, "infinillm/model/weights.py", "import torch.distributed as dist"),
        (bans, "infinillm/servers/local.py", "import pickle"),
        (bans, "kernels/bodies.py", "import numpy"),
    ],
)
def test_the_law_sees(law: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert list(law(parse(text, ROOT / path)))
