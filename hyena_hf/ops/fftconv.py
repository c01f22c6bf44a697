# SPDX-License-Identifier: Apache-2.0
"""Convolve long sequences causally in O(L log L).

    y = postgate * (h conv w + direct * w),   w = pregate * u,   (h conv w)_t = sum_{s <= t} h_{t-s} w_s

Poli et al. 2023, arXiv 2302.10866, equation 3 and section 3.3: the linear convolution is the circular one of inputs
padded with zeros. Computed in float32 at least (float64 for float64 inputs), returned in the dtype of `u`.

B batch, C channels, H filters, L length, K taps, n FFT length.
"""

from typing import Any

import torch
from torch import Tensor


def _next_even_5_smooth(n: int) -> int:
    best = 1 << (n - 1).bit_length() if n > 1 else 2
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            candidate = three << max((rest - 1).bit_length(), 1)
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def _is_11_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7, 11):
        while n % prime == 0:
            n //= prime
    return n == 1


def fft_length(length: int, taps: int) -> int:
    """Smallest convenient FFT size at which `length` inputs and `taps` taps do not wrap around.

    FFT libraries are several times slower at sizes with large prime factors. Twice the length is kept where it has no
    prime factor above 11, otherwise the next even number without prime factor above 5 is taken.
    """
    needed = length + taps - 1
    if isinstance(needed, torch.SymInt):
        # a symbolic length admits no search over factors, and half of an odd one no proof that shapes agree
        return length + taps if isinstance(taps, torch.SymInt) else 2 * (length + taps)
    if taps == length and _is_11_smooth(2 * length):
        return 2 * length
    return _next_even_5_smooth(max(needed, 2))


@torch.compiler.assume_constant_result  # a compiled graph keeps the setting that it was traced with
def _wants_exact_float32() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def transform_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Real dtype of the transforms of inputs in `dtype` (float32 or float64).

    The rounding error of a float32 transform spreads over all its outputs and depends on its size, so on padding and
    batching; models of order 3 amplify it beyond 1e-5. Float64 transforms, rounded once, leave none of it and slow a
    whole model by a fifth (both in benchmarks/results/batching.md); only CPUs are sure to have them at such a price.
    `torch.set_float32_matmul_precision("high")`, torch's switch for faster float32 arithmetic, turns them off.
    """
    exact = dtype == torch.float32 and device.type == "cpu" and _wants_exact_float32()
    return torch.float64 if exact else dtype


# Block of the exactly causal form: its lags are summed one by one, longer ones by transforms.
_TILE = 64


def _convolve_tiles(w: Tensor, h: Tensor) -> Tensor:
    """The convolution without operations on later inputs: exactly causal, not up to rounding.

    Van der Hoeven's relaxed product (2002, "Relax, but don't be too lazy"), with h known: inputs of one tile meet each
    other in a triangular matrix product; then, for m = 1, 2, 4, ... tiles, the left half of every 2 m tiles acts on
    the right half by one circular convolution. O(L log^2 L). w (B, H, G, L), h (H, K), K <= L.
    """
    *lead, length = w.shape
    lag = torch.arange(_TILE, device=w.device)
    lag = lag[:, None] - lag
    first = torch.nn.functional.pad(h[:, :_TILE], (0, max(_TILE - h.shape[-1], 0)))
    toeplitz = torch.where(lag >= 0, first[:, lag.clamp(min=0)], 0)  # (H, to, from)
    tiles = -(-length // _TILE)
    x = torch.nn.functional.pad(w, (0, tiles * _TILE - length))
    y = (x.reshape(*lead[:-1], -1, _TILE) @ toeplitz.mT).view(x.shape)
    half = _TILE
    while half < x.shape[-1]:
        pairs = -(-(x.shape[-1] - half) // (2 * half))  # those whose right half exists, whole or in part
        room = (0, max(2 * half * pairs - x.shape[-1], 0))
        left = torch.nn.functional.pad(x, room)[..., : 2 * half * pairs].reshape(*lead, pairs, 2, half)[..., 0, :]
        h_spectrum = torch.fft.rfft(h[:, : 2 * half], n=2 * half)[:, None, None]
        right = torch.fft.irfft(torch.fft.rfft(left, n=2 * half) * h_spectrum, n=2 * half)[..., half:]
        later = torch.stack([torch.zeros_like(right), right], dim=-2).view(*lead, -1)[..., : x.shape[-1]]
        y[..., : later.shape[-1]] += later
        half *= 2
    return y[..., :length]


def conv_gradients(name: str, ctx: Any, grad: Tensor, length: int, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a circular convolution of n points by its input (.., length) and by its kernel (H, n).

    Args:
        name: Of the public function, for the refusal of a second derivative.
        ctx: Its context; saved are input and kernel, or their spectra, that of the kernel with an axis for channels.
        grad: Gradient of the output (B, H, G, length).
        length, n: Length of the input, of the transform.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once; call backward or torch.autograd.grad without create_graph=True"
        )
    w_spectrum, h_spectrum = ctx.saved_tensors
    if not w_spectrum.is_complex():
        dtype = transform_dtype(grad.dtype, grad.device)
        w_spectrum = torch.fft.rfft(w_spectrum.to(dtype), n=n)
        h_spectrum = torch.fft.rfft(h_spectrum.to(dtype), n=n).unsqueeze(-2)
    # correlation with a signal is convolution with its reversal: the conjugate spectrum
    spectrum = torch.fft.rfft(grad.to(w_spectrum.real.dtype), n=n)
    grad_w = grad_h = None
    if ctx.needs_input_grad[0]:
        grad_w = torch.fft.irfft(spectrum * h_spectrum.conj(), n=n)[..., :length].to(grad.dtype)
    if ctx.needs_input_grad[1]:
        grad_h = torch.fft.irfft((spectrum * w_spectrum.conj()).sum(dim=(0, 2)), n=n).to(grad.dtype)
    return grad_w, grad_h


class _CausalConv(torch.autograd.Function):
    """h conv w with the backward pass in real transforms; autograd's own would use complex ones of twice the size.

    w (B, H, G, L) and h (H, K), same dtype, K <= L; G channels share a filter.
    """

    @staticmethod
    def forward(ctx, w: Tensor, h: Tensor) -> Tensor:
        length, taps = w.shape[-1], h.shape[-1]
        n = fft_length(length, taps)
        dtype = transform_dtype(w.dtype, w.device)
        ctx.sizes = length, taps, n
        if dtype == torch.float64 and w.dtype == dtype and not isinstance(length, torch.SymInt):
            ctx.save_for_backward(w, h)
            return _convolve_tiles(w, h)
        w_spectrum = torch.fft.rfft(w.to(dtype), n=n)
        h_spectrum = torch.fft.rfft(h.to(dtype), n=n).unsqueeze(-2)
        if dtype == w.dtype:
            ctx.save_for_backward(w_spectrum, h_spectrum)
        else:  # spectra would take four times the memory of the signals
            ctx.save_for_backward(w, h)
        return torch.fft.irfft(w_spectrum * h_spectrum, n=n)[..., :length].to(w.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        length, taps, n = ctx.sizes
        grad_w, grad_h = conv_gradients("causal_fftconv", ctx, grad_outputs[0], length, n)
        return grad_w, None if grad_h is None else grad_h[..., :taps]


def check_tensors(function: str, u: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors that `function` cannot multiply."""
    for name, tensor in {"u": u, **tensors}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{function} takes real floating-point tensors, got {name} of {tensor.dtype}")
        if tensor is not None and tensor.device != u.device:
            raise ValueError(f"{name} lies on {tensor.device} but u on {u.device}; move them to one device")


def check_shapes(u: Tensor, h: Tensor, direct: Tensor | None, gates: dict[str, Tensor | None]) -> None:
    """Refuse shapes that do not fit: u (B, C, L), h (H, K), direct (H,), gates like u."""
    if u.ndim != 3 or h.ndim != 2:
        raise ValueError(f"expected u (B, C, L) and h (H, K), got u {tuple(u.shape)} and h {tuple(h.shape)}")
    if 0 in (*u.shape, *h.shape):  # not min(): torch.export would have to know which size is the smallest
        raise ValueError(f"empty input: u {tuple(u.shape)}, h {tuple(h.shape)}; every size must be at least 1")
    if u.shape[1] % h.shape[0]:
        raise ValueError(
            f"channels of u ({u.shape[1]}) must be a multiple of the filters in h ({h.shape[0]}): channel c uses "
            f"filter c // (C // H)"
        )
    if direct is not None and direct.shape != h.shape[:1]:
        raise ValueError(f"direct must have shape ({h.shape[0]},), one value a filter, got {tuple(direct.shape)}")
    for name, gate in gates.items():
        if gate is not None and gate.shape != u.shape:
            raise ValueError(f"{name} must have the shape of u, {tuple(u.shape)}, got {tuple(gate.shape)}")


def causal_fftconv(
    u: Tensor,
    h: Tensor,
    direct: Tensor | None = None,
    *,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal convolution of every channel with its filter, gates included.

    Args:
        u: Input, real, (B, C, L).
        h: Filters, real, (H, K); channel c uses filter c // (C // H). K may be below or above L.
        direct: Extra tap at lag 0, (H,).
        pregate: Multiplies the input, (B, C, L).
        postgate: Multiplies the output, (B, C, L).
        backend: `"torch"`, or None to let the function choose.

    Returns:
        postgate * (h conv w + direct * w) with w = pregate * u, (B, C, L), dtype of `u`.

    Raises:
        ValueError: Shapes, devices or the backend do not fit.
        TypeError: A tensor is complex or integer.

    O(B C L log L) time. Differentiable once in all tensors; a second derivative raises.
    """
    if backend not in (None, "torch"):
        raise ValueError(f"causal_fftconv has no backend {backend!r}; choose 'torch' or leave it out")
    gates = {"pregate": pregate, "postgate": postgate}
    check_tensors("causal_fftconv", u, h=h, direct=direct, **gates)
    check_shapes(u, h, direct, gates)
    dtype = torch.promote_types(torch.promote_types(u.dtype, h.dtype), torch.float32)
    batch, channels, length = u.shape
    filters, taps = h.shape
    if not isinstance(length, torch.SymInt):  # where the length is a symbol no comparison may depend on it
        taps = min(taps, length)

    w = u.to(dtype) if pregate is None else u.to(dtype) * pregate.to(dtype)
    w = w.reshape(batch, filters, channels // filters, length)
    y = _CausalConv.apply(w, h[:, :taps].to(dtype))
    if direct is not None:
        y = torch.addcmul(y, w, direct.to(dtype).view(filters, 1, 1))
    y = y.reshape(batch, channels, length)
    if postgate is not None:
        y = y * postgate.to(dtype)
    return y.to(u.dtype)
