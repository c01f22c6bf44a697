# SPDX-License-Identifier: Apache-2.0
"""One token of an order-2 operator with a modal filter as one Triton program: short convolution, gates, state, skip.

Imported on first use, as `_triton_kernels`. Formulas are those of `hyena_hf.ops.hyena_step`, which calls it.

A program serves one row and a block of channels; of a channel it holds the K - 1 last inputs of all three projections
and d numbers of state, which it reads and writes once. Sums are float32, and run in a fixed order.
"""

# ruff: noqa: PLR0913  kernels have no objects to group their arguments in
# Triton passes plain numbers as constexpr, and leaves out branches on them before it looks for unbound names:
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl
from triton import knobs

# not tl.sum: a jitted function, of which an interpreted kernel can call those only that are interpreted too
from triton.language.standard import _sum_combine


INTERPRETED = bool(knobs.runtime.interpret)


@triton.jit
def step_kernel(
    p,
    window,
    weight,
    bias,
    state,
    decay,
    to_first,
    to_second,
    readout,
    direct,
    y,
    new_window,
    new_state,
    width,
    half,
    TAPS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token of a row in a block of channels. Grid (B, blocks of channels).

    p (B, 3 D), windows (B, K - 1, 3 D), weight (3 D, K), states (B, d, D), decay and readout (d, D), to_first and
    to_second (d/2, D), direct (D,), y (B, D). width is D, half d/2, HALF the power of two above it.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = c < width
    gate = tl.full((BLOCK,), 0.0, tl.float32)
    w = tl.full((BLOCK,), 0.0, tl.float32)
    for group in tl.static_range(3):
        at = group * width + c
        x = tl.load(p + row * 3 * width + at, mask=within, other=0.0).to(tl.float32)
        total = x * tl.load(weight + at * TAPS + TAPS - 1, mask=within, other=0.0)
        if bias is not None:
            total += tl.load(bias + at, mask=within, other=0.0)
        for k in tl.static_range(TAPS - 1):
            old = tl.load(window + (row * (TAPS - 1) + k) * 3 * width + at, mask=within, other=0.0)
            total += old * tl.load(weight + at * TAPS + k, mask=within, other=0.0)
            if k > 0:
                tl.store(new_window + (row * (TAPS - 1) + k - 1) * 3 * width + at, old, mask=within)
        if TAPS > 1:
            tl.store(new_window + (row * (TAPS - 1) + TAPS - 2) * 3 * width + at, x, mask=within)
        if group == 0:
            gate = total
        elif group == 1:
            w = total
        else:
            w = w * total

    n = tl.arange(0, HALF)[:, None]
    real = (n < half) & within[None, :]
    first = n * width + c[None, :]
    second = first + half * width
    numbers = row * 2 * half * width
    a = tl.load(state + numbers + first, mask=real, other=0.0)
    b = tl.load(state + numbers + second, mask=real, other=0.0)
    seen = a * tl.load(readout + first, mask=real, other=0.0)
    seen += b * tl.load(readout + second, mask=real, other=0.0)
    next_a = a * tl.load(decay + first, mask=real, other=0.0) + w[None, :]
    next_b = b * tl.load(decay + second, mask=real, other=0.0) + w[None, :]
    if to_first is not None:
        next_a += b * tl.load(to_first + first, mask=real, other=0.0)
        next_b += a * tl.load(to_second + first, mask=real, other=0.0)
    tl.store(new_state + numbers + first, next_a, mask=real)
    tl.store(new_state + numbers + second, next_b, mask=real)
    out = tl.reduce(seen, 0, _sum_combine) + w * tl.load(direct + c, mask=within, other=0.0)
    tl.store(y + row * width + c, (gate * out).to(y.dtype.element_ty), mask=within)
