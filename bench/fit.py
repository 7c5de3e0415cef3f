"""Fits the simulator's devices to published runs, and tells fits from predictions.

    python -m bench.fit [--out infinillm/sim/data]

A few factors of a `Chip` (shares of the data sheet, fixed seconds) are found by least squares on relative errors, in
groups, each from its own points. Every other point is a prediction: no factor has seen it. Written: one
calibration-NAME.json each, with all points, the published value, ours, and the ratio.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from infinillm.core.cost import Cost
from infinillm.sim.hardware import Chip, Hardware, Size, calibrated, chip, data, link, read_size

DATA = Path(__file__).parents[1] / "infinillm" / "sim" / "data"
BLOCK, DEVICES = 16, 8  # tokens; of a server
ROUNDS = 20


class Point(NamedTuple):
    """A published figure, and ours; `source` says where it stands, `fits` the group it is fitted in, if it is."""

    what: str
    unit: str
    paper: float
    ours: Callable[[Chip], float]
    source: str
    fits: str = ""


@dataclass(frozen=True, slots=True)
class Study:
    """Published runs on one device, the factors to find, and what had to be assumed."""

    device: str
    model: str
    links: Mapping[str, str]
    taken: Mapping[str, float]  # factors that another study found
    groups: Mapping[str, tuple[str, ...]]  # factors, by group, in the order they are fitted
    points: Sequence[Point]
    assumed: str
    remarks: Callable[[Chip], str]


def solve(residuals: Callable[[dict[str, float]], list[float]], start: Mapping[str, float]) -> dict[str, float]:
    """Positive numbers whose residuals have the least sum of squares near `start`: Gauss and Newton, on logarithms."""
    names, tiny = list(start), 1e-4
    at = np.array([math.log(start[name]) for name in names])

    def off(logs: Any) -> Any:
        return np.array(residuals(dict(zip(names, map(float, np.exp(logs)), strict=True))))

    for _ in range(ROUNDS):
        here = off(at)
        slopes = np.array([(off(at + tiny * unit) - here) / tiny for unit in np.eye(len(names))]).T
        step = np.clip(np.linalg.lstsq(slopes, here, rcond=None)[0], -1, 1)
        while np.any(np.abs(step) > tiny**2) and np.sum(off(at - step) ** 2) > np.sum(here**2):
            step = step / 2
        at = at - step
    return dict(zip(names, map(float, np.exp(at)), strict=True))


def fit(study: Study) -> dict[str, Any]:
    """The calibration, as plain values."""
    device = replace(chip(study.device), **study.links, **study.taken)
    found: dict[str, float] = {}
    for group, factors in study.groups.items():
        points = [point for point in study.points if point.fits == group]
        values = solve(partial(_residuals, device, points), {name: getattr(device, name) or 1e-4 for name in factors})
        device, found = replace(device, **values), found | values
    rows = []
    for point in study.points:
        ours = point.ours(device)
        row = {"what": point.what, "unit": point.unit, "paper": point.paper, "ours": _short(ours)}
        use = f"fitted: {', '.join(study.groups[point.fits])}" if point.fits else "predicted"
        rows.append(row | {"ratio": round(ours / point.paper, 3), "use": use, "source": point.source})
    return {
        "device": study.device,
        "model": study.model,
        "links": dict(study.links),
        "taken": dict(study.taken),
        "assumed": study.assumed,
        "remarks": study.remarks(device),
        "fitted": {name: _short(value, 6) for name, value in found.items()},
        "points": rows,
    }


def _residuals(device: Chip, points: Sequence[Point], values: Mapping[str, float]) -> list[float]:
    return [point.ours(replace(device, **values)) / point.paper - 1 for point in points]


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _cost(device: Chip, degree: int, size: Size) -> Cost:
    node = _node(device, degree)
    return node.cost(size, node.near)


def _node(device: Chip, degree: int) -> Hardware:
    return Hardware(device, degree, DEVICES, link(device.inside), link(device.between))


# --- Infinite-LLM ----------------------------------------------------------------------------------------------------

V2 = "Infinite-LLM, arXiv 2401.02669v2"
BUSY = ((45, 0.12), (103, 0.27), (131, 0.33), (156, 0.37), (250, 0.52), (400, 0.56), (450, 0.57), (510, 0.60))
NARROWER = ((4, 0.14), (8, 0.075), (16, 0.035), (32, 0.015))
CONTEXT, ROWS = 1000, 256  # tokens of a request of figure 1a, and requests at once


def infinite_llm() -> Study:
    size = read_size("Llama-2-7B", BLOCK, "float16")
    parameters = size.shape.layers * size.dense.layer_parameters + size.dense.head_parameters

    def busy(rows: int, degree: int = 1) -> Callable[[Chip], float]:
        def share(device: Chip) -> float:
            cost, node = _cost(replace(device, row_seconds=0.0), degree, size), _node(device, degree)
            seconds = cost.dense(rows) - 2 * size.shape.layers * node.reduce(rows, size)
            return rows * 2 * parameters / (seconds * degree * device.flops)

        return share

    def tokens(degree: int) -> Callable[[Chip], float]:
        return lambda device: _node(device, degree).kv_bytes(size) * BLOCK / size.shape.block_bytes

    def rate(degree: int, instances: int) -> Callable[[Chip], float]:
        def per_second(device: Chip) -> float:
            rows = min(tokens(degree)(device) / CONTEXT, ROWS)
            return instances * rows / _cost(device, degree, size).decode_step(rows, rows * CONTEXT)

        return per_second

    def remarks(device: Chip) -> str:
        row = 2 * size.shape.layers * 2 * (3 / 4) * size.hidden * size.dense.element_bytes
        best = link(device.between).bandwidth / row
        return (
            f"DP1TP32 cannot be had over the link as published: its all-reduces send {row / 1e3:.0f} KB of every "
            f"generated token out of each server, so 125 MB/s bounds it to {best:.0f} tokens/s whatever the batch, and "
            f"821 tokens/s need {821 * row / 1e6:.0f} MB/s or more. The reading of 0.05 of figure 5 at one row is "
            "left out: reading the weights once already takes longer than that allows. What is left of the time at "
            "DP32TP1 is given to row_seconds, work that more devices do not divide; a share of all rates would divide, "
            "and be much further off at DP4TP8. So that point has had a say in the form, and none in the value."
        )

    shares = [Point(f"busy share, {n} rows", "of flops", u, busy(n), f"{V2}, figure 5", "step") for n, u in BUSY]
    narrow = [
        Point(f"busy share, 105 rows, TP{d}", "of flops", u, busy(105, d), f"{V2}, figure 1c") for d, u in NARROWER
    ]
    return Study(
        device="A100",
        model="Llama-2-7B",
        links={"inside": "nvlink-a100", "between": "ethernet-1g"},
        taken={},
        groups={
            "step": ("layer_seconds", "flops_share"),
            "memory": ("memory_share",),
            "rate": ("row_seconds",),
        },
        points=[
            *shares,
            Point("longest context, TP1", "tokens", 88e3, tokens(1), f"{V2}, figure 1a", "memory"),
            Point("rate, DP32TP1", "tokens/s", 34432.0, rate(1, 32), f"{V2}, figure 1a", "rate"),
            Point("longest context, TP8", "tokens", 850e3, tokens(8), f"{V2}, figure 1a"),
            Point("rate, DP4TP8", "tokens/s", 6092.0, rate(8, 4), f"{V2}, figure 1a"),
            Point("rate, DP1TP32", "tokens/s", 821.0, rate(32, 1), f"{V2}, figure 1a"),
            *narrow,
        ],
        assumed=(
            f"Of the requests of 1K tokens, {CONTEXT} are held throughout by each, and prefill is not counted; at most "
            f"{ROWS} run at once, vLLM's default. Busy shares are of the time that devices compute, not of what they "
            "wait for. Figure 1c does not give its batch: 105 rows are where figure 5 has the share it gives for TP1."
        ),
        remarks=remarks,
    )


# --- LoongServe ------------------------------------------------------------------------------------------------------

A800 = {"inside": "nvlink-a800", "between": "infiniband-4x200"}
RECORDS, RUN = "sharegpt.csv", "the recorded requests of ShareGPT, vLLM 0.3.0 on 8 A800"
NOTEBOOK = "LoongServe (SOSP 2024), profile printed in the evaluation notebook of its artifact"
ONE = ((10, 18.58, 11.38), (1000, 68.89, 13.01))  # tokens; ms of a prefill and of a decode step, TP1, batch 1
BATCHES = (  # batch, tokens of each; ms: prefill TP8, decode TP8, decode of 4 instances of TP2, masters of that
    (512, 1000, 7757.4, 38.87, 42.25, 4),
    (128, 5000, 10157.0, 37.76, 41.37, 2),
    (64, 10000, 10791.9, 36.38, 40.14, 2),
    (16, 50000, 19506.5, 42.93, 45.89, 1),
    (4, 100000, 13546.3, 26.36, 28.91, 1),
    (1, 500000, 51135.5, 37.58, 37.79, 1),
)
TP2 = ((100, 21.6), (1000, 49.0), (10_000, 394.0), (100_000, 10.9e3), (500_000, 212e3))  # tokens; ms of a prefill
SLOTS = ((1, 110e3), (4, 500e3), (8, 900e3))


def loongserve() -> Study:
    size = read_size("LWM-7B", BLOCK, "float16")

    def prefill(degree: int, batch: int, tokens: int) -> Callable[[Chip], float]:
        def ms(device: Chip) -> float:
            cost = _cost(device, degree, size)
            return 1e3 * (batch * (cost.prefill(tokens) - cost.prefill(0)) + cost.prefill(0))

        return ms

    def decode(degree: int, batch: int, tokens: int) -> Callable[[Chip], float]:
        return lambda device: 1e3 * _cost(device, degree, size).decode_step(batch, batch * tokens)

    def spread(batch: int, tokens: int, masters: int) -> Callable[[Chip], float]:
        def ms(device: Chip) -> float:
            cost, each = _cost(device, 2, size), batch * tokens / 4
            return 1e3 * cost.decode_step(batch / masters, each, 3 * [cost.answer(batch, each)])

        return ms

    def slots(degree: int) -> Callable[[Chip], float]:
        return lambda device: _node(device, degree).kv_bytes(size) * BLOCK / size.shape.block_bytes

    settings = "LoongServe (SOSP 2024), start scripts of its artifact"
    scaled = "LoongServe (SOSP 2024), figure 2, ratios to the TP1 points of the notebook, and a 1/degree law"
    points = []
    for n, first, step in ONE:
        points.append(Point(f"prefill TP1, 1 x {n}", "ms", first, prefill(1, 1, n), NOTEBOOK, "prefill"))
        points.append(Point(f"decode TP1, 1 x {n}", "ms", step, decode(1, 1, n), NOTEBOOK, "decode"))
    for b, n, first, step, _, _ in BATCHES:
        points.append(Point(f"prefill TP8, {b} x {n}", "ms", first, prefill(8, b, n), NOTEBOOK, "prefill"))
        points.append(Point(f"decode TP8, {b} x {n}", "ms", step, decode(8, b, n), NOTEBOOK, "decode"))
    points.append(Point("slots TP2", "tokens", 210e3, slots(2), settings, "memory"))
    points += [Point(f"prefill TP2, 1 x {n}", "ms", ms, prefill(2, 1, n), scaled) for n, ms in TP2]
    for b, n, _, _, step, m in BATCHES:
        points.append(Point(f"decode SP4TP2, {b} x {n}, {m} masters", "ms", step, spread(b, n, m), NOTEBOOK))
    points += [Point(f"slots TP{d}", "tokens", n, slots(d), settings) for d, n in SLOTS]
    return Study(
        device="A800",
        model="LWM-7B",
        links=A800,
        taken={},
        groups={
            "prefill": ("prompt_seconds", "flops_share", "prompt_attention_share"),
            "decode": ("layer_seconds", "attention_share"),
            "memory": ("memory_share",),
        },
        points=points,
        assumed=(
            "Of a batch the fixed part of a prefill is paid once. Over four instances K/V lies in equal parts and the "
            "masters share the rows equally."
        ),
        remarks=lambda device: (
            "Fitted to runs without sequence parallelism; all with it, and all of TP2 but its slots, are predictions."
        ),
    )


# --- vLLM, as LoongServe measured it ---------------------------------------------------------------------------------

BINS, LONG_ENOUGH = 5, 50  # of records by prompt; tokens of output from which the time of each is told
RATE = 1.0  # requests a second of the recorded run
FULL = 256  # rows at once


def vllm() -> Study:
    size = read_size("LWM-7B", BLOCK, "float16")
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(data(RECORDS).splitlines())]
    rows.sort(key=lambda row: row["prompt_len"])
    prompt, output, latency = (fmean(row[name] for row in rows) for name in ("prompt_len", "output_len", "latency_s"))
    running, held = RATE * latency, prompt + output / 2

    def step(device: Chip, batch: float) -> float:
        return _cost(device, 8, size).decode_step(batch, batch * held)

    def first(tokens: float) -> Callable[[Chip], float]:
        return lambda device: 1e3 * (step(device, running) / 2 + _cost(device, 8, size).prefill(tokens))

    def each(device: Chip) -> float:
        return 1e3 * step(device, running) / (1 - RATE * _cost(device, 8, size).prefill(prompt))

    def most(device: Chip) -> float:
        return 1 / (_cost(device, 8, size).prefill(prompt) + output * step(device, FULL) / FULL)

    points = []
    for at in range(0, len(rows), len(rows) // BINS):
        part = rows[at : at + len(rows) // BINS]
        tokens, ttft = (median(row[name] for row in part) for name in ("prompt_len", "ttft_s"))
        what = f"first token after {tokens:g}"
        points.append(Point(what, "ms", _short(1e3 * ttft), first(tokens), f"median of {len(part)}; {RUN}", "run"))
    tpot = median(row["tpot_s"] for row in rows if row["output_len"] >= LONG_ENOUGH)
    points.append(Point("each further token", "ms", _short(1e3 * tpot), each, f"median; {RUN}", "run"))
    points.append(Point("largest rate, ShareGPT", "requests/s", 6.351, most, "LoongServe (SOSP 2024), figure 10"))
    engine = calibrated("loongserve")["fitted"]
    taken = {name: engine[name] for name in ("attention_share", "prompt_attention_share", "memory_share")}
    return Study(
        device="A800",
        model="LWM-7B",
        links=A800,
        taken=taken | {"row_seconds": calibrated("infinite-llm")["fitted"]["row_seconds"]},
        groups={"run": ("prompt_seconds", "flops_share", "layer_seconds")},
        points=points,
        assumed=(
            f"TP8. At {RATE:g} request/s as many run as last that many seconds, {running:.1f}; a prompt waits for half "
            "a step, and decoding waits for prompts. Shares of attention and memory are those of the calibration "
            "loongserve; row_seconds is that of infinite-llm, whose baseline is vLLM too."
        ),
        remarks=lambda device: (
            f"The largest rate is where prompts, one by one, and decoding {FULL} rows at a time take all of the time; "
            "the published one is where the mean latency passes a limit in a run of a quarter of an hour."
        ),
    )


STUDIES: dict[str, Callable[[], Study]] = {"infinite-llm": infinite_llm, "loongserve": loongserve, "vllm": vllm}


def table(found: Mapping[str, Any]) -> str:
    rows = [
        f"| {r['what']} | {r['paper']:g} | {r['ours']:g} {r['unit']} | {r['ratio']} | {r['use']} |"
        for r in found["points"]
    ]
    return "\n".join(["| point | paper | ours | ratio | use |", "| --- | --- | --- | --- | --- |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    for name, study in STUDIES.items():
        found = fit(study())
        (args.out / f"calibration-{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {found['fitted']}\n{table(found)}\n{found['remarks']}\n")


if __name__ == "__main__":
    main()
