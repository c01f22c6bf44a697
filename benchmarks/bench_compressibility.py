"""Penalties on long filters in training: what they cost a language model, and what its distillation gains.

    python -m benchmarks.bench_compressibility             (about 15 minutes on one core; goes on where it stopped)
    python -m benchmarks.bench_compressibility --smoke     (a minute, page in runs/smoke, numbers mean nothing)

A byte-level Hyena is trained on Python's standard library with no penalty, with `HankelPenalty` for 16 states and with
`RoughnessPenalty`, same steps, same rows, same initial weights for a seed; then distilled into 8, 16 and 32 states.
Everything but training is measured on modules that no run has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.distillation import HankelPenalty, RoughnessPenalty, distill
from training.data import (
    Document,
    PackedRows,
    module_name,
    pack_documents,
    shuffle_documents,
    split_documents,
    stdlib_documents,
)
from training.recipe import Recipe, train


PENALTIES = {
    "none": None,
    "Hankel, 0.1": HankelPenalty(0.1),
    "Hankel, 1": HankelPenalty(1.0),
    "roughness, 0.1": RoughnessPenalty(0.1),
    "roughness, 1": RoughnessPenalty(1.0),
}
STATES = 8, 16, 32


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    seeds: tuple[int, ...] = (0, 1)
    steps: int = 300
    batch_size: int = 8
    length: int = 256
    heldout_rows: int = 64
    hidden_size: int = 64


SMOKE = Plan(seeds=(0,), steps=10, length=80, heldout_rows=2, hidden_size=16)


@dataclass(frozen=True)
class Outcome:
    """One run: bits per held-out byte, and by states the bits and KL (nats) after distillation and the mean error."""

    bits: float
    distilled: dict[int, tuple[float, float, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, distil, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_compressibility", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    transformers_logging.set_verbosity_error()
    plan = SMOKE if options.smoke else Plan()
    rows, heldout = corpus(plan)
    root = Path("runs") / ("compressibility-smoke" if options.smoke else "compressibility")
    outcomes = {
        name: [run(plan, penalty, seed, rows, heldout, root / f"{name}-{seed}") for seed in plan.seeds]
        for name, penalty in PENALTIES.items()
    }
    folder = SMOKE_RESULTS if options.smoke else RESULTS
    command = command_line("bench_compressibility")
    print(
        write_result(
            "compressibility", "Filters trained to be distilled", command, page(plan, outcomes), folder=folder
        )
    )


def corpus(plan: Plan) -> tuple[PackedRows, PackedRows]:
    """Rows to train on, no more than the steps need, and held-out ones."""
    splits = split_documents(stdlib_documents(), group=module_name)
    count = plan.steps * plan.batch_size
    return (
        pack_documents(_first(splits.train, count * plan.length), plan.length).first(count),
        pack_documents(_first(splits.heldout, plan.heldout_rows * plan.length), plan.length).first(plan.heldout_rows),
    )


def _first(documents: Sequence[Document], limit: int) -> list[list[int]]:
    chosen: list[list[int]] = []
    for document in shuffle_documents(documents):
        chosen.append(list(document.text.encode()[: limit - sum(map(len, chosen))]))
    return [one for one in chosen if len(one) > 1]


def run(plan: Plan, penalty: Any, seed: int, rows: PackedRows, heldout: PackedRows, folder: Path) -> Outcome:
    """Train one model, or read what was trained, and distil it."""
    set_seed(seed)
    config = HyenaConfig(
        vocab_size=256,
        hidden_size=plan.hidden_size,
        num_hidden_layers=2,
        intermediate_size=2 * plan.hidden_size,
        max_position_embeddings=plan.length,
        initializer_range=0.06,
        short_conv_kernel=5,
    )
    model = HyenaForCausalLM(config)
    recipe = Recipe(
        steps=plan.steps, batch_size=plan.batch_size, learning_rate=2e-3, seed=seed, evaluate_every=1_000_000
    )
    train(model, rows, heldout, output_dir=folder, recipe=recipe, penalty=penalty)
    model.eval()
    ids = [token_rows(heldout)]
    distilled = {}
    for states in STATES:
        _, report = distill(model, state_size=states, calibration=ids)
        assert report.calibration is not None
        error = torch.cat([one.filters.relative_l2 for one in report.layers]).mean()
        bits = torch.tensor([report.calibration.perplexity_before, report.calibration.perplexity_after]).log2()
        distilled[states] = float(bits[1]), report.calibration.kl, float(error)
    return Outcome(float(bits[0]), distilled)


def token_rows(rows: PackedRows) -> Tensor:
    """Token ids (B, L), documents of a row one behind the other."""
    return torch.stack([torch.as_tensor(rows[index]["input_ids"]) for index in range(len(rows))])


def page(plan: Plan, outcomes: dict[str, list[Outcome]]) -> list[str]:
    """What was trained, and the table: means over seeds, values of each in brackets."""
    columns = ["penalty", "bits per byte"]
    columns += [f"{what}, {states} states" for states in STATES for what in ("bits", "KL", "relative l2")]
    rows = []
    for name, runs in outcomes.items():
        cells = [name, _spread([one.bits for one in runs], 4)]
        for states in STATES:
            columns_of_runs = zip(*(one.distilled[states] for one in runs), strict=True)
            cells += [_spread(list(values), digits) for values, digits in zip(columns_of_runs, (4, 3, 3), strict=True)]
        rows.append(cells)
    return [
        f"2 layers of width {plan.hidden_size}, {plan.length} taps; {plan.steps} steps of {plan.batch_size} rows, seeds "
        f"{', '.join(map(str, plan.seeds))}; {plan.heldout_rows} held-out rows. Means over seeds (each seed). KL in "
        f"nats a byte, from the undistilled model of the same run; relative l2 is the mean over filters.",
        "",
        *markdown_table(columns, rows),
    ]


def _spread(values: list[float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}g}" for value in values)
    return f"{mean(values):.{digits}g} ({each})"


if __name__ == "__main__":
    main()
