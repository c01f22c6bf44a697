# SPDX-License-Identifier: Apache-2.0
"""Results of whole files in a folder of parts, which a killed run continues and several processes share.

A part holds the results of consecutive records. It is written under another name and renamed when it is whole; a run
that starts again skips parts that exist. The manifest beside them says what they were made of, so that no folder mixes
results of two models, inputs or options.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .batching import progress_bar
from .embedding import Embedder, pooled
from .likelihood import Scorer, reduced
from .manifest import (
    check_folder,
    claim,
    file_fingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
    whole,
    write_manifest,
)
from .processes import processes, share
from .sequences import CASES, Cleaning, Record, is_fastx, read_sequences, windows
from .task import Task


LETTERS = 1 << 20  # of a part; one record may have more
FORMATS = ("parquet", "safetensors")


@dataclass(frozen=True)
class Source:
    """Where sequences come from.

    Attributes:
        path: A file that `read_sequences` reads.
        column: As there.
        id_column: As there.
        case: As there.
        window: Letters of windows to cut records into; None: records stay whole.
        stride: Letters from one window's start to the next; None: `window`.
    """

    path: Path
    column: str = "sequence"
    id_column: str | None = None
    case: str = "auto"
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise ValueError(f"case must be one of {CASES}, got {self.case!r}")
        if self.stride is not None and self.window is None:
            raise ValueError(f"a stride of {self.stride} letters needs windows; give their length too")

    def cleaning(self, tokenizer: Any) -> Cleaning:
        """What is done to the letters for this tokenizer."""
        upper = self.case == "upper" or (self.case == "auto" and is_fastx(self.path))
        return Cleaning(tokenizer, upper=upper)

    def records(self, cleaning: Cleaning) -> Iterator[Record]:
        """The sequences, cleaned and cut."""
        records = read_sequences(self.path, column=self.column, id_column=self.id_column, case="keep")
        clean = (Record(record.id, cleaning(record.sequence)) for record in records)
        return clean if self.window is None else windows(clean, self.window, self.stride)

    def options(self) -> dict[str, Any]:
        """What decides on the records, but the file's name."""
        options = {"column": self.column, "id column": self.id_column, "case": self.case}
        return {**options, "windows": self.window, "stride": self.stride}


class Writer(ABC):
    """What a task writes of its results.

    Args:
        task: The task.
    """

    command: ClassVar[str]
    suffix: str = "parquet"

    def __init__(self, task: Task[Any]) -> None:
        self.task = task

    @abstractmethod
    def write(self, path: Path, records: list[Record], results: list[Any]) -> None:
        """Write a part."""


class ScoreWriter(Writer):
    """Columns `id`, `length` (letters), `tokens` (scored), `log_likelihood` (their sum), `mean_log_likelihood`."""

    command = "score"

    def __init__(self, task: Scorer) -> None:
        super().__init__(task)

    def write(self, path: Path, records: list[Record], results: list[Any]) -> None:
        """Write a part."""
        columns = {
            "id": [record.id for record in records],
            "length": [len(record.sequence) for record in records],
            "tokens": [sum(map(len, strands[0])) for strands in results],
            "log_likelihood": [reduced(strands, "sum") for strands in results],
            "mean_log_likelihood": [reduced(strands, "mean") for strands in results],
        }
        arrow().parquet.write_table(arrow().table(columns), path)


class EmbeddingWriter(Writer):
    """Parquet columns `id`, `length`, `embedding`; or tensors `embeddings` (n, D) and `lengths` (n,).

    Args:
        task: The task.
        suffix: One of `FORMATS`. Of safetensors the metadata hold the ids, as JSON.
    """

    command = "embed"

    def __init__(self, task: Embedder, suffix: str = "parquet") -> None:
        super().__init__(task)
        if suffix not in FORMATS:
            raise ValueError(f"the format must be one of {FORMATS}, got {suffix!r}")
        if task.pooling == "none":
            raise ValueError("files hold one vector a sequence; choose a pooling, or call embed() for all states")
        self.suffix = suffix

    def write(self, path: Path, records: list[Record], results: list[Any]) -> None:
        """Write a part."""
        ids, lengths = [record.id for record in records], [len(record.sequence) for record in records]
        vectors = np.stack([pooled(strands) for strands in results])
        if self.suffix == "safetensors":
            from safetensors.numpy import save_file

            tensors = {"embeddings": vectors, "lengths": np.array(lengths, np.int64)}
            save_file(tensors, path, metadata={"ids": json.dumps(ids)})
            return
        pa = arrow()
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        pa.parquet.write_table(pa.table({"id": ids, "length": lengths, "embedding": column}), path)


@dataclass(frozen=True)
class Summary:
    """What went into a folder.

    Attributes:
        records: Sequences.
        letters: Of all of them.
        lower: Lower-case letters that were read as capitals.
        ambiguous: Ambiguous letters that were read as N.
        parts: Files.
    """

    records: int
    letters: int
    lower: int
    ambiguous: int
    parts: int

    def __str__(self) -> str:
        notes = [f"{self.records:,} sequences, {self.letters:,} letters, {self.parts:,} parts"]
        if self.lower:
            notes.append(f"{self.lower:,} lower-case letters were read as capitals")
        if self.ambiguous:
            notes.append(f"{self.ambiguous:,} IUPAC letters of ambiguous bases were read as N")
        return "; ".join(notes)


def write_results(
    writer: Writer, source: Source, folder: Path, *, shard_size: int = 1000, progress: bool | None = None
) -> Summary:
    """Go over a file and write the results of its records into a folder of parts.

    The file is read once before, so that a broken record is found at the start. Processes of torchrun or accelerate
    share the parts.

    Args:
        writer: What to do with records, and how to write it.
        source: The records.
        folder: For results: new, empty, or begun by the same job, which is then continued.
        shard_size: Records of a part; fewer where they have more than `LETTERS` letters together.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.

    Raises:
        ValueError: The input is bad, or the folder holds something else.
        RuntimeError: Another process failed.
    """
    if shard_size < 1:
        raise ValueError(f"parts of {shard_size} records hold nothing; use at least 1")
    if writer.suffix == "parquet":
        arrow()
    rank, world = processes(True)

    def prepare() -> tuple[dict[str, Any], Summary] | None:
        if rank:
            return None
        check_folder(folder)
        summary = _survey(source, writer.task, shard_size)
        return claim(folder, _job(writer, source, shard_size)), summary

    manifest, summary = share(prepare, world)[0]
    shown = progress if rank == 0 else False

    def work() -> None:
        with writer.task.forward.running(), progress_bar(summary.letters, shown, "letter") as bar:
            records = source.records(source.cleaning(writer.task.encoder.tokenizer))
            for number, part in enumerate(_parts(records, shard_size)):
                path = folder / f"part-{number:05d}.{writer.suffix}"
                if number % world == rank and not path.exists():
                    _write_part(writer, path, part)
                bar.update(sum(len(record.sequence) for record in part))

    share(work, world)
    if rank == 0:
        write_manifest(folder, {**manifest, "summary": vars(summary)})
    return summary


def _write_part(writer: Writer, path: Path, records: list[Record]) -> None:
    task = writer.task
    pieces = [
        piece
        for index, record in enumerate(records)
        for piece in task.rows(index, record.sequence, f"record {record.id!r}")
    ]
    found = task(pieces, lambda _: None)
    with whole(path) as unfinished:
        writer.write(unfinished, records, [found[index] for index in range(len(records))])


def _job(writer: Writer, source: Source, shard_size: int) -> dict[str, Any]:
    """Everything that decides on the results; batches and chunks do not."""
    task = writer.task
    return {
        "command": writer.command,
        "model": model_fingerprint(task.forward.model),
        "tokenizer": tokenizer_fingerprint(task.encoder.tokenizer),
        "input": file_fingerprint(source.path),
        **source.options(),
        **task.options(),
        "records a part": shard_size,
        "format": writer.suffix,
    }


def _survey(source: Source, task: Task[Any], shard_size: int) -> Summary:
    cleaning = source.cleaning(task.encoder.tokenizer)
    records = letters = parts = 0
    for part in _parts(source.records(cleaning), shard_size):
        parts += 1
        records += len(part)
        letters += sum(len(record.sequence) for record in part)
    return Summary(records, letters, cleaning.lower, cleaning.ambiguous, parts)


def _parts(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    part, letters = [], 0
    for record in records:
        if part and (len(part) == size or letters + len(record.sequence) > LETTERS):
            yield part
            part, letters = [], 0
        part.append(record)
        letters += len(record.sequence)
    if part:
        yield part


def arrow() -> Any:
    """Pyarrow with its Parquet.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet is written by pyarrow: pip install 'hyena-hf[genomes]'") from error
    return pyarrow
