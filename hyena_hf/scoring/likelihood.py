# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of sequences, the same alone and in any batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from .encoding import Piece, checked_sequences
from .task import CHUNK_LENGTH, Task, concatenated, run


REDUCTIONS = ("sum", "mean", "none")


class Scorer(Task[np.ndarray]):
    """Log-probabilities of the tokens of a row that count and that something predicts, float64 (n,)."""

    shortest = 2

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.forward.check_causal()

    def of_batch(self, ids: Tensor, mask: Tensor | None, batch: list[Piece]) -> list[np.ndarray]:
        """Parts of rows padded on the right."""
        values = self.forward.log_probs(ids, mask).cpu().numpy()
        return [_counted(row, piece) for row, piece in zip(values, batch, strict=True)]

    def of_chunks(self, ids: Tensor, chunk_length: int, piece: Piece) -> np.ndarray:
        """The part of one long row."""
        return _counted(concatenated(list(self.forward.log_probs_in_chunks(ids, chunk_length))).numpy(), piece)


def _counted(values: np.ndarray, piece: Piece) -> np.ndarray:
    """Those of the tokens that count; `values` begins with that of token 1."""
    return values[max(piece.first - 1, 0) : piece.last - 1].copy()


@overload
def score(
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    reduction: Literal["sum", "mean"] = "sum",
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> np.ndarray: ...
@overload
def score(
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    reduction: Literal["none"],
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> list[np.ndarray]: ...
def score(  # noqa: PLR0913 (options of one call, all by name)
    model: Any,
    tokenizer: Any,
    sequences: Iterable[str],
    *,
    reduction: str = "sum",
    batch_size: int | str = "auto",
    bos: str | int | None = "auto",
    chunk_length: int = CHUNK_LENGTH,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> np.ndarray | list[np.ndarray]:
    """Log-likelihoods ln p(sequence) under a causal language model.

    A score belongs to its sequence: but for rounding it is the same alone and in any batch, because padding is masked
    and the probabilities of padding and of a closing special token are never counted. In float32 batches
    agree within 1e-5; rounding is larger in bfloat16, between chunks and one piece, and in sums over very many tokens.

    Every token is predicted from all before it, the first one from `bos`. Where nothing stands before it, the first
    token is not scored: the result is then ln p(tokens 2 .. n | token 1).

    Args:
        model: `HyenaForCausalLM`, or another causal language model of transformers.
        tokenizer: Its tokenizer.
        sequences: Texts; they go to the tokenizer as they are.
        reduction: `"sum"` over the scored tokens of a sequence, their `"mean"`, or `"none"`: the value of every one.
        batch_size: Sequences in a batch, or `"auto"`: sorted by length, as many as a budget of 16,384 tokens on a CPU
            and 131,072 elsewhere holds. Either is halved, with a warning in the log, when memory runs out.
        bos: What stands before every sequence, unscored. `"auto"`: what the tokenizer puts there ([CLS] of
            `HyenaNucleotideTokenizer`, with which HyenaDNA was trained; nothing of `HyenaByteTokenizer` unless it was
            made with `add_bos_token=True`); None: nothing; or a token or its id.
        chunk_length: Sequences with more tokens run alone and in chunks, in bounded memory.
        long: What to do with sequences longer than the model takes: `"refuse"`, or `"split"` into windows of its
            length that overlap by half. A token is then scored once, in the first window that holds it.
        reverse_complement: Mean over the sequence and its reverse complement, for DNA.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.
        distributed: Whether processes of `torchrun` or `accelerate launch` share the sequences. Every process must
            then make the call, and gets all results.

    Returns:
        Natural logarithms, float64 (n,); for `"none"` a float64 array for each sequence.

    Raises:
        TypeError: The model predicts no next token, or an argument is of another kind.
        ValueError: No sequences, an empty or too long one, one without a scored token, or letters that are no DNA
            where `reverse_complement` is asked for.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if reduction == "none" and reverse_complement:
        raise ValueError(
            "reduction='none' keeps tokens apart, and those of two strands have no common order; use 'sum'"
        )
    scorer = Scorer(
        model,
        tokenizer,
        batch_size=batch_size,
        bos=bos,
        chunk_length=chunk_length,
        long=long,
        reverse_complement=reverse_complement,
    )
    found = run(scorer, checked_sequences(sequences), progress=progress, distributed=distributed)
    if reduction == "none":
        return [np.concatenate(strands[0]) for strands in found]
    return np.array([reduced(strands, reduction) for strands in found], np.float64)


def reduced(strands: Sequence[Sequence[np.ndarray]], reduction: str) -> float:
    """Sum or mean of the log-probabilities in the windows of each strand, averaged over the strands."""
    values = []
    for windows in strands:
        total = math.fsum(value for window in windows for value in window.tolist())
        values.append(total / (sum(map(len, windows)) if reduction == "mean" else 1))
    return math.fsum(values) / len(values)
