# SPDX-License-Identifier: Apache-2.0
"""Fit filters by sums of few decaying exponentials: `fit_modal`.

    h_0 = direct,    h_t = Re sum_n R_n p_n^(t-1)  for t >= 1

LaughingHyena (Massaroli et al. 2023, arXiv 2310.18780) finds poles and residues by gradient descent. The problem has
many local minima, so what decides is where one starts (`benchmarks/bench_distill.py`): here from Hankel matrices and
from matching pursuit (`poles.py`, `pursuit.py`), residues by least squares, both refined (`refine.py`), and the better
one kept for every channel. Poles are then rounded to what a float32 model can hold, residues fitted once more and
rounded too, so that the errors of the report are those of the model.

C channels, L taps, N modes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from hyena_hf.ops.modal import PI, canonical_poles

from .certificates import largest_gain, least_error, tail_sum
from .gradient import gradient_poles
from .hankel import HankelFactors, hankel_factors, order_for_tolerance, window_size
from .modes import NOTHING, PAIR, REAL, UNUSED, Modes, Taps, flat, no_modes, packed, powers, response, taps_of, widened
from .poles import era_poles
from .pursuit import pursue
from .refine import Fit, calmed, least_squares, polish, prune, stacked, step_errors
from .weighting import error_energy, filtered, weighted_taps


Method = Literal["auto", "era", "pursuit", "balanced", "gradient"]

_SUGGESTION = 1e-3  # share of the largest Hankel singular value that a suggested order leaves
_SPARE_VALUES = 8  # Hankel singular values beyond the order asked for
_SHORT, _LONG = 6, 60  # steps of refinement before and after the better start is known
_STARTS = "era", "era, pruned", "pursuit", "unweighted"
_MORE = 4  # states that are pruned
# Share of the energy, of which residues in float32 leave as much, and of the least cost, up to which fits are equally
# good.
_EXACT, _EQUAL = 1e-14, 1.0001
_CLOSE = 2.0  # sum of squares over that of the better start, up to which both are refined to the end
_ROUNDINGS = 4  # of a pole; two are enough for nearly all
_NUMBERS = 2**17  # taps at once
_MOST_CHANNELS = 64


@dataclass
class FitReport:
    """What is known of a fit, one value a channel.

    Attributes:
        relative_l2, relative_l1: Norm of the error over that of the filter, lag 0 left out of both.
        relative_output: Root mean square of the error of outputs over that of outputs, lag 0 left out of both, for
            inputs of the spectrum that was fitted for; where none was given, for white ones: `relative_l2`.
        step_error: Root mean square error of outputs that float32 steps of the recurrence make by their rounding, over
            that of outputs, for the same inputs; an estimate, right within a factor of 5. The parallel form has none.
        h_infinity: Upper bound of |E(f)|, the largest gain of the error: not relative.
        tail: Upper bound of the sum of |taps| of the fit beyond the last tap: not relative.
        lower_bound: Relative l2 error that no filter of `state_size` states can be below.
        suggested_order: States at which the Hankel singular values have fallen to 1e-3 of the largest; the number of
            values that were looked at (8 above `state_size`) where they have not.
        states: Real numbers of state that the fit uses.
        method: Name of what gave the poles.
    """

    relative_l2: Tensor
    relative_l1: Tensor
    relative_output: Tensor
    step_error: Tensor
    h_infinity: Tensor
    tail: Tensor
    lower_bound: Tensor
    suggested_order: Tensor
    states: Tensor
    method: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.method)} filters         median     largest"]
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                value = value.double()
                lines.append(f"{one.name:16s} {value.median():10.4g}  {value.max():10.4g}")
        counts = {name: self.method.count(name) for name in sorted(set(self.method))}
        lines.append(f"method           {', '.join(f'{name} {count}' for name, count in counts.items())}")
        return "\n".join(lines)


@dataclass
class _Job:
    """Filters of one chunk, scaled to a largest tap of 1, and their Hankel analysis."""

    taps: Taps
    window: Tensor
    factors: HankelFactors
    states: int

    @property
    def heard(self) -> HankelFactors:
        """Analysis of the filters as the spectrum of their inputs makes them heard."""
        if self.taps.spectrum is None:
            return self.factors
        x = filtered(self.taps, flat(self.taps.blocks, self.taps.length))
        size, count = self.factors.vectors.shape[1:]
        return hankel_factors(x[:, : 2 * size - 1], size, count)


def fit_modal(
    h: Tensor,
    *,
    state_size: int = 16,
    method: Method = "auto",
    spectrum: Tensor | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor, FitReport]:
    """Fit filters by modal ones of at most `state_size` real numbers of state.

    Args:
        h: Real taps (C, L), any floating dtype; computed in float64 on their device.
        state_size: A pair of conjugate poles counts two, a real pole one.
        method: `"era"` (windowed ERA) and `"pursuit"` (matching pursuit), both refined, are what `"auto"` chooses from
            in every channel. `"balanced"` is balanced truncation with least-squares residues and no refinement: stable
            by construction. `"gradient"` is the fit of the paper.
        spectrum: Power of the input of each convolution, (C, F) on an even grid of frequencies from 0 to Nyquist, in
            any unit: the mean power of the error of outputs is made small in place of that of taps. It is taken to be
            at least 1% of its mean everywhere. Several times as slow.
        progress: Show a progress bar (needs tqdm).

    Returns:
        Poles and residues (C, N) complex128, the direct taps (C,) float64 = h_0, and the report. One pole of a pair is
        returned, the one with positive imaginary part. All are inside the unit disc and have float32 parts that
        `ModalFilter` holds exactly. N is as large as the fullest channel needs; unused slots have pole and residue 0.

    Raises:
        ValueError: Taps that are not finite, grow throughout or are fewer than states; wrong shapes or options.

    Channels are independent. Time for each O(L d + d^3) a step; memory O(L d) for one channel at the least.
    """
    _check(h, state_size, method)
    _check_spectrum(h, spectrum)
    # columns of all modes are held where errors are weighted
    numbers = _NUMBERS if spectrum is None else max(1, _NUMBERS // state_size)
    starts = range(0, len(h), max(1, min(_MOST_CHANNELS, numbers // h.shape[1])))
    pieces = []
    with torch.no_grad():
        for start in _shown(starts, progress):
            piece = h[start : start + starts.step].to(torch.float64)
            _refuse_growing(piece, start)
            power = None if spectrum is None else spectrum[start : start + starts.step].to(piece)
            pieces.append(_fit_chunk(piece, power, state_size, method))
    width = max(modes.kind.shape[1] for modes, _ in pieces)
    modes = Modes(*(torch.cat(parts) for parts in zip(*(widened(m, width) for m, _ in pieces), strict=True)))
    poles = torch.where(modes.kind == UNUSED, 0, _canonical(modes.log_pole, modes.kind))
    return poles, modes.residue, h[:, 0].to(torch.float64), _joined([report for _, report in pieces])


def _check(h: Tensor, state_size: int, method: str) -> None:
    if h.ndim != 2 or 0 in h.shape or not h.is_floating_point():
        raise ValueError(f"h must be real taps (channels, length), got {tuple(h.shape)} of {h.dtype}")
    if isinstance(state_size, bool) or not isinstance(state_size, int) or state_size < 1:
        raise ValueError(f"state_size ({state_size!r}) must be a whole number, at least 1")
    if h.shape[1] > 1 and state_size > h.shape[1] - 1:
        raise ValueError(
            f"state_size ({state_size}) is above the {h.shape[1] - 1} taps behind lag 0 of a filter of length "
            f"{h.shape[1]}; choose {h.shape[1] - 1} or less, or keep the filter as it is"
        )
    if method not in _METHODS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(map(repr, _METHODS))}")
    if not (finite := torch.isfinite(h).all(dim=1)).all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"taps must be finite, but {_named(bad)} NaN or infinite ones; the model itself is broken")


def _check_spectrum(h: Tensor, spectrum: Tensor | None) -> None:
    if spectrum is None:
        return
    if spectrum.ndim != 2 or len(spectrum) != len(h) or spectrum.shape[1] < 2 or not spectrum.is_floating_point():
        raise ValueError(
            f"spectrum must be real power ({len(h)}, F), a row for each filter and at least 2 frequencies, got "
            f"{tuple(spectrum.shape)} of {spectrum.dtype}"
        )
    if not (torch.isfinite(spectrum) & (spectrum >= 0)).all():
        raise ValueError("spectrum must be power: finite and nowhere negative; measure it with `input_spectra`")


def _named(channels: list[int]) -> str:
    shown = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
    return f"channel {shown} has" if len(channels) == 1 else f"channels {shown} have"


def _refuse_growing(h: Tensor, first: int) -> None:
    """A filter whose energy grows fourfold from each eighth of its length to the next has no stable continuation."""
    if h.shape[1] < 16:
        return
    parts = h[:, h.shape[1] % 8 :].unflatten(1, (8, -1))
    scale = parts.abs().amax(dim=(1, 2)).clamp(min=1e-300).view(-1, 1, 1)
    energy = (parts / scale).square().sum(dim=2)
    growing = ((energy[:, 1:] > 4 * energy[:, :-1]) & (energy[:, :-1] > 0)).all(dim=1)
    if growing.any():
        bad = (growing.nonzero().flatten() + first).tolist()
        raise ValueError(
            f"{_named(bad)} taps that grow from one end to the other, which no stable recurrence does; cut the filter "
            f"where it is still falling, or window it"
        )


def _shown(starts: range, progress: bool) -> Iterable[int]:
    if not progress:
        return starts
    from tqdm import tqdm

    return tqdm(starts, desc="filters", unit="chunk")


def _fit_chunk(h: Tensor, power: Tensor | None, state_size: int, method: Method) -> tuple[Modes, FitReport]:
    """Fit and report of a few channels."""
    channels, length = h.shape
    scale = h[:, 1:].abs().amax(dim=1) if length > 1 else h.new_zeros(channels)
    live = scale > 0
    modes, names = no_modes(channels, 0, h), ["none"] * channels
    lower, order = h.new_zeros(channels), torch.zeros(channels, dtype=torch.int64, device=h.device)
    output, steps = h.new_zeros(channels), h.new_zeros(channels)
    error = h.clone()
    error[:, 0] = 0
    if live.any():
        job = _analysed(h[live, 1:] / scale[live].unsqueeze(1), None if power is None else power[live], state_size)
        fit, chosen = _METHODS[method](job)
        fit = _rounded(job.taps, fit.modes)
        index = live.nonzero().flatten()
        used, residual = _stored(job.taps, fit.modes, scale[live].unsqueeze(1))
        modes = packed(modes.replaced(index, used))
        error[live, 1:] = flat(residual, job.taps.length) * scale[live].unsqueeze(1)
        steps[live] = step_errors(job.taps, fit.modes)
        output[live] = (error_energy(job.taps, residual).clamp(min=0) / job.taps.energy).sqrt()
        least = least_error(job.window, job.factors, state_size)
        lower[live] = least / flat(job.taps.blocks, job.taps.length).norm(dim=1)
        order[live] = order_for_tolerance(job.factors.values.abs(), _SUGGESTION)
        for channel, name in zip(index.tolist(), chosen, strict=True):
            names[channel] = name
    report = _report(h, error, modes, (steps, lower, order, names))
    return modes, report if power is None else replace(report, relative_output=output)


def _analysed(x: Tensor, power: Tensor | None, states: int) -> _Job:
    """Hankel analysis of taps x (C, M) behind lag 0, for inputs of such power (C, F)."""
    size = window_size(x.shape[1] + 1)
    window = x[:, : 2 * size - 1]
    taps = taps_of(x) if power is None else weighted_taps(taps_of(x), power)
    return _Job(taps, window, hankel_factors(window, size, min(size, states + _SPARE_VALUES)), states)


def _era(job: _Job) -> tuple[Fit, list[str]]:
    fit = least_squares(job.taps, packed(era_poles(job.heard, job.states)))
    return calmed(job.taps, polish(job.taps, fit, _LONG), _LONG), ["era"] * len(fit.cost)


def _pursuit(job: _Job) -> tuple[Fit, list[str]]:
    fit = pursue(job.taps, job.states)
    return calmed(job.taps, polish(job.taps, fit, _LONG), _LONG), ["pursuit"] * len(fit.cost)


def _balanced(job: _Job) -> tuple[Fit, list[str]]:
    """The Hankel matrix goes on with zeros, so that all of it is there."""
    size = job.taps.length
    x = torch.nn.functional.pad(flat(job.taps.blocks, size), (0, size - 1))
    poles = era_poles(hankel_factors(x, size, min(size, job.states)), job.states, stable=True)
    fit = least_squares(job.taps, packed(poles))
    return fit, ["balanced"] * len(fit.cost)


def _gradient(job: _Job) -> tuple[Fit, list[str]]:
    fit = least_squares(job.taps, gradient_poles(job.taps, job.states))
    return fit, ["gradient"] * len(fit.cost)


def _auto(job: _Job) -> tuple[Fit, list[str]]:
    """All starts a few steps, then the best one and what is close to it to the end; side by side in one batch.

    ERA with some states more, of which the least useful are removed again, ends in other minima than ERA at once.
    Where errors are weighted, the best fit without weights is one start more, so that none is worse than it.
    """
    taps, channels = job.taps, torch.arange(len(job.taps.energy), device=job.taps.energy.device)
    heard = job.heard
    more = min(job.states + _MORE, heard.values.shape[1])
    era = stacked([least_squares(taps, packed(era_poles(heard, states))) for states in (job.states, more)])
    era = prune(taps.rows(channels.repeat(2)), era, job.states, _SHORT)
    fits = stacked([era, pursue(taps, job.states), *_unweighted(job)])
    costs = fits.cost.view(-1, len(channels))
    index = (costs <= _CLOSE * costs.amin(dim=0)).flatten().nonzero().flatten()
    some = taps.rows(index % len(channels))
    fits = fits.replaced(index, polish(some, fits.rows(index), _LONG))
    # of equally good ones the first: it has the fewest states, and rounding does not decide
    costs = fits.cost.view(-1, len(channels))
    winner = (costs <= _EQUAL * costs.amin(dim=0) + _EXACT * taps.energy).int().argmax(dim=0)
    fit = calmed(taps, fits.rows(winner * len(channels) + channels), _LONG)
    return fit, [_STARTS[number] for number in winner.tolist()]


def _unweighted(job: _Job) -> list[Fit]:
    """What `_auto` finds if all errors count alike; nothing where they do."""
    taps = job.taps
    if taps.spectrum is None:
        return []
    plain = taps_of(flat(taps.blocks, taps.length))
    fit, _ = _auto(replace(job, taps=plain))
    return [polish(taps, least_squares(taps, fit.modes), _SHORT)]


_METHODS: dict[str, Callable[[_Job], tuple[Fit, list[str]]]] = {
    "auto": _auto,
    "era": _era,
    "pursuit": _pursuit,
    "balanced": _balanced,
    "gradient": _gradient,
}


def _canonical(log_pole: Tensor, kind: Tensor) -> Tensor:
    """Poles as float32 log-radius and angle give them, so that a model that stores these has exactly these poles.

    Rounding is repeated until it changes nothing: the angle is the coarser of the two near pi.
    """
    radius, angle = log_pole.real, log_pole.imag
    angle = torch.where(kind == REAL, torch.where(angle.abs() > 1, PI, 0.0), angle)
    poles = canonical_poles(radius.float(), angle.float())
    for _ in range(_ROUNDINGS):
        radius, angle = poles.abs().clamp(min=1e-30).log(), poles.angle()
        poles = canonical_poles(radius.float(), angle.float())
    return poles


def _rounded(taps: Taps, modes: Modes) -> Fit:
    """With poles that a model can hold, one of each pair, and the best residues for them."""
    turn = torch.remainder(modes.log_pole.imag, 2 * torch.pi)
    angle = torch.minimum(turn, 2 * torch.pi - turn)
    log_pole = torch.complex(modes.log_pole.real, angle)
    poles = _canonical(log_pole, modes.kind)
    kind = torch.where((modes.kind == PAIR) & (poles.imag == 0), REAL, modes.kind)
    log_pole = torch.complex(poles.abs().clamp(min=1e-30).log(), poles.angle())
    log_pole = torch.where(kind == UNUSED, torch.full_like(log_pole, NOTHING), log_pole)
    return least_squares(taps, packed(_sorted(Modes(log_pole, modes.residue, kind))))


def _stored(taps: Taps, modes: Modes, scale: Tensor) -> tuple[Modes, Tensor]:
    """Modes times a scale (C, 1) with residues in float32, and the residual that these leave, in the unit of taps."""
    residue = (modes.residue * scale).to(torch.complex64).to(torch.complex128)
    if modes.kind.shape[1] == 0:
        return modes, taps.blocks
    left = taps.blocks - response(powers(modes.log_pole, taps.blocks), residue / scale, taps.length)
    return modes._replace(residue=residue), left


def _sorted(modes: Modes) -> Modes:
    """By angle, and slow poles first where it is the same."""
    by_rate = modes.log_pole.real.argsort(dim=1, descending=True, stable=True)
    modes = Modes(*(part.gather(1, by_rate) for part in modes))
    by_angle = modes.log_pole.imag.argsort(dim=1, stable=True)
    return Modes(*(part.gather(1, by_angle) for part in modes))


def _report(h: Tensor, error: Tensor, modes: Modes, analysis: tuple[Tensor, Tensor, Tensor, list[str]]) -> FitReport:
    steps, lower, order, names = analysis

    def share(norm: int) -> Tensor:
        size = h[:, 1:].norm(p=norm, dim=1)
        return torch.where(size > 0, error.norm(p=norm, dim=1) / size.clamp(min=1e-300), 0)

    return FitReport(
        relative_l2=share(2),
        relative_l1=share(1),
        relative_output=share(2),
        step_error=steps,
        h_infinity=largest_gain(error),
        tail=tail_sum(modes, h.shape[1]),
        lower_bound=lower,
        suggested_order=order,
        states=modes.states,
        method=names,
    )


def _joined(reports: list[FitReport]) -> FitReport:
    parts = {}
    for one in fields(FitReport):
        values = [getattr(report, one.name) for report in reports]
        parts[one.name] = (
            torch.cat(values) if isinstance(values[0], Tensor) else [name for names in values for name in names]
        )
    return FitReport(**parts)


__all__ = ["FitReport", "fit_modal"]
