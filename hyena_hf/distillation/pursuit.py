# SPDX-License-Identifier: Apache-2.0
"""Poles one after the other: each is the one that explains most of what those before it leave.

Matching pursuit (Mallat and Zhang 1993) over decaying exponentials, with all poles and residues refined after each
step, as Newtonized orthogonal matching pursuit does for undamped ones (Mamandipoor et al. 2016, arXiv 1509.01942).

The dictionary is a grid: time constants in equal ratios, and for each of them all angles of one FFT of the residual
times a decaying exponential. A fast exponential needs few taps and few angles, so that all transforms together cost as
much as two or three of full length. With m = sum_t r_t z^t, alpha = sum |z|^(2t), beta = sum z^(2t), a pair lowers the
sum of squares by

    2 (alpha |m|^2 - Re(conj(beta) m^2)) / (alpha^2 - |beta|^2)

and a real pole by m^2 / alpha.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .modes import PAIR, REAL, Modes, Taps, flat, no_modes, packed
from .refine import Fit, least_squares, polish
from .weighting import error_energy, filtered


_RATIO = 1.7  # of neighbouring time constants
_FASTEST = 0.7  # time constant
_WORTH = 1.3  # a pair must explain so much more than a real pole to be worth a second state
_EXPLAINED = 1e-26  # share of the energy that is left to rounding
_REFINED = 5  # steps after each new pole


class Atom(NamedTuple):
    """The best of the grid for each channel: log pole and how much it explains, (C,) each."""

    log_pole: Tensor
    gain: Tensor

    def better(self, other: "Atom") -> "Atom":
        """Per channel."""
        mine = self.gain >= other.gain
        return Atom(*(torch.where(mine, a, b) for a, b in zip(self, other, strict=True)))


def _sum_of_powers(log_w: Tensor, count: int) -> Tensor:
    return (1 - torch.exp(count * log_w)) / (1 - torch.exp(log_w))


def _best_of_radius(residual: Tensor, rate: float) -> tuple[Atom, Atom]:
    """The best pair and the best real pole with |z| = exp(-rate)."""
    count = min(residual.shape[1], math.ceil(8 / rate))
    points = 2 << (count - 1).bit_length()
    lag = torch.arange(count, dtype=torch.float64, device=residual.device)
    moment = torch.fft.rfft(residual[:, :count] * torch.exp(-rate * lag), n=points).conj()
    angle = torch.arange(points // 2 + 1, dtype=torch.float64, device=residual.device) * (2 * math.pi / points)
    log_z = torch.complex(torch.full_like(angle, -rate), angle)
    alpha = math.expm1(-2 * rate * count) / math.expm1(-2 * rate)
    beta = _sum_of_powers(2 * log_z, count)
    room = alpha**2 - beta.abs().square()
    gain = 2 * (alpha * moment.abs().square() - (beta.conj() * moment.square()).real)
    gain = torch.where(room > 1e-3 * alpha**2, gain / room, 0)
    ends = torch.stack([moment[:, 0], moment[:, -1]], dim=1).real.square() / alpha
    pair, real = gain.max(dim=1), ends.max(dim=1)
    return Atom(log_z[pair.indices], pair.values), Atom(log_z[real.indices * (points // 2)], real.values)


def best_atoms(residual: Tensor) -> tuple[Atom, Atom]:
    """The pair and the real pole of the grid that explain most of residuals (C, M)."""
    steps = math.ceil(math.log(2 * residual.shape[1] / _FASTEST) / math.log(_RATIO))
    found = [_best_of_radius(residual, 1 / (_FASTEST * _RATIO**step)) for step in range(steps + 1)]
    pair, real = found[0]
    for another_pair, another_real in found[1:]:
        pair, real = pair.better(another_pair), real.better(another_real)
    return pair, real


def with_best_atom(fit: Fit, taps: Taps, free: Tensor) -> Modes:
    """One more slot: a pair or a real pole, as free states (C,) allow."""
    pair, real = best_atoms(filtered(taps, flat(fit.residual, taps.length)))
    as_pair = (free >= 2) & (pair.gain > _WORTH * real.gain)
    log_pole = torch.where(as_pair, pair.log_pole, real.log_pole).unsqueeze(1)
    new = Modes(log_pole, torch.zeros_like(log_pole), torch.where(as_pair, PAIR, REAL).unsqueeze(1))
    return Modes(*(torch.cat(parts, dim=1) for parts in zip(fit.modes, new, strict=True)))


def pursue(taps: Taps, states: int) -> Fit:
    """Poles for `states` real numbers a channel, refined; fewer where nothing is left to explain."""
    fit = Fit(no_modes(len(taps.energy), 0, taps.blocks), taps.blocks, taps.energy)
    while True:
        left = error_energy(taps, fit.residual)
        # less than what float32 steps make of it, which is the rest of the cost
        explained = (left <= _EXPLAINED * taps.energy) | (left <= fit.cost - left)
        free = torch.where(explained, 0, states - fit.modes.states)
        index = (free > 0).nonzero().flatten()
        if not len(index):
            return fit._replace(modes=packed(fit.modes))
        some, part = taps.rows(index), fit.rows(index)
        modes = packed(with_best_atom(part, some, free[index]))
        fit = fit.replaced(index, polish(some, least_squares(some, modes), _REFINED))
