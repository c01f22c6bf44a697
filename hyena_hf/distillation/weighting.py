# SPDX-License-Identifier: Apache-2.0
"""Errors of filters as inputs of a known spectrum make them heard.

The output of a convolution with e, for stationary inputs of power spectrum S, has the power

    E |e * u|^2 = 1 / (2 pi) integral |E(f)|^2 S(f) df = e^T T e,    T the Toeplitz matrix of the input's correlations

(Wiener 1930, Khinchin 1934). It is summed here over n >= 2 M frequencies of M taps, which is exact for S = 1; T is
then a section of a circulant matrix, and a product with it two FFTs. S = G G^* with a causal G of causal inverse, from
the cepstrum (Oppenheim and Schafer 1975): G keeps the poles of what it filters, so that methods which look for poles
by unweighted least squares see the weighted problem behind it.

C channels, N modes, M taps behind lag 0, F frequencies of a measured spectrum, n points of an FFT.
"""

import torch
from torch import Tensor

from .modes import Powers, Taps, flat, gram, joint_gram, moments


FLOOR = 1e-2  # of the mean power: a frequency that a short calibration set lacks may come all the same


def on_grid(spectrum: Tensor, count: int) -> Tensor:
    """Measured power (C, F) from 0 to Nyquist at the frequencies of an FFT for `count` taps, (C, n / 2 + 1).

    Scaled to mean 1 and not below `FLOOR`; flat where a channel never had any input.
    """
    points = 1 << (2 * count - 1).bit_length()
    mean = (spectrum.sum(dim=1, keepdim=True) - spectrum[:, [0, -1]].mean(dim=1, keepdim=True)) / (
        spectrum.shape[1] - 1
    )
    relative = torch.where(mean > 0, spectrum / mean.clamp(min=1e-300), 1).clamp(min=FLOOR)
    return torch.nn.functional.interpolate(
        relative.unsqueeze(1), size=points // 2 + 1, mode="linear", align_corners=True
    ).squeeze(1)


def weighted_taps(taps: Taps, spectrum: Tensor) -> Taps:
    """Taps whose errors count by a spectrum (C, F)."""
    grid = on_grid(spectrum, taps.length)
    taps = taps._replace(spectrum=grid)
    return taps._replace(energy=error_energy(taps, taps.blocks))


def _toeplitz(taps: Taps, x: Tensor) -> Tensor:
    """T x for x (C, M)."""
    assert taps.spectrum is not None  # noqa: S101 (narrows the type)
    points = 2 * (taps.spectrum.shape[1] - 1)
    return torch.fft.irfft(torch.fft.rfft(x, n=points) * taps.spectrum, n=points)[:, : x.shape[1]]


def _heard(taps: Taps, blocks: Tensor) -> Tensor:
    """T e, in the blocks of e (C, rows, B)."""
    e = flat(blocks, taps.length)
    heard = torch.nn.functional.pad(_toeplitz(taps, e), (0, blocks[0].numel() - taps.length))
    return heard.view(blocks.shape)


def error_energy(taps: Taps, residual: Tensor) -> Tensor:
    """e^T T e of residuals (C, rows, B), (C,)."""
    heard = residual if taps.spectrum is None else _heard(taps, residual)
    return (residual * heard).sum(dim=(1, 2))


def weighted_moments(
    taps: Taps, power: Powers, residual: Tensor, slopes: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`moments` of T e."""
    return moments(power, residual if taps.spectrum is None else _heard(taps, residual), slopes)


def weighted_gram(taps: Taps, log_pole: Tensor) -> Tensor:
    """`gram` with T between the columns."""
    if taps.spectrum is None:
        return gram(log_pole, taps.length)
    rows = torch.cat(_parts(*(sums[0] for sums in _transforms(taps, log_pole))), dim=1)
    return rows @ rows.mT


def weighted_joint_gram(taps: Taps, log_pole: Tensor, residue: Tensor) -> Tensor:
    """`joint_gram` with T between the columns."""
    if taps.spectrum is None:
        return joint_gram(log_pole, residue, taps.length)
    (plain, slope), (mirrored, mirrored_slope) = _transforms(taps, log_pole)
    residue = residue.unsqueeze(-1)
    real, imaginary = _parts(plain, mirrored)
    real_slope, imaginary_slope = _parts(residue * slope, residue.conj() * mirrored_slope)
    rows = torch.cat([real, real_slope, imaginary, imaginary_slope], dim=1)
    return rows @ rows.mT


def _transforms(taps: Taps, log_pole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Transforms of z^t and t z^t, and those of their conjugates, times the root of the weights: (C, N, n / 2 + 1)."""
    assert taps.spectrum is not None  # noqa: S101 (narrows the type)
    root, count = _weights(taps.spectrum).sqrt().unsqueeze(1), taps.length
    frequency = torch.linspace(0, -torch.pi, root.shape[-1], dtype=torch.float64, device=root.device)
    turn, end = (torch.polar(torch.ones_like(frequency), frequency * lag) for lag in (1, count))
    found = []
    for one in (log_pole.unsqueeze(-1), log_pole.conj().unsqueeze(-1)):
        inverse, last = 1 / (1 - torch.exp(one) * turn), torch.exp(count * one) * end
        plain = (1 - last) * inverse  # the sums S0 and S1 of `modes.py` at w = z exp(-i f)
        slope = (plain - 1 - (count - 1) * last) * inverse
        found.append((plain * root, slope * root))
    return found


def _parts(u: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Transforms of Re u and -Im u from those of u and of its conjugate (C, k, n / 2 + 1), as real vectors."""
    real, imaginary = (u + mirrored) / 2, (u - mirrored) * 0.5j
    return torch.view_as_real(real).flatten(2), torch.view_as_real(imaginary).flatten(2)


def _weights(spectrum: Tensor) -> Tensor:
    """What the squares of half a transform (C, n / 2 + 1) count, so that flat spectra give sums over taps."""
    both_sides = torch.full_like(spectrum[0], 1 / (spectrum.shape[1] - 1))
    both_sides[[0, -1]] /= 2
    return spectrum * both_sides


def spectral_rows(taps: Taps, rows: Tensor) -> Tensor:
    """Rows (C, k, M) as real vectors (C, k, n + 2) whose products are those with T; unchanged without one."""
    if taps.spectrum is None:
        return rows
    points = 2 * (taps.spectrum.shape[1] - 1)
    transformed = torch.fft.rfft(rows, n=points) * _weights(taps.spectrum).sqrt().unsqueeze(1)
    return torch.view_as_real(transformed).flatten(2)


def filtered(taps: Taps, x: Tensor) -> Tensor:
    """The first M values of G x for x (C, M)."""
    if taps.spectrum is None:
        return x
    points = 2 * (taps.spectrum.shape[1] - 1)
    cepstrum = torch.fft.irfft(taps.spectrum.log() / 2, n=points)
    cepstrum[:, 1 : points // 2] *= 2
    cepstrum[:, points // 2 + 1 :] = 0
    factor = torch.exp(torch.fft.rfft(cepstrum, n=points))
    return torch.fft.irfft(torch.fft.rfft(x, n=points) * factor, n=points)[:, : x.shape[1]]
