"""The report page: one file, every policy and figure in it, names escaped, pictures that show what was seen."""

from __future__ import annotations

import json
import re
import struct
import zlib
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from infinillm import config
from infinillm.console import figures, simulate
from infinillm.console.figures import Heat
from infinillm.errors import BadRequest

VOID = {"meta", "br", "rect", "circle", "line", "image", "polyline"}
RUN: dict[str, Any] = {"requests": 60, "rate": 30.0, "cluster": "1x4xA100"}
EVIL = '<script>alert("1")</script>&'


class Page(HTMLParser):
    """What a page has: its tags with their attributes, and its text; tags that do not nest are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.said = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.said += data

    def labels(self) -> list[str]:
        return [attributes["aria-label"] for tag, attributes in self.tags if tag == "svg"]


def drawn(folder: Path, **more: Any) -> tuple[str, Page]:
    file = folder / "report.html"
    simulate.run(config.Simulate(**{**RUN, **more, "report": str(file)}))
    text = file.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return drawn(tmp_path_factory.mktemp("three"), trace="t3", rate=1.0, policy="isolated,pooled,proactive")


def test_every_policy_and_every_figure_is_there(three: tuple[str, Page]) -> None:
    _, page = three
    labels = page.labels()
    for label in (
        "Tokens a second by policy",
        "Time to the first token",
        "Time per output token",
        "Latency",
        "Requests that wait, over time",
        *(f"Memory in use under {policy}" for policy in ("isolated", "pooled", "proactive")),
        "Who lends to whom under pooled",
        "Memory lent under pooled",
    ):
        assert labels.count(label) == 1, label
    assert "Who lends to whom under isolated" not in labels and "Nothing was lent." in page.said
    rows = page.said.split("gave way")[1]
    assert all(policy in rows for policy in ("isolated", "pooled", "proactive"))


def test_it_says_how_it_was_made(three: tuple[str, Page]) -> None:
    _, page = three
    assert "infinillm simulate --trace=t3 --cluster=1x4xA100 --rate=1.0 --requests=60" in page.said
    assert "NVIDIA A100 80 GB SXM data sheet" in page.said and "Reconstructed: published are the ranges" in page.said


def outside(text: str) -> list[str]:
    """What a page would fetch, were it opened."""
    return [
        found
        for found in re.findall(
            r"""(?:\b(?:src|href|srcset|action|data)\s*=\s*["']?|url\(|@import\s*)([^"')\s>]*)""", text
        )
        if not found.startswith("data:")
    ] + re.findall(r"https?:|//\w+\.\w+|<link|fetch\(|XMLHttp|import\(", text)


def test_nothing_comes_from_outside(three: tuple[str, Page]) -> None:
    text, page = three
    assert outside('<img src="http://a.b/c">') and outside("a { background: url(x.png) }"), "it sees what there is"
    assert outside(text) == []
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "div", "span", "script"),
        *("h1", "h2", "h3", "p", "pre", "dl", "dt", "dd", "figure", "figcaption"),
        *("table", "thead", "tbody", "tr", "th", "td"),
        *("svg", "text", "line", "rect", "circle", "polyline", "image"),
    }


def test_names_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(
        f"BASE, NAME = 'pooled', {EVIL!r}\ndef capacity(ledger, block_size):\n    return 10**6\n"
    )
    trace = f"{EVIL.replace('/', '')}.jsonl"
    Path(trace).write_text("".join(json.dumps({"at": k, "prompt": 50, "output": 5}) + "\n" for k in range(9)))
    text, page = drawn(tmp_path, policy="pooled,evil.py", trace=trace, rate=0.0)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "alert(" in page.said
    assert "<script>alert" not in text
    assert f"Memory in use under {EVIL}" in page.labels()


def test_a_wrong_place_is_told_before_anything_is_simulated(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No such file") as error:
        simulate.run(config.Simulate(**{**RUN, "requests": 10**9}, report=str(tmp_path / "nowhere" / "report.html")))
    assert error.value.field == "report"


def test_a_page_of_a_search_shows_the_rates(tmp_path: Path) -> None:
    _, page = drawn(
        tmp_path, trace="sharegpt", policy="isolated,pooled", find_capacity=True, slo="ttft=0.5,tpot=0.05", rate=40.0
    )
    assert {"Requests a second by policy", "Requests that kept the objective by rate"} <= set(page.labels())
    assert "ttft=0.5,tpot=0.05" in page.said


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels(address: str) -> list[bytes]:
    """The rows of a picture, read by hand."""
    raw = b64decode(address.removeprefix("data:image/png;base64,"))
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    at, parts = 8, {}
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        name, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + body)
        parts[name], at = body, at + 12 + length
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    assert parts[b"tRNS"] == bytes(range(256)) and len(parts[b"PLTE"]) == 768
    lines = zlib.decompress(parts[b"IDAT"])
    rows = [lines[k * (width + 1) : (k + 1) * (width + 1)] for k in range(height)]
    assert all(row[0] == 0 for row in rows) and len(lines) == height * (width + 1)
    return [row[1:] for row in rows]


def test_a_picture_is_its_values() -> None:
    rows = [bytes([0, 1, 255]), bytes([7, 128, 20])]
    assert pixels(figures.picture(rows)) == rows


@pytest.mark.parametrize("columns", [["a", "b"], [0.0, 5.0]])
def test_a_heat_map_shows_and_tells_the_same(columns: Any) -> None:
    page = Page(figures.heat(Heat(["x", "<y>"], columns, [[0, 5], [10, 2.5]], 10.0, "blocks", " to ", 400, 10, 8), "l"))
    ((_, image),) = [each for each in page.tags if each[0] == "image"]
    about = json.loads(image["data-heat"])
    assert pixels(image["href"]) == [bytes([0, 128]), bytes([255, 64])]
    assert b64decode(about["values"]) == bytes([0, 128, 255, 64])
    assert about["names"] == ["x", "<y>"] and about["columns"] == (["a", "b"] if columns[0] == "a" else ["0 s", "5 s"])
    assert "<y>" in page.said


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.bars([], "none"),
        lambda: figures.bars([figures.Bar("p0", "a", 0.0, "0")], "zero"),
        lambda: figures.spans([figures.Span("p0", "a", [])], str, "none"),
        lambda: figures.lines([figures.Series("p0", "a", [(0.0, 0.0)])], str, str, "zero"),
    ],
)
def test_nothing_can_be_drawn_too(draw: Callable[[], str]) -> None:
    text = draw()
    Page(text)
    assert "nan" not in text and "inf" not in text


def test_worlds_of_planners_are_drawn_as_well(tmp_path: Path) -> None:
    _, page = drawn(tmp_path, policy="elastic,single", trace="t1", rate=4.0)
    assert {"Memory in use under elastic", "Memory in use under single"} <= set(page.labels())
    for image in [attributes for tag, attributes in page.tags if tag == "image"]:
        assert max(map(max, pixels(image["href"]))) > 0
