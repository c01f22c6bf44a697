"""Labelled sequences from local files, and the published DNA classification tasks.

    data = read_task("human_nontata_promoters/")            # a folder with train and test, in any layout below
    data = read_task("H3K4me1/", definition=TASKS["H3K4me1"])    # and checked against the published task

A folder holds the splits `train`, `test` and, if there is one, `validation` (or `valid`, `val`, `dev`), each as

    train/CLASS/*.txt             one sequence a file, as the `genomic-benchmarks` package writes them
    train.csv .tsv .parquet       columns `sequence` and `label`, as GUE and the Hub's parquet files have them
    train.fna .fa .fasta          headers `>name|label`, as the Nucleotide Transformer publishes its tasks

and the text files may end in `.gz`. Labels are names or numbers; the classes are those of the training split. With
`per_token=True` a label says something of every character: numbers separated by spaces, a list (Parquet), or as many
letters as the sequence has.

Without a validation split, a tenth of the training sequences is held out, chosen by a hash of the sequence so that
equal ones stay together; a sequence and its reverse complement count as equal. Those that stand in training and test
alike are counted in a warning.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO


logger = logging.getLogger(__name__)

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
FASTA_SUFFIXES = frozenset([".fna", ".fa", ".fasta"])
TABLE_SUFFIXES = frozenset([".csv", ".tsv"])
PARQUET_SUFFIX = ".parquet"
UNLABELLED = -100
_SEQUENCE_COLUMN, _LABEL_COLUMN = "sequence", "label"
_COMPLEMENT = str.maketrans("ACGTRYKMBVDH", "TGCAYRMKVBHD")


@dataclass(frozen=True)
class TaskDefinition:
    """A published task."""

    suite: str
    num_classes: int
    length: int  # of every sequence, or the median where they differ
    fixed_length: bool
    train_rows: int
    metric: str  # that of the published figures; "f1" is the macro mean
    reported: float | None = None  # HyenaDNA's, in percent


def _genomic_benchmark(
    train_rows: int, length: int, *, num_classes: int = 2, fixed: bool = True, reported: float | None = None
) -> TaskDefinition:
    return TaskDefinition("GenomicBenchmarks", num_classes, length, fixed, train_rows, "accuracy", reported)


# Gresova et al. 2023, BMC Genomic Data 24:25. Classes and lengths: HyenaDNA's genomic_benchmark.yaml; rows: the tests
# of the genomic-benchmarks package. Reported: only the two figures that HyenaDNA's issue 60 quotes; the others of
# Nguyen et al. 2023, arXiv:2306.15794, could not be re-read here and are left out.
GENOMIC_BENCHMARKS: dict[str, TaskDefinition] = {
    "dummy_mouse_enhancers_ensembl": _genomic_benchmark(968, 2381, fixed=False, reported=85.1),
    "demo_coding_vs_intergenomic_seqs": _genomic_benchmark(75_000, 200),
    "demo_human_or_worm": _genomic_benchmark(75_000, 200),
    "human_enhancers_cohn": _genomic_benchmark(20_843, 500, reported=74.2),
    "human_enhancers_ensembl": _genomic_benchmark(123_872, 269, fixed=False),
    "human_ensembl_regulatory": _genomic_benchmark(231_348, 401, num_classes=3, fixed=False),
    "human_nontata_promoters": _genomic_benchmark(27_097, 251),
    "human_ocr_ensembl": _genomic_benchmark(139_804, 315, fixed=False),
}


def _nucleotide_task(train_rows: int, length: int, metric: str, num_classes: int = 2) -> TaskDefinition:
    return TaskDefinition("Nucleotide Transformer", num_classes, length, True, train_rows, metric)


# Dalla-Torre et al. 2024, Nature Methods, the first release of the 18 tasks, which HyenaDNA's figures are of (the
# revised release has other marks and lengths). Values: HyenaDNA's nucleotide_transformer.yaml, which lacks
# splice_sites_all; that one and the names are those of the data set on the Hub
# (InstaDeepAI/nucleotide_transformer_downstream_tasks).
NUCLEOTIDE_TRANSFORMER: dict[str, TaskDefinition] = {
    "enhancers": _nucleotide_task(14_968, 200, "mcc"),
    "enhancers_types": _nucleotide_task(14_968, 200, "mcc", num_classes=3),
    "H3": _nucleotide_task(13_468, 500, "mcc"),
    "H3K4me1": _nucleotide_task(28_509, 500, "mcc"),
    "H3K4me2": _nucleotide_task(27_614, 500, "mcc"),
    "H3K4me3": _nucleotide_task(33_119, 500, "mcc"),
    "H3K9ac": _nucleotide_task(25_003, 500, "mcc"),
    "H3K14ac": _nucleotide_task(29_743, 500, "mcc"),
    "H3K36me3": _nucleotide_task(31_392, 500, "mcc"),
    "H3K79me3": _nucleotide_task(25_953, 500, "mcc"),
    "H4": _nucleotide_task(13_140, 500, "mcc"),
    "H4ac": _nucleotide_task(30_685, 500, "mcc"),
    "promoter_all": _nucleotide_task(53_276, 300, "f1"),
    "promoter_no_tata": _nucleotide_task(47_759, 300, "f1"),
    "promoter_tata": _nucleotide_task(5_517, 300, "f1"),
    "splice_sites_acceptors": _nucleotide_task(19_961, 600, "f1"),
    "splice_sites_donors": _nucleotide_task(19_775, 600, "f1"),
    "splice_sites_all": _nucleotide_task(27_000, 400, "accuracy", num_classes=3),
}
TASKS: dict[str, TaskDefinition] = {**GENOMIC_BENCHMARKS, **NUCLEOTIDE_TRANSFORMER}


class Example(NamedTuple):
    """One sequence with the number of its class, or one for every character."""

    name: str
    sequence: str
    label: int | tuple[int, ...]


@dataclass(frozen=True)
class TaskData:
    """The splits of a task; `leaked` sequences of the test split stand in training too."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    classes: list[str]
    leaked: int
    held_out: bool  # whether the validation split was taken from the training data


class _Row(NamedTuple):
    """A sequence and its label as they stand in a file."""

    name: str  # says where: the file and the row
    sequence: str
    label: Any


def read_task(
    folder: str | Path,
    *,
    definition: TaskDefinition | None = None,
    per_token: bool = False,
    validation: float = 0.1,
) -> TaskData:
    """Read the splits of a classification task from a folder; see the module docstring.

    Args:
        folder: holds the splits.
        definition: a published task that the data must agree with in classes and lengths.
        per_token: whether a label says something of every character.
        validation: share of the training sequences held out where the folder has no validation split.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a split is missing, empty or there twice; a row lacks a sequence or a label; a label that training
            does not know; fewer than two classes; data that contradict the definition.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with the splits train and test")
    rows = {split: _read_split(folder, split) for split in SPLITS}
    classes = _classes(rows["train"] or [], per_token)
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {
        split: [_example(row, numbers, per_token) for row in found]
        for split, found in rows.items()
        if found is not None
    }
    if definition is not None:
        _check_definition(splits, classes, definition)
    leaked = count_leaks(splits["train"], splits["test"])
    if leaked:
        logger.warning(
            "%s: %d of %d test sequences stand in the training split too (as they are or as reverse complements); "
            "test figures are too good by what was learned by heart",
            folder, leaked, len(splits["test"]),
        )  # fmt: skip
    held_out = "validation" not in splits
    if held_out:
        splits["train"], splits["validation"] = hold_out(splits["train"], validation)
    return TaskData(splits["train"], splits["validation"], splits["test"], classes, leaked, held_out)


def count_leaks(train: Sequence[Example], test: Sequence[Example]) -> int:
    """Test sequences that training has too, as they are or as reverse complements, in either case."""
    known = {_canonical(example.sequence) for example in train}
    return sum(_canonical(example.sequence) in known for example in test)


def hold_out(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Divide examples into those that stay and about `fraction` held out, by a hash of the sequence alone.

    Raises:
        ValueError: a fraction out of range, or so few sequences that a part is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction must lie between 0 and 1, got {fraction}")
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        digest = hashlib.sha256(_canonical(example.sequence).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") / 2**64 < fraction].append(example)
    if not all(parts):
        raise ValueError(
            f"{len(examples)} training sequences are too few to hold out {fraction:.0%} of them; add a validation "
            "split"
        )
    return parts


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Headers (without `>`) and sequences of a FASTA file, `.gz` or not.

    Raises:
        ImportError: Biopython is missing.
        ValueError: text before the first header.
    """
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ImportError as error:
        raise ImportError("FASTA files need Biopython; install it with: pip install 'hyena-hf[genomes]'") from error
    with _open_text(path) as file:
        first = file.read(1)
        if first not in (">", ""):
            raise ValueError(f"{path} is not FASTA: it begins with {first!r}, expected '>'")
    with _open_text(path) as file:
        yield from SimpleFastaParser(file)


def suffix_of(path: Path) -> str:
    """The suffix that tells the format: that before .gz, if any."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _canonical(sequence: str) -> str:
    """The same text for a sequence and its reverse complement."""
    upper = sequence.upper()
    return min(upper, upper.translate(_COMPLEMENT)[::-1])


def _read_split(folder: Path, split: str) -> list[_Row] | None:
    """Rows of a split; None where there is no validation split."""
    found = [path for path in sorted(folder.iterdir()) if _split_name(path) in SPLITS[split]]
    if not found:
        if split == "validation":
            return None
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{folder} has no {split} split; expected {split}/CLASS/*.txt or {split}.csv, .tsv, .parquet, .fna, .fa, "
            f".fasta; it holds {there}"
        )
    if len(found) > 1:
        raise ValueError(f"{folder} has several {split} splits: {', '.join(path.name for path in found)}; keep one")
    rows = list(_read_rows(found[0]))
    if not rows:
        raise ValueError(f"{found[0]} holds no sequences; expected at least one")
    for row in rows:
        if not isinstance(row.sequence, str) or not row.sequence:
            raise ValueError(f"{row.name} has no sequence (column {_SEQUENCE_COLUMN!r}); got {row.sequence!r}")
        if row.label is None or row.label == "":
            raise ValueError(f"{row.name} has no label (column {_LABEL_COLUMN!r}, or `|label` at the end of a header)")
    return rows


def _split_name(path: Path) -> str:
    """The split that a folder or file with a known suffix is named after, or nothing."""
    if path.is_dir():
        return path.name
    known = FASTA_SUFFIXES | TABLE_SUFFIXES | {PARQUET_SUFFIX}
    return path.name.split(".")[0] if suffix_of(path) in known else ""


def _read_rows(path: Path) -> Iterator[_Row]:
    if path.is_dir():
        yield from _read_class_folders(path)
    elif suffix_of(path) in FASTA_SUFFIXES:
        for header, sequence in read_fasta(path):
            name, separator, label = header.rpartition("|")
            yield _Row(f"{path}, record {name or header!r}", sequence, label.strip() if separator else None)
    elif suffix_of(path) == PARQUET_SUFFIX:
        yield from _read_parquet(path)
    else:
        yield from _read_table(path)


def _read_class_folders(folder: Path) -> Iterator[_Row]:
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(class_folder.glob("*.txt")):
            yield _Row(str(file), "".join(file.read_text().split()), class_folder.name)


def _read_table(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # a sequence may be a chromosome
    with _open_text(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if suffix_of(path) == ".tsv" else ",")
        _check_columns(path, reader.fieldnames or [])
        for row in reader:
            yield _Row(f"{path}, line {reader.line_num}", row[_SEQUENCE_COLUMN], row[_LABEL_COLUMN])


def _read_parquet(path: Path) -> Iterator[_Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow; install it with: pip install 'hyena-hf[train]'") from error
    with parquet.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=[_SEQUENCE_COLUMN, _LABEL_COLUMN]):
            for row in batch.to_pylist():
                number += 1
                yield _Row(f"{path}, row {number}", row[_SEQUENCE_COLUMN], row[_LABEL_COLUMN])


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = {_SEQUENCE_COLUMN, _LABEL_COLUMN} - set(columns)
    if missing:
        raise ValueError(
            f"{path} has no column {' or '.join(map(repr, sorted(missing)))}; it has {', '.join(columns) or 'none'}"
        )


def _open_text(path: Path) -> TextIO:
    return gzip.open(path, "rt") if path.suffix.lower() == ".gz" else path.open()


def _names(row: _Row, per_token: bool) -> list[str]:
    """Class names of a row: one, or one a character."""
    if not per_token:
        if isinstance(row.label, list | tuple):
            raise ValueError(f"{row.name} has a list as its label; labels for every character need --task token")
        return [str(row.label)]
    if isinstance(row.label, list | tuple):
        names = [str(label) for label in row.label]
    else:
        names = row.label.split() if " " in str(row.label) else list(str(row.label))
    if len(names) != len(row.sequence):
        raise ValueError(
            f"{row.name} has {len(names)} labels for {len(row.sequence)} characters; give one for each, as one letter "
            "or separated by spaces"
        )
    return names


def _classes(train: Sequence[_Row], per_token: bool) -> list[str]:
    """Names of the classes, in the order of numbers where they are numbers."""
    found = {name for row in train for name in _names(row, per_token)} - {str(UNLABELLED)}
    if len(found) < 2:
        raise ValueError(f"the training split has one class only ({', '.join(found)}); expected at least two")
    whole = all(name.isdigit() for name in found)
    return sorted(found, key=int) if whole else sorted(found)


def _example(row: _Row, numbers: dict[str, int], per_token: bool) -> Example:
    labels = []
    for name in _names(row, per_token):
        if name not in numbers and not (per_token and name == str(UNLABELLED)):
            raise ValueError(
                f"{row.name} has the label {name!r}, which no training row has; they have {', '.join(numbers)}"
            )
        labels.append(numbers.get(name, UNLABELLED))
    return Example(row.name, row.sequence, tuple(labels) if per_token else labels[0])


def _check_definition(splits: dict[str, list[Example]], classes: list[str], definition: TaskDefinition) -> None:
    if len(classes) != definition.num_classes:
        raise ValueError(
            f"the data have {len(classes)} classes ({', '.join(classes)}), the published task has "
            f"{definition.num_classes}; are these the files of another task?"
        )
    lengths = Counter(len(example.sequence) for examples in splits.values() for example in examples)
    if definition.fixed_length and max(lengths) > definition.length:
        raise ValueError(
            f"the longest sequence has {max(lengths)} characters, in the published task all have {definition.length}; "
            "are these the files of another release? Leave --benchmark out to train on them"
        )
