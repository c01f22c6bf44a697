# SPDX-License-Identifier: Apache-2.0
"""Sums of decaying exponentials and all inner products that fitting them needs, without a matrix of taps by modes.

A mode is a pole z = exp(l) and a residue R and adds Re(R z^t) to x_t = h_{t+1}, t = 0, ..., M - 1. Lags are written
t = B i + j, so that z^t = z^(B i) z^j: responses and moments are matrix products with inner dimension 2 N or B, and
need N (B + M / B) exponentials in place of N M. Inner products of modes are geometric sums in w = conj(z_m) z_n and
w = z_m z_n, in closed form (spec of this package; the sums are textbook):

    S0 = sum w^t = (1 - w^M) / (1 - w)
    S1 = sum t w^t = (S0 - 1 - (M - 1) w^M) / (1 - w)
    S2 = sum t^2 w^t = (2 S1 - (S0 - 1) - (M - 1)^2 w^M) / (1 - w)

They lose 1 / (M |1 - w|)^k of the precision of float64 in S_k. C channels, N modes, M lags, all float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor


# Kinds of slots.
UNUSED, REAL, PAIR = 0, 1, 2

# Of an unused slot, as log pole: gone after one lag, and exponentials of it stay finite.
NOTHING = -60.0

# 2 float32 steps below 1: rounding its parts cannot take a pole out of the unit disc.
MAX_RADIUS = 1 - 2.0**-23

# A quarter of the spacing of float32: what the roundings of a step come to.
ROUNDING = 1.5e-8

# As which it counts at first: fits that are as good as float32 are not to get worse for it.
CHEAP_ROUNDING = 4e-9

# log(-log r) of the slowest and of the fastest pole that a fit may have.
SLOWEST, FASTEST = -15.9, 3.0


class Modes(NamedTuple):
    """Modes of C filters.

    Attributes:
        log_pole: l = log z, (C, N) complex; angles in [0, pi].
        residue: (C, N) complex; real where the pole is.
        kind: `UNUSED`, `REAL` or `PAIR` (z and its conjugate, which counts two states), (C, N) integers.
    """

    log_pole: Tensor
    residue: Tensor
    kind: Tensor

    @property
    def states(self) -> Tensor:
        """Real numbers of state, (C,)."""
        return self.kind.sum(dim=1)

    def rows(self, index: Tensor) -> "Modes":
        """Some channels."""
        return Modes(*(part[index] for part in self))

    def replaced(self, index: Tensor, other: "Modes") -> "Modes":
        """With other modes in some channels; as many slots as the wider of the two."""
        width = max(self.kind.shape[1], other.kind.shape[1])
        mine, theirs = widened(self, width), widened(other, width)
        return Modes(*(a.index_copy(0, index, b) for a, b in zip(mine, theirs, strict=True)))


def no_modes(channels: int, width: int, like: Tensor) -> Modes:
    """Unused slots on the device of `like`."""
    log_pole = torch.full((channels, width), NOTHING, dtype=torch.complex128, device=like.device)
    kind = torch.zeros(channels, width, dtype=torch.int64, device=like.device)
    return Modes(log_pole, torch.zeros_like(log_pole), kind)


def widened(modes: Modes, width: int) -> Modes:
    """With unused slots up to a width."""
    missing = width - modes.kind.shape[1]
    if missing <= 0:
        return modes
    more = no_modes(len(modes.kind), missing, modes.log_pole)
    return Modes(*(torch.cat(pair, dim=1) for pair in zip(modes, more, strict=True)))


def packed(modes: Modes) -> Modes:
    """Used slots first, pairs before real poles, and no more slots than the fullest channel needs."""
    order = modes.kind.argsort(dim=1, descending=True, stable=True)
    width = int((modes.kind != UNUSED).sum(dim=1).max()) if len(modes.kind) else 0
    return Modes(*(part.gather(1, order)[:, :width] for part in modes))


class Taps(NamedTuple):
    """Taps behind the first, x_t = h_{t+1}, cut into blocks.

    Attributes:
        blocks: (C, rows, B), zeros behind the end.
        length: M.
        energy: Sum of squares, (C,), or what `spectrum` makes of it.
        spectrum: Weight of errors by frequency, see `weighting.py`; None: all count alike.
        rounding: Relative size of the rounding of a state that counts as an error, see `refine.py`.
    """

    blocks: Tensor
    length: int
    energy: Tensor
    spectrum: Tensor | None = None
    rounding: float = CHEAP_ROUNDING

    def rows(self, index: Tensor) -> "Taps":
        """Some channels."""
        spectrum = None if self.spectrum is None else self.spectrum[index]
        return Taps(self.blocks[index], self.length, self.energy[index], spectrum, self.rounding)


def taps_of(x: Tensor) -> Taps:
    """Blocks of x (C, M); a block is about as long as there are blocks."""
    count = x.shape[1]
    size = 1 << ((count - 1).bit_length() + 1) // 2
    blocks = torch.nn.functional.pad(x, (0, -count % size)).unflatten(1, (-1, size))
    return Taps(blocks, count, x.square().sum(dim=1))


def flat(blocks: Tensor, count: int) -> Tensor:
    """(C, rows, B) -> (C, count)."""
    return blocks.flatten(1)[:, :count]


class Powers(NamedTuple):
    """z^j (C, N, B) and z^(B i) (C, N, rows); lags behind M are cut off by what uses them."""

    fine: Tensor
    coarse: Tensor


def powers(log_pole: Tensor, blocks: Tensor) -> Powers:
    """Of poles (C, N) for taps in such blocks (C, rows, B)."""
    rows, size = blocks.shape[1:]
    lag = torch.arange(max(rows, size), dtype=torch.float64, device=log_pole.device)
    log_pole = log_pole.unsqueeze(-1)
    return Powers(torch.exp(log_pole * lag[:size]), torch.exp(log_pole * (size * lag[:rows])))


def response(power: Powers, residue: Tensor, count: int) -> Tensor:
    """Taps of modes in blocks (C, rows, B), zeros behind the first `count`."""
    coarse = residue.unsqueeze(-1) * power.coarse
    left = torch.cat([coarse.real, -coarse.imag], dim=1)  # (C, 2 N, rows)
    right = torch.cat([power.fine.real, power.fine.imag], dim=1)  # (C, 2 N, B)
    blocks = left.mT @ right
    if blocks[0].numel() > count:
        blocks[:, -1, count - blocks[0].numel() :] = 0  # there is one partial block, and it is the last
    return blocks


def moments(power: Powers, blocks: Tensor, slopes: bool = False) -> tuple[Tensor, Tensor | None]:
    """sum_t x_t z^t and, with `slopes`, sum_t t x_t z^t; (C, N) complex each."""
    size = blocks.shape[2]
    fine = power.fine
    lag = torch.arange(max(blocks.shape[1:]), dtype=torch.float64, device=fine.device)
    columns = torch.cat([fine, fine * lag[:size]], dim=1) if slopes else fine
    found = blocks @ torch.cat([columns.real, columns.imag], dim=1).mT  # (C, rows, 2 columns)
    inner = torch.complex(*found.mT.chunk(2, dim=1))  # (C, columns, rows)
    if not slopes:
        return (inner * power.coarse).sum(dim=-1), None
    plain, sloped = inner.chunk(2, dim=1)
    weighted = plain * power.coarse
    slope = (weighted * (size * lag[: blocks.shape[1]])).sum(dim=-1) + (sloped * power.coarse).sum(dim=-1)
    return weighted.sum(dim=-1), slope


def _log_products(log_pole: Tensor) -> Tensor:
    """Logarithms of conj(z_m) z_n and of z_m z_n, (2, C, N, N)."""
    other = log_pole.unsqueeze(-2)
    return torch.stack([log_pole.conj().unsqueeze(-1) + other, log_pole.unsqueeze(-1) + other])


def gram(log_pole: Tensor, count: int) -> Tensor:
    """Inner products of the real columns Re z^t, -Im z^t over `count` lags: (C, 2 N, 2 N)."""
    log_w = _log_products(log_pole)
    return _real_products(torch.expm1(count * log_w) / torch.expm1(log_w))


def joint_gram(log_pole: Tensor, residue: Tensor, count: int) -> Tensor:
    """The same for the columns z^t and their derivatives R t z^t by log z: (C, 4 N, 4 N).

    Order: real parts of z^t, real parts of R t z^t, minus imaginary parts of both.
    """
    log_w = _log_products(log_pole)
    gap, last = -torch.expm1(log_w), torch.exp(count * log_w)
    s0 = -torch.expm1(count * log_w) / gap
    s1 = (s0 - 1 - (count - 1) * last) / gap
    s2 = (2 * s1 - (s0 - 1) - (count - 1) ** 2 * last) / gap
    left = torch.stack([residue.conj(), residue]).unsqueeze(-1)
    right = residue.unsqueeze(-2)
    upper = torch.cat([s0, s1 * right], dim=-1)
    lower = torch.cat([s1 * left, s2 * left * right], dim=-1)
    return _real_products(torch.cat([upper, lower], dim=-2))


def _real_products(products: Tensor) -> Tensor:
    """From u_m^H u_n and u_m^T u_n (2, C, n, n) to the products of Re u and -Im u, (C, 2 n, 2 n)."""
    hermitian, bilinear = products
    total, difference = (hermitian + bilinear) / 2, (bilinear - hermitian) / 2
    upper = torch.cat([total.real, -total.imag], dim=-1)
    lower = torch.cat([-difference.imag, -difference.real], dim=-1)
    return torch.cat([upper, lower], dim=-2)
