"""The page on SmolLM2: maps are judged at their best rates, ratios are to the original, missing runs leave no rows."""

import argparse

import pytest

from benchmarks.bench_linear_smollm2 import flags_of, page, plans, ratio
from hyena_hf.feature_maps import FEATURE_MAPS


OPTIONS = argparse.Namespace(
    model="model", steps=40, transfer_steps=6, map_steps=9, layers=[3, 5], length=64, rows=2, dtype="bfloat16"
)


def result(trained, softmax=10.0):
    of = {"softmax": softmax, "converted": 3 * softmax, "window": 4 * softmax, "linear": 5 * softmax}
    perplexity = {"transferred": {"validation": of, "held-out": of}}
    if trained is not None:
        after = {"converted": trained * softmax, "window": 9 * softmax, "linear": 8 * softmax}
        perplexity["trained"] = {"validation": after, "held-out": {**after, "converted": trained * softmax + 1}}
    return {"perplexity": perplexity, "commit": "abc", "tokens": 640}


def test_every_map_has_three_rates_and_only_what_learns_is_transferred():
    maps = plans(OPTIONS)["maps"]
    assert len(maps) == 3 * len(FEATURE_MAPS)
    assert {plan.steps + plan.transfer_steps for plan in maps} == {9}
    assert {plan.feature_map for plan in maps if plan.transfer_steps} == {
        *("hedgehog", "hedgehog_softmax", "hedgehog_joint_softmax", "relu")
    }


def test_the_window_alone_sees_as_many_tokens_as_the_hybrid(tmp_path):
    made = plans(OPTIONS)
    assert made["window"][0].steps == made["hybrid"][0].tokens == 46
    flags = flags_of(made["layer"][1], OPTIONS, tmp_path)
    assert (flags.layers, flags.window, flags.steps, flags.transfer_steps) == ([5], 0, 0, 6)


def test_a_map_is_judged_at_the_rate_that_validation_chooses():
    made = plans(OPTIONS)
    runs = [(plan, result(value)) for plan, value in zip(made["maps"][:3], (1.5, 1.2, 1.4), strict=True)]
    results = {"layer": [(made["layer"][0], result(None))], "hybrid": [], "window": [], "maps": runs}
    text = "\n".join(page(results, OPTIONS))
    assert f"| {made['maps'][1].rate:g} | 3.00 | 1.300 |" in text  # held-out has a ratio of its own
    assert "| layer-3 | 640 | held-out | transferred | 3.000 | 4.000 | 5.000 | abc |" in text
    assert "window alone, on as many" not in text
    assert ratio(result(None), "trained", "validation", "converted") is None
    assert ratio(result(1.2), "trained", "held-out", "converted") == pytest.approx(1.3)
