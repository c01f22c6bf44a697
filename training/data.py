"""Turn text on disk, a Hugging Face dataset or Python's own standard library into fixed-size rows of packed documents.

    documents = read_documents(["book.txt", "notes/", "corpus.jsonl.gz"])     # or ["hf:NAME"], ["hf:NAME:CONFIG"]
    splits = split_documents(documents)
    rows = pack_documents([tokenizer(d.text).input_ids for d in splits.train], length=512)

Packing. The tokens of all documents form one stream, in order, cut every `length` tokens: no token is lost and no row
but the last has padding. Each row carries `input_ids`, `position_ids` that restart at 0 where a document begins, and
`labels` that are -100 there: a document's first token is predicted from nothing. A document that crosses a row's end
goes on in the next row as a new piece: it sees nothing of the piece before, its positions restart and its first token
is not predicted. There is no attention mask: models read the boundaries from the position ids (ours, and transformers'
attention models when they make no cache). Padding is one more document without labels.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset


logger = logging.getLogger(__name__)

ENCODING_ERRORS = ("strict", "replace", "backslashreplace")  # "ignore" would drop bytes silently
TEXT_SUFFIXES = frozenset([".txt", ".md", ".rst", ".tex", ".html", ".csv", ".tsv", ".log"]) | frozenset(
    [".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs"]
)
LINE_SUFFIXES = frozenset([".jsonl", ".ndjson"])
TABLE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}  # read by the `datasets` package
UNPREDICTED = -100  # the label that transformers' losses leave out


class Document(NamedTuple):
    """One text and the name that decides its split and stands in error messages."""

    name: str
    text: str


class Splits(NamedTuple):
    """Disjoint documents for training, for choices such as the learning rate, and for the reported numbers."""

    train: list[Document]
    validation: list[Document]
    heldout: list[Document]


def read_documents(
    sources: Sequence[str | Path], *, text_column: str = "text", encoding_errors: str = "strict"
) -> list[Document]:
    """Read documents from files, folders and datasets.

    A text file is one document; a line of a .jsonl file is one, and so is a row of a dataset. `.gz` files are
    unpacked. Of a folder all such files are read, in the order of their names; others are counted in a warning. A
    folder written by `datasets.save_to_disk` is read as a dataset. Only a source that begins with `hf:` (`hf:NAME`,
    `hf:NAME:CONFIG`) may use the network; its `train` split is read.

    Args:
        sources: paths or `hf:` names.
        text_column: the field of .jsonl lines and dataset rows that holds the text.
        encoding_errors: what happens to bytes that are not UTF-8: `strict` refuses the file, `replace` puts U+FFFD,
            `backslashreplace` puts `\\xNN`; replacements are counted in a warning.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: bytes that are not UTF-8, a line that is not JSON, a missing text column, or no text at all.
    """
    if encoding_errors not in ENCODING_ERRORS:
        raise ValueError(f"encoding_errors must be one of {', '.join(ENCODING_ERRORS)}, got {encoding_errors!r}")
    if isinstance(sources, str | Path):
        raise TypeError(
            f"sources must be a sequence of paths or names, got the single value {sources!r}; put it in a list"
        )
    documents = []
    for source in sources:
        found = [document for document in _read_source(str(source), text_column, encoding_errors) if document.text]
        if not found:
            raise ValueError(f"{source} holds no text; expected at least one document that is not empty")
        documents += found
    if not documents:
        raise ValueError("no data source given; expected at least one path or hf:NAME")
    return documents


def stdlib_documents() -> list[Document]:
    """Python's own standard library as documents: real text (code and English) that every machine with Python has.

    Left out: tests (`test`, `tests`, `idle_test`; half of all bytes, and full of deliberately broken files), generated
    tables (`encodings`, `pydoc_data`, `config-*`, `_sysconfigdata*`) and installed packages. Names are paths relative
    to the library's root, so that `module_name` gives the module to which a document belongs.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")) if root.is_dir() else []:
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.parts[0].startswith(("config-", "_sysconfigdata")):
            text = _decode(path.read_bytes(), path, "replace")
            documents += [Document(name.as_posix(), text)] if text else []
    if sum(len(document.text) for document in documents) < 1_000_000:
        raise ValueError(
            f"only {len(documents)} readable source files of the standard library lie under {root}; "
            "expected a full Python installation, or give text of your own (--data PATH)"
        )
    return documents


_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"]
)


def module_name(name: str) -> str:
    """The top-level module of a standard-library document; `_name` is the private half of `name` and goes with it."""
    return name.split("/")[0].removesuffix(".py").lstrip("_")


def split_documents(
    documents: Sequence[Document],
    *,
    validation: float = 0.05,
    heldout: float = 0.05,
    group: Callable[[str], str] = str,
) -> Splits:
    """Divide documents by a hash of their group: a group is in the same split on every machine and in every order.

    The fractions are expectations, counted in groups. Where the hash leaves a split empty (few documents), each
    document is cut by position instead: its beginning trains, then come validation and held-out text.

    Args:
        documents: what to divide.
        validation, heldout: fractions above 0 with a sum below 1; `heldout` may be 0.
        group: maps a document's name to what must stay together, e.g. `module_name`; by default the name itself.

    Raises:
        ValueError: fractions out of range, or too little text for three splits.
    """
    if not (validation > 0 and heldout >= 0 and validation + heldout < 1):
        raise ValueError(
            f"validation ({validation}) and heldout ({heldout}) must be positive with a sum below 1, e.g. 0.05 each"
        )
    needed = 3 if heldout else 2
    splits = Splits([], [], [])
    for document in documents:
        draw = _uniform(f"hyena:{group(document.name)}")
        splits[1 if draw < validation else 2 if draw < validation + heldout else 0].append(document)
    if all(splits[:needed]):
        return splits
    splits = Splits([], [], [])
    for document in documents:
        size = len(document.text)
        ends = [0, round(size * (1 - validation - heldout)), round(size * (1 - heldout)), size]
        for part, begin, end in zip(splits, ends[:-1], ends[1:], strict=True):
            part.extend([Document(document.name, document.text[begin:end])] if begin < end else [])
    if not all(splits[:needed]):
        raise ValueError(
            f"{sum(len(document.text) for document in documents)} characters in {len(documents)} documents are too "
            "few for training, validation and held-out text; give more data"
        )
    return splits


def shuffle_documents(documents: Sequence[Document]) -> list[Document]:
    """Order documents by a hash of their names: a fixed order that mixes folders, the same on every machine."""
    return sorted(documents, key=lambda document: _uniform(f"order:{document.name}"))


def _uniform(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class PackedRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of `length` tokens cut from one stream of documents; see the module docstring."""

    def __init__(self, tokens: torch.Tensor, starts: torch.Tensor, length: int, pad_token_id: int = 0) -> None:
        """Hold a stream of N tokens (int) in which documents begin at `starts` (ascending, the first 0)."""
        padding = -len(tokens) % length
        self.length = length
        self.num_tokens = len(tokens)
        self.num_documents = len(starts)
        self._tokens = torch.cat([tokens, tokens.new_full((padding,), pad_token_id)])
        self._starts = torch.cat([starts, starts.new_tensor([len(tokens)])])  # padding begins a document of its own

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._tokens) // self.length

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return input_ids, position_ids and labels of one row, each (length,) int64."""
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in 0 .. {len(self) - 1}, got {row}")
        begin = row * self.length
        stream = torch.arange(begin, begin + self.length)
        document = torch.searchsorted(self._starts, stream, right=True) - 1
        position_ids = stream - self._starts[document].clamp(min=begin)
        input_ids = self._tokens[begin : begin + self.length].long()
        unpredicted = (position_ids == 0) | (stream >= self.num_tokens)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": input_ids.masked_fill(unpredicted, UNPREDICTED),
        }

    def first(self, rows: int) -> PackedRows:
        """The first `rows` rows, or all if there are fewer."""
        tokens = self._tokens[: min(rows * self.length, self.num_tokens)]
        return PackedRows(tokens, self._starts[:-1][self._starts[:-1] < len(tokens)], self.length)

    def with_length(self, length: int) -> PackedRows:
        """The same stream cut into rows of another length."""
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}; the first token of a row is never predicted")
        return PackedRows(self._tokens[: self.num_tokens], self._starts[:-1], length)

    def digest(self) -> str:
        """A short hash of tokens and boundaries, to tell one set of rows from another."""
        content = hashlib.sha256(self._tokens.numpy().tobytes())
        content.update(self._starts.numpy().tobytes())
        return content.hexdigest()[:16]


def pack_documents(
    documents: Iterable[Sequence[int] | torch.Tensor], length: int, *, pad_token_id: int = 0
) -> PackedRows:
    """Pack token ids of documents into rows of `length` tokens; no token is lost, none is seen across a boundary.

    Args:
        documents: token ids of each document; empty ones are skipped.
        length: tokens in a row, at least 2 (one is never predicted).
        pad_token_id: fills the last row, which no label looks at.

    Raises:
        ValueError: a length below 2, or no tokens at all.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}; the first token of a row is never predicted")
    pieces = [torch.as_tensor(document, dtype=torch.int32) for document in documents]
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        raise ValueError("no tokens to pack; expected at least one document that is not empty")
    sizes = torch.tensor([len(piece) for piece in pieces])
    return PackedRows(torch.cat(pieces), sizes.cumsum(0) - sizes, length, pad_token_id)


def collate_rows(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack packed rows into a batch, (B, length) each; no attention mask, so that positions mark the documents."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _read_source(source: str, text_column: str, encoding_errors: str) -> Iterator[Document]:
    if source.startswith("hf:"):
        import datasets

        name, _, config = source.removeprefix("hf:").partition(":")
        yield from _dataset_documents(datasets.load_dataset(name, config or None, split="train"), source, text_column)
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"data path {source!r} does not exist; expected a file or a folder, or hf:NAME for a dataset of the Hub"
        )
    if not path.is_dir():
        yield from _read_file(path, path.name, text_column, encoding_errors)
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(path))
        saved = saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
        yield from _dataset_documents(saved, source, text_column)
    else:
        yield from _read_folder(path, text_column, encoding_errors)


def _read_folder(folder: Path, text_column: str, encoding_errors: str) -> Iterator[Document]:
    known = TEXT_SUFFIXES | LINE_SUFFIXES | TABLE_BUILDERS.keys()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    skipped = [path for path in files if _suffix(path) not in known]
    if skipped:
        kinds = ", ".join(sorted({path.suffix or path.name for path in skipped})[:10])
        logger.warning("%s: %d files that are not known as text were left out (%s)", folder, len(skipped), kinds)
    for path in files:
        if _suffix(path) in known:
            yield from _read_file(path, path.relative_to(folder).as_posix(), text_column, encoding_errors)


def _suffix(path: Path) -> str:
    """The suffix that tells the format: that before .gz, if any."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path, name: str, text_column: str, encoding_errors: str) -> Iterator[Document]:
    suffix = _suffix(path)
    if suffix in TABLE_BUILDERS:
        import datasets

        rows = datasets.load_dataset(TABLE_BUILDERS[suffix], data_files=str(path), split="train")
        yield from _dataset_documents(rows, name, text_column)
        return
    text = _decode(_read_bytes(path), path, encoding_errors)
    if suffix not in LINE_SUFFIXES:
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Document(f"{name}:{number}", _json_text(line, f"{path}, line {number}", text_column))


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); pack it again") from error


def _decode(data: bytes, path: Path, encoding_errors: str) -> str:
    """Decode UTF-8; newlines stay as they are."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if encoding_errors == "strict":
            raise ValueError(
                f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
                "convert the file, or pass encoding_errors='replace' (--encoding-errors replace) to put U+FFFD there"
            ) from error
    text = data.decode("utf-8", errors=encoding_errors)
    lost = len(data) - len(data.decode("utf-8", errors="ignore").encode())
    logger.warning("%s: %d bytes that are not UTF-8 were replaced (%s)", path, lost, encoding_errors)
    return text


def _json_text(line: str, place: str, text_column: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); expected an object with a {text_column!r} field") from error
    return _column(row, place, text_column)


def _dataset_documents(rows: Iterable[Any], name: str, text_column: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        yield Document(f"{name}:{number}", _column(row, f"{name}, row {number}", text_column))


def _column(row: Any, place: str, text_column: str) -> str:
    text = row.get(text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(
            f"{place} has no text in {text_column!r}; it holds {fields}; "
            "name the field with text_column (--text-column)"
        )
    return text
