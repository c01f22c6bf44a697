# SPDX-License-Identifier: Apache-2.0
"""The exact long convolution of generated tokens in O(log^2 t) a token: relaxed convolution by tiles.

Oncescu et al. 2024, arXiv 2410.12982 (Flash Inference), algorithm 2; Agarwal et al. 2024, arXiv 2410.03766
(FutureFill). An output is a sum over lags. Lags below W are summed when it is asked for; longer ones have been added
to its accumulator before. With inputs counted from the moment at which the past was folded, input number e completes
the block of the U inputs before it, U the largest power of two that divides e, and one FFT of 2 U points adds the
block's part of the U outputs from the (W - 1)-th behind it on:

    far_{e + W - 1 + j} += sum_{m < U} w_{e - U + m} h_{W + j + U - 1 - m},   0 <= j < U

Only multiples of M complete a block. These ranges tile all pairs of an input and an output at least W apart, but for
the outputs that the last M inputs reach before:

    far_{e + W - M + j} += sum_{m <= j} w_{e - M + m} h_{W + j - m},   0 <= j < M - 1

After that, accumulators are complete for the next W - M + 1 outputs at least, whatever stands between multiples of M:
a few pending inputs need no block of their own.

The past as a whole, a prompt, is folded into all accumulators to come by one FFT.

B batch, C channels, T committed inputs, n new ones, K accumulators.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyena_hf.ops import causal_fftconv
from hyena_hf.ops.continued import continued_fftconv
from hyena_hf.ops.precision import is_short, transform_dtype

from .history import ExactHistory
from .taps import Evaluable, Taps


# Lags that are summed one by one (W), and inputs of the smallest block (M), powers of two.
NEAR, BLOCK = 128, 32

# A fold costs as much as sums over so many times the columns that it touches. It waits until as much has been spent
# on sums, because nobody knows whether more tokens will come.
PATIENCE = 2

# New inputs that are rather folded at once than block by block.
_CHUNK = 1024

# Points of transforms whose spectra are kept; longer ones come once or twice in a generation.
_KEPT = 2048

# Numbers in work at once: they fit a cache.
_WORK = 1 << 17


class OnlineTiles(ExactHistory):
    """All gated inputs of one long convolution, and what they add to the outputs to come: O(log^2 T) a token.

    Exact as `ExactHistory`, whose way it goes while there is nothing to gain: for short pasts, chunks of inputs, rows
    that advance unequally. After some steps of few tokens it folds what it holds and goes on by tiles; whatever does
    not fit them makes it fold anew later. Reordering, recording and cropping are those of every history.

    Only for caches that grow: a compiled step of a static one must not depend on the position.

    Args:
        capacity: Inputs to make room for; a hint, grown by doubling.
        exact: As in `causal_fftconv`.
        ends: Whether nothing comes beyond `capacity` and no inputs but single tokens behind the prompt: the prompt is
            then dropped as soon as it is folded.
    """

    def __init__(self, *, capacity: int | None = None, exact: bool = False, ends: bool = False) -> None:
        super().__init__(None, capacity=capacity, exact=exact)
        self.ends, self.dropped = ends, False
        self.far: Tensor | None = None  # (B, C, K), the outputs behind `origin`; None: nothing is folded
        self.origin = 0  # column of the buffer behind which tiles began
        self.done = 0  # inputs behind it that lie in blocks already added
        self.spent = 0  # inputs summed over by calls in a row that brought few tokens, as many to every row
        self.near: tuple[Tensor, Tensor] | None = None  # taps of lags W - 1 .. 1, (C, W - 1), and of lag 0, (C,)
        self.spectra: dict[int, Tensor] = {}  # of tiles, by points

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Add inputs; blocks that they complete are added when the next output is asked for."""
        if counts is not None:
            self._refuse_if_dropped("rows that advance unequally")
        super().commit(w, counts)
        if self.dropped:
            return
        if counts is None and w.shape[-1] <= _CHUNK:
            self.spent += self.used + NEAR
        else:
            self.spent, self.far = 0, None

    def respond(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Long convolution of everything up to each new input; arguments as in `ExactHistory.respond`."""
        past, new = self.past(w), w.shape[-1]
        if new > NEAR - BLOCK + 1 or not (self.far is not None or self._pays()):
            self._refuse_if_dropped(f"{new} new tokens at once")
            return super().respond(w, taps, long_filter, index, direct)
        far = self.far
        if far is None or self.used - self.origin + new > far.shape[-1]:
            far = self._fold(past, new, taps, long_filter, index)
            past = self.past(w)
        self._add_blocks(past, far, taps, long_filter, index)
        at = self.used - self.origin
        return self._sum_near(past, w, taps, long_filter, index, direct) + far[..., at : at + new]

    def follow(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 (one interface)
        """None: pending inputs are answered again, by tiles."""
        return

    def _pays(self) -> bool:
        """Whether it is time to fold."""
        return self.used >= NEAR and self.spent >= PATIENCE * max(self.capacity or 0, 2 * self.used)

    def _refuse_if_dropped(self, what: str) -> None:
        if self.dropped:
            raise ValueError(
                f"the prompt was dropped once its effect on the {self.capacity} tokens of this generation was known, "
                f"but now there are {what}; set decode_cache='history' in the generation config"
            )

    def _fold(self, past: Tensor, new: int, taps: Taps, long_filter: Evaluable, index: int) -> Tensor:
        """Add the whole past to all outputs to come, as far as there is room for them."""
        self._refuse_if_dropped("more tokens than announced")
        room = (self.capacity or 0) - self.used
        if room < new:
            room = max(self.used, new)
        h = taps.rising(long_filter, index, self.used + room)
        h = pad(h[:, NEAR:], (NEAR, max(self.used + room - max(h.shape[-1], NEAR), 0)))
        ahead = past.new_zeros(*past.shape[:2], room)
        exact = self.exact or is_short(self.used + room)
        # a tensor of its own: blocks are added in place
        self.far = continued_fftconv(past, ahead, h, h.new_zeros(h.shape[0]), exact=exact).clone()
        self.near, self.spectra = None, {}  # of the taps as they now are
        if self.ends:
            self.dropped = True
            recent = past[..., self.used - NEAR + 1 :]
            self.buffer = pad(recent, (0, room))
            self.used = NEAR - 1
        self.origin, self.done = self.used, 0
        return self.far

    def _add_blocks(self, past: Tensor, far: Tensor, taps: Taps, long_filter: Evaluable, index: int) -> None:
        """Add the blocks that have been completed since the last time to the outputs that they are for."""
        inputs = self.used - self.origin
        for end in range(self.done + BLOCK, inputs + 1, BLOCK):
            size = end & -end
            first = end + NEAR - 1
            room = min(size, far.shape[-1] - first)
            if room > 0:
                block = past[..., self.origin + end - size : self.origin + end]
                spectra = self._spectra(2 * size, taps, long_filter, index, block)
                far[..., first : first + room] += _circular(block, spectra, size - 1, room)
            first, room = first - BLOCK + 1, min(BLOCK - 1, far.shape[-1] - first + BLOCK - 1)
            if room > 0:
                block = past[..., self.origin + end - BLOCK : self.origin + end]
                spectra = self._spectra(BLOCK, taps, long_filter, index, block)
                far[..., first : first + room] += _circular(block, spectra, 0, room)
        self.done = inputs - inputs % BLOCK

    def _spectra(self, points: int, taps: Taps, long_filter: Evaluable, index: int, w: Tensor) -> Tensor:
        """Spectra (C, F) of the taps of so many lags from W on, those of M lags with as many zeros behind them."""
        if points in self.spectra:
            return self.spectra[points]
        assert self.far is not None  # noqa: S101 (there are blocks only behind a fold)
        # no more taps than the fold has evaluated: what lies behind is for outputs behind the last accumulator
        end = min(NEAR + points, self.origin + self.far.shape[-1])
        h = taps.rising(long_filter, index, max(end, NEAR))[:, NEAR : NEAR + points]
        dtype = transform_dtype(w.dtype, w.device, self.exact or is_short(points))
        spectra = torch.fft.rfft(h.to(dtype), n=max(points, 2 * BLOCK))
        spectra = spectra.repeat_interleave(w.shape[1] // h.shape[0], dim=0)
        if points <= _KEPT:
            self.spectra[points] = spectra
        return spectra

    def _sum_near(
        self, past: Tensor, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor
    ) -> Tensor:
        """The part of the lags below W, one by one."""
        recent = past[..., self.used - NEAR + 1 :]
        groups = w.shape[1] // direct.shape[0]
        if w.shape[-1] > 1:
            h = taps.rising(long_filter, index, NEAR)[:, :NEAR]
            exact = self.exact or is_short(NEAR + w.shape[-1])
            return causal_fftconv(
                torch.cat([recent, w], dim=-1), h, direct.to(h.dtype), exact=exact, check_finite=False
            )[..., NEAR - 1 :]
        if self.near is None:
            h = taps.rising(long_filter, index, NEAR)[:, :NEAR].to(w.dtype)
            h = pad(h, (0, NEAR - h.shape[-1])).repeat_interleave(groups, dim=0)
            self.near = h[:, 1:].flip(-1), h[:, 0]
        falling, at_once = self.near
        direct = direct.to(w.dtype)
        at_once = at_once + (direct if groups == 1 else direct.repeat_interleave(groups))
        return torch.addcmul((recent * falling).sum(-1), w[..., 0], at_once).unsqueeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that has a batch dimension, by attribute name."""
        named = super().tensors()
        return named if self.far is None else {**named, "far": self.far}

    def nbytes(self) -> int:
        """Bytes held, transformed taps included."""
        return super().nbytes() + sum(x.nbytes for x in (*self.spectra.values(), *(self.near or ())))


def _circular(block: Tensor, spectra: Tensor, first: int, count: int) -> Tensor:
    """Some outputs of a circular convolution of blocks (B, C, U) with filters of these spectra, on 2 U points.

    Of those from U - 1 on, nothing that wraps around falls on any; of filters of U taps it falls on none.
    """
    size, dtype = block.shape[-1], spectra.real.dtype
    channels = max(_WORK // (2 * size * block.shape[0]), 1)
    parts = []
    for x, spectrum in zip(block.split(channels, dim=1), spectra.split(channels), strict=True):
        product = torch.fft.rfft(x.to(dtype), n=2 * size) * spectrum
        parts.append(torch.fft.irfft(product, n=2 * size)[..., first : first + count])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(block.dtype)


__all__ = ["OnlineTiles"]
