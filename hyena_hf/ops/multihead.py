# SPDX-License-Identifier: Apache-2.0
"""MultiHyena: one long filter a head, on outer products of keys and values.

For head h with query q, key k and value v of width P (Massaroli et al. 2023, arXiv 2310.18780, section 4):

    Z_t = sum_{s <= t} h_{t-s} k_s v_s^T + direct k_t v_t^T,     y_t = Z_t^T q_t

which equals attention without a softmax whose weights are the dot products times the filter:

    y_t = sum_{s <= t} h_{t-s} (q_t . k_s) v_s + direct (q_t . k_t) v_t

The first form costs P FFTs of width D, the second O(L^2) products and no FFT: it wins for few queries. P = 1 is plain
order-2 Hyena.

B batch, H heads, P head width, L new tokens, T tokens before them, K taps.
"""

import torch
from torch import Tensor

from .fftconv import causal_fftconv
from .precision import is_short


# Queries up to which the masked matrix product is taken: 4 T D multiplications a token against about 15 P log2(2 L) D.
_MATMUL_LENGTH = 64


def _by_products(q: Tensor, k: Tensor, v: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    """Second form. q (B, H, L, P); k, v (B, H, T + L, P); h (H, >= T + L) -> (B, H, L, P)."""
    new, total = q.shape[2], k.shape[2]
    position = torch.arange(total, device=q.device)
    lag = position[total - new :, None] - position  # (L, T + L)
    weights = torch.where(lag >= 0, h[:, lag.clamp(min=0)], 0)
    weights = weights + torch.where(lag == 0, direct[:, None, None], 0)
    return (q @ k.transpose(-1, -2) * weights) @ v


def _by_convolutions(q: Tensor, k: Tensor, v: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    """First form, one key component at a time so that Z is never held whole. Shapes as above."""
    batch, heads, total, width = k.shape
    new = q.shape[2]
    values = v.transpose(-1, -2)  # (B, H, P, T + L)
    y = torch.zeros_like(values[..., total - new :])
    for p in range(width):
        z = (values * k[..., p].unsqueeze(2)).reshape(batch, heads * width, total)
        z = causal_fftconv(z, h, direct, exact=is_short(total), check_finite=False).view(batch, heads, width, total)
        y = y + z[..., total - new :] * q[..., p].unsqueeze(2)
    return y.transpose(-1, -2)


def multihead_conv(q: Tensor, k: Tensor, v: Tensor, h: Tensor, direct: Tensor) -> Tensor:
    """Filtered outer products of all tokens up to each query, contracted with the query.

    Args:
        q: Queries of the last L tokens (B, D, L), channels head-major: channel c belongs to head c // P.
        k: Keys of all T + L tokens (B, D, T + L).
        v: Values of all T + L tokens (B, D, T + L).
        h: Filters (H, K); taps from K on are zero.
        direct: Extra tap at lag 0, (H,).

    Returns:
        (B, D, L), dtype of `q`; computed in float32 at least.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] < q.shape[-1]:
        raise ValueError(
            f"expected q (B, D, L) and k, v (B, D, T + L), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if h.ndim != 2 or q.shape[1] % h.shape[0] or direct.shape != h.shape[:1]:
        raise ValueError(
            f"expected h (H, K) and direct (H,) with H dividing the {q.shape[1]} channels, got {tuple(h.shape)} and "
            f"{tuple(direct.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(q.dtype, h.dtype), torch.float32)
    batch, channels, new = q.shape
    heads, total = h.shape[0], k.shape[-1]

    def split(x: Tensor) -> Tensor:
        return x.to(dtype).view(batch, heads, channels // heads, x.shape[-1]).transpose(-1, -2)

    h = h.to(dtype)
    if isinstance(total, torch.SymInt):  # an exported graph: no choice may depend on the length
        h, form = torch.nn.functional.pad(h, (0, total)), _by_convolutions
    else:
        h = torch.nn.functional.pad(h, (0, max(total - h.shape[1], 0)))
        form = _by_products if new <= _MATMUL_LENGTH else _by_convolutions
    y = form(split(q), split(k), split(v), h[:, :total], direct.to(dtype))
    return y.transpose(-1, -2).reshape(batch, channels, new).to(q.dtype)
