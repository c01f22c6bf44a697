# SPDX-License-Identifier: Apache-2.0
"""An order-2 Hyena operator between its two projections, in one pass over blocks of channels.

    x_0, x_1, v = short_conv(p);   y = x_0 * (h conv w + direct * w),   w = x_1 * v

Poli et al. 2023, arXiv 2302.10866, definition 3.1. Written as separate operations the short convolution and the gates
cost more than the long convolution: they read and write every number of p several times from memory. Here a block of
channels stays in the cache from p to y: the short convolution is a sum of shifted taps, the first gate is multiplied
into the zero-padded buffer of the FFT, the second one on the way out. Backward keeps p and the convolution's output
alone and computes gates and spectra again.

Measured against the published operator in benchmarks/results/mixer.md.

B batch, D channels, L length, K taps of the short convolution, n FFT length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from .backends.fft import Kernel, Work, block_floats, fft_length
from .engine import note_one_pass
from .fftconv import FilterSpectrum, check_tensors, refuse_non_finite
from .precision import transform_dtype
from .short_conv import add_taps, add_taps_transposed, tap_gradients


def _work(p: Tensor, taps: int, spectrum: Tensor | None) -> Work:
    n = fft_length(p.shape[-1], min(taps, p.shape[-1])) if spectrum is None else 2 * spectrum.shape[1] - 2
    return Work(n, transform_dtype(p.dtype, p.device, exact=False), block_floats(n))


def _kernel(p: Tensor, h: Tensor, direct: Tensor, spectrum: Tensor | None) -> Kernel:
    values = None if spectrum is None else torch.view_as_complex(spectrum)
    return Kernel(h[:, : p.shape[-1]], direct=direct, spectrum=values)


def _streams(x: Tensor) -> Tensor:
    """(.., 3 D, ..) as (3, D, ..); the first axis of x (B, 3 D, L) or parameters (3 D, ..)."""
    return x.unflatten(0, (3, -1))


def _in_rows(x: Tensor) -> Tensor:
    """Channels (m, L) with time contiguous; a dense copy first, since torch transposes nothing else tile by tile."""
    return x if x.stride(-1) == 1 else x.t().contiguous().t().contiguous()


def _rows(channels: int, work: Work) -> int:
    return min(max(work.floats // work.n, 2), channels)


def _compute(
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    direct: Tensor,
    spectrum: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Output y and what backward wants again, h conv w + direct * w, or an empty tensor."""
    batch, length, channels = p.shape[0], p.shape[-1], h.shape[0]
    work, kernel = _work(p, h.shape[1], spectrum), _kernel(p, h, direct, spectrum)
    taps, shift = _streams(weight), None if bias is None else _streams(bias)
    y = p.new_empty(batch, channels, length)
    kept = torch.empty_like(y) if keep else p.new_empty(0)
    rows = _rows(channels, work)
    buffer, spare = p.new_zeros(rows, work.n, dtype=work.dtype), p.new_empty(rows, length)
    for start in range(0, channels, rows):
        part = slice(start, min(start + rows, channels))
        room, gate = buffer[: part.stop - start], spare[: part.stop - start]
        short = [(taps[i, part], None if shift is None else shift[i, part]) for i in range(3)]
        kernel_spectrum = kernel.transform(part, work).squeeze(1)
        for b in range(batch):
            x = _streams(p[b])[:, part]
            w = add_taps(room[:, :length], x[1], *short[1])
            w.mul_(add_taps(gate, x[2], *short[2]))
            z = torch.fft.irfft(torch.fft.rfft(room).mul_(kernel_spectrum), n=work.n)[:, :length]
            kernel.refine(z.unsqueeze(1), room.unsqueeze(1), part)
            torch.mul(add_taps(gate, x[0], *short[0]), z, out=y[b, part])
            if keep:
                kept[b, part] = z
    return y, kept


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _gradients(  # noqa: PLR0913 (an operator of torch takes tensors, no objects)
    grad: Tensor,
    kept: Tensor,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    direct: Tensor,
    spectrum: Tensor | None,
    needs_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of p, weight, bias, h and direct; empty ones of an absent bias and of filters that need none."""
    batch, length, channels = p.shape[0], p.shape[-1], h.shape[0]
    work, kernel = _work(p, h.shape[1], spectrum), _kernel(p, h, direct, spectrum)
    taps, shift = _streams(weight), None if bias is None else _streams(bias)
    grad_p, grad_weight = torch.empty_like(p, memory_format=torch.contiguous_format), _zeros(weight)
    grad_bias = p.new_empty(0) if bias is None else _zeros(bias)
    grad_h = _zeros(h) if needs_filter else h.new_empty(0)
    grad_direct = _zeros(direct) if needs_filter else direct.new_empty(0)
    rows = _rows(channels, work)
    inputs, later = (p.new_zeros(rows, work.n, dtype=work.dtype) for _ in range(2))
    spare = p.new_empty(4, rows, length)
    for start in range(0, channels, rows):
        part = slice(start, min(start + rows, channels))
        m = part.stop - start
        room, w, dz = inputs[:m], inputs[:m, :length], later[:m, :length]
        streams, found = spare[:3, :m], spare[1:, :m]
        gate, key, value, last = spare[:, :m]
        kernel_spectrum = kernel.transform(part, work).squeeze(1)
        total = None
        for b in range(batch):
            x, g, into = _streams(p[b])[:, part], _in_rows(grad[b, part]), _streams(grad_p[b])[:, part]
            # all streams in one call: here calls of a few microseconds add up
            add_taps(streams, x, taps[:, part], None if shift is None else shift[:, part])
            torch.mul(g, gate, out=dz)
            # w and the filter are both correlated with dz: this one conjugate serves them, results come out conjugate
            spectrum_dz = torch.fft.rfft(later[:m]).conj_physical_()
            if needs_filter:
                torch.mul(key, value, out=w)
                grad_direct[part] += torch.mul(w, dz, out=last).sum(-1)
                product = torch.fft.rfft(room).mul_(spectrum_dz)
                total = product if total is None else total.add_(product)
            dw = torch.fft.irfft(spectrum_dz.mul_(kernel_spectrum).conj_physical_(), n=work.n)[:, :length]
            # gradients behind the short convolution in the order of its streams, one place further on than these
            torch.mul(key, dw, out=last)
            value.mul_(dw)
            torch.mul(g, kept[b, part], out=key)
            # `into` is room for products until its own values come
            tap_gradients(_streams(grad_weight)[:, part], found, x, products=into)
            if bias is not None:
                _streams(grad_bias)[:, part] += found.sum(-1)
            add_taps_transposed(into, found, taps[:, part])
        if total is not None:
            grad_h[part, :length] = torch.fft.irfft(total.conj_physical_(), n=work.n)[:, : min(length, h.shape[1])]
    return grad_p, grad_weight, grad_bias, grad_h, grad_direct


class _HyenaConv(torch.autograd.Function):
    """The operator outside compiled graphs, at less overhead than a custom one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        p, weight, bias, h, direct, spectrum = inputs
        y, kept = _compute(p, weight, bias, h, direct, spectrum, True)
        ctx.save_for_backward(kept, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_outputs[0], _gradients)


@library.custom_op("hyena_hf::hyena_conv", mutates_args=())
def _in_graphs(
    p: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, direct: Tensor, spectrum: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    return _compute(p, weight, bias, h, direct, spectrum, keep)


@_in_graphs.register_fake
def _(p, weight, bias, h, direct, spectrum, keep):  # noqa: ARG001 (one signature)
    y = p.new_empty(p.shape[0], h.shape[0], p.shape[-1])
    return y, torch.empty_like(y) if keep else p.new_empty(0)


@library.custom_op("hyena_hf::hyena_conv_backward", mutates_args=())
def _gradients_in_graphs(  # noqa: PLR0913 (an operator of torch takes tensors, no objects)
    grad: Tensor,
    kept: Tensor,
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    direct: Tensor,
    spectrum: Tensor | None,
    needs_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(grad, kept, p, weight, bias, h, direct, spectrum, needs_filter)


@_gradients_in_graphs.register_fake
def _(grad, kept, p, weight, bias, h, direct, spectrum, needs_filter):  # noqa: ARG001, PLR0913 (one signature)
    def like(x: Tensor | None, need: bool = True) -> Tensor:
        return p.new_empty(x.shape, dtype=x.dtype) if x is not None and need else p.new_empty(0)

    return like(p), like(weight), like(bias), like(h, needs_filter), like(direct, needs_filter)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:6])


def _backward(ctx: Any, grad: Tensor | None, gradients: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """Gradients of the six inputs of both operators."""
    if grad is None:
        return (None,) * 6
    if torch.is_grad_enabled():
        raise RuntimeError(
            "hyena_conv is differentiable once; call backward or torch.autograd.grad without create_graph=True"
        )
    needs_bias, needs_h, needs_direct = ctx.needs_input_grad[2:5]
    grads = gradients(grad, *ctx.saved_tensors, needs_h or needs_direct)
    needs = True, True, needs_bias, needs_h, needs_direct
    return *(found if need else None for found, need in zip(grads, needs, strict=True)), None


def _backward_in_graphs(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return *_backward(ctx, grad, _gradients_in_graphs), None


_in_graphs.register_autograd(_backward_in_graphs, setup_context=_setup_context)


def _check(p: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, direct: Tensor) -> None:
    """Refuse tensors that do not fit."""
    for name, tensor in {"weight": weight, "bias": bias, "h": h, "direct": direct}.items():
        if tensor is not None and tensor.dtype != p.dtype:
            raise TypeError(f"hyena_conv computes in one dtype, but p is {p.dtype} and {name} {tensor.dtype}")
    if p.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hyena_conv takes float32 or float64, got {p.dtype}; convert p")
    if p.ndim != 3 or h.ndim != 2 or p.shape[1] != 3 * h.shape[0] or 0 in (*p.shape, *h.shape):
        raise ValueError(f"expected p (B, 3 D, L) and h (D, K), got {tuple(p.shape)} and {tuple(h.shape)}")
    if (
        weight.ndim != 2
        or weight.shape[0] != p.shape[1]
        or not weight.shape[1]
        or (bias is not None and bias.shape != p.shape[1:2])
    ):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"expected weight (3 D, K) and bias (3 D,), got {tuple(weight.shape)} and {shape}")
    if direct.shape != h.shape[:1]:
        raise ValueError(f"direct must have shape ({h.shape[0]},), one value a filter, got {tuple(direct.shape)}")


def hyena_conv(
    p: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor | FilterSpectrum,
    direct: Tensor | None = None,
    *,
    check_finite: bool = True,
) -> Tensor:
    """Short convolution, gates and long convolution of an order-2 Hyena operator.

    Args:
        p: Projections x_0, x_1, v below each other, float32 or float64, (B, 3 D, L).
        weight: Taps of the short convolution, the last one for the current token, (3 D, K).
        bias: (3 D,) or None.
        h: Long filters (D, taps), or what `filter_spectrum` made of them.
        direct: Extra tap at lag 0 (D,); with a `FilterSpectrum` given there.
        check_finite: As in `causal_fftconv`.

    Returns:
        (B, D, L), contiguous.

    Raises:
        ValueError, TypeError: Shapes, devices or dtypes do not fit, or `use_backend` asks for another way.

    Fastest on CPUs. Differentiable once in all tensors but a `FilterSpectrum`. Causal up to rounding.
    """
    spectrum = None
    if isinstance(h, FilterSpectrum):
        spectrum = h.spectrum_for("hyena_conv", p, direct, exact=False)
        h, direct = h.h, h.direct
    check_tensors("hyena_conv", p, name="p", required=("weight", "h"), weight=weight, bias=bias, h=h, direct=direct)
    if direct is None:
        direct = h.new_zeros(h.shape[:1])
    _check(p, weight, bias, h, direct)
    note_one_pass(p, h)
    inputs = p, weight, bias, h, direct, spectrum
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if torch.compiler.is_compiling():
        y = _in_graphs(*inputs, wanted)[0]
    else:
        y = _HyenaConv.apply(*inputs) if wanted else _compute(*inputs, False)[0]
    if check_finite:
        refuse_non_finite("hyena_conv", y, p=p, weight=weight, bias=bias, h=h, direct=direct)
    return y


__all__ = ["hyena_conv"]
