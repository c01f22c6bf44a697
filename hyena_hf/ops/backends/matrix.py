# SPDX-License-Identifier: Apache-2.0
"""Convolve by real matrix products: for exported graphs, and for devices without fast complex transforms.

The transform of n points is a product of small matrices and elementwise twiddles, a Monarch decomposition (Dao et al.
2022, arXiv 2204.00595; Fu et al. 2023, arXiv 2311.05908), which is Cooley and Tukey's step (1965) with large factors.
It is taken at the odd frequencies of a real signal,

    X_k = sum_t x_t exp(-i pi t (2 k + 1) / n),   0 <= k < n,   X_{n-1-k} = conj X_k

whose products belong to the skew circle x^n = -1: what runs over its end comes back negated, and zeros at the end keep
a linear convolution from doing so. No frequency is its own conjugate there, so that half of them carry everything: the
first matrix, with f rows of input, has f / 2 cosines and f / 2 sines. These are the frequencies of the right-angle
convolution (x^{n/2} = i on complex signals, a weighted transform of Crandall and Fagin 1994), but the first and the
last product are real, and rows of zeros are left out of both. With n = f_1 ... f_m, R_j = f_{j+1} ... f_m and

    t = t_1 R_1 + t_2 R_2 + ... + t_m,   k = k_1 + f_1 (k_2 + f_2 (k_3 + ...)),   k_1 < f_1 / 2

level j sums over t_j with exp(-2 pi i t_j k_j / f_j) and multiplies by exp(-2 pi i k_j (t mod R_j) / (f_j R_j)), where
k_1 counts as k_1 + 1/2. The inverse is the transposed transform times 2 / n.

Everything is plain torch on real tensors: differentiable any number of times, traced by compilers and exporters, and
run by whatever multiplies matrices. Matrices are formed in float64 from phases reduced as integers, then rounded.

B batch, C channels, H filters, G channels a filter, L length, K taps, n points, f factor, R points of later levels.
"""

import itertools
import math
from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyena_hf.ops.precision import without_autocast


# Factors behind the first, which is free.
_FACTORS = (8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)
# Points up to which one level serves: longer sums of float32 lose accuracy.
_SINGLE = 64
# Passes over the signal that one more level costs, in multiplications a point.
_LEVEL_COST = 64
# Factors behind the first where the length is a symbol: none can be chosen for it, and the first one is L / 256.
_SYMBOLIC_FACTORS = (32, 16)


class Level(NamedTuple):
    """One factor f of a transform, with the number f' of frequencies that it yields and R.

    Matrix (2 f', 2 f), real parts above imaginary ones, and twiddles (f', R). The first level takes half of its
    frequencies, and its input is real: its matrix is (f, f). Sizes are given beside the tensors because compilers may
    not know those of constants.
    """

    factor: int
    taken: int
    rest: int
    matrix: Tensor
    cos: Tensor
    sin: Tensor


class Transform(NamedTuple):
    """Levels of a transform of n points, and the frequencies to keep (f_1 / 2, ..., f_m' taken) or None for all."""

    n: int
    levels: tuple[Level, ...]
    band: Tensor | None


def _waves(frequencies: Tensor, times: Tensor, half_period: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of pi * frequency * time / half_period in float64, (frequencies, times)."""
    # a tensor: ONNX divides by no symbol
    period = torch.full((1,), 2 * half_period, dtype=torch.int64, device=times.device)
    phases = torch.outer(frequencies, times).remainder(period)
    angles = phases.to(torch.float64) * (2 * math.pi) / period
    return angles.cos(), angles.sin()


def _build(factors: tuple[int, ...], keep: float, dtype: torch.dtype, device: torch.device) -> Transform:
    """The transform with these factors; of the last one, only the frequencies that a band of `keep` needs."""
    exact = torch.device("cpu") if device.type == "mps" else device  # no float64 there
    n, stride = math.prod(factors), 1
    levels, digits = [], torch.zeros(1, dtype=torch.int64, device=exact)
    for level, factor in enumerate(factors):
        rest = math.prod(factors[level + 1 :])
        low = 0
        count = factor if level else factor // 2
        if level and level == len(factors) - 1 and keep < 1:
            count = kept_frequencies(factor, keep)
            low = -(count // 2)
        k = torch.arange(low, low + count, device=exact)
        frequencies = 2 * k if level else 2 * k + 1  # in halves
        cos, sin = _waves(frequencies, torch.arange(factor, device=exact), factor)
        matrix = torch.cat([cos, -sin])
        if level:
            matrix = torch.cat([matrix, torch.cat([sin, cos])], dim=1)
        twiddles = _waves(frequencies, torch.arange(rest, device=exact), factor * rest)
        levels.append(Level(factor, count, rest, *(x.to(device=device, dtype=dtype) for x in (matrix, *twiddles))))
        digits, stride = digits.unsqueeze(-1) + stride * frequencies, stride * factor
    band = None if keep == 1 else (digits.abs() <= keep * n).squeeze(0).to(device=device, dtype=dtype)
    return Transform(n, tuple(levels), band)


def kept_frequencies(factor: int, keep: float) -> int:
    """Digits of the last factor, an even number around zero, that hold a share `keep` of all frequencies."""
    return min(2 * math.ceil(factor * keep / 2), factor)


def _multiplications(factors: tuple[int, ...], length: int, keep: float) -> float:
    """Multiplications of one transform of `length` values, with the passes over memory counted as such."""
    n = math.prod(factors)
    rest = n // factors[0]
    total = factors[0] * rest * -(-length // rest) + _LEVEL_COST * n * len(factors)
    for factor in factors[1:]:
        total += 2 * n * factor
    return total - 2 * n * (factors[-1] - kept_frequencies(factors[-1], keep))


def choose_factors(needed: int, length: int, keep: float = 1.0) -> tuple[int, ...]:
    """Factors of the cheapest transform.

    Args:
        needed: Least number of points.
        length: Number of values, the rest being zeros.
        keep: Share of the frequencies that is computed.

    Returns:
        Factors with a product of at least `needed`; the first is even and free, so that little is padded.
    """
    found: list[tuple[int, ...]] = [(needed + needed % 2,)] if keep == 1 and needed <= _SINGLE else []
    for levels in range(1, 4):
        for tail in itertools.combinations_with_replacement(_FACTORS, levels):
            rest = math.prod(tail)
            found.append((2 * -(-needed // (2 * rest)), *tail))
    return min(found, key=lambda factors: _multiplications(factors, length, keep))


@lru_cache(maxsize=16)
def _cached(needed: int, length: int, keep: float, dtype: torch.dtype, device: torch.device) -> Transform:
    with torch.inference_mode(False):  # what autograd may save
        return _build(choose_factors(needed, length, keep), keep, dtype, device)


def _remembered(needed: int, length: int, keep: float, dtype: torch.dtype, device: torch.device) -> Transform:
    return _cached(needed, length, keep, dtype, device)


# A compiled graph holds the matrices; the compiler warns of caches. All that `torch.compiler.assume_constant_result`
# does, but that it imports the compiler, which is slow.
_remembered._dynamo_marked_constant = True  # pyright: ignore (the compiler's own mark)


def _transform(w: Tensor, needed: int, keep: float) -> Transform:
    """The transform for signals w (..., L) on a circle of at least `needed` points, in the dtype of w."""
    if isinstance(needed, torch.SymInt):
        # two at least, in the first factor's half too: tracing would take a size of one for a constant
        first = 2 * (needed // (2 * math.prod(_SYMBOLIC_FACTORS)) + 2)
        return _build((first, *_SYMBOLIC_FACTORS), keep, w.dtype, w.device)
    needed, length = index(needed), index(w.shape[-1])  # compilers, whose graphs are compiled anew for other sizes
    if type(w) is Tensor:
        return _remembered(needed, length, keep, w.dtype, w.device)
    return _build(choose_factors(needed, length, keep), keep, w.dtype, w.device)  # exporters: part of the graph


def _as_grid(x: Tensor, rows: int, rest: int) -> Tensor:
    """Signals (..., L) with zeros behind them, row by row: (..., rows, rest)."""
    if not isinstance(rows, torch.SymInt):
        return pad(x, (0, rows * rest - x.shape[-1])).unflatten(-1, (rows, rest))
    # a pad would ask whether it is empty, a view whether it divides
    at = torch.arange(rows, device=x.device).unsqueeze(-1) * rest + torch.arange(rest, device=x.device)
    return torch.where(at < x.shape[-1], x[..., at.clamp(max=x.shape[-1] - 1)], 0)


def _times(x: Tensor, matrix: Tensor, transform: Transform) -> Tensor:
    """Rows times a matrix, folded into one product; symbolic rows, which no view takes apart again, as a batch."""
    return x @ (matrix.unsqueeze(0) if isinstance(transform.n, torch.SymInt) else matrix)


def _rows(transform: Transform, length: int) -> int:
    """Rows of the first level that `length` values fill; all of them where comparisons would depend on a symbol."""
    first = transform.levels[0]
    return first.factor if isinstance(transform.n, torch.SymInt) else -(-length // first.rest)


def _analyse(x: Tensor, transform: Transform) -> Tensor:
    """Spectrum (..., f_1 / 2, f_2, ..., 2 f_m') of signals (..., L), real parts before imaginary ones."""
    rows, rest = _rows(transform, x.shape[-1]), transform.levels[0].rest
    x = _as_grid(x, rows, rest)
    matrix = transform.levels[0].matrix[:, :rows]
    for level, following in itertools.pairwise(transform.levels):
        re, im = (matrix @ x).unflatten(-2, (2, level.taken)).unbind(-3)  # (..., f', R)
        x = torch.cat([re * level.cos + im * level.sin, im * level.cos - re * level.sin], dim=-1)
        x, matrix = x.unflatten(-1, (2 * following.factor, following.rest)), following.matrix
    return _times(x.squeeze(-1), matrix.mT, transform)


def _synthesise(spectrum: Tensor, transform: Transform, length: int) -> Tensor:
    """The transposed transform: n / 2 times the first values of the signals (..., length) with this spectrum."""
    first, *others = (level.matrix for level in transform.levels)
    matrices = [first[:, : _rows(transform, length)], *others]
    x = _times(spectrum, matrices[-1], transform)
    for level, matrix in zip(transform.levels[-2::-1], matrices[-2::-1], strict=True):
        re, im = x.chunk(2, dim=-1)  # (..., f', R)
        x = torch.cat([re * level.cos - im * level.sin, im * level.cos + re * level.sin], dim=-2)
        x = (matrix.mT @ x).flatten(-2)
    return x[..., torch.arange(length, device=x.device)] if isinstance(length, torch.SymInt) else x[..., :length]


def _multiply(w: Tensor, kernel: Tensor, transform: Transform) -> Tensor:
    """Convolution of w (B, H, G, L) with a kernel (H, up to n) on the skew circle, its first L values."""
    re, im = _analyse(w, transform).chunk(2, dim=-1)
    scaled = _analyse(kernel * (2 / transform.n), transform).unsqueeze(1)  # (H, 1, f_1 / 2, ..., 2 f_m')
    if transform.band is not None:
        scaled = scaled * torch.cat([transform.band, transform.band], dim=-1)
    kernel_re, kernel_im = scaled.chunk(2, dim=-1)
    product = torch.cat([re * kernel_re - im * kernel_im, re * kernel_im + im * kernel_re], dim=-1)
    return _synthesise(product, transform, w.shape[-1])


def _operands(u: Tensor, h: Tensor, pregate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product pregate * u as (B, H, G, L), and h, both in the dtype to compute in."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, h.dtype), torch.float32)
    w = u.to(dtype) if pregate is None else u.to(dtype) * pregate.to(dtype)
    return w.unflatten(1, (h.shape[0], u.shape[1] // h.shape[0])), h.to(dtype)


def _finish(y: Tensor, w: Tensor, direct: Tensor | None, postgate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The output postgate * (y + direct * w) as (B, C, L) in a dtype, from y and w (B, H, G, L)."""
    if direct is not None:
        y = y + w * direct.to(w.dtype).view(-1, 1, 1)
    y = y.flatten(1, 2)
    if postgate is not None:
        y = y * postgate.to(y.dtype)
    return y.to(dtype)


def refusal(
    u: Tensor,  # noqa: ARG001 (the signature of all backends)
    h: Tensor,  # noqa: ARG001
    direct: Tensor | None,  # noqa: ARG001
    pregate: Tensor | None,  # noqa: ARG001
    postgate: Tensor | None,  # noqa: ARG001
) -> str | None:
    """None: matrices multiply every dtype, on every device, at any length, a symbolic one too."""
    return None


def convolve(u: Tensor, h: Tensor, direct: Tensor | None, pregate: Tensor | None, postgate: Tensor | None) -> Tensor:
    """Causal convolution in plain differentiable torch operations on real tensors.

    Args:
        u: Input (B, C, L).
        h: Filters (H, K), K <= L where L is a number; channel c uses filter c // (C // H).
        direct: Extra tap at lag 0, (H,), or None.
        pregate, postgate: Gates of input and output (B, C, L), or None.

    Returns:
        postgate * (h conv w + direct * w) with w = pregate * u, (B, C, L), dtype of `u`; computed in float32 at least.
        Sums of float32 are as exact as the device's float32 matrix product: `torch.set_float32_matmul_precision`
        other than "highest" lowers it on GPUs.

    A transform takes O(L^(1 + 1/m)) multiplications with m = 1 to 4 levels. Where the length is a symbol the first
    factor grows with it and the others are fixed: O(L^2 / 512), meant for lengths up to some ten thousand.
    """
    with without_autocast(u.device):
        w, taps = _operands(u, h, pregate)
        transform = _transform(w, w.shape[-1] + taps.shape[-1] - 1, 1.0)
        return _finish(_multiply(w, taps, transform), w, direct, postgate, u.dtype)


def bidirectional(
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    keep: float | None = None,
) -> Tensor:
    """Two-sided convolution, optionally with the low frequencies of its kernel alone.

    Args:
        u: Input (B, C, L).
        h: Filters over the current and earlier tokens, (H, K).
        h_reverse: Filters over later tokens, the next one first, (H, K').
        direct: Extra tap at lag 0, (H,), or None; not filtered.
        pregate, postgate: Gates of input and output (B, C, L), or None.
        keep: Share of the spectrum of the kernel to keep, 0 < keep <= 1: frequencies up to keep / 2 cycles a token;
            None for all. Blocks of the last factor without any are neither computed nor multiplied (frequency-sparse
            convolution, Fu et al. 2023, arXiv 2311.05908, section 3.3).

    Returns:
        postgate * (c + direct * w) with w = pregate * u and
        c_t = sum_{s <= t} h_{t-s} w_s + sum_{s > t} h_reverse_{s-t-1} w_s, (B, C, L), dtype of `u`.

    Raises:
        ValueError: `keep` out of range, or given for a symbolic length.

    The digits that an earlier level computes are the low ones of a frequency, needed in every band: in proportion to
    `keep` fall the products of the last level, so long last factors are chosen. At 32,768 tokens half of the spectrum
    takes 0.8 of the multiplications of all of it, an eighth takes 0.55 (counted in a test).

    A causal filter cannot vanish on a band of frequencies (Paley and Wiener 1934, theorem XII): with `keep` below 1
    every output depends on later tokens, whatever `h_reverse` is. This is why only the two-sided form has it; masking
    the spectra of a causal language model lets it see the tokens that it is to predict.
    """
    length = u.shape[-1]
    symbolic = isinstance(length, torch.SymInt)
    if keep is not None and (symbolic or not 0 < keep <= 1):
        raise ValueError(f"keep must lie in (0, 1], and be left out where the length is a symbol, got {keep}")
    with without_autocast(u.device):
        w, taps = _operands(u, h, pregate)
        reverse = h_reverse.to(taps.dtype)
        if symbolic:
            needed = length + taps.shape[1] + reverse.shape[1]
        else:
            taps, reverse = taps[:, :length], reverse[:, : length - 1]
            needed = length + max(taps.shape[1] - 1, reverse.shape[1])
        transform = _transform(w, needed, 1.0 if keep is None else keep)
        # on the skew circle lag -s is the negated lag n - s
        kernel = _as_grid(taps, transform.n, 1) - _as_grid(reverse, transform.n, 1).flip(-2)
        return _finish(_multiply(w, kernel.squeeze(-1), transform), w, direct, postgate, u.dtype)


__all__ = ["bidirectional", "convolve", "refusal"]
