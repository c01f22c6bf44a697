# SPDX-License-Identifier: Apache-2.0
"""What scoring and embedding share: sequences into rows, rows through a model, shares for processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from .batching import Runner, check_batch_size, check_chunk_length, pad, progress_bar
from .complement import reverse_complement as other_strand
from .encoding import LONG, Encoder, Piece, cut
from .forward import Forward
from .processes import processes, share


Part = TypeVar("Part")  # what one row gives
CHUNK_LENGTH = 1 << 16


class Task(ABC, Generic[Part]):
    """A model and a tokenizer that do something to sequences, with what was learned about memory.

    Args:
        model: A model of transformers.
        tokenizer: Its tokenizer.
        batch_size: Rows of a batch, or "auto".
        bos: What stands before every sequence, as in `score`.
        chunk_length: Rows with more tokens run in chunks, if the model is causal.
        long: `"refuse"` or `"split"`, for sequences longer than the model takes.
        reverse_complement: Whether to go over the other strand too.

    Raises:
        TypeError, ValueError: An argument of another kind, or out of range.
    """

    shortest: ClassVar[int] = 1  # tokens of a row

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int | str = "auto",
        bos: str | int | None = "auto",
        chunk_length: int = CHUNK_LENGTH,
        long: str = "refuse",
        reverse_complement: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        check_chunk_length(chunk_length)
        if long not in LONG:
            raise ValueError(f"long must be one of {LONG}, got {long!r}")
        self.forward = Forward(model)
        self.encoder = Encoder(tokenizer, bos)
        self.long = long
        self.strands = (0, 1) if reverse_complement else (0,)
        self.runner = Runner(batch_size, chunk_length if self.forward.in_chunks else None, self.forward.device)
        # masked, so any token serves
        self.padding = self.encoder.pad if self.encoder.pad < self.forward.vocabulary else 0
        self.ends = False  # whether the special tokens behind a sequence are wanted

    def rows(self, index: int, sequence: str, name: str) -> list[Piece]:
        """The rows of a sequence on its strands.

        Args:
            index: Its number.
            sequence: Its letters.
            name: What messages call it.

        Raises:
            ValueError: It is too long or too short, or has no other strand.
        """
        pieces = []
        texts = [other_strand(sequence, name) if strand else sequence for strand in self.strands]
        for strand, text in zip(self.strands, texts, strict=True):
            ids = self.encoder(text)
            if len(ids) == 0 or len(ids) + len(self.encoder.prefix) < self.shortest:
                raise ValueError(
                    f"{name} is {len(ids)} token long and nothing stands before it, too short for this; leave it out, "
                    f"or pass bos='...' to put a token before it"
                )
            if int(ids.max()) >= self.forward.vocabulary:
                raise ValueError(
                    f"{name} holds token {int(ids.max())}, but the model knows {self.forward.vocabulary}; the "
                    f"tokenizer ({type(self.encoder.tokenizer).__name__}) is another model's"
                )
            where = index, strand, name
            pieces += cut(ids, self.encoder, suffix=self.ends, limit=self.forward.limit, long=self.long, where=where)
        return pieces

    def __call__(self, pieces: Sequence[Piece], advance: Callable[[int], Any]) -> dict[int, list[list[Part]]]:
        """What the rows give: for each sequence, for each strand, a part for each window in order."""
        found: dict[int, dict[tuple[int, int], Part]] = {}
        for piece, part in self.runner(pieces, self._together, self._in_chunks, advance):
            found.setdefault(piece.index, {})[piece.strand, piece.order] = part
        return {
            index: [[parts[key] for key in sorted(parts) if key[0] == strand] for strand in self.strands]
            for index, parts in found.items()
        }

    def options(self) -> dict[str, Any]:
        """What decides on results, beside the model and its tokenizer."""
        before, both = list(self.encoder.prefix), len(self.strands) == 2
        return {"tokens before a sequence": before, "long": self.long, "reverse complement": both}

    @abstractmethod
    def of_batch(self, ids: Tensor, mask: Tensor | None, batch: list[Piece]) -> list[Part]:
        """Parts of rows padded on the right."""

    @abstractmethod
    def of_chunks(self, ids: Tensor, chunk_length: int, piece: Piece) -> Part:
        """The part of one long row."""

    def _together(self, batch: list[Piece]) -> list[Part]:
        return self.of_batch(*pad(batch, self.padding, self.forward.device), batch)

    def _in_chunks(self, piece: Piece, chunk_length: int) -> Part:
        ids, _ = pad([piece], self.padding, self.forward.device)
        return self.of_chunks(ids, chunk_length, piece)


def run(task: Task[Part], texts: Sequence[str], *, progress: bool | None, distributed: bool) -> list[list[list[Part]]]:
    """What a task gives for every text, whichever process did it.

    Args:
        task: What to do.
        texts: The sequences.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.
        distributed: Whether processes share the texts.
    """
    rank, world = processes(distributed)

    def work() -> Mapping[int, list[list[Part]]]:
        # by length, so that the shares are alike
        mine = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[rank::world]
        pieces = [piece for index in mine for piece in task.rows(index, texts[index], f"sequence {index}")]
        total = sum(len(piece.tokens) for piece in pieces)
        with task.forward.running(), progress_bar(total, progress if rank == 0 else False) as bar:
            return task(pieces, bar.update)

    merged = {index: parts for found in share(work, world) for index, parts in found.items()}
    return [merged[index] for index in range(len(texts))]


def concatenated(parts: Sequence[Tensor]) -> Tensor:
    """Chunks of a row (1, n, ...) on the processor, (L, ...)."""
    return torch.cat([part[0].cpu() for part in parts])
