# SPDX-License-Identifier: Apache-2.0
"""What the DNA example asks of a pretrained model: the species of a window, the worth of a substitution, a genome's
embedding."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.dna_markov import NucleotideMarkov
from hyena_hf.scoring.tables import read_rows
from hyena_hf.scoring.variants import COLUMNS, VariantSettings, write_variant_effects
from training import finetune
from training.genomes import (
    Contig,
    encode,
    longest_apart,
    open_frames,
    reverse_complement,
    sample_windows,
    without_frames,
)
from training.metrics import classification_metrics
from training.processes import run_measured


Floats = NDArray[np.float64]

CODON_CLASSES = ("codon position 1", "codon position 2", "codon position 3")
INTERGENIC = "intergenic"
EFFECTS = ("synonymous", "missense", "nonsense")


# ---- species


@dataclass(frozen=True)
class SpeciesSplit:
    """Windows of training strains and of the strains that are held out whole: (label, sequence) pairs."""

    train: list[tuple[str, bytes]]
    test: list[tuple[str, bytes]]


def species_windows(
    training: Mapping[str, Sequence[Sequence[Contig]]],
    heldout: Mapping[str, Sequence[Contig]],
    *,
    length: int,
    train_count: int,
    test_count: int,
    seed: int,
) -> SpeciesSplit:
    """Draw windows of every species, the training ones from its training strains in equal parts.

    Args:
        training: strains of each species, each a list of contigs.
        heldout: the held-out strain of each species.
        length: bases of a window.
        train_count, test_count: windows of a species.
        seed: of the places.
    """
    train, test = [], []
    for number, (species, strains) in enumerate(training.items()):
        for part, strain in enumerate(strains):
            count = train_count // len(strains) + (part < train_count % len(strains))
            windows = sample_windows(strain, count=count, length=length, seed=_mix(seed, number, part))
            train += [(species, window) for window in windows]
        windows = sample_windows(heldout[species], count=test_count, length=length, seed=_mix(seed, number, 1_000))
        test += [(species, window) for window in windows]
    return SpeciesSplit(train, test)


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def write_task(split: SpeciesSplit, folder: Path) -> Path:
    """Write the windows as a task for `training.finetune`: train.csv and test.csv; a folder written before stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", split.train), ("test", split.test)):
        path = folder / f"{name}.csv"
        if path.exists():
            continue
        unfinished = folder / f"{name}.unfinished"
        with unfinished.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sequence", "label"])
            writer.writerows((sequence.decode(), label) for label, sequence in rows)
        unfinished.replace(path)
    return folder


def fine_tune_species(
    model: str | Path, task: Path, output: Path, *, batch_size: int, epochs: int, rows: int, seed: int
) -> dict[str, Any]:
    """Fine-tune on a task folder with mean pooling, and give accuracy, F1 and MCC of the held-out strains.

    Args:
        model: folder of a pretrained model.
        task: from `write_task`.
        output: of the run; a finished one is read back.
        batch_size, epochs: of the run.
        rows: training windows, of which a tenth chooses the checkpoint.
        seed: of the head and of the order of rows.
    """
    result = output / "result.json"
    if not result.exists():
        words = f"--task sequence --pooling mean --epochs {epochs} --batch-size {batch_size} --learning-rate 1e-3"
        words += f" --tokenizer dna --seed {seed} --evaluate-every {max(1, rows // batch_size // 2)}"
        finetune.main([str(model), "--data", str(task), "--output", str(output), *words.split()])
    numbers = json.loads(result.read_text())
    return {**numbers["test"], "train_seconds": numbers["train_seconds"], "steps": numbers["steps"]}


def linear_probe(split: SpeciesSplit, features: Callable[[bytes], Floats]) -> dict[str, float]:
    """Logistic regression on features of windows: accuracy, F1 and MCC of the held-out strains.

    Args:
        split: the windows.
        features: of one window, (F,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tables = [np.stack([features(window) for _, window in rows]) for rows in (split.train, split.test)]
    names = sorted({label for label, _ in split.train})
    labels = [np.array([names.index(label) for label, _ in rows]) for rows in (split.train, split.test)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    classifier.fit(tables[0], labels[0])
    return classification_metrics(classifier.predict(tables[1]), labels[1])


def mean_states(model: PreTrainedModel, sequences: Sequence[bytes]) -> Floats:
    """Hidden states of all layers, each averaged over the bases of all sequences: ((layers + 1) * D,).

    Args:
        model: a Hyena model; it is left in eval mode.
        sequences: capitals, of one length.
    """
    ids = torch.stack([encode(sequence) for sequence in sequences])
    model.eval()
    with torch.inference_mode():
        states = model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([layer.mean(dim=(0, 1)) for layer in states]).double().numpy()


_DIGITS = np.full(256, 4, dtype=np.int64)
_DIGITS[list(b"ACGT")] = range(4)


def kmer_frequencies(sequence: bytes, k: int) -> Floats:
    """Frequencies of all 4^k words in a sequence and its reverse complement; words with other letters do not count."""
    counts = np.zeros(4**k)
    for strand in (sequence, reverse_complement(sequence)):
        digits = _DIGITS[np.frombuffer(strand, dtype=np.uint8)]
        words = np.lib.stride_tricks.sliding_window_view(digits, k)
        words = words[(words < 4).all(axis=1)]
        counts += np.bincount(words @ (4 ** np.arange(k)[::-1]), minlength=4**k)
    return counts / max(1.0, counts.sum())


# ---- variants


@dataclass(frozen=True)
class Planted:
    """One substitution: place on the contig (0-based), bases on its forward strand, and what it does."""

    position: int
    ref: str
    alt: str
    kind: str  # of CODON_CLASSES, or INTERGENIC
    effect: str | None  # of EFFECTS; None between genes


def plant_substitutions(contig: bytes, *, per_class: int, min_frame: int, margin: int, seed: int) -> list[Planted]:
    """Draw substitutions, as many for each codon position in long open frames as outside all open frames.

    The contig comes without annotation. Genes here are open reading frames of at least `min_frame` bases, chosen
    longest first and (almost) without overlap; intergenic are bases in no stretch free of stop codons of half that
    length, in none of the six frames. Start and stop codons of a frame are left out.

    Args:
        contig: capitals.
        per_class: substitutions of each class.
        min_frame: fewest bases of a frame.
        margin: bases at the ends of the contig and around intergenic bases' frames that are left out of the draw.
        seed: of places and bases.

    Returns:
        In the order of their places.

    Raises:
        ValueError: the contig has too few places of a class.
    """
    draw = np.random.default_rng(seed)
    frames = longest_apart(open_frames(contig, min_length=min_frame))
    places = {kind: [] for kind in CODON_CLASSES}
    for frame in frames:
        codons = range(frame.begin + 3, frame.end - 3, 3)
        for index, kind in enumerate(CODON_CLASSES):
            offset = index if frame.forward else 2 - index
            places[kind] += [(codon + offset, frame.forward) for codon in codons]
    free = np.flatnonzero(without_frames(contig, min_length=min_frame // 2))
    everything = {**places, INTERGENIC: [(int(place), True) for place in free]}
    planted: list[Planted] = []
    taken: set[int] = set()
    for kind, candidates in everything.items():
        inside = [c for c in candidates if margin <= c[0] < len(contig) - margin and contig[c[0]] in b"ACGT"]
        order = draw.permutation(len(inside))
        chosen = [inside[i] for i in order if inside[i][0] not in taken][:per_class]
        if len(chosen) < per_class:
            raise ValueError(
                f"the contig has {len(chosen)} places of class {kind!r} in frames of {min_frame} bases or more, "
                f"{per_class} are wanted; ask for fewer or for shorter frames"
            )
        taken |= {place for place, _ in chosen}
        planted += [_substitute(contig, place, forward, kind, draw) for place, forward in chosen]
    return sorted(planted, key=lambda variant: variant.position)


def _substitute(contig: bytes, place: int, forward: bool, kind: str, draw: np.random.Generator) -> Planted:
    ref = chr(contig[place])
    alt = str(draw.choice([base for base in "ACGT" if base != ref]))
    if kind == INTERGENIC:
        return Planted(place, ref, alt, kind, None)
    index = CODON_CLASSES.index(kind)
    start = place - (index if forward else 2 - index)
    before = contig[start : start + 3]
    after = before[: place - start] + alt.encode() + before[place - start + 1 :]
    before, after = (codon if forward else reverse_complement(codon) for codon in (before, after))
    return Planted(place, ref, alt, kind, effect_of(before.decode(), after.decode()))


_AMINO_ACIDS = dict(
    zip(
        map("".join, itertools.product("TCAG", repeat=3)),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)


def effect_of(before: str, after: str) -> str:
    """What the change of one codon does to the protein, by the standard genetic code."""
    old, new = _AMINO_ACIDS.get(before, "X"), _AMINO_ACIDS.get(after, "X")
    return "synonymous" if old == new else "nonsense" if new == "*" else "missense"


def write_vcf(path: Path, contig: Contig, planted: Sequence[Planted]) -> None:
    """Write substitutions as VCF 4.3."""
    lines = ["##fileformat=VCFv4.3", f"##contig=<ID={contig.name},length={len(contig.sequence)}>"]
    lines += ["\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"])]
    lines += ["\t".join([contig.name, str(v.position + 1), ".", v.ref, v.alt, ".", ".", "."]) for v in planted]
    path.write_text("\n".join(lines) + "\n")


def write_fasta(path: Path, contigs: Sequence[Contig]) -> Path:
    """Write contigs as FASTA, 80 bases a line; a file written before stays."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w") as file:
            for contig in contigs:
                text = contig.sequence.decode()
                file.write(f">{contig.name}\n")
                file.writelines(f"{text[begin : begin + 80]}\n" for begin in range(0, len(text), 80))
        unfinished.replace(path)
    return path


def score_planted(
    model_dir: str | Path, fasta: Path, contig: Contig, planted: Sequence[Planted], *, folder: Path, window: int
) -> Floats:
    """Log-ratios (nats) of the substitutions under a saved model, both strands averaged; (n,) in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    vcf, table = folder / "planted.vcf", folder / "effects.tsv"
    if not table.exists():
        write_vcf(vcf, contig, planted)
        write_variant_effects(
            AutoModelForCausalLM.from_pretrained(model_dir),
            AutoTokenizer.from_pretrained(model_dir),
            vcf,
            fasta,
            table,
            settings=VariantSettings(window=window, reverse_complement=True),
            progress=None,
        )
    column = list(COLUMNS).index("log_ratio")
    return np.array([row[column] for row in read_rows(table, COLUMNS)], dtype=np.float64)


def markov_log_ratios(model: NucleotideMarkov, contig: bytes, planted: Sequence[Planted], *, weight: float) -> Floats:
    """The same log-ratios (nats) under a Markov model: over the bases whose context holds the substitution."""
    ratios = []
    for variant in planted:
        left = contig[variant.position - 2 * model.order : variant.position]
        right = contig[variant.position + 1 : variant.position + 1 + 2 * model.order]
        sums = []
        for base in (variant.ref, variant.alt):
            window = left + base.encode() + right
            strands = (window, reverse_complement(window))
            sums.append(sum(model.log2_probabilities(strand, weight=weight).sum() for strand in strands) / 2)
        ratios.append((sums[1] - sums[0]) * np.log(2))
    return np.array(ratios)


def summarise_variants(
    kinds: Sequence[str], effects: Sequence[str | None], log_ratios: Sequence[float]
) -> dict[str, Any]:
    """Quartiles of the log-ratio by class, and how well a low one tells classes apart.

    Args:
        kinds, effects, log_ratios: of every substitution, as in `Planted`.

    Returns:
        `groups` {class: {count, quartiles}} and `auc` {comparison: (area under the ROC curve, standard error)}.
    """
    ratios = np.array(log_ratios)
    kind, effect = np.array(kinds), np.array([effect or "" for effect in effects])
    coding = np.isin(kind, CODON_CLASSES[:2])
    groups: dict[str, NDArray[np.bool_]] = {name: kind == name for name in (*CODON_CLASSES, INTERGENIC)}
    groups |= {name: effect == name for name in EFFECTS}
    comparisons: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {
        "codon positions 1 and 2 against 3": (coding, groups[CODON_CLASSES[2]]),
        "codon positions 1 and 2 against intergenic": (coding, groups[INTERGENIC]),
        "all coding against intergenic": (~groups[INTERGENIC], groups[INTERGENIC]),
        "missense and nonsense against synonymous": (np.isin(effect, EFFECTS[1:]), groups[EFFECTS[0]]),
        "nonsense against synonymous": (groups[EFFECTS[2]], groups[EFFECTS[0]]),
    }
    return {
        "groups": {
            name: {"count": int(mask.sum()), "quartiles": np.percentile(ratios[mask], [25, 50, 75]).tolist()}
            for name, mask in groups.items()
            if mask.any()
        },
        "auc": {
            name: auc(-ratios[worse], -ratios[other])
            for name, (worse, other) in comparisons.items()
            if worse.any() and other.any()
        },
    }


def auc(positives: Floats, negatives: Floats) -> tuple[float, float]:
    """Chance that a positive value is above a negative one, ties half, and its standard error.

    The error is that of Hanley and McNeil 1982 (Radiology 143, 29-36).
    """
    from sklearn.metrics import roc_auc_score

    labels = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    area = float(roc_auc_score(labels, np.concatenate([positives, negatives])))
    above, below = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
    variance = area * (1 - area) + (len(positives) - 1) * above + (len(negatives) - 1) * below
    return area, math.sqrt(max(0.0, variance) / (len(positives) * len(negatives)))


# ---- embeddings


def embed_genome(model_dir: str | Path, fasta: Path, output: Path, *, options: Sequence[str]) -> dict[str, Any]:
    """Run `hyena embed` in a process of its own and measure it.

    Returns:
        The command, seconds and peak memory (resident bytes) of the process.

    Raises:
        RuntimeError: the command failed; the message holds the end of what it said.
    """
    words = ["embed", str(model_dir), str(fasta), str(output), *options]
    log = output.with_suffix(".log")
    begun = time.perf_counter()
    code, peak = run_measured([sys.executable, "-c", "from hyena_hf.cli.main import main; main()", *words], log)
    if code:
        raise RuntimeError(f"hyena {' '.join(words)} failed: {log.read_text()[-2_000:]}")
    return {
        "command": f"hyena {' '.join(words)}",
        "seconds": time.perf_counter() - begun,
        "peak_bytes": peak,
    }
