"""Associative recall, trained from scratch: linear attention of several feature maps beside softmax attention.

    python -m benchmarks.bench_linear_recall     (--smoke: a few steps, page in runs/smoke)

The task, the sizes and the recipe are those of bench_recall; the models differ in nothing but the attention of their
two layers. Rotary positions and projections are the same; a learned map adds its own weights. Each model's learning
rate is the best of three with one seed and fewer steps; the reported runs have other seeds. A finished run is kept in
runs/linear_recall and not repeated by the same code.
"""

from __future__ import annotations

import argparse

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
from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, write_result
from benchmarks.training_runs import ROOT, Result, attention_fields, choose_and_repeat, known_kind


RUNS = ROOT / "runs" / "linear_recall"
STEPS, CHOICE_STEPS = 1500, 400  # of a reported run, and at most of one that chooses the rate
SOFTMAX = "softmax"
MAPS = ("hedgehog", "hedgehog, window 16", "elu", "cosformer")


def main() -> None:
    """Choose the rates, run the seeds, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"budget of every run (default {STEPS})")
    parser.add_argument("--maps", nargs="+", type=known_kind, default=MAPS, help=f"default: {'; '.join(MAPS)}")
    parser.add_argument("--smoke", action="store_true", help="a few steps, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    smoke: dict = SMOKE_SIZES if arguments.smoke else {}

    def train(model: str, rate: float, seed: int) -> Result:
        steps = min(CHOICE_STEPS, arguments.steps) if seed == SELECTION_SEED else arguments.steps
        settings = Settings(model, rate, seed, **{"steps": steps, **smoke})
        return run(settings, model_fields(model), None if arguments.smoke else RUNS)

    chosen, results = choose_and_repeat(
        [SOFTMAX, *arguments.maps], LEARNING_RATES, (SELECTION_SEED, SEEDS), train, rank
    )
    title = (
        f"Linear attention from scratch: associative recall, vocabulary {TASK['vocab_size']}, length {TASK['length']}"
    )
    path = write_result(
        "linear_recall",
        title,
        command_line("bench_linear_recall"),
        page(chosen, results),
        {"curve": learning_curves(results)},
        folder=SMOKE_RESULTS if arguments.smoke else RESULTS,
    )
    print(path.read_text())


def model_fields(kind: str) -> dict:
    """Config fields of softmax attention, or of linear attention by the name of its map, of four heads."""
    return {**attention_fields(kind, 2), "num_attention_heads": 4}


def page(chosen: dict[str, list], results: dict[str, list]) -> list[str]:
    """The result, the seeds and the choice of the learning rate."""
    return [
        f"{recipe_line(results[SOFTMAX][0])} Over softmax: accuracy in percent of that of softmax attention with the "
        f"same seed, which saw the same sequences. Rows are named by the feature map of linear attention; a window: "
        f"so many nearest tokens keep softmax attention.",
        "",
        *summary_table(results, SOFTMAX),
        "",
        *run_tables(chosen, results),
    ]


if __name__ == "__main__":
    main()
