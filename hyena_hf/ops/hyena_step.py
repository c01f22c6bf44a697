# SPDX-License-Identifier: Apache-2.0
"""One token of an order-2 Hyena operator with a modal filter, from its projections to what the output layer takes.

With s the short convolution of the projections x_0, x_1, v and x the state of the filter (`hyena_hf.ops.modal`):

    w = s_1 s_v,    y = s_0 (c x + direct w),    x <- P x + w

On a GPU one Triton kernel (`_triton_step`) takes the place of the formula's some twenty; compilers fuse the formula
themselves.

B batch, D channels, K taps, d numbers of state a channel.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .modal import ModalStep, advance_one, read_out
from .short_conv import short_conv_step


_KERNELS = "hyena_hf.ops.backends._triton_step"

# Channels of a program: numbers of state in registers, and programs enough for one row.
_BLOCK = 64

# Relative root mean square error that the kernel's self-check allows.
_TOLERANCE = 1e-6


def hyena_step(
    p: Tensor,
    window: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    step: ModalStep,
    direct: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row.

    Args:
        p: Projections (B, 3 D).
        window: The K - 1 projections before it, oldest first, (B, K - 1, 3 D).
        weight: Taps of the short convolution (3 D, K), the last one for p.
        bias: Its bias (3 D,) or None.
        state: Of the filter, (B, d, D).
        step: What the state is multiplied by, for D channels.
        direct: Weight of the gated input in the output, skip included, (D,).

    Returns:
        The output (B, D), the next window and the next state; dtype of `state`, in which all arguments are.
    """
    if _kernel_serves(p, window, weight, bias, state, direct):
        return _fused(p, window, weight, bias, state, step, direct)
    return reference(p, window, weight, bias, state, step, direct)


def reference(
    p: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: ModalStep, direct: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in torch; as `hyena_step`."""
    s, following = short_conv_step(p, window, weight, bias)
    gate, key, value = s.chunk(3, dim=1)
    w = key * value
    y = gate * torch.addcmul(read_out(state, step), w, direct)
    return y, following, advance_one(state, w, step)


def _kernel_serves(*tensors: Tensor | None) -> bool:
    given = [tensor for tensor in tensors if tensor is not None]
    if not given[0].is_cuda or torch.compiler.is_compiling() or any(x.dtype != torch.float32 for x in given):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    return kernel_fault(given[0].device) is None


def _kernels() -> ModuleType:
    return importlib.import_module(_KERNELS)


def _fused(
    p: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: ModalStep, direct: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernel; as `hyena_step`, in float32 and without gradients."""
    batch, size, width = state.shape
    y, new_window, new_state = p.new_empty(batch, width), torch.empty_like(window), torch.empty_like(state)
    to_first, to_second = (None, None) if step.cross is None else step.cross
    half = size // 2
    padded = 1 << (half - 1).bit_length()
    tensors = (p, window, weight, bias, state, step.decay, to_first, to_second, step.readout, direct)
    given = [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
    grid = batch, -(-width // _BLOCK)
    # Triton launches on the current device, whatever its tensors are on
    with torch.cuda.device(p.device) if p.is_cuda else nullcontext():
        _kernels().step_kernel[grid](
            *given,
            y,
            new_window,
            new_state,
            width,
            half,
            TAPS=weight.shape[1],
            HALF=padded,
            BLOCK=_BLOCK,
            num_warps=4 if padded * _BLOCK >= 512 else 1,
        )
    return y, new_window, new_state


@lru_cache(maxsize=16)
def kernel_fault(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device, None where it passes a comparison with the formula in float64."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        error = self_check(device)
    except Exception as failure:  # noqa: BLE001  whatever a compiler or a driver raises, it cannot be used here
        return f"its self-check on {device} failed with {type(failure).__name__}: {failure}"
    return None if error <= _TOLERANCE else f"its self-check on {device} is off by {error:.1e} (relative RMS)"


def self_check(device: torch.device) -> float:
    """Largest relative root mean square error of the kernel on a device against the formula in float64."""
    random = torch.Generator().manual_seed(0)
    batch, half, width, taps = 2, 3, _BLOCK + 5, 3

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    tensors = draw(batch, 3 * width), draw(batch, taps - 1, 3 * width), draw(3 * width, taps), draw(3 * width)
    state, direct = draw(batch, 2 * half, width), draw(width)
    coefficients = draw(2 * half, width), draw(half, width), draw(half, width), draw(2 * half, width)

    def run(function: Callable, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        decay, to_first, to_second, readout = (x.to(device, dtype) for x in coefficients)
        step = ModalStep(decay, (to_first, to_second), readout)
        return function(
            *(x.to(device, dtype) for x in tensors), state.to(device, dtype), step, direct.to(device, dtype)
        )

    expected = run(reference, torch.device("cpu"), torch.float64)
    found = run(_fused, device, torch.float32)
    return max(float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


__all__ = ["hyena_step", "kernel_fault", "reference", "self_check"]
