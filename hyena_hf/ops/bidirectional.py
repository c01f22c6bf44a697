# SPDX-License-Identifier: Apache-2.0
"""Convolve long sequences in both directions at once, in O(L log L).

    y = postgate * (c + direct * w),   w = pregate * u
    c_t = sum_{s <= t} h_{t-s} w_s + sum_{s > t} h_reverse_{s-t-1} w_s

The convention of Monarch Mixer (Fu et al. 2023, arXiv 2310.12109): lag 0 belongs to `h` alone, `h_reverse` begins at
the next token. Both filters form one kernel on a circle, so it takes one convolution and not two. Computed in float32
at least, returned in the dtype of `u`.

B batch, C channels, H filters, L length, K taps of `h`, K' of `h_reverse`, n FFT length.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fftconv import check_shapes, check_tensors, conv_gradients, fft_length, transform_dtype


class _CircularConv(torch.autograd.Function):
    """The first L values of kernel conv w on a circle of n, forward and backward in real transforms.

    w (B, H, G, L) and kernel (H, n), same dtype; G channels share a filter.
    """

    @staticmethod
    def forward(ctx, w: Tensor, kernel: Tensor) -> Tensor:
        length, n = w.shape[-1], kernel.shape[-1]
        dtype = transform_dtype(w.dtype, w.device)
        w_spectrum = torch.fft.rfft(w.to(dtype), n=n)
        kernel_spectrum = torch.fft.rfft(kernel.to(dtype), n=n).unsqueeze(-2)
        # spectra of widened signals would take four times the memory of the signals
        kept = (w_spectrum, kernel_spectrum) if dtype == w.dtype else (w, kernel)
        ctx.save_for_backward(*kept)
        ctx.sizes = length, n
        return torch.fft.irfft(w_spectrum * kernel_spectrum, n=n)[..., :length].to(w.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return conv_gradients("bidirectional_fftconv", ctx, grad_outputs[0], *ctx.sizes)


def _circular_kernel(h: Tensor, h_reverse: Tensor, length: int) -> Tensor:
    """Both filters on a circle (H, n): lag t at t, the lag of t tokens ahead at n - t, zeros between."""
    if isinstance(length, torch.SymInt):  # no comparison may depend on it: both filters are made as long as the input
        h, h_reverse = (pad(taps, (0, length))[:, :length] for taps in (h, h_reverse))
        return torch.cat([h, h_reverse.flip(-1)], dim=-1)
    h, h_reverse = h[:, :length], h_reverse[:, : length - 1]
    n = fft_length(length, max(h.shape[1], h_reverse.shape[1] + 1))
    return torch.cat([pad(h, (0, n - h.shape[1] - h_reverse.shape[1])), h_reverse.flip(-1)], dim=-1)


def bidirectional_fftconv(
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor,
    direct: Tensor | None = None,
    *,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Two-sided convolution of every channel with its filters, gates included.

    Args:
        u: Input, real, (B, C, L).
        h: Filters over the current and earlier tokens, real, (H, K); channel c uses filter c // (C // H).
        h_reverse: Filters over later tokens, the next one first, real, (H, K'). K and K' may be below or above L.
        direct: Extra tap at lag 0, (H,).
        pregate: Multiplies the input, (B, C, L).
        postgate: Multiplies the output, (B, C, L).
        backend: `"torch"`, or None to let the function choose.

    Returns:
        (B, C, L), dtype of `u`; formula at the top of this file.

    Raises:
        ValueError: Shapes, devices or the backend do not fit.
        TypeError: A tensor is complex or integer.

    O(B C L log L) time, the same transforms as `causal_fftconv`. Differentiable once in all tensors; a second
    derivative raises. Every output sees the whole row: what is no input must be zero.
    """
    name = "bidirectional_fftconv"
    if backend not in (None, "torch"):
        raise ValueError(f"{name} has no backend {backend!r}; choose 'torch' or leave it out")
    gates = {"pregate": pregate, "postgate": postgate}
    check_tensors(name, u, h=h, h_reverse=h_reverse, direct=direct, **gates)
    check_shapes(u, h, direct, gates)
    if h_reverse.ndim != 2 or h_reverse.shape[0] != h.shape[0] or 0 in h_reverse.shape:
        raise ValueError(f"h_reverse must have shape ({h.shape[0]}, K'), K' at least 1, got {tuple(h_reverse.shape)}")
    dtype = torch.promote_types(
        torch.promote_types(u.dtype, h.dtype), torch.promote_types(h_reverse.dtype, torch.float32)
    )
    batch, channels, length = u.shape
    filters = h.shape[0]

    w = u.to(dtype) if pregate is None else u.to(dtype) * pregate.to(dtype)
    w = w.reshape(batch, filters, channels // filters, length)
    y = _CircularConv.apply(w, _circular_kernel(h.to(dtype), h_reverse.to(dtype), length))
    if direct is not None:
        y = torch.addcmul(y, w, direct.to(dtype).view(filters, 1, 1))
    y = y.reshape(batch, channels, length)
    if postgate is not None:
        y = y * postgate.to(dtype)
    return y.to(u.dtype)


__all__ = ["bidirectional_fftconv"]
