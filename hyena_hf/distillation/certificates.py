# SPDX-License-Identifier: Apache-2.0
"""What the error of a fitted filter can do to a convolution, and how good any fit of that size could have been.

With e = h - h^ over the L taps, and w any input:

- max_t |y_t - y^_t| <= ||e||_1 max_t |w_t|, within L steps. Beyond, h counts as 0 and the fit goes on: its taps from
  lag L on add at most sum_n |R_n| |p_n|^(L-1) / (1 - |p_n|).
- ||y - y^||_2 <= max_f |E(f)| ||w||_2. The largest value on M points of the unit circle, over cos(pi (L - 1) / (2 M)),
  is above the maximum between them: turned to be real, exp(-i f (L - 1) / 2) E(f) is a trigonometric polynomial, and
  such a one falls no faster from its maximum than the cosine of its degree (M. Riesz 1914; Ehlich and Zeller 1964).
- No filter of d states is closer than ||e||_2 >= sqrt(sum_{i>d} sigma_i^2 / n), sigma the singular values of the n x n
  Hankel matrix: a tap stands in at most n of its places (Eckart and Young 1936). Good fits are 2 to 4 times above it:
  it says that an order is too small, never that a fit is the best.

All of this is about one convolution in exact arithmetic. Gates multiply and layers follow, so nothing here bounds the
logits of a model, and rounding of a recurrence in float32 comes on top (`hyena_hf.ops.modal`). Fits weighted by a
spectrum are held to their actual error as others are: the bounds are those of the worst input, which weights do not
make better, and often worse than those of an unweighted fit.

C channels, L taps, N modes.
"""

import math

import torch
from torch import Tensor

from .hankel import HankelFactors, hankel_factors, window_size
from .modes import Modes


_OVERSAMPLING = 8  # points on the circle a tap: the bound is at most 2% above the maximum
_AT_ONCE = 2**21  # numbers of singular vectors
_GUARD = 10.0  # on what the residual of an incomplete decomposition may hide


def largest_gain(error: Tensor) -> Tensor:
    """An upper bound of max_f |E(f)| for taps (C, L): (C,)."""
    length = error.shape[1]
    points = 1 << (_OVERSAMPLING * length - 1).bit_length()
    peaks = [torch.fft.rfft(one, n=points).abs().amax(dim=1) for one in error.split(max(1, 2**20 // points))]
    return torch.cat(peaks) / math.cos(math.pi * (length - 1) / (2 * points))


def tail_sum(modes: Modes, length: int) -> Tensor:
    """A bound of the sum of all |taps| of a fit from lag `length` on, (C,)."""
    rate = modes.log_pole.real
    return (modes.residue.abs() * torch.exp(rate * (length - 1)) / -torch.expm1(rate)).sum(dim=1)


def least_error(taps: Tensor, factors: HankelFactors, states: int) -> Tensor:
    """A lower bound of the l2 error of any filter of so many states, (C,).

    The sum over i > d is that of all squares less the d largest. Values of an incomplete decomposition are from below;
    what they may lack is estimated from its residual and subtracted, so that the bound errs downwards.

    Args:
        taps: Behind lag 0, as the matrix holds them, (C, 2 n - 1).
        factors: At least the `states` largest values.
        states: d.
    """
    size = factors.vectors.shape[1]
    times = torch.arange(1, 2 * size, dtype=torch.float64, device=taps.device)
    times = torch.minimum(times, 2 * size - times)
    total = (times * taps.square()).sum(dim=1)
    squares, residual = factors.values.square(), factors.residual.square()
    rest = total - squares[:, :states].sum(dim=1) - _GUARD * residual[:, :states].sum(dim=1)
    rest = rest - 1e-14 * size * total  # rounding of the two sums
    known = (squares - _GUARD * residual)[:, states:].clamp(min=0).sum(dim=1)
    return (torch.maximum(rest, known).clamp(min=0) / size).sqrt()


def errors_by_order(h: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hankel singular values of filters, and the relative l2 error that no filter of 1, ..., count states is below.

    Args:
        h: Taps (C, L) float64, L at least 2.
        count: At most L // 2.

    Returns:
        Both (C, count), falling.
    """
    size = window_size(h.shape[1])
    sigma, bounds = [], []
    for some in h.split(max(1, _AT_ONCE // (size * count))):
        window = some[:, 1 : 2 * size]
        factors = hankel_factors(window, size, count)
        least = torch.stack([least_error(window, factors, states) for states in range(1, count + 1)], dim=1)
        sigma.append(factors.values.abs())
        bounds.append(least / some[:, 1:].norm(dim=1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny))
    return torch.cat(sigma), torch.cat(bounds)


__all__ = ["errors_by_order", "largest_gain", "least_error", "tail_sum"]
