"""What is slow the first time, done once ahead of the workers: the model converted, the CPU kernels compiled."""

from __future__ import annotations

import json

import torch

from infinillm import config
from infinillm.kernels import bodies
from infinillm.model import files


def _say(what: str, share: float) -> None:
    print(json.dumps({"doing": what, "done": round(share, 4)}), flush=True)


async def run(settings: config.Prepare) -> None:
    """Print progress as one JSON object a line, and at last where the model is."""
    cache = files.cache_folder(settings.cache_dir)
    _say("compiling the CPU kernels", 0.0)
    bodies.body(torch.device("cpu"), cache)
    path = files.resolve(settings.model or None, cache, _say)
    print(json.dumps({"ready": "prepare", "model": str(path)}), flush=True)
