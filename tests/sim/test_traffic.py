"""Workloads: equal seeds give equal streams, lengths are as their sources say, files are read or refused."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest

from infinillm.errors import BadRequest
from infinillm.sim.traffic import Arrival, names, workload, write

SETS = sorted(names())


def drawn(name: str, count: int, seed: int = 0, rate: float = 1.0) -> list[Arrival]:
    return list(workload(name, rate=rate, seed=seed, count=count))


def quantiles(values: list[int], *shares: float) -> list[int]:
    ordered = sorted(values)
    return [ordered[int(share * len(ordered))] for share in shares]


@pytest.mark.parametrize("name", [*SETS, "t1+bursty", "sharegpt+on-off", "chat+bursty", "swings+bursty"])
def test_equal_seeds_give_equal_streams(name: str) -> None:
    once, again, other = (drawn(name, 300, seed=seed) for seed in (7, 7, 8))
    assert once == again
    assert once != other
    assert len(once) == 300
    assert all(a.at <= b.at for a, b in pairwise(once))
    assert all(a.prompt >= 1 and a.output >= 1 and a.at > 0 for a in once)


def test_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = drawn("t3", 200, rate=0.1), drawn("t3", 200, rate=10.0)
    assert [(a.prompt, a.output) for a in slow] == [(a.prompt, a.output) for a in fast]
    assert slow[-1].at == pytest.approx(100 * fast[-1].at)


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sharegpt", "sharegpt+bursty"])
def test_the_last_of_a_number_of_arrivals_comes_where_the_rate_says(name: str) -> None:
    assert drawn(name, 1, rate=4.0)[0].at == 0.25
    assert drawn(name, 1000, rate=4.0)[-1].at == 250.0


@pytest.mark.parametrize(("name", "cv", "within"), [("sharegpt", 1.0, 0.03), ("sharegpt+bursty", 3.0, 0.3)])
@pytest.mark.parametrize("count", [20_000, None])
def test_gaps_vary_as_much_as_they_should(name: str, cv: float, within: float, count: int | None) -> None:
    times = [a.at for a in islice(workload(name, rate=5.0, seed=3, count=count), 20_000)]
    gaps = [b - a for a, b in pairwise([0.0, *times])]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, abs=within)


def test_pinned_arrivals_are_spread_over_all_of_the_time() -> None:
    """Given the last, the others of a Poisson process are uniform: half of them come in the first half."""
    halves = [sum(a.at < 50 for a in drawn("sharegpt", 100, seed=seed)) for seed in range(200)]
    assert statistics.fmean(halves) == pytest.approx(49.5, abs=1.2)
    assert statistics.stdev(halves) == pytest.approx(5.0, abs=0.9)


def test_phases_have_long_silences_and_the_rate_on_average() -> None:
    arrivals = drawn("sharegpt+on-off", 40_000, rate=5.0)
    assert 40_000 / arrivals[-1].at == pytest.approx(5.0, rel=0.25)
    silent = [b.at - a.at for a, b in pairwise(arrivals) if b.at - a.at > 10]
    assert statistics.fmean(silent) == pytest.approx(100, rel=0.35)
    assert sum(silent) / arrivals[-1].at == pytest.approx(0.72, abs=0.1)


# --- how long --------------------------------------------------------------------------------------------------------


def test_sharegpt_has_the_quantiles_of_its_records() -> None:
    arrivals = drawn("sharegpt", 20_000)
    prompts, outputs = [a.prompt for a in arrivals], [a.output for a in arrivals]
    assert statistics.fmean(prompts) == pytest.approx(897, rel=0.03)
    assert quantiles(prompts, 0.25, 0.5, 0.75, 0.9, 0.95) == pytest.approx([398, 822, 1346, 1826, 2021], rel=0.05)
    assert statistics.fmean(outputs) == pytest.approx(233, rel=0.04)
    assert quantiles(outputs, 0.25, 0.5, 0.75, 0.9) == pytest.approx([22, 137, 384, 602], rel=0.1)
    assert (max(prompts), max(outputs)) == (2238, 993)


@pytest.mark.parametrize(
    ("a", "mean", "median", "p90"), [("1.0", 20_100, 1380, 73_900), ("1.2", 7900, 160, 17_300), ("1.4", 2500, 51, 2000)]
)
def test_zipf_lengths_are_as_the_exact_sums_say(a: str, mean: float, median: float, p90: float) -> None:
    prompts = [arrival.prompt for arrival in drawn(f"zipf-{a}", 40_000)]
    assert statistics.fmean(prompts) == pytest.approx(mean, rel=0.08)
    assert quantiles(prompts, 0.5, 0.9) == pytest.approx([median, p90], rel=0.12)
    assert max(prompts) <= 200_000


@pytest.mark.parametrize(
    ("name", "longest"),
    [(f"t{n}", k * 1000) for n, k in enumerate((60, 60, 60, 200, 300, 500, 800, 1200, 2000))],
)
def test_traces_keep_their_ranges(name: str, longest: int) -> None:
    lengths = [a.prompt + a.output for a in drawn(name, 20_000)]
    assert 0.95 * longest <= max(lengths) <= longest
    assert min(lengths) < 400


def test_the_first_three_traces_differ_in_standard_deviation() -> None:
    found = [statistics.stdev(a.prompt + a.output for a in drawn(f"t{n}", 50_000)) for n in range(3)]
    assert found[0] > 1.04 * found[1] > 1.3 * found[2]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("l-eval-like", 2700, 210_500), ("lv-eval-like", 15_100, 497_300), ("mixed-like", 6, 497_300)],
)
def test_sets_that_are_like_published_ones_keep_the_published_ranges(name: str, low: int, high: int) -> None:
    prompts = [a.prompt for a in drawn(name, 20_000)]
    assert low <= min(prompts) <= 1.02 * low + 1
    assert 0.5 * high <= max(prompts) <= high


def test_a_third_of_mixed_is_of_each_set() -> None:
    prompts = [a.prompt for a in drawn("mixed-like", 20_000)]
    assert sum(n <= 2238 for n in prompts) / len(prompts) == pytest.approx(1 / 3, abs=0.01)


# --- swings ----------------------------------------------------------------------------------------------------------


def halves(arrivals: list[Arrival], seconds: float = 30.0) -> tuple[list[Arrival], list[Arrival]]:
    """Those of the first phases, and those of the second."""
    return tuple([a for a in arrivals if a.at // seconds % 2 == which] for which in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["swings", "long-and-swings"])
def test_phases_of_answers_alternate_with_phases_of_documents(name: str) -> None:
    answers, documents = halves(drawn(name, 22_000, rate=11.0))
    assert len(answers) / len(documents) == pytest.approx(10, rel=0.1)
    usual = [a for a in answers if a.prompt <= 2000]
    assert len(usual) >= 0.99 * len(answers) and all(50 <= a.output <= 2000 for a in usual)
    assert statistics.median(a.prompt for a in usual) < 200 and statistics.median(a.output for a in usual) > 400
    assert min(a.prompt for a in documents) >= 2700
    assert statistics.median(a.prompt for a in documents) > 10_000
    assert statistics.median(a.output for a in documents) < 100


def test_a_few_contexts_of_long_and_swings_are_very_long_in_every_phase() -> None:
    both = halves(drawn("long-and-swings", 40_000, rate=11.0))
    found = [[a.prompt for a in those if a.prompt >= 200_000] for those in both]
    shares = [len(long) / len(those) for long, those in zip(found, both, strict=True)]
    assert shares == [pytest.approx(0.005, rel=0.25), pytest.approx(0.05, rel=0.25)]
    assert max(max(long) for long in found) <= 500_000
    assert not any(a.prompt > 210_500 for a in drawn("swings", 20_000))


@pytest.mark.parametrize("name", ["swings", "long-and-swings+bursty"])
@pytest.mark.parametrize("rate", [0.5, 7.0])
def test_swings_have_the_rate_over_all_phases(name: str, rate: float) -> None:
    times = [a.at for a in drawn(name, round(rate * 60 * 80), rate=rate)]
    assert times[-1] == pytest.approx(60 * 80)
    assert all(a <= b for a, b in pairwise(times))


def test_the_moments_of_a_phase_are_as_even_as_those_of_other_sets() -> None:
    answers, _ = halves(drawn("swings", 30_000, rate=11.0))
    gaps = [b.at - a.at for a, b in pairwise(answers) if b.at - a.at < 15]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.05)


# --- sessions --------------------------------------------------------------------------------------------------------


def test_a_turn_begins_with_all_that_was_said() -> None:
    last: dict[str, Arrival] = {}
    for arrival in drawn("chat", 5000, rate=2.0):
        before = last.get(arrival.session)
        assert arrival.turn == (before.turn + 1 if before else 0)
        assert arrival.shared == (before.prompt + before.output if before else 0)
        assert arrival.shared < arrival.prompt
        assert before is None or before.at <= arrival.at
        assert arrival.prompt + arrival.output <= 32_000
        last[arrival.session] = arrival
    assert sum(arrival.turn > 0 for arrival in last.values()) > 500


def test_sessions_have_as_many_turns_and_requests_as_they_should() -> None:
    arrivals = drawn("chat", 40_000, rate=5.0)
    assert 20_000 / (arrivals[-1].at - arrivals[20_000].at) == pytest.approx(5.0, rel=0.1)
    early = {a.session for a in arrivals[:20_000] if a.turn == 0}
    assert sum(a.session in early for a in arrivals) / len(early) == pytest.approx(5.0, rel=0.1)
    times = {(a.session, a.turn): a.at for a in arrivals}
    thought = [at - times[session, turn - 1] for (session, turn), at in times.items() if turn]
    assert statistics.fmean(thought) == pytest.approx(60, rel=0.05)


# --- laziness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t8", "sharegpt+bursty", "sharegpt+on-off", "chat", "swings"])
def test_the_first_of_a_thousand_million_is_there_at_once(name: str) -> None:
    for count in (10**9, None):
        stream = workload(name, rate=1000.0, seed=0, count=count)
        assert isinstance(stream, Iterator)
        assert [a.at < 3600 for a in islice(stream, 3)] == [True] * 3


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t3", "chat"])
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    arrivals = drawn(name, 200)
    path = tmp_path / "trace.jsonl"
    assert write(path, arrivals) == 200
    assert drawn(str(path), 1000, rate=0.0) == arrivals
    assert list(workload(str(path), rate=0.0, seed=1, count=None)) == arrivals
    assert drawn(str(path), 5, rate=0.0) == arrivals[:5]


def test_a_file_can_be_scaled_to_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_len,output_len,ttft_s\n0,5,1,0.1\n1.5,6,2,0.1\n6,7,3,0.1\n9,8,4,0.1\n")
    kept = [Arrival(0.0, 5, 1), Arrival(1.5, 6, 2), Arrival(6.0, 7, 3), Arrival(9.0, 8, 4)]
    assert drawn(str(path), 9, rate=0.0) == kept
    assert drawn(str(path), 9, rate=2.0)[-1].at == pytest.approx(4 / 2)
    assert [a.at for a in drawn(str(path), 3, rate=1.0)] == pytest.approx([0, 0.75, 3])  # three end at 3 / 1


@pytest.mark.parametrize(
    ("file", "text", "field", "says"),
    [
        ("a.csv", "arrival_s,prompt_len\n0,1\n", "output_len", "line 1"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,1,1\n1,x,1\n", "prompt_len", "line 3"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,1,0\n", "output_len", "line 2"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,1\n", "output_len", "line 2"),
        ("a.csv", "arrival_s,prompt_len,output_len\n5,1,1\n4,1,1\n", "arrival_s", "line 3"),
        ("a.csv", "arrival_s,prompt_len,output_len\nnan,1,1\n", "arrival_s", "line 2"),
        ("a.jsonl", '{"at": 0, "prompt": 1, "output": 1}\n{"at": 1, "prompt": 1}\n', "output", "line 2"),
        ("a.jsonl", '{"at": 0, "prompt": 1.5, "output": 1}\n', "prompt", "line 1"),
        ("a.jsonl", '{"at": 0, "prompt": true, "output": 1}\n', "prompt", "line 1"),
        ("a.jsonl", '{"at": -1, "prompt": 1, "output": 1}\n', "at", "line 1"),
        ("a.jsonl", '{"at": 0, "prompt": 1, "output": 1}\n{"at"\n', "trace", "line 2"),
        ("a.jsonl", "[]\n", "trace", "line 1"),
        (
            "a.jsonl",
            '{"at": 0, "prompt": 1, "output": 1, "session": "s", "turn": 1, "shared": 2}\n',
            "shared",
            "line 1",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_field(
    file: str, text: str, field: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_text(text)
    with pytest.raises(BadRequest, match=says) as refused:
        list(workload(str(path), rate=0.0, seed=0, count=None))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("name", "rate", "count", "field"),
    [
        ("t9", 1.0, None, "trace"),
        ("t1+often", 1.0, None, "trace"),
        ("nowhere.csv", 1.0, None, "trace"),
        ("t1", 0.0, None, "rate"),
        ("t1", -1.0, None, "rate"),
        ("t1", math.inf, None, "rate"),
        ("t1", 1.0, 0, "count"),
    ],
)
def test_a_bad_wish_is_refused_before_anything_is_drawn(name: str, rate: float, count: int | None, field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        workload(name, rate=rate, seed=0, count=count)
    assert refused.value.field == field


def test_a_file_without_times_cannot_be_scaled(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"at": 0, "prompt": 1, "output": 1}\n')
    with pytest.raises(BadRequest, match="scaled") as refused:
        workload(str(path), rate=1.0, seed=0, count=None)
    assert refused.value.field == "rate"
