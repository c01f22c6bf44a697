# SPDX-License-Identifier: Apache-2.0
"""Filters as a cache holds them: evaluated once for a generation, or for as long as they are frozen."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyena_hf.ops import FilterSpectrum, filter_spectrum
from hyena_hf.ops.engine import takes_spectra


# Lengths of input for which a convolution with a frozen filter keeps a spectrum.
_MAX_SPECTRA = 8

# New tokens up to which each output is one dot product with the past instead of an FFT over everything.
DOT_LENGTH = 4


class Evaluable(Protocol):
    """What the cache asks of a filter, see `hyena_hf.filters.LongFilter`."""

    support: int | None
    max_length: int | None

    def __call__(self, length: int) -> Tensor:
        """Taps (order - 1, H, length)."""
        ...

    def exact_taps(self, length: int) -> Tensor:
        """Taps within the support, not padded."""
        ...


class Taps:
    """The filter of one layer, evaluated once for a whole generation, or while it is frozen.

    Grows by doubling when a generation gets longer than announced. It holds tensors only, never the filter itself, so
    that copying a cache copies no weights. What belongs together is replaced at once: an evaluation that fails, or
    another thread, leaves it as it was.

    Args:
        capacity: Taps to evaluate at first; a hint.
        frozen: Evaluate without gradients, and keep spectra too.
    """

    def __init__(self, capacity: int | None = None, *, frozen: bool = False) -> None:
        self.capacity, self.frozen = capacity, frozen
        self.evaluated: tuple[Tensor, int] | None = None  # (order - 1, H, up to the support), the length they serve
        self.reversed: Tensor | None = None  # (order - 1, H, any width), lag 0 last
        self.spectra: dict[int, tuple[tuple[int, FilterSpectrum], ...]] = {}  # of each convolution, by length of input

    @property
    def h(self) -> Tensor | None:
        """The taps evaluated so far, (order - 1, H, up to the support)."""
        return None if self.evaluated is None else self.evaluated[0]

    def _reach(self, long_filter: Evaluable, length: int) -> tuple[Tensor, int]:
        """The taps, and the length that they serve."""
        if isinstance(length, torch.SymInt):  # an exported graph: no comparison may depend on the length
            return long_filter.exact_taps(length if long_filter.support is None else long_filter.support), length
        if self.evaluated is not None and self.evaluated[1] >= length:
            return self.evaluated
        hint = max(self.capacity or 0, 0 if self.evaluated is None else 2 * self.evaluated[1])
        # a filter that ends is asked for no more than its taps and the few new tokens of a step
        length = max(length, hint if long_filter.support is None else min(hint, long_filter.support))
        # the model has refused inputs longer than max_length; lags behind it meet only empty columns
        needed = min([length, *(n for n in (long_filter.support, long_filter.max_length) if n is not None)])
        if self.frozen:
            with torch.inference_mode(False), torch.no_grad():
                evaluated = long_filter(needed), length
        else:
            evaluated = long_filter(needed), length
        self.evaluated, self.reversed = evaluated, None
        return evaluated

    def forget(self, beyond: int) -> None:
        """Let go of taps that serve more than `beyond` inputs, unless they are frozen; whoever asks evaluates anew."""
        if not self.frozen and self.evaluated is not None and self.evaluated[1] > beyond:
            self.evaluated = self.reversed = None

    def rising(self, long_filter: Evaluable, index: int, length: int) -> Tensor:
        """Taps of convolution `index` for lags 0, 1, ... (H, K); all taps from K on are zero or out of reach."""
        h = self._reach(long_filter, length)[0][index]
        return h if isinstance(length, torch.SymInt) else h[:, :length]

    def falling(self, long_filter: Evaluable, index: int, length: int) -> Tensor:
        """Taps of convolution `index` for lags length - 1, ..., 0 (H, length), the order of a stored past."""
        h, served = self._reach(long_filter, length)
        backwards = self.reversed
        if backwards is None or backwards.shape[-1] < length:
            # of a filter that ends no more zeros than a step of a bounded past can reach
            end = served if long_filter.support is None else long_filter.support + DOT_LENGTH
            width = max(length, h.shape[-1], min(served, end))
            self.reversed = backwards = pad(h, (0, width - h.shape[-1])).flip(-1)
        return backwards[index, :, backwards.shape[-1] - length :]

    def keeps_spectra(self, long_filter: Evaluable, length: int) -> bool:
        """Whether spectra are kept for inputs of a length: not in graphs, and not for frames of short filters."""
        if not self.frozen or isinstance(length, torch.SymInt):
            return False
        return takes_spectra(self._reach(long_filter, length)[0].device, length, long_filter.support)

    def spectrum(
        self, long_filter: Evaluable, index: int, length: int, direct: Tensor, *, exact: bool = False
    ) -> FilterSpectrum:
        """Transformed taps and extra tap `direct` of convolution `index` for inputs of a length."""
        known = self.spectra.get(index, ())
        for size, spectrum in known:
            if size == length and spectrum.exact == exact:
                return spectrum
        h = self.rising(long_filter, index, length)
        with torch.inference_mode(False):
            spectrum = filter_spectrum(h, length, direct.detach().to(h.dtype), exact=exact)
        # the oldest goes: batches of many lengths may not fill the memory
        self.spectra[index] = (*known[-_MAX_SPECTRA + 1 :], (length, spectrum))
        return spectrum

    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(tensor.nbytes for tensor in (self.h, self.reversed) if tensor is not None)
        return held + sum(x.spectrum.nbytes for known in self.spectra.values() for _, x in known)


class FrozenTaps:
    """Taps of a layer's filters that outlive calls. A copy of the model that holds them is not frozen."""

    def __init__(self) -> None:
        self.taps, self.reverse_taps = Taps(frozen=True), Taps(frozen=True)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


__all__ = ["DOT_LENGTH", "Evaluable", "FrozenTaps", "Taps"]
