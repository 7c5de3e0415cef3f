"""The tables and figures of the papers: their arithmetic, a quick run of everything, and the page that is committed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.papers import infinite_llm, loongserve, page, rows
from bench.papers.__main__ import main
from bench.papers.infinite_llm import Cell
from bench.papers.rows import PREDICTED, Row, one
from bench.papers.runs import Rate, highest, saturated, throughput
from infinillm.sim import worlds
from infinillm.sim.hardware import cluster, read_size
from infinillm.sim.traffic import Arrival

DOCS = Path(__file__).parents[2] / "docs/papers"
SIZE = read_size("Llama-2-7B", 16, "float16")


def row(paper: tuple[float, float] | None, ours: float) -> Row:
    return Row("group", "what", "times", paper, ours, PREDICTED, "a, b")


@pytest.mark.parametrize(
    ("paper", "ours", "ratio"),
    [((2.0, 2.0), 3.0, 1.5), ((1.5, 2.0), 1.8, 1.0), ((1.5, 2.0), 1.2, 0.8), ((1.5, 2.0), 3.0, 1.5), (None, 3.0, None)],
)
def test_a_ratio_is_over_the_nearer_end(paper: tuple[float, float] | None, ours: float, ratio: float | None) -> None:
    assert row(paper, ours).ratio == (None if ratio is None else pytest.approx(ratio))


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = [row((2.0, 2.0), 3.0), row((1.5, 2.0), 34430.0), row(None, 0.125)]
    rows.write(tmp_path / "some.csv", found)
    assert rows.read(tmp_path / "some.csv") == found
    assert "| group | what | 1.5 to 2 | 34430 times | 17215.00 | predicted; a, b |" in rows.table(found[1:])


def test_traces_have_as_many_long_requests_as_is_said() -> None:
    lengths = json.loads((DOCS.parents[1] / "infinillm/sim/data/workloads.json").read_text())["lengths"]
    assert {name: lengths[name]["share"] for name in infinite_llm.LONG} == infinite_llm.LONG
    assert {*infinite_llm.LONGS} <= {*infinite_llm.LONG}


def test_throughput_at_saturation_is_what_the_work_takes() -> None:
    """Prompts of 2,000 tokens, one by one, on a worker that has more than enough of them; and half as many."""
    cost = cluster("1x1xA100", SIZE).sites[0].near

    def world() -> Any:
        budget = infinite_llm.BUDGET
        return worlds.world("whole", "1x1xA100", SIZE, budget, lend_fraction=0.9, beat_seconds=0.5)

    alone = 1 / cost.prefill(2000)
    crowd = throughput(world, [Arrival(0.0, 2000, 1)] * 300, 0.0, 300 / alone)
    assert crowd.tokens == pytest.approx(2001 * alone, rel=0.03)
    spread = throughput(world, [Arrival(n * 2 / alone, 2000, 1) for n in range(300)], 0.0, 600 / alone)
    assert spread.tokens == pytest.approx(crowd.tokens / 2, rel=0.03)


def test_rates_double_until_they_bring_no_more() -> None:
    def world() -> Any:
        budget = infinite_llm.BUDGET
        return worlds.world("whole", "1x1xA100", SIZE, budget, lend_fraction=0.9, beat_seconds=0.5)

    said: list[str] = []
    found = saturated(world, "sharegpt", 60, 5.0, said.append)
    assert [each.rate for each in found] == [5.0 * 2**n for n in range(len(found))]
    assert len(said) == len(found) > 1
    assert found[1].tokens > 1.2 * found[0].tokens
    assert found[-1].tokens < 1.03 * max(each.tokens for each in found[:-1])


@pytest.mark.parametrize("start", [0.6, 3.0, 6.0])
def test_the_largest_rate_under_a_limit(start: float) -> None:
    asked: Counter[float] = Counter()

    def latency(rate: float) -> float:
        asked[rate] += 1
        return rate if rate < 8 else 100 * rate

    assert highest(latency, 4.0, start) == pytest.approx(4.0, rel=0.01)
    assert max(asked.values()) == 1
    assert highest(lambda rate: 1 / (10 - rate) if rate < 10 else float("inf"), 1.0, start) == pytest.approx(
        9, rel=0.05
    )


def test_a_limit_that_is_always_kept_has_no_largest_rate() -> None:
    assert highest(lambda rate: 0.1, 1.0, 2.0) == float("inf")


def test_gains_are_over_the_best_run_of_the_same_trace() -> None:
    def cell(system: str, tokens: float, trace: str = "t0", instances: int = 32) -> Cell:
        return Cell("Llama-2-7B", instances, system, trace, Rate(1.0, tokens, 0.1, 10, 0, 0, 0))

    many, ours = infinite_llm.MANY, infinite_llm.PROACTIVE
    found = [cell(many, 50.0), cell(many, 100.0), cell(ours, 150.0), cell(ours, 120.0), cell(ours, 900.0, "t1")]
    (gain,) = infinite_llm.gains(found)
    assert (gain.ours, gain.paper, gain.what) == (1.5, infinite_llm.AGAINST_MANY, "Llama-2-7B, t0")
    (fewer,) = infinite_llm.gains([cell(many, 50.0, instances=8), cell(ours, 60.0, instances=8)])
    assert (fewer.ours, fewer.paper, fewer.what) == (1.2, None, "Llama-2-7B, t0, 8 instances")


def test_figure_5_has_the_batches_of_the_paper() -> None:
    found = {(each.group, each.what): each for each in infinite_llm.figure_5()}
    assert {what: each.ours for (group, what), each in found.items() if group == "batch, proactive"} == {
        "A": pytest.approx(131, rel=0.08),
        "B": 443,
        "C": 454,
        "D": 156,
    }
    sums = [each.ours for (group, _), each in found.items() if group == "busy devices, in sum"]
    assert sums[2] > sums[0] > sums[1], "proactive over the original over passive"


def test_the_link_that_figure_1a_implies_gives_its_rate() -> None:
    assert infinite_llm.implied() > 646e6
    assert {each.group for each in infinite_llm.figure_4c()} == {
        "ship the K/V",
        "ship the query, 2 devices",
        "ship the query, 4 devices",
    }


def test_more_masters_pay_in_large_batches_only() -> None:
    found = {(each.group, each.what): each.ours for each in loongserve.scaling()}
    assert found["scale up, 4 masters", "1024 x 10"] < found["scale up, 2 masters", "1024 x 10"] < 0.8
    assert found["scale up, 4 masters", "1 x 200,000"] == 1.0


def test_speed_ups_are_over_each_other_system() -> None:
    found = [Row("ShareGPT", name, "requests/s", one(said), ours, PREDICTED) for name, said, ours in RATES]
    (gain,) = loongserve.speed_ups(found)
    assert (gain.what, gain.paper, gain.ours) == ("vLLM", (5.0, 5.0), 6.0)


RATES = (("LoongServe", 30.0, 24.0), ("vLLM", 6.0, 4.0))


def test_a_quick_run_writes_everything(tmp_path: Path) -> None:
    """And equal tables give equal figures."""
    first, again = tmp_path / "first", tmp_path / "again"
    main(["--quick", "--out", str(first)])
    written = {each.name for each in first.iterdir()}
    assert {"README.md", "figure-1a.csv", "figure-1a.svg", "gains-many.svg", "throughput-many.svg"} <= written
    shutil.copytree(first, again, ignore=shutil.ignore_patterns("*.svg", "README.md"))
    main(["--draw", "--out", str(again)])
    for name in written:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
        if name.endswith(".svg"):
            ET.fromstring((first / name).read_text(encoding="utf-8"))


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["figure"])
    assert "there is no part figure; there are: figures, many, one, loongserve" in capsys.readouterr().err


def test_the_page_is_made_of_the_tables_beside_it() -> None:
    assert (DOCS / "README.md").read_text(encoding="utf-8") == page.text(DOCS)
    assert {each.stem for each in DOCS.glob("*.svg")} == {name for _, _, figures in page.SECTIONS for name in figures}
