"""The benchmarks of linear attention from scratch and of its properties: what their numbers are, and whose."""

import argparse

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_linear_lm, bench_linear_properties, bench_linear_recall, recall, training_runs
from hyena_hf import HyenaConfig, HyenaForCausalLM


def short_recall(name, fields):
    return recall.run(
        recall.Settings(name, 1e-3, 1, steps=2, batch_size=4, evaluate_every=1, held_out=5, final=5), fields
    )


def test_recall_with_linear_attention_is_counted_against_softmax_of_the_same_seed():
    runs = {kind: [short_recall(kind, bench_linear_recall.model_fields(kind))] for kind in ("softmax", "hedgehog")}
    runs["softmax"][0]["accuracy"], runs["hedgehog"][0]["accuracy"] = 0.8, 0.6
    (row,) = (line for line in bench_linear_recall.page(runs, runs) if line.startswith("| hedgehog | 1"))
    assert "| 75.00% (75.00% to 75.00%) |" in row
    assert runs["hedgehog"][0]["parameters"] > runs["softmax"][0]["parameters"]


def test_the_rate_warms_up_and_ends_at_its_fraction():
    schedule = {"steps": 1000, "warmup": 100, "final_rate": 0.05}
    assert training_runs.rate_factor(0, **schedule) == pytest.approx(0.01)
    assert training_runs.rate_factor(99, **schedule) > 0.97
    assert training_runs.rate_factor(1000, **schedule) == pytest.approx(0.05)


def test_the_best_rate_of_the_choosing_seed_is_that_of_the_reported_ones():
    asked = []

    def run(model, rate, seed):
        asked.append((model, rate, seed))
        return {"loss": abs(rate - 2)}

    chosen, results = training_runs.choose_and_repeat(["a"], (1, 2, 3), (0, (7, 8)), run, lambda r: r["loss"])
    assert asked == [("a", 1, 0), ("a", 2, 0), ("a", 3, 0), ("a", 2, 7), ("a", 2, 8)]
    assert len(chosen["a"]) == 3
    assert results["a"] == [{"loss": 0}, {"loss": 0}]


def test_a_finished_run_is_repeated_only_when_something_that_it_was_made_from_has_changed(tmp_path):
    counts = []

    def run():
        counts.append(1)
        return {"value": len(counts)}

    for code in ("old", "old", "new"):
        result = training_runs.kept(tmp_path / "runs" / "one.json", {"code": code}, run)
    assert result == {"code": "new", "value": 2}


def test_a_kind_of_attention_names_its_map_and_its_window():
    assert training_runs.attention_fields(training_runs.known_kind("elu"), 1) == {
        "layer_types": ["hedgehog"],
        "feature_map": "elu",
    }
    assert training_runs.attention_fields("hedgehog, window 16", 1)["linear_attention_window"] == 16
    for wrong in ("softmax", "hedgehog, window x", "hedgehogs"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no feature map"):
            training_runs.known_kind(wrong)


def short_text(seed=0):
    draw = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(seed))
    return bench_linear_lm.Text(draw, draw[:2], draw[2:])


@pytest.mark.parametrize("kind", ["softmax", "hedgehog, window 16", "elu"])
def test_the_language_models_of_a_page_see_every_row_once_and_learn(kind):
    settings = bench_linear_lm.Settings(kind, 1e-2, 1, steps=9, batch_size=2, looks=3)
    result = bench_linear_lm.trained(settings, short_text(), keep=False)
    assert [step for step, _ in result["curve"]] == [3, 6, 9]
    assert result["curve"][-1][1] < result["curve"][0][1]
    again = bench_linear_lm.trained(settings, short_text(), keep=False)
    assert again["heldout"] == result["heldout"]


def test_bits_per_byte_of_a_model_that_knows_nothing_are_eight():
    model = HyenaForCausalLM(HyenaConfig(**bench_linear_lm.SIZES, layer_types=["full_attention"] * 2))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert bench_linear_lm.bits_per_byte(model, short_text().train) == pytest.approx(8)


def test_a_model_with_a_bit_more_than_softmax_recovers_half_its_perplexity():
    assert bench_linear_lm.recovery({"heldout": 3.0}, {"heldout": 2.0}) == 0.5


def test_rank_correlations_are_those_of_scipy_ties_included():
    x, y = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)).unbind(0)
    y[:, ::2] = 0.0
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    found = bench_linear_properties.rank_correlation(x, y)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert bench_linear_properties.rank_correlation(x, torch.ones_like(x)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("causal", [True, False])
def test_properties_of_weights_are_those_of_their_definitions(causal):
    scores, others = torch.randn(2, 2, 3, 24, 24, dtype=torch.float64).unbind(0)
    hidden = torch.ones(24, 24).triu(1).bool() if causal else torch.zeros(24, 24).bool()
    softmax, ours = (x.masked_fill(hidden, -torch.inf).log_softmax(-1) for x in (scores, others))
    found = bench_linear_properties.properties(scores, ours, softmax, causal=causal)
    for logs, entropy in ((ours, found.entropy), (softmax, found.softmax_entropy)):
        expected = torch.distributions.Categorical(logits=logs.clamp(min=-1e9)).entropy().mean(dim=(0, 2))
        torch.testing.assert_close(entropy, expected)
    pairs = (torch.distributions.Categorical(logits=x.clamp(min=-1e9)) for x in (softmax, ours))
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(*pairs).mean(dim=(0, 2)))
    control = bench_linear_properties.properties(scores, softmax, softmax, causal=causal)
    torch.testing.assert_close(control.correlation, torch.ones(3, dtype=torch.float64))
    assert found.correlation.abs().max() < 0.5


def test_the_page_on_properties_measures_learned_maps_before_and_after_transfer():
    torch.manual_seed(0)
    sizes = {**bench_linear_lm.SIZES, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    rows = short_text().train
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    subject = bench_linear_properties.Subject("a Llama", model, [rows[:4]], [rows[4:]])
    plan = bench_linear_properties.SMOKE
    found = bench_linear_properties.measure_maps(subject, ("hedgehog", "elu"), [1], plan)
    before, after = (found["hedgehog", stage] for stage in ("identity", "after transfer"))
    assert after[0].kl.mean() < before[0].kl.mean()
    lines = bench_linear_properties.page(subject, found, [1], plan)
    assert "| softmax (control) | fixed | " in (text := "\n".join(lines))
    assert "| +0.000 | 0.000 | 0.000 | 1.000 | 1.000 |" in text
    assert sum(line.startswith("| ") for line in lines) == 6
    assert bench_linear_properties.entropy_plot(found).axes[0].lines
    assert bench_linear_properties.weights_plot(found).axes[0].lines
