"""The benchmark of a linearised GPT-2: equal training, and numbers against softmax of the same seed."""

import pytest
import torch

from benchmarks import bench_linear_gpt2
from benchmarks.bench_linear_lm import Text


@pytest.fixture
def bench(tmp_path):
    rows = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    made = bench_linear_gpt2.Bench(Text(rows, rows[:2], rows[2:]), bench_linear_gpt2.SMOKE, tmp_path)
    made.base()
    return made


def test_a_way_starts_from_the_trained_weights_and_only_learned_maps_have_a_transfer(bench):
    softmax, learned, fixed = (
        bench.further(way, 1e-3, 1) for way in ("softmax", "hedgehog_softmax, window 16", "elu")
    )
    base = bench.base()
    assert softmax["start"] == softmax["transferred"] == pytest.approx(base["heldout"], abs=1e-9)
    assert learned["transferred"] != learned["start"]
    assert fixed["transferred"] == fixed["start"]
    assert [step for step, _ in learned["curve"]] == [1, 2, 3]
    assert bench.further("elu", 1e-3, 1)["cpu_seconds"] == fixed["cpu_seconds"]  # read, not run again


def test_recovery_is_against_the_softmax_model_with_the_same_further_training(bench):
    results = {way: [bench.further(way, 1e-3, seed) for seed in (1, 2)] for way in ("softmax", "elu")}
    for run, bits in zip(results["softmax"] + results["elu"], (1.0, 2.0, 2.0, 2.0), strict=True):
        run["heldout"] = bits
    lines = bench_linear_gpt2.page(bench.base(), results, results, bench)
    (row,) = (line for line in lines if line.startswith("| elu | 0.001 |") and "of 2" in line)
    assert "| 75.00% (50.00% to 100.00%) | 1 of 2 |" in row
