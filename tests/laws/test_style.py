"""House style that a machine can see: opening sentences, sizes, names, one front door, one way to speak of metrics."""

import ast
import re
from collections.abc import Callable, Iterator

import pytest

from infinillm.telemetry import EVENTS, TABLE
from tests.laws.tree import ROOT, Source, imports, parse, product, sources, within

MOST_LINES = {"tests": 500}  # of a file in a folder; elsewhere:
MOST = 400
NEVER = {"manager", "handler", "helper", "helpers", "util", "utils", "context", "info", "meta", "impl", "wrapper"}
FRONT_DOOR = "infinillm.__main__"


def opening(source: Source) -> Iterator[str]:
    text = ast.get_docstring(source.tree) or ""
    if source.lines and not re.match(r".+\.$", text.split("\n\n", maxsplit=1)[0].replace("\n", " ")):
        yield f"{source.path} does not open with a sentence saying what it is"


def size(source: Source) -> Iterator[str]:
    most = MOST_LINES.get(source.path.parts[0], MOST)
    if source.lines > most:
        yield f"{source.path} has {source.lines} lines, more than {most}"


def _words(name: str) -> set[str]:
    return set(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().split("_"))


def names(source: Source) -> Iterator[str]:
    if bad := _words(source.path.stem) & NEVER:
        yield f"{source.path} is called {bad}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bad = _words(node.name) & NEVER
            if bad or (isinstance(node, ast.ClassDef) and re.match(r"_?Base[A-Z]", node.name)):
                yield f"{source.path}:{node.lineno} defines {node.name}"


def front_door(source: Source) -> Iterator[str]:
    if source.module == FRONT_DOOR:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if dotted in {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.argv"}:
                yield f"{source.path}:{node.lineno} uses {dotted}; only the front door does"
    for line, name in imports(source):
        if within(name, ("os.environ", "os.getenv", "os.putenv", "sys.argv")):
            yield f"{source.path}:{line} imports {name}; only the front door does"


def metrics(source: Source) -> Iterator[str]:
    """Calls such as metrics.add("steps_total", 1, node=...) name metrics and labels of the table."""
    verbs = {"add": "counter", "set": "gauge", "observe": "histogram", "remove": "gauge"}
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in verbs):
            continue
        if not (ast.unparse(node.func.value).endswith("metrics") and node.args):
            continue
        if not (isinstance(node.args[0], ast.Constant) and isinstance(name := node.args[0].value, str)):
            continue
        if name not in TABLE or TABLE[name].kind != verbs[node.func.attr]:
            yield f"{source.path}:{node.lineno} {node.func.attr}s {name!r}, which telemetry's table does not have so"
            continue
        given = {each.arg for each in node.keywords} - {"amount", "value"}
        if None not in given and given | {"node"} != set(TABLE[name].labels) | {"node"}:
            yield f"{source.path}:{node.lineno} {name} has labels {tuple(TABLE[name].labels)}, not {given}"


def events(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"log", "telemetry.log"} and node.args:
            first = node.args[0]
            if not isinstance(first, ast.Constant):
                yield f"{source.path}:{node.lineno} logs an event that is no literal"
            elif first.value not in EVENTS:
                yield f"{source.path}:{node.lineno} logs {first.value!r}, which telemetry's table does not have"


@pytest.mark.parametrize("law", [opening, size])
def test_every_file_of_the_tree_keeps(law: Callable[[Source], Iterator[str]]) -> None:
    faults = [fault for source in sources() for fault in law(source)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("law", [names, front_door, metrics, events])
def test_every_file_of_the_product_keeps(law: Callable[[Source], Iterator[str]]) -> None:
    faults = [fault for source in product() for fault in law(source)]
    assert not faults, "\n".join(faults)


def test_every_event_is_logged_somewhere() -> None:
    text = "\n".join(
        (ROOT / source.path).read_text(encoding="utf-8") for source in product() if source.room != "telemetry"
    )
    assert [event for event in EVENTS if f'"{event}"' not in text] == []


@pytest.mark.parametrize(
    ("law", "path", "text"),
    [
        (opening, "infinillm/x.py", "x = 1"),
        (opening, "infinillm/x.py", '"""no stop"""'),
        (size, "infinillm/x.py", "\n" * 500),
        (names, "infinillm/utils.py", ""),
        (names, "infinillm/x.py", "class BlockManager: ..."),
        (names, "infinillm/x.py", "class BaseStore: ..."),
        (names, "infinillm/x.py", "def get_info(): ..."),
        (front_door, "infinillm/x.py", "import os\nos.environ['A']"),
        (front_door, "infinillm/x.py", "from os import getenv"),
        (metrics, "infinillm/x.py", "metrics.add('no_such_total')"),
        (metrics, "infinillm/x.py", "metrics.set('steps_total', 1)"),
        (metrics, "infinillm/x.py", "self.metrics.set('loans', 1, sidee='lender')"),
        (events, "infinillm/x.py", "log('no_such_event')"),
    ],
)
def test_the_law_sees(law: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert list(law(parse(text, ROOT / path)))
