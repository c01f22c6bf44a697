# SPDX-License-Identifier: Apache-2.0
"""Which stretch of a contig a model sees around a site, and the likelihoods of many such stretches, each scored once.

A window has `window` bases of the reference and is centred on the site; where the contig begins or ends it is shifted
inwards, and a shorter contig is seen whole. What replaces the site may be longer or shorter: the flanks are the same
for every allele, so a window with an insertion is longer by it. Where nobody named a window and the model takes no
more bases than the default one has, both flanks of such a site are shorter, so that its longest allele fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batching import check_batch_size
from .encoding import Encoder
from .forward import Forward
from .likelihood import score


_DEFAULT_WINDOW = 8192


@dataclass(frozen=True)
class WindowSettings:
    """How sites are scored.

    Args:
        window: Bases of the reference that the model sees around a site; None: its `max_position_embeddings`, but at
            most 8,192 (less the tokens that stand before a sequence, and less an insertion that would not fit).
        batch_size: Windows in a batch, or `"auto"`; results do not depend on it.
        reverse_complement: Mean over the two strands; twice the work.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: A window under 2, or no batch.
    """

    window: int | None = None
    batch_size: int | str = "auto"
    reverse_complement: bool = False

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int)):
            raise TypeError(f"window must be a number of bases or None, got {self.window!r}")
        if self.window is not None and self.window < 2:
            raise ValueError(f"window is {self.window}; a site needs context, use at least 2 bases")


class WindowScorer:
    """A model that scores windows of bases.

    Args:
        model: As for `score`.
        tokenizer: As for `score`; it gives one token for each base.
        settings: `window` may be None.

    Attributes:
        window: Bases of a window.
        longest: Bases of the longest sequence that the model takes; None: any number.
        leaves_room: Whether a window is smaller where an insertion would not fit.

    Raises:
        TypeError: The model predicts no next token.
        ValueError: A tokenizer whose tokens are no bases, or a window that is longer than the model takes.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: WindowSettings) -> None:
        forward, encoder = Forward(model), Encoder(tokenizer)
        forward.check_causal()
        count = len(encoder("ACGTN"))
        if count != 5:
            raise ValueError(
                f"{type(tokenizer).__name__} reads ACGTN as {count} tokens; windows need one token for each base, as "
                f"HyenaNucleotideTokenizer and HyenaByteTokenizer give"
            )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        before = len(encoder.prefix)
        self.longest = None if forward.limit is None else forward.limit - before
        self.window = settings.window or min(_trained_length(forward) - before, _DEFAULT_WINDOW)
        if self.longest is not None and self.window > self.longest:
            raise ValueError(f"window is {self.window} bases, but the model takes {self.longest}; use at most that")
        self.leaves_room = settings.window is None and self.longest is not None
        self._unscored = 0 if before else 1

    def place(self, start: int, end: int, length: int, growth: int = 0) -> tuple[int, int]:
        """The window around a site that is no longer than it.

        Args:
            start: First base of the site, 0-based.
            end: One behind its last base.
            length: Bases of the contig.
            growth: Bases that the longest allele adds. A window that nobody asked for leaves room for them, where the
                model takes a bounded number.

        Returns:
            First base of the window, 0-based, and one behind its last one.
        """
        width = self.window
        if self.longest is not None and self.leaves_room:
            width = min(width, self.longest - max(growth, 0))
        first = start - (width - (end - start)) // 2
        first = max(0, min(first, length - width))
        return first, min(first + width, length)

    def is_large(self, allele: str) -> str:
        """In words that an allele takes more than half of a window; empty where it does not."""
        if 2 * len(allele) <= self.window:
            return ""
        return f"allele of {len(allele)} bases takes more than half of a window of {self.window}"

    def is_unfit(self, length: int) -> str:
        """Why a window with so many bases cannot be scored, in words; empty where it can."""
        if length <= self._unscored:
            return f"window of {length} base, which nothing predicts"
        if self.longest is not None and length > self.longest:
            return f"window of {length} bases with the allele is longer than the model takes ({self.longest})"
        return ""

    def num_scored(self, sequence: str) -> int:
        """How many bases of a sequence something predicts: all, or all but the first where nothing stands before."""
        return len(sequence) - self._unscored

    def __call__(self, sequences: Iterable[str]) -> dict[str, float]:
        """Log-likelihoods of sequences, natural logarithms; what comes twice is scored once."""
        distinct = list(dict.fromkeys(sequences))
        if not distinct:
            return {}
        values: np.ndarray = score(
            self.model,
            self.tokenizer,
            distinct,
            batch_size=self.settings.batch_size,
            reverse_complement=self.settings.reverse_complement,
        )
        return dict(zip(distinct, values.tolist(), strict=True))


def _trained_length(forward: Forward) -> int:
    config = forward.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or _DEFAULT_WINDOW
