"""How soon a small Hyena and an attention model of the same size learn associative recall.

    python -m benchmarks.bench_recall            (--smoke: a few steps, page in runs/smoke)

Every step sees fresh sequences of the published task (training/synthetic.py), so nothing can be memorised, and both
models see the same ones and take the same number of steps. Each model's learning rate is the best of three with one
seed; the reported runs have other seeds. A finished run is kept in runs/recall and not repeated by the same code.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.recall import (
    LEARNING_RATES,
    SEEDS,
    SELECTION_SEED,
    SMOKE_SIZES,
    TASK,
    Settings,
    learning_curves,
    rank,
    recipe_line,
    run,
    run_tables,
    summary_table,
)
from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import ROOT, attention_fields, choose_and_repeat


RUNS = ROOT / "runs" / "recall"
MODELS: dict[str, dict[str, Any]] = {
    "Hyena": {"sine_frequency": 1.0, "filter_num_bands": 2},
    "attention": {**attention_fields("softmax", 2), "num_attention_heads": 4},
}
# model, initializer_range, sine_frequency, rate, other; answers right (of 1,000), at step (the last one run)
TRIED = (
    ("Hyena", 0.02, 10, "2e-3", "constant rate", "92.5%", 1600),
    ("Hyena", 0.02, 10, "4e-3", "constant rate", "54.9%", 1300),
    ("Hyena", 0.02, 10, "1e-3", "constant rate, batch 64, stopped early", "52.8%", 400),
    ("Hyena", 0.1, 10, "4e-3", "constant rate", "41.5%", 1300),
    ("Hyena", 0.1, 10, "2e-3", "constant rate", "92.2%", 1300),
    ("Hyena", 0.1, 10, "1e-3", "constant rate", "95.0%", 1200),
    ("Hyena", 0.1, 10, "2e-3", "constant rate, modulation off", "98.6%", 1200),
    ("Hyena", 0.1, 10, "1e-3", "constant rate, 16 bands, stopped early", "71.8%", 300),
    ("Hyena", 0.1, 10, "1e-3", "cosine over 2,000 steps", "99.1%", 1900),
    ("Hyena", 0.1, 1, "1e-3", "constant rate", "99.1%", 1100),
    ("Hyena", 0.1, 1, "2e-3", "stopped when above 99% twice in a row; 98.9% of 10,000", "99.1%", 850),
    ("attention", 0.02, "", "2e-3", "constant rate, 1 head", "64.8%", 1900),
    ("attention", 0.02, "", "2e-3", "constant rate, 4 heads", "55.0%", 800),
    ("attention", 0.1, "", "4e-3", "constant rate, 1 head", "99.6%", 500),
    ("attention", 0.1, "", "1e-3", "constant rate, 2 heads", "100.0%", 400),
)


def main() -> None:
    """Choose the rates, run the seeds, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="budget of every run (default 2000)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--smoke", action="store_true", help="a few steps, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    sizes = {"steps": arguments.steps, **(SMOKE_SIZES if arguments.smoke else {})}
    chosen, results = choose_and_repeat(
        arguments.models,
        LEARNING_RATES,
        (SELECTION_SEED, SEEDS),
        lambda model, rate, seed: run(
            Settings(model, rate, seed, **sizes), MODELS[model], None if arguments.smoke else RUNS
        ),
        rank,
    )
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    title = f"Associative recall, vocabulary {TASK['vocab_size']}, length {TASK['length']}"
    figures = {"curve": learning_curves(results)}
    path = write_result("recall", title, command_line("bench_recall"), page(chosen, results), figures, folder=folder)
    print(path.read_text())


def page(chosen: dict[str, list], results: dict[str, list]) -> list[str]:
    """The result, the seeds, the choice of the learning rate and what was tried on the way."""
    return [
        recipe_line(next(iter(results.values()))[0]),
        "",
        *summary_table(results),
        "",
        *run_tables(chosen, results),
        "",
        "## Tried before commit 08d8e05 changed the initial residual branches (one seed each, batch 32)",
        "",
        *markdown_table(
            ["model", "initializer_range", "sine_frequency", "rate", "other", "accuracy", "at step"], TRIED
        ),
    ]


if __name__ == "__main__":
    main()
