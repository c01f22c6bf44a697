# SPDX-License-Identifier: Apache-2.0
"""A small DNA language model on real genomes, from Debian packages to one page of results.

    python -m examples.dna --output runs/dna                        # all of it: an hour and a half on one core
    python -m examples.dna --output runs/dna --genomes FOLDER       # no network: the .gz files are in FOLDER
    python -m examples.dna --output runs/dna-smoke --smoke          # a minute, invented genomes; means nothing

    hyena     pretrain on both strands of Escherichia coli 536, rows of 1,024, then 16,384 and 131,072 bases
    llama     the same rows of 1,024 for a Llama with as many parameters
    bits      bits per base on strains that are held out, with 1k, 16k and 131k of context; Markov models, gzip, xz
    species   which of four species a window is from: fine-tuned, on strains that training has not seen
    variants  substitutions planted in MG1655: codon positions against each other and against intergenic bases
    embed     `hyena embed` on the whole genome: time and memory
    page      dna.md and its plots, from what there is

`--stages` chooses among them, in this order. The same command goes on where it was interrupted; what is finished is
not done again (delete its file in OUTPUT to do so). `OUTPUT/results.json` holds all numbers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from evaluation.baselines import xz_bits_per_byte
from evaluation.perplexity import bits_per_byte
from examples.dna_markov import NucleotideMarkov, markov_bits, new_stretches
from examples.dna_models import Shape, TrainingStage, hyena_config, llama_config, train_in_stages
from examples.dna_report import write_page
from examples.dna_tasks import (
    SpeciesSplit,
    embed_genome,
    fine_tune_species,
    kmer_frequencies,
    linear_probe,
    markov_log_ratios,
    mean_states,
    plant_substitutions,
    score_planted,
    species_windows,
    write_fasta,
    write_task,
)
from training.genomes import CACHE, Contig, encode, load_genomes, reverse_complement, spread
from training.recipe import write_json


STAGES = ("hyena", "llama", "bits", "species", "variants", "embed", "page")

PRETRAINED = "ecoli-536"
HELD_OUT = ("ecoli-mg1655", "ecoli-dh1")
OTHER_SPECIES = "vcholerae-o395"
SPECIES = {  # training strains, and the one that is held out
    "Escherichia coli": (("ecoli-536", "ecoli-dh1"), "ecoli-mg1655"),
    "Vibrio cholerae": (("vcholerae-n16961", "vcholerae-inaba", "vcholerae-h1"), "vcholerae-o395"),
    "Staphylococcus aureus": (("saureus-n315", "saureus-col", "saureus-jkd6008", "saureus-usa300"), "saureus-rf122"),
    "Helicobacter pylori": (
        ("hpylori-g27", "hpylori-els37", "hpylori-puno120", "hpylori-gambia94-24"),
        "hpylori-sjm180",
    ),
}


@dataclass(frozen=True)
class Plan:
    """How much of everything: the one place that decides what the example costs."""

    shape: Shape = field(default_factory=Shape)
    hyena: tuple[TrainingStage, ...] = (
        TrainingStage(1_024, 16, 1_000, 2e-3),
        TrainingStage(16_384, 1, 150, 1e-3),
        TrainingStage(131_072, 1, 16, 5e-4),
    )
    llama: tuple[TrainingStage, ...] = (TrainingStage(1_024, 16, 1_000, 4e-3),)
    unseen_bases: int = 262_146  # at the end of the training strain: validation
    segment: int = 131_073  # bases of a test sequence; the first is not scored
    segments: int = 3  # of each held-out strain
    new_bases: int = 1_024  # fewest of a stretch of the first one that the training strain does not have
    contexts: tuple[int, ...] = (1_024, 16_384, 131_072)
    orders: tuple[int, ...] = (2, 4, 6, 8, 10, 11, 12, 14, 16, 20, 24)
    weights: tuple[float, ...] = (1, 4, 16, 64, 256)
    species_lengths: tuple[int, ...] = (256, 1_024, 4_096)
    fine_tuned_lengths: tuple[int, ...] = (256, 1_024, 4_096)  # of them
    species_bases: int = 204_800  # training bases of a species at every length
    species_tests: int = 200  # test windows of a species
    species_epochs: int = 5
    species_batch_bases: int = 4_096
    species_least_batch: int = 8  # windows; one at a time, fine-tuning at 4,096 bases ends at 51%
    variants: int = 500  # of each class
    variant_window: int = 512
    gene_bases: int = 600
    embed_windows: int = 16_384


SMOKE = Plan(
    shape=Shape(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=1, intermediate_size=32, positions=514, short_taps=16
    ),
    hyena=(TrainingStage(128, 4, 20, 5e-3), TrainingStage(256, 2, 10, 1e-3), TrainingStage(512, 1, 10, 5e-4)),
    llama=(TrainingStage(128, 4, 20, 5e-3),),
    unseen_bases=2_050,
    segment=513,
    segments=2,
    new_bases=100,
    contexts=(128, 512),
    orders=(2, 12),
    weights=(4, 64),
    species_lengths=(64,),
    fine_tuned_lengths=(64,),
    species_bases=2_560,
    species_tests=10,
    species_epochs=1,
    species_batch_bases=512,
    variants=10,
    variant_window=128,
    gene_bases=150,
    embed_windows=512,
)
SMOKE_BASES = 20_000


class Workplace:
    """The folder of a run, and the genomes, read when they are first asked for.

    Args:
        output: everything that the run writes.
        plan: what it costs.
        seed: of weights, rows, windows and variants.
        read: gives genomes by their names.
    """

    def __init__(
        self, output: Path, plan: Plan, seed: int, read: Callable[[Sequence[str]], dict[str, list[Contig]]]
    ) -> None:
        self.output, self.plan, self.seed, self._read = output, plan, seed, read
        self._genomes: dict[str, list[Contig]] = {}

    def genome(self, name: str) -> list[Contig]:
        """The contigs of a genome."""
        if name not in self._genomes:
            self._genomes |= self._read([name])
        return self._genomes[name]

    def finished(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, kept in OUTPUT/measured/NAME.json."""
        path = self.output / "measured" / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            write_json(path, compute())
        return json.loads(path.read_text())

    def known(self, name: str) -> Any:
        """What an earlier stage has found; None where it has not run."""
        path = self.output / "measured" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def model_dir(self, name: str, which: int = -1) -> str:
        """The folder of a trained model.

        Raises:
            ValueError: its stage has not run.
        """
        trained = self.known(name)
        if trained is None:
            raise ValueError(f"{self.output} holds no trained {name}; run --stages {name} first")
        return trained[which]["model_dir"]

    def training_sequences(self) -> tuple[bytes, bytes]:
        """What is pretrained on, and the end of the same chromosome that is not."""
        sequence = self.genome(PRETRAINED)[0].sequence
        return sequence[: -self.plan.unseen_bases], sequence[-self.plan.unseen_bases :]

    def test_sets(self) -> dict[str, list[bytes]]:
        """Sequences that bits per base are measured on."""
        plan = self.plan
        unseen = spread(
            self.training_sequences()[1], count=max(1, plan.unseen_bases // plan.segment), length=plan.segment
        )
        others = dict.fromkeys(HELD_OUT, plan.segments) | {OTHER_SPECIES: max(1, plan.segments // 2)}
        return {
            f"{PRETRAINED}, unseen part": unseen,
            **{
                name: spread(self.genome(name)[0].sequence, count=count, length=plan.segment)
                for name, count in others.items()
            },
            f"{HELD_OUT[0]}, new stretches": self.new_stretches(),
        }

    def new_stretches(self) -> list[bytes]:
        """Up to a segment of the held-out strain that has nothing in common with what was trained on."""
        forward, _ = self.training_sequences()
        stretches = new_stretches(
            self.genome(HELD_OUT[0])[0].sequence,
            [forward, reverse_complement(forward)],
            words=20,
            min_length=self.plan.new_bases,
        )
        kept: list[bytes] = []
        for stretch in stretches:
            if sum(map(len, kept)) + len(stretch) <= self.plan.segment:
                kept.append(stretch)
        return kept


def run_hyena(work: Workplace) -> None:
    """Pretrain the Hyena."""
    config = hyena_config(work.plan.shape)
    _pretrain(work, "hyena", config, work.plan.hyena)


def run_llama(work: Workplace) -> None:
    """Train the Llama."""
    _pretrain(work, "llama", llama_config(work.plan.shape), work.plan.llama)


def _pretrain(work: Workplace, name: str, config: Any, stages: Sequence[TrainingStage]) -> None:
    work.finished(
        name,
        lambda: train_in_stages(name, config, stages, work.training_sequences(), output=work.output, seed=work.seed),
    )


def run_bits(work: Workplace) -> None:
    """Bits per base of every model and baseline on every test set."""
    plan, sets = work.plan, work.test_sets()
    forward, _ = work.training_sequences()
    training = [forward, reverse_complement(forward)]
    work.finished("compressors", lambda: _compressed(training, sets))
    work.finished("markov", lambda: markov_bits(training, sets, orders=plan.orders, weights=plan.weights))
    first, last = plan.hyena[0].length, plan.hyena[-1].length
    models = {f"hyena-{first}": work.model_dir("hyena", 0), f"hyena-{last}": work.model_dir("hyena")}
    for model, folder in models.items():
        for context in plan.contexts:
            if model.endswith(str(last)) or context < last:  # a model of short rows knows nothing of the longest lags
                _measure_bits(work, f"bits-{model}-at-{context}", folder, sets, context)
    if work.known("llama"):
        _measure_bits(work, f"bits-llama-at-{plan.contexts[0]}", work.model_dir("llama"), sets, plan.contexts[0])


def _measure_bits(work: Workplace, name: str, folder: str, sets: Mapping[str, Sequence[bytes]], context: int) -> None:
    def compute() -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        batch_size = max(1, work.plan.contexts[0] * 16 // context)
        return {
            key: bits_per_byte(
                model, [encode(sequence) for sequence in sequences], context=context, batch_size=batch_size
            ).bits_per_byte
            for key, sequences in sets.items()
        }

    work.finished(name, compute)


def _compressed(training: Sequence[bytes], sets: Mapping[str, Sequence[bytes]]) -> dict[str, dict[str, float]]:
    """Bits per base of gzip, of xz, and of what xz adds to the training strain's file; of letters, a byte each."""
    return {
        "gzip -9": {
            name: 8
            * sum(len(gzip.compress(sequence, 9, mtime=0)) for sequence in sequences)
            / sum(map(len, sequences))
            for name, sequences in sets.items()
        },
        "xz -9e": {name: xz_bits_per_byte([], sequences) for name, sequences in sets.items()},
        "xz -9e after the training strain": {
            name: xz_bits_per_byte(training, sequences) for name, sequences in sets.items()
        },
    }


def run_species(work: Workplace) -> None:
    """Tell species apart by frozen embeddings, by a fine-tuned model, and by counts of 4-mers."""
    plan = work.plan
    for length in plan.species_lengths:
        work.finished(f"species-{length}", lambda length=length: _classified(work, length))
    for length in plan.fine_tuned_lengths:
        work.finished(f"finetuned-{length}", lambda length=length: _fine_tuned(work, length))


def _species(work: Workplace, length: int) -> SpeciesSplit:
    return species_windows(
        {species: [work.genome(name) for name in strains] for species, (strains, _) in SPECIES.items()},
        {species: work.genome(name) for species, (_, name) in SPECIES.items()},
        length=length,
        train_count=work.plan.species_bases // length,
        test_count=work.plan.species_tests,
        seed=work.seed,
    )


def _classified(work: Workplace, length: int) -> dict[str, Any]:
    split = _species(work, length)
    model = AutoModelForCausalLM.from_pretrained(work.model_dir("hyena"))
    return {
        "train_windows": len(split.train),
        "test_windows": len(split.test),
        "Hyena, frozen": linear_probe(split, lambda window: mean_states(model, [window, reverse_complement(window)])),
        "4-mers": linear_probe(split, lambda window: kmer_frequencies(window, 4)),
    }


def _fine_tuned(work: Workplace, length: int) -> dict[str, Any]:
    plan, split = work.plan, _species(work, length)
    folder = work.output / f"species-{length}"
    return fine_tune_species(
        work.model_dir("hyena"),
        write_task(split, folder / "task"),
        folder / "hyena",
        batch_size=max(plan.species_least_batch, plan.species_batch_bases // length),
        epochs=plan.species_epochs,
        rows=len(split.train),
        seed=work.seed,
    )


def run_variants(work: Workplace) -> None:
    """Score planted substitutions with the Hyena, and with the Markov model of order 12."""
    work.finished("variants", lambda: _variants(work))


def _variants(work: Workplace) -> dict[str, Any]:
    plan = work.plan
    contig = work.genome(HELD_OUT[0])[0]
    planted = plant_substitutions(
        contig.sequence,
        per_class=plan.variants,
        min_frame=plan.gene_bases,
        margin=plan.variant_window,
        seed=work.seed,
    )
    fasta = write_fasta(work.output / "data" / f"{HELD_OUT[0]}.fa", [contig])
    ratios = {
        "Hyena": score_planted(
            work.model_dir("hyena"),
            fasta,
            contig,
            planted,
            folder=work.output / "variants",
            window=plan.variant_window,
        )
    }
    forward, _ = work.training_sequences()
    markov = NucleotideMarkov([forward, reverse_complement(forward)], 12)
    ratios["Markov, order 12"] = markov_log_ratios(markov, contig.sequence, planted, weight=16)
    return {
        "planted": len(planted),
        "kinds": [variant.kind for variant in planted],
        "effects": [variant.effect for variant in planted],
        "log_ratios": {name: np.round(values, 5).tolist() for name, values in ratios.items()},
    }


def run_embed(work: Workplace) -> None:
    """Embed the whole genome in windows, and as one sequence."""
    work.output.joinpath("embeddings").mkdir(parents=True, exist_ok=True)
    fasta = write_fasta(work.output / "data" / f"{PRETRAINED}.fa", work.genome(PRETRAINED))
    runs = {"windows": ["--windows", str(work.plan.embed_windows)], "whole": []}
    for name, options in runs.items():
        target = work.output / "embeddings" / name
        work.finished(
            f"embed-{name}",
            lambda options=options, target=target: embed_genome(
                work.model_dir("hyena"), fasta, target, options=options
            ),
        )


def run_page(work: Workplace, command: str, folder: Path) -> None:
    """Write results.json and the page."""
    names = sorted(path.stem for path in (work.output / "measured").glob("*.json"))
    results = {name: work.known(name) for name in names}
    write_json(work.output / "results.json", {"command": command, "seed": work.seed, **results})
    print(write_page(results, command=command, seed=work.seed, folder=folder))


def invented_genomes(names: Sequence[str], bases: int = SMOKE_BASES) -> dict[str, list[Contig]]:
    """Genomes for the smoke run: random, each species with its own share of G and C; strains differ by 2%."""
    genomes = {}
    for name in names:
        species, _, strain = name.partition("-")
        shares = np.random.default_rng(list(species.encode())).uniform(0.35, 0.65)
        chances = [(1 - shares) / 2, shares / 2, shares / 2, (1 - shares) / 2]
        letters = np.frombuffer(b"ACGT", dtype=np.uint8)
        common = np.random.default_rng(list(species.encode())).choice(letters, size=bases, p=chances)
        own = np.random.default_rng(list(f"{species}-{strain}".encode()))
        changed = np.where(own.random(bases) < 0.02, own.choice(letters, size=bases, p=chances), common)
        genomes[name] = [Contig(name, changed.astype(np.uint8).tobytes())]
    return genomes


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.dna", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the run")
    add("--genomes", type=Path, help="folder with the .gz files of the packages (default: fetch them into .cache)")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    add("--page", type=Path, help="folder of dna.md and its plots (default: OUTPUT)")
    add("--seed", type=int, default=0, help="of weights, rows, windows and variants")
    add("--smoke", action="store_true", help="tiny models, invented genomes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if options.smoke:
        torch.set_num_threads(1)  # tiny models lose by sharing work
    torch.set_float32_matmul_precision("high")  # float32 transforms: a training step rounds more than they do
    read = invented_genomes if options.smoke else _reader(options.genomes)
    work = Workplace(options.output, SMOKE if options.smoke else Plan(), options.seed, read)
    _claim(work, options.smoke)
    runs: dict[str, Callable[[Workplace], None]] = {
        "hyena": run_hyena,
        "llama": run_llama,
        "bits": run_bits,
        "species": run_species,
        "variants": run_variants,
        "embed": run_embed,
    }
    for name in STAGES:
        if name in options.stages and name != "page":
            runs[name](work)
    if "page" in options.stages:
        run_page(work, command(options), options.page or options.output)
    if options.smoke:
        print("\nThis was a smoke run: every stage ran, the numbers mean nothing.")


def _claim(work: Workplace, smoke: bool) -> None:
    """Write down what this run is; refuse a folder of another one.

    Raises:
        ValueError: the folder holds a run with another seed, or a smoke run.
    """
    this = {"seed": work.seed, "smoke": smoke, "plan": repr(work.plan)}
    path = work.output / "run.json"
    if path.exists() and json.loads(path.read_text()) != this:
        raise ValueError(f"{work.output} holds another run ({path}); choose another --output, or delete the folder")
    write_json(path, this)


def _reader(folder: Path | None) -> Callable[[Sequence[str]], dict[str, list[Contig]]]:
    return lambda names: load_genomes(names, folder=folder, cache=CACHE)


def command(options: argparse.Namespace) -> str:
    """What repeats the run; the stages are left out, for all of them belong to the page."""
    words = ["python -m examples.dna", f"--output {options.output}"]
    words += [f"--seed {options.seed}"] if options.seed else []
    return " ".join([*words, "--smoke"] if options.smoke else words)


if __name__ == "__main__":
    main()
