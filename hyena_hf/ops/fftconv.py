# SPDX-License-Identifier: Apache-2.0
"""Convolve long sequences causally in O(L log L).

    y = postgate * (h conv w + direct * w),   w = pregate * u,   (h conv w)_t = sum_{s <= t} h_{t-s} w_s

Poli et al. 2023, arXiv 2302.10866, equation 3 and section 3.3. Computed in float32 at least (float64 for float64
inputs), returned in the dtype of `u`; by which backend, `hyena_hf.ops.engine` says.

B batch, C channels, H filters, L length, K taps, n FFT length.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends.fft import fft_length
from .engine import Conv, convolve, requested_backend


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FilterSpectrum:
    """Filters that have been transformed already, for use in place of `h`; made by `filter_spectrum`.

    Whoever holds it must let it go when the filters change.

    Attributes:
        h: The taps (H, K).
        direct: Extra tap at lag 0 (H,), or None.
        spectrum: Transform of both (H, F, 2), real and imaginary parts.
        length: Longest input that it serves.
        exact: Whether it is for `exact` convolutions.
    """

    h: Tensor
    direct: Tensor | None
    spectrum: Tensor
    length: int
    exact: bool

    def spectrum_for(self, function: str, u: Tensor, direct: Tensor | None, *, exact: bool) -> Tensor:
        """The spectrum, after refusing an input or options that it is not for."""
        check_real(function, u)
        if direct is not None:
            raise ValueError(f"{function} got direct beside a FilterSpectrum; give it to filter_spectrum")
        if exact != self.exact:
            raise ValueError(f"exact is {exact}, but the FilterSpectrum was made with exact={self.exact}")
        if u.ndim == 3 and u.shape[-1] > self.length:
            raise ValueError(
                f"{function}: the FilterSpectrum serves inputs of up to {self.length} tokens, but there are "
                f"{u.shape[-1]}; make a longer one"
            )
        if self.h.dtype != torch.promote_types(u.dtype, torch.float32):
            raise TypeError(
                f"{function}: the FilterSpectrum was made of {self.h.dtype} for inputs of {u.dtype}; make it of "
                f"filters in {torch.promote_types(u.dtype, torch.float32)}"
            )
        return self.spectrum

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.h, self.direct, self.spectrum) if x is not None)


@torch.no_grad()
def filter_spectrum(h: Tensor, length: int, direct: Tensor | None = None, *, exact: bool = False) -> FilterSpectrum:
    """Transform filters once for many convolutions by torch's FFT.

    Args:
        h: Filters (H, K), real.
        length: Longest input to come.
        direct: Extra tap at lag 0 (H,).
        exact: As in `causal_fftconv`.

    Returns:
        What `causal_fftconv` takes in place of `h`. Gradients do not flow to the filters.

    Raises:
        ValueError, TypeError: As `causal_fftconv`.
    """
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"length ({length}) must be a whole number, at least 1")
    check_real("filter_spectrum", h, name="h", direct=direct)
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(f"filter_spectrum: expected h (H, K), every size at least 1, got {tuple(h.shape)}")
    check_shapes(h.unsqueeze(0), h, direct, {})
    h = as_wide(h, h.dtype)[:, :length]
    direct = None if direct is None else as_wide(direct, h.dtype)
    conv = Conv(h.unsqueeze(0), h, None, direct, None, None, exact)
    work = conv.work(fft_length(length, h.shape[1]))
    spectrum = torch.view_as_real(conv.kernel().transform(slice(None), work).squeeze(1))
    return FilterSpectrum(h.detach(), None if direct is None else direct.detach(), spectrum, length, exact)


def check_real(
    function: str, u: Tensor, *, name: str = "u", required: tuple[str, ...] = (), **tensors: Tensor | None
) -> None:
    """Refuse what is no dense real tensor of 16, 32 or 64 bits, or lies on another device than u.

    Args:
        function: For messages.
        u: Tensor that sets the device.
        name: What the function calls it.
        required: Names of others that may not be None.
        tensors: The others.
    """
    for key, tensor in {name: u, **tensors}.items():
        if tensor is None and key not in (name, *required):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function} takes tensors, got {key} of type {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise TypeError(
                f"{function} takes dense real tensors of 16, 32 or 64 bits, got {key} of {tensor.dtype} in layout "
                f"{tensor.layout}; convert it"
            )
        if tensor.device != u.device:
            raise ValueError(f"{key} lies on {tensor.device} but {name} on {u.device}; move them to one device")


def check_tensors(
    function: str, u: Tensor, *, name: str = "u", required: tuple[str, ...] = (), **tensors: Tensor | None
) -> None:
    """Refuse tensors that `function` cannot multiply with u; arguments as in `check_real`."""
    check_real(function, u, name=name, required=required, **tensors)
    for key, tensor in tensors.items():
        exact = u.dtype if key.endswith("gate") else torch.promote_types(u.dtype, torch.float32)
        if tensor is None:
            continue
        if tensor.dtype != exact if key.endswith("gate") else not _holds(exact, tensor.dtype):
            kind = f"gates need the dtype of {name}" if key.endswith("gate") else f"it needs one that {exact} can hold"
            raise TypeError(f"{function}: {key} is {tensor.dtype} but {name} {u.dtype}; {kind}: convert one of them")


def _holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a conversion to `wide` loses nothing."""
    return torch.promote_types(wide, dtype) == wide


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


def as_wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the sums for inputs of a dtype, float32 at least."""
    return x.to(torch.promote_types(dtype, torch.float32))


def refuse_non_finite(function: str, y: Tensor, **tensors: Tensor | None) -> None:
    """Refuse what is no number: one such value spreads over a whole row, earlier outputs included.

    On accelerators and in compiled graphs nothing is looked at: it would wait for the device.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor or y.device.type != "cpu":
        return
    if math.isfinite(y.detach().sum().item()):
        return
    for name, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            where = tuple((~tensor.isfinite()).nonzero()[0].tolist())
            raise ValueError(
                f"{function}: {name} holds {tensor[where].item()} at {where}, which would spread over the whole row; "
                f"mask or repair it first"
            )


def causal_fftconv(
    u: Tensor,
    h: Tensor | FilterSpectrum,
    direct: Tensor | None = None,
    *,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    backend: str | None = None,
    exact: bool = False,
    check_finite: bool = True,
) -> Tensor:
    """Causal convolution of every channel with its filter, gates included.

    Args:
        u: Input, real, (B, C, L), in any memory layout.
        h: Filters, real, (H, K); channel c uses filter c // (C // H). K may be below or above L. The dtype of `u`, or
            float32 where that is half. Or what `filter_spectrum` returned.
        direct: Extra tap at lag 0, (H,); with a `FilterSpectrum` given there.
        pregate: Multiplies the input, (B, C, L).
        postgate: Multiplies the output, (B, C, L).
        backend: One of `hyena_hf.ops.engine.BACKENDS`, or None for the fastest that serves.
        exact: Sum float32 convolutions on a CPU in float64 and round once, unless
            `torch.set_float32_matmul_precision("high")` says otherwise. Outputs are then the same bits whatever stands
            behind them; what it costs a model is in benchmarks/results/batching.md.
        check_finite: Refuse values that are not finite, on CPUs outside compiled graphs; models do not, so that one
            that diverges gives losses that are no numbers, as others do.

    Returns:
        postgate * (h conv w + direct * w) with w = pregate * u, (B, C, L), dtype of `u`.

    Raises:
        ValueError: Shapes or devices do not fit, the backend does not exist or cannot serve, or a value is not finite.
        TypeError: A tensor is complex or integer, or dtypes do not fit.

    O(B C L log L) time. Differentiable once in all tensors; a second derivative raises (but by `matrix`).
    """
    name = "causal_fftconv"
    spectrum = None
    if isinstance(h, FilterSpectrum):
        spectrum = h.spectrum_for(name, u, direct, exact=exact)
        h, direct = h.h, h.direct
    gates = {"pregate": pregate, "postgate": postgate}
    check_tensors(name, u, required=("h",), h=h, direct=direct, pregate=pregate, postgate=postgate)
    check_shapes(u, h, direct, gates)
    backend = requested_backend(name, backend, u)
    h, direct = as_wide(h, u.dtype), None if direct is None else as_wide(direct, u.dtype)
    y = convolve(Conv(u, h, None, direct, pregate, postgate, exact), backend, spectrum)
    if check_finite:
        refuse_non_finite(name, y, u=u, h=h, direct=direct, **gates)
    return y


__all__ = [
    "FilterSpectrum",
    "as_wide",
    "causal_fftconv",
    "check_real",
    "check_shapes",
    "check_tensors",
    "filter_spectrum",
    "refuse_non_finite",
]
