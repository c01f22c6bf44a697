# SPDX-License-Identifier: Apache-2.0
"""Convolve long sequences in both directions at once, in O(L log L).

    y = postgate * (c + direct * w),   w = pregate * u
    c_t = sum_{s <= t} h_{t-s} w_s + sum_{s > t} h_reverse_{s-t-1} w_s

The convention of Monarch Mixer (Fu et al. 2023, arXiv 2310.12109): lag 0 belongs to `h` alone, `h_reverse` begins at
the next token. Both filters form one kernel on a circle, so it takes one convolution and not two. Computed in float32
at least, returned in the dtype of `u`; by which backend, `hyena_hf.ops.engine` says.

B batch, C channels, H filters, L length, K taps of `h`, K' of `h_reverse`, n FFT length.
"""

from torch import Tensor

from .engine import Conv, convolve, requested_backend
from .fftconv import as_wide, check_shapes, check_tensors, refuse_non_finite


def bidirectional_fftconv(  # noqa: PLR0913 (that of causal_fftconv and a filter)
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor,
    direct: Tensor | None = None,
    *,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    backend: str | None = None,
    exact: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Two-sided convolution of every channel with its filters, gates included.

    Args:
        u: Input, real, (B, C, L).
        h: Filters over the current and earlier tokens, real, (H, K); channel c uses filter c // (C // H).
        h_reverse: Filters over later tokens, the next one first, real, (H, K'). K and K' may be below or above L.
        direct: Extra tap at lag 0, (H,).
        pregate: Multiplies the input, (B, C, L).
        postgate: Multiplies the output, (B, C, L).
        backend: `"torch"`, `"blocked"`, `"matrix"`, or None for the fastest that serves.
        exact, check_finite: As in `causal_fftconv`.

    Returns:
        (B, C, L), dtype of `u`; formula at the top of this file.

    Raises:
        ValueError: Shapes, devices or the backend do not fit.
        TypeError: A tensor is complex or integer.

    O(B C L log L) time, the same transforms as `causal_fftconv`. Differentiable once in all tensors; a second
    derivative raises. Every output sees the whole row: what is no input must be zero.
    """
    name = "bidirectional_fftconv"
    gates = {"pregate": pregate, "postgate": postgate}
    required = "h", "h_reverse"
    check_tensors(
        name, u, required=required, h=h, h_reverse=h_reverse, direct=direct, pregate=pregate, postgate=postgate
    )
    check_shapes(u, h, direct, gates)
    if h_reverse.ndim != 2 or h_reverse.shape[0] != h.shape[0] or 0 in h_reverse.shape:
        raise ValueError(f"h_reverse must have shape ({h.shape[0]}, K'), K' at least 1, got {tuple(h_reverse.shape)}")
    backend = requested_backend(name, backend, u)
    h, h_reverse = as_wide(h, u.dtype), as_wide(h_reverse, u.dtype)
    direct = None if direct is None else as_wide(direct, u.dtype)
    y = convolve(Conv(u, h, h_reverse, direct, pregate, postgate, exact), backend)
    if check_finite:
        refuse_non_finite(name, y, u=u, h=h, h_reverse=h_reverse, direct=direct, **gates)
    return y


__all__ = ["bidirectional_fftconv"]
