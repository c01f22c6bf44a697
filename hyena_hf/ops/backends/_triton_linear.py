# SPDX-License-Identifier: Apache-2.0
"""Sums of causal linear attention over chunks: forward and gradients as Triton programs.

Imported on first use, as `_triton_kernels`. Formulas, the shift of keys, and what runs when are in
`triton_linear.py`, which calls it; here is what the programs share.

Keys are counted by the place where the first query sees them: place j of key j + shift is seen by queries t >= j. A
chunk holds C places and C queries of the same numbers. Its queries see the keys of earlier chunks by a state
(F, P + 1), the sums of phi(k) [v, 1], and those of its own pair by pair. The column of ones is never stored. Gradients
of keys come from a state of later queries, the sums of phi(q) [g, g'], g the gradient of the P sums of a query and g'
that of its normaliser.

With LOG, states are relative to exp of the largest logarithm of every feature so far (F,), its scale, and sums of a
query to exp of its top, which is no less than any logarithm of a feature of it and of a state together; pairs are two
products, as `_log_products` of `hyena_hf.ops.linear_attention` says. A state of gradients belongs to the state of keys
behind the same chunk, and has its scale. So no exponent of a state is above 0, in gradients neither.

All products are of float32 numbers with float32 sums, whatever the dtype in memory. Every sum runs in one program in a
fixed order: no atomics, the same bits every time.
"""

# ruff: noqa: PLR0913  kernels have no objects to group their arguments in
# Triton passes plain numbers as constexpr, and leaves out branches on them before it looks for unbound names:
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalOperand=false

import triton
import triton.language as tl
from triton import knobs

# not tl.max and tl.sum: jitted functions, of which an interpreted kernel can call those only that are interpreted too
from triton.language.standard import _elementwise_max, _sum_combine


INTERPRETED = bool(knobs.runtime.interpret)

# arguments whose values are no reason to compile anew
LENGTHS = ["queries", "keys", "shift", "limit", "first", "chunks"]

NOTHING = tl.constexpr(-1e30)  # the logarithm of nothing, as in `hyena_hf.ops.linear_attention`
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
LOG_TINY = tl.constexpr(-87.33654475055310)


@triton.jit
def _sum(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, _sum_combine)


@triton.jit
def _max(x, AXIS: tl.constexpr):
    return tl.reduce(x, AXIS, _elementwise_max)


@triton.jit
def _tile(x, rows, width, column, there, FILL: tl.constexpr):
    """Rows and columns of x (.., width) in float32; FILL outside, which is never read."""
    inside = there[:, None] & (column < width)[None, :]
    found = tl.load(x + rows[:, None] * width + column[None, :], mask=inside, other=0.0)
    return tl.where(inside, found.to(tl.float32), FILL)


@triton.jit
def _state(x, feature, column, features, width):
    """Columns of a state (F, P + 1), 0 outside the first P."""
    inside = (feature < features)[:, None] & (column < width)[None, :]
    return tl.load(x + feature[:, None] * (width + 1) + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normaliser(x, feature, features, width):
    """The last column of a state."""
    return tl.load(x + feature * (width + 1) + width, mask=feature < features, other=0.0).to(tl.float32)


@triton.jit
def _store_row(x, row, feature, features, leads):
    """A number of every feature (F,), where `leads`: of the programs that share a block of features, one stores it."""
    if leads:
        tl.store(x, row.to(x.dtype.element_ty), mask=feature < features)


@triton.jit
def _store_state(x, s, z, feature, column, features, width, leads):
    """Columns of a state, and its normaliser."""
    inside = (feature < features)[:, None] & (column < width)[None, :]
    tl.store(x + feature[:, None] * (width + 1) + column[None, :], s.to(x.dtype.element_ty), mask=inside)
    _store_row(x + feature * (width + 1) + width, z, feature, features, leads)


@triton.jit
def _keys_there(mask, row, start, line, key_heads, keys, shift, limit):
    """Which keys of a chunk exist: inside the row, within the limit, and not masked."""
    key = start + shift + line
    there = (key >= 0) & (key < keys) & (start + line < limit)
    if mask is not None:
        there = there & (tl.load(mask + (row // key_heads) * keys + key, mask=there, other=0) != 0)
    return there


@triton.jit
def _products(q, k, line, asks, there, features, PRECISION: tl.constexpr, C: tl.constexpr, BF: tl.constexpr):
    """phi(q) . phi(k) of all queries and keys of a chunk (C, C)."""
    pairs = tl.full((C, C), 0.0, tl.float32)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        x = _tile(q, line, features, f, asks, 0.0)
        y = _tile(k, line, features, f, there, 0.0)
        pairs = tl.dot(x, tl.trans(y), acc=pairs, input_precision=PRECISION)
    return pairs


@triton.jit
def _largest(k_tile):
    """The largest logarithm of every feature (BF,) among keys (C, BF)."""
    return tl.maximum(_max(k_tile, 0), NOTHING)


@triton.jit
def _log_products(q, k, line, asks, there, features, PRECISION: tl.constexpr, C: tl.constexpr, BF: tl.constexpr):
    """The same for logarithms of features, as two products that are exact where they do not underflow.

    Returns:
        by_token (C, C) relative to exp(q_top + k_top), by_feature (C, C) relative to exp(by_top), and these tops (C,).
    """
    q_top = tl.full((C,), NOTHING, tl.float32)
    k_top = tl.full((C,), NOTHING, tl.float32)
    by_top = tl.full((C,), NOTHING, tl.float32)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        x = _tile(q, line, features, f, asks, float("-inf"))
        y = _tile(k, line, features, f, there, float("-inf"))
        q_top = tl.maximum(q_top, _max(x, 1))
        k_top = tl.maximum(k_top, _max(y, 1))
        by_top = tl.maximum(by_top, _max(x + _largest(y)[None, :], 1))
    by_token = tl.full((C, C), 0.0, tl.float32)
    by_feature = tl.full((C, C), 0.0, tl.float32)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        x = _tile(q, line, features, f, asks, float("-inf"))
        y = _tile(k, line, features, f, there, float("-inf"))
        left = tl.exp(x - q_top[:, None])
        right = tl.exp(y - k_top[:, None])
        by_token = tl.dot(left, tl.trans(right), acc=by_token, input_precision=PRECISION)
        top = _largest(y)
        left = tl.exp(x + top[None, :] - by_top[:, None])
        right = tl.exp(y - top[None, :])
        by_feature = tl.dot(left, tl.trans(right), acc=by_feature, input_precision=PRECISION)
    return by_token, by_feature, q_top, k_top, by_top


@triton.jit
def _logs(by_token, by_feature, q_top, k_top, by_top):
    """Logarithms of weights (C, C), and which of the two products each is of: neither where both underflow."""
    bound = q_top[:, None] + k_top[None, :]
    first = tl.where(by_token > TINY, tl.log(tl.maximum(by_token, TINY)) + bound, float("-inf"))
    second = tl.where(by_feature > TINY, tl.log(tl.maximum(by_feature, TINY)) + by_top[:, None], float("-inf"))
    found = tl.maximum(first, second)
    none = found == float("-inf")
    is_first = (first >= second) & (by_token > TINY)
    is_second = (second > first) & (by_feature > TINY)
    return tl.where(none, bound + LOG_TINY, found), is_first, is_second


@triton.jit
def _log_weights(logs, top, visible):
    return tl.where(visible, tl.exp(tl.minimum(logs - top[:, None], 0.0)), 0.0)


@triton.jit
def _read_features(q, scale, top, line, asks, feature, features, LOG: tl.constexpr):
    """What queries multiply a state with (C, BF): their features, or exp of logarithms + scale - top."""
    if LOG:
        of_feature = tl.load(scale + feature, mask=feature < features, other=NOTHING)
        x = _tile(q, line, features, feature, asks, float("-inf"))
        return tl.exp(x + of_feature[None, :] - top[:, None])
    else:
        return _tile(q, line, features, feature, asks, 0.0)


@triton.jit
def _folded_features(k, scale, line, there, feature, features, LOG: tl.constexpr):
    """What keys add to the state behind their chunk (C, BF): their features, or exp of logarithms - scale."""
    if LOG:
        of_feature = tl.load(scale + feature, mask=feature < features, other=NOTHING)
        return tl.exp(_tile(k, line, features, feature, there, float("-inf")) - of_feature[None, :])
    else:
        return _tile(k, line, features, feature, there, 0.0)


@triton.jit
def _grad(g, line, column, asks, width):
    inside = asks[:, None] & (column < width)[None, :]
    return tl.load(g + line[:, None] * (width + 1) + column[None, :], mask=inside, other=0.0)


@triton.jit
def _grad_of_normaliser(g, line, asks, width):
    return tl.load(g + line * (width + 1) + width, mask=asks, other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def fold(
    k,
    v,
    mask,
    sums,
    scale,
    carry,
    states,
    scales,
    new_sums,
    new_scale,
    new_carry,
    key_heads,
    keys,
    features,
    width,
    shift,
    limit,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """The state before each of `chunks` chunks from `first` on, and behind the last. Grid (B K, blocks of F, of P).

    k (B K, N, F), v (B K, N, P), mask (B, N); sums and carry (B K, F, P + 1), scale (B K, F), also the new ones;
    states (B K, chunks, F, P + 1), scales (B K, chunks + 1, F), with that behind the last chunk. Sums are compensated
    (Kahan 1965), as those of PyTorch are.
    """
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    leads = tl.program_id(2) == 0
    line = tl.arange(0, C)
    size = features * (width + 1)
    s = _state(sums + row * size, f, p, features, width)
    z = _normaliser(sums + row * size, f, features, width)
    s_carry = tl.full((BF, BP), 0.0, tl.float32)
    z_carry = tl.full((BF,), 0.0, tl.float32)
    top = tl.full((BF,), NOTHING, tl.float32)
    if carry is not None:
        s_carry = _state(carry + row * size, f, p, features, width)
        z_carry = _normaliser(carry + row * size, f, features, width)
    if LOG:
        top = tl.load(scale + row * features + f, mask=f < features, other=NOTHING)
    scales_at = scales
    if LOG:
        scales_at = scales + row * (chunks + 1) * features + f
    for c in range(chunks):
        _store_state(states + (row * chunks + c) * size, s, z, f, p, features, width, leads)
        if LOG:
            _store_row(scales_at + c * features, top, f, features, leads)
        start = (first + c) * C
        there = _keys_there(mask, row, start, line, key_heads, keys, shift, limit)
        begin = row * keys + (start + shift)
        values = _tile(v + begin * width, line, width, p, there, 0.0)
        if LOG:
            x = _tile(k + begin * features, line, features, f, there, float("-inf"))
            higher = tl.maximum(top, _max(x, 0))
            shrink = tl.exp(top - higher)
            s *= shrink[:, None]
            s_carry *= shrink[:, None]
            z *= shrink
            z_carry *= shrink
            x = tl.exp(x - higher[None, :])
            top = higher
        else:
            x = _tile(k + begin * features, line, features, f, there, 0.0)
        added = tl.dot(tl.trans(x), values, input_precision=PRECISION) - s_carry
        total = s + added
        s_carry = (total - s) - added
        s = total
        also = _sum(x, 0) - z_carry
        whole = z + also
        z_carry = (whole - z) - also
        z = whole
    _store_state(new_sums + row * size, s, z, f, p, features, width, leads)
    if new_carry is not None:
        _store_state(new_carry + row * size, s_carry, z_carry, f, p, features, width, leads)
    if LOG:
        _store_row(scales_at + chunks * features, top, f, features, leads)
        _store_row(new_scale + row * features + f, top, f, features, leads)


@triton.jit(do_not_specialize=LENGTHS)
def attend(
    q,
    k,
    v,
    mask,
    states,
    scales,
    sums,
    tops,
    groups,
    key_heads,
    queries,
    keys,
    features,
    width,
    shift,
    limit,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """Sums of [v, 1] of all queries of a chunk, from its state and its own keys. Grid (B H, chunks).

    q (B H, n, F), sums (B H, n, P + 1), tops (B H, n): what sums are relative to; the others as in `fold`.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // groups
    c = tl.program_id(1)
    line = tl.arange(0, C)
    start = (first + c) * C
    asks = (start + line >= 0) & (start + line < queries)
    there = _keys_there(mask, row, start, line, key_heads, keys, shift, limit)
    visible = (line[:, None] >= line[None, :]) & there[None, :]
    begin = row * keys + (start + shift)
    q_at = q + (head * queries + start) * features
    k_at = k + begin * features
    state = states + (row * chunks + c) * (features * (width + 1))
    top = tl.full((C,), 0.0, tl.float32)
    scale = scales
    if LOG:
        scale = scales + (row * (chunks + 1) + c) * features
        by_token, by_feature, q_top, k_top, by_top = _log_products(
            q_at, k_at, line, asks, there, features, PRECISION, C, BF
        )
        logs, _, _ = _logs(by_token, by_feature, q_top, k_top, by_top)
        top = _max(tl.where(visible, logs, NOTHING), 1)
        for low in range(0, features, BF):
            f = low + tl.arange(0, BF)
            of_feature = tl.load(scale + f, mask=f < features, other=NOTHING)
            x = _tile(q_at, line, features, f, asks, float("-inf"))
            top = tl.maximum(top, _max(x + of_feature[None, :], 1))
        weights = _log_weights(logs, top, visible)
        tl.store(tops + head * queries + start + line, top, mask=asks)
    else:
        weights = tl.where(visible, _products(q_at, k_at, line, asks, there, features, PRECISION, C, BF), 0.0)
    sums_at = sums + (head * queries + start) * (width + 1) + line * (width + 1)
    total = _sum(weights, 1)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        x = _read_features(q_at, scale, top, line, asks, f, features, LOG)
        total += _sum(x * _normaliser(state, f, features, width)[None, :], 1)
    tl.store(sums_at + width, total, mask=asks)
    for at in range(0, width, BP):
        p = at + tl.arange(0, BP)
        values = _tile(v + begin * width, line, width, p, there, 0.0)
        y = tl.dot(weights, values, input_precision=PRECISION)
        for low in range(0, features, BF):
            f = low + tl.arange(0, BF)
            x = _read_features(q_at, scale, top, line, asks, f, features, LOG)
            y = tl.dot(x, _state(state, f, p, features, width), acc=y, input_precision=PRECISION)
        tl.store(sums_at[:, None] + p[None, :], y, mask=asks[:, None] & (p < width)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def grad_queries(
    q,
    k,
    v,
    mask,
    g,
    tops,
    states,
    scales,
    grad_q,
    pairs,
    levels,
    groups,
    key_heads,
    queries,
    keys,
    features,
    width,
    shift,
    limit,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """Gradient of the queries of a chunk (B H, n, F), and what those of its keys and values need. Grid (B H, chunks).

    g (B H, n, P + 1) is the gradient of the sums. pairs (B H, chunks, 3, C, C) takes the weights and the gradients of
    the products that they are of: one of plain features, else those by token and by feature; levels
    (B H, chunks, 3, C) the tops of these.
    """
    head = tl.program_id(0).to(tl.int64)
    row = head // groups
    c = tl.program_id(1)
    line = tl.arange(0, C)
    start = (first + c) * C
    asks = (start + line >= 0) & (start + line < queries)
    there = _keys_there(mask, row, start, line, key_heads, keys, shift, limit)
    visible = (line[:, None] >= line[None, :]) & there[None, :]
    begin = row * keys + (start + shift)
    q_at = q + (head * queries + start) * features
    k_at = k + begin * features
    g_at = g + (head * queries + start) * (width + 1)
    state = states + (row * chunks + c) * (features * (width + 1))
    pair = pairs + (head * chunks + c) * (3 * C * C) + line[:, None] * C + line[None, :]
    of_normaliser = _grad_of_normaliser(g_at, line, asks, width)
    of_first = tl.full((C, C), 0.0, tl.float32)
    for low in range(0, width, BP):
        p = low + tl.arange(0, BP)
        values = _tile(v + begin * width, line, width, p, there, 0.0)
        grad = _grad(g_at, line, p, asks, width)
        of_first = tl.dot(grad, tl.trans(values), acc=of_first, input_precision=PRECISION)
    of_first = tl.where(visible, of_first + of_normaliser[:, None], 0.0)
    of_query = tl.full((C,), 0.0, tl.float32)
    scale = scales
    if LOG:
        scale = scales + (row * (chunks + 1) + c) * features
        of_query = tl.load(tops + head * queries + start + line, mask=asks, other=0.0)
        by_token, by_feature, q_top, k_top, by_top = _log_products(
            q_at, k_at, line, asks, there, features, PRECISION, C, BF
        )
        logs, is_first, is_second = _logs(by_token, by_feature, q_top, k_top, by_top)
        weights = _log_weights(logs, of_query, visible)
        of_logs = of_first * weights
        of_first = tl.where(is_first, of_logs / tl.maximum(by_token, TINY), 0.0)
        of_second = tl.where(is_second, of_logs / tl.maximum(by_feature, TINY), 0.0)
        tl.store(pair + 2 * C * C, of_second)
        level = levels + (head * chunks + c) * (3 * C) + line
        tl.store(level, q_top)
        tl.store(level + C, k_top)
        tl.store(level + 2 * C, by_top)
    else:
        weights = tl.where(visible, _products(q_at, k_at, line, asks, there, features, PRECISION, C, BF), 0.0)
    tl.store(pair, weights)
    tl.store(pair + C * C, of_first)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        total = of_normaliser[:, None] * _normaliser(state, f, features, width)[None, :]
        for at in range(0, width, BP):
            p = at + tl.arange(0, BP)
            s = _state(state, f, p, features, width)
            grad = _grad(g_at, line, p, asks, width)
            total = tl.dot(grad, tl.trans(s), acc=total, input_precision=PRECISION)
        if LOG:
            total *= _read_features(q_at, scale, of_query, line, asks, f, features, LOG)
            x = _tile(q_at, line, features, f, asks, float("-inf"))
            y = _tile(k_at, line, features, f, there, float("-inf"))
            found = tl.dot(of_first, tl.exp(y - k_top[:, None]), input_precision=PRECISION)
            total += found * tl.exp(x - q_top[:, None])
            largest = _largest(y)
            found = tl.dot(of_second, tl.exp(y - largest[None, :]), input_precision=PRECISION)
            total += found * tl.exp(x + largest[None, :] - by_top[:, None])
        else:
            y = _tile(k_at, line, features, f, there, 0.0)
            total = tl.dot(of_first, y, acc=total, input_precision=PRECISION)
        out = grad_q + (head * queries + start) * features + line[:, None] * features + f[None, :]
        tl.store(out, total.to(grad_q.dtype.element_ty), mask=asks[:, None] & (f < features)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def unfold(
    q,
    g,
    tops,
    sums,
    scales,
    states,
    new_sums,
    groups,
    queries,
    features,
    width,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """The gradient of the state behind each chunk, from the last one back. Grid (B K, blocks of F, of P).

    sums (B K, F, P + 1), the gradient of the state behind the last chunk; states (B K, chunks, F, P + 1), those behind
    every chunk; new_sums, that before the first. Each belongs to sums relative to exp of the scale in its place.
    """
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    leads = tl.program_id(2) == 0
    line = tl.arange(0, C)
    size = features * (width + 1)
    s = _state(sums + row * size, f, p, features, width)
    z = _normaliser(sums + row * size, f, features, width)
    for back in range(chunks):
        c = chunks - 1 - back
        _store_state(states + (row * chunks + c) * size, s, z, f, p, features, width, leads)
        scale = scales
        if LOG:
            scale = scales + (row * (chunks + 1) + c) * features
            before = tl.load(scale + f, mask=f < features, other=NOTHING)
            behind = tl.load(scale + features + f, mask=f < features, other=NOTHING)
            shrink = tl.exp(before - behind)
            s *= shrink[:, None]
            z *= shrink
        start = (first + c) * C
        asks = (start + line >= 0) & (start + line < queries)
        for member in range(groups):
            begin = (row * groups + member) * queries + start
            of_query = tl.full((C,), 0.0, tl.float32)
            if LOG:
                of_query = tl.load(tops + begin + line, mask=asks, other=0.0)
            x = _read_features(q + begin * features, scale, of_query, line, asks, f, features, LOG)
            grad = _grad(g + begin * (width + 1), line, p, asks, width)
            of_normaliser = _grad_of_normaliser(g + begin * (width + 1), line, asks, width)
            s = tl.dot(tl.trans(x), grad, acc=s, input_precision=PRECISION)
            z += _sum(x * of_normaliser[:, None], 0)
    _store_state(new_sums + row * size, s, z, f, p, features, width, leads)


@triton.jit(do_not_specialize=LENGTHS)
def grad_keys(
    q,
    k,
    v,
    mask,
    states,
    scales,
    grad_k,
    pairs,
    levels,
    groups,
    key_heads,
    queries,
    keys,
    features,
    width,
    shift,
    limit,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """Gradient of the keys of a chunk (B K, N, F), from what `unfold` and `grad_queries` wrote.

    Grid (B K, chunks, blocks of F).
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    f = tl.program_id(2) * BF + tl.arange(0, BF)
    line = tl.arange(0, C)
    start = (first + c) * C
    asks = (start + line >= 0) & (start + line < queries)
    there = _keys_there(mask, row, start, line, key_heads, keys, shift, limit)
    begin = row * keys + (start + shift)
    k_at = k + begin * features
    state = states + (row * chunks + c) * (features * (width + 1))
    total = tl.full((C, BF), 0.0, tl.float32)
    for low in range(0, width, BP):
        p = low + tl.arange(0, BP)
        values = _tile(v + begin * width, line, width, p, there, 0.0)
        s = _state(state, f, p, features, width)
        total = tl.dot(values, tl.trans(s), acc=total, input_precision=PRECISION)
    total += _normaliser(state, f, features, width)[None, :]
    if LOG:
        total *= _folded_features(
            k_at, scales + (row * (chunks + 1) + c + 1) * features, line, there, f, features, LOG
        )
        y = _tile(k_at, line, features, f, there, float("-inf"))
        largest = _largest(y)
    for member in range(groups):
        head = row * groups + member
        pair = pairs + (head * chunks + c) * (3 * C * C) + line[:, None] * C + line[None, :]
        of_first = tl.load(pair + C * C)
        q_at = q + (head * queries + start) * features
        if LOG:
            level = levels + (head * chunks + c) * (3 * C) + line
            x = _tile(q_at, line, features, f, asks, float("-inf"))
            left = tl.exp(x - tl.load(level)[:, None])
            found = tl.dot(tl.trans(of_first), left, input_precision=PRECISION)
            total += found * tl.exp(y - tl.load(level + C)[:, None])
            left = tl.exp(x + largest[None, :] - tl.load(level + 2 * C)[:, None])
            found = tl.dot(tl.trans(tl.load(pair + 2 * C * C)), left, input_precision=PRECISION)
            total += found * tl.exp(y - largest[None, :])
        else:
            x = _tile(q_at, line, features, f, asks, 0.0)
            total = tl.dot(tl.trans(of_first), x, acc=total, input_precision=PRECISION)
    at = grad_k + begin * features + line[:, None] * features + f[None, :]
    tl.store(at, total.to(grad_k.dtype.element_ty), mask=there[:, None] & (f < features)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def grad_values(
    k,
    mask,
    g,
    states,
    scales,
    grad_v,
    pairs,
    groups,
    key_heads,
    queries,
    keys,
    features,
    width,
    shift,
    limit,
    first,
    chunks,
    LOG: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BP: tl.constexpr,
):
    """Gradient of the values of a chunk (B K, N, P), likewise. Grid (B K, chunks, blocks of P)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    line = tl.arange(0, C)
    start = (first + c) * C
    asks = (start + line >= 0) & (start + line < queries)
    there = _keys_there(mask, row, start, line, key_heads, keys, shift, limit)
    begin = row * keys + (start + shift)
    state = states + (row * chunks + c) * (features * (width + 1))
    scale = scales
    if LOG:
        scale = scales + (row * (chunks + 1) + c + 1) * features
    total = tl.full((C, BP), 0.0, tl.float32)
    for low in range(0, features, BF):
        f = low + tl.arange(0, BF)
        y = _folded_features(k + begin * features, scale, line, there, f, features, LOG)
        total = tl.dot(y, _state(state, f, p, features, width), acc=total, input_precision=PRECISION)
    for member in range(groups):
        head = row * groups + member
        weights = tl.load(pairs + (head * chunks + c) * (3 * C * C) + line[:, None] * C + line[None, :])
        grad = _grad(g + (head * queries + start) * (width + 1), line, p, asks, width)
        total = tl.dot(tl.trans(weights), grad, acc=total, input_precision=PRECISION)
    at = grad_v + begin * width + line[:, None] * width + p[None, :]
    tl.store(at, total.to(grad_v.dtype.element_ty), mask=there[:, None] & (p < width)[None, :])
