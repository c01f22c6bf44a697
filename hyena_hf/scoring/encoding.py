# SPDX-License-Identifier: Apache-2.0
"""Texts into rows of tokens, and rows that are too long for a model into windows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


LONG = ("refuse", "split")
_SLICE = 1 << 16  # characters that a tokenizer gets at once: it takes some 200 bytes for each


@dataclass(frozen=True)
class Piece:
    """A row of tokens for the model.

    Attributes:
        index: Number of the sequence.
        strand: 0 as given, 1 the reverse complement.
        order: Number of the window in its sequence.
        tokens: int32 (n,), special tokens included.
        first: First token that counts.
        last: One behind the last token that counts.
        is_end: Whether it is the last window of its sequence.
    """

    index: int
    strand: int
    order: int
    tokens: np.ndarray
    first: int
    last: int
    is_end: bool = True


class Encoder:
    """A tokenizer, and the special tokens that stand around every sequence.

    Args:
        tokenizer: A transformers tokenizer.
        bos: What stands before every sequence. `"auto"`: what the tokenizer itself puts there; None: nothing; a token
            or its id: that one.

    Raises:
        TypeError: `tokenizer` or `bos` is of another kind.
        ValueError: `bos` is no token of the vocabulary.
    """

    def __init__(self, tokenizer: Any, bos: str | int | None = "auto") -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}")
        self.tokenizer: Any = tokenizer
        prefix, self.suffix = special_tokens(tokenizer)
        self.prefix = prefix if bos == "auto" else _leading(tokenizer, bos)
        pad: Any = tokenizer.pad_token_id
        self.pad = 0 if pad is None else pad
        self._sliced = _one_token_a_character(tokenizer)

    def __call__(self, text: str) -> np.ndarray:
        """Token ids of a text without special tokens around it, int32 (n,)."""
        # what looks like a special token must not be cut
        if not self._sliced or "[" in text or "<" in text or len(text) <= _SLICE:
            return self._ids(text)
        return np.concatenate([self._ids(text[at : at + _SLICE]) for at in range(0, len(text), _SLICE)])

    def _ids(self, text: str) -> np.ndarray:
        # `verbose`: how long a sequence may be is the model's affair
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and behind a text."""
    plain = list(tokenizer("A", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("A")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(
        f"the tokenizer {type(tokenizer).__name__} reads 'A' as {plain} alone and as {whole} with special tokens, so "
        f"which of them are special is unclear; pass another one"
    )


def _leading(tokenizer: Any, bos: str | int | None) -> list[int]:
    if bos is None:
        return []
    if isinstance(bos, str):
        vocabulary = tokenizer.get_vocab()
        if bos not in vocabulary:
            raise ValueError(
                f"bos {bos!r} is no token of {type(tokenizer).__name__}; pass 'auto' for its own, None for none, or "
                f"one of {tokenizer.all_special_tokens}"
            )
        return [vocabulary[bos]]
    if isinstance(bos, bool) or not isinstance(bos, int):
        raise TypeError(f"bos must be 'auto', None, a token or its id, got {type(bos).__name__} ({bos!r})")
    if not 0 <= bos < len(tokenizer):
        raise ValueError(f"bos {bos} is no id of a vocabulary of {len(tokenizer)} tokens")
    return [bos]


def _one_token_a_character(tokenizer: Any) -> bool:
    from hyena_hf.tokenization_byte import NUM_BASE_TOKENS, HyenaByteTokenizer
    from hyena_hf.tokenization_nucleotide import HyenaNucleotideTokenizer

    if isinstance(tokenizer, HyenaByteTokenizer):
        return len(tokenizer) == NUM_BASE_TOKENS
    return isinstance(tokenizer, HyenaNucleotideTokenizer)


def checked_sequences(sequences: Any) -> list[str]:
    """The sequences as a list, after refusing what holds none.

    Raises:
        TypeError: Something else than texts.
        ValueError: None at all, or one without characters.
    """
    if isinstance(sequences, (str, bytes)):
        raise TypeError(f"sequences must be a list of str, got one {type(sequences).__name__}; put it into a list")
    sequences = list(sequences)
    if not sequences:
        raise ValueError("sequences is empty; give at least one")
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, str):
            raise TypeError(f"sequences must be a list of str, but number {index} is a {type(sequence).__name__}")
        if not sequence:
            raise ValueError(f"sequence {index} of {len(sequences)} is empty; leave it out")
    return sequences


def cut(
    ids: np.ndarray, encoder: Encoder, *, suffix: bool, limit: int | None, long: str, where: tuple[int, int, str]
) -> list[Piece]:
    """The rows of a sequence: one, or windows of the model's length where it is longer.

    Windows start every half of their length; what two of them share counts in the earlier one, so that every token but
    those of the first window has at least half a window before it.

    Args:
        ids: Tokens of the sequence, int32 (n,).
        encoder: Knows the special tokens.
        suffix: Whether those behind a sequence are wanted.
        limit: Most tokens of a row, special ones included; None: any number.
        long: `"refuse"` or `"split"`.
        where: Number of the sequence, its strand, and its name for messages.

    Raises:
        ValueError: The sequence is too long and `long` is `"refuse"`.
    """
    index, strand, name = where
    before, behind = encoder.prefix, encoder.suffix if suffix else []
    extra = len(before) + len(behind)
    if limit is None or len(ids) + extra <= limit:
        windows = [(0, len(ids), 0)]
    elif long == "refuse":
        raise ValueError(
            f"{name} has {len(ids) + extra} tokens with special ones, but the model takes {limit}; shorten it, or "
            f"pass long='split' to go over it in windows of {limit} tokens that overlap by half"
        )
    elif limit - extra < 2:
        raise ValueError(f"the model takes {limit} tokens, too few to split sequences into windows")
    else:
        windows = split(len(ids), limit - extra)
    pieces = []
    for order, (start, stop, new) in enumerate(windows):
        tokens = np.concatenate([np.asarray(part, np.int32) for part in (before, ids[start:stop], behind)])
        counted = len(before) + new - start, len(before) + stop - start
        pieces.append(Piece(index, strand, order, tokens, *counted, is_end=order == len(windows) - 1))
    return pieces


def split(length: int, room: int) -> list[tuple[int, int, int]]:
    """Windows of up to `room` tokens over `length`: start, stop, and the first token that no earlier one has."""
    windows, covered = [(0, min(room, length), 0)], min(room, length)
    while covered < length:
        start = covered - room // 2
        stop = min(start + room, length)
        windows.append((start, stop, covered))
        covered = stop
    return windows
