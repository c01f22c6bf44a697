# SPDX-License-Identifier: Apache-2.0
"""Linear attention: softmax's exp(q . k) replaced by phi(q) . phi(k), so that a sum over the past is a state.

    y_t = sum_i w_ti v_i / sum_i w_ti,    w_ti = phi(q_t) . phi(k_i)                       (Katharopoulos et al. 2020)

With a window of w tokens those that a query sees within it, itself included, keep a softmax weight, and the linear
form serves the older ones (LoLCATs, Zhang et al. 2024, arXiv 2410.10254, equation 7):

    w_ti = g exp(s_ti - c_t)     for t - w < i <= t,    s_ti the scaled score, c_t its maximum over the window
    w_ti = phi(q_t) . phi(k_i)   for i <= t - w

Features come in one of two forms. Plain ones may have signs. Of positive ones the logarithms may be given instead
(`log_features=True`): exponential feature maps then neither overflow nor lose small features beside large ones. Sums
are carried relative to a running maximum, of every feature for keys and of every token for queries, as online softmax
does, and c_t is left out: window and linear weights share one scale, and no weight depends on what others happen to be
in the window. Between the tokens of a chunk a weight is exact unless it lies e^68 (in float32) below the product of
the largest features of its query and key, and as far below that of its query with the largest keys of the chunk;
outputs stay means of values beyond that, but depend on which tokens share a chunk. Plain features have no scale: a
query whose products with all keys are below 2e-30 (in float32) gets 0, or a mean of values without a gradient.

Sums run in float32 at least, whatever the dtype of the inputs and under autocast: a normaliser in bfloat16 stops
growing. Nothing is added to it: a query that sees no key gets 0.

By which backend: `torch` is the formulas below, on every device and in every dtype; `triton` sums chunks in kernels of
its own, on CUDA devices, and is taken there on its own account where a row is longer than a chunk.

B batch, H query heads, K heads of keys and values (H a multiple of K), n queries, N keys, F features, P head width, G
query heads of a group (H / K).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backends import triton_linear
from .engine import is_traced
from .precision import outside_autocast


BACKENDS = ("torch", "triton")

# Queries that meet their nearest keys in one product; the others go through the state.
CHUNK = 64

# Chunks between which gradients keep a state; what lies inside is computed again.
_KEPT_CHUNKS = 16


def smallest_kept(dtype: torch.dtype) -> float:
    """The smallest product of features that is told from nothing: gradients divide by it and are summed over keys.

    That leaves them 2^27 before they overflow, for many keys and for losses that are scaled up (`GradScaler`).
    """
    return torch.finfo(dtype).tiny * 2.0**27


# The logarithm of nothing: finite, so that the difference of two of them is no NaN.
_NOTHING = -1e30


class LinearState(NamedTuple):
    """Everything that linear attention knows of the keys and values folded into it.

    Attributes:
        sums: sum_i phi(k_i) [v_i, 1] (B, K, F, P + 1), float32 at least; each feature relative to exp(log_scale).
        log_scale: (B, K, F), the largest logarithm of each feature so far; None for plain features.
        carry: What rounding has added to the sums and not yet given back (Kahan 1965), in bfloat16, which holds a
            difference well enough; None for float64 sums. Without it a sum of many equal terms drifts.
    """

    sums: Tensor
    log_scale: Tensor | None
    carry: Tensor | None


@dataclass(frozen=True)
class SoftmaxWindow:
    """The tokens whose weights are those of softmax attention.

    Attributes:
        query: (B, H, n, P), scaled: scores are query . key.
        key: (B, K, N, P).
        size: Keys that a query sees, itself included; at least 1. A bidirectional one sees as many on either side.
        log_weight: Logarithm of g, the factor on the weights of the window, for every head (H,); None: 0.
    """

    query: Tensor
    key: Tensor
    size: int
    log_weight: Tensor | None = None


class _Sums(NamedTuple):
    """Weighted sums of [v, 1] for every query (B, K, G, n, P + 1), relative to exp(log_scale) (B, K, G, n, 1)."""

    values: Tensor
    log_scale: Tensor | None


@outside_autocast
def causal_linear_attention(  # noqa: PLR0913 (what is attended to, how, and by whom)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_features: bool = False,
    window: SoftmaxWindow | None = None,
    mask: Tensor | None = None,
    state: LinearState | None = None,
    chunk_size: int = CHUNK,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Linear attention to keys that do not come later, hybrid with a window of softmax attention.

    The queries are those of the last n of N columns. Earlier columns, N - n of them, and a state continue an earlier
    call: the state covers everything before the first column. Without a window nothing is needed but the state; with
    one, the last `window.size - 1` keys, window keys and values have to be given again.

    Time is O(N F (chunk_size + P)) and memory beyond inputs and outputs that of a few chunks, with gradients too.
    Graphs that are exported for any N hold the parallel form, whatever chunk_size says.

    Args:
        q: Features of queries (B, H, n, F), or their logarithms.
        k: Features of keys (B, K, N, F), or their logarithms; K divides H. Those of the last `window.size - 1` columns
            are not read and may be left out.
        v: Values (B, K, N, P).
        log_features: Whether q and k are logarithms of features.
        window: Softmax attention to the nearest tokens.
        mask: True for the keys that exist (B, N); None: all.
        state: What earlier calls returned.
        chunk_size: Queries at a time; N or more is the parallel form. Results do not depend on it but for rounding.
            `triton` takes the next power of two, from 16 to 64, or to 32 for logarithms.
        backend: One of `BACKENDS`, or None: `triton` on CUDA devices where it serves and n is more than a chunk,
            `torch` elsewhere and in compiled graphs.

    Returns:
        Outputs (B, H, n, P) in the dtype of v, and the state of the first N - window.size + 1 columns (without a
        window: all). By `triton` they are differentiable once.

    Raises:
        ValueError: Shapes do not fit together, or the backend does not exist or cannot serve.
    """
    _check(q, k, v, window, mask, state, log_features, chunk_size)
    delay = 0 if window is None else window.size
    groups = q.shape[1] // k.shape[1]
    if _chosen(backend, q, k, v, state, log_features, chunk_size) == "triton":
        k = nn.functional.pad(k, (0, 0, 0, v.shape[2] - k.shape[2]))
        linear, state = _fused_sums(q, k, v, mask, state, delay, log_features, chunk_size)
        near = None
        if window is not None:
            near = _window_sums(window, with_ones(v, mask), mask, groups, chunk_size, both_sides=False)
        return _normalised([linear], near, window, groups).to(v.dtype), state
    queries, keys, values = _operands(q, k, v, log_features, mask)
    if state is None:
        state = empty_state(keys, v.shape[-1], log_features=log_features)
        if has_unknown_length(v) and q.shape[2] == v.shape[2]:
            linear, near = _all_pairs(queries, keys, values, window, mask, groups, logs=log_features, both_sides=False)
            state = fold(state, _until(keys, delay, logs=log_features), values)
            return _normalised([linear], near, window, groups).to(v.dtype), state
    linear, state = _linear_sums(queries, keys, values, state, delay, groups, chunk_size)
    near = None if window is None else _window_sums(window, values, mask, groups, chunk_size, both_sides=False)
    return _normalised([linear], near, window, groups).to(v.dtype), state


@outside_autocast
def bidirectional_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_features: bool = False,
    window: SoftmaxWindow | None = None,
    mask: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> Tensor:
    """Linear attention to all keys, hybrid with softmax attention to those less than `window.size` tokens away.

    Args:
        q, k, v, log_features, window, mask, chunk_size: As in `causal_linear_attention`, with as many keys as queries.

    Returns:
        (B, H, n, P) in the dtype of v.

    Raises:
        ValueError: Shapes do not fit together.
    """
    _check(q, k, v, window, mask, None, log_features, chunk_size)
    if not q.shape[2] == k.shape[2] == v.shape[2]:
        raise ValueError(f"bidirectional attention takes as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = _operands(q, k, v, log_features, mask)
    nothing = empty_state(keys, v.shape[-1], log_features=log_features)
    if window is None:
        linear = [_state_sums(queries, fold(nothing, keys, values), groups)]
        return _normalised(linear, None, None, groups).to(v.dtype)
    if has_unknown_length(v):
        linear, near = _all_pairs(queries, keys, values, window, mask, groups, logs=log_features, both_sides=True)
        return _normalised([linear], near, window, groups).to(v.dtype)
    earlier, _ = _linear_sums(queries, keys, values, nothing, window.size, groups, chunk_size)
    turned = queries.flip(2), keys.flip(2), values.flip(2)
    later, _ = _linear_sums(turned[0], turned[1], turned[2], nothing, window.size, groups, chunk_size)
    later = _Sums(later.values.flip(3), None if later.log_scale is None else later.log_scale.flip(3))
    near = _window_sums(window, values, mask, groups, chunk_size, both_sides=True)
    return _normalised([earlier, later], near, window, groups).to(v.dtype)


def linear_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    log_features: bool = False,
    window: SoftmaxWindow | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The weights that the operators give to every key, normalised: for losses on weights, and for plots.

    Args:
        q, k, log_features, window, mask: As in the operators, with as many keys as queries.
        causal: Which operator.

    Returns:
        (B, H, n, n) in float32 at least.
    """
    # values that pick one key each turn the parallel form into its weights
    eye = torch.eye(k.shape[2], dtype=_exact(k.dtype), device=k.device).expand(*k.shape[:3], -1)
    options = {"log_features": log_features, "window": window, "mask": mask, "chunk_size": max(1, k.shape[2])}
    if causal:
        return causal_linear_attention(q, k, eye, **options)[0]
    return bidirectional_linear_attention(q, k, eye, **options)


@outside_autocast
def linear_attention_log_weights(
    q: Tensor,
    k: Tensor,
    *,
    log_features: bool = False,
    window: SoftmaxWindow | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Logarithms of `linear_attention_weights`, without the products with values that those take.

    Args:
        q, k, log_features, window, mask, causal: As there.

    Returns:
        (B, H, n, n) in float32 at least; -inf for keys that a query does not see. A key that it sees with a weight of
        zero has the logarithm of the smallest number of the dtype.
    """
    groups = q.shape[1] // k.shape[1]
    dtype = _exact(torch.promote_types(q.dtype, k.dtype))
    q, k = q.to(dtype), k.to(dtype)
    column = torch.arange(k.shape[2], device=q.device)
    distance = column.unsqueeze(1) - column
    hidden = (distance < 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden if mask is None else hidden | ~mask[:, None, None, None, :]
    rows = _by_key_head(q, groups)
    tiny = torch.finfo(dtype).tiny
    if log_features:
        logs = _grouped(_log_products(rows, k), groups)
    else:
        logs = _grouped((rows @ k.mT).clamp(min=tiny).log(), groups)
    if window is not None:
        scores = _by_key_head(window.query.to(dtype), groups) @ window.key.to(dtype).mT
        near = distance.abs() < window.size
        scores = _grouped(scores, groups).masked_fill(~near | hidden, -math.inf)
        if not log_features:
            scores = scores - scores.amax(dim=-1, keepdim=True).clamp(min=_NOTHING)
        if window.log_weight is not None:
            scores = scores + window.log_weight.to(dtype).view(1, -1, groups, 1, 1)
        logs = torch.where(near, scores, logs)
    logs = logs.masked_fill(hidden, -math.inf)
    total = logs.logsumexp(dim=-1, keepdim=True).clamp(min=_NOTHING)
    return (logs - total).flatten(1, 2)


def empty_state(k: Tensor, width: int, *, log_features: bool) -> LinearState:
    """The state before any key, for keys like k (B, K, N, F) and values of `width`."""
    shape, exact = (*k.shape[:2], k.shape[3]), _exact(k.dtype)
    sums = torch.zeros(*shape, width + 1, dtype=exact, device=k.device)
    scale = torch.full(shape, _NOTHING, dtype=exact, device=k.device) if log_features else None
    return LinearState(sums, scale, None if exact == torch.float64 else torch.zeros_like(sums, dtype=_carry_dtype()))


@outside_autocast
def fold(state: LinearState, k: Tensor, values: Tensor) -> LinearState:
    """Add keys k (B, K, N, F) and values with a column of ones (B, K, N, P + 1) to a state; both as exact as it."""
    if not k.shape[2]:
        return state
    if state.log_scale is None:
        return _accumulated(state, k.mT @ values, None)
    top = torch.maximum(state.log_scale, k.detach().amax(dim=2))
    shrink = (state.log_scale - top).exp().unsqueeze(-1)
    carry = None if state.carry is None else state.carry * shrink
    added = (k - top.unsqueeze(2)).exp().mT @ values
    return _accumulated(LinearState(state.sums * shrink, None, carry), added, top)


def _accumulated(state: LinearState, added: Tensor, log_scale: Tensor | None) -> LinearState:
    """A state with something added to its sums, and what rounding does to them kept in the carry."""
    if state.carry is None:
        return LinearState(state.sums + added, log_scale, None)
    added = added - state.carry
    sums = state.sums + added
    carry = sums.detach() - state.sums.detach()
    return LinearState(sums, log_scale, carry.sub_(added.detach()).to(_carry_dtype()))


def _carry_dtype() -> torch.dtype:
    """bfloat16; in exported graphs float32, because ONNX runtimes know few operators on bfloat16."""
    return torch.float32 if torch.compiler.is_exporting() else torch.bfloat16


def with_ones(v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Values (B, K, N, P) in float32 at least, with a column of ones; zeros where the mask (B, N) is False."""
    exact = v.to(_exact(v.dtype))
    values = torch.cat([exact, torch.ones_like(exact[..., :1])], dim=-1)
    return values if mask is None else values.masked_fill(~mask[:, None, :, None], 0)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _operands(
    q: Tensor, k: Tensor, v: Tensor, log_features: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in the dtype of the sums, and values with ones; keys that do not exist count for nothing."""
    dtype = _exact(torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype))
    q, k, values = q.to(dtype), k.to(dtype), with_ones(v, mask).to(dtype)
    if mask is not None:
        k = k.masked_fill(~mask[:, None, : k.shape[2], None], -math.inf if log_features else 0)
    return q, k, values


def _chosen(
    requested: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState | None,
    log_features: bool,
    chunk: int,
) -> str:
    """The backend that was asked for, after refusing what it cannot serve, or else the one to take."""
    if requested is not None and requested not in BACKENDS:
        raise ValueError(
            f"causal_linear_attention has no backend {requested!r}; choose one of {', '.join(BACKENDS)} or leave it "
            f"out"
        )
    # one chunk alone is a few products, which compilers may fuse with what surrounds them
    if requested == "torch" or (requested is None and (not q.is_cuda or is_traced() or q.shape[2] <= chunk)):
        return "torch"
    reason = triton_linear.refusal(q, k, v, None if state is None else state.sums, log=log_features)
    if reason is None:
        return "triton"
    if requested is not None:
        raise ValueError(f"the backend {requested!r} cannot serve this linear attention: {reason}; leave backend out")
    return "torch"


def _fused_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: LinearState | None,
    delay: int,
    log_features: bool,
    chunk: int,
) -> tuple[_Sums, LinearState]:
    """`_linear_sums` of operands as they were given, by Triton."""
    groups = q.shape[1] // k.shape[1]
    if state is None:
        state = empty_state(k, v.shape[-1], log_features=log_features)
    work = triton_linear.Work.of(q, k, v, delay=delay, log=log_features, chunk=chunk)
    sums, scale, last = triton_linear.linear_sums(q, k, v, mask, triton_linear.State(*state), work)
    scale = None if scale is None else scale.unflatten(1, (-1, groups)).unsqueeze(-1)
    return _Sums(sums.unflatten(1, (-1, groups)), scale), LinearState(*last)


def _linear_sums(
    q: Tensor, k: Tensor, values: Tensor, state: LinearState, delay: int, groups: int, chunk: int
) -> tuple[_Sums, LinearState]:
    """Sums over keys at least `delay` columns before each query, and the state behind max(1, delay) - 1 columns."""
    total, new = values.shape[2], q.shape[2]
    first = total - new  # column of the first query
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, values, state.sums))
    stride = chunk * _KEPT_CHUNKS if needs_grad else max(new, 1)
    parts, folded = [], 0
    for start in range(0, new, stride):
        stop = min(start + stride, new)
        last = min(total, first + stop - delay) if stop < new else total - max(delay - 1, 0)
        last = max(last, folded)
        arguments = (q[:, :, start:stop], k[:, :, folded:last], values[:, :, folded:last], *state)
        places = first + start - folded, delay, groups, chunk
        run: Callable = _run_chunks if stride >= new else _checkpointed
        values_of, scale, *fields = run(arguments, places)
        parts.append(_Sums(values_of, scale))
        state, folded = LinearState(*fields), last
    return _joined(parts), state


def has_unknown_length(x: Tensor) -> bool:
    """Whether a graph for any number of columns of x (B, H, N, P) is being exported."""
    return torch.compiler.is_exporting() and isinstance(x.shape[2], torch.SymInt)


def _all_pairs(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    window: SoftmaxWindow | None,
    mask: Tensor | None,
    groups: int,
    *,
    logs: bool,
    both_sides: bool,
) -> tuple[_Sums, _Sums | None]:
    """Linear sums and those of the window over all pairs at once, O(n^2), without a loop over chunks."""
    column = torch.arange(k.shape[2], device=q.device)
    distance = column.unsqueeze(1) - column
    delay = 0 if window is None else window.size
    linear = _pair_sums(q, k, values, (distance.abs() if both_sides else distance) >= delay, groups, logs=logs)
    if window is None:
        return linear, None
    near = window.query.to(values.dtype), window.key.to(values.dtype), values, mask
    return linear, _near_sums(*near, 0, window.size - 1, groups, both_sides=both_sides)


def _until(k: Tensor, delay: int, *, logs: bool) -> Tensor:
    """Keys (B, K, N, F), those of the last `delay` - 1 columns turned into nothing."""
    late = torch.arange(k.shape[2], device=k.device) >= k.shape[2] - max(delay - 1, 0)
    return k.masked_fill(late.unsqueeze(1), -math.inf if logs else 0)


def _checkpointed(arguments: tuple, places: tuple) -> tuple:
    return checkpoint(_run_chunks, arguments, places, use_reentrant=False)  # pyright: ignore (its stub gives None)


def _run_chunks(arguments: tuple, places: tuple[int, int, int, int]) -> tuple:
    """One stretch of queries: sums, their scale, and the fields of the state with all of the keys folded in.

    Args:
        arguments: Queries (B, H, n, F), keys (B, K, m, F), values (B, K, m, P + 1), and the fields of the state.
        places: Column of the first query, counted from the first key; delay, query heads of a group, chunk.
    """
    q, k, values, *fields = arguments
    offset, delay, groups, chunk = places
    state, folded = LinearState(*fields), 0
    parts = []
    for start in range(0, q.shape[2], chunk):
        stop = min(start + chunk, q.shape[2])
        # every query of the chunk sees the first `common` keys, its last query sees `last`
        common, last = (min(max(offset + i - delay + 1, folded), k.shape[2]) for i in (start, stop - 1))
        state = fold(state, k[:, :, folded:common], values[:, :, folded:common])
        folded = common
        far = _state_sums(q[:, :, start:stop], state, groups)
        if last > common:
            keys = torch.arange(common, last, device=q.device)
            queries = torch.arange(offset + start, offset + stop, device=q.device)
            visible = keys <= (queries - delay).unsqueeze(1)
            near = k[:, :, common:last], values[:, :, common:last]
            far = _add(far, _pair_sums(q[:, :, start:stop], *near, visible, groups, logs=state.log_scale is not None))
        parts.append(far)
    state = fold(state, k[:, :, folded:], values[:, :, folded:])
    sums = _joined(parts)
    return *sums, *state


def _state_sums(q: Tensor, state: LinearState, groups: int) -> _Sums:
    """What queries (B, H, n, F) read from a state."""
    if state.log_scale is None:
        return _Sums(_grouped(_by_key_head(q, groups) @ state.sums, groups), None)
    logs = _by_key_head(q, groups) + state.log_scale.unsqueeze(2)
    top = logs.detach().amax(dim=-1, keepdim=True).clamp(min=_NOTHING)
    values = (logs - top).exp() @ state.sums
    return _Sums(_grouped(values, groups), _grouped(top, groups))


def _pair_sums(q: Tensor, k: Tensor, values: Tensor, visible: Tensor, groups: int, *, logs: bool) -> _Sums:
    """Sums over the keys (B, K, m, F) that each query (B, H, n, F) sees by visible (n, m)."""
    rows, hidden = _by_key_head(q, groups), ~visible.repeat(groups, 1)
    scale = None
    if logs:
        products = _log_products(rows, k)
        scale = products.detach().masked_fill(hidden, _NOTHING).amax(dim=-1, keepdim=True)
        weights = (products - scale).clamp(max=0).exp()
    else:
        weights = rows @ k.mT
    sums = weights.masked_fill(hidden, 0) @ values
    return _Sums(_grouped(sums, groups), None if scale is None else _grouped(scale, groups))


def _log_products(q: Tensor, k: Tensor) -> Tensor:
    """Logarithms of sums of exp(q + k) over features of every query (B, K, R, F) and key (B, K, m, F): (B, K, R, m).

    Two products, each exact where its factors do not underflow: one relative to the largest feature of every query and
    of every key, for keys that differ much among each other; one relative to the largest key of every feature, for
    features that differ much in all of them, as biases make them. Where both underflow, a floor.
    """
    tiny = smallest_kept(k.dtype)
    q_top, k_top = (x.detach().amax(dim=-1, keepdim=True).clamp(min=_NOTHING) for x in (q, k))
    feature_top = k.detach().amax(dim=2, keepdim=True).clamp(min=_NOTHING)
    shifted = q + feature_top
    shifted_top = shifted.detach().amax(dim=-1, keepdim=True).clamp(min=_NOTHING)
    by_token = (q - q_top).exp() @ (k - k_top).exp().mT
    by_feature = (shifted - shifted_top).exp() @ (k - feature_top).exp().mT
    bound = q_top + k_top.mT
    found = torch.maximum(
        torch.where(by_token > tiny, by_token.clamp(min=tiny).log() + bound, -math.inf),
        torch.where(by_feature > tiny, by_feature.clamp(min=tiny).log() + shifted_top, -math.inf),
    )
    return torch.where(found == -math.inf, bound + math.log(tiny), found)


def _window_sums(
    window: SoftmaxWindow, values: Tensor, mask: Tensor | None, groups: int, chunk: int, *, both_sides: bool
) -> _Sums:
    """Sums with softmax weights over the keys of the window, relative to the largest score of each query."""
    dtype = values.dtype
    q, k = window.query.to(dtype), window.key.to(dtype)
    total, new = k.shape[2], q.shape[2]
    first = total - new
    reach = window.size - 1
    part = partial(_near_sums, reach=reach, groups=groups, both_sides=both_sides)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, values))
    parts = []
    for start in range(0, new, chunk):
        stop = min(start + chunk, new)
        low = max(0, first + start - reach)
        high = min(total, first + stop + (reach if both_sides else 0))
        arguments = (
            *(q[:, :, start:stop], k[:, :, low:high], values[:, :, low:high]),
            *(None if mask is None else mask[:, low:high], first + start - low),
        )
        several = needs_grad and new > chunk * _KEPT_CHUNKS
        sums: Any = checkpoint(part, *arguments, use_reentrant=False) if several else part(*arguments)
        parts.append(sums)
    return _joined(parts)


def _near_sums(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    filled: Tensor | None,
    shift: int,
    reach: int,
    groups: int,
    *,
    both_sides: bool,
) -> _Sums:
    """Sums with softmax weights over keys at most `reach` columns away; `shift` is the column of the first query."""
    queries = torch.arange(q.shape[2], device=q.device) + shift
    distance = queries.unsqueeze(1) - torch.arange(k.shape[2], device=q.device)
    hidden = ((distance > reach) | (distance < (-reach if both_sides else 0))).repeat(groups, 1)
    if filled is not None:
        hidden = hidden | ~filled[:, None, None, :]
    scores = (_by_key_head(q, groups) @ k.mT).masked_fill(hidden, -math.inf)
    top = scores.amax(dim=-1, keepdim=True).clamp(min=_NOTHING)
    sums = (scores - top).exp() @ values
    return _Sums(_grouped(sums, groups), _grouped(top, groups))


def _normalised(linear: list[_Sums], near: _Sums | None, window: SoftmaxWindow | None, groups: int) -> Tensor:
    """Outputs (B, H, n, P) of linear sums and those of a window."""
    sums = linear[0]
    for part in linear[1:]:
        sums = _add(sums, part)
    if near is not None and window is not None:
        log_weight = None
        if window.log_weight is not None:
            log_weight = window.log_weight.to(near.values.dtype).view(1, -1, groups, 1, 1)
        if sums.log_scale is None:
            # the window stays relative to its largest score: that is the formula
            sums = _Sums(sums.values + near.values * (1 if log_weight is None else log_weight.exp()), None)
        else:
            assert near.log_scale is not None  # noqa: S101 (narrows the type)
            scale = near.log_scale if log_weight is None else near.log_scale + log_weight
            # queries whose window is empty keep nothing of it, whatever its weight
            sums = _add(sums, _Sums(near.values, torch.where(near.log_scale <= _NOTHING, near.log_scale, scale)))
    values, weight = sums.values.flatten(1, 2).split([sums.values.shape[-1] - 1, 1], dim=-1)
    lost = weight.abs() < smallest_kept(weight.dtype)
    means = values / torch.where(lost, 1, weight)
    with torch.no_grad():  # where a gradient would overflow
        rest = values / torch.where(weight == 0, 1, weight)
    return torch.where(lost, rest, means)


def _add(a: _Sums, b: _Sums) -> _Sums:
    if a.log_scale is None or b.log_scale is None:
        return _Sums(a.values + b.values, None)
    top = torch.maximum(a.log_scale, b.log_scale).detach()
    return _Sums(a.values * (a.log_scale - top).exp() + b.values * (b.log_scale - top).exp(), top)


def _joined(parts: list[_Sums]) -> _Sums:
    if len(parts) == 1:
        return parts[0]
    scales = [part.log_scale for part in parts if part.log_scale is not None]
    return _Sums(torch.cat([part.values for part in parts], dim=3), torch.cat(scales, dim=3) if scales else None)


def _by_key_head(x: Tensor, groups: int) -> Tensor:
    """Queries (B, H, n, F) of all heads that share a key head, one after the other: (B, K, G n, F)."""
    return x.reshape(x.shape[0], x.shape[1] // groups, groups * x.shape[2], x.shape[3])


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, K, G n, X) as (B, K, G, n, X)."""
    return x.unflatten(2, (groups, -1))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: SoftmaxWindow | None,
    mask: Tensor | None,
    state: LinearState | None,
    log_features: bool,
    chunk_size: int,
) -> None:
    """Refuse operands that do not fit together."""
    _check_columns(q, k, v, window)
    total = v.shape[2]
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads ({q.shape[1]}) must be a multiple of the key heads ({k.shape[1]})")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (v.shape[0], total)):
        raise ValueError(
            f"mask must be bool of shape {(v.shape[0], total)}, one number a key, True for keys that exist, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    if window is not None:
        _check_window(window, q, v)
    elif q.shape[2] != total:
        raise ValueError(
            f"without a window every key is that of a query, got {q.shape[2]} queries and {total} keys; earlier "
            f"keys belong in the state"
        )
    if state is not None:
        expected = (*k.shape[:2], k.shape[3], v.shape[3] + 1)
        if tuple(state.sums.shape) != expected or (state.log_scale is not None) != log_features:
            raise ValueError(
                f"the state holds sums {tuple(state.sums.shape)} {'of' if state.log_scale is None else 'relative to'} "
                f"{'plain features' if state.log_scale is None else 'logarithms'}, expected {expected} for "
                f"log_features={log_features}; start with state=None"
            )


def _check_columns(q: Tensor, k: Tensor, v: Tensor, window: SoftmaxWindow | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"expected q (B, H, n, F), k (B, K, N, F) and v (B, K, N, P), got {shapes}")
    total = v.shape[2]
    spare = 0 if window is None else window.size - 1
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] > total:
        raise ValueError(
            f"expected q (B, H, n, F), k (B, K, N, F) and v (B, K, N, P) with n at most N, got {shapes}; queries are "
            f"those of the last columns of the keys"
        )
    if k.shape[2] != total and k.shape[2] != max(0, total - spare):
        raise ValueError(
            f"expected keys in all {total} columns of the values, or without the last ones of a window, got {shapes}"
        )


def _check_window(window: SoftmaxWindow, q: Tensor, v: Tensor) -> None:
    if window.size < 1:
        raise ValueError(
            f"a window holds the token itself at least, got size {window.size}; pass window=None for none"
        )
    if window.query.shape[:3] != q.shape[:3] or window.key.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"the window's query and key must have the rows, heads and columns of q and v, got "
            f"{tuple(window.query.shape)} and {tuple(window.key.shape)} for {tuple(q.shape)} and {tuple(v.shape)}"
        )
    if window.query.shape[3] != window.key.shape[3]:
        raise ValueError(
            f"the window's query and key differ in width, {window.query.shape[3]} and {window.key.shape[3]}"
        )
    if window.log_weight is not None and window.log_weight.shape != (q.shape[1],):
        raise ValueError(
            f"log_weight must hold a number for each of the {q.shape[1]} query heads, got shape "
            f"{tuple(window.log_weight.shape)}"
        )


__all__ = [
    "BACKENDS",
    "LinearState",
    "SoftmaxWindow",
    "bidirectional_linear_attention",
    "causal_linear_attention",
    "empty_state",
    "fold",
    "has_unknown_length",
    "linear_attention_log_weights",
    "linear_attention_weights",
    "with_ones",
]
