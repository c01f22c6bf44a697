# SPDX-License-Identifier: Apache-2.0
"""A GPT-2 trained here and then linearised: what every feature map loses, and what training wins back.

    python -m benchmarks.bench_linear_gpt2         (--smoke: a few steps, page in runs/smoke)

A byte-level GPT-2 is trained on Python's own standard library (text and recipe of bench_linear_lm). Each way of
linear attention then takes the place of its softmax in all layers: learned maps have attention transfer first, and all
weights are trained further on the same text. The softmax model gets the same further training. Each way's learning
rate is the best of three on the validation text with one seed; the reported runs have other seeds, which change the
order of rows. A finished run is kept in runs/linear_gpt2 and not repeated by the same code on the same text.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.bench_linear_lm import (
    BYTES,
    GOAL,
    LENGTH,
    SEEDS,
    SELECTION_SEED,
    SOFTMAX,
    Settings,
    Text,
    bits_per_byte,
    fit,
    read_text,
    recovery,
)
from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import (
    ROOT,
    WINDOW,
    Result,
    choose_and_repeat,
    code_digest,
    kept,
    seed_curves,
    spread,
)
from hyena_hf.feature_maps import FEATURE_MAPS, LearnedMap
from hyena_hf.linear_attention import attention_transfer, convert_attention


RUNS = ROOT / "runs" / "linear_gpt2"
CODE = code_digest("hyena_hf/linear_attention/*.py", "hyena_hf/feature_maps.py", "hyena_hf/mixers/linear_attention.py")
WAYS = (SOFTMAX, "hedgehog_softmax", "hedgehog_softmax, window 16", "elu", "cosformer")
LEARNING_RATES = (1e-3, 2e-3, 4e-3)  # of the further training
TRANSFER_RATE = 5e-2
ARCHITECTURE = {
    "vocab_size": BYTES,
    "n_positions": LENGTH,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.1,  # near 1 / sqrt(64)
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are those of the page."""

    steps: int = 900  # of the softmax model: twice through the text
    further: int = 150  # of every way
    transfer: int = 60
    transfer_rows: int = 8
    looks: int = 9


SMOKE = Sizes(steps=4, further=3, transfer=2, transfer_rows=2, looks=3)


def main() -> None:
    """Run what is not there yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps, page in runs/smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    runs, folder = (SMOKE_RESULTS / "linear_gpt2", SMOKE_RESULTS) if arguments.smoke else (RUNS, RESULTS)
    bench = Bench(read_text(), SMOKE if arguments.smoke else Sizes(), runs)
    if arguments.smoke:
        shutil.rmtree(runs, ignore_errors=True)
    base = bench.base()
    chosen, results = choose_and_repeat(
        WAYS, LEARNING_RATES, (SELECTION_SEED, SEEDS), bench.further, lambda result: result["validation"]
    )
    path = write_result(
        "linear_gpt2",
        "A GPT-2 trained here, linearised",
        command_line("bench_linear_gpt2"),
        page(base, chosen, results, bench),
        {"curve": learning_curves(results)},
        folder=folder,
    )
    print(path.read_text())


@dataclass(frozen=True)
class Bench:
    """All runs on one text, each done once and kept in a file."""

    text: Text
    sizes: Sizes
    folder: Path

    @property
    def made_from(self) -> dict[str, Any]:
        """What every run depends on."""
        return {"code": CODE, "text": self.text.digest(), "sizes": asdict(self.sizes), "architecture": ARCHITECTURE}

    def base(self) -> Result:
        """The softmax model; its weights are kept."""

        def run() -> Result:
            torch.manual_seed(SELECTION_SEED)
            model = GPT2LMHeadModel(GPT2Config(**ARCHITECTURE))
            result = fit(model, self.text, self._settings(SOFTMAX, 8e-3, SELECTION_SEED, self.sizes.steps))
            model.save_pretrained(self.folder / "base")
            return result

        return kept(self.folder / "base.json", self.made_from, run)

    def further(self, way: str, rate: float, seed: int) -> Result:
        """The base with another attention, trained further."""
        settings = self._settings(way, rate, seed, self.sizes.further)

        def run() -> Result:
            model = self.converted(way)
            start = bits_per_byte(model, self.text.heldout)
            if way != SOFTMAX and learns(way):
                self.transfer(model, seed)
            transferred = bits_per_byte(model, self.text.heldout)
            return {"start": start, "transferred": transferred, **fit(model, self.text, settings)}

        name = f"{way}-{rate:g}-{seed}.json"
        return kept(self.folder / name, {**self.made_from, "settings": asdict(settings)}, run)

    def converted(self, way: str) -> PreTrainedModel:
        """The base with a way of attention."""
        base = GPT2LMHeadModel.from_pretrained(self.folder / "base")
        if way == SOFTMAX:
            return base
        name, _, window = way.partition(WINDOW)
        return convert_attention(base, feature_map=name, window=int(window or 0))

    def transfer(self, model: PreTrainedModel, seed: int) -> None:
        """Attention transfer, on rows in the order of the seed."""
        order = torch.randperm(len(self.text.train), generator=torch.Generator().manual_seed(seed))
        batches = self.text.train[order].split(self.sizes.transfer_rows)
        attention_transfer(model, batches, steps=self.sizes.transfer, learning_rate=TRANSFER_RATE)

    def _settings(self, way: str, rate: float, seed: int, steps: int) -> Settings:
        return replace(Settings(way, rate, seed, steps), looks=min(self.sizes.looks, steps))


def learns(way: str) -> bool:
    """Whether a way's feature map has something to train."""
    return issubclass(FEATURE_MAPS[way.partition(WINDOW)[0]], LearnedMap)


def page(
    base: Result, chosen: Mapping[str, list[Result]], results: Mapping[str, list[Result]], bench: Bench
) -> list[str]:
    """The result, the seeds and the choice of the learning rate."""
    rows = []
    for way, runs in results.items():
        recoveries = [100 * recovery(*pair) for pair in zip(runs, results[SOFTMAX], strict=True)]
        rows.append(
            (
                way,
                f"{runs[0]['settings']['learning_rate']:g}",
                f"{2 ** runs[0]['start']:.2f}",
                spread([2 ** run["transferred"] for run in runs], "{:.2f}"),
                spread([2 ** run["heldout"] for run in runs], "{:.3f}"),
                spread(recoveries, "{:.2f}%"),
                f"{sum(value >= 100 * GOAL for value in recoveries)} of {len(runs)}",
            )
        )
    columns = ["attention", "rate", "converted", "after transfer", "trained further", "recovery", "seeds at 99%"]
    sizes = bench.sizes
    return [
        f"Python's standard library as bytes, as in linear_lm.md. GPT-2 of {ARCHITECTURE['n_layer']} layers of width "
        f"{ARCHITECTURE['n_embd']}, {ARCHITECTURE['n_head']} heads, {base['parameters']:,} parameters: "
        f"{sizes.steps:,} steps of 8 rows of {LENGTH} bytes at the rate 8e-3, held-out perplexity of a byte "
        f"{2 ** base['heldout']:.3f}. All layers converted; {sizes.transfer} steps of attention transfer of "
        f"{sizes.transfer_rows} rows where maps learn, rate {TRANSFER_RATE:g}; {sizes.further} steps of all weights. "
        f"Perplexities of held-out bytes; recovery: that of the softmax model with the same further training and seed "
        f"over the way's. Mean (lowest to highest) of seeds {', '.join(map(str, SEEDS))}; one thread.",
        "",
        *markdown_table(columns, rows),
        "",
        "## Seeds",
        "",
        *_run_table([run for runs in results.values() for run in runs]),
        "",
        f"## Choice of the learning rate (seed {SELECTION_SEED}, validation text)",
        "",
        *_run_table([run for runs in chosen.values() for run in runs]),
    ]


def _run_table(runs: list[Result]) -> list[str]:
    rows = [
        (
            run["settings"]["model"],
            f"{run['settings']['learning_rate']:g}",
            run["settings"]["seed"],
            f"{run['transferred']:.4f}",
            f"{run['validation']:.4f}",
            f"{run['heldout']:.4f}",
            f"{run['cpu_seconds']:.0f}",
        )
        for run in runs
    ]
    columns = ["attention", "rate", "seed", "held-out before", "validation bits per byte", "held-out", "CPU s"]
    return markdown_table(columns, rows)


def learning_curves(results: Mapping[str, list[Result]]) -> Figure:
    """Validation bits per byte by step of further training; dotted, the mean end of softmax."""
    curves = {way: [run["curve"] for run in runs] for way, runs in results.items()}
    ends = [run["validation"] for run in results[SOFTMAX]]
    return seed_curves(curves, "validation bits per byte", sum(ends) / len(ends))


if __name__ == "__main__":
    main()
