"""Penalties on long filters in training: what they cost a language model, and what its distillation gains.

    python -m benchmarks.bench_compressibility             (about 15 minutes on one core; goes on where it stopped)
    python -m benchmarks.bench_compressibility --smoke     (a minute, page in runs/smoke, numbers mean nothing)

A byte-level Hyena is trained on Python's standard library with no penalty, with `HankelPenalty` for 16 states and with
`RoughnessPenalty`, same steps, same rows, same initial weights for a seed; then distilled into 8, 16 and 32 states.
Everything but training is measured on modules that no run has seen.
"""

from __future__ import annotations

import argparse
import itertools
import math
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
from hyena_hf.distillation import HankelPenalty, RoughnessPenalty, compare, distill, input_spectra
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
    lines = [*page(plan, outcomes), *weighting(plan, rows, heldout, root)]
    print(write_result("compressibility", "Filters trained to be distilled", command, lines, folder=folder))


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
        student, report = distill(model, state_size=states)
        after = compare(model, student, ids)
        error = torch.cat([one.filters.relative_l2 for one in report.layers]).mean()
        distilled[states] = math.log2(after.perplexity_after), after.kl, float(error)
    return Outcome(math.log2(compare(model, model, ids).perplexity_before), distilled)


def weighting(plan: Plan, rows: PackedRows, heldout: PackedRows, root: Path) -> list[str]:
    """Fits of the models without a penalty, for the inputs that filters have on training rows and for white ones."""
    calibration, ids = token_rows(rows.first(plan.heldout_rows)), [token_rows(heldout)]
    cells: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for seed in plan.seeds:
        model: Any = HyenaForCausalLM.from_pretrained(root / f"none-{seed}" / "model").eval()
        spectra = input_spectra(model, [calibration])
        for states, weighted in itertools.product((4, *STATES[:2]), (False, True)):
            student, report = distill(model, state_size=states, calibration=calibration, weighted=weighted)
            l2 = torch.cat([one.filters.relative_l2 for one in report.layers]).mean()
            heard = output_errors(model, student, spectra).mean()
            key = "weighted" if weighted else "unweighted", states
            cells.setdefault(key, []).append((compare(model, student, ids).kl, float(heard), float(l2)))
    table = [
        (states, name, *(_spread(list(values), 3) for values in zip(*found, strict=True)))
        for (name, states), found in cells.items()
    ]
    return [
        "",
        "## Weighted fits",
        "",
        f"`distill(..., weighted=True)` on the models without a penalty; spectra from {plan.heldout_rows} rows of the "
        f"training text, KL on the held-out ones. Error of outputs: relative RMS for those spectra without "
        f"frequency 0, mean over filters. Means over seeds (each seed).",
        "",
        *markdown_table(["states", "fit", "KL", "error of outputs", "relative l2"], table),
    ]


def output_errors(model: Any, student: Any, spectra: dict[int, Tensor]) -> Tensor:
    """Relative root mean square error of the output of each filter for inputs of such spectra, lag 0 left out."""
    length, found = model.config.max_position_embeddings, []
    for layer, spectrum in spectra.items():
        h, fit = (one.model.layers[layer].mixer.filter(length)[0, :, 1:].double() for one in (model, student))
        energy = [torch.fft.rfft(x, n=2 * (spectrum.shape[1] - 1)).abs().square() for x in (h - fit, h)]
        error, total = ((one * spectrum)[:, 1:-1].sum(dim=1) for one in energy)
        found.append((error / total).sqrt().detach())
    return torch.cat(found)


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
        f"2 layers of width {plan.hidden_size}, {plan.length} taps; {plan.steps} steps of {plan.batch_size} rows, "
        f"seeds {', '.join(map(str, plan.seeds))}; {plan.heldout_rows} held-out rows. Means over seeds (each seed). "
        f"KL in nats a byte, from the undistilled model of the same run; relative l2 is the mean over filters.",
        "",
        *markdown_table(columns, rows),
    ]


def _spread(values: list[float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}g}" for value in values)
    return f"{mean(values):.{digits}g} ({each})"


if __name__ == "__main__":
    main()
