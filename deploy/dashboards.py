"""The Grafana dashboard *Memory pool*, as code: `python deploy/dashboards.py` writes grafana/memory-pool.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "grafana" / "memory-pool.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
RATE = "$__rate_interval"
WIDTH, HEIGHT = 8, 8  # of a panel, in Grafana's grid of 24 columns


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it shows, in which unit, and the queries with their legends."""

    title: str
    unit: str
    about: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False


def _quantiles(name: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels, legend = (f", {by}", f" {{{{{by}}}}}") if by else ("", "")
    return tuple(
        (
            f"histogram_quantile({share}, sum by (le{labels}) (rate(infinillm_{name}_bucket[{RATE}])))",
            f"p{word}{legend}",
        )
        for share, word in ((0.5, "50"), (0.95, "95"))
    )


def _rate(name: str, by: str) -> str:
    return f"sum by ({by}) (rate(infinillm_{name}[{RATE}]))"


DRIFT = 'infinillm_kv_blocks_capacity - on (node) sum by (node) (infinillm_kv_blocks{state!="borrowed"})'
SEEN = f"rate(infinillm_attention_tokens_total[{RATE}])"
REMOTE = f'rate(infinillm_attention_tokens_total{{place="remote"}}[{RATE}])'
REMOTE_SHARE = f"sum by (node) ({REMOTE}) / (sum by (node) ({SEEN}) > 0)"

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "The pool",
        (
            Panel(
                "Blocks of the pool",
                "short",
                "K/V blocks of all nodes by state, as the controller's ledger has them. Cached blocks are room.",
                (('infinillm_pool_blocks{state!="borrowed"}', "{{state}}"),),
                stacked=True,
            ),
            Panel(
                "Room left",
                "percentunit",
                "Share of all blocks that is free or holds only kept prefixes.",
                (
                    (
                        'sum(infinillm_kv_blocks{state=~"free|cached"}) / sum(infinillm_kv_blocks_capacity)',
                        "free or cached",
                    ),
                ),
            ),
            Panel(
                "Blocks unaccounted for",
                "short",
                "What a node owns less its free, used, cached and lent blocks. Anything but zero is a defect.",
                (
                    (
                        DRIFT,
                        "{{node}}",
                    ),
                ),
            ),
        ),
    ),
    (
        "Lending",
        (
            Panel(
                "Lent by node",
                "short",
                "Blocks each node has promised to others.",
                (('infinillm_kv_blocks{state="lent"}', "{{node}}"),),
                stacked=True,
            ),
            Panel(
                "Borrowed by node",
                "short",
                "Blocks each node has been promised by others.",
                (('infinillm_kv_blocks{state="borrowed"}', "{{node}}"),),
                stacked=True,
            ),
            Panel("Loans", "short", "Loans in force by side.", (("infinillm_loans", "{{node}} as {{side}}"),)),
            Panel(
                "What became of loans",
                "ops",
                "Loans made, used, returned, lapsed and refused per second. Lapses mean borrowers that vanished.",
                ((_rate("loan_operations_total", "operation"), "{{operation}}"),),
            ),
            Panel(
                "Used by node",
                "short",
                "Blocks each node's own memory holds for running requests.",
                (('infinillm_kv_blocks{state="used"}', "{{node}}"),),
                stacked=True,
            ),
            Panel(
                "Kept prefixes by node",
                "short",
                "Blocks nobody refers to, kept because a prompt may begin with them again.",
                (('infinillm_kv_blocks{state="cached"}', "{{node}}"),),
                stacked=True,
            ),
        ),
    ),
    (
        "Moves, recalls, holes",
        (
            Panel(
                "Live moves",
                "short",
                "Tokens per second whose K/V went to another node while their request ran: home, or away from it.",
                ((_rate("moved_tokens_total", "node, direction"), "{{node}} {{direction}}"),),
            ),
            Panel(
                "Waiting to move",
                "short",
                "Blocks of running requests that are to lie on another node and do not yet.",
                (("infinillm_moving_blocks", "{{node}}"),),
                stacked=True,
            ),
            Panel(
                "Orders",
                "ops",
                "Moves the controller told nodes to make, per second: away from home, home, or between lenders.",
                ((_rate("orders_total", "direction"), "{{direction}}"),),
            ),
            Panel(
                "Recalled",
                "short",
                "Blocks that lenders want back and have not got; what is late is computed again.",
                (("infinillm_recalled_blocks", "{{node}} as {{side}}"),),
            ),
            Panel(
                "Holes and repairs",
                "short",
                "Tokens per second whose K/V was lost with a node, and that were computed again.",
                (
                    (_rate("hole_tokens_total", "node"), "{{node}} lost"),
                    (_rate("repaired_tokens_total", "node"), "{{node}} repaired"),
                ),
            ),
            Panel(
                "Holes open",
                "short",
                "Tokens lost with a node and not computed again yet.",
                (("infinillm_missing_tokens", "{{node}}"),),
                stacked=True,
            ),
        ),
    ),
    (
        "Attention over the wire",
        (
            Panel(
                "Remote share of attention",
                "percentunit",
                "Share of the context attended to that lies on another node than the one that serves the request.",
                (
                    (
                        REMOTE_SHARE,
                        "{{node}}",
                    ),
                ),
            ),
            Panel(
                "Bytes between workers",
                "Bps",
                "Questions and answers of remote attention. Per decoded token this does not grow with the context.",
                ((_rate("port_bytes_total", "node, peer, direction"), "{{node}} {{direction}} {{peer}}"),),
            ),
            Panel(
                "Waiting for a remote partial",
                "s",
                "How long a layer waited for a peer after its own part was done: what the network costs.",
                _quantiles("port_wait_seconds", "peer"),
            ),
        ),
    ),
    (
        "Requests",
        (
            Panel(
                "Requests",
                "short",
                "Requests being computed and in the queue.",
                (
                    ("sum by (node) (infinillm_requests_running)", "{{node}} running"),
                    ("sum by (node) (infinillm_requests_waiting)", "{{node}} waiting"),
                ),
            ),
            Panel("Time to first token", "s", "As the gateway sees it.", _quantiles("time_to_first_token_seconds")),
            Panel("Between two tokens", "s", "As the gateway sees it.", _quantiles("inter_token_latency_seconds")),
            Panel("Whole requests", "s", "As the gateway sees it.", _quantiles("e2e_request_latency_seconds")),
            Panel(
                "Tokens",
                "short",
                "Tokens of prompts received, found in a cache here or on another node, and generated, per second.",
                (
                    (f"sum(rate(infinillm_prompt_tokens_total[{RATE}]))", "prompt"),
                    (f"sum(rate(infinillm_prompt_tokens_cached_total[{RATE}]))", "prompt, cached"),
                    (f"sum(rate(infinillm_prompt_tokens_shared_total[{RATE}]))", "prompt, on another node"),
                    (f"sum(rate(infinillm_generation_tokens_total[{RATE}]))", "generated"),
                ),
            ),
            Panel(
                "How requests ended",
                "reqps",
                "By outcome: a stop token or string, the length asked for, a client that left, an error of ours.",
                ((_rate("requests_total", "outcome"), "{{outcome}}"),),
            ),
            Panel(
                "Refusals",
                "reqps",
                "Requests refused, by reason.",
                ((_rate("refusals_total", "reason"), "{{reason}}"),),
            ),
            Panel(
                "HTTP answers",
                "reqps",
                "By route and status.",
                ((_rate("http_requests_total", "route, status"), "{{status}} {{route}}"),),
            ),
            Panel(
                "Resubmissions",
                "ops",
                "Requests that went on at another worker, because theirs was lost or handed them over.",
                ((_rate("resubmissions_total", "reason"), "{{reason}}"),),
            ),
            Panel(
                "Preemptions",
                "ops",
                "Requests sent back to the queue because nobody had blocks left to lend.",
                ((_rate("preemptions_total", "node"), "{{node}}"),),
            ),
        ),
    ),
    (
        "Workers and controller",
        (
            Panel(
                "Duration of a step",
                "s",
                "One forward pass over all running requests.",
                _quantiles("step_seconds", "node"),
            ),
            Panel("Tokens in a step", "short", "How full the passes are.", _quantiles("step_tokens", "node")),
            Panel("Steps", "ops", "Forward passes per second.", ((_rate("steps_total", "node"), "{{node}}"),)),
            Panel("Nodes", "short", "Members by state.", (("infinillm_nodes", "{{state}}"),)),
            Panel(
                "Silence of nodes",
                "s",
                "Time since each node's last heartbeat; a node silent for some seconds is taken for dead.",
                (("infinillm_heartbeat_age_seconds", "{{node}}"),),
            ),
            Panel(
                "Leader",
                "short",
                "1 where a controller leads, 0 where it stands by; never two at a time.",
                (("infinillm_controller_leader", "{{instance}}"),),
            ),
            Panel(
                "Epoch",
                "short",
                "It grows when the controller restarts.",
                (("infinillm_controller_epoch", "epoch"),),
            ),
            Panel(
                "Heartbeats",
                "ops",
                "Received per second.",
                ((f"rate(infinillm_heartbeats_total[{RATE}])", "heartbeats"),),
            ),
            Panel(
                "Processes",
                "short",
                "What runs, in which version.",
                (("count by (process, version) (infinillm_build_info)", "{{process}} {{version}}"),),
            ),
            Panel(
                "Memory",
                "bytes",
                "Resident memory of each process.",
                (("process_resident_memory_bytes", "{{instance}}"),),
            ),
        ),
    ),
)


def panels() -> tuple[Panel, ...]:
    return tuple(panel for _, row in ROWS for panel in row)


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom = {
        "axisSoftMin": 0,
        "fillOpacity": 30 if panel.stacked else 0,
        "stacking": {"mode": "normal" if panel.stacked else "none"},
    }
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        found.append({
            "id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
        })  # fmt: skip
        y += 1
        for index, panel in enumerate(row):
            found.append(_panel(panel, len(found) + 1, index % 3 * WIDTH, y + index // 3 * HEIGHT))
        y += -(-len(row) // 3) * HEIGHT
    source = {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}
    return {
        "uid": "infinillm-memory-pool",
        "title": "infinillm / Memory pool",
        "description": "Who owns, uses, lends and borrows K/V memory, and what that costs and brings.",
        "tags": ["infinillm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source]},
        "panels": found,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
