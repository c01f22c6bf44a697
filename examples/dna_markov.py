# SPDX-License-Identifier: Apache-2.0
"""Markov models of DNA up to order 30: what counting the bases before a base reaches.

`evaluation.baselines.MarkovModel` holds a base in 8 bits and so at most 7 of them; here a base takes 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


Codes = NDArray[np.uint64]
Floats = NDArray[np.float64]

HIGHEST = 30
_LETTERS = np.full(256, 4, dtype=np.uint8)
_LETTERS[list(b"ACGT")] = range(4)


@dataclass
class _Order:
    grams: Codes  # (context, base) pairs that occur, sorted
    counts: Floats
    contexts: Codes  # sorted
    totals: Floats


class NucleotideMarkov:
    """Interpolated counts: p_k(b | c) = (n(c b) + w p_{k-1}(b | c less its oldest base)) / (n(c) + w), p_{-1} = 1/4.

    w, the weight of the lower order, is a Dirichlet prior with that many imagined bases; a small one suits text that
    repeats the training text, a large one text that does not. Windows with a letter outside ACGT are not counted.

    Args:
        sequences: training sequences, capitals; give both strands where both will be read.
        order: bases of context, 0 .. 30.

    Raises:
        ValueError: order out of range, or no window of order + 1 bases.
    """

    def __init__(self, sequences: Sequence[bytes], order: int) -> None:
        if not 0 <= order <= HIGHEST:
            raise ValueError(f"order ({order}) must be in 0 .. {HIGHEST}")
        self.order = order
        grams = np.concatenate([_grams(sequence, order) for sequence in sequences])
        if not len(grams):
            raise ValueError(f"no training sequence holds a window of {order + 1} bases out of ACGT")
        grams.sort()
        starts = _run_starts(grams)
        grams, counts = grams[starts], np.diff(np.append(starts, len(grams))).astype(float)
        self.orders: list[_Order] = []
        for k in range(order, -1, -1):
            self.orders.insert(0, _with_contexts(grams, counts))
            grams, counts = _summed(grams & _low_bases(k), counts)

    def log2_probabilities(self, sequence: bytes, *, weight: float) -> Floats:
        """Base-2 logarithm of the probability of each base after the first `order`, given those before it.

        Args:
            sequence: capitals.
            weight: w above.

        Returns:
            (n,), without the bases whose window of `order` + 1 holds a letter outside ACGT.
        """
        *_, highest = self.by_order(sequence, weights=[weight])
        return highest[0]

    def by_order(self, sequence: bytes, *, weights: Sequence[float]) -> Iterator[Floats]:
        """The same for every order from 0 on and for several weights: each (len(weights), n), for the same bases."""
        grams, position = np.unique(_grams(sequence, self.order), return_inverse=True)
        weight = np.array(weights, dtype=float)[:, None]
        probability = np.full((len(weights), len(grams)), 0.25)
        for k, table in enumerate(self.orders):
            gram = grams & _low_bases(k + 1)
            seen = _lookup(table.grams, table.counts, gram)
            total = _lookup(table.contexts, table.totals, gram >> np.uint64(2))
            probability = (seen + weight * probability) / (total + weight)
            yield np.log2(probability)[:, position]


def markov_bits(
    training: Sequence[bytes],
    test_sets: Mapping[str, Sequence[bytes]],
    *,
    orders: Sequence[int],
    weights: Sequence[float],
) -> dict[str, Any]:
    """Bits per base of test sets for every order, each with the weight that serves that set best.

    The choice of weight on the test set itself favours this baseline.

    Returns:
        {order: {test set: {"bits": bits per base, "weight": w}}}.
    """
    model = NucleotideMarkov(training, max(orders))
    table: dict[str, Any] = {str(order): {} for order in orders}
    for name, sequences in test_sets.items():
        bits = _bits(model, sequences, weights)
        for order in orders:
            best = int(bits[order].argmin())
            table[str(order)][name] = {"bits": float(bits[order, best]), "weight": weights[best]}
    return table


def _bits(model: NucleotideMarkov, sequences: Sequence[bytes], weights: Sequence[float]) -> Floats:
    """Bits per base of every order and weight, (orders, weights)."""
    sums = np.zeros((model.order + 1, len(weights)))
    for sequence in sequences:
        for order, scores in enumerate(model.by_order(sequence, weights=weights)):
            sums[order] -= scores.sum(axis=1)
    return sums / sum(len(_grams(sequence, model.order)) for sequence in sequences)


def new_stretches(sequence: bytes, training: Sequence[bytes], *, words: int, min_length: int) -> list[bytes]:
    """The stretches of a sequence that hold no word of `words` bases of the training sequences.

    Args:
        sequence: capitals out of ACGT.
        training: give both strands, to leave out what stands on either.
        words: bases of a word, 1 .. 31.
        min_length: fewest bases of a stretch.

    Raises:
        ValueError: the sequence has other letters.
    """
    known = np.sort(np.concatenate([_grams(text, words - 1) for text in training]))
    grams = _grams(sequence, words - 1)
    if len(grams) != max(0, len(sequence) - words + 1):
        raise ValueError("the sequence has letters outside ACGT; cut it there")
    found = np.flatnonzero(_lookup(known, np.ones(len(known)), grams))  # where known words begin
    begins = np.concatenate([[0], found + 1])  # a stretch may share all but one base with the word before it
    ends = np.concatenate([found + words - 1, [len(sequence)]])
    return [
        sequence[begin:end]
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        if end - begin >= min_length
    ]


def _grams(sequence: bytes, order: int) -> Codes:
    """Every base with the `order` bases before it as one integer, the base itself in the lowest 2 bits."""
    bases = _LETTERS[np.frombuffer(sequence, dtype=np.uint8)]
    count = max(0, len(bases) - order)
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(order + 1):
        grams <<= np.uint64(2)
        grams |= bases[i : i + count] & np.uint8(3)
    strange = np.concatenate([[0], np.cumsum(bases > 3)])
    return grams[strange[order + 1 :] == strange[:count]] if count else grams


def _low_bases(count: int) -> np.uint64:
    return np.uint64((1 << (2 * count)) - 1)


def _with_contexts(grams: Codes, counts: Floats) -> _Order:
    contexts = grams >> np.uint64(2)
    starts = _run_starts(contexts)
    return _Order(grams, counts, contexts[starts], np.add.reduceat(counts, starts))


def _summed(grams: Codes, counts: Floats) -> tuple[Codes, Floats]:
    permutation = np.argsort(grams, kind="stable")
    grams = grams[permutation]
    starts = _run_starts(grams)
    return grams[starts], np.add.reduceat(counts[permutation], starts)


def _run_starts(ordered: Codes) -> NDArray[np.intp]:
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _lookup(keys: Codes, values: Floats, wanted: Codes) -> Floats:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0.0)
