# SPDX-License-Identifier: Apache-2.0
"""Residues for given poles, and poles that are better than those one starts from.

Residues are a linear least-squares problem. Its normal equations have closed-form Gram matrices (`modes.py`);
refinement on the residual of all taps gives back what they lose (corrected seminormal equations, Bjorck 1987), and
where the condition of the scaled columns is above 1e5 (1e10 for the Gram matrix) an orthogonal factorisation of the
columns takes over.

Nearly equal poles with large residues of opposite signs fit well and are useless: their float32 states round each by
itself, and the difference is made of roundings. For white inputs the states of a mode have the size of its column a,
roundings of relative size u add up to u |a|^2 over its memory, and the output is wrong by u |R| |a|^2. The square of
that is added to the sum of squares that residues and poles make small, as one error beside the other; where it is
large all the same, it counts more, in up to three steps, each of which may cost the fit 2%: then poles part.

Poles are refined by variable projection (Golub and Pereyra 1973) in Kaufman's approximation (1975): a
Levenberg-Marquardt step of poles and residues together that damps the poles only, then residues anew. Poles move in
log(-log r) and angle, so none leaves the unit disc and slow ones move as freely as fast ones. Each channel has a
damping of its own and ends by itself.

C channels, N modes, M taps behind lag 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .modes import (
    FASTEST,
    NOTHING,
    PAIR,
    REAL,
    ROUNDING,
    SLOWEST,
    UNUSED,
    Modes,
    Powers,
    Taps,
    flat,
    packed,
    powers,
    response,
    widened,
)
from .weighting import error_energy, spectral_rows, weighted_gram, weighted_joint_gram, weighted_moments


_JITTER = 1e-14  # on the unit diagonal of a scaled Gram matrix: as good as its entries are
_WORST_CONDITION = 1e10
_RCOND = 1e-13
_GIVE_UP = 1e7  # damping
_STALLED = 1e-4  # relative gain of three steps together
_STEP_ERROR = 1e-6  # relative error of outputs that roundings of states may make
_DEARER, _MOST_DEAR = 30.0, 1e-3  # factor by which roundings count more where they make a larger one; u at most
_WORSE = 1.02  # relative l2 error over that before, which counting them more may cost each time


def column_mask(kind: Tensor) -> Tensor:
    """Which of the columns Re z^t, -Im z^t are free, (C, 2 N)."""
    return torch.cat([kind != UNUSED, kind == PAIR], dim=1)


def _solve(matrix: Tensor, right: Tensor, mask: Tensor, damping: Tensor | None = None) -> Tensor:
    """Scaled, damped normal equations; 0 where the mask is False, and in channels that are singular even so.

    Args:
        matrix: (C, n, n) symmetric.
        right: (C, n).
        mask: (C, n).
        damping: Added to the unit diagonal of the scaled matrix, (C, n).
    """
    both = mask.unsqueeze(1) & mask.unsqueeze(2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = torch.where(mask & (diagonal > 0), diagonal.clamp(min=1e-300).rsqrt(), 1.0)
    scaled = torch.where(both, matrix * scale.unsqueeze(1) * scale.unsqueeze(2), 0)
    scaled.diagonal(dim1=1, dim2=2).copy_((torch.ones_like(right) if damping is None else 1 + damping) + _JITTER)
    factor, _ = torch.linalg.cholesky_ex(torch.nan_to_num(scaled))
    found = torch.cholesky_solve((right * scale * mask).unsqueeze(-1), factor).squeeze(-1) * scale
    return torch.where(mask & torch.isfinite(found), found, 0)


def _as_columns(moment: Tensor) -> Tensor:
    """Complex moments (C, n) as products with the real columns, (C, 2 n)."""
    return torch.cat([moment.real, -moment.imag], dim=1)


def _as_residues(coefficients: Tensor) -> Tensor:
    return torch.complex(*coefficients.chunk(2, dim=1))


def _stiffness(taps: Taps, matrix: Tensor) -> Tensor:
    """What a squared coefficient of the columns Re z^t, -Im z^t adds to the error of float32 steps, (C, 2 N).

    The two of a pair share a state, which is as large as both columns together.

    Args:
        taps: Only its rounding counts.
        matrix: Gram matrix of these columns (C, 2 N, 2 N).
    """
    real, imaginary = matrix.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).unbind(dim=1)
    size = (real + imaginary).clamp(min=0) * taps.rounding
    return size.square().repeat(1, 2)


def _damping(stiffness: Tensor, matrix: Tensor) -> Tensor:
    """The same on the unit diagonal of the scaled matrix; 0 for columns that are nothing."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    return torch.where(diagonal > 0, stiffness / diagonal, 0)


def _coefficients(residue: Tensor) -> Tensor:
    return torch.cat([residue.real, residue.imag], dim=1)


def _step_energy(taps: Taps, matrix: Tensor, residue: Tensor) -> Tensor:
    """Squared error of outputs that float32 steps make, for the inputs whose errors count, (C,)."""
    return (_stiffness(taps, matrix) * _coefficients(residue).square()).sum(dim=1)


class Fit(NamedTuple):
    """Modes with their residual (C, rows, B) and its sum of squares (C,), weighted where the taps are.

    The sum includes the squared error that float32 steps add.
    """

    modes: Modes
    residual: Tensor
    cost: Tensor

    def rows(self, index: Tensor) -> "Fit":
        """Some channels."""
        return Fit(self.modes.rows(index), self.residual[index], self.cost[index])

    def replaced(self, index: Tensor, other: "Fit") -> "Fit":
        """With others in some channels."""
        residual = self.residual.index_copy(0, index, other.residual)
        return Fit(self.modes.replaced(index, other.modes), residual, self.cost.index_copy(0, index, other.cost))


def stacked(fits: Sequence[Fit]) -> Fit:
    """Fits of the same taps as further channels."""
    width = max(fit.modes.kind.shape[1] for fit in fits)
    modes = Modes(*(torch.cat(parts) for parts in zip(*(widened(fit.modes, width) for fit in fits), strict=True)))
    return Fit(modes, torch.cat([fit.residual for fit in fits]), torch.cat([fit.cost for fit in fits]))


def _corrected(taps: Taps, modes: Modes, power: Powers, rounds: int) -> tuple[Fit, Tensor]:
    """Least squares from the residues that there are; also the Gram matrix."""
    mask = column_mask(modes.kind)
    matrix = weighted_gram(taps, modes.log_pole)
    stiffness, residue = _stiffness(taps, matrix), modes.residue
    residual = taps.blocks - response(power, residue, taps.length)
    for _ in range(rounds):
        moment, _ = weighted_moments(taps, power, residual)
        right = _as_columns(moment) - stiffness * _coefficients(residue)
        change = _as_residues(_solve(matrix, right, mask, _damping(stiffness, matrix)))
        residue = residue + change
        residual = residual - response(power, change, taps.length)
    cost = error_energy(taps, residual) + _step_energy(taps, matrix, residue)
    return Fit(modes._replace(residue=residue), residual, cost), matrix


def least_squares(taps: Taps, modes: Modes) -> Fit:
    """The best residues for the poles of `modes`."""
    if modes.kind.shape[1] == 0:
        return Fit(modes, taps.blocks, taps.energy)
    power = powers(modes.log_pole, taps.blocks)
    start = modes._replace(residue=torch.zeros_like(modes.residue))
    fit, matrix = _corrected(taps, start, power, rounds=3)
    mask = column_mask(modes.kind)
    diagonal = torch.where(mask, matrix.diagonal(dim1=1, dim2=2), 1).clamp(min=1e-300).rsqrt()
    both = mask.unsqueeze(1) & mask.unsqueeze(2)
    scaled = torch.where(both, matrix * diagonal.unsqueeze(1) * diagonal.unsqueeze(2), 0)
    scaled.diagonal(dim1=1, dim2=2).fill_(1)
    spectrum = torch.linalg.eigvalsh(torch.nan_to_num(scaled))
    bad = torch.isnan(fit.cost) | (spectrum[:, 0] * _WORST_CONDITION < spectrum[:, -1])
    residue, residual = fit.modes.residue.clone(), fit.residual.clone()
    for channel in bad.nonzero().flatten().tolist():
        one = slice(channel, channel + 1)
        residue[one] = _orthogonal(taps, power, mask, channel, _damping(_stiffness(taps, matrix), matrix)[channel])
        residual[one] = taps.blocks[one] - response(Powers(*(p[one] for p in power)), residue[one], taps.length)
    cost = error_energy(taps, residual) + _step_energy(taps, matrix, residue)
    return Fit(modes._replace(residue=residue), residual, cost)


def _orthogonal(taps: Taps, power: Powers, mask: Tensor, channel: int, damping: Tensor) -> Tensor:
    """Least squares of one channel by QR, directions below 1e-13 of the largest left out: (1, N) complex.

    The damping (2 N,) is that of `_damping`.
    """
    table = power.coarse[channel].unsqueeze(-1) * power.fine[channel].unsqueeze(-2)  # (N, rows, B)
    some = taps.rows(torch.tensor([channel], device=mask.device))
    rows = flat(table, taps.length)
    rows = torch.cat([rows.real, -rows.imag])[mask[channel]]
    rows = spectral_rows(some, torch.cat([rows, flat(some.blocks, taps.length)]).unsqueeze(0))[0]
    columns, target = rows[:-1].mT, rows[-1]
    size = columns.norm(dim=0).clamp(min=1e-300)
    q, r = torch.linalg.qr(columns / size)
    r = torch.cat([r, torch.diag(damping[mask[channel]].sqrt())])
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    inverse = torch.where(s > _RCOND * s[0], 1 / s, 0) if len(s) else s
    found = torch.zeros(mask.shape[1], dtype=torch.float64, device=columns.device)
    seen = q.mT @ target
    found[mask[channel]] = vh.mT @ (inverse * (u[: len(seen)].mT @ seen)) / size
    return _as_residues(found.unsqueeze(0))


def _without_slopes(matrix: Tensor) -> Tensor:
    """Gram matrix of z^t from that of z^t and R t z^t, (C, 2 N, 2 N)."""
    count = matrix.shape[1] // 4
    kept = [*range(count), *range(2 * count, 3 * count)]
    return matrix[:, kept][:, :, kept]


def _step(fit: Fit, taps: Taps, power: Powers, damping: Tensor) -> Modes:
    """One damped step of poles and residues."""
    log_pole, residue, kind = fit.modes
    moment, slope = weighted_moments(taps, power, fit.residual, slopes=True)
    assert slope is not None  # noqa: S101 (asked for; narrows the type)
    matrix = weighted_joint_gram(taps, log_pole, residue)
    right = _as_columns(torch.cat([moment, residue * slope], dim=1))
    used, pair = (kind != UNUSED), (kind == PAIR)
    mask = torch.cat([used, used, pair, pair], dim=1)
    nonlinear = torch.cat([torch.zeros_like(used), used, torch.zeros_like(used), pair], dim=1)
    of_columns = _stiffness(taps, _without_slopes(matrix)).unflatten(1, (2, -1))
    stiffness = torch.cat([of_columns, torch.zeros_like(of_columns)], dim=2).flatten(1)  # none of slopes
    right = right - stiffness * torch.cat([residue.real, residue.real, residue.imag, residue.imag], dim=1)
    found = _solve(matrix, right, mask, _damping(stiffness, matrix) + nonlinear * damping.unsqueeze(1))
    change = _as_residues(found)
    residue_change, pole_change = change.chunk(2, dim=1)
    rate = -log_pole.real
    nu = rate.clamp(min=1e-300).log() + (-pole_change.real / rate.clamp(min=1e-300)).clamp(-2, 2)
    moved = torch.complex(-nu.clamp(SLOWEST, FASTEST).exp(), log_pole.imag + pole_change.imag)
    log_pole = torch.where(used, moved, log_pole)
    return Modes(log_pole, residue + residue_change, kind)


def polish(taps: Taps, fit: Fit, steps: int) -> Fit:
    """At most so many damped steps; a channel ends early where they gain nothing any more."""
    active = torch.arange(len(fit.cost), device=fit.cost.device)
    damping = torch.full_like(fit.cost, 1e-2)
    history = [fit.cost]
    result = fit
    for _ in range(steps):
        if len(active) == 0:
            break
        some, part = taps.rows(active), result.rows(active)
        power = powers(part.modes.log_pole, some.blocks)
        moved = _step(part, some, power, damping[active])
        tried, _ = _corrected(some, moved, powers(moved.log_pole, some.blocks), rounds=1)
        better = tried.cost < part.cost
        damping[active] = torch.where(better, damping[active] / 5, damping[active] * 4).clamp(min=1e-12)
        result = result.replaced(active[better], tried.rows(better))
        history.append(result.cost)
        stalled = torch.zeros_like(better)
        if len(history) > 4:
            before, now = history[-5][active], result.cost[active]
            stalled = (before - now <= _STALLED * before) & (damping[active] > 1e-3)
        floor = result.cost[active] <= 1e-30 * taps.energy[active]
        active = active[~(stalled | floor | (damping[active] > _GIVE_UP))]
    return result


def step_errors(taps: Taps, modes: Modes) -> Tensor:
    """Relative error of outputs that roundings of float32 states make, for the same inputs, (C,); an estimate."""
    if modes.kind.shape[1] == 0:
        return torch.zeros_like(taps.energy)
    exact = taps._replace(rounding=ROUNDING)
    return (_step_energy(exact, weighted_gram(taps, modes.log_pole), modes.residue) / taps.energy).sqrt()


def calmed(taps: Taps, fit: Fit, steps: int) -> Fit:
    """Fits whose float32 steps are as exact as may be: roundings count more and more where they make large errors.

    Nearly equal poles with large residues of opposite signs give way to others that fit about as well.
    """
    rounding = taps.rounding
    while (rounding := rounding * _DEARER) <= _MOST_DEAR:
        index = (step_errors(taps, fit.modes) > _STEP_ERROR).nonzero().flatten()
        if not len(index):
            break
        some, before = taps.rows(index)._replace(rounding=rounding), fit.rows(index)
        tried = polish(some, least_squares(some, before.modes), steps)
        good = error_energy(some, tried.residual) <= _WORSE**2 * error_energy(some, before.residual)
        fit = fit.replaced(index[good], tried.rows(good))
    return fit


def removal_costs(taps: Taps, modes: Modes) -> Tensor:
    """How much the sum of squares grows when a slot goes and the other residues adapt, (C, N); inf where unused.

    With G the Gram matrix, r_s the residue of a slot and B_s its block of G^-1: r_s^T B_s^-1 r_s.
    """
    count = modes.kind.shape[1]
    mask = column_mask(modes.kind)
    matrix = weighted_gram(taps, modes.log_pole)
    eye = torch.eye(2 * count, dtype=torch.float64, device=matrix.device)
    damping = _damping(_stiffness(taps, matrix), matrix)
    inverse = torch.stack([_solve(matrix, row.expand(len(matrix), -1), mask, damping) for row in eye], dim=1)
    slot = torch.arange(count, device=matrix.device)
    re, im, cross = inverse[:, slot, slot], inverse[:, slot + count, slot + count], inverse[:, slot, slot + count]
    a, b = modes.residue.real, modes.residue.imag
    single = a.square() / re
    double = (im * a.square() - 2 * cross * a * b + re * b.square()) / (re * im - cross.square())
    found = torch.where(modes.kind == PAIR, double, single)
    return torch.where(modes.kind == UNUSED, torch.inf, torch.nan_to_num(found, nan=0.0).clamp(min=0))


def _dropped(modes: Modes, slots: Tensor) -> Modes:
    """Without one slot of each channel."""
    chosen = torch.zeros_like(modes.kind, dtype=torch.bool).scatter_(1, slots.unsqueeze(1), True)
    log_pole = torch.where(chosen, torch.full_like(modes.log_pole, NOTHING), modes.log_pole)
    return Modes(log_pole, torch.where(chosen, 0, modes.residue), torch.where(chosen, UNUSED, modes.kind))


def prune(taps: Taps, fit: Fit, states: int, steps: int) -> Fit:
    """Remove the slot that costs least for each state until no channel has more than `states`, refining in between."""
    fit = polish(taps, fit, steps)
    while len(index := (fit.modes.states > states).nonzero().flatten()):
        some, modes = taps.rows(index), fit.modes.rows(index)
        excess = modes.states - states
        cost = removal_costs(some, modes) / modes.kind.clamp(min=1)
        real = torch.where(modes.kind == REAL, cost, torch.inf)
        one = (excess == 1) & torch.isfinite(real.amin(dim=1))  # a pair would leave a state unused
        slots = torch.where(one.unsqueeze(1), real, cost).argmin(dim=1)
        fit = fit.replaced(index, polish(some, least_squares(some, _dropped(modes, slots)), steps))
    return fit._replace(modes=packed(fit.modes))
