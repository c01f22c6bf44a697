# SPDX-License-Identifier: Apache-2.0
"""The blockwise divergence of weights and its gradients are those of whole matrices of weights."""

import itertools

import pytest
import torch
from torch import Tensor

from hyena_hf.ops import attention_divergence as module
from hyena_hf.ops.attention_divergence import attention_divergence
from hyena_hf.ops.linear_attention import SoftmaxWindow, linear_attention_weights


LENGTH = 150  # more than two blocks of queries


def operands(log: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, SoftmaxWindow]:
    torch.manual_seed(3)
    q, k = (torch.randn(3, heads, LENGTH, 6, dtype=torch.float64) for heads in (4, 2))
    if not log:
        q, k = q.softmax(-1), k.softmax(-1)
    query, key = (torch.randn(3, heads, LENGTH, 5, dtype=torch.float64) for heads in (4, 2))
    factor = torch.randn(4, dtype=torch.float64)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, factor)]
    return leaves[0], leaves[1], SoftmaxWindow(query.to(dtype), key.to(dtype), 20, leaves[2])


def expected(
    q: Tensor, k: Tensor, teacher: SoftmaxWindow, log: bool, hybrid: bool, mask: Tensor | None, causal: bool
) -> Tensor:
    """From whole matrices, by the definition, in float64."""
    exists = torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask
    visible = exists[:, None, None, :] & (torch.ones(LENGTH, LENGTH).tril().bool() if causal else torch.tensor(True))
    scores = (teacher.query @ teacher.key.repeat_interleave(2, dim=1).mT).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1)
    total = torch.zeros((), dtype=q.dtype)
    windows = [None, teacher] if hybrid else [None]
    for window in windows:
        weights = linear_attention_weights(q, k, log_features=log, window=window, mask=mask, causal=causal)
        ratio = p.masked_fill(~visible, 1) / weights.masked_fill(~visible, 1)  # no NaN, not even in gradients
        terms = (p * ratio.log()).sum(-1)
        total = total + torch.where(exists[:, None], terms, 0).sum() / (exists.sum() * 4) / len(windows)
    return total


@pytest.mark.parametrize(("log", "hybrid", "causal", "masked"), list(itertools.product([False, True], repeat=4)))
def test_value_and_gradients_are_those_of_whole_matrices(
    log: bool, hybrid: bool, causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WEIGHTS_CPU", 2 * 4 * 64 * LENGTH)  # two rows in a block, one in the last
    mask = torch.arange(LENGTH).expand(3, -1) < torch.tensor([[LENGTH], [70], [1]]) if masked else None
    q, k, teacher = operands(log)
    assert teacher.log_weight is not None
    leaves = [q, k, *([teacher.log_weight] if hybrid else [])]
    value = attention_divergence(q, k, teacher, log_features=log, hybrid=hybrid, mask=mask, causal=causal)
    oracle = expected(q, k, teacher, log, hybrid, mask, causal)
    torch.testing.assert_close(value, oracle, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(3 * x, leaves) for x in (value, oracle))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("bias", [30.0, 200.0])
@pytest.mark.parametrize("hybrid", [False, True])
def test_features_that_differ_beyond_the_range_of_float32_have_right_gradients(bias: float, hybrid: bool) -> None:
    """exp(k) of the largest feature and of the others is not in one float32 range; their weights are what counts."""
    q, k, teacher = operands(True)
    shift = torch.linspace(-bias, bias, 6, dtype=torch.float64)
    q, k = (x.detach() for x in (q - shift, k + shift))
    exact = q.float().double().requires_grad_(), k.float().double().requires_grad_()
    single = q.float().requires_grad_(), k.float().requires_grad_()
    oracle = expected(*exact, teacher, True, hybrid, None, True)
    narrow = SoftmaxWindow(teacher.query.float(), teacher.key.float(), 20, teacher.log_weight)
    value = attention_divergence(*single, narrow, log_features=True, hybrid=hybrid)
    torch.testing.assert_close(value.double(), oracle, rtol=1e-4, atol=0)
    for one, other in zip(torch.autograd.grad(value, single), torch.autograd.grad(oracle, exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-6 * bias * float(other.abs().max()))


def test_weights_of_zero_count_as_the_smallest_number_and_have_no_gradient() -> None:
    q, k, teacher = operands(False, torch.float32)
    zero = torch.zeros_like(k).requires_grad_()
    value = attention_divergence(q, zero, teacher)
    assert value.isfinite()
    to_q, to_k = torch.autograd.grad(value, (q, zero))
    assert not to_q.any()
    assert not to_k.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_compared_in_float32(dtype: torch.dtype) -> None:
    q, k, teacher = operands(False, dtype)
    exact = q.detach().double(), k.detach().double()
    wide = SoftmaxWindow(teacher.query.double(), teacher.key.double(), 20)
    value = attention_divergence(q, k, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected(*exact, wide, False, False, None, True), rtol=1e-5, atol=0)
    value.backward()
    assert q.grad is not None
    assert q.grad.dtype == dtype


@pytest.mark.parametrize("rows", [0, 2])
def test_rows_without_a_token_are_refused(rows: int) -> None:
    q, k, teacher = operands(False)
    mask = torch.zeros(rows, LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="no token exists"):
        attention_divergence(q[:rows], k[:rows], teacher, mask=mask)
