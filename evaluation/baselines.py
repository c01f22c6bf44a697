"""Classical byte models, so that a language model's bits per byte have something to beat.

    markov_bits_per_byte(train, heldout, order=5)      interpolated n-gram model: what counting contexts reaches
    xz_bits_per_byte(train, heldout)                   LZ77 with range coding: what finding repetitions reaches

Both read the same training bytes as the model beside them and report bits for each held-out byte.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


Codes = NDArray[np.uint64]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

Estimate = Callable[[Counts, NDArray[np.intp]], tuple[Floats, Floats, Floats]]

XZ_PREFIX = 16 * 2**20
"""Most training bytes that xz is given: the last ones. xz reads them twice, at about 1.1 MB/s on one core."""


def markov_bits_per_byte(
    train_documents: Sequence[bytes],
    heldout_documents: Sequence[bytes],
    order: int = 5,
    *,
    smoothing: Literal["kneser-ney", "witten-bell"] = "kneser-ney",
) -> float:
    """Bits per byte of the held-out documents under an interpolated byte model of the given order.

    Training on 30 MB and scoring 1 MB takes about 5 s on one core and 0.8 GB. See `MarkovModel`.
    """
    model = MarkovModel(train_documents, order, smoothing=smoothing)
    size = sum(len(document) for document in heldout_documents)
    if size == 0:
        raise ValueError(f"the {len(heldout_documents)} held-out documents hold no bytes")
    return -sum(math.fsum(model.log2_probabilities(document)) for document in heldout_documents if document) / size


@dataclass
class _Order:
    """One order k: p_k(c | context) = seen(context c) + leak(context) * p_{k-1}(c | context less its oldest byte)."""

    grams: Codes  # (context, byte) pairs that occur, sorted
    seen: Floats
    contexts: Codes  # sorted
    leak: Floats


class MarkovModel:
    """Interpolated byte model: each order gives probability to the next lower one, the last to 1/256 for each byte.

    Kneser-Ney, the better one, is the modified interpolated smoothing of Chen and Goodman 1999 (Computer Speech and
    Language 13, 359-393, after Kneser and Ney 1995): discounts D_1, D_2, D_3+ for each order follow from the counts of
    counts, and lower orders count the distinct bytes before a gram instead of its occurrences.
    Witten-Bell (Witten and Bell 1991, IEEE Trans. Inf. Theory 37, method C of PPM): leak = T / (N + T), with N
    occurrences and T distinct bytes after a context.

    Each document follows `order` zero bytes, so its first bytes have a context too.

    Args:
        documents: training documents.
        order: bytes of context, 0 .. 7 (a gram is one 64-bit integer).
        smoothing: see above.

    Raises:
        ValueError: order out of range, or no training bytes.
    """

    def __init__(
        self,
        documents: Sequence[bytes],
        order: int = 5,
        *,
        smoothing: Literal["kneser-ney", "witten-bell"] = "kneser-ney",
    ) -> None:
        if not 0 <= order <= 7:
            raise ValueError(f"order ({order}) must be in 0 .. 7")
        if not any(documents):
            raise ValueError(f"the {len(documents)} training documents hold no bytes")
        self.order = order
        self.orders: list[_Order] = []
        grams, counts = np.unique(_grams(documents, order), return_counts=True)
        estimate = _kneser_ney if smoothing == "kneser-ney" else _witten_bell
        for k in range(order, -1, -1):
            self.orders.insert(0, _estimated(grams, counts, estimate))
            shorter = grams & _low_bytes(k)  # the gram without its oldest byte
            weights = np.ones_like(counts) if smoothing == "kneser-ney" else counts
            grams, counts = _summed(shorter, weights)

    def log2_probabilities(self, document: bytes) -> Floats:
        """Base-2 logarithm of the probability of each byte of a document, given the bytes before it."""
        grams, position = np.unique(_grams([document], self.order), return_inverse=True)
        probability = np.full(len(grams), 1 / 256)
        for k, table in enumerate(self.orders):
            gram = grams & _low_bytes(k + 1)
            seen = _lookup(table.grams, table.seen, gram, absent=0.0)
            leak = _lookup(table.contexts, table.leak, gram >> np.uint64(8), absent=1.0)
            probability = seen + leak * probability
        return np.log2(probability)[position]


def _grams(documents: Sequence[bytes], order: int) -> Codes:
    """Each byte with the `order` bytes before it as one integer, the byte itself in the lowest 8 bits."""
    stream = np.frombuffer(b"".join(bytes(order) + document for document in documents), dtype=np.uint8)
    count = len(stream) - order
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(order + 1):
        grams <<= np.uint64(8)
        grams |= stream[i : i + count]
    lengths = np.array([len(document) for document in documents])
    ends = np.cumsum(lengths + order)[:-1] - order  # where the windows end in the zero bytes before a later document
    kept = np.ones(count, dtype=bool)
    for i in range(order):
        kept[ends + i] = False
    return grams[kept]


def _low_bytes(count: int) -> np.uint64:
    return np.uint64((1 << (8 * count)) - 1)


def _summed(grams: Codes, weights: Counts) -> tuple[Codes, Counts]:
    """Distinct grams, sorted, each with the sum of its weights."""
    permutation = np.argsort(grams, kind="stable")
    grams = grams[permutation]
    starts = _run_starts(grams)
    return grams[starts], np.add.reduceat(weights[permutation], starts)


def _run_starts(ordered: Codes) -> NDArray[np.intp]:
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _estimated(grams: Codes, counts: Counts, estimate: Estimate) -> _Order:
    contexts = grams >> np.uint64(8)
    starts = _run_starts(contexts)
    kept, given, total = estimate(counts, starts)
    sizes = np.diff(np.append(starts, len(grams)))
    return _Order(grams, kept / np.repeat(total, sizes), contexts[starts], given / total)


def _kneser_ney(counts: Counts, starts: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """What each gram keeps, what each context gives to the lower order, and the sum of both over the context."""
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    return counts - discounts, np.add.reduceat(discounts, starts), np.add.reduceat(counts, starts).astype(float)


def _witten_bell(counts: Counts, starts: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    distinct = np.diff(np.append(starts, len(counts))).astype(float)
    return counts.astype(float), distinct, np.add.reduceat(counts, starts) + distinct


def _discounts(counts: Counts) -> Floats:
    """D_0 = 0, D_1, D_2, D_3+; 1/2 where a count of counts is 0, never under 0.1 so that no byte is impossible."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if n[1:5].min() == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    d = np.array([i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)])
    return np.concatenate([[0.0], np.clip(d, 0.1, [1.0, 2.0, 3.0])])


def _lookup(keys: Codes, values: Floats, wanted: Codes, *, absent: float) -> Floats:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], absent)


def xz_bits_per_byte(train_documents: Sequence[bytes], heldout_documents: Sequence[bytes]) -> float:
    """Bits that the held-out documents add to the xz file of the training documents, per held-out byte.

    That is 8 (size(train + heldout) - size(train)) / bytes at preset 9e: xz is given the training data as the models
    are, to refer back to, and pays only for what comes after. At most the last `XZ_PREFIX` training bytes are used;
    the dictionary of preset 9 would hold four times as many. The documents are concatenated, so unlike the models xz
    also refers from one held-out document to those before it. Without training documents it is plain compression.
    """
    heldout = b"".join(heldout_documents)
    if not heldout:
        raise ValueError(f"the {len(heldout_documents)} held-out documents hold no bytes")
    train = b"".join(train_documents)[-XZ_PREFIX:]
    with ThreadPoolExecutor(max_workers=2) as pool:  # lzma releases the interpreter lock
        alone, together = pool.map(_xz_size, [train, train + heldout])
    return 8 * (together - alone) / len(heldout)


def _xz_size(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
