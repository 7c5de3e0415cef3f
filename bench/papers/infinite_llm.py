"""Infinite-LLM's figures 1a, 4c and 5, and its throughput against vLLM with many instances and with one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from bench.papers.rows import BUILT, FITTED, PREDICTED, Row, one
from bench.papers.runs import Make, Rate, expected, saturated, throughput
from infinillm.core.cost import Costs, Link
from infinillm.core.ledger import Report, rebuild
from infinillm.core.policy import POLICIES, Policy, isolated
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.policy.proactive import make_room
from infinillm.core.scheduler import Budget
from infinillm.core.types import Layout, Node, Span
from infinillm.sim import worlds
from infinillm.sim.hardware import Cluster, Site, Size, chip, hardware, link, read_size
from infinillm.sim.simulation import Simulation
from infinillm.sim.traffic import Arrival

DEVICE = "A100@infinite-llm"
BLOCK, DTYPE, ROWS, MOVES = 16, "float16", 256, 16
LEND, BEAT = 0.9, 0.5
ALONE_BEAT = 60.0  # where there is nobody to share with
BUDGET = Budget(worlds.WHOLE, ROWS, BLOCK, MOVES)
Say = Callable[[str], None]

# --- figure 1a -------------------------------------------------------------------------------------------------------

PROMPT, OUTPUT = 500, 1000  # a request holds 1,000 tokens on average while it decodes
LAYOUTS = (  # name, cluster, as much of it as is simulated and how often, policy, tokens a second, longest request
    ("DP32TP1", f"4x8x{DEVICE}", f"1x1x{DEVICE}", 32, "whole", 34432.0, 88e3),
    ("DP4TP8", f"4x8x{DEVICE}:tp8", f"1x8x{DEVICE}:tp8", 4, "whole", 6092.0, 850e3),
    ("DP1TP32", f"4x8x{DEVICE}", f"4x8x{DEVICE}", 1, "single", 821.0, 2000e3),
    ("Infinite-LLM", f"4x8x{DEVICE}", f"1x2x{DEVICE}", 16, "proactive", 34432.0, 2000e3),
)


def figure_1a(quick: bool, say: Say) -> Iterator[Row]:
    """Equal requests never borrow, so a part of the cluster tells of all of it."""
    size = read_size("Llama-2-7B", BLOCK, DTYPE)
    for name, _, part, times, policy, paper, _ in LAYOUTS:
        say(f"figure 1a, {name}")
        world = make(policy, part, size)
        rows = 32 if quick else ROWS
        arrivals = [Arrival(0.0, PROMPT, OUTPUT)] * (len(world().workers) * rows * 3)
        found = throughput(world, arrivals, 0.0, 300.0)
        tokens = times * found.tokens * OUTPUT / (PROMPT + OUTPUT)
        yield Row("requests of 1K tokens", name, "tokens/s", one(paper), tokens, FITTED if times == 32 else PREDICTED)
    for name, place, _, times, policy, _, longest in LAYOUTS:
        world = make(policy, place, size)()
        tokens = world.policy.capacity(world.ledger, BLOCK)
        yield Row("longest request", name, "tokens", one(longest), tokens, FITTED if times == 32 else PREDICTED)


def make(policy: str | Policy, place: str, size: Size) -> Make:
    beat = ALONE_BEAT if policy == "single" else BEAT
    return lambda: worlds.world(policy, place, size, BUDGET, lend_fraction=LEND, beat_seconds=beat)


# --- figure 4c -------------------------------------------------------------------------------------------------------

SHIPPED = (  # tokens of context; ms to ship the query, and the K/V
    (8192, 0.075, 0.581),
    (16384, 0.081, 1.080),
    (32768, 0.12, 1.98),
    (65536, 0.21, 3.77),
    (131072, 0.36, 7.48),
)


def figure_4c() -> Iterator[Row]:
    """One layer of Llama-2-13B. K/V: half of it has to come. The query: a part of the context lies on each device."""
    size, device = read_size("Llama-2-13B", BLOCK, DTYPE), chip(DEVICE)
    way = link(device.inside)
    token_bytes = size.shape.block_bytes / size.shape.block_size / size.shape.layers

    def query(tokens: float) -> float:
        reading = tokens * token_bytes / (device.attention_share * device.bandwidth)
        asking = way.latency + size.shape.question_bytes / way.bandwidth
        return 1e3 * (asking + device.attention_seconds + reading + device.merge_seconds)

    for tokens, _, kv in SHIPPED:
        ours = 1e3 * (way.latency + tokens / 2 * token_bytes / way.bandwidth)
        yield Row("ship the K/V", f"{tokens:,}", "ms", one(kv), ours, FITTED, "half of it is away")
    for devices in (2, 4):
        for tokens, paper, _ in SHIPPED:
            group = f"ship the query, {devices} devices"
            yield Row(group, f"{tokens:,}", "ms", one(paper), query(tokens / devices), PREDICTED)


# --- figure 5 --------------------------------------------------------------------------------------------------------

SHORT, BLOCKS = 4, 2700  # blocks of a short request, and of an instance: the paper gives batches, not memory
ORIGINAL = {"A": 1, "B": 443, "C": 454, "D": 103}
WAITING = {"A": 130, "B": 0, "C": 0, "D": 53}
AFTER = {"A": 131, "B": 443, "C": 454, "D": 156}
SUMS = {"original": 1.47, "passive": 1.31, "proactive": 1.85}
PASSIVE = {"A": 1, "B": 443, "C": 454, "D": 45}


def figure_5() -> Iterator[Row]:
    """The plan of policy proactive for the four instances, by the costs of the calibration."""
    size = read_size("Llama-2-7B", BLOCK, DTYPE)
    node = hardware(DEVICE, 1, 8)
    cost = node.cost(size, node.near)
    books = rebuild(1, [_instance(name) for name in ORIGINAL])
    found = make_room(books, Costs(cost), BLOCK)
    moved = {name: sum(o.blocks for o in found if isinstance(o, MoveBlocks) and o.home == name) for name in ORIGINAL}
    after = {name: ORIGINAL[name] + moved[name] // SHORT for name in ORIGINAL}
    for name, batch in AFTER.items():
        use = PREDICTED if name in ("A", "D") else BUILT
        yield Row("batch, proactive", name, "requests", one(batch), after[name], use)
    for state, batches in (("original", ORIGINAL), ("passive", PASSIVE), ("proactive", after)):
        ours = sum(_busy(batch) for batch in batches.values())
        note = "" if state == "proactive" else "batches are the paper's"
        yield Row("busy devices, in sum", state, "of 4", one(SUMS[state]), ours, PREDICTED, note)


def _instance(name: str) -> Report:
    """Short requests, and in A and D a long one in all the rest; as many more short ones wait as the paper lets in."""
    shorts = ORIGINAL[name] - (name in "AD")
    layouts: dict[str, Layout] = {f"{name}-{n}": (Span(name, 0, SHORT * BLOCK),) for n in range(shorts)}
    if name in "AD":
        layouts[f"{name}-long"] = (Span(name, 0, (BLOCKS - shorts * SHORT) * BLOCK),)
    used, waiting = BLOCKS if name in "AD" else shorts * SHORT, WAITING[name]
    node = Node(name, "1", f"{name}:1", BLOCKS, BLOCKS * 9 // 10, used, running=len(layouts), waiting=waiting)
    return Report(replace(node, wanted=SHORT * waiting), (), layouts)


def _busy(batch: int) -> float:
    """The share of a device's flops that its matrices reach, as the calibration has it."""
    size, node = read_size("Llama-2-7B", BLOCK, DTYPE), hardware(DEVICE, 1, 8)
    cost = replace(node, chip=replace(node.chip, row_seconds=0.0)).cost(size, node.near)
    parameters = size.shape.layers * size.dense.layer_parameters + size.dense.head_parameters
    return batch * 2 * parameters / (cost.dense(batch) * node.chip.flops)


# --- throughput ------------------------------------------------------------------------------------------------------

MODELS = {"Llama-2-7B": 1, "Llama-2-13B": 2, "Llama-2-70B": 8}  # tensor parallel degree of an instance
SHORTS, LONGS = ("t0", "t1", "t2"), ("t3", "t4", "t5", "t6", "t7", "t8")
FEWER, INSIDE = ("t3",), ("t3", "t4")  # of larger models, and on one server
AGAINST_MANY, AGAINST_ONE = (1.35, 1.73), (1.4, 3.4)
EACH = 40  # requests an instance
LONG = {"t3": 0.05, "t4": 0.05, "t5": 0.04, "t6": 0.03, "t7": 0.02, "t8": 0.015}  # of a trace, as workloads.json has it
LONG_COUNT, QUICK = 20, 60  # long requests of a run on average; requests of a quick one


class Cell(NamedTuple):
    """One run of one system under one trace."""

    model: str
    instances: int
    system: str
    trace: str
    run: Rate


IN_TURN = replace(POLICIES["isolated"], route=isolated.in_turn)
MANY, TURNS = "vLLM-multiple", "vLLM-multiple in turn"
ONE, IMPLIED = "vLLM-single", "vLLM-single by a quicker link"
POOLED, PROACTIVE = "pooled", "proactive"
SERVER = " on one server"
COMPARED = (  # ours, a baseline, its instances where they are not as many, and the paper's gain
    (PROACTIVE, MANY, 0, AGAINST_MANY),
    (PROACTIVE, TURNS, 0, AGAINST_MANY),
    (POOLED, MANY, 0, None),
    (PROACTIVE, ONE, 1, AGAINST_ONE),
    (PROACTIVE, IMPLIED, 1, AGAINST_ONE),
    (PROACTIVE + SERVER, ONE + SERVER, 1, None),
)


def against_many(quick: bool, say: Say) -> Iterator[Cell]:
    """Traces 0 to 2, which every instance can hold: the whole cluster, then less of it."""
    systems = {MANY: "whole", TURNS: IN_TURN, POOLED: "pooled", PROACTIVE: "proactive"}
    for model, degree in list(MODELS.items())[: 1 if quick else None]:
        size = read_size(model, BLOCK, DTYPE)
        for trace in SHORTS[: 1 if quick else None]:
            for system, policy in systems.items():
                yield from swept(model, system, trace, make(policy, f"4x8x{DEVICE}:tp{degree}", size), quick, say)
    size = read_size("Llama-2-7B", BLOCK, DTYPE)
    for place in () if quick else ("1x4", "1x8", "2x8"):
        for trace in SHORTS:
            for system in (MANY, TURNS, PROACTIVE):
                yield from swept(
                    "Llama-2-7B", system, trace, make(systems[system], f"{place}x{DEVICE}", size), quick, say
                )


def against_one(quick: bool, say: Say) -> Iterator[Cell]:
    """Traces 3 to 7: the whole cluster, and one server, in which no slow link is in the way."""
    for model, degree in list(MODELS.items())[: 1 if quick else None]:
        size = read_size(model, BLOCK, DTYPE)
        for trace in LONGS[:1] if quick else LONGS if degree == 1 else FEWER:
            yield from swept(model, ONE, trace, make("single", f"4x8x{DEVICE}", size), quick, say)
            yield from swept(model, IMPLIED, trace, together(size), quick, say)
            yield from swept(model, PROACTIVE, trace, make("proactive", f"4x8x{DEVICE}:tp{degree}", size), quick, say)
            if degree == 1 and trace in INSIDE and not quick:
                server = make("whole", f"1x8x{DEVICE}:tp8", size)
                yield from swept(model, ONE + SERVER, trace, server, quick, say)
                yield from swept(model, PROACTIVE + SERVER, trace, make("proactive", f"1x8x{DEVICE}", size), quick, say)


def swept(model: str, system: str, trace: str, world: Make, quick: bool, say: Say) -> Iterator[Cell]:
    place = world().cluster
    first = expected(place.sites[0].near, place, trace, ROWS, BLOCK)
    count = requests(trace, len(place.sites), quick)
    for run in saturated(world, trace, count, first, lambda what: say(f"{model}, {system}, {what}")):
        yield Cell(model, len(place.sites), system, trace, run)


def requests(trace: str, instances: int, quick: bool) -> int:
    """So many that the long ones are not a few; of short ones so many an instance."""
    return QUICK if quick else int(LONG_COUNT / LONG[trace]) if trace in LONG else EACH * instances


def together(size: Size) -> Make:
    """All devices as one instance, over the slowest link between servers with which DP1TP32 reaches figure 1a."""
    quick = replace(hardware(DEVICE, 32, 8), between=Link("implied", link("ethernet-1g").latency, implied()))
    cost = quick.cost(size, quick.near)
    blocks = int(quick.kv_bytes(size) // size.shape.block_bytes)
    place = Cluster((Site("n0", 0, blocks, cost, cost),), quick.near, quick.far)
    alone = POLICIES["isolated"]
    return lambda: Simulation(place, alone, BUDGET, lend_fraction=LEND, beat_seconds=ALONE_BEAT)


def implied() -> float:
    """Bytes a second, by halving: what figure 1a says of DP1TP32 is a figure of a baseline, so it may be fitted to."""
    size = read_size("Llama-2-7B", BLOCK, DTYPE)
    rows, length, paper = ROWS, 1000, LAYOUTS[2][5]
    low, high = 1e8, 1e12
    for _ in range(60):
        middle = (low * high) ** 0.5
        node = replace(hardware(DEVICE, 32, 8), between=Link("implied", link("ethernet-1g").latency, middle))
        found = rows / node.cost(size, node.near).decode_step(rows, rows * length)
        low, high = (middle, high) if found < paper else (low, middle)
    return high


def best(found: list[Cell]) -> dict[tuple[str, int, str, str], Rate]:
    """Of each system under each trace the run that computed most."""
    tops: dict[tuple[str, int, str, str], Rate] = {}
    for each in found:
        key = each.model, each.instances, each.system, each.trace
        if key not in tops or each.run.tokens > tops[key].tokens:
            tops[key] = each.run
    return tops


def gains(found: list[Cell]) -> Iterator[Row]:
    """Throughput of the pool over that of the baselines; the paper tells of the whole cluster, of no trace alone."""
    tops = best(found)
    for (model, instances, system, trace), run in tops.items():
        for theirs, baseline, here, paper in COMPARED:
            other = tops.get((model, here or instances, baseline, trace))
            if system != theirs or other is None:
                continue
            said = paper if instances == 32 // MODELS[model] else None
            refused = f"{run.refused} of {run.served + run.refused} refused" if run.refused else ""
            what = f"{model}, {trace}" + ("" if said else f", {instances} instances")
            yield Row(f"{system} over {baseline}", what, "times", said, run.tokens / other.tokens, PREDICTED, refused)
