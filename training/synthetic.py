"""Synthetic tasks that show what a sequence mixer can do, drawn exactly as the published generators draw them.

    train, test = associative_recall(vocab_size=20, length=40, train_examples=5000, test_examples=500)
    loss = cross_entropy(model(train.inputs).logits.flatten(0, 1), train.targets.flatten())

Associative recall. Each sequence has its own random map from keys to values; it shows `length // 2` pairs of a random
key and its value, then `=>`, one of the keys shown, and as the last token that key's value. A model that finds the
value has looked up an association it saw once or more in this very sequence:

    3 g  1 h  3 g  2 g  => 1 h          keys 1 2 3, values g h; the answer is the last token

Task: Ba et al. 2016, arXiv 1610.06258; this form: Dao, Fu et al. 2022 (H3), arXiv 2212.14052, used by Poli et al. 2023
(Hyena), arXiv 2302.10866, with the code of safari, `src/dataloaders/synthetics.py`. Its choices, all kept: token ids
are places in the alphabetical order of the names `.`, `0`, `1`, `10`, ..., `=>`; values are drawn with replacement, so
two keys may share one; training targets are all next tokens, most of which nobody can know. Left out, because no
published experiment uses them: keys of several tokens, and queries for keys that were not shown (answered by `.`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


UNPREDICTED = -100  # the target that transformers' losses and ours leave out


class Examples(NamedTuple):
    """Inputs and what to predict: `targets[i, t]` is the token after `inputs[i, t]`, or -100 where none counts."""

    inputs: Tensor  # (E, L) int64
    targets: Tensor  # (E, L) int64


def associative_recall(
    *, vocab_size: int = 20, length: int = 40, train_examples: int = 5000, test_examples: int = 500, seed: int = 0
) -> tuple[Examples, Examples]:
    """Make the published training and test sets, bit for bit for the same seed.

    Args:
        vocab_size: token ids, `=>` and the unused `.` included; half of the others are keys.
        length: tokens of the pairs; an odd one counts as the even one below it. Inputs have 2 tokens more.
        train_examples: sequences to train on, no two alike.
        test_examples: sequences to test on, no two alike; one of a small vocabulary may also be in the training set.
        seed: of everything.

    Returns:
        Training set, whose targets are all next tokens, and test set, whose only target is the answer.

    Raises:
        ValueError: sizes that no set can have.
    """
    for name, examples in (("train_examples", train_examples), ("test_examples", test_examples)):
        _check_sizes(vocab_size, length, examples, name)
        possible = count_recall_sequences(vocab_size, length)
        if examples > possible:
            raise ValueError(
                f"{name} ({examples}) exceeds the {possible} different sequences that vocab_size ({vocab_size}) and "
                f"length ({length}) allow; ask for fewer or raise one of the two"
            )
    rng = np.random.default_rng(seed)
    train, test = (_different_sequences(rng, vocab_size, length, count) for count in (train_examples, test_examples))
    return next_token_examples(train), answer_examples(test)


def recall_sequences(rng: np.random.Generator, *, vocab_size: int, length: int, examples: int) -> Tensor:
    """Draw sequences of the task, independent of each other: fresh data for as many steps as one likes.

    Args:
        rng: where the randomness comes from; its draws are those of the published code.
        vocab_size: token ids, `=>` and the unused `.` included.
        length: tokens of the pairs.
        examples: number of sequences E.

    Returns:
        (E, 2 * (length // 2) + 3) int64: pairs, `=>`, key, answer. See `next_token_examples` and `answer_examples`.

    Raises:
        ValueError: sizes that no sequence can have.
    """
    _check_sizes(vocab_size, length, examples, "examples")
    pairs, ordinary = length // 2, vocab_size - 2
    num_keys = ordinary // 2
    maps = np.empty((examples, num_keys), dtype=np.int64)  # value of each key
    keys = np.empty((examples, pairs + 1), dtype=np.int64)  # shown keys, then the query
    for row in range(examples):
        maps[row] = rng.integers(ordinary - num_keys, size=num_keys)
        keys[row] = rng.integers(num_keys, size=pairs + 1)
        *shown, query = keys[row].tolist()
        if query not in shown:
            distinct = list(dict.fromkeys(shown))
            keys[row, -1] = distinct[rng.integers(len(distinct))]
    # ids: 0 is `.`, then the keys, then the values, and `=>` is the last
    values = np.take_along_axis(maps, keys, axis=1) + 1 + num_keys
    sequences = np.full((examples, 2 * pairs + 3), vocab_size - 1, dtype=np.int64)
    sequences[:, 0 : 2 * pairs : 2] = keys[:, :-1] + 1
    sequences[:, 1 : 2 * pairs : 2] = values[:, :-1]
    sequences[:, -2] = keys[:, -1] + 1
    sequences[:, -1] = values[:, -1]
    return torch.from_numpy(sequences)


def next_token_examples(sequences: Tensor) -> Examples:
    """Sequences (E, L + 1) as examples whose targets are all next tokens, as the task is trained."""
    return Examples(sequences[:, :-1], sequences[:, 1:])


def answer_examples(sequences: Tensor) -> Examples:
    """Sequences (E, L + 1) as examples whose only target is the last token, as the task is tested."""
    targets = torch.full_like(sequences[:, 1:], UNPREDICTED)
    targets[:, -1] = sequences[:, -1]
    return Examples(sequences[:, :-1], targets)


def count_recall_sequences(vocab_size: int, length: int) -> int:
    """Number of different sequences of the task; beyond 128 tokens, where it exceeds any memory, that of 128 tokens.

    For every number d of different keys shown: words of keys that show just these, values**d maps and d queries.
    """
    pairs, ordinary = min(length // 2, 64), vocab_size - 2
    num_keys = ordinary // 2
    words = [1] + [0] * min(num_keys, pairs)  # by d; built up key by key
    for _ in range(pairs):
        words = [0] + [words[d] * d + words[d - 1] * (num_keys - d + 1) for d in range(1, len(words))]
    return sum(count * (ordinary - num_keys) ** d * d for d, count in enumerate(words))


def _different_sequences(rng: np.random.Generator, vocab_size: int, length: int, examples: int) -> Tensor:
    """Sequences without repetition, sorted, topped up and shuffled as in the published code."""
    drawn = recall_sequences(rng, vocab_size=vocab_size, length=length, examples=examples)
    seen = set(map(tuple, drawn.tolist()))
    rows = sorted(seen)
    while len(rows) < examples:
        (drawn,) = recall_sequences(rng, vocab_size=vocab_size, length=length, examples=1).tolist()
        if tuple(drawn) not in seen:
            seen.add(tuple(drawn))
            rows.append(tuple(drawn))
    rng.shuffle(rows)
    return torch.tensor(rows)


def _check_sizes(vocab_size: int, length: int, examples: int, name: str) -> None:
    if vocab_size < 4:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least 4: one key, one value and two special tokens; raise it"
        )
    if length < 2:
        raise ValueError(f"length ({length}) must be at least 2, one key and its value; raise it")
    if examples < 1:
        raise ValueError(f"{name} ({examples}) must be at least 1")
