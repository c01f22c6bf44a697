"""The benchmark of distilled models: its controls are what the page says, and cost or err as much as they should."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bench_distilled import (
    SEEDS,
    SHORT,
    SMOKE,
    Row,
    Trained,
    compare,
    far_sequences,
    page,
    perplexity,
    plot,
    shortened,
    white_error,
    whole_rows,
    with_taps,
)
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.distillation import distill


LENGTH = 64


def make_model(heads=None):
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, hidden_size=8, num_hidden_layers=2, intermediate_size=16, initializer_range=0.2)
    return HyenaForCausalLM(HyenaConfig(**sizes, num_heads=heads, max_position_embeddings=LENGTH)).eval()


IDS = torch.arange(LENGTH).remainder(12)[None]


def first_logit(model, ids=IDS):
    with torch.no_grad():
        return float(model(ids, use_cache=False).logits[0, -1, 0])


def test_a_question_is_about_a_key_that_is_far_away():
    task = {"vocab_size": 10, "length": 48}
    sequences = far_sequences(np.random.default_rng(0), task, 30)
    assert sequences.shape == (30, 51)
    for *before, question, _ in sequences.tolist():
        last_shown = max(place for place, token in enumerate(before) if token == question)
        assert len(before) - last_shown > SHORT


@pytest.mark.parametrize("heads", [None, 2])
def test_taps_that_are_not_changed_leave_the_model_as_it_was(heads):
    model = make_model(heads)
    assert first_logit(with_taps(model, lambda _, h: h)) == pytest.approx(first_logit(model), abs=1e-6)
    assert first_logit(with_taps(model, lambda _, h: 2 * h)) != pytest.approx(first_logit(model), abs=1e-3)


@pytest.mark.parametrize("heads", [None, 2])
def test_white_error_has_the_size_of_the_fit_and_spares_lag_0(heads):
    model = make_model(heads)
    h, errors = model.model.layers[1].mixer.filter(LENGTH), [torch.zeros(0), torch.linspace(0.1, 0.8, heads or 8)]
    noisy = white_error(errors, seed=0)(1, h)
    torch.testing.assert_close((noisy - h)[0, :, 1:].norm(dim=-1) / h[0, :, 1:].norm(dim=-1), errors[1])
    assert torch.equal(noisy[..., 0], h[..., 0])


@pytest.mark.parametrize("heads", [None, 2])
def test_the_numbers_of_the_page_are_what_caches_hold(heads, tmp_path):
    trained = Trained(make_model(heads), tmp_path, IDS, first_logit)
    rows = compare(trained, SMOKE.states, SMOKE.draws)
    student, _ = distill(trained.model, state_size=4)
    caches = {
        name: model(torch.zeros(1, LENGTH, dtype=int)).past_key_values
        for name, model in {"distilled": student, "original": trained.model}.items()
    }
    held = {name: cache.layers[0].histories[1].nbytes() // 4 for name, cache in caches.items()}
    assert held["distilled"] == rows["distilled", 4].numbers
    assert held["original"] == rows["original", 0].numbers // (LENGTH - 1) * LENGTH
    assert rows["first taps", 4].numbers <= rows["distilled", 4].numbers
    assert rows["no taps", 0].error == 1


def test_a_score_is_not_counted_twice(tmp_path):
    calls = []
    trained = Trained(make_model(), tmp_path, IDS, lambda model, _: calls.append(model) or 1.0)
    rows = [shortened(trained, 8) for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(calls) == 1


def test_perplexity_is_that_of_whole_rows():
    model = make_model()
    rows = whole_rows([bytes(range(10)), b"ab", bytes(range(5))], 5)
    assert rows.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    with torch.no_grad():
        loss = model(rows, labels=rows, use_cache=False).loss
    assert perplexity(model, rows) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_the_page_counts_the_seeds_that_meet_a_goal(tmp_path):
    rows = compare(Trained(make_model(), tmp_path, IDS, first_logit), SMOKE.states, SMOKE.draws)
    scores = {"original": 10.0, "distilled": 10.01, "first taps": 10.2, f"first {SHORT} taps": 10.1}
    good = {key: Row(row.numbers, row.error, scores.get(key[0], 11.0)) for key, row in rows.items()}
    bad = {key: row._replace(score=11.0) if key[0] == "distilled" else row for key, row in good.items()}
    results = {name: [good] * (len(SEEDS) - 1) + [bad] for name in ("plain", "MultiHyena", "recall")}
    text = "\n".join(page(results, SMOKE))
    assert "plain: perplexity rises by at most 0.5%: 2 states +3.400% (+0.100% to +10.000%) (2 of 3)" in text
    assert (
        "plain: lower perplexity than with the first taps of equal memory: 2 states (2 of 3); 4 states (2 of 3)"
        in text
    )
    assert str(Path.cwd()) not in text
    assert len(plot(results).axes) == 3
