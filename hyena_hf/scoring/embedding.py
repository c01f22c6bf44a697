# SPDX-License-Identifier: Apache-2.0
"""Embeddings of sequences: hidden states of a layer, pooled over the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from .encoding import Piece, checked_sequences
from .task import CHUNK_LENGTH, Task, run


POOLINGS = ("mean", "last", "max", "none")


@dataclass
class Pool:
    """Hidden states of a row, pooled as they come.

    Attributes:
        pooling: One of `POOLINGS`.
        values: Sum (float64), maximum or last state so far (D,); for "none" the states themselves.
        count: Tokens so far.
    """

    pooling: str
    values: list[Tensor]
    count: int = 0

    def add(self, states: Tensor) -> None:
        """Take in the states (n, D) of the next tokens."""
        if len(states) == 0:
            return
        self.count += len(states)
        if self.pooling == "none":
            self.values.append(states.float().cpu())
        elif self.pooling == "last":
            self.values = [states[-1].double().cpu()]
        elif self.pooling == "max":
            self._keep(torch.maximum, states.amax(dim=0).double().cpu())
        else:
            self._keep(torch.add, states.sum(dim=0, dtype=torch.float64).cpu())

    def _keep(self, combine: Any, new: Tensor) -> None:
        self.values = [combine(self.values[0], new) if self.values else new]


class Embedder(Task[Pool]):
    """Pooled hidden states of rows.

    Args:
        model: Any Hyena model, or another one of transformers.
        tokenizer: Its tokenizer.
        layer: As in `embed`.
        pooling: As in `embed`.
        special_tokens: As in `embed`.
        options: Of `Task`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, layer: int, pooling: str, special_tokens: bool, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
        if pooling == "none" and len(self.strands) == 2:
            raise ValueError(
                "pooling='none' keeps tokens apart, and those of two strands have no common order; use 'mean'"
            )
        self.layer = checked_layer(layer, self.forward.num_layers)
        self.pooling = pooling
        self.special_tokens = special_tokens
        # in causal models nothing sees what stands behind a sequence
        self.ends = special_tokens or not self.forward.in_chunks

    def options(self) -> dict[str, Any]:
        """What decides on results, beside the model and its tokenizer."""
        own = {"layer": self.layer, "pooling": self.pooling, "special tokens": self.special_tokens}
        return {**super().options(), **own}

    def of_batch(self, ids: Tensor, mask: Tensor | None, batch: list[Piece]) -> list[Pool]:
        """Parts of rows padded on the right."""
        states = self.forward.hidden(ids, mask, None, self.layer)
        pools = []
        for row, piece in zip(states, batch, strict=True):
            first, last = self._counted(piece)
            pools.append(Pool(self.pooling, []))
            pools[-1].add(row[first:last])
        return pools

    def of_chunks(self, ids: Tensor, chunk_length: int, piece: Piece) -> Pool:
        """The part of one long row."""
        first, last = self._counted(piece)
        pool, start = Pool(self.pooling, []), 0
        for states in self.forward.hidden_in_chunks(ids, chunk_length, self.layer):
            pool.add(states[0, max(first - start, 0) : max(last - start, 0)])
            start += states.shape[1]
        return pool

    def _counted(self, piece: Piece) -> tuple[int, int]:
        """First token that is pooled, and one behind the last."""
        if not self.special_tokens:
            return piece.first, piece.last
        return 0 if piece.order == 0 else piece.first, len(piece.tokens) if piece.is_end else piece.last


def checked_layer(layer: int, num_layers: int) -> int:
    """Number of hidden states from the front, 0 to `num_layers`."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be a whole number, got {layer!r}")
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has {num_layers} blocks, so hidden states 0 (embeddings) to "
            f"{num_layers} (last block and final norm), or {-num_layers - 1} to -1 counted from the end"
        )
    return layer % (num_layers + 1)


@overload
def embed(
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    layer: int = -1,
    pooling: Literal["mean", "last", "max"] = "mean",
    special_tokens: bool = False,
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> np.ndarray: ...
@overload
def embed(
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    layer: int = -1,
    pooling: Literal["none"],
    special_tokens: bool = False,
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> list[np.ndarray]: ...
def embed(  # noqa: PLR0913 (options of one call, all by name)
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    layer: int = -1,
    pooling: str = "mean",
    special_tokens: bool = False,
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> np.ndarray | list[np.ndarray]:
    """Embeddings of sequences: hidden states of one layer, pooled over the tokens of each sequence.

    An embedding is the same alone and in any batch: padding is masked, and never pooled.

    Args:
        model: Any Hyena model, causal or bidirectional, with or without a head; or another model of transformers.
        tokenizer: Its tokenizer.
        sequences: Texts; they go to the tokenizer as they are.
        layer: Number in transformers' `hidden_states`: 0 the embeddings of tokens, i those behind block i, and the
            last one, also -1, those behind the final norm (`last_hidden_state`); negative ones count from the end.
        pooling: `"mean"`, `"max"` or `"last"` (the last token; in a causal model the only one that has seen all), or
            `"none"`: the states of every token.
        special_tokens: Whether special tokens around a sequence are pooled too. If not, they only stand before the
            sequence, and in bidirectional models behind it.
        batch_size: As in `score`.
        bos: As in `score`.
        chunk_length: Sequences with more tokens run alone and in chunks, in bounded memory. Bidirectional models run
            every sequence whole.
        long: What to do with sequences longer than the model takes: `"refuse"`, or `"split"` into windows of its
            length that overlap by half. A token is then pooled once, from the first window that holds it.
        reverse_complement: Mean over the embeddings of the sequence and its reverse complement, for DNA.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.
        distributed: As in `score`.

    Returns:
        float32 (n, D); for `"none"` a float32 array (tokens, D) for each sequence. Means are summed in float64.

    Raises:
        TypeError: An argument of another kind.
        ValueError: No such layer or pooling, no sequences, an empty or too long one, or letters that are no DNA where
            `reverse_complement` is asked for.
    """
    embedder = Embedder(
        model,
        tokenizer,
        layer=layer,
        pooling=pooling,
        special_tokens=special_tokens,
        batch_size=batch_size,
        bos=bos,
        chunk_length=chunk_length,
        long=long,
        reverse_complement=reverse_complement,
    )
    found = run(embedder, checked_sequences(sequences), progress=progress, distributed=distributed)
    if pooling == "none":
        return [torch.cat([part for pool in strands[0] for part in pool.values]).numpy() for strands in found]
    return np.stack([pooled(strands) for strands in found])


def pooled(strands: Sequence[Sequence[Pool]]) -> np.ndarray:
    """One vector (D,) float32 of the windows of each strand, averaged over the strands."""
    vectors = []
    for pools in strands:
        values = torch.stack([pool.values[0] for pool in pools])
        if pools[0].pooling == "mean":
            vectors.append(values.sum(dim=0) / sum(pool.count for pool in pools))
        else:
            vectors.append(values.amax(dim=0) if pools[0].pooling == "max" else values[-1])
    return torch.stack(vectors).mean(dim=0).float().numpy()
