# SPDX-License-Identifier: Apache-2.0
"""How far the weights of linear attention are from those of softmax attention: a loss that holds no matrix of weights.

    KL(p_t, w_t / sum_i w_ti) = sum_i p_ti (log p_ti - log w_ti) + log sum_i w_ti

p are the weights of softmax attention, w those that `hyena_hf.ops.linear_attention` gives (Hedgehog, Zhang et al.
2024, arXiv 2402.04347, trains feature maps on this). With a window the loss is the mean of two divergences: of the
linear form alone, over all keys, and of both together.

The gradient of a divergence by log w_ti is the normalised weight minus p_ti. It is formed for a block of queries while
their weights are there, so memory is that of a block, and a causal block meets only the keys that it sees. Gradients
flow to features and to the window's factor, not to the queries and keys of softmax: they are the teacher's.

B batch, H query heads, K key heads, n tokens, F features, P head width, G query heads of a group (H / K).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_attention import SoftmaxWindow, _by_key_head, _grouped, _log_products, smallest_kept
from .precision import outside_autocast


# Queries of a block; and its weights, so many that they stay in the cache of a processor, or fill an accelerator.
_QUERIES = 64
_WEIGHTS_CPU, _WEIGHTS_ACCELERATOR = 2**18, 2**26

# The logarithm of the weight of a hidden key: finite, so that nothing times it is nothing.
_HIDDEN = -1e30

# Products of exponentials above this have lost no term that their sum would show.
_SAFE = 1e-30


class _Setting(NamedTuple):
    log_features: bool
    causal: bool
    window: int  # 0 for none


@outside_autocast
def attention_divergence(
    q: Tensor,
    k: Tensor,
    teacher: SoftmaxWindow,
    *,
    log_features: bool = False,
    hybrid: bool = False,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """KL divergence of the weights of linear attention from those of softmax attention.

    Args:
        q: Features of queries (B, H, n, F), or their logarithms.
        k: Features of keys (B, K, n, F), or their logarithms; K divides H.
        teacher: Scaled queries and keys of softmax attention. Its size and factor are those of the window that the
            linear attention keeps, and count only with `hybrid`.
        log_features: Whether q and k are logarithms of features.
        hybrid: Whether there is a window: the result is the mean of both divergences then.
        mask: True for the tokens that exist (B, n), the first ones of each row; None: all.
        causal: Whether a query sees only keys that do not come later.

    Returns:
        The mean over heads and existing queries, in nats; float32 at least. A plain feature product of 0 or less
        counts as the smallest number of the dtype, and has no gradient.

    Raises:
        ValueError: No token exists.
    """
    if not (q.shape[0] and q.shape[2]) or (mask is not None and not bool(mask.any())):
        raise ValueError("no token exists in these rows, so there is no weight to compare; leave empty batches out")
    exact = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    size, factor = (teacher.size, teacher.log_weight) if hybrid else (0, None)
    if hybrid and factor is None:
        factor = q.new_zeros(q.shape[1])
    operands = [None if x is None else x.to(exact) for x in (q, k, factor)]
    scores = teacher.query.detach().to(exact), teacher.key.detach().to(exact)
    total: Any = _Divergence.apply(*operands, *scores, mask, _Setting(log_features, causal, size))
    return total


class _Divergence(torch.autograd.Function):
    """Sums divergences block by block and keeps their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        factor: Tensor | None,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        setting: _Setting,
    ) -> Tensor:
        groups, n = q.shape[1] // k.shape[1], q.shape[2]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        dfactor = None if factor is None else torch.zeros_like(factor)
        total = q.new_zeros((), dtype=torch.float64 if q.device.type == "cpu" else q.dtype)
        queries = q.shape[1] * (q.shape[0] * n if mask is None else int(mask.sum()))
        for rows, start, stop, last in _blocks(q, n, setting.causal):
            of_q, of_k = (rows, slice(None), slice(start, stop)), (rows, slice(None), slice(0, last))
            exists = None if mask is None else mask[rows, start:stop]
            hidden = _hidden(start, stop, None if mask is None else mask[rows], last, setting, q.device)
            scores = _grouped(_by_key_head(query[of_q], groups) @ key[of_k].mT, groups)
            teacher = scores.masked_fill(hidden, _HIDDEN).log_softmax(-1)
            products = _Products(_by_key_head(q[of_q], groups), k[of_k], groups, log_features=setting.log_features)
            value, gradient = _compared(teacher, products.logs, hidden, exists)
            if factor is not None and dfactor is not None:
                near = _near(start, stop, last, setting.window, q.device) & ~hidden
                logs = _with_window(products.logs, scores, factor, near, setting.log_features)
                of_both, change = _compared(teacher, logs, hidden, exists)
                dfactor += (change * near).sum(dim=(0, 3, 4)).flatten() / 2
                value, gradient = (value + of_both) / 2, (gradient + change.masked_fill(near, 0)) / 2
            total += value
            to_q, to_k = products.backward(gradient)
            dq[of_q] = _grouped(to_q, groups).flatten(1, 2)
            dk[of_k] += to_k
        ctx.save_for_backward(*(x if x is None else x / queries for x in (dq, dk, dfactor)))
        return (total / queries).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore (one output)
        scaled = [None if x is None else x * grad for x in ctx.saved_tensors]
        return *scaled, None, None, None, None


class _Products:
    """log w of queries (B, K, G n, F) and keys (B, K, m, F), (B, K, G, n, m), and the way back to both."""

    def __init__(self, q: Tensor, k: Tensor, groups: int, *, log_features: bool) -> None:
        self._graph: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
        self._log_features = log_features
        bound = None
        if log_features:
            tops = [x.amax(dim=-1, keepdim=True).clamp(min=_HIDDEN) for x in (q, k)]
            bound = tops[0] + tops[1].mT
            self._q, self._k = (q - tops[0]).exp(), (k - tops[1]).exp()
        else:
            self._q, self._k = q, k
        self._weights = self._q @ self._k.mT
        if bound is not None and not bool((self._weights > _SAFE).all()):
            with torch.enable_grad():
                leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
                logs = _log_products(*leaves)
            self._graph = logs, leaves
            self.logs = _grouped(logs.detach(), groups)
            return
        logs = self._weights.clamp(min=torch.finfo(q.dtype).tiny).log()
        self.logs = _grouped(logs if bound is None else logs + bound, groups)

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the logarithms (B, K, G, n, m)."""
        gradient = gradient.flatten(2, 3)
        if self._graph is not None:
            to_q, to_k = torch.autograd.grad(*self._graph, gradient)
            return to_q, to_k
        kept = self._weights > smallest_kept(gradient.dtype)
        by_weight = torch.where(kept, gradient / self._weights, 0)
        to_q, to_k = by_weight @ self._k, by_weight.mT @ self._q
        return (to_q * self._q, to_k * self._k) if self._log_features else (to_q, to_k)


def _blocks(q: Tensor, n: int, causal: bool) -> Iterator[tuple[slice, int, int, int]]:
    """Rows, first query, query behind the last, and number of keys of every block."""
    budget = _WEIGHTS_CPU if q.device.type == "cpu" else _WEIGHTS_ACCELERATOR
    for start in range(0, n, _QUERIES):
        stop = min(start + _QUERIES, n)
        last = stop if causal else n
        rows = max(1, budget // (q.shape[1] * (stop - start) * last))
        for row in range(0, q.shape[0], rows):
            yield slice(row, row + rows), start, stop, last


def _hidden(start: int, stop: int, mask: Tensor | None, last: int, setting: _Setting, device: torch.device) -> Tensor:
    """True for the keys that a query does not see; rows without any keep their first one, and count for nothing."""
    keys = torch.arange(last, device=device)
    queries = torch.arange(start, stop, device=device).unsqueeze(1)
    hidden = keys > queries if setting.causal else torch.zeros(stop - start, last, dtype=torch.bool, device=device)
    if mask is None:
        return hidden
    hidden = hidden | ~mask[:, None, None, None, :last]
    return hidden & (keys > 0)


def _near(start: int, stop: int, last: int, size: int, device: torch.device) -> Tensor:
    """True for the keys less than `size` tokens away from a query."""
    distance = torch.arange(start, stop, device=device).unsqueeze(1) - torch.arange(last, device=device)
    return distance.abs() < size


def _compared(teacher: Tensor, logs: Tensor, hidden: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of divergences of weights (B, K, G, n, m), and its gradient by their logarithms."""
    student = logs.masked_fill(hidden, _HIDDEN).log_softmax(-1)
    p = teacher.exp()
    terms, gradient = p * (teacher - student), student.exp() - p
    if exists is not None:
        counts = exists[:, None, None, :, None]
        terms, gradient = terms * counts, gradient * counts
    return terms.sum(dtype=torch.float64 if terms.device.type == "cpu" else None), gradient


def _with_window(logs: Tensor, scores: Tensor, factor: Tensor, near: Tensor, log_features: bool) -> Tensor:
    """Logarithms of weights with those of the window in their place."""
    scores = scores.masked_fill(~near, _HIDDEN)
    if not log_features:  # relative to the largest score of the window: that is the formula
        scores = scores - scores.amax(dim=-1, keepdim=True)
    return torch.where(near, scores + factor.view(1, logs.shape[1], -1, 1, 1), logs)


__all__ = ["attention_divergence"]
