# SPDX-License-Identifier: Apache-2.0
"""Continue a causal convolution: outputs for new inputs alone, given all inputs before them.

Overlap-save over the whole past: of a circular convolution of n points over T old and L new inputs the last L outputs
are right as soon as n >= T + 2 L - 1, because what wraps around falls on old ones. One block of channels is in work at
a time, so feeding a million tokens in chunks takes the memory of the inputs and of one block.

B batch, C channels, H filters, L new inputs, T old ones, K taps.
"""

import torch
from torch import Tensor

from .backends.fft import Blocks, Kernel, Work, block_floats, next_even_5_smooth
from .engine import one_pass_serves
from .fftconv import causal_fftconv
from .precision import transform_dtype


def continued_fftconv(past: Tensor, w: Tensor, h: Tensor, direct: Tensor, *, exact: bool = False) -> Tensor:
    """Causal convolution of old and new inputs, at the new ones.

    Args:
        past: Old inputs (B, C, T), T at least 0, float32 or float64.
        w: New inputs (B, C, L), the dtype of `past`.
        h: Filters (H, K); channel c uses filter c // (C // H).
        direct: Extra tap at lag 0, (H,).
        exact: As in `causal_fftconv`.

    Returns:
        (B, C, L).
    """
    before = past.shape[-1]
    if before == 0:
        return causal_fftconv(w, h, direct, exact=exact, check_finite=False)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (past, w, h, direct))
    if (
        wanted
        or torch.compiler.is_compiling()
        or w.dtype == torch.float64
        or not one_pass_serves(w.dtype, w.device, w.shape[-1], None)
    ):
        return causal_fftconv(torch.cat([past, w], dim=-1), h, direct, exact=exact, check_finite=False)[..., before:]
    h = h[:, : before + w.shape[-1]]
    return _in_blocks(past, w, Kernel(h.to(w.dtype), direct=direct.to(w.dtype)), exact)


@torch.no_grad()
def _in_blocks(past: Tensor, w: Tensor, kernel: Kernel, exact: bool) -> Tensor:
    filters, taps = kernel.h.shape
    past = past[..., max(past.shape[-1] - taps + 1, 0) :]  # older inputs meet no tap
    before, total = past.shape[-1], past.shape[-1] + w.shape[-1]
    n = next_even_5_smooth(max(total + w.shape[-1] - 1, 2))
    work = Work(n, transform_dtype(w.dtype, w.device, exact), block_floats(n))
    old, new = (x.unflatten(1, (filters, -1)) for x in (past, w))
    sizes = new.shape[0], new.shape[1], new.shape[2]
    blocks = Blocks.of(sizes, work.floats // n)
    room = w.new_zeros(blocks.batch, blocks.filters, blocks.group, n, dtype=work.dtype)
    y = torch.empty_like(new, memory_format=torch.contiguous_format)
    for part in blocks.over_filters(filters):
        spectrum = kernel.transform(part, work)
        for at in blocks.over_rows(part, sizes):
            x = new[at]
            rows = room[: x.shape[0], : x.shape[1], : x.shape[2]]
            rows[..., :before] = old[at]
            rows[..., before:total] = x
            y[at] = torch.fft.irfft(torch.fft.rfft(rows).mul_(spectrum), n=n)[..., before:total]
    return y.flatten(1, 2)


__all__ = ["continued_fftconv"]
