# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of sequences, the same alone and in any batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch

from .batching import Runner, check_batch_size, check_chunk_length, pad, progress_bar
from .complement import reverse_complement as other_strand
from .encoding import LONG, Encoder, Piece, checked_sequences, cut
from .forward import Forward
from .processes import processes, share


REDUCTIONS = ("sum", "mean", "none")


class Scorer:
    """A model and a tokenizer that score sequences, with what was learned about memory.

    Arguments as in `score`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int | str = "auto",
        bos: str | int | None = "auto",
        chunk_length: int = 1 << 16,
        long: str = "refuse",
        reverse_complement: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        check_chunk_length(chunk_length)
        if long not in LONG:
            raise ValueError(f"long must be one of {LONG}, got {long!r}")
        self.forward = Forward(model)
        self.forward.check_causal()
        self.encoder = Encoder(tokenizer, bos)
        self.long = long
        self.strands = (0, 1) if reverse_complement else (0,)
        self.runner = Runner(batch_size, chunk_length, self.forward.device)

    def rows(self, index: int, sequence: str, name: str) -> list[Piece]:
        """The rows of a sequence on its strands.

        Raises:
            ValueError: It is too long, too short to be scored, or has no other strand.
        """
        pieces = []
        texts = [other_strand(sequence, name) if strand else sequence for strand in self.strands]
        for strand, text in zip(self.strands, texts, strict=True):
            ids = self.encoder(text)
            if len(ids) + len(self.encoder.prefix) < 2:
                raise ValueError(
                    f"{name} is {len(ids)} token, which nothing predicts; leave it out, or pass bos='...' to put a "
                    f"token before it"
                )
            where = index, strand, name
            pieces += cut(ids, self.encoder, suffix=False, limit=self.forward.limit, long=self.long, where=where)
        return pieces

    def __call__(self, pieces: Sequence[Piece], advance: Any) -> dict[tuple[int, int], np.ndarray]:
        """Log-probabilities of the tokens of every sequence and strand that something predicts, float64 (n,)."""
        found: dict[tuple[int, int], dict[int, np.ndarray]] = {}
        for piece, values in self.runner(pieces, self._together, self._in_chunks, advance):
            found.setdefault((piece.index, piece.strand), {})[piece.order] = values
        return {key: np.concatenate([parts[order] for order in sorted(parts)]) for key, parts in found.items()}

    def _together(self, batch: list[Piece]) -> list[np.ndarray]:
        ids, mask = pad(batch, self.encoder.pad, self.forward.device)
        values = self.forward.log_probs(ids, mask).cpu().numpy()
        return [_counted(row, piece) for row, piece in zip(values, batch, strict=True)]

    def _in_chunks(self, piece: Piece, chunk_length: int) -> np.ndarray:
        ids, _ = pad([piece], self.encoder.pad, self.forward.device)
        values = [part[0].cpu() for part in self.forward.log_probs_in_chunks(ids, chunk_length)]
        return _counted(torch.cat(values).numpy(), piece)


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
    chunk_length: int = 1 << 16,
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
    chunk_length: int = 1 << 16,
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
    chunk_length: int = 1 << 16,
    long: str = "refuse",
    reverse_complement: bool = False,
    progress: bool | None = False,
    distributed: bool = True,
) -> np.ndarray | list[np.ndarray]:
    """Log-likelihoods ln p(sequence) under a causal language model.

    A score belongs to its sequence: it is the same alone and in any batch, because padding is masked and the
    probabilities of padding and of a closing special token are never counted. Every token is predicted from all before
    it, the first one from `bos`. Where nothing stands before it, the first token is not scored: the result is then
    ln p(tokens 2 .. n | token 1).

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
    texts = checked_sequences(sequences)
    rank, world = processes(distributed)

    def work() -> dict[int, list[np.ndarray]]:
        # by length, so that the shares are alike
        mine = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[rank::world]
        pieces = [piece for index in mine for piece in scorer.rows(index, texts[index], f"sequence {index}")]
        total = sum(len(piece.tokens) for piece in pieces)
        with scorer.forward.running(), progress_bar(total, progress if rank == 0 else False) as bar:
            found = scorer(pieces, bar.update)
        return {index: [found[index, strand] for strand in scorer.strands] for index in mine}

    merged = {index: values for part in share(work, world) for index, values in part.items()}
    if reduction == "none":
        return [merged[index][0] for index in range(len(texts))]
    return np.array([reduced(merged[index], reduction) for index in range(len(texts))], np.float64)


def reduced(strands: Sequence[np.ndarray], reduction: str) -> float:
    """Sum or mean of the log-probabilities of each strand, averaged over the strands."""
    values = [math.fsum(strand) / (len(strand) if reduction == "mean" else 1) for strand in strands]
    return math.fsum(values) / len(values)
