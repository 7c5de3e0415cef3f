"""Traffic as streams of arrivals: drawn from recorded or assumed lengths, or read from a file.

A workload is named `LENGTHS` or `LENGTHS+ARRIVALS`, such as `t3` or `sharegpt+bursty`, after data/workloads.json, which
has every number with its source; arrivals are Poisson where none are named. Or it is the path of a CSV or JSONL file.

Streams are lazy: one arrival is in memory at a time (of sessions, those that go on). Times and lengths have generators
of random numbers of their own, so equal seeds give equal streams, and equal lengths at every rate. Where `count` is
given, the last of `count` arrivals comes at count / rate, as when recorded times are scaled to a rate: gaps of equal
Gamma distribution, divided by their sum, are one Beta share after another of what is left. The arrivals of phases and
of sessions only have that rate on average, and those of swings over all phases; what these bring depends on when.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeAlias

from infinillm.errors import BadRequest
from infinillm.sim.hardware import data


class Arrival(NamedTuple):
    """One request, in tokens, at `at` seconds from the start.

    `session` and `turn` say whose it is. Its first `shared` tokens are those of the session's last request and answer.
    """

    at: float
    prompt: int
    output: int
    session: str = ""
    turn: int = 0
    shared: int = 0


Pair: TypeAlias = tuple[int, int]  # tokens of a prompt and of its output
Draw: TypeAlias = Callable[[Random], Pair]
Row: TypeAlias = tuple[str, Mapping[str, Any]]  # where in a file, and its fields


def workload(name: str, *, rate: float, seed: int, count: int | None) -> Iterator[Arrival]:
    """The first `count` arrivals (None: all, for ever) of a workload, in order of time, `rate` a second.

    Of a file, a rate of 0 keeps the recorded times. Raises BadRequest, for a file also while it is read.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise BadRequest(f"rate must be requests a second, not {rate!r}", field="rate")
    if count is not None and count < 1:
        raise BadRequest(f"count must be 1 or more, not {count}", field="count")
    if (path := Path(name)).suffix in READERS:
        return _recorded(path, rate, count)
    if not rate:
        raise BadRequest("rate must be above 0 for arrivals that are drawn", field="rate")
    table = json.loads(data("workloads.json"))
    lengths, _, arrivals = name.partition("+")
    kind = table["arrivals"].get(arrivals or "poisson")
    if kind is None or lengths not in table["lengths"] | table["swings"] | table["sessions"]:
        sets = (*table["lengths"], *table["swings"], *table["sessions"])
        known = [*sets, *(f"...+{each}" for each in table["arrivals"])]
        message = f"there is no workload {name!r}; there are: {', '.join(known)}, and files (.csv, .jsonl)"
        raise BadRequest(message, field="trace")
    times, numbers = Random(f"{seed} times"), Random(f"{seed} lengths")
    if lengths in table["sessions"]:
        spec = table["sessions"][lengths]
        starts = _times(kind, rate / spec["turns"], times, None)
        return islice(_sessions(spec, _draw(spec["first"], table), starts, numbers), count)
    moments = islice(_times(kind, rate, times, count), count)
    if lengths in table["swings"]:
        return _swinging(table["swings"][lengths]["phases"], table, moments, numbers)
    draw = _draw(lengths, table)
    return (Arrival(at, *draw(numbers)) for at in moments)


def names() -> dict[str, str]:
    """Every set of lengths there is, and where it is from."""
    table = json.loads(data("workloads.json"))
    return {name: each["source"] for name, each in (table["lengths"] | table["swings"] | table["sessions"]).items()}


# --- when ------------------------------------------------------------------------------------------------------------


def _times(kind: Mapping[str, Any], rate: float, rng: Random, count: int | None) -> Iterator[float]:
    if kind["kind"] == "phases":
        return _phases(rate, kind["on"], kind["off"], rng)
    shape = 1.0 if kind["kind"] == "poisson" else kind["cv"] ** -2
    return _gaps(rate, shape, rng) if count is None else _pinned(rate, shape, rng, count)


def _gaps(rate: float, shape: float, rng: Random) -> Iterator[float]:
    """Gaps of a Gamma distribution; those of shape 1 are exponential, and the arrivals Poisson."""
    at = 0.0
    while True:
        at += rng.gammavariate(shape, 1 / (shape * rate))
        yield at


def _pinned(rate: float, shape: float, rng: Random, count: int) -> Iterator[float]:
    """As many such arrivals, the last at count / rate."""
    at, end = 0.0, count / rate
    for left in range(count - 1, 0, -1):
        at += (end - at) * rng.betavariate(shape, shape * left)
        yield at
    yield end


def _phases(rate: float, on: float, off: float, rng: Random) -> Iterator[float]:
    """Poisson arrivals in some phases and none in others, which last `on` and `off` seconds on average."""
    busy, start = rate * (on + off) / on, 0.0
    while True:
        stop = start + rng.expovariate(1 / on)
        at = start + rng.expovariate(busy)
        while at < stop:
            yield at
            at += rng.expovariate(busy)
        start = stop + rng.expovariate(1 / off)


# --- how long --------------------------------------------------------------------------------------------------------


def _draw(name: str, table: Mapping[str, Any]) -> Draw:
    """What draws a prompt and an output of one set."""
    spec = table["lengths"][name]
    match spec["kind"]:
        case "records":
            records = _records(spec["file"])
            return lambda rng: rng.choice(records)
        case "mixture":
            return _mixed(spec["of"], table)
        case "zipf":
            return _zipf(spec, _records(table["lengths"][spec["short"]]["file"]), _draw(spec["long"], table))
        case "trace":
            answers, lengths = _draw(table["traces"]["outputs"], table), _trace(spec, table)
            return lambda rng: _parted(lengths(rng), answers(rng)[1])
        case _:
            prompts, outputs = _spread(spec), _spread(spec["outputs"])
            return lambda rng: (prompts(rng), outputs(rng))


def _mixed(of: Mapping[str, float], table: Mapping[str, Any]) -> Draw:
    """One of these sets, by its share, and from that."""
    draws, shares = [_draw(each, table) for each in of], list(accumulate(of.values()))
    return lambda rng: rng.choices(draws, cum_weights=shares)[0](rng)


def _records(file: str) -> list[Pair]:
    return [(int(row["prompt_len"]), int(row["output_len"])) for row in csv.DictReader(data(file).splitlines())]


def _spread(spec: Mapping[str, Any]) -> Callable[[Random], int]:
    """Lengths in a range: log-normal, drawn again where they are outside, or log-uniform where no median is given."""
    low, high = spec["range"]
    if "median" not in spec:
        ends = math.log(low), math.log(high)
        return lambda rng: round(math.exp(rng.uniform(*ends)))
    mu, sigma = math.log(spec["median"]), spec["sigma"]

    def draw(rng: Random) -> int:
        while not low <= (found := round(rng.lognormvariate(mu, sigma))) <= high:
            pass
        return found

    return draw


def _trace(spec: Mapping[str, Any], table: Mapping[str, Any]) -> Callable[[Random], int]:
    """Lengths of a reconstructed trace: one spread, or that of its base with a share of long ones."""
    if "base" not in spec:
        return _spread(spec)
    usual, share = _spread(table["lengths"][spec["base"]]), spec["share"]
    low, high = spec["range"]
    return lambda rng: rng.randint(low, high) if rng.random() < share else usual(rng)


def _parted(length: int, output: int) -> Pair:
    """A prompt and an output, together of that length: the output is at most half of it, and neither is nothing."""
    output = max(min(output, length // 2), 1)
    return max(length - output, 1), output


def _zipf(spec: Mapping[str, Any], records: Sequence[Pair], long: Draw) -> Draw:
    """Lengths n with weight n ** -a: the record of the nearest prompt, or n itself beyond the longest."""
    low, high = spec["range"]
    sums = list(accumulate(n ** -spec["a"] for n in range(low, high + 1)))
    records = sorted(records)

    def draw(rng: Random) -> Pair:
        n = low + bisect_left(sums, rng.random() * sums[-1])
        if n > records[-1][0]:
            return n, long(rng)[1]
        at = bisect_left(records, n, key=itemgetter(0))
        return min(records[max(at - 1, 0) : at + 1], key=lambda record: abs(record[0] - n))

    return draw


# --- swings ----------------------------------------------------------------------------------------------------------


def _swinging(
    phases: Sequence[Mapping[str, Any]], table: Mapping[str, Any], moments: Iterator[float], rng: Random
) -> Iterator[Arrival]:
    """Phases of some seconds each, over and over: each has lengths, and a pace at which even moments pass."""
    draws = [_mixed(phase["of"], table) for phase in phases]
    seconds = [phase["seconds"] for phase in phases]
    usual = sum(phase["seconds"] * phase["rate"] for phase in phases) / sum(seconds)
    paces = [phase["rate"] / usual for phase in phases]
    starts = [0, *accumulate(seconds)]
    passed = [0.0, *accumulate(long * pace for long, pace in zip(seconds, paces, strict=True))]
    for even in moments:
        round_, rest = divmod(even, starts[-1])
        phase = min(bisect_right(passed, rest), len(phases)) - 1
        at = round_ * starts[-1] + starts[phase] + (rest - passed[phase]) / paces[phase]
        yield Arrival(at, *draws[phase](rng))


# --- sessions --------------------------------------------------------------------------------------------------------


def _sessions(spec: Mapping[str, Any], first: Draw, starts: Iterator[float], rng: Random) -> Iterator[Arrival]:
    """Sessions that start at `starts`, their turns among each other; only the next turn of each is known."""
    question, go_on = _spread(spec["question"]), 1 - 1 / spec["turns"]
    ahead: list[tuple[float, int, Arrival]] = []
    for number, start in enumerate(starts):
        while ahead and ahead[0][0] <= start:
            arrival = heapq.heappop(ahead)[2]
            yield arrival
            if (later := _next_turn(arrival, spec, question, first, go_on, rng)) is not None:
                heapq.heappush(ahead, (later.at, number, later))
        heapq.heappush(ahead, (start, number, Arrival(start, *first(rng), session=f"s{number}")))


def _next_turn(
    last: Arrival, spec: Mapping[str, Any], question: Callable[[Random], int], first: Draw, go_on: float, rng: Random
) -> Arrival | None:
    said, output = last.prompt + last.output, first(rng)[1]
    prompt, at = said + question(rng), last.at + rng.expovariate(1 / spec["think"])
    if rng.random() >= go_on or prompt + output > spec["longest"]:
        return None
    return Arrival(at, prompt, output, last.session, last.turn + 1, said)


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, arrivals: Iterable[Arrival]) -> int:
    """Write a JSONL file that `workload` reads, one arrival a line; how many."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for arrival in arrivals:
            fields = arrival._asdict() if arrival.session else dict(zip(Arrival._fields[:3], arrival[:3], strict=True))
            file.write(json.dumps(fields) + "\n")
            written += 1
    return written


def _recorded(path: Path, rate: float, count: int | None) -> Iterator[Arrival]:
    if not path.is_file():
        raise BadRequest(f"there is no file {path}", field="trace")
    arrivals = islice(_read(path), count)
    if not rate:
        return arrivals
    found, end = 0, 0.0
    for arrival in arrivals:
        found, end = found + 1, arrival.at
    if not end:
        raise BadRequest(f"{path} has no arrival after second 0 that could be scaled to a rate", field="rate")
    scale = found / rate / end
    return (arrival._replace(at=arrival.at * scale) for arrival in islice(_read(path), count))


def _read(path: Path) -> Iterator[Arrival]:
    read, renamed = READERS[path.suffix]
    at, prompt, output = (renamed.get(name, name) for name in ("at", "prompt", "output"))
    now = 0.0
    for where, row in read(path):
        for name in (at, prompt, output):
            if row.get(name) in (None, ""):
                raise BadRequest(f"{where}: {name} is missing", field=name)
        now, before = _number(row, at, where), now
        if now < before:
            raise BadRequest(f"{where}: {at} goes back from {before:g} to {now:g}", field=at)
        tokens = _whole(row, prompt, 1, where), _whole(row, output, 1, where)
        if not row.get("session"):
            yield Arrival(now, *tokens)
            continue
        turn, shared = (_whole(row, name, 0, where) if row.get(name) else 0 for name in ("turn", "shared"))
        if shared > tokens[0]:
            raise BadRequest(f"{where}: shared is more than {prompt}", field="shared")
        yield Arrival(now, *tokens, str(row["session"]), turn, shared)


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        for name in CSV_NAMES.values():
            if name not in (reader.fieldnames or ()):
                raise BadRequest(f"line 1 of {path}: there is no column {name}", field=name)
        for row in reader:
            yield f"line {reader.line_num} of {path}", row


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadRequest(f"{where} is no JSON: {error}", field="trace") from None
            if not isinstance(row, dict):
                raise BadRequest(f"{where} must be an object of JSON", field="trace")
            yield where, row


CSV_NAMES = {"at": "arrival_s", "prompt": "prompt_len", "output": "output_len"}
READERS: Mapping[str, tuple[Callable[[Path], Iterator[Row]], Mapping[str, str]]] = {
    ".csv": (_csv_rows, CSV_NAMES),
    ".jsonl": (_json_rows, {}),
}


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    try:
        found = float(row[name])
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise BadRequest(f"{where}: {name} must be seconds, 0 or more, not {row[name]!r}", field=name)
    return found


def _whole(row: Mapping[str, Any], name: str, least: int, where: str) -> int:
    value = row[name]
    try:
        found = int(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise BadRequest(f"{where}: {name} must be a whole number of {least} or more, not {value!r}", field=name)
    return found
