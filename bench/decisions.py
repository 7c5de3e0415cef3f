"""How long decisions take: the ledger and the policies over 1,000 nodes, a step's schedule and plan over 512 sequences.

    OMP_NUM_THREADS=1 python bench/decisions.py [--repeats 300] [--out bench/results/decisions.json]
    OMP_NUM_THREADS=1 python bench/decisions.py --nodes 4,16,64,256,1024,4096 --out bench/results/decisions-growth.json

Milliseconds of the processor per call, median and 99th percentile; the aim is 3 ms each. The ledger has 1,000 nodes of
4,000 blocks, 2,000 loans and 64,000 sequences; the pass has 512 running sequences of 8,192 tokens, a quarter of them
spread over three nodes. `plan proactive` is also timed where nodes are short of memory: it grows with what it orders,
up to a bound, and is made every few heartbeats. `check` is no decision: it is the laws over everything.

With `--nodes` only what policies decide is timed, on clusters of so many nodes with 64 sequences each, 100,000 at most.
Of ten nodes one is short of memory where `proactive` makes room. `elastic` has four instances to a batch that decodes,
every fifth instance idle, and a prompt waiting for every eighth, 100 at most. `auto` chooses one of the cells of a
large cluster, and plans one like this, with 100 prompts waiting. What takes more than 50 milliseconds is not asked
again in a larger cluster.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from infinillm.core.cells import Load, choose, split
from infinillm.core.cost import Costs, Dense, Device, Link, roofline
from infinillm.core.elastic.plan import plan as elastic
from infinillm.core.elastic.times import DecodeTime, PrefillTime, Times
from infinillm.core.elastic.values import Batch, Instance, Running, State, Waiting
from infinillm.core.layout import grown, plan
from infinillm.core.ledger import (
    Joined,
    Lent,
    Placed,
    Report,
    Reported,
    apply,
    apply_all,
    changes,
    check,
    expecting,
    rebuild,
)
from infinillm.core.planners import AUTO
from infinillm.core.policy import POLICIES
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.scheduler import Budget, Here, Match, schedule
from infinillm.core.types import AttentionShape, Ledger, Loan, Node, Span

NODES, LOANS, SEQUENCES_EACH = 1000, 2000, 64
BLOCK, LENGTH, RUNNING = 16, 8192, 512
AIM_MS = 3.0

SHAPE = AttentionShape(32, 8, 128, BLOCK, "bfloat16", 128**-0.5, (0,) * 32)
DEVICE = Device("H100", 3.35e12, 989e12, 0.80, 0.85, 0.60, 12e-6, 10e-6, 3e-6)
LINK = Link("400G RoCE, NCCL", 67e-6, 0.71 * 50e9)
COSTS = Costs(roofline(DEVICE, LINK, Dense(218_103_808, 525_336_576, 2), SHAPE))
SHORT = (10, 100, 500)  # nodes whose queue does not fit, of the 1,000


def books(rng: random.Random, nodes: int, each: int) -> list[Report]:
    """What nodes know of themselves: half of them short of blocks, each with loans to two others."""
    reports = []
    for i in range(nodes):
        name = f"worker-{i}"
        lent = tuple(
            Loan(f"{name}>worker-{(i + k) % nodes}", name, f"worker-{(i + k) % nodes}", rng.randrange(1, 200), 1e9)
            for k in range(1, 1 + LOANS // NODES)
        )
        node = Node(
            name,
            "1",
            f"10.0.{i // 250}.{i % 250}:7001",
            blocks=4000,
            lendable=3600,
            used=rng.randrange(0, 3600),
            running=rng.randrange(0, 64),
        )
        layouts = {
            f"{name}-{s}": (Span(name, 0, 4096), Span(f"worker-{(i + 1) % nodes}", 4096, 5000)) for s in range(each)
        }
        reports.append(Report(node, lent, layouts))
    return reports


def crowded(short: int, nodes: int, each: int) -> Ledger:
    """Nodes that lend nothing yet: `short` are full of one long request and others, and 64 more wait."""
    rng = random.Random(0)
    reports = []
    for i in range(nodes):
        name = f"worker-{i}"
        full = i % (nodes // short) == 0
        layouts = {f"{name}-{s}": (Span(name, 0, 256),) for s in range(1, each)}
        if full:
            layouts[f"{name}-long"] = (Span(name, 0, 4000 * BLOCK - (each - 1) * 256),)
        used = 4000 if full else rng.randrange(1008, 3600)
        waiting = 64 if full else 0
        node = Node(name, "1", f"{name}:7001", 4000, 3600, used, running=len(layouts), waiting=waiting)
        reports.append(Report(replace(node, wanted=16 * waiting), (), layouts))
    return rebuild(1, reports)


def running_sequences() -> tuple[list[Sequence], dict[str, int]]:
    """512 sequences in decode, each needing one more token; and the room on four nodes."""
    sequences = []
    for i in range(RUNNING):
        request = Request(f"s{i}", tuple(range(LENGTH)), Sampling(max_tokens=512), arrival=float(i))
        sequence = Sequence(request, [*request.prompt, 7], state="running", done=((0, LENGTH),))
        third = LENGTH // 3 // BLOCK * BLOCK
        stops = [third, 2 * third, LENGTH + (BLOCK if i % 2 else 0)]
        spans = [Span(node, a, b) for node, a, b in zip(("home", "b", "c"), [0, *stops], stops, strict=False)]
        sequence.layout = tuple(spans) if i % 4 == 0 else (Span("home", 0, stops[-1]),)
        sequences.append(sequence)
    return sequences, {"home": 100, "b": 500, "c": 500, "d": 500}


def measure(call: Callable[[], object], repeats: int) -> dict[str, float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    times.sort()
    return {"median_ms": round(statistics.median(times), 4), "p99_ms": round(times[int(len(times) * 0.99)], 4)}


def decisions(ledger: Ledger, reports: list[Report]) -> dict[str, Callable[[], object]]:
    node = ledger.nodes["worker-500"]
    loan = ledger.loans["worker-500>worker-501"]
    report = reports[500]
    later = Report(
        replace(report.node, used=1234, running=7),
        (replace(report.lent[0], until=2e9), report.lent[1]),
        {name: (*layout[:-1], replace(layout[-1], stop=5001)) for name, layout in report.layouts.items()},
    )
    beat = changes(report, later)
    promised = {f"worker-{i}": (20, 1) for i in range(64)}
    calls: dict[str, Callable[[], object]] = {
        "apply Reported": lambda: apply(ledger, Reported(replace(node, used=7))),
        "apply Lent": lambda: apply(ledger, Lent(replace(loan, blocks=77))),
        "apply Placed": lambda: apply(ledger, Placed("worker-500", "worker-500-3", (Span("worker-500", 0, 16),))),
        "apply Joined": lambda: apply(ledger, Joined(report)),
        f"apply a beat of {len(beat)} events": lambda: apply_all(ledger, beat),
        "changes of a beat": lambda: changes(report, later),
        "check": lambda: check(ledger),
    }
    for policy in POLICIES.values():
        calls |= {
            f"route {policy.name}": lambda p=policy: p.route(expecting(ledger, promised), 4000, 5000, BLOCK, ()),
            f"capacity {policy.name}": lambda p=policy: p.capacity(ledger, BLOCK),
            f"creditors {policy.name}": lambda p=policy: p.creditors(ledger, "worker-500", 8000, (), False),
            f"plan {policy.name}": lambda p=policy: p.plan(ledger, COSTS, BLOCK),
        }
    proactive = POLICIES["proactive"]
    for short in SHORT:
        books = crowded(short, NODES, SEQUENCES_EACH)
        count = len(proactive.plan(books, COSTS, BLOCK))
        calls[f"plan proactive, {short} short, {count} orders"] = lambda b=books: proactive.plan(b, COSTS, BLOCK)
    sequences, room = running_sequences()
    budget = Budget(tokens=2048, sequences=RUNNING, block_size=BLOCK)
    here = Here(own=sum(room.values()), kept=0, saved=(), denied=float("-inf"), cost=None)
    step = schedule(1, sequences, [], room, budget, here, lambda _: Match())
    assert len(step.chunks) == RUNNING
    assert step.grow
    layouts = {s.id: grown(s.layout, [g for g in step.grow if g.seq == s.id], BLOCK) for s in sequences}
    return calls | {
        f"schedule {RUNNING} running": lambda: schedule(2, sequences, [], room, budget, here, lambda _: Match()),
        f"plan of a step, {RUNNING} running": lambda: plan(step, layouts, BLOCK),
    }


# --- as the cluster grows --------------------------------------------------------------------------------------------

MOST_SEQUENCES = 100_000
MOST_WAITING = 100  # requests
LONGEST_SECONDS, SPENT_SECONDS, MOST_TIMES = 0.05, 0.3, 100  # of one call; on all calls of one decision, and how many
SLOTS = 210_000  # of an instance
TIMES = Times(  # two A800 to an instance, as LoongServe measured them (docs/papers)
    tuple(PrefillTime(0.0123 + 0.0063 * d, 2.96e-5 / d * (1 + 0.34 * (d - 1) / 3), 7.9e-10 / d) for d in range(1, 5)),
    DecodeTime(0.0142, 1.43e-5, 4.0e-8, 4),
    move=6.6e-7,
    tipping=5.0,
    crowd=128,
)


def policies(nodes: int) -> dict[str, Callable[[], object]]:
    """What every policy decides, on a cluster of so many nodes."""
    each = min(SEQUENCES_EACH, MOST_SEQUENCES // nodes)
    ledger = rebuild(1, books(random.Random(0), nodes, each))
    tight = crowded(max(nodes // 10, 1), nodes, each)
    some = f"worker-{nodes // 2}"
    calls: dict[str, Callable[[], object]] = {}
    for policy in POLICIES.values():
        calls |= {
            f"route {policy.name}": lambda p=policy: p.route(ledger, 4000, 5000, BLOCK, ()),
            f"creditors {policy.name}": lambda p=policy: p.creditors(ledger, some, 8000, (), False),
            f"plan {policy.name}": lambda p=policy: p.plan(tight, COSTS, BLOCK),
        }
    state = elastic_state(random.Random(0), nodes, each, min(max(nodes // 8, 1), MOST_WAITING))
    cells = split(nodes, 8, AUTO.cell)
    loads = [Load(SLOTS * len(cell), float(at), 0) for at, cell in enumerate(cells)]
    crowd = elastic_state(random.Random(0), len(cells[0]), each, MOST_WAITING)
    return calls | {
        "plan elastic": lambda: elastic(state, TIMES),
        "plan auto": lambda: (choose(5000, loads), AUTO.plan(crowd, TIMES)),
    }


def elastic_state(rng: random.Random, nodes: int, each: int, waiting: int) -> State:
    """Instances by eight in a place; batches lie on four of each five that follow each other."""
    names = [f"worker-{i}" for i in range(nodes)]
    busy = [names[at : at + 4] for at in range(0, nodes - nodes // 5, 5)] or [names]
    batches, used = [], dict.fromkeys(names, 0)
    for group in busy:
        tokens = SLOTS * 6 // 10 // each
        running = []
        for number in range(each * len(group)):
            held = {group[number % len(group)]: tokens}
            used[group[number % len(group)]] += tokens
            more = rng.randrange(1, 500)
            running.append(
                Running(f"{group[0]}-{number}", float(number), held, 500 - more + 1, more, 10 * rng.random())
            )
        batches.append(Batch(tuple(running)))
    queue = [
        Waiting(f"w{number}", int(rng.lognormvariate(7.5, 1.5)) + 1, 1e6 + number, 200) for number in range(waiting)
    ]
    instances = [Instance(name, SLOTS, used[name], str(at // 8)) for at, name in enumerate(names)]
    return State(tuple(instances), tuple(queue), tuple(batches), 10.0)


def as_it_grows(sizes: list[int], say: Callable[[str], None]) -> dict[str, dict[str, dict[str, float]]]:
    """By decision and number of nodes: milliseconds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    slow: set[str] = set()
    for nodes in sizes:
        calls = policies(nodes)
        gc.collect()
        gc.freeze()
        for name in [name for name in calls if name not in slow]:
            start = time.process_time()
            calls[name]()
            once = time.process_time() - start
            times = min(max(int(SPENT_SECONDS / once), 1), MOST_TIMES)
            found.setdefault(name, {})[str(nodes)] = row = measure(calls[name], times)
            say(f"{nodes:5,} nodes  {name:24s} {row['median_ms']:9.3f} ms   p99 {row['p99_ms']:9.3f} ms")
            if once > LONGEST_SECONDS:
                slow.add(name)
        gc.unfreeze()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=300)
    options.add_argument("--nodes", type=lambda text: [int(each) for each in text.split(",")], help="cluster sizes")
    options.add_argument("--out", type=Path, default=None)
    chosen = options.parse_args()
    if chosen.nodes:
        grown_to = as_it_grows(chosen.nodes, lambda line: print(line, flush=True))
        if chosen.out:
            sizes = ",".join(map(str, chosen.nodes))
            command = f"OMP_NUM_THREADS=1 python bench/decisions.py --nodes {sizes} --out {chosen.out}"
            write(chosen.out, {"command": command, "sequences": MOST_SEQUENCES, "decisions": grown_to})
        return
    reports = books(random.Random(0), NODES, SEQUENCES_EACH)
    ledger = rebuild(1, reports)
    check(ledger)
    gc.freeze()
    rows = {}
    for name, call in decisions(ledger, reports).items():
        rows[name] = measure(call, chosen.repeats)
        print(f"{name:42s} {rows[name]['median_ms']:8.3f} ms   p99 {rows[name]['p99_ms']:8.3f} ms", flush=True)
    if chosen.out:
        about = {
            "command": f"OMP_NUM_THREADS=1 python bench/decisions.py --repeats {chosen.repeats} --out {chosen.out}",
            "nodes": NODES,
            "loans": LOANS,
            "sequences": NODES * SEQUENCES_EACH,
            "aim_ms": AIM_MS,
            "decisions": rows,
        }
        write(chosen.out, about)


def write(path: Path, about: dict[str, object]) -> None:
    machine = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(machine | about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
