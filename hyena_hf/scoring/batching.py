# SPDX-License-Identifier: Apache-2.0
"""Rows of unequal length in batches: sorted by length, bounded in padding, halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .encoding import Piece


logger = logging.getLogger(__name__)

Result = TypeVar("Result")
BUDGETS = {"cpu": 1 << 14}  # tokens of a batch, padding included; of other devices:
_BUDGET = 1 << 17
_PADDING = 1.25  # most columns for a real token
_SHORTEST_CHUNK = 256
# what allocators and libraries say where torch has no type for it
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def check_batch_size(batch_size: int | str) -> None:
    """Refuse what is neither "auto" nor a number of rows."""
    if batch_size == "auto":
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be 'auto' or a number of sequences, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1, or 'auto'")


def check_chunk_length(chunk_length: int) -> None:
    """Refuse what is no number of tokens."""
    if isinstance(chunk_length, bool) or not isinstance(chunk_length, int):
        raise TypeError(f"chunk_length must be a number of tokens, got {chunk_length!r}")
    if chunk_length < 1:
        raise ValueError(f"chunk_length is {chunk_length}; use at least 1")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def plan(lengths: Sequence[int], *, rows: int | None, tokens: int | None) -> list[list[int]]:
    """Batches of rows of similar length, the longest first: whoever runs out of memory does so at once.

    Args:
        lengths: Tokens of every row.
        rows: Most rows of a batch; None: any number.
        tokens: Most tokens of a batch, padding included (one row may have more); None: any number, and then padding
            is not bounded either.

    Returns:
        Numbers of rows. Padding is at most a quarter of the real tokens where `tokens` is given.
    """
    batches: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        batch = batches[-1] if batches else []
        width = lengths[batch[0]] if batch else 0
        cells = width * (len(batch) + 1)
        full = rows is not None and len(batch) >= rows
        full = full or (tokens is not None and (cells > tokens or cells > _PADDING * (real + lengths[index])))
        if full or not batch:
            batches.append([])
            real = 0
        batches[-1].append(index)
        real += lengths[index]
    return batches


def pad(pieces: Sequence[Piece], token: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, L) int64, padded on the right, and their mask; None where all rows are full."""
    width = max(len(piece.tokens) for piece in pieces)
    ids = torch.full((len(pieces), width), token, dtype=torch.int64)
    mask = torch.zeros(len(pieces), width, dtype=torch.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece.tokens)] = torch.from_numpy(piece.tokens)
        mask[row, : len(piece.tokens)] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)


class Runner:
    """Run rows through a model in batches, and again in smaller ones when memory runs out.

    What was learned about memory holds for all calls.

    Args:
        batch_size: Rows of a batch, or "auto": as many as a budget of tokens holds.
        chunk_length: Rows longer than this run alone, in chunks of it; None: all run whole.
        device: Of the model.
    """

    def __init__(self, batch_size: int | str, chunk_length: int | None, device: torch.device) -> None:
        self.rows = None if batch_size == "auto" else int(batch_size)
        self.tokens = BUDGETS.get(device.type, _BUDGET) if batch_size == "auto" else None
        self.chunk_length = chunk_length

    def __call__(
        self,
        pieces: Sequence[Piece],
        together: Callable[[list[Piece]], list[Result]],
        in_chunks: Callable[[Piece, int], Result],
        advance: Callable[[int], Any],
    ) -> Iterator[tuple[Piece, Result]]:
        """Results with their rows, in the order of the batches.

        Args:
            pieces: The rows.
            together: Results of a batch.
            in_chunks: Result of one row, in chunks of so many tokens.
            advance: Told of the real tokens that are done.
        """
        waiting = [[pieces[index] for index in batch] for batch in self._plan(pieces)][::-1]
        while waiting:
            batch = waiting.pop()
            results = self._attempt(batch, together, in_chunks)
            if results is None:
                again = self._plan(batch)
                waiting += [[batch[index] for index in part] for part in again][::-1]
                continue
            yield from zip(batch, results, strict=True)
            advance(sum(len(piece.tokens) for piece in batch))

    def _plan(self, pieces: Sequence[Piece]) -> list[list[int]]:
        lengths = [len(piece.tokens) for piece in pieces]
        long = [index for index, length in enumerate(lengths) if self._is_long(length)]
        short = [index for index, length in enumerate(lengths) if not self._is_long(length)]
        batches = plan([lengths[index] for index in short], rows=self.rows, tokens=self.tokens)
        return [*([index] for index in long), *([short[index] for index in batch] for batch in batches)]

    def _is_long(self, length: int) -> bool:
        return self.chunk_length is not None and length > self.chunk_length

    def _attempt(
        self, batch: list[Piece], together: Callable[[list[Piece]], list[Result]], in_chunks: Callable
    ) -> list[Result] | None:
        """Results of a batch; None where memory ran out and limits have been halved."""
        try:
            if len(batch) == 1 and self._is_long(len(batch[0].tokens)):
                return [in_chunks(batch[0], self.chunk_length)]
            return together(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(batch, error)
        # outside of the handler: the error's traceback held the tensors of the attempt
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _halve(self, batch: list[Piece], error: BaseException) -> None:
        longest = max(len(piece.tokens) for piece in batch)
        if len(batch) > 1:
            if self.tokens is None:
                self.rows = len(batch) // 2
            else:
                self.tokens = longest * len(batch) // 2
            logger.warning(
                "out of memory with %d sequences of up to %d tokens; going on with half", len(batch), longest
            )
            return
        if self.chunk_length is None or min(longest, self.chunk_length) <= _SHORTEST_CHUNK:
            raise error
        self.chunk_length = max(min(longest, self.chunk_length) // 2, _SHORTEST_CHUNK)
        logger.warning(
            "out of memory with one sequence of %d tokens; going on in chunks of %d", longest, self.chunk_length
        )


def progress_bar(total: int, shown: bool | None, unit: str = "token") -> Any:
    """A bar on stderr; None: only where that is a terminal.

    Raises:
        ImportError: A bar was asked for, and tqdm is not installed.
    """
    import sys

    if shown is None:
        shown = sys.stderr.isatty()
    try:
        from tqdm import tqdm
    except ImportError as error:
        if shown:
            raise ImportError(
                "a progress bar needs tqdm: pip install 'hyena-hf[genomes]', or progress=False"
            ) from error
        return _NoBar()
    return tqdm(total=total, unit=unit, unit_scale=True, disable=not shown, file=sys.stderr)


class _NoBar:
    """What is used of tqdm, drawing nothing."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Draws nothing."""
