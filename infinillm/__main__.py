"""The front door: the one place that reads the command line and the environment."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infinillm import __version__, config
from infinillm.errors import BadRequest, InfinillmError
from infinillm.options import Help, Parser

OVERVIEW = """\
Language models served from one pool of K/V memory that all workers share: a request that fits no worker
is answered in memory its worker borrows from the others.

commands:
{commands}

`infinillm COMMAND --help` explains each. Settings come from --config FILE, then the environment
(INFINILLM_WORKER_KV_BLOCKS=256), then flags; `--explain` after any command prints them with their origin.
"""

EXAMPLES = {
    "serve": """\
examples:
  infinillm serve                                   the small default model, three workers, http://127.0.0.1:8000
  infinillm serve ./Qwen3-0.6B --dtype bfloat16     a Hugging Face folder (or a hub id, or a .gguf file)
  infinillm serve --workers 3 --kv-blocks 160       too little K/V memory in each for a long prompt: they lend
  infinillm serve --policy isolated                 no lending: the baseline
then:
  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "The capital of France is", "max_tokens": 8}' \\
       -H 'Content-Type: application/json'
  infinillm chat
  infinillm top
""",
    "controller": """\
example, on the first of several machines:
  infinillm controller --host 10.0.0.1 --port 7000
The controller holds no K/V and may restart at any time: it rebuilds its ledger from the workers' heartbeats.
Two of them, on different machines, one of which leads; workers and gateways are told of both:
  infinillm controller --host 10.0.0.1 --lease etcd://10.0.0.7:2379,10.0.0.8:2379/infinillm/leader
  infinillm worker --host 10.0.0.3 --controller 10.0.0.1:7000,10.0.0.2:7000
""",
    "worker": """\
examples:
  infinillm worker --host 10.0.0.2 --controller 10.0.0.1:7000 --kv-memory-gib 8
  infinillm worker --host 10.0.0.3 --controller 10.0.0.1:7000 --memory-only    lends memory, computes no tokens
All workers of a cluster serve one model with one block size and one dtype.
There is no authentication yet: bind addresses that only the cluster can reach.
""",
    "gateway": """\
example:
  infinillm gateway --host 0.0.0.0 --port 8000 --controller 10.0.0.1:7000
Any number of gateways may serve one cluster. The interactive API documentation is at /docs.
""",
    "prepare": """\
example, in an image or on a machine that will be offline:
  infinillm prepare HuggingFaceTB/SmolLM2-135M-Instruct
""",
    "profile": """\
examples, on the machine of a worker and with its settings:
  infinillm profile HuggingFaceTB/SmolLM2-135M-Instruct --out profile.json
  infinillm profile --lender 10.0.0.3:7001     the way to that worker, instead of to a process beside us
then:
  infinillm serve --policy proactive --profile profile.json
""",
    "simulate": """\
examples, none of which needs a GPU, or a model:
  infinillm simulate --trace t1 --rate 8 --cluster 4x8xA100 --model Llama-2-13B
  infinillm simulate --trace requests.jsonl --rate 0 --cluster 2x8xH100:tp2 --model Llama-3-70B --policy proactive
  infinillm simulate --policy pooled,mine.py --report report.html           a policy of your own, and figures
  infinillm simulate --find-capacity --slo ttft=2,tpot=0.1                 the highest rate that keeps it
""",
    "chat": """\
examples:
  infinillm chat
  infinillm chat --once "What is a ledger?" --max-tokens 64
""",
    "top": """\
examples:
  infinillm top
  infinillm top --once
  infinillm top --json | jq --unbuffered '.happened[]'
""",
    "demo": """\
examples:
  infinillm demo
  infinillm demo --document report.txt --question "Who signed it?"
""",
}


def _server(name: str) -> Callable[[Any], None]:
    """Run `infinillm.servers.NAME.run(settings)` until it ends."""

    def run(settings: Any) -> None:
        import importlib

        from infinillm.servers.process import to_its_end
        from infinillm.telemetry import start_log

        start_log(getattr(settings, "id", "") or name, settings.log_level)
        asyncio.run(to_its_end(importlib.import_module(f"infinillm.servers.{name}").run(settings)))

    return run


def _console(name: str) -> Callable[[Any], None]:
    def run(settings: Any) -> None:
        import importlib

        importlib.import_module(f"infinillm.console.{name}").run(settings)

    return run


@dataclass(frozen=True, slots=True)
class Command:
    """One thing to do: its settings, and what does it."""

    settings: type[Any]
    run: Callable[[Any], None]


COMMANDS = {
    "serve": Command(config.Serve, _console("serve")),
    "profile": Command(config.Profile, _console("profile")),
    "simulate": Command(config.Simulate, _console("simulate")),
    "chat": Command(config.Chat, _console("chat")),
    "top": Command(config.Top, _console("top")),
    "demo": Command(config.Demo, _console("demo")),
    "controller": Command(config.Controller, _server("controller")),
    "worker": Command(config.Worker, _server("worker")),
    "gateway": Command(config.Gateway, _server("gateway")),
    "prepare": Command(config.Prepare, _server("prepare")),
}


def _overview() -> Parser:
    rows = [f"  {name:12}{(command.settings.__doc__ or '').rstrip('.')}" for name, command in COMMANDS.items()]
    text = OVERVIEW.format(commands="\n".join(rows))
    found = Parser(prog="infinillm", description=text, formatter_class=Help, usage="infinillm COMMAND ...")
    found.add_argument("--version", action="version", version=f"infinillm {__version__}")
    found.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS), help="one of the above")
    return found


def _die_with(parent: int) -> None:
    """Be killed by the kernel when our parent ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _prepare_environment() -> None:
    """What libraries read from the environment when they are imported; what the user set stands."""
    # The threads that compute ask for more themselves (engine/runner.py says why nobody else may).
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    for variable, value in (
        # gomp lets a thread wait 13 ms, burning its slice, for one the kernel has set aside: beside a busy process a
        # step took 401 ms. It takes 54 when such a thread sleeps after 0.1 ms, and alone 22 either way.
        ("GOMP_SPINCOUNT", "5000"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("GRPC_VERBOSITY", "NONE"),  # errors reach us as statuses
    ):
        os.environ.setdefault(variable, value)


def run(argv: Sequence[str]) -> None:
    """Do what the command line says. Raises InfinillmError."""
    known = _overview().parse_args(list(argv[:1]) or ["--help"])
    rest = list(argv[1:])
    if rest[:1] == ["--dies-with"]:
        _die_with(int(rest[1]))
        rest = rest[2:]
    explain = "--explain" in rest
    rest = [each for each in rest if each != "--explain"]
    command = COMMANDS[known.command]
    settings = config.load(
        command.settings, rest, os.environ, prog=f"infinillm {known.command}", examples=EXAMPLES[known.command]
    )
    if explain:
        print(config.explain(settings))
        return
    _prepare_environment()
    command.run(settings)


def main() -> int:
    """Exit status 0: done; 2: the caller must change something; 1: anything else; 130: interrupted."""
    try:
        run(sys.argv[1:])
    except InfinillmError as error:
        name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else ""
        print(f"infinillm {name}".rstrip() + f": {error.message}", file=sys.stderr)
        return 2 if isinstance(error, BadRequest) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
