# SPDX-License-Identifier: Apache-2.0
"""Convolve without a single operation on later inputs: causal to the last bit, in O(L log^2 L).

Van der Hoeven's relaxed product (2002, "Relax, but don't be too lazy"), with the filter known: inputs of one tile meet
each other in a triangular matrix product; then, for m = 1, 2, 4, ... tiles, the left half of every 2 m tiles acts on
the right half by one circular convolution.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


# Lags below this are summed one by one, longer ones by transforms.
_TILE = 64


def convolve(w: Tensor, h: Tensor) -> Tensor:
    """Convolve w with h.

    Args:
        w: (B, H, G, L), contiguous; G channels share a filter.
        h: (H, K), K <= L, the dtype of `w`.

    Returns:
        (B, H, G, L).
    """
    *lead, length = w.shape
    lag = torch.arange(_TILE, device=w.device)
    lag = lag[:, None] - lag
    first = pad(h[:, :_TILE], (0, max(_TILE - h.shape[-1], 0)))
    toeplitz = torch.where(lag >= 0, first[:, lag.clamp(min=0)], 0)  # (H, to, from)
    tiles = -(-length // _TILE)
    x = pad(w, (0, tiles * _TILE - length))
    y = (x.reshape(*lead[:-1], -1, _TILE) @ toeplitz.mT).view(x.shape)
    half = _TILE
    while half < x.shape[-1]:
        pairs = -(-(x.shape[-1] - half) // (2 * half))  # those whose right half exists, whole or in part
        room = (0, max(2 * half * pairs - x.shape[-1], 0))
        left = pad(x, room)[..., : 2 * half * pairs].reshape(*lead, pairs, 2, half)[..., 0, :]
        h_spectrum = torch.fft.rfft(h[:, : 2 * half], n=2 * half)[:, None, None]
        right = torch.fft.irfft(torch.fft.rfft(left, n=2 * half) * h_spectrum, n=2 * half)[..., half:]
        later = torch.stack([torch.zeros_like(right), right], dim=-2).view(*lead, -1)[..., : x.shape[-1]]
        y[..., : later.shape[-1]] += later
        half *= 2
    return y[..., :length]


__all__ = ["convolve"]
