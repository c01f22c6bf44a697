"""Labelled sequences as token ids, and batches of them padded to their longest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from training.data import UNPREDICTED
from training.tasks import Example


AT_ONCE = 4096  # sequences in one call of the tokenizer; its lists take 30 times the memory of what we keep


class EncodedSequences(Dataset[dict[str, Tensor]]):
    """Token ids with one label a sequence, or one a token.

    Items are `input_ids` (L,) and `labels` () or (L,), int64.
    """

    def __init__(self, tokens: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Hold ids, each (L,) int32, and labels, each () or (L,)."""
        self.tokens = list(tokens)
        self.labels = list(labels)
        self.lengths = torch.tensor([len(ids) for ids in self.tokens])

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """One sequence."""
        return {"input_ids": self.tokens[row].long(), "labels": self.labels[row].long()}

    def cut(self, length: int) -> EncodedSequences:
        """The first `length` tokens of every sequence."""
        labels = [label[:length] if label.ndim else label for label in self.labels]
        return EncodedSequences([ids[:length] for ids in self.tokens], labels)

    def label_counts(self, num_classes: int) -> Tensor:
        """How many labels each class has, (num_classes,) int64."""
        flat = torch.cat([label.flatten() for label in self.labels]).long()
        return torch.bincount(flat[flat != UNPREDICTED], minlength=num_classes)

    def digest(self) -> str:
        """A short hash of ids and labels."""
        content = hashlib.sha256(self.lengths.numpy().tobytes())
        for ids, label in zip(self.tokens, self.labels, strict=True):
            content.update(ids.numpy().tobytes())
            content.update(label.numpy().tobytes())
        return content.hexdigest()[:16]


def encode_sequences(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    special_tokens: bool,
    truncate: bool = False,
) -> tuple[EncodedSequences, int]:
    """Turn examples into token ids.

    Args:
        examples: sequences with one label each, or one for every character.
        tokenizer: labels for every character need one that makes a token of each.
        length: most tokens that the model takes, special ones included.
        special_tokens: whether the tokenizer adds its own (`[CLS]`, `[SEP]`); they bear no label.
        truncate: cut what is longer than `length` at the tokenizer's `truncation_side`, instead of refusing it.

    Returns:
        The sequences, and how many were cut.

    Raises:
        ValueError: sequences that are too long, with their number and the longest; a tokenizer that does not fit the
            labels.
    """
    tokens: list[Tensor] = []
    labels: list[Tensor] = []
    sizes: list[int] = []
    for begin in range(0, len(examples), AT_ONCE):
        part = examples[begin : begin + AT_ONCE]
        encoded = _encode(part, tokenizer, special_tokens)
        sizes += [len(ids) for ids in encoded["input_ids"]]
        if max(sizes[begin:]) > length and truncate:
            encoded = _encode(part, tokenizer, special_tokens, truncation=True, max_length=length)
        for row, example in enumerate(part):
            tokens.append(torch.tensor(encoded["input_ids"][row], dtype=torch.int32))
            labels.append(_labels(example, encoded, row))
    longer = sum(size > length for size in sizes)
    if longer and not truncate:
        raise ValueError(
            f"{longer} of {len(sizes)} sequences have more than {length} tokens (the longest {max(sizes)}); use a "
            "model for longer sequences, or --truncate to cut them"
        )
    return EncodedSequences(tokens, labels), longer


def _encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, special: bool, **kwargs: Any) -> Any:
    per_token = any(isinstance(example.label, tuple) for example in examples)
    if per_token:
        kwargs |= {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    sequences = [example.sequence for example in examples]
    return tokenizer(sequences, add_special_tokens=special, return_attention_mask=False, **kwargs)


def _labels(example: Example, encoded: Any, row: int) -> Tensor:
    """The label () of a sequence, or those of its tokens (L,)."""
    if not isinstance(example.label, tuple):
        return torch.tensor(example.label)
    spans, special = encoded["offset_mapping"][row], encoded["special_tokens_mask"][row]
    labels = []
    for (begin, end), is_special in zip(spans, special, strict=True):
        if not is_special and end != begin + 1:
            raise ValueError(
                f"{example.name}: a token stands for {end - begin} characters; labels for every character need a "
                "tokenizer that makes one token of each (--tokenizer dna or byte)"
            )
        labels.append(UNPREDICTED if is_special else example.label[begin])
    return torch.tensor(labels)


class PaddingCollator:
    """Batches as long as their longest sequence.

    Args:
        pad_token_id: fills `input_ids` where `attention_mask` is 0.
        side: where padding goes, `left` or `right`.
    """

    def __init__(self, pad_token_id: int, side: str) -> None:
        self.pad_token_id, self.side = pad_token_id, side

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L), `labels` (B,) or (B, L), all int64."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [self._pad(row["input_ids"], longest, self.pad_token_id) for row in rows]
        mask = [self._pad(torch.ones_like(row["input_ids"]), longest, 0) for row in rows]
        labels = [
            self._pad(row["labels"], longest, UNPREDICTED) if row["labels"].ndim else row["labels"] for row in rows
        ]
        return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask), "labels": torch.stack(labels)}

    def _pad(self, values: Tensor, longest: int, value: int) -> Tensor:
        missing = longest - len(values)
        return torch.nn.functional.pad(values, (missing, 0) if self.side == "left" else (0, missing), value=value)
