# SPDX-License-Identifier: Apache-2.0
"""Tables that are written in parts, so that a killed run goes on where it was.

Beside `OUT` stands a folder `OUT.parts` while work goes on: finished parts, renamed into place whole, and a manifest
of what they were made from. The last step joins the parts into `OUT`, and removes the folder.
"""

from __future__ import annotations

import csv
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .manifest import claim, whole
from .processes import processes, share


Item = TypeVar("Item")
Row = tuple[Any, ...]


class ResumableTable:
    """A table in the making.

    Args:
        path: Of the table: `.tsv` (tab-separated, with a header; nothing for a missing value) or `.parquet`.
        columns: Names, and str, int or float; any value may be missing (None).
        origin: What the rows depend on, in values of JSON.

    Attributes:
        done: Parts that an earlier run has finished.

    Raises:
        ImportError: Parquet without pyarrow.
        ValueError: Another ending, a table that exists already, a folder of parts that is not ours, or parts that were
            made from something else.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, type], origin: Mapping[str, Any]) -> None:
        self.path = Path(path)
        check_output(self.path)
        self.columns = dict(columns)
        self._format = _format(self.path)
        self._folder = self.path.with_name(f"{self.path.name}.parts")
        try:
            claim(self._folder, {"columns": list(columns), **origin})
        except ValueError as error:
            raise ValueError(f"{error}. It holds parts of {self.path}: name another table, or delete it") from error
        self.done = 0
        while self._part(self.done).exists():
            self.done += 1
        self._count = self.done

    def append(self, rows: Iterable[Row]) -> None:
        """Write the next part; it is there whole or not at all."""
        target = self._part(self._count)
        with whole(target) as unfinished:
            self._format.write(unfinished, self.columns, iter([list(rows)]))
        self._count += 1

    def publish(self, companion: Callable[[Path], None] | None = None) -> None:
        """Join the parts into the table.

        Args:
            companion: Makes another file from the whole table, before that has its name: a run that was killed
                meanwhile is started again by the same command, and has only this left to do.
        """
        parts = [self._part(number) for number in range(self._count)]
        with whole(self._folder / f"all{self.path.suffix}") as unfinished:
            rows = (list(self._format.read(part, self.columns)) for part in parts)
            self._format.write(unfinished, self.columns, rows)
        if companion is not None:
            try:
                companion(self._folder / f"all{self.path.suffix}")
            except ValueError as error:
                raise ValueError(
                    f"{error}. {self._folder} keeps the rows: the same command without this second file writes "
                    f"{self.path}"
                ) from error
        check_output(self.path)  # nobody else has written it meanwhile
        (self._folder / f"all{self.path.suffix}").replace(self.path)
        shutil.rmtree(self._folder)

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}{self.path.suffix}"


def write_in_parts(
    open_table: Callable[[], ResumableTable],
    batches: Iterable[list[Item]],
    rows: Callable[[list[Item]], list[Row]],
    companion: Callable[[Path], None] | None = None,
) -> None:
    """Fill a table, part by part, without what an earlier run has done.

    Where several processes share the scoring, the first one writes; all make the same calls.

    Args:
        open_table: Makes the table.
        batches: What each part is made from; the same ones in every run.
        rows: The rows of a part.
        companion: As for `ResumableTable.publish`.
    """
    rank, world = processes(distributed=True)
    table: Any = share(lambda: open_table() if rank == 0 else None, world)[0]
    for number, batch in enumerate(batches):
        if number < table.done:
            continue
        made = rows(batch)
        if rank == 0:
            table.append(made)
    share(lambda: table.publish(companion) if rank == 0 else None, world)


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def check_output(path: Path) -> None:
    """Refuse a path that exists, or has an ending that says no format."""
    _format(path)
    if path.exists():
        raise ValueError(f"{path} exists already and is not overwritten; name another file, or delete it")


def read_rows(path: Path, columns: Mapping[str, type]) -> Iterator[Row]:
    """Rows of a finished table, one after another.

    Raises:
        ValueError: The file has other columns.
    """
    return _format(path).read(path, columns)


def _format(path: Path) -> type[_Tsv] | type[_Parquet]:
    formats = {".tsv": _Tsv, ".parquet": _Parquet}
    if path.suffix not in formats:
        raise ValueError(f"{path} ends in {path.suffix!r}, but a table is written as .tsv or .parquet; rename it")
    return formats[path.suffix]


class _Tsv:
    @staticmethod
    def write(path: Path, columns: Mapping[str, type], parts: Iterator[list[Row]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            writer.writerow(columns)
            for rows in parts:
                writer.writerows(rows)  # float as its repr, which reads back exactly; None as nothing

    @staticmethod
    def read(path: Path, columns: Mapping[str, type]) -> Iterator[Row]:
        kinds = list(columns.values())
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.reader(handle, delimiter="\t")
            _check_columns(path, next(reader, []), columns)
            for row in reader:
                yield tuple(None if text == "" else kind(text) for kind, text in zip(kinds, row, strict=True))


class _Parquet:
    @staticmethod
    def write(path: Path, columns: Mapping[str, type], parts: Iterator[list[Row]]) -> None:
        pyarrow, parquet = _pyarrow()
        kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
        with parquet.ParquetWriter(path, schema) as writer:
            for rows in parts:
                values = zip(*rows, strict=True) if rows else [()] * len(columns)
                arrays = [pyarrow.array(value, field.type) for value, field in zip(values, schema, strict=True)]
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

    @staticmethod
    def read(path: Path, columns: Mapping[str, type]) -> Iterator[Row]:
        _, parquet = _pyarrow()
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches():
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'hyena-hf[genomes]', or write .tsv") from error
    return pyarrow, pyarrow.parquet


def _check_columns(path: Path, found: Iterable[str], columns: Mapping[str, type]) -> None:
    if list(found) != list(columns):
        raise ValueError(f"{path} has the columns {', '.join(found)}; expected {', '.join(columns)}")
