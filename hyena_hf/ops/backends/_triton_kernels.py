# SPDX-License-Identifier: Apache-2.0
"""Convolve rows on chip: the right-angle Monarch transforms of `triton.py` as Triton programs.

Imported on first use, because importing it needs triton, and because `TRITON_INTERPRET` is read here, when kernels are
decorated. Formulas and the layout of the tables are in `triton.py`, which builds them.

A program works on rows that share a filter, one after the other. A row is a sequence of N = N1 N2 N3 points (N3 = 1
with two levels), n = (n1 N2 + n2) N3 + n3. Every stage of a transform is a product X @ F of a tall matrix and a small
one, so that all warps share the work by lines: samples lie in tiles (N2 N3, N1), spectra in (N1, N2 N3). Tiles are
transposed between stages, in the precision of the matrices. Complex tensors in memory are two real ones, the real part
first; complex values are pairs (r, i). An absent tensor is None, which Triton specialises on.

Every sum over rows runs in one program in a fixed order: no atomics, the same bits every time.
"""

# ruff: noqa: PLR0913  kernels have no objects to group their arguments in
# Triton passes plain numbers as constexpr, and leaves out branches on them before it looks for unbound names:
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import triton
import triton.language as tl
from triton import knobs

# not tl.max and tl.sum: jitted functions, of which an interpreted kernel can call those only that are interpreted too
from triton.language.standard import _elementwise_max, _sum_combine


INTERPRETED = bool(knobs.runtime.interpret)


@triton.jit
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _table(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + at), tl.load(pointer + ROWS * COLUMNS + at)


@triton.jit
def _transposed_table(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, COLUMNS)[:, None] + tl.arange(0, ROWS)[None, :] * COLUMNS
    return tl.load(pointer + at), tl.load(pointer + ROWS * COLUMNS + at)


@triton.jit
def _product(xr, xi, fr, fi):
    """X @ F, both complex."""
    xr = xr.to(fr.dtype)
    xi = xi.to(fr.dtype)
    yr = tl.dot(xi, -fi, acc=tl.dot(xr, fr, input_precision="ieee"), input_precision="ieee")
    yi = tl.dot(xi, fr, acc=tl.dot(xr, fi, input_precision="ieee"), input_precision="ieee")
    return yr, yi


@triton.jit
def _times_twiddle(xr, xi, tr, ti, matrices, LEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(LEAD ROWS, COLUMNS) times (ROWS, COLUMNS), as (LEAD, ROWS, COLUMNS) in the dtype of the matrices."""
    xr = tl.reshape(xr, (LEAD, ROWS, COLUMNS))
    xi = tl.reshape(xi, (LEAD, ROWS, COLUMNS))
    xr, xi = _times(xr, xi, tr[None, :, :], ti[None, :, :])
    return xr.to(matrices.dtype.element_ty), xi.to(matrices.dtype.element_ty)


@triton.jit
def _swap(x, LEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(LEAD, ROWS, COLUMNS) with the last two axes exchanged, as (LEAD COLUMNS, ROWS)."""
    return tl.reshape(tl.permute(tl.reshape(x, (LEAD, ROWS, COLUMNS)), (0, 2, 1)), (LEAD * COLUMNS, ROWS))


@triton.jit
def _reverse(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(A, B, C) with its axes in reverse order, as (C B, A)."""
    return tl.reshape(tl.permute(tl.reshape(x, (A, B, C)), (2, 1, 0)), (C * B, A))


@triton.jit
def _first_twiddle(twiddles, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Of n2, n3 and k1: (N2 N3, N1); of three levels as a product of (N2, N1) and (N3, N1), to load little."""
    tr, ti = _table(twiddles, N2, N1)
    if N3 > 1:
        br, bi = _table(twiddles + 2 * N1 * N2, N3, N1)
        tr, ti = _times(tr[:, None, :], ti[:, None, :], br[None, :, :], bi[None, :, :])
    return tl.reshape(tr, (N2 * N3, N1)), tl.reshape(ti, (N2 * N3, N1))


@triton.jit
def _first_twiddle_reversed(twiddles, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """The same of k1, n3 and n2: (N1 N3, N2)."""
    tr, ti = _transposed_table(twiddles, N2, N1)
    if N3 > 1:
        br, bi = _transposed_table(twiddles + 2 * N1 * N2, N3, N1)
        tr, ti = _times(tr[:, None, :], ti[:, None, :], br[:, :, None], bi[:, :, None])
    return tl.reshape(tr, (N1 * N3, N2)), tl.reshape(ti, (N1 * N3, N2))


@triton.jit
def _transform(
    xr,
    xi,
    matrices,
    twiddles,
    REAL: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
):
    """Samples (N2 N3, N1) to spectra (N1, N2 N3); with REAL the imaginary part is not read."""
    fr, fi = _table(matrices, N1, N1)
    if REAL:
        xr = xr.to(fr.dtype)
        yr = tl.dot(xr, fr, input_precision="ieee")
        yi = tl.dot(xr, fi, input_precision="ieee")
    else:
        yr, yi = _product(xr, xi, fr, fi)
    tr, ti = _first_twiddle(twiddles, N1, N2, N3)
    yr, yi = _times_twiddle(yr, yi, tr, ti, matrices, 1, N2 * N3, N1)
    matrices += 2 * N1 * N1
    fr, fi = _table(matrices, N2, N2)
    yr, yi = _product(_reverse(yr, N2, N3, N1), _reverse(yi, N2, N3, N1), fr, fi)
    if N3 > 1:
        tr, ti = _table(twiddles + 2 * N1 * (N2 + N3), N3, N2)
        yr, yi = _times_twiddle(yr, yi, tr, ti, matrices, N1, N3, N2)
        fr, fi = _table(matrices + 2 * N2 * N2, N3, N3)
        yr, yi = _product(_swap(yr, N1, N3, N2), _swap(yi, N1, N3, N2), fr, fi)
    return tl.reshape(yr, (N1, N2 * N3)), tl.reshape(yi, (N1, N2 * N3))


@triton.jit
def _inverse_but_first(yr, yi, matrices, twiddles, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Inverse of all stages of `_transform` but the first: (N1, N2 N3) to (N2 N3, N1)."""
    matrices += 2 * N1 * N1
    if N3 > 1:
        fr, fi = _table(matrices + 2 * N2 * N2, N3, N3)
        yr, yi = _product(tl.reshape(yr, (N1 * N2, N3)), tl.reshape(yi, (N1 * N2, N3)), fr, -fi)
        tr, ti = _transposed_table(twiddles + 2 * N1 * (N2 + N3), N3, N2)
        yr, yi = _times_twiddle(yr, yi, tr, -ti, matrices, N1, N2, N3)
        yr = _swap(yr, N1, N2, N3)
        yi = _swap(yi, N1, N2, N3)
    fr, fi = _table(matrices, N2, N2)
    yr, yi = _product(tl.reshape(yr, (N1 * N3, N2)), tl.reshape(yi, (N1 * N3, N2)), fr, -fi)
    tr, ti = _first_twiddle_reversed(twiddles, N1, N2, N3)
    yr, yi = _times_twiddle(yr, yi, tr, -ti, matrices, 1, N1 * N3, N2)
    return _reverse(yr, N1, N3, N2), _reverse(yi, N1, N3, N2)


@triton.jit
def _real_inverse(yr, yi, matrices, twiddles, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr):
    """Real part of the inverse of `_transform`: (N1, N2 N3) to (N2 N3, N1)."""
    yr, yi = _inverse_but_first(yr, yi, matrices, twiddles, N1, N2, N3)
    fr, fi = _transposed_table(matrices, N1, N1)
    return tl.dot(yi, fi, acc=tl.dot(yr, fr, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _places(row, filter_, group, channels, length, N1: tl.constexpr, M: tl.constexpr):
    """Offsets and mask of a row of a filter in a (B, C, L) tensor, as an (M, N1) tile."""
    start = ((row // group) * channels + filter_ * group + row % group).to(tl.int64) * length
    n = tl.arange(0, M)[:, None] + tl.arange(0, N1)[None, :] * M
    return start + n, n < length


@triton.jit
def _load(tensor, gate, at, inside):
    """A tile in float32, times its gate where there is one."""
    x = tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        x *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store(tensor, gate, x, at, inside):
    """A float32 tile, times its gate where there is one."""
    if gate is not None:
        x *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(tensor + at, x.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _power_below(peak):
    """The power of two below a positive number: its exponent bits. Dividing by it rounds nothing."""
    power = (peak.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 1e-30)


@triton.jit
def _scale(x, gain):
    """What to divide a row by, so that half precision holds its spectrum; 1 for float32, which has no gain."""
    if gain is not None:
        return _power_below(tl.reduce(tl.reduce(tl.abs(x), 1, _elementwise_max), 0, _elementwise_max))
    return 1.0


@triton.jit
def _number(pointer, index, default):
    if pointer is not None:
        return tl.load(pointer + index)
    return default


@triton.jit
def convolve(
    u,
    pregate,
    postgate,
    direct,
    spectrum,
    gain,
    y,
    matrices,
    twiddles,
    rows,
    share,
    group,
    channels,
    length,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
):
    """Y = postgate * (h conv w + direct * w), w = pregate * u, of `share` rows of a filter. Grid (shares, H)."""
    M: tl.constexpr = N2 * N3
    filter_ = tl.program_id(1)
    first = tl.program_id(0) * share
    tap = _number(direct, filter_, 0.0)
    factor = _number(gain, filter_, 1.0)
    for row in range(first, tl.minimum(first + share, rows)):
        at, inside = _places(row, filter_, group, channels, length, N1, M)
        w = _load(u, pregate, at, inside)
        scale = _scale(w, gain)
        xr, xi = _transform(w / scale, w, matrices, twiddles, True, N1, N2, N3)
        kr, ki = _table(spectrum + filter_.to(tl.int64) * (2 * N1 * M), N1, M)
        xr, xi = _times(xr, xi, kr, ki)
        x = _real_inverse(xr, xi, matrices, twiddles, N1, N2, N3) * (scale * factor) + tap * w
        _store(y, postgate, x, at, inside)


@triton.jit
def gradients(  # noqa: C901  one kernel, so that rows are read and transformed once
    grad,
    u,
    pregate,
    postgate,
    direct,
    spectrum,
    gain,
    grad_u,
    grad_pregate,
    grad_postgate,
    grad_spectrum,
    grad_direct,
    matrices,
    twiddles,
    rows,
    share,
    group,
    channels,
    length,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
):
    """Every gradient of `convolve` that is not None, of `share` rows of a filter. Grid (shares, H).

    grad_spectrum (shares, H, 2, N1, M) and grad_direct (shares, H) take one partial sum a program; that of the
    spectrum is in the unit of orthonormal transforms, N times too small.
    """
    M: tl.constexpr = N2 * N3
    filter_ = tl.program_id(1)
    first = tl.program_id(0) * share
    sum_r = tl.full((N1, M), 0.0, tl.float32)
    sum_i = tl.full((N1, M), 0.0, tl.float32)
    dot = tl.full((M, N1), 0.0, tl.float32)
    tap = _number(direct, filter_, 0.0)
    factor = _number(gain, filter_, 1.0)
    for row in range(first, tl.minimum(first + share, rows)):
        at, inside = _places(row, filter_, group, channels, length, N1, M)
        g = _load(grad, postgate, at, inside)
        w = _load(u, pregate, at, inside)
        if grad_direct is not None:
            dot += g * w
        g_scale = _scale(g, gain)
        w_scale = _scale(w, gain)
        kr, ki = _table(spectrum + filter_.to(tl.int64) * (2 * N1 * M), N1, M)
        if grad_u is not None or grad_pregate is not None or grad_spectrum is not None:
            gr, gi = _transform(g / g_scale, g, matrices, twiddles, True, N1, N2, N3)
        if grad_postgate is not None or grad_spectrum is not None:
            wr, wi = _transform(w / w_scale, w, matrices, twiddles, True, N1, N2, N3)
        if grad_spectrum is not None:
            pr, pi = _times(gr, gi, wr, -wi)
            sum_r += pr * (g_scale * w_scale)
            sum_i += pi * (g_scale * w_scale)
        if grad_postgate is not None:
            wr, wi = _times(wr, wi, kr, ki)
            x = _real_inverse(wr, wi, matrices, twiddles, N1, N2, N3) * (w_scale * factor) + tap * w
            _store(grad_postgate, grad, x, at, inside)
        if grad_u is not None or grad_pregate is not None:
            gr, gi = _times(gr, gi, kr, -ki)
            x = _real_inverse(gr, gi, matrices, twiddles, N1, N2, N3) * (g_scale * factor) + tap * g
            if grad_u is not None:
                _store(grad_u, pregate, x, at, inside)
            if grad_pregate is not None:
                _store(grad_pregate, u, x, at, inside)
    partial = tl.program_id(0) * tl.num_programs(1) + filter_
    if grad_spectrum is not None:
        place = grad_spectrum + partial.to(tl.int64) * (2 * N1 * M)
        cell = tl.arange(0, N1)[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(place + cell, sum_r)
        tl.store(place + N1 * M + cell, sum_i)
    if grad_direct is not None:
        tl.store(grad_direct + partial, tl.reduce(tl.reduce(dot, 1, _sum_combine), 0, _sum_combine))


# the outer stage, through memory: P transforms of n = N1 M points each, between two matrix products


@triton.jit
def measure(
    u,
    pregate,
    grad,
    postgate,
    w_scale,
    g_scale,
    dot,
    length,
    BLOCK: tl.constexpr,
):
    """Of every row, where asked for: scales of w = pregate * u and of g = postgate * grad, and the sum of w g."""
    row = tl.program_id(0).to(tl.int64)
    w_peak = tl.full((BLOCK,), 0.0, tl.float32)
    g_peak = tl.full((BLOCK,), 0.0, tl.float32)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, length, BLOCK):
        n = first + tl.arange(0, BLOCK)
        w = _load(u, pregate, row * length + n, n < length)
        w_peak = tl.maximum(w_peak, tl.abs(w))
        if grad is not None:
            g = _load(grad, postgate, row * length + n, n < length)
            g_peak = tl.maximum(g_peak, tl.abs(g))
            total += g * w
    if w_scale is not None:
        tl.store(w_scale + row, _power_below(tl.reduce(w_peak, 0, _elementwise_max)))
    if g_scale is not None:
        tl.store(g_scale + row, _power_below(tl.reduce(g_peak, 0, _elementwise_max)))
    if dot is not None:
        tl.store(dot + row, tl.reduce(total, 0, _sum_combine))


@triton.jit
def outer_transform(
    u,
    pregate,
    scale,
    values,
    matrix,
    length,
    OUTER,
    CHIP: tl.constexpr,
    LINES: tl.constexpr,
    POINTS: tl.constexpr,
):
    """First stage: values (rows, P, 2, CHIP) of w / scale. Grid (rows, blocks of k1, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * LINES + tl.arange(0, LINES)
    column = tl.program_id(2) * POINTS + tl.arange(0, POINTS)
    yr = tl.full((POINTS, LINES), 0.0, tl.float32)
    yi = tl.full((POINTS, LINES), 0.0, tl.float32)
    factor = 1 / _number(scale, row, 1.0)
    for first in range(0, OUTER, LINES):
        n1 = first + tl.arange(0, LINES)
        n = column[:, None] + n1[None, :] * CHIP
        w = _load(u, pregate, row * length + n, (n1 < OUTER)[None, :] & (n < length)) * factor
        at = n1[:, None] * OUTER + k[None, :]
        inside = (n1 < OUTER)[:, None] & (k < OUTER)[None, :]
        fr = tl.load(matrix + at, mask=inside, other=0.0)
        fi = tl.load(matrix + OUTER * OUTER + at, mask=inside, other=0.0)
        w = w.to(fr.dtype)
        yr = tl.dot(w, fr, acc=yr, input_precision="ieee")
        yi = tl.dot(w, fi, acc=yi, input_precision="ieee")
    place = values + row * OUTER * (2 * CHIP) + k[None, :] * (2 * CHIP) + column[:, None]
    tl.store(place, yr.to(values.dtype.element_ty), mask=(k < OUTER)[None, :])
    tl.store(place + CHIP, yi.to(values.dtype.element_ty), mask=(k < OUTER)[None, :])


@triton.jit
def outer_inverse(
    values,
    scale,
    gain,
    u,
    pregate,
    direct,
    gate1,
    y1,
    gate2,
    y2,
    matrix,
    group,
    channels,
    length,
    OUTER,
    CHIP: tl.constexpr,
    LINES: tl.constexpr,
    POINTS: tl.constexpr,
):
    """Last stage: x + direct * pregate * u, times gate1 into y1 and times gate2 into y2. Grid as `outer_transform`."""
    row = tl.program_id(0).to(tl.int64)
    filter_ = (row % channels) // group
    n1 = tl.program_id(1) * LINES + tl.arange(0, LINES)
    column = tl.program_id(2) * POINTS + tl.arange(0, POINTS)
    x = tl.full((POINTS, LINES), 0.0, tl.float32)
    for first in range(0, OUTER, LINES):
        k = first + tl.arange(0, LINES)
        place = values + row * OUTER * (2 * CHIP) + k[None, :] * (2 * CHIP) + column[:, None]
        vr = tl.load(place, mask=(k < OUTER)[None, :], other=0.0)
        vi = tl.load(place + CHIP, mask=(k < OUTER)[None, :], other=0.0)
        at = k[:, None] + n1[None, :] * OUTER
        inside = (k < OUTER)[:, None] & (n1 < OUTER)[None, :]
        fr = tl.load(matrix + at, mask=inside, other=0.0)
        fi = tl.load(matrix + OUTER * OUTER + at, mask=inside, other=0.0)
        x = tl.dot(vr, fr, acc=x, input_precision="ieee")
        x = tl.dot(vi, fi, acc=x, input_precision="ieee")
    x *= _number(scale, row, 1.0) * _number(gain, filter_, 1.0)
    n = column[:, None] + n1[None, :] * CHIP
    inside = (n1 < OUTER)[None, :] & (n < length)
    if direct is not None:
        x += tl.load(direct + filter_) * _load(u, pregate, row * length + n, inside)
    if y1 is not None:
        _store(y1, gate1, x, row * length + n, inside)
    if y2 is not None:
        _store(y2, gate2, x, row * length + n, inside)


@triton.jit
def _store_inverse(
    values, at, xr, xi, twist_r, twist_i, matrices, twiddles, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr
):
    """Inverse of `_transform`, complex, with the twist taken off."""
    yr, yi = _inverse_but_first(xr, xi, matrices, twiddles, N1, N2, N3)
    fr, fi = _transposed_table(matrices, N1, N1)
    yr, yi = _product(yr, yi, fr, -fi)
    yr, yi = _times(yr, yi, twist_r, -twist_i)
    tl.store(values + at, yr.to(values.dtype.element_ty))
    tl.store(values + N1 * N2 * N3 + at, yi.to(values.dtype.element_ty))


@triton.jit
def inner(
    w_values,
    g_values,
    w_scale,
    g_scale,
    spectrum,
    grad_spectrum,
    twists,
    matrices,
    twiddles,
    rows,
    share,
    group,
    channels,
    CONVOLVE: tl.constexpr,
    CORRELATE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
):
    """Middle stages, for one k1 of `share` rows of a filter, in place. Grid (shares, P, H).

    With CONVOLVE w_values (rows, P, 2, N1 M) are multiplied by the spectrum, with CORRELATE g_values by its conjugate;
    grad_spectrum (shares, H, P, 2, N1 M) takes the sum of conj(W w) W g. Twists carry on the first stage's twiddle:
    (P, N1) and (P, M), since n2 = n1 M + m.
    """
    M: tl.constexpr = N2 * N3
    k = tl.program_id(1)
    outer = tl.num_programs(1)
    filter_ = tl.program_id(2)
    first = tl.program_id(0) * share
    part = filter_ * outer + k
    line = tl.arange(0, M)[:, None]
    column = tl.arange(0, N1)[None, :]
    fine = twists + 2 * outer * N1
    twist_r, twist_i = _times(
        tl.load(twists + k * N1 + column),
        tl.load(twists + (outer + k) * N1 + column),
        tl.load(fine + k * M + line),
        tl.load(fine + (outer + k) * M + line),
    )
    kr, ki = _table(spectrum + part.to(tl.int64) * (2 * N1 * M), N1, M)
    sum_r = tl.full((N1, M), 0.0, tl.float32)
    sum_i = tl.full((N1, M), 0.0, tl.float32)
    for i in range(first, tl.minimum(first + share, rows)):
        row = (i // group) * channels + filter_ * group + i % group
        at = (row.to(tl.int64) * outer + k) * (2 * N1 * M) + column * M + line
        if CONVOLVE or grad_spectrum is not None:
            wr = tl.load(w_values + at).to(tl.float32)
            wi = tl.load(w_values + N1 * M + at).to(tl.float32)
            wr, wi = _times(wr, wi, twist_r, twist_i)
            wr, wi = _transform(wr, wi, matrices, twiddles, False, N1, N2, N3)
        if CORRELATE or grad_spectrum is not None:
            gr = tl.load(g_values + at).to(tl.float32)
            gi = tl.load(g_values + N1 * M + at).to(tl.float32)
            gr, gi = _times(gr, gi, twist_r, twist_i)
            gr, gi = _transform(gr, gi, matrices, twiddles, False, N1, N2, N3)
        if grad_spectrum is not None:
            pr, pi = _times(gr, gi, wr, -wi)
            scale = _number(g_scale, row, 1.0) * _number(w_scale, row, 1.0)
            sum_r += pr * scale
            sum_i += pi * scale
        if CONVOLVE:
            wr, wi = _times(wr, wi, kr, ki)
            _store_inverse(w_values, at, wr, wi, twist_r, twist_i, matrices, twiddles, N1, N2, N3)
        if CORRELATE:
            gr, gi = _times(gr, gi, kr, -ki)
            _store_inverse(g_values, at, gr, gi, twist_r, twist_i, matrices, twiddles, N1, N2, N3)
    if grad_spectrum is not None:
        partial = (tl.program_id(0) * tl.num_programs(2) + filter_).to(tl.int64) * outer + k
        cell = tl.arange(0, N1)[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(grad_spectrum + partial * (2 * N1 * M) + cell, sum_r)
        tl.store(grad_spectrum + partial * (2 * N1 * M) + N1 * M + cell, sum_i)
