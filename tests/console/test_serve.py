"""`infinillm serve` and what talks to it: started, used, ended, killed, and nothing left behind."""

import json
import signal
import subprocess

import psutil
import pytest

from tests import live, tiny


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_a_cluster_serves_is_looked_at_and_ends_cleanly() -> None:
    flags = ("--workers=2", "--kv-blocks=20", "--served-model-name=tiny", "--host-kv-gib=0.01")
    with live.serve(str(tiny.folder("llama")), *flags) as served:
        assert served.ready["ready"] == "serve"
        assert [worker["id"] for worker in served.ready["workers"]] == ["worker-0", "worker-1", "host"]
        assert len(served.children) == 5

        said = live.cli("chat", "--url", served.url, "--once", "who?", "--max-tokens", "5")
        assert (said.returncode, said.stderr) == (0, "")
        assert said.stdout.strip()

        seen = live.cli("top", "--url", served.url, "--once")
        assert seen.returncode == 0, seen.stderr
        assert "tiny" not in seen.stderr
        for word in ("worker-0", "worker-1", "host (host)", "policy pooled", "longest request"):
            assert word in seen.stdout

        (line,) = live.cli("top", "--url", served.url, "--once", "--json").stdout.splitlines()
        kinds = {node["id"]: (node["tier"], node["serves"]) for node in json.loads(line)["nodes"]}
        assert kinds == {"worker-0": ("device", True), "worker-1": ("device", True), "host": ("host", False)}

        wrong = live.cli("chat", "--url", served.url, "--once", "who?", "--model", "another")
        assert wrong.returncode == 1
        assert "another" in wrong.stderr
        assert wrong.stderr.count("\n") == 1

        children = served.children
        assert served.end() == 0
        assert gone(children)
        assert "Traceback" not in served.said()


def test_a_worker_that_dies_ends_the_cluster_and_is_named() -> None:
    with live.serve(str(tiny.folder("llama")), "--workers=1", "--kv-blocks=20") as served:
        children = served.children
        (worker,) = [each for each in children if "worker" in each.cmdline()]
        worker.kill()
        assert served.process.wait(live.END_SECONDS) == 1
        assert "infinillm serve: worker-0 ended with status -9" in served.said()
        assert gone(children)


def test_children_do_not_outlive_a_killed_parent() -> None:
    """Killed at its first child: even one that has only just begun."""
    process = subprocess.Popen(
        live.command("serve", str(tiny.folder("llama")), "--port=0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=live.environment(),
    )
    with process:
        parent = psutil.Process(process.pid)
        while not (children := parent.children()) or "infinillm" not in children[0].cmdline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert gone(children)


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("serve", "/no/such/model"), 2, "infinillm serve: there is no model at /no/such/model"),
        (("serve", "--kv-bloks", "4"), 2, "did you mean --kv-blocks?"),
        (("chat", "--url", "http://127.0.0.1:1", "--once", "hello"), 1, "no gateway answers at http://127.0.0.1:1"),
        (("top", "--url", "nowhere"), 2, "--url must begin with http://"),
        (("wrker",), 2, "invalid choice: 'wrker'"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(argv: tuple[str, ...], status: int, words: str) -> None:
    made = live.cli(*argv)
    last = made.stderr.splitlines()[-1]
    assert words in last
    assert made.returncode == status
    assert "Traceback" not in made.stderr


def test_help_and_version_are_quick_to_reach() -> None:
    made = live.cli("--help")
    assert made.returncode == 0
    for name in ("serve", "worker", "demo", "top"):
        assert f"  {name} " in made.stdout
        assert live.cli(name, "--help").returncode == 0
    explained = live.cli("worker", "--kv-blocks", "4", "--explain")
    assert any(line.split() == ["kv_blocks", "4", "flag"] for line in explained.stdout.splitlines())
    imported = "import sys, infinillm.__main__; print(json.dumps(sorted(sys.modules)))".replace(
        "import sys", "import sys, json"
    )
    modules = json.loads(subprocess.check_output([live.command()[0], "-c", imported], text=True))
    assert not {"torch", "transformers", "grpc", "fastapi", "rich"} & set(modules), "the front door must stay light"
