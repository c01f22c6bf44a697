# SPDX-License-Identifier: Apache-2.0
"""The fit of the LaughingHyena paper: poles and residues of a filter by gradient descent.

Massaroli et al. 2023, arXiv 2310.18780, section 3.2: poles in polar form and complex residues, l2 error of the taps.
The code was not released; optimiser, rate, number of steps and start are not known to us and are arguments here.
`benchmarks/bench_distill.py` prints a sweep over them: data-driven starts and `refine.py` come closer in less time.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .modes import PAIR, REAL, Modes, Taps, flat, powers, response


Start = Literal["spectrum", "random"]


def gradient_poles(
    taps: Taps,
    states: int,
    *,
    steps: int = 2000,
    learning_rate: float = 3e-2,
    start: Start = "spectrum",
) -> Modes:
    """Poles and residues after so many steps of Adam, cosine schedule, of pairs; one state is a real pole.

    Odd sizes leave one state unused.

    Args:
        taps: Behind lag 0; channels do not influence each other, each is scaled to norm 1.
        states: Real numbers of state.
        steps: Of the optimiser.
        learning_rate: At the first step.
        start: Angles at the peaks of each spectrum or random ones in [0, pi], time constants in equal ratios up to
            half the length.
    """
    size = taps.energy.sqrt().clamp(min=1e-300)
    blocks = taps.blocks / size.view(-1, 1, 1)
    parameters = _started(taps._replace(blocks=blocks), states, start)
    turning = float(states > 1)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            decay, angle, re, im = parameters
            log_pole = torch.complex(-decay.exp(), angle * turning)
            found = response(powers(log_pole, blocks), torch.complex(re, im), taps.length)
            optimizer.zero_grad()
            (found - blocks).square().sum().backward()
            optimizer.step()
            schedule.step()
    decay, angle, re, im = (parameter.detach() for parameter in parameters)
    residue = torch.complex(re, im) * size.unsqueeze(1)
    kind = torch.full(angle.shape, PAIR if states > 1 else REAL, device=angle.device)
    return Modes(torch.complex(-decay.exp(), angle * turning), residue, kind)


def _started(taps: Taps, states: int, start: Start) -> list[Tensor]:
    """log(-log r), angle, real and imaginary part of the residue, (C, N) each, with gradients."""
    channels, pairs = len(taps.energy), max(1, states // 2)
    angle = _peaks(flat(taps.blocks, taps.length), pairs) if start == "spectrum" else _random_angles(taps, pairs)
    constants = torch.logspace(0, math.log10(max(2.0, taps.length / 2)), pairs, dtype=torch.float64)
    decay = constants.to(angle.device).log().neg().expand(channels, -1).clone()
    parameters = [decay, angle, torch.full_like(angle, 0.1 / pairs), torch.zeros_like(angle)]
    return [parameter.requires_grad_() for parameter in parameters]


def _peaks(x: Tensor, count: int) -> Tensor:
    """Angles of the largest local maxima of spectra of x (C, M)."""
    size = torch.fft.rfft(x, n=2 * x.shape[1]).abs()
    padded = torch.nn.functional.pad(size, (1, 1))
    peak = (size >= padded[:, :-2]) & (size >= padded[:, 2:])
    best = torch.where(peak, size, size * 1e-3).topk(min(count, size.shape[1]), dim=1).indices
    angle = best.double() * (math.pi / x.shape[1])
    return torch.nn.functional.pad(angle, (0, count - angle.shape[1]), value=1.0)


def _random_angles(taps: Taps, count: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    angle = torch.rand(count, generator=rng, dtype=torch.float64) * math.pi
    return angle.to(taps.blocks.device).expand(len(taps.blocks), -1).clone()
