# SPDX-License-Identifier: Apache-2.0
"""Poles from data, before any refinement: by Hankel matrices (`era_poles`, `balanced_poles`) or one after the other.

- Windowed ERA (Kung 1978; Juang and Pappa 1985): the dominant eigenvectors Q of the Hankel matrix of the taps that
  there are span an observability matrix, and one step in time is Q[:-1]^+ Q[1:]. Exact for filters of d states, may
  leave the unit disc for others.
- Balanced truncation of the filter as if it ended after its last tap (Moore 1981): the Hankel matrix goes on with
  zeros, and a step is Q^T shift(Q), a compression of a shift and so always stable.

Poles come as kinds of slots, see `modes.py`. C channels, n rows, d states, N slots.
"""

import math

import torch
from torch import Tensor

from .hankel import HankelFactors
from .modes import FASTEST, MAX_RADIUS, NOTHING, PAIR, REAL, UNUSED, Modes


# Singular values below this share of the largest are rounding.
_RANK = 1e-13


def era_poles(factors: HankelFactors, states: int, *, stable: bool = False) -> Modes:
    """Poles of the step between rows of the dominant eigenvectors; residues are 0.

    Args:
        factors: Of Hankel matrices, at least `states` pairs.
        states: d; fewer where the matrix has a smaller rank.
        stable: The matrix goes on with zeros (balanced truncation), where else its window ends.
    """
    sigma = factors.values.abs()[:, :states]
    used = sigma > _RANK * sigma[:, :1]
    q = factors.vectors[:, :, :states] * used.unsqueeze(1)
    step = q[:, :-1].mT @ q[:, 1:]
    if not stable:
        last = q[:, -1]  # Q[:-1]^T Q[1:] lacks one row of being a projection: Sherman and Morrison
        room = (1 - last.square().sum(dim=1)).clamp(min=1e-12).view(-1, 1, 1)
        step = step + last.unsqueeze(2) * (last.unsqueeze(1) @ step) / room
    step = torch.where(torch.isfinite(step), step, 0)
    values = torch.linalg.eigvals(step.cpu()).to(step.device)
    return _slots(values)


def _slots(values: Tensor) -> Modes:
    """Conjugate eigenvalues (C, d) as one slot a pair, inside the unit disc; those near 0 dropped."""
    radius = values.abs()
    outside = radius > MAX_RADIUS
    # mirrored at the circle as far as that leaves a usable pole
    values = torch.where(outside, values / radius.square().clamp(min=1e-30) * (1 - 1e-6), values)
    radius = values.abs().clamp(max=MAX_RADIUS)
    kept = (values.imag >= 0) & (radius > math.exp(-math.exp(FASTEST)))
    kind = torch.where(kept, torch.where(values.imag > 0, PAIR, REAL), UNUSED)
    log_pole = torch.complex(radius.clamp(min=1e-30).log(), values.angle())
    log_pole = torch.where(kept, log_pole, torch.full_like(log_pole, NOTHING))
    return Modes(log_pole, torch.zeros_like(log_pole), kind)
