"""A small language model of real text, trained from scratch: linear attention of several feature maps beside softmax.

    python -m benchmarks.bench_linear_lm         (--smoke: a few steps, page in runs/smoke)

Byte-level models of Python's own standard library, divided by module into training, validation and held-out files
(training/demo.py). All models take the same number of steps on the same rows, and with one seed in the same order;
they differ in nothing but the attention of their layers. Recovery is softmax's perplexity over the model's. Each
model's learning rate is the best of three with one seed and fewer steps; the reported runs have other seeds.
A finished run is kept in runs/linear_lm and not repeated by the same code on the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import (
    MODEL_CODE,
    ROOT,
    Result,
    attention_fields,
    choose_and_repeat,
    code_digest,
    kept,
    known_kind,
    rate_factor,
    seed_curves,
    spread,
)
from hyena_hf import HyenaConfig, HyenaForCausalLM
from training.demo import Plan, make_corpus
from training.parameter_groups import get_parameter_groups


RUNS = ROOT / "runs" / "linear_lm"
CODE = code_digest(*MODEL_CODE, "training/parameter_groups.py")
SOFTMAX = "softmax"
MAPS = ("hedgehog", "hedgehog, window 16", "hedgehog_softmax, window 16", "elu", "cosformer")
STEPS, CHOICE_STEPS = 450, 150  # of a reported run (one pass), and at most of one that chooses the rate
GOAL = 0.99  # of softmax's perplexity over the model's
SELECTION_SEED, SEEDS = 0, (1, 2, 3)
LEARNING_RATES = (4e-3, 8e-3, 1.6e-2)
BYTES = 256
LENGTH = 256
TRAIN_BYTES, VALIDATION_BYTES, HELDOUT_BYTES = 921_600, 16_384, 131_072

SIZES = {
    "vocab_size": BYTES,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "max_position_embeddings": LENGTH,
    "num_attention_heads": 4,
    "initializer_range": 0.1,  # near 1 / sqrt(64); the published 0.02 is meant for wider models
}


class Text(NamedTuple):
    """Rows of bytes (R, LENGTH) int64, one after another in the text; the last part of a row is left out."""

    train: Tensor
    validation: Tensor
    heldout: Tensor

    def digest(self) -> str:
        """A short hash, to tell one text from another."""
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in self)).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int = 8
    looks: int = 12  # points of the validation curve
    warmup: float = 0.1  # fraction of the steps
    final_rate: float = 0.05  # fraction of the learning rate
    weight_decay: float = 0.1


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
    steps = 6 if arguments.smoke else arguments.steps
    text = read_text()

    def run(model: str, rate: float, seed: int) -> Result:
        budget = min(CHOICE_STEPS, steps) if seed == SELECTION_SEED else steps
        looks = min(Settings.looks, budget)
        return trained(Settings(model, rate, seed, budget, looks=looks), text, keep=not arguments.smoke)

    chosen, results = choose_and_repeat(
        [SOFTMAX, *arguments.maps], LEARNING_RATES, (SELECTION_SEED, SEEDS), run, lambda result: result["validation"]
    )
    path = write_result(
        "linear_lm",
        "Linear attention from scratch: a byte-level language model",
        command_line("bench_linear_lm"),
        page(chosen, results, text),
        {"curve": learning_curves(results)},
        folder=SMOKE_RESULTS if arguments.smoke else RESULTS,
    )
    print(path.read_text())


@cache
def read_text() -> Text:
    """The standard library as rows of bytes."""
    plan = replace(Plan(), train_bytes=TRAIN_BYTES, validation_bytes=VALIDATION_BYTES, heldout_bytes=HELDOUT_BYTES)
    corpus = make_corpus(None, plan)
    return Text(*(_rows(b"".join(part)) for part in (corpus.train, corpus.validation, corpus.heldout)))


def _rows(content: bytes) -> Tensor:
    stream = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def trained(settings: Settings, text: Text, *, keep: bool) -> Result:
    """The result of one run together with what it came from; kept in a file, or read from there, where wanted."""
    fields = {**SIZES, **attention_fields(settings.model, SIZES["num_hidden_layers"])}
    made_from = {"settings": asdict(settings), "config": fields, "code": CODE, "text": text.digest()}

    def run() -> Result:
        torch.manual_seed(settings.seed)
        return fit(HyenaForCausalLM(HyenaConfig(**fields)), text, settings)

    if not keep:
        return {**made_from, **run()}
    name = f"{settings.model}-lr{settings.learning_rate:g}-seed{settings.seed}-steps{settings.steps}.json"
    return kept(RUNS / name, made_from, run)


def fit(model: PreTrainedModel, text: Text, settings: Settings) -> Result:
    """Train in place on rows in the order of the seed, no row twice before all have been seen.

    Returns:
        `parameters`, `curve` of (step, bits per byte of the validation text), `validation` and `heldout` bits per byte
        at the end, `cpu_seconds` of the steps.
    """
    groups = get_parameter_groups(model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    warmup = max(1, math.ceil(settings.warmup * settings.steps))
    schedule = LambdaLR(
        optimizer,
        lambda step: rate_factor(step, steps=settings.steps, warmup=warmup, final_rate=settings.final_rate),
    )
    order = torch.randperm(len(text.train), generator=torch.Generator().manual_seed(settings.seed))
    looks = {round(look * settings.steps / settings.looks) for look in range(1, settings.looks + 1)}
    curve, seconds = [], 0.0
    bar = tqdm(range(settings.steps), desc=f"{settings.model} rate {settings.learning_rate:g} seed {settings.seed}")
    for step in bar:
        start = time.process_time()
        places = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size) % len(order)
        mean_loss(model, text.train[order[places]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.process_time() - start
        if step + 1 in looks:
            curve.append((step + 1, bits_per_byte(model, text.validation)))
            bar.set_postfix(bits=f"{curve[-1][1]:.3f}")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve,
        "validation": curve[-1][1],
        "heldout": bits_per_byte(model, text.heldout),
        "cpu_seconds": seconds,
    }


def mean_loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Mean loss of the next bytes of rows (B, LENGTH), in nats."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean bits of the bytes of rows (R, LENGTH) but the first of each row."""
    was_training = model.training
    model.eval()
    nats = sum(float(mean_loss(model, part)) * len(part) for part in rows.split(32)) / len(rows)
    model.train(was_training)
    return nats / math.log(2)


def recovery(result: Mapping[str, Any], softmax: Mapping[str, Any]) -> float:
    """Softmax's perplexity over the model's, of held-out bytes."""
    return 2 ** (softmax["heldout"] - result["heldout"])


def page(chosen: Mapping[str, list[Result]], results: Mapping[str, list[Result]], text: Text) -> list[str]:
    """The result, the seeds and the choice of the learning rate."""
    first = results[SOFTMAX][0]
    settings = first["settings"]
    rows = []
    for model, runs in results.items():
        recoveries = [100 * recovery(*pair) for pair in zip(runs, results[SOFTMAX], strict=True)]
        rows.append(
            (
                model,
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['settings']['learning_rate']:g}",
                spread([2 ** one["heldout"] for one in runs], "{:.3f}"),
                f"{mean(one['heldout'] for one in runs):.3f}",
                spread(recoveries, "{:.2f}%"),
                f"{sum(value >= 100 * GOAL for value in recoveries)} of {len(runs)}",
                spread([one["cpu_seconds"] for one in runs], "{:.0f}"),
            )
        )
    columns = ["model", "parameters", "rate", "perplexity", "bits per byte", "recovery", "seeds at 99%", "CPU s"]
    sizes = (f"{part.numel():,}" for part in text)
    return [
        f"Python's standard library as bytes, divided by module: {', '.join(sizes)} of training, validation and "
        f"held-out text. {SIZES['num_hidden_layers']} layers of width {SIZES['hidden_size']}, MLP "
        f"{SIZES['intermediate_size']}, {SIZES['num_attention_heads']} heads; {settings['steps']:,} steps of "
        f"{settings['batch_size']} rows of {LENGTH} bytes; AdamW, betas (0.9, 0.98), decay "
        f"{settings['weight_decay']}, warm-up {settings['warmup']:.0%}, cosine to {settings['final_rate']:.0%} of the "
        f"rate, clip 1.0, one thread. Perplexity: of a byte of the held-out text; recovery: that of softmax attention "
        f"with the same seed over the model's. Rows are named by the feature map of linear attention; a window: so "
        f"many nearest tokens keep softmax attention. Mean (lowest to highest) of seeds "
        f"{', '.join(map(str, SEEDS))}.",
        "",
        *markdown_table(columns, rows),
        "",
        "## Seeds",
        "",
        *_run_table([one for runs in results.values() for one in runs]),
        "",
        f"## Choice of the learning rate (seed {SELECTION_SEED}, validation text)",
        "",
        *_run_table([one for runs in chosen.values() for one in runs]),
    ]


def _run_table(runs: list[Result]) -> list[str]:
    rows = [
        (
            one["settings"]["model"],
            f"{one['settings']['learning_rate']:g}",
            one["settings"]["seed"],
            one["settings"]["steps"],
            f"{one['validation']:.4f}",
            f"{one['heldout']:.4f}",
        )
        for one in runs
    ]
    return markdown_table(["model", "rate", "seed", "steps", "validation bits per byte", "held-out"], rows)


def learning_curves(results: Mapping[str, list[Result]]) -> Figure:
    """Validation bits per byte by step, a line for each seed; dotted, softmax's mean at the end."""
    curves = {model: [one["curve"] for one in runs] for model, runs in results.items()}
    goal = mean(one["validation"] for one in results[SOFTMAX])
    return seed_curves(curves, "validation bits per byte", goal)


if __name__ == "__main__":
    main()
