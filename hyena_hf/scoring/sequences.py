# SPDX-License-Identifier: Apache-2.0
"""Named sequences from files: FASTA and FASTQ by pysam, tables by datasets and csv, or lines; windows of them.

| suffix, `.gz` behind it where marked * | is read as                                      | case      |
|----------------------------------------|-------------------------------------------------|-----------|
| .fa .fasta .fna .ffn .faa *            | FASTA                                           | capitals  |
| .fq .fastq *                           | FASTQ; qualities are not used                   | capitals  |
| .txt .seq *                            | one sequence a line                             | as it is  |
| .parquet .csv .tsv .jsonl .json        | a table with a column of sequences              | as it is  |
| a folder                               | a data set that `Dataset.save_to_disk` wrote    | as it is  |

Lower case marks repeats in FASTA (soft masking), and published DNA models were trained on capitals.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from .reference import check_end


FASTA = (".fa", ".fasta", ".fna", ".ffn", ".faa")
FASTQ = (".fq", ".fastq")
LINES = (".txt", ".seq")
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
CASES = ("auto", "upper", "keep")
_FIELD = 2**31 - 1  # letters of a field of CSV
_AMBIGUOUS = "RYSWKMBDHV"
_LOWER = bytes(range(ord("a"), ord("z") + 1))
_BOTH_CASES = (_AMBIGUOUS + _AMBIGUOUS.lower()).encode()
_TO_N = str.maketrans(_BOTH_CASES.decode(), "N" * len(_AMBIGUOUS) + "n" * len(_AMBIGUOUS))


@dataclass(frozen=True)
class Record:
    """A named sequence.

    Attributes:
        id: Its name, or its number in the file, from 1.
        sequence: Its letters.
    """

    id: str
    sequence: str


def read_sequences(
    path: str | Path, *, column: str = "sequence", id_column: str | None = None, case: str = "auto"
) -> Iterator[Record]:
    """Read the sequences of a file one by one.

    Args:
        path: File, or folder of a data set; its suffix tells what it is, as in the table above.
        column: Of a table, that of the sequences.
        id_column: Of a table, that of the names; None: rows are numbered.
        case: `"upper"` turns lower-case letters into capitals, `"keep"` leaves them; `"auto"`: capitals in FASTA and
            FASTQ, the rest as it is.

    Returns:
        An iterator over `Record`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file of unknown kind, empty, broken, or with a record without name or letters, or a table without
            that column.
        ImportError: The reader of such files is not installed.
    """
    path = Path(path)
    if case not in CASES:
        raise ValueError(f"case must be one of {CASES}, got {case!r}")
    kind = kind_of(path)
    if kind in (FASTA, FASTQ):
        records = _read_fastx(path, b">" if kind is FASTA else b"@")
    elif kind is LINES:
        records = _read_lines(path)
    else:
        records = _read_table(path, column, id_column)
    upper = case == "upper" or (case == "auto" and is_fastx(path))
    return _checked(path, records, upper=upper)


def is_fastx(path: Path) -> bool:
    """Whether a path is FASTA or FASTQ by its suffix."""
    return kind_of(path) in (FASTA, FASTQ)


def kind_of(path: Path) -> Any:
    """The group of suffixes that a path belongs to.

    Raises:
        FileNotFoundError, ValueError: As `read_sequences`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name a file of sequences")
    if path.is_dir():
        return TABLES
    names = path.name.lower().removesuffix(".gz")
    packed = path.name.lower().endswith(".gz")
    for kind in (FASTA, FASTQ, LINES) if packed else (FASTA, FASTQ, LINES, TABLES):
        if names.endswith(tuple(kind)):
            return kind
    known = ", ".join([*FASTA, *FASTQ, *LINES, *TABLES])
    raise ValueError(f"{path} has a suffix that says nothing of its kind; known are {known}, the first with .gz too")


def _checked(path: Path, records: Iterable[Record], *, upper: bool) -> Iterator[Record]:
    number = 0
    for number, record in enumerate(records, 1):
        if not record.sequence:
            raise ValueError(f"record {number} of {path} ({record.id!r}) has no letters; remove it")
        yield Record(record.id, record.sequence.upper()) if upper else record
    if number == 0:
        raise ValueError(f"{path} holds no sequences; is it the right file?")


def _read_fastx(path: Path, sign: bytes) -> Iterator[Record]:
    try:
        import pysam
    except ImportError as error:
        raise ImportError("FASTA and FASTQ are read by pysam: pip install 'hyena-hf[genomes]'") from error
    check_end(path)
    # htslib would skip what stands before the first record, and all of a file without any
    with _open(path) as file:
        try:
            first = next((line for line in iter(lambda: file.readline(1 << 16), b"") if line.strip()), b"")
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}); copy it again") from error
    if first and not first.lstrip().startswith(sign):
        raise ValueError(
            f"{path} begins with {first[:20]!r}, but its suffix promises records that begin with {sign!r}"
        )
    entries = _entries(path, pysam)
    for number, (name, letters, quality) in enumerate(entries, 1):
        if not name:
            raise ValueError(f"record {number} of {path} has no name; give it one")
        if sign == b"@" and quality is None:
            raise ValueError(f"record {number} of {path} ({name!r}) has no qualities; copy the file again or mend it")
        yield Record(name, "".join((letters or "").split()))


def _entries(path: Path, pysam: Any) -> Iterator[tuple[str, str | None, str | None]]:
    number = 0
    try:
        with pysam.FastxFile(str(path)) as file:
            for entry in file:
                number += 1
                yield entry.name, entry.sequence, entry.quality
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is broken behind record {number} ({error}); copy it again or mend it") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading, unpacked by what it begins with rather than by its name."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield cast("IO[bytes]", unpacked)


def _read_lines(path: Path) -> Iterator[Record]:
    blank = None
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = line.decode().strip()
                if not text:
                    blank = blank or number
                    continue
                if blank is not None:  # at the end of a file it is none
                    raise ValueError(f"line {blank} of {path} is blank; remove it")
                yield Record(str(number), text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable text ({error}); copy it again") from error


def _read_table(path: Path, column: str, id_column: str | None) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("tables are read by datasets: pip install 'hyena-hf[genomes]'") from error
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; is it the right file?")
    for number, row in enumerate(_rows(datasets, path), 1):
        wanted = [column] if id_column is None else [column, id_column]
        if missing := [name for name in wanted if name not in row]:
            raise ValueError(f"{path} has no column {missing[0]!r} but {', '.join(row)}; name one of them")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"column {column!r} of {path} holds {type(text).__name__}, not text; name another one")
        yield Record(str(number if id_column is None else row[id_column]), text or "")


def _rows(datasets: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a table, one by one: nothing is copied into a cache."""
    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            yield from _csv_rows(path)
            return
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        else:
            kind = TABLES[path.suffix.lower()]
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        if isinstance(rows, dict):
            raise ValueError(f"it holds several splits, {', '.join(rows)}; name the folder of one")
        yield from rows
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # pyarrow's are ValueErrors
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """By csv: pandas takes surplus fields for an index and skips blank lines, which shifts the others."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_FIELD)  # the default, 131,072 letters, is less than a contig
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _named_fields(csv.reader(file, delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"{error}; mend its quotes, or write it again") from error


def _named_fields(lines: Any) -> Iterator[dict[str, str]]:
    names: list[str] = next(lines, [])
    if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(f"its header names {repeated[0]!r} {names.count(repeated[0])} times; rename one")
    blank, first = None, lines.line_num + 1
    for fields in lines:
        number, first = first, lines.line_num + 1  # a field in quotes may have several lines
        if not fields or (len(fields) == 1 and fields[0].isspace()):
            blank = blank or number
            continue
        if blank is not None:  # at the end of a file it is none
            raise ValueError(f"line {blank} is blank; remove it")
        if len(fields) != len(names):
            raise ValueError(
                f"line {number} has {len(fields)} fields, but the header names {len(names)}; mend that line or the "
                f"header (a field that holds the separator needs quotes)"
            )
        yield dict(zip(names, fields, strict=True))


def windows(records: Iterable[Record], length: int, stride: int | None = None) -> Iterator[Record]:
    """Windows of records, named `id:first-last` (positions from 1, both included).

    The last window of a record ends where the record does, and may be shorter.

    Args:
        records: The sequences.
        length: Letters of a window.
        stride: Letters from one window's start to the next; None: `length`.

    Raises:
        ValueError: length below 1, or a stride outside 1 to length, which would skip letters.
    """
    stride = length if stride is None else stride
    if length < 1:
        raise ValueError(f"windows of {length} letters hold nothing; use at least 1")
    if not 1 <= stride <= length:
        raise ValueError(f"a stride of {stride} letters between windows of {length}: use 1 to {length}")
    return _windows(records, length, stride)


def _windows(records: Iterable[Record], length: int, stride: int) -> Iterator[Record]:
    for record in records:
        for start in range(0, max(len(record.sequence) - length, 0) + stride, stride):
            part = record.sequence[start : start + length]
            if start and start + length - stride >= len(record.sequence):
                break  # the window before ended the record
            yield Record(f"{record.id}:{start + 1}-{start + len(part)}", part)


class Cleaning:
    """Letters that a tokenizer would not know, as it knows them; counts what it changes.

    IUPAC letters of ambiguous bases become N where a tokenizer knows N but not them. One that was told to read them as
    [UNK] (`ambiguous="unk"`) still does.

    Args:
        tokenizer: Of the model.
        upper: Whether lower-case letters become capitals.

    Attributes:
        lower: Lower-case letters so far.
        ambiguous: Ambiguous letters so far.
    """

    def __init__(self, tokenizer: Any, *, upper: bool) -> None:
        vocabulary = tokenizer.get_vocab()
        lacks = "N" in vocabulary and not any(letter in vocabulary for letter in _AMBIGUOUS)
        self._replaces = lacks and getattr(tokenizer, "ambiguous", "N") == "N"
        self._upper = upper
        self.lower = 0
        self.ambiguous = 0

    def __call__(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        if self._upper and (found := _count(text, _LOWER)):
            self.lower += found
            text = text.upper()
        if self._replaces and (found := _count(text, _BOTH_CASES)):
            self.ambiguous += found
            text = text.translate(_TO_N)
        return text


def _count(text: str, letters: bytes) -> int:
    data = text.encode("ascii", "replace")
    return len(data) - len(data.translate(None, letters))
