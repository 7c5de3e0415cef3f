"""Everything the project exports about itself: one table of metrics, one of log events."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from infinillm.errors import BadRequest

PREFIX = "infinillm_"
LONGEST_FIELD = 4000  # characters of one field of a log line
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
prometheus_client.disable_created_metrics()  # a `_created` series for each of ours tells nobody anything

# Bucket edges, seconds. The latencies of requests have vLLM's edges, so that dashboards compare.
TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
WAIT = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
STEP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `labels` maps a label to all its values, or to () where they are open.

    `of` names the processes that export it from their start, at zero, where its labels are known.
    """

    name: str
    kind: str
    help: str
    of: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


def _metric(
    name: str, kind: str, of: str, text: str, /, *, buckets: tuple[float, ...] = (), **labels: tuple[str, ...]
) -> Metric:
    return Metric(name, kind, text, tuple(of.split()), labels, buckets)


NODE: tuple[str, ...] = ()
_STATES = ("free", "used", "cached", "lent", "borrowed")

TABLE: dict[str, Metric] = {
    each.name: each
    for each in (
        # The pool, as each node sees itself.
        _metric("kv_blocks", GAUGE, "worker", "K/V blocks of a node by state", node=NODE, state=_STATES),
        _metric("kv_blocks_capacity", GAUGE, "worker", "K/V blocks a node owns", node=NODE),
        _metric("loans", GAUGE, "worker", "Loans in force, by the node's side", node=NODE, side=("lender", "borrower")),
        _metric(
            "loan_operations_total",
            COUNTER,
            "worker",
            "What became of loans",
            node=NODE,
            operation=("lend", "borrow", "return", "expire", "refuse", "recall"),
        ),
        _metric(
            "recalled_blocks",
            GAUGE,
            "worker",
            "Blocks that lenders want back and have not got, by the node's side",
            node=NODE,
            side=("lender", "borrower"),
        ),
        _metric(
            "attention_tokens_total",
            COUNTER,
            "worker",
            "Tokens of context attended to, once per step, by where their K/V is",
            node=NODE,
            place=("local", "remote"),
        ),
        _metric(
            "port_bytes_total",
            COUNTER,
            "worker",
            "Bytes of tensors exchanged with a peer",
            node=NODE,
            peer=(),
            direction=("sent", "received"),
            kind=(),
        ),
        _metric(
            "port_wait_seconds",
            HISTOGRAM,
            "worker",
            "How long one layer waited for a peer's partial",
            buckets=WAIT,
            node=NODE,
            peer=(),
        ),
        # The engine.
        _metric("requests_running", GAUGE, "worker", "Requests being computed", node=NODE),
        _metric("requests_waiting", GAUGE, "worker", "Requests in the queue", node=NODE),
        _metric("steps_total", COUNTER, "worker", "Steps computed", node=NODE),
        _metric("step_seconds", HISTOGRAM, "worker", "How long a step took", buckets=STEP, node=NODE),
        _metric("step_tokens", HISTOGRAM, "worker", "Tokens computed in a step", buckets=TOKENS, node=NODE),
        _metric(
            "preemptions_total", COUNTER, "worker", "Requests sent back to the queue for lack of blocks", node=NODE
        ),
        _metric(
            "moved_tokens_total",
            COUNTER,
            "worker",
            "Tokens whose K/V went to another node while their request ran, by where to",
            node=NODE,
            direction=("home", "away"),
        ),
        _metric("moving_blocks", GAUGE, "worker", "Blocks of running requests that wait to move elsewhere", node=NODE),
        _metric("hole_tokens_total", COUNTER, "worker", "Tokens whose K/V was lost with a node", node=NODE),
        _metric("missing_tokens", GAUGE, "worker", "Lost tokens that have not been computed again yet", node=NODE),
        _metric("repaired_tokens_total", COUNTER, "worker", "Lost tokens that were computed again", node=NODE),
        _metric("prompt_tokens_total", COUNTER, "worker", "Prompt tokens received", node=NODE),
        _metric("generation_tokens_total", COUNTER, "worker", "Tokens generated", node=NODE),
        _metric("prompt_tokens_cached_total", COUNTER, "worker", "Prompt tokens found in the prefix cache", node=NODE),
        _metric("prompt_tokens_shared_total", COUNTER, "worker", "Prompt tokens found on other nodes", node=NODE),
        _metric(
            "requests_total",
            COUNTER,
            "worker",
            "Requests ended, by how",
            node=NODE,
            outcome=("stop", "length", "cancelled", "moved", "error"),
        ),
        # The gateway.
        _metric("refusals_total", COUNTER, "", "Requests refused, by reason", reason=()),
        _metric(
            "resubmissions_total",
            COUNTER,
            "gateway",
            "Requests that went on at another worker, by why the first one left them",
            reason=("lost", "moved"),
        ),
        _metric("time_to_first_token_seconds", HISTOGRAM, "gateway", "From a request to its first token", buckets=TTFT),
        _metric("inter_token_latency_seconds", HISTOGRAM, "gateway", "Between two tokens of a request", buckets=ITL),
        _metric("e2e_request_latency_seconds", HISTOGRAM, "gateway", "From a request to its last token", buckets=E2E),
        _metric("http_requests_total", COUNTER, "", "HTTP requests answered", route=(), status=()),
        # The controller.
        _metric("controller_epoch", GAUGE, "controller", "The ledger's epoch; it grows when another controller leads"),
        _metric("controller_leader", GAUGE, "controller", "1 where this controller leads, 0 where it stands by"),
        _metric("nodes", GAUGE, "controller", "Nodes in the ledger by state", state=("serving", "memory", "draining")),
        _metric("pool_blocks", GAUGE, "controller", "K/V blocks of all nodes by state", state=_STATES),
        _metric("heartbeats_total", COUNTER, "controller", "Heartbeats received"),
        _metric(
            "orders_total",
            COUNTER,
            "controller",
            "Moves that nodes were told to make, by where to, as the home of the request sees it",
            direction=("home", "away", "between"),
        ),
        _metric("heartbeat_age_seconds", GAUGE, "", "How long ago a node was last heard", node=NODE),
        # Everybody.
        _metric("build_info", GAUGE, "", "Always 1; the labels say what runs", version=(), process=()),
    )
}

_CLASSES: dict[str, Any] = {COUNTER: Counter, GAUGE: Gauge, HISTOGRAM: Histogram}


class Metrics:
    """One process's metrics, in their own registry. An unknown name or label is a KeyError; `node` fills itself in."""

    def __init__(self, process: str, node: str = ""):
        self.node = node
        self._registry = CollectorRegistry()
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._lock = threading.Lock()
        self._servers: list[Any] = []
        ProcessCollector(registry=self._registry)
        for metric in TABLE.values():
            if process in metric.of:
                self._start_at_zero(metric)
        from infinillm import __version__

        self.set("build_info", 1, version=__version__, process=process)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._find(name, labels, COUNTER).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._find(name, labels, GAUGE).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._find(name, labels, HISTOGRAM).observe(value)

    def remove(self, name: str, **labels: str) -> None:
        """Forget one series: what it spoke of is gone."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            if self._series.pop(key, None) is not None:
                self._families[name].remove(*(labels[label] for label in TABLE[name].labels))

    def exposition(self) -> bytes:
        """All series as Prometheus reads them; its type is CONTENT_TYPE."""
        return prometheus_client.generate_latest(self._registry)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics from a daemon thread; the port it got, or -1 where `port` is -1 and none is wanted."""
        if port < 0:
            return -1
        try:
            server, thread = prometheus_client.start_http_server(port, host, self._registry)
        except OSError as error:
            raise BadRequest(
                f"cannot serve /metrics on {host}:{port}: {error.strerror}", field="metrics_port"
            ) from error
        self._servers.append((server, thread))
        return int(server.server_port)

    def close(self) -> None:
        while self._servers:
            server, thread = self._servers.pop()
            server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which looks only twice a second
            server.shutdown()
            server.server_close()
            thread.join()

    def _start_at_zero(self, metric: Metric) -> None:
        series: list[dict[str, str]] = [{}]
        for label, values in metric.labels.items():
            known = (self.node,) if label == "node" and self.node else values
            series = [{**each, label: value} for each in series for value in known]
        for labels in series:
            self._find(metric.name, labels, metric.kind)

    def _find(self, name: str, labels: dict[str, str], kind: str) -> Any:
        key = (name, tuple(sorted(labels.items())))
        found = self._series.get(key)
        return self._make(name, labels, key) if found is None else found

    def _make(self, name: str, labels: dict[str, str], key: tuple[str, tuple[tuple[str, str], ...]]) -> Any:
        metric = TABLE[name]
        given = {"node": self.node, **labels} if "node" in metric.labels else labels
        if set(given) != set(metric.labels):
            raise KeyError(f"{name} has labels {tuple(metric.labels)}, not {tuple(given)}")
        for label, value in given.items():
            if metric.labels[label] and value not in metric.labels[label]:
                raise KeyError(f"{name}{{{label}={value!r}}}: not one of {metric.labels[label]}")
        with self._lock:
            if (found := self._series.get(key)) is not None:
                return found
            if name not in self._families:
                more = {"buckets": metric.buckets} if metric.buckets else {}
                made = _CLASSES[metric.kind]
                self._families[name] = made(
                    PREFIX + name, metric.help, tuple(metric.labels), registry=self._registry, **more
                )
            family = self._families[name]
            found = family.labels(**given) if metric.labels else family
            self._series[key] = found
            return found


# Every event we log, with its level and what it says. Fields are the facts; there is no prose beside them.
EVENTS: dict[str, tuple[str, str]] = {
    # Membership, told by the controller and by the nodes.
    "joined": ("info", "a node became a member"),
    "left": ("warning", "a node is no member any more, and why"),
    "member": ("info", "this node was accepted by the controller"),
    "superseded": ("error", "a process started later took this node's name; this one ends"),
    "join_refused": ("error", "this node does not fit the cluster, and why; it ends"),
    "leave_failed": ("info", "the controller could not be told goodbye; it will notice"),
    "controller_lost": ("warning", "the controller does not answer; running requests go on"),
    "controller_found": ("info", "the controller answers again"),
    "leads": ("warning", "this controller leads from now on"),
    "stands_by": ("warning", "this controller does not lead, and who does"),
    "lease_failed": ("warning", "who leads cannot be found out, and why"),
    "law_broken": ("error", "the ledger's books do not balance"),
    "policy_failed": ("error", "a policy of somebody's own failed, and how; nothing is ordered"),
    # Loans, told by the lender, the borrower and the controller.
    "creditors_named": ("info", "who could lend to a node that is short, best first"),
    "ordered": ("info", "blocks of a running request should move to another node, and why"),
    "creditors_refused": ("info", "nobody can lend, and why"),
    "lent": ("info", "blocks were reserved for a borrower"),
    "refused": ("info", "a node would not lend, and why"),
    "borrowed": ("info", "a lender reserved blocks for us"),
    "borrow_refused": ("info", "nobody lent us what a request needs, and why"),
    "gave_back": ("info", "idle borrowed blocks went home"),
    "shared": ("info", "another node keeps what it has of a prompt for a request of ours"),
    "share_failed": ("info", "a node that may have a prompt's blocks could not be asked, and why"),
    "returned": ("info", "a loan ended"),
    "return_failed": ("warning", "a lender could not be told that its loan ended; it lapses by itself"),
    "recalled": ("info", "a node wants blocks back from a borrower"),
    "recall_heard": ("info", "a lender wants blocks back from us"),
    "expired": ("warning", "a borrower did not renew its loan, or return what was recalled; its blocks are free"),
    "port_opened": ("info", "a lane for tensors to a lender is open"),
    "conversation_refused": ("warning", "a lender ended the conversation, and why"),
    "conversation_lost": ("warning", "a lender is gone in mid-conversation"),
    "conversation_ended": ("info", "a borrower is gone, or we sent it away, and why"),
    "node_lost": ("warning", "a lender is gone with the K/V it held; that is computed again"),
    "moved": ("debug", "K/V of a running request went to another node, or came home"),
    "move_refused": ("info", "blocks stay where they are: their target had no room"),
    # Requests.
    "pass_failed": ("error", "a forward pass raised what it should not; the requests in it end with an error"),
    "preempted": ("info", "a request gave its blocks back and waits again"),
    "request_refused": ("info", "a request was answered with an error of the caller's"),
    "route_refused": ("info", "no node could be named for a request, and why"),
    "request_resubmitted": ("warning", "a worker was lost, or hands over; another goes on after the tokens there are"),
    "handed_over": ("info", "a worker that drains told the callers of some requests to go on elsewhere"),
    "routed_alone": ("warning", "a request was routed by the last known ledger"),
    "request_log_failed": ("error", "the log of requests cannot be written any more, and why"),
    "stream_failed": ("warning", "an answer broke off after it had begun"),
    "rpc_failed": ("error", "a method of ours raised what it should not"),
    "loading": ("info", "a slow piece of the start begins or is done"),
}

_logger = logging.getLogger("infinillm")


def log(event: str, **fields: Any) -> None:
    """Log a fact: an event of the table, with its fields."""
    level, _ = EVENTS.get(event, ("info", ""))
    told = {name: _short(value) for name, value in fields.items()}
    _logger.log(logging.getLevelName(level.upper()), event, extra={"fields": told})


def _short(value: Any) -> Any:
    """What a client sent may be of any length; a line of a log may not."""
    return value[:LONGEST_FIELD] + "..." if isinstance(value, str) and len(value) > LONGEST_FIELD else value


class _Lines(logging.Formatter):
    """One JSON object a line: when, how grave, which process, what, and the fields."""

    def __init__(self, process: str):
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "process": self.process, "event": record.getMessage()}
        if record.name != "infinillm":
            line["event"], line["source"], line["message"] = "library", record.name, record.getMessage()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str, ensure_ascii=False)


def start_log(process: str, level: str, to: TextIO | None = None) -> None:
    """Write events of this level and above to stderr (or `to`), and what libraries have to complain about."""
    lines = logging.StreamHandler(to or sys.stderr)
    lines.setFormatter(_Lines(process))
    logging.basicConfig(level=logging.WARNING, handlers=[lines], force=True)
    _logger.setLevel(level.upper())
