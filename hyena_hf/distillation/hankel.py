# SPDX-License-Identifier: Apache-2.0
"""How many states a filter needs: singular values of its Hankel matrix.

    H = [h_1 h_2 h_3 ...; h_2 h_3 ...; h_3 ...; ...]

A filter of d states gives a matrix of rank d (Kronecker 1881). No filter of d states is closer to h in the Hankel norm
than sigma_{d+1} (Adamyan, Arov and Krein 1971), and the sum of the other sigma_i^2 bounds the l2 error from below
(Eckart and Young 1936), see `certificates.py`. LaughingHyena (Massaroli et al. 2023, arXiv 2310.18780, section 3.3)
chooses orders by them.

Matrices up to 256 x 256 are decomposed as they are. Larger ones are never formed: products with H are convolutions,
and the largest singular values come from a block Krylov space (Musco and Musco 2015, arXiv 1504.05477, Algorithm 2),
O(k M log M) time and O(k M) memory for k values of M taps. Values from there lie below the true ones.

C channels, n rows of H, k values.
"""

from typing import NamedTuple

import torch
from torch import Tensor


_DENSE = 256  # rows up to which matrices are decomposed exactly
_BLOCKS = 4  # of the Krylov space
_SPARE = 6  # columns of a block beyond what half of the values asked for would need


class HankelFactors(NamedTuple):
    """The dominant part Q diag(lambda) Q^T of real symmetric Hankel matrices.

    Attributes:
        values: Eigenvalues by falling modulus, (C, k); their moduli are the singular values.
        vectors: Q, (C, n, k), orthonormal.
        residual: Norm of (H - Q Q^T H) q for each column q, (C, k): 0 where the matrix was decomposed exactly.
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor


def _dense(taps: Tensor, size: int) -> Tensor:
    """(C, 2 n - 1) -> (C, n, n)."""
    return taps.unfold(1, size, 1)[:, :size].contiguous()


def hankel_columns(taps: Tensor, columns: Tensor) -> Tensor:
    """H times columns, for taps (C, 2 n - 1) and columns (C, k, n)."""
    return _product(torch.fft.rfft(taps, n=2 * columns.shape[-1]), columns)


def _product(spectrum: Tensor, columns: Tensor) -> Tensor:
    """H times columns (C, k, n), given the transform of taps in 2 n numbers."""
    size = columns.shape[-1]
    # y_i = sum_j h_{i+j} v_j is a convolution with v backwards, read from lag n - 1 on
    turned = torch.fft.rfft(columns.flip(-1), n=2 * size)
    return torch.fft.irfft(turned * spectrum.unsqueeze(1), n=2 * size)[..., size - 1 : 2 * size - 1]


def orthonormal_rows(columns: Tensor) -> Tensor:
    """Rows of (C, k, n) made orthonormal."""
    return torch.linalg.qr(columns.mT).Q.mT


def hankel_factors(taps: Tensor, size: int, count: int) -> HankelFactors:
    """The `count` eigenpairs of largest modulus of n x n Hankel matrices.

    Args:
        taps: The first 2 n - 1 taps behind lag 0, float64 (C, 2 n - 1).
        size: n.
        count: k, at most n.
    """
    width = count // 2 + _SPARE
    if size <= max(_DENSE, _BLOCKS * width):
        values, vectors = torch.linalg.eigh(_dense(taps, size))
        order = values.abs().argsort(dim=1, descending=True)[:, :count]
        vectors = vectors.gather(2, order.unsqueeze(1).expand(-1, size, -1))
        return HankelFactors(values.gather(1, order), vectors, torch.zeros_like(order, dtype=taps.dtype))
    spectrum = torch.fft.rfft(taps, n=2 * size)
    start = torch.randn(width, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = start.to(taps.device).expand(len(taps), -1, -1)
    space = []
    for _ in range(_BLOCKS):
        block = orthonormal_rows(_product(spectrum, block))
        space.append(block)
    basis = orthonormal_rows(torch.cat(space, dim=1))
    image = _product(spectrum, basis)
    values, turns = torch.linalg.eigh(basis @ image.mT)
    order = values.abs().argsort(dim=1, descending=True)[:, :count]
    turns = turns.gather(2, order.unsqueeze(1).expand(-1, turns.shape[1], -1)).mT
    values, vectors = values.gather(1, order), turns @ basis
    residual = (turns @ image - values.unsqueeze(-1) * vectors).norm(dim=-1)
    return HankelFactors(values, vectors.mT, residual)


def window_size(length: int) -> int:
    """Rows of the largest square Hankel matrix of taps 1, ..., length - 1."""
    return length // 2


def hankel_singular_values(h: Tensor, count: int | None = None) -> Tensor:
    """The largest Hankel singular values of filters, without the tap at lag 0.

    The matrix is square and holds taps 1 to 2 n - 1, n = L // 2. Up to L = 513 values are exact; beyond, they are from
    below, to 1e-6 of the largest one for spectra that fall.

    Args:
        h: Taps (C, L), L at least 2.
        count: How many; all of them if None, which takes a matrix n x n for each channel.

    Returns:
        (C, count) float64, falling.

    Raises:
        ValueError: `h` is not (C, L) or has no lag but 0, or `count` is not between 1 and n.
    """
    if h.ndim != 2 or h.shape[1] < 2:
        raise ValueError(f"h must be taps (channels, length) of at least 2 lags, got {tuple(h.shape)}")
    size = window_size(h.shape[1])
    if count is not None and not 1 <= count <= size:
        raise ValueError(f"count ({count}) must be from 1 to {size}, the rows of a Hankel matrix of {h.shape[1]} taps")
    taps = h[:, 1 : 2 * size].double()
    if count is None:
        return torch.cat([torch.linalg.eigvalsh(_dense(one, size)).abs() for one in taps.split(1)]).sort(
            dim=1, descending=True
        )[0]
    each = max(1, 2**21 // (size * (count + _SPARE)))
    return torch.cat([hankel_factors(some, size, count).values.abs() for some in taps.split(each)])


def order_for_tolerance(sigma: Tensor, tolerance: float) -> Tensor:
    """The smallest order d with sigma_{d+1} <= tolerance sigma_1: no smaller one can be that close in Hankel norm.

    Args:
        sigma: Singular values (..., k), falling.
        tolerance: Relative to the largest one.

    Returns:
        (...,) integers; k where all values are above, and more may be needed.

    Raises:
        ValueError: `tolerance` is negative or NaN.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance ({tolerance}) must be 0 or more, a share of the largest singular value")
    return (sigma > tolerance * sigma[..., :1]).sum(dim=-1)


__all__ = [
    "HankelFactors",
    "hankel_columns",
    "hankel_factors",
    "hankel_singular_values",
    "order_for_tolerance",
    "orthonormal_rows",
    "window_size",
]
