# SPDX-License-Identifier: Apache-2.0
"""Use the compiled kernels of FlashFFTConv (Fu et al. 2023, arXiv 2311.05908) where that package is installed.

Its limits (repository HazyResearch/flash-fft-conv, commit b877102) are met or refused here:

- FFT sizes are powers of two from 256 to 4,194,304: inputs are padded to half of one, which makes the circular
  convolution causal; channels must be a multiple of 16 above 32,768 points;
- inputs are float16 or bfloat16 and contiguous, filters float32 of shape (channels, taps), one a channel;
- both gates or none, no `direct`: a missing gate is ones, `direct` is added to tap 0;
- it saves what its backward needs only while in training mode.

Kernels of 32,768 points ask for 135,168 bytes of shared memory a block, more than consumer cards have.
"""

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


_SMALLEST, _LARGEST = 256, 1 << 22


def _points(length: int) -> int:
    return max(_SMALLEST, 1 << (2 * length - 1).bit_length())


def _shared_memory(points: int) -> int:
    """Bytes of shared memory that the largest kernel of a transform asks for; those above 32,768 use smaller ones."""
    return {16384: 140_000, 32768: 135_168}.get(points, 102_400 if points >= 8192 else 0)


def refusal(
    u: Tensor,
    h: Tensor,  # noqa: ARG001 (one interface)
    direct: Tensor | None,  # noqa: ARG001
    pregate: Tensor | None,  # noqa: ARG001
    postgate: Tensor | None,  # noqa: ARG001
) -> str | None:
    """Why the package cannot serve these tensors, as the end of a sentence; None if it can."""
    points = _points(u.shape[-1])
    if importlib.util.find_spec("flashfftconv") is None:
        return "the package flashfftconv is not installed"
    if u.device.type != "cuda":
        return f"flashfftconv needs a CUDA device, but u lies on {u.device}"
    if u.dtype not in (torch.float16, torch.bfloat16):
        return f"flashfftconv takes float16 and bfloat16, but u is {u.dtype}"
    if points > _LARGEST:
        return f"flashfftconv transforms at most {_LARGEST} points, but {u.shape[-1]} tokens need {points}"
    if points > 32768 and u.shape[1] % 16:
        return f"flashfftconv needs a multiple of 16 channels at {points} points, but u has {u.shape[1]}"
    room = torch.cuda.get_device_properties(u.device).shared_memory_per_block_optin
    if room < _shared_memory(points):
        return f"flashfftconv needs {_shared_memory(points)} bytes of shared memory a block, the device has {room}"
    return None


@cache
def _module(points: int, dtype: torch.dtype, device: torch.device) -> Any:
    return importlib.import_module("flashfftconv").FlashFFTConv(points, dtype=dtype).to(device).train()


def forward(u: Tensor, h: Tensor, direct: Tensor | None, pregate: Tensor | None, postgate: Tensor | None) -> Tensor:
    """Compute postgate * (h conv w + direct * w), w = pregate * u; shapes as in `causal_fftconv`."""
    length = u.shape[-1]
    points = _points(length)
    taps = h.repeat_interleave(u.shape[1] // h.shape[0], dim=0)
    if direct is not None:
        tap = direct.repeat_interleave(u.shape[1] // h.shape[0]).unsqueeze(-1)
        taps = torch.cat([taps[:, :1] + tap, taps[:, 1:]], dim=1)
    room = (0, points // 2 - length)
    conv = _module(points, u.dtype, u.device)
    if pregate is None and postgate is None:
        return conv(pad(u, room).contiguous(), taps.contiguous())[..., :length].contiguous()
    gates = (torch.ones_like(u) if gate is None else gate for gate in (pregate, postgate))
    before, behind = (pad(gate, room).contiguous() for gate in gates)
    return conv(pad(u, room).contiguous(), taps.contiguous(), before, behind)[..., :length].contiguous()


def backward(
    grad: Tensor,
    u: Tensor,
    h: Tensor,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of the five tensors where needed, by the package's own backward."""
    inputs = [
        None if x is None else x.detach().requires_grad_(need)
        for x, need in zip((u, h, direct, pregate, postgate), needs, strict=True)
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(forward(*inputs), wanted, grad))  # pyright: ignore (u and h are there)
    return tuple(next(found) if x is not None and x.requires_grad else None for x in inputs)


__all__ = ["backward", "forward", "refusal"]
