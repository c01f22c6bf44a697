# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution with a few taps, as a sum of shifted inputs.

    y[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - (K - 1) + k]

The last tap multiplies the current token, as in `torch.nn.Conv1d` padded on the left. A grouped `conv1d` of that size
costs several times more (benchmarks/results/short_conv.md). Computed in float32 at least.

B batch, C channels, L length, K taps.
"""

from typing import Any

import torch
from torch import Tensor


# Numbers of a block of channels: three of them fit the second-level cache of most processors.
_BLOCK = 1 << 16


def add_taps(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Set out to bias + sum of shifted taps; x and out (.., C, L), weight (C, K), bias (C,)."""
    taps, length = weight.shape[1], x.shape[-1]
    torch.mul(x, weight[:, taps - 1 :], out=out)
    for k in range(max(taps - length, 0), taps - 1):
        shift = taps - 1 - k
        out[..., shift:].addcmul_(x[..., : length - shift], weight[:, k : k + 1])
    if bias is not None:
        out.add_(bias.unsqueeze(-1))


def add_taps_transposed(out: Tensor, grad: Tensor, weight: Tensor) -> None:
    """Set out to the gradient of x in `add_taps`, from the gradient of its output."""
    taps, length = weight.shape[1], grad.shape[-1]
    torch.mul(grad, weight[:, taps - 1 :], out=out)
    for k in range(max(taps - length, 0), taps - 1):
        shift = taps - 1 - k
        out[..., : length - shift].addcmul_(grad[..., shift:], weight[:, k : k + 1])


def tap_gradients(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add the gradient of the weight of `add_taps` to out (.., C, K)."""
    taps, length = out.shape[-1], x.shape[-1]
    for k in range(max(taps - length, 0), taps):
        shift = taps - 1 - k
        out[..., k] += (grad[..., shift:] * x[..., : length - shift]).sum(-1)


def _block_channels(x: Tensor) -> list[slice]:
    """Channels of x (B, C, L) that go through all taps before the next ones."""
    count = max(_BLOCK // x.shape[-1], 16)
    return [slice(c, c + count) for c in range(0, x.shape[1], count)]


class _ShortConv(torch.autograd.Function):
    """`short_conv` in blocks of channels, on CPUs; the output has the memory layout of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, past)
        exact = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        wide, shift = weight.to(exact), None if bias is None else bias.to(exact)
        for b in range(x.shape[0]):
            for part in _block_channels(x):
                block = x[b, part].to(exact)
                out = y[b, part] if y.dtype == exact else torch.empty_like(block)
                add_taps(out, block, wide[part], None if shift is None else shift[part])
                if past is not None:
                    _go_on(out, block, past[b, part].to(exact), wide[part], None if shift is None else shift[part])
                if y.dtype != exact:
                    y[b, part] = out
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "short_conv is differentiable once; call backward or torch.autograd.grad without create_graph=True"
            )
        (grad,) = grad_outputs
        x, weight, bias, past = ctx.saved_tensors
        exact = torch.promote_types(grad.dtype, torch.float32)
        wide, grad_x = weight.to(exact), torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(wide), x.new_zeros(x.shape[1], dtype=exact)
        grad_past = None if past is None else torch.empty_like(past)
        for b in range(x.shape[0]):
            for part in _block_channels(x):
                g, block = grad[b, part].to(exact), x[b, part].to(exact)
                out = grad_x[b, part] if grad_x.dtype == exact else torch.empty_like(block)
                add_taps_transposed(out, g, wide[part])
                if grad_x.dtype != exact:
                    grad_x[b, part] = out
                tap_gradients(grad_weight[part], g, block)
                grad_bias[part] += g.sum(-1)
                if past is not None and grad_past is not None:
                    grad_past[b, part] = _gradients_of_past(grad_weight[part], g, past[b, part].to(exact), wide[part])
        of_weight = grad_weight.to(weight.dtype)
        return grad_x, of_weight, None if bias is None else grad_bias.to(bias.dtype), grad_past


def _go_on(out: Tensor, x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Replace the outputs that the past reaches; out and x (C, L), past (C, K - 1)."""
    reach = past.shape[-1]
    whole = torch.cat([past, x[:, :reach]], dim=-1)
    near = torch.empty_like(whole)
    add_taps(near, whole, weight, bias)
    out[:, :reach] = near[:, reach:]


def _gradients_of_past(grad_weight: Tensor, grad: Tensor, past: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the past (C, K - 1); its share in that of the weight is added to grad_weight (C, K)."""
    reach = past.shape[-1]
    near = torch.nn.functional.pad(grad[:, :reach], (reach, 0))
    tap_gradients(grad_weight, near, torch.nn.functional.pad(past, (0, near.shape[-1] - reach)))
    out = torch.empty_like(near)
    add_taps_transposed(out, near, weight)
    return out[:, :reach]


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """The formula as it stands, which compilers fuse."""
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
        (B, C, L), dtype of `x` promoted with that of `weight`; on CPUs in the memory layout of `x`.

    Raises:
        ValueError: Shapes that do not fit.

    Differentiable, on CPUs outside compiled graphs once.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"expected x (B, C, L) and weight (C, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if past is not None and past.shape != (*x.shape[:2], weight.shape[1] - 1):
        raise ValueError(
            f"past must hold the {weight.shape[1] - 1} inputs before x, {(*x.shape[:2], weight.shape[1] - 1)}, got "
            f"{tuple(past.shape)}"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return _plain(x, weight, bias, past)
    return _ShortConv.apply(x, weight, bias, past)
