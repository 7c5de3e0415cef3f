"""Each sampling parameter, seeds, batches, and the distributions they leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.request import Sampling
from infinillm.errors import BadRequest
from infinillm.model import sampler
from infinillm.model.sampler import Row, check, sample, score, uniform

V = 50


def row(tokens: tuple[int, ...] = (), produced: int = 0, seed: int = 0, eos: tuple[int, ...] = (), **kw: Any) -> Row:
    return Row(Sampling(**{"max_tokens": 1000, "temperature": 0.0, **kw}), tokens, produced, seed, eos)


def random_logits(rows: int, vocab: int = V, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def ladder(*values: float) -> torch.Tensor:
    """One row of log-probabilities: the given ones, the rest impossible in practice."""
    logits = torch.full((1, V), -50.0)
    logits[0, : len(values)] = torch.tensor(values).log()
    return logits


def seen(logits: torch.Tensor, draws: int = 400, temperature: float = 1.0, **kw: Any) -> dict[int, float]:
    """Which tokens come up, and how often, over draws that differ in seed alone."""
    rows = [row(seed=seed, temperature=temperature, **kw) for seed in range(draws)]
    tokens = [choice.token for choice in sample(logits.expand(draws, -1), rows)]
    return {token: tokens.count(token) / draws for token in sorted(set(tokens))}


def test_greedy_is_argmax_and_leaves_logits_alone() -> None:
    logits = random_logits(9)
    before = logits.clone()
    assert [c.token for c in sample(logits, [row()] * 9)] == logits.argmax(-1).tolist()
    sample(logits, [row((1, 2, 3), 1, temperature=1.0, repetition_penalty=2.0, logit_bias=((4, 9.0),))] * 9)
    assert torch.equal(logits, before)


def test_no_rows_is_no_choice() -> None:
    assert sample(torch.empty(0, V), []) == []
    assert score(torch.empty(0, V), [], []) == []


def test_rows_must_match_logits() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        sample(random_logits(3), [row()] * 2)


def test_distribution_is_the_softmax() -> None:
    found = seen(ladder(0.6, 0.3, 0.1), draws=4000)
    assert found == pytest.approx({0: 0.6, 1: 0.3, 2: 0.1}, abs=0.03)


def test_distribution_within_a_nucleus_is_renormalised() -> None:
    found = seen(ladder(0.5, 0.3, 0.15, 0.05), draws=4000, top_p=0.7)
    assert found == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    cold, hot = seen(ladder(0.6, 0.4), temperature=0.25), seen(ladder(0.6, 0.4), temperature=5.0)
    assert cold[0] == pytest.approx(0.6**4 / (0.6**4 + 0.4**4), abs=0.08)
    assert hot[0] == pytest.approx(0.52, abs=0.08)


@pytest.mark.parametrize("temperature", [1e-9, 1e-3])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(20)
    tokens = [c.token for c in sample(logits, [row(seed=n, temperature=temperature) for n in range(20)])]
    assert tokens == logits.argmax(-1).tolist()


def test_top_k() -> None:
    probabilities = (0.4, 0.3, 0.2, 0.1)
    assert set(seen(ladder(*probabilities), top_k=2)) == {0, 1}
    assert set(seen(ladder(*probabilities), top_k=1)) == {0}
    assert set(seen(ladder(*probabilities), top_k=V + 7)) == {0, 1, 2, 3}
    assert set(seen(ladder(*probabilities), top_k=-1)) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    probabilities = (0.4, 0.3, 0.2, 0.1)
    assert set(seen(ladder(*probabilities), top_p=0.35)) == {0}
    assert set(seen(ladder(*probabilities), top_p=0.45)) == {0, 1}
    assert set(seen(ladder(*probabilities), top_p=0.75)) == {0, 1, 2}
    assert set(seen(ladder(*probabilities), top_p=1e-9)) == {0}


def test_top_p_counts_what_top_k_left() -> None:
    assert set(seen(ladder(0.4, 0.3, 0.2, 0.1), top_k=3, top_p=0.7)) == {0, 1}  # 4/9, 7/9
    assert set(seen(ladder(0.4, 0.3, 0.2, 0.1), top_p=0.65)) == {0, 1}


def test_min_p() -> None:
    assert set(seen(ladder(0.5, 0.3, 0.15, 0.05), min_p=0.5)) == {0, 1}
    assert set(seen(ladder(0.5, 0.3, 0.15, 0.05), min_p=1.0)) == {0}
    assert set(seen(ladder(0.5, 0.3, 0.15, 0.05), min_p=0.2, top_k=2)) == {0, 1}


def test_a_nucleus_wider_than_the_shortlist_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(40, vocab=300, spread=0.5)
    rows = [row(seed=n, temperature=1.0, top_p=0.95) for n in range(40)]
    whole = sample(logits, rows)
    monkeypatch.setattr(sampler, "SHORTLIST", 4)
    assert sample(logits, rows) == whole
    assert len({c.token for c in whole}) > 20


def test_company_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mix of parameters in one batch, with tied scores, gives what each row gets alone."""
    monkeypatch.setattr(sampler, "SHORTLIST", 4)
    asked = [{}, {"top_k": 4}, {"top_k": 4, "top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.3}, {"min_p": 0.2}, {"top_k": 9}]
    rows = [row(seed=n, temperature=1.0, **kw) for n, kw in enumerate(asked * 8)]
    logits = random_logits(len(rows)).round()
    together = sample(logits, rows)
    assert together == [sample(logits[n : n + 1], [one])[0] for n, one in enumerate(rows)]


@given(st.integers(0, 2**32), st.floats(0.05, 0.999), st.integers(0, 60), st.floats(0.0, 0.5))
def test_a_draw_is_among_what_a_plain_definition_allows(seed: int, top_p: float, top_k: int, min_p: float) -> None:
    logits = random_logits(1, seed=seed % 1000)
    mass = logits[0].double().softmax(-1)
    mass = torch.where(mass >= min_p * mass.max() * (1 - 1e-9), mass, 0.0)
    order = mass.argsort(descending=True).tolist()[: top_k or V]
    total, heap, allowed = sum(float(mass[t]) for t in order), 0.0, set()
    for token in order:
        if heap >= top_p * total * (1 + 1e-9):
            break
        allowed.add(token)
        heap += float(mass[token])
    drawn = sample(logits, [row(seed=seed, temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)])[0].token
    assert drawn in allowed


def test_a_choice_depends_on_seed_and_count_alone() -> None:
    logits = random_logits(1, spread=0.3)
    mine = row((3, 4, 5), 2, seed=7, temperature=1.0)
    alone = sample(logits, [mine])[0].token
    others = [row(seed=n, temperature=0.7, top_p=0.5) for n in range(5)]
    batch = sample(torch.cat([random_logits(5, seed=3), logits]), [*others, mine])
    assert batch[5].token == alone
    assert sample(logits, [row((9, 9, 1, 2), 2, seed=7, temperature=1.0)])[0].token == alone
    changed = [sample(logits, [mine._replace(seed=seed)])[0].token for seed in range(20)]
    assert len(set(changed)) > 10
    later = [sample(logits, [mine._replace(produced=n, tokens=(1,) * n)])[0].token for n in range(20)]
    assert len(set(later)) > 10


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_uniform_is_uniform_for_any_seed(seed: int) -> None:
    drawn = torch.tensor([uniform(seed, n) for n in range(4000)], dtype=torch.float64)
    assert 0 <= drawn.min() < drawn.max() < 1
    assert torch.histc(drawn, 10, 0.0, 1.0).sub(400).abs().max() < 80
    assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 0.05


@pytest.mark.parametrize("luck", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("asked", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}])
def test_the_ends_of_luck_never_pick_the_impossible(luck: float, asked: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(sampler, "uniform", lambda seed, count: luck)
    logits = torch.full((1, V), float("-inf"))
    logits[0, 10:13] = torch.tensor([1.0, 0.9, 0.8])
    assert sample(logits, [row(temperature=1.0, **asked)])[0].token == {0.0: 10, 0.5: 11}.get(luck, 12)


def test_uniform_differs_between_neighbouring_seeds() -> None:
    a, b = (torch.tensor([uniform(seed, n) for n in range(1000)]) for seed in (5, 6))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1
    assert not set(a.tolist()) & set(b.tolist())


def test_repetition_penalty_looks_at_prompt_and_output() -> None:
    logits = torch.full((1, V), -9.0)
    logits[0, :4] = torch.tensor([4.0, 3.5, 3.0, -1.0])
    assert sample(logits, [row((0, 1, 7), 1, repetition_penalty=1.5)])[0].token == 2
    assert sample(logits, [row((0, 0, 0), 0, repetition_penalty=1.1)])[0].token == 0  # once, however often it was said
    below = torch.full((1, V), -9.0)
    below[0, :2] = torch.tensor([-1.0, -1.5])
    assert sample(below, [row((0,), 0, repetition_penalty=2.0)])[0].token == 1  # negative scores go further down


def test_presence_penalty_looks_at_output_once() -> None:
    logits = ladder(0.5, 0.2, 0.1)
    assert sample(logits, [row((0, 0, 0), 0, presence_penalty=2.0)])[0].token == 0  # a prompt is no output
    assert sample(logits, [row((0, 0, 0), 3, presence_penalty=0.9)])[0].token == 0  # log(0.5 / 0.2) is 0.916
    assert sample(logits, [row((0, 0, 0), 1, presence_penalty=0.95)])[0].token == 1


def test_frequency_penalty_counts_output() -> None:
    logits = ladder(0.5, 0.2, 0.1)
    assert sample(logits, [row((0, 0, 0), 1, frequency_penalty=0.5)])[0].token == 0
    assert sample(logits, [row((0, 0, 0), 2, frequency_penalty=0.5)])[0].token == 1


def test_negative_penalties_invite() -> None:
    assert sample(ladder(0.5, 0.4), [row((1,), 1, presence_penalty=-1.0)])[0].token == 1


def test_logit_bias() -> None:
    assert sample(ladder(0.9, 0.1), [row(logit_bias=((1, 5.0),))])[0].token == 1
    assert sample(ladder(0.9, 0.1), [row(logit_bias=((0, -100.0),))])[0].token == 1
    assert sample(ladder(0.9, 0.1), [row(logit_bias=((30, 100.0),), temperature=1.0)])[0].token == 30


def test_min_tokens_bans_end_and_stop_tokens_until_then() -> None:
    logits = ladder(0.6, 0.3, 0.1)
    early = row((9,), 1, eos=(0,), min_tokens=3, stop_token_ids=(1,))
    assert sample(logits, [early])[0].token == 2
    assert sample(logits, [early._replace(produced=2, tokens=(9, 9))])[0].token == 2
    assert sample(logits, [early._replace(produced=3, tokens=(9, 9, 9))])[0].token == 0


def test_adjusting_one_row_leaves_the_others() -> None:
    logits = random_logits(3)
    plain = [c.token for c in sample(logits, [row()] * 3)]
    mixed = sample(logits, [row(), row(logit_bias=((plain[1], -100.0),)), row()])
    assert [c.token for c in mixed][::2] == plain[::2]
    assert mixed[1].token != plain[1]


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(4)
    own = logits.log_softmax(-1)
    rows = [
        row(logprobs=3),
        row(),
        row(logprobs=0),
        row((1,), 1, temperature=0.5, top_k=2, logprobs=5, presence_penalty=1.0),
    ]
    choices = sample(logits, rows)
    assert (choices[1].logprob, choices[1].top) == (None, ())
    assert (len(choices[0].top), choices[2].top, len(choices[3].top)) == (3, (), 5)
    for n in (0, 2, 3):
        assert choices[n].logprob == pytest.approx(float(own[n, choices[n].token]), abs=1e-5)
    assert [token for token, _ in choices[3].top] == own[3].topk(5).indices.tolist()
    assert [value for _, value in choices[0].top] == pytest.approx(own[0].topk(3).values.tolist(), abs=1e-5)


def test_score_of_given_tokens() -> None:
    logits = random_logits(3)
    found = score(logits, [4, 5, 6], [0, 2, V + 5])
    assert [c.token for c in found] == [4, 5, 6]
    assert [len(c.top) for c in found] == [0, 2, V]
    assert math.isclose(found[1].logprob or 0, float(logits.log_softmax(-1)[1, 5]), abs_tol=1e-5)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    check(Sampling(logit_bias=((V - 1, 1.0),), stop_token_ids=(0,)), V, ())
    for bad, field in (
        (Sampling(logit_bias=((V, 1.0),)), "logit_bias"),
        (Sampling(stop_token_ids=(-1,)), "stop_token_ids"),
    ):
        with pytest.raises(BadRequest) as caught:
            check(bad, V, ())
        assert caught.value.field == field


def test_stops_that_leave_nothing_to_say_are_refused() -> None:
    every = tuple(range(1, V))
    check(Sampling(stop_token_ids=every), V, (0,))
    check(Sampling(stop_token_ids=every, min_tokens=1), V, ())
    with pytest.raises(BadRequest, match="no token to choose"):
        check(Sampling(stop_token_ids=every, min_tokens=1), V, (0,))
