# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution with a few taps, as a sum of shifted inputs.

    y[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - (K - 1) + k]

The last tap multiplies the current token, as in `torch.nn.Conv1d` padded on the left. A grouped `conv1d` of that size
costs several times more (benchmarks/results/fftconv.md). Computed in float32 at least.

B batch, C channels, L length, K taps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .fftconv import check_real


# Numbers of a block: three of them fit the last-level cache; smaller ones cost more calls than they save in memory.
_BLOCK = 1 << 18


# New tokens behind a past up to which blocks cost more calls than they save: steps of generation.
_SHORT = 4


def add_taps(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, skipped: int = 0) -> Tensor:
    """Set out (.., C, n) to bias + sum of shifted taps of x (.., C, skipped + n); weight (.., C, K), bias (.., C)."""
    taps, length = weight.shape[-1], out.shape[-1]
    torch.mul(x[..., skipped:], weight[..., taps - 1 :], out=out)
    for k in range(max(taps - length - skipped, 0), taps - 1):
        shift = taps - 1 - k
        lost = max(shift - skipped, 0)  # outputs whose input stands before x
        start = skipped - shift + lost
        out[..., lost:].addcmul_(x[..., start : start + length - lost], weight[..., k : k + 1])
    return out if bias is None else out.add_(bias.unsqueeze(-1))


def add_taps_transposed(out: Tensor, grad: Tensor, weight: Tensor) -> None:
    """Set out (.., C, n) to the gradient of x in `add_taps`, from that of its output (.., C, n and later ones)."""
    taps, length = weight.shape[-1], out.shape[-1]
    torch.mul(grad[..., :length], weight[..., taps - 1 :], out=out)
    for k in range(max(taps - grad.shape[-1], 0), taps - 1):
        later = grad[..., taps - 1 - k :][..., :length]
        out[..., : later.shape[-1]].addcmul_(later, weight[..., k : k + 1])


def tap_gradients(out: Tensor, grad: Tensor, x: Tensor, skipped: int = 0, products: Tensor | None = None) -> None:
    """Add the gradient of the weight of `add_taps` to out (.., C, K).

    Args:
        out: Sum so far.
        grad: Of the output (.., C, n).
        x: (.., C, skipped + n).
        skipped: As in `add_taps`.
        products: Room for numbers like `grad`, overwritten; None makes some.
    """
    taps, length = out.shape[-1], grad.shape[-1]
    for k in range(max(taps - length - skipped, 0), taps):
        shift = taps - 1 - k
        lost = max(shift - skipped, 0)  # outputs whose input stands before x
        start = skipped - shift + lost
        room = None if products is None else products[..., lost:]
        # torch's pairwise sum: dot products of BLAS are several times less exact, and slower in batches
        product = torch.mul(grad[..., lost:], x[..., start : start + length - lost], out=room)
        out[..., k] += product.sum(-1)


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Channels and times of one row (C, L) that go through all taps before the next ones: along contiguous memory."""
    channels, length = x.shape
    if x.stride(0) == 1 and x.stride(1) > 1 and channels > 1:
        step = max(_BLOCK // channels, 16)
        return [(slice(0, channels), slice(t, min(t + step, length))) for t in range(0, length, step)]
    step = max(_BLOCK // length, 16)
    return [(slice(c, c + step), slice(0, length)) for c in range(0, channels, step)]


def _with_halo(x: Tensor, times: slice, before: int, after: int) -> tuple[Tensor, int]:
    """Times of x (C, L) and up to so many columns around them, and how many of these stand before."""
    start = max(times.start - before, 0)
    return x[:, start : times.stop + after], times.start - start


class _ShortConv(torch.autograd.Function):
    """`short_conv` in blocks, on CPUs; the output has the memory layout of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, past)
        exact = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        wide, shift = _wide(weight, exact), None if bias is None else bias.to(exact)
        for row, out in zip(x, y, strict=True):
            for part, times in _blocks(row):
                block, skipped = _with_halo(row[part], times, weight.shape[1] - 1, 0)
                with _rounding_into(out[part, times], exact) as sums:
                    add_taps(sums, block.to(exact), wide[part], None if shift is None else shift[part], skipped)
        if past is not None:
            reach = past.shape[-1]
            whole = torch.cat([past.to(exact), x[..., :reach].to(exact)], dim=-1)
            near = torch.empty_like(whole)
            add_taps(near, whole, wide, shift)
            y[..., :reach] = near[..., reach:]
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "short_conv is differentiable once; call backward or torch.autograd.grad without create_graph=True"
            )
        x, weight, bias, past = ctx.saved_tensors
        grad = _in_layout_of(x, grad_outputs[0])
        exact = torch.promote_types(grad.dtype, torch.float32)
        wide, grad_x, taps = _wide(weight, exact), torch.empty_like(x), weight.shape[1]
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=exact), x.new_zeros(x.shape[1], dtype=exact)
        for row, g, out in zip(x, grad, grad_x, strict=True):
            for part, times in _blocks(row):
                later, _ = _with_halo(g[part], times, 0, taps - 1)
                later = later.to(exact)
                with _rounding_into(out[part, times], exact) as sums:
                    add_taps_transposed(sums, later, wide[part])
                block, skipped = _with_halo(row[part], times, taps - 1, 0)
                here = later[:, : times.stop - times.start]
                tap_gradients(grad_weight[part], here, block.to(exact), skipped)
                grad_bias[part] += here.sum(-1)
        grad_past = None
        if past is not None:
            near = torch.nn.functional.pad(grad[..., : taps - 1].to(exact), (taps - 1, 0))
            grad_past = _gradients_of_past(grad_weight, near, past.to(exact), wide).to(past.dtype)
        return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), grad_past


def _in_layout_of(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient (B, C, L) in the memory layout of x."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)


def _wide(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Taps (C, K) with one tap of all channels contiguous: products along channels are not vectorised otherwise."""
    return weight.to(dtype).mT.contiguous().mT


@contextmanager
def _rounding_into(out: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Room for sums in a dtype, of which out is the rounding: out itself where that needs none."""
    sums = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
    yield sums
    if sums is not out:
        out.copy_(sums)


def _gradients_of_past(grad_weight: Tensor, near: Tensor, past: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the past (B, C, K - 1), from that of the first outputs behind K - 1 zeros, (B, C, <= 2 K - 2).

    Its share in the gradient of the weight is added to grad_weight (C, K).
    """
    behind = torch.nn.functional.pad(past, (0, near.shape[-1] - past.shape[-1]))
    for row, inputs in zip(near, behind, strict=True):
        tap_gradients(grad_weight, row, inputs, 0)
    out = torch.empty_like(near)
    add_taps_transposed(out, near, weight)
    return out[..., : past.shape[-1]]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """The formula as it stands, in few calls, which compilers fuse."""
    taps, length, dtype = weight.shape[1], x.shape[-1], torch.promote_types(x.dtype, weight.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    x, weight = x.to(exact), weight.to(exact)
    padded = torch.nn.functional.pad(x, (taps - 1, 0)) if past is None else torch.cat([past.to(exact), x], dim=-1)
    y = padded[..., taps - 1 : taps - 1 + length] * weight[:, taps - 1 :]
    for k in range(taps - 1):
        y = torch.addcmul(y, padded[..., k : k + length], weight[:, k : k + 1])
    return (y if bias is None else y + bias.to(exact).unsqueeze(-1)).to(dtype)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own K taps.

    Args:
        x: Input (B, C, L), channels or time contiguous in memory.
        weight: Taps (C, K).
        bias: (C,) or None.
        past: The K - 1 inputs before `x`, (B, C, K - 1); None means zeros.

    Returns:
        (B, C, L), dtype of `x` promoted with that of `weight`; on CPUs in the memory layout of `x`, but for
        up to 4 tokens behind a past.

    Raises:
        ValueError: Shapes or devices that do not fit.
        TypeError: A tensor is complex or integer.

    Differentiable, on CPUs outside compiled graphs once, but for such steps.
    """
    check_real("short_conv", x, name="x", required=("weight",), weight=weight, bias=bias, past=past)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or 0 in (*x.shape, *weight.shape):
        raise ValueError(
            f"expected x (B, C, L) and weight (C, K), every size at least 1, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), one value a channel, got {tuple(bias.shape)}")
    if past is not None and past.shape != (*x.shape[:2], weight.shape[1] - 1):
        raise ValueError(
            f"past must hold the {weight.shape[1] - 1} inputs before x, {(*x.shape[:2], weight.shape[1] - 1)}, got "
            f"{tuple(past.shape)}"
        )
    # a graph may not ask for its length
    if x.device.type != "cpu" or torch.compiler.is_compiling() or (past is not None and x.shape[-1] <= _SHORT):
        return _plain(x, weight, bias, past)
    return _ShortConv.apply(x, weight, bias, past)


def short_conv_step(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One input of every row.

    Args:
        x: (B, C).
        window: The K - 1 inputs before it, oldest first, (B, K - 1, C).
        weight: Taps (C, K) in the dtype of x.
        bias: (C,) or None.

    Returns:
        The output (B, C), and the next window.
    """
    oldest, *taps = weight.mT.contiguous()  # products with a stride are not vectorised
    first, *rows = *window.unbind(dim=1), x
    y = first * oldest if bias is None else torch.addcmul(bias, first, oldest)
    for row, tap in zip(rows, taps, strict=True):
        y = torch.addcmul(y, row, tap)
    return y, torch.stack(rows, dim=1) if rows else window
