"""Train small models on associative recall, the published task, and lay out what they reached.

Every step sees fresh sequences (training/synthetic.py), so nothing can be memorised; with one seed all models see the
same ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.training_runs import MODEL_CODE, Result, code_digest, kept, rate_factor, seed_curves, spread
from hyena_hf import HyenaConfig, HyenaForCausalLM
from training.parameter_groups import get_parameter_groups
from training.synthetic import next_token_examples, recall_sequences


TASK = {"vocab_size": 10, "length": 32}
GOAL = 0.99
HELD_OUT, FINAL = 1000, 10000  # sequences of the learning curve, and others that the result is counted on
SELECTION_SEED, SEEDS = 0, (1, 2, 3)
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
DATA_SEED = 1000  # training sequences of seed s come from [DATA_SEED, s]; held-out ones from DATA_SEED alone
CODE = code_digest(*MODEL_CODE, "training/parameter_groups.py", "training/synthetic.py")

SIZES = {
    "vocab_size": TASK["vocab_size"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "max_position_embeddings": TASK["length"] + 2,
    "initializer_range": 0.1,  # near 1 / sqrt(64); the published 0.02 is meant for wider models
}
SMOKE_SIZES = {"steps": 4, "evaluate_every": 2, "held_out": 20, "final": 20}


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int = 32
    evaluate_every: int = 50
    warmup: int = 100
    final_rate: float = 0.05  # fraction of the learning rate
    weight_decay: float = 0.1
    held_out: int = HELD_OUT
    final: int = FINAL


def run(settings: Settings, fields: Mapping[str, Any], folder: Path | None = None) -> Result:
    """The result of `train` together with what it came from.

    Args:
        settings: Of the run.
        fields: Of the config, beside `SIZES`.
        folder: Where a finished run is kept; None: nowhere.
    """
    made_from = {"settings": asdict(settings), "config": {**SIZES, **fields}, "code": CODE}
    config = HyenaConfig(**made_from["config"])
    if folder is None:
        return {**made_from, **train(config, settings)}
    name = f"{settings.model}-lr{settings.learning_rate:g}-seed{settings.seed}-steps{settings.steps}.json"
    return kept(folder / name, made_from, lambda: train(config, settings))


def train(config: HyenaConfig, settings: Settings) -> Result:
    """Train on fresh sequences.

    Returns:
        `parameters`, `curve` of (step, held-out accuracy, CPU seconds of the training steps so far), `accuracy` of the
        last weights on other sequences, `cpu_seconds` in all; `reached` and `reached_seconds`: step and CPU seconds at
        the first of two looks in a row that passed the goal, None without such.
    """
    torch.manual_seed(settings.seed)
    model = HyenaForCausalLM(config)
    groups = get_parameter_groups(model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    schedule = LambdaLR(
        optimizer,
        lambda step: rate_factor(step, steps=settings.steps, warmup=settings.warmup, final_rate=settings.final_rate),
    )
    data = np.random.default_rng([DATA_SEED, settings.seed])
    tests = np.random.default_rng(DATA_SEED)
    held_out, final = (
        recall_sequences(tests, examples=count, **TASK) for count in (settings.held_out, settings.final)
    )
    curve, seconds = [], 0.0
    name = f"{settings.model} rate {settings.learning_rate:g} seed {settings.seed}"
    bar = tqdm(range(1, settings.steps + 1), desc=name, mininterval=5)
    for step in bar:
        start = time.process_time()
        sequences = recall_sequences(data, examples=settings.batch_size, **TASK)
        training_step(model, optimizer, sequences)
        schedule.step()
        seconds += time.process_time() - start
        if step % settings.evaluate_every == 0:
            curve.append((step, answer_accuracy(model, held_out), seconds))
            bar.set_postfix(accuracy=f"{curve[-1][1]:.3f}")
    passed = [first for first, second in pairwise(curve) if min(first[1], second[1]) > GOAL]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve,
        "reached": passed[0][0] if passed else None,
        "reached_seconds": passed[0][2] if passed else None,
        "accuracy": answer_accuracy(model, final),
        "cpu_seconds": seconds,
    }


def training_step(model: HyenaForCausalLM, optimizer: torch.optim.Optimizer, sequences: torch.Tensor) -> None:
    """One step on the loss of all next tokens, gradients clipped to norm 1."""
    inputs, targets = next_token_examples(sequences)
    logits = model(inputs, use_cache=False).logits
    cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def answer_accuracy(model: HyenaForCausalLM, sequences: torch.Tensor) -> float:
    """Share of sequences whose last token is the most likely one after all others."""
    model.eval()
    right = 0
    for part in sequences.split(500):
        logits = model(part[:, :-1], use_cache=False, logits_to_keep=1).logits
        right += int((logits[:, -1].argmax(-1) == part[:, -1]).sum())
    model.train()
    return right / len(sequences)


def rank(result: Result) -> tuple[float, float]:
    """Above the goal first, the sooner the better; then by accuracy."""
    return (
        result["reached"] if result["reached"] and result["accuracy"] > GOAL else float("inf"),
        -result["accuracy"],
    )


def recipe_line(result: Result) -> str:
    """How all models of a page were trained, and what its columns mean."""
    settings = result["settings"]
    return (
        f"Two layers of width {SIZES['hidden_size']}, MLP {SIZES['intermediate_size']}; fresh sequences at every "
        f"step, batch {settings['batch_size']}, {settings['steps']:,} steps; AdamW, betas (0.9, 0.98), decay "
        f"{settings['weight_decay']}, warm-up {settings['warmup']} steps, cosine to {settings['final_rate']:.0%} of "
        f"the rate, clip 1.0, one thread. Accuracy: answers right of {settings['final']:,} at the end. Steps and CPU "
        f"seconds to 99%: the first of two looks in a row, {settings['evaluate_every']} steps apart, that found more "
        f"than 99% of {settings['held_out']:,} other held-out answers right. "
        f"Mean (lowest to highest) of seeds {', '.join(map(str, SEEDS))}."
    )


def summary_table(results: Mapping[str, list[Result]], base: str | None = None) -> list[str]:
    """A row for each model.

    Args:
        results: Runs by model.
        base: A model; with it, a column has the ratio of accuracies to its, seed by seed.
    """
    columns = ["model", "parameters", "rate", "seeds above 99%", "accuracy", *([f"over {base}"] if base else [])]
    rows = []
    for model, runs in results.items():
        ratios = [
            100 * ours["accuracy"] / theirs["accuracy"]
            for ours, theirs in zip(runs, results[base] if base else [], strict=False)
        ]
        rows.append(
            (
                model,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['settings']['learning_rate']:g}",
                f"{sum(one['accuracy'] > GOAL for one in runs)} of {len(runs)}",
                spread([100 * one["accuracy"] for one in runs], "{:.2f}%"),
                *([spread(ratios, "{:.2f}%")] if base else []),
                spread([one["reached"] for one in runs if one["reached"]], "{:,.0f}"),
                spread([one["reached_seconds"] for one in runs if one["reached"]], "{:.0f}"),
                spread([one["cpu_seconds"] for one in runs], "{:.0f}"),
            )
        )
    return markdown_table([*columns, "steps to 99%", "CPU s to 99%", "CPU s in all"], rows)


def run_tables(chosen: Mapping[str, list[Result]], results: Mapping[str, list[Result]]) -> list[str]:
    """Every run that is reported, and every one that chose a rate."""
    steps = next(iter(chosen.values()))[0]["settings"]["steps"]
    return [
        "## Seeds",
        "",
        *_run_table([one for runs in results.values() for one in runs]),
        "",
        f"## Choice of the learning rate (seed {SELECTION_SEED}, {steps:,} steps)",
        "",
        *_run_table([one for runs in chosen.values() for one in runs]),
    ]


def _run_table(runs: list[Result]) -> list[str]:
    rows = [
        (
            one["settings"]["model"],
            f"{one['settings']['learning_rate']:g}",
            one["settings"]["seed"],
            f"{100 * one['accuracy']:.2f}%",
            *((f"{one['reached']:,}", f"{one['reached_seconds']:.0f}") if one["reached"] else ("not reached", "")),
            f"{one['cpu_seconds']:.0f}",
        )
        for one in runs
    ]
    return markdown_table(["model", "rate", "seed", "accuracy", "steps to 99%", "CPU s to 99%", "CPU s in all"], rows)


def learning_curves(results: Mapping[str, list[Result]]) -> Figure:
    """Held-out accuracy by step, a line for each seed."""
    curves = {
        model: [[(step, 100 * accuracy) for step, accuracy, _ in one["curve"]] for one in runs]
        for model, runs in results.items()
    }
    return seed_curves(curves, "held-out answers right, %", 100 * GOAL)
