"""The page that `infinillm simulate --report` writes: all figures of a run in one file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from infinillm import __version__, config
from infinillm.console.figures import Bar, Heat, Series, Span, after, bars, heat, lines, spans
from infinillm.console.rows import Row, cells, heads, seconds
from infinillm.sim import hardware, traffic
from infinillm.sim.history import History
from infinillm.sim.statistics import Spread

KINDS = 8  # colours of policies
HALF, THIRD = 560, 370  # wide, of figures side by side
QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
LATENCIES = (
    (
        "first",
        "Time to the first token",
        "From the question to the first token of the answer: waiting, and the prompt.",
    ),
    ("each", "Time per output token", "After the first one."),
    ("latency", "Latency", "From the question to the last token."),
)


def page(settings: config.Simulate, about: str, rows: Sequence[Row]) -> str:
    """The whole page. `about` says in a line what was simulated."""
    title = f"{settings.trace} on {settings.cluster}"
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>",
        _section("In figures", _remarks(rows), _table(rows)),
        *_sections(settings, rows),
        _section("How this was made", "", _made(settings)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · infinillm simulate</title>\n<style>\n{_asset('report.css')}</style>\n</head>\n"
        f'<body>\n<main>\n{"".join(parts)}</main>\n<div id="tip" hidden></div>\n'
        f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("infinillm.console").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def _section(title: str, said: str, inside: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{f'<p>{escape(said)}</p>' if said else ''}\n{inside}\n</section>\n"


def _figure(drawn: str, caption: str = "") -> str:
    return f"<figure>{drawn}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def _kind(rows: Sequence[Row], row: Row) -> str:
    return f"p{rows.index(row) % KINDS}"


# --- sections --------------------------------------------------------------------------------------------------------


def _remarks(rows: Sequence[Row]) -> str:
    return ". ".join(row.remark for row in rows if row.remark)


def _table(rows: Sequence[Row]) -> str:
    names = "".join(f"<th>{escape(head)}</th>" for head in ("policy", *heads(rows)))
    lines = [
        f'<tr><td><span class="key {_kind(rows, row)}"></span>{escape(row.policy)}</td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, rows))
        + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _sections(settings: config.Simulate, rows: Sequence[Row]) -> Iterator[str]:
    played = [(row, row.outcome) for row in rows if row.outcome is not None]
    if any(row.tried for row in rows):
        yield _capacity(settings, rows)
    rates = [
        Bar(_kind(rows, row), row.policy, found.tokens_per_second, f"{found.tokens_per_second:,.0f} tokens/s")
        for row, found in played
    ]
    said = "Tokens of prompts and answers, over the time from the first arrival until all was answered."
    yield _section("Throughput", said, _figure(bars(rates, "Tokens a second by policy")))
    figures = [
        f"<h3>{title}</h3>"
        + _figure(
            spans(
                [Span(_kind(rows, row), row.policy, _quantiles(getattr(found.tally, name))) for row, found in played],
                seconds,
                title,
            ),
            caption,
        )
        for name, title, caption in LATENCIES
    ]
    said = (
        "From the half of requests that waited least (p50) to all but the slowest hundredth (p99), on a scale of tens."
    )
    yield _section("Latency", said, "".join(figures))
    watched = [(row, found.history, found.seconds) for row, found in played if found.history is not None]
    if watched:
        yield _queues(rows, watched)
        right = max(stop for _, _, stop in watched) or 1.0
        for row, history, stop in watched:
            yield _memory(row, history, stop, right)


def _quantiles(spread: Spread) -> list[tuple[str, float]]:
    return [(name, spread.quantile(share)) for name, share in QUANTILES] if spread.count else []


def _capacity(settings: config.Simulate, rows: Sequence[Row]) -> str:
    found = [
        Bar(_kind(rows, row), row.policy, row.outcome.traffic.rate if row.outcome else 0.0, _capacity_said(row))
        for row in rows
    ]
    tried = [
        Series(_kind(rows, row), row.policy, sorted((rate, 100 * share) for rate, share, _ in row.tried))
        for row in rows
    ]
    said = (
        f"The highest rate of requests at which {settings.slo} (seconds) is kept by {settings.slo_share:.4g} of them. "
        "All other figures of this page are of that rate, which is another one for each policy."
    )
    return _section(
        "Capacity",
        said,
        _figure(bars(found, "Requests a second by policy"))
        + "<h3>Every rate tried</h3>"
        + _keys(rows, rows)
        + _figure(
            lines(tried, lambda x: f"{x:.3g}/s", lambda y: f"{y:.3g} %", "Requests that kept the objective by rate"),
            "The share of requests that kept the objective, by rate. A rate that cannot keep it any more is given up.",
        ),
    )


def _capacity_said(row: Row) -> str:
    if row.outcome is None:
        return "at no rate"
    return f"{row.outcome.traffic.rate:.3g} requests/s" + (" or more" if row.most else "")


def _keys(rows: Sequence[Row], shown: Sequence[Row]) -> str:
    found = (f'<span><span class="key {_kind(rows, row)}"></span>{escape(row.policy)}</span>' for row in shown)
    return f'<div class="keys">{"".join(found)}</div>'


def _queues(rows: Sequence[Row], watched: Sequence[tuple[Row, History, float]]) -> str:
    series = [
        Series(_kind(rows, row), row.policy, list(zip(history.times, history.queue(), strict=True)))
        for row, history, _ in watched
    ]
    drawn = lines(series, after, lambda y: f"{y:,.3g}", "Requests that wait, over time")
    said = "Requests that wait for their first step, on all workers together, over the cluster's time."
    return _section("Queues", said, _keys(rows, [row for row, _, _ in watched]) + _figure(drawn))


def _memory(row: Row, history: History, stop: float, right: float) -> str:
    """When which node's memory was in use, and who lent to whom."""
    used, lending = history.memory(lent=False), history.lending()
    shares = [share for each in used for share in each]
    lent = sum(map(sum, lending))

    def over_time(values: list[list[float]], label: str, width: float) -> str:
        percent = [[100 * share for share in each] for each in values]
        return heat(
            Heat(history.names, history.times, percent, 100.0, "% of its blocks", ", ", width, right, stop), label
        )

    said = (
        f"K/V blocks in use: {100 * sum(shares) / max(len(shares), 1):.0f} % on average, "
        f"{100 * max(shares, default=0):.0f} % at most on one row. Nodes from top to bottom, time from left to right."
    )
    ramp = '<p>none <span class="ramp"></span> all blocks in use</p>'
    if not lent:
        drawn = _figure(over_time(used, f"Memory in use under {row.policy}", HALF + THIRD), "Nothing was lent.")
        return _section(f"Memory under {row.policy}", said, ramp + drawn)
    most = max(map(max, lending))
    who = Heat(history.names, history.names, lending, most, "blocks", " lends ", THIRD, 0, 0)
    return _section(
        f"Memory under {row.policy}",
        said,
        f'{ramp}<div class="pair"><div>'
        + _figure(over_time(used, f"Memory in use under {row.policy}", HALF), "In use, by whomever.")
        + "<h3>Lent, and in use by others</h3>"
        + _figure(over_time(history.memory(lent=True), f"Memory lent under {row.policy}", HALF))
        + "</div><div>"
        + _figure(
            heat(who, f"Who lends to whom under {row.policy}"),
            f"Who (left) lends to whom (below): {lent:,.0f} blocks on average in all, {most:,.0f} at most in a square.",
        )
        + "</div></div>",
    )


# --- how it was made -------------------------------------------------------------------------------------------------


def _made(settings: config.Simulate) -> str:
    command = shlex.join(["infinillm", "simulate", *config.arguments(settings)])
    said = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in assumed(settings))
    return f"<pre>{escape(command)}</pre>\n<dl>{said}</dl>"


def assumed(settings: config.Simulate) -> Iterator[tuple[str, str]]:
    """What stands behind the figures, by name."""
    lengths, _, arrivals = settings.trace.partition("+")
    yield "traffic", traffic.names().get(lengths, f"As recorded in {settings.trace}.")
    if lengths in traffic.names():
        yield "arrivals", f"{arrivals or 'poisson'}, {settings.requests:,} requests, seed {settings.seed}."
    if found := hardware.CLUSTER.fullmatch(settings.cluster):
        device, _, calibration = found.group(3).partition("@")
        yield "hardware", str(hardware.named("device", device)["source"])
        if calibration:
            yield "calibration", str(hardware.calibrated(calibration)["assumed"])
    else:
        yield "hardware", f"As in {settings.cluster}."
    yield "model", f"{settings.model} in {settings.dtype}."
    step = f"At most {settings.max_num_batched_tokens:,} tokens of {settings.max_num_seqs:,} requests, in blocks of "
    step += f"{settings.block_size} tokens; {settings.move_tokens_per_step} tokens of K/V move beside it. "
    yield "a step", step + "It takes the seconds that the cost model says; nothing is computed."
    lending = f"A worker lends at most {100 * settings.lend_fraction:.4g} % of its blocks. "
    yield "lending", lending + f"The controller hears from the workers every {settings.heartbeat_seconds:g} s."
    if settings.losses:
        yield "losses", f"Gone from when to when, in seconds: {settings.losses}."
    yield "made by", f"infinillm {__version__}. Equal commands give equal figures."
