# SPDX-License-Identifier: Apache-2.0
"""Linear attention equals the sum over all pairs, whatever the chunks, windows, groups, masks and scales."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hyena_hf.mixers.linear_attention import LinearAttention
from hyena_hf.ops.attention_divergence import attention_divergence
from hyena_hf.ops.linear_attention import (
    LinearState,
    SoftmaxWindow,
    bidirectional_linear_attention,
    causal_linear_attention,
    fold,
    linear_attention_log_weights,
    linear_attention_weights,
    with_ones,
)


class Operands(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    query: Tensor
    key: Tensor
    log_weight: Tensor

    def window(self, size: int) -> SoftmaxWindow | None:
        return SoftmaxWindow(self.query, self.key, size, self.log_weight) if size else None

    def to(self, dtype: torch.dtype) -> "Operands":
        return Operands(*(x.to(dtype) for x in self))

    def columns(self, start: int, stop: int, past: int) -> "Operands":
        """Queries of columns [start, stop), keys from `past` columns before them."""
        low = max(0, start - past)
        return Operands(
            self.q[:, :, start:stop],
            self.k[:, :, low:stop],
            self.v[:, :, low:stop],
            self.query[:, :, start:stop],
            self.key[:, :, low:stop],
            self.log_weight,
        )


def operands(
    length: int, *, log: bool, batch: int = 2, heads: int = 4, key_heads: int = 2, scale: float = 1.0
) -> Operands:
    """Random ones: features positive, or logarithms on both sides of zero."""
    torch.manual_seed(length)
    q, k = (torch.randn(batch, n, length, 6, dtype=torch.float64) * scale for n in (heads, key_heads))
    if not log:
        q, k = q.softmax(-1), k.softmax(-1)
    v = torch.randn(batch, key_heads, length, 5, dtype=torch.float64)
    query, key = (torch.randn(batch, n, length, 3, dtype=torch.float64) for n in (heads, key_heads))
    return Operands(q, k, v, query, key, torch.randn(heads, dtype=torch.float64))


def all_pairs(x: Operands, size: int, *, log: bool, causal: bool, mask: Tensor | None = None) -> Tensor:
    """The definition, pair by pair, in float64: normalised weights (B, H, n, n)."""
    x = x.to(torch.float64)
    groups = x.q.shape[1] // x.k.shape[1]
    k, key = (y.repeat_interleave(groups, dim=1) for y in (x.k, x.key))
    column = torch.arange(x.q.shape[2])
    distance = column.unsqueeze(1) - column
    exists = torch.ones_like(distance, dtype=torch.bool).expand(len(x.q), 1, -1, -1)
    if causal:
        exists = exists & (distance >= 0)
    if mask is not None:
        exists = exists & mask[:, None, None, :]
    near = exists & (distance.abs() < size)
    far = exists & (distance.abs() >= size)
    scores = x.query @ key.mT
    gain = x.log_weight.view(-1, 1, 1)
    if log:
        pairs = (x.q.unsqueeze(3) + k.unsqueeze(2)).logsumexp(-1)
        logits = torch.where(near, scores + gain, torch.where(far, pairs, -torch.inf))
        return logits.softmax(-1).nan_to_num(0)
    top = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e30)
    weights = torch.where(near, (scores - top + gain).exp(), torch.where(far, x.q @ k.mT, 0.0))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def oracle(x: Operands, size: int, *, log: bool, causal: bool, mask: Tensor | None = None) -> Tensor:
    weights = all_pairs(x, size, log=log, causal=causal, mask=mask)
    return weights @ x.v.double().repeat_interleave(x.q.shape[1] // x.k.shape[1], dim=1)


def attend(x: Operands, size: int, *, log: bool, causal: bool, **options) -> Tensor:
    if causal:
        return causal_linear_attention(x.q, x.k, x.v, log_features=log, window=x.window(size), **options)[0]
    return bidirectional_linear_attention(x.q, x.k, x.v, log_features=log, window=x.window(size), **options)


every_form = pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
windows = pytest.mark.parametrize("size", [0, 1, 4, 9, 100], ids=lambda size: f"window {size}")


@every_form
@both_directions
@windows
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("length", [1, 7, 24, 37])
def test_it_is_the_sum_over_all_pairs(log: bool, causal: bool, size: int, chunk: int, length: int) -> None:
    x = operands(length, log=log)
    expected = oracle(x, size, log=log, causal=causal)
    torch.testing.assert_close(attend(x, size, log=log, causal=causal, chunk_size=chunk), expected, rtol=0, atol=1e-12)


@every_form
@both_directions
@windows
@pytest.mark.parametrize("chunk", [2, 64])
def test_gradients_are_those_of_the_sum_over_all_pairs(log: bool, causal: bool, size: int, chunk: int) -> None:
    x = operands(70, log=log)  # more than a stretch between two kept states, for chunks of 2
    direction = torch.randn(2, 4, 70, 5, dtype=torch.float64)

    def gradients(function: Callable[[Operands], Tensor]) -> tuple[Tensor, ...]:
        leaves = Operands(*(y.clone().requires_grad_() for y in x))
        used = leaves if size else leaves[:3]
        return torch.autograd.grad((function(leaves) * direction).sum(), used, materialize_grads=True)

    ours = gradients(lambda y: attend(y, size, log=log, causal=causal, chunk_size=chunk))
    theirs = gradients(lambda y: oracle(y, size, log=log, causal=causal))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@every_form
@windows
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 1, 17], [22, 1], [3, 9, 11]], ids=str)
def test_a_state_goes_on_where_the_last_call_stopped(log: bool, size: int, cuts: list[int]) -> None:
    x = operands(23, log=log)
    state: LinearState | None = None
    outputs, start = [], 0
    for length in cuts:
        part = x.columns(start, start + length, max(size - 1, 0))
        y, state = causal_linear_attention(
            part.q, part.k, part.v, log_features=log, window=part.window(size), state=state, chunk_size=4
        )
        outputs.append(y)
        start += length
    torch.testing.assert_close(torch.cat(outputs, dim=2), oracle(x, size, log=log, causal=True), rtol=0, atol=1e-12)


@every_form
@both_directions
@windows
def test_keys_that_do_not_exist_count_for_nothing(log: bool, causal: bool, size: int) -> None:
    x = operands(20, log=log)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 13:] = False
    mask[1, :6] = False
    poisoned = x._replace(
        k=x.k.masked_fill(~mask[:, None, :, None], torch.nan),
        v=x.v.masked_fill(~mask[:, None, :, None], torch.nan),
        key=x.key.masked_fill(~mask[:, None, :, None], torch.nan),
    )
    y = attend(poisoned, size, log=log, causal=causal, mask=mask, chunk_size=4)
    torch.testing.assert_close(y, oracle(x, size, log=log, causal=causal, mask=mask), rtol=0, atol=1e-12)


@every_form
@windows
def test_a_query_that_sees_no_key_gets_zero(log: bool, size: int) -> None:
    x = operands(9, log=log)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    for causal in (True, False):
        assert not attend(x, size, log=log, causal=causal, mask=mask).any()


@every_form
@both_directions
@pytest.mark.parametrize("size", [0, 4])
def test_weights_are_those_of_all_pairs(log: bool, causal: bool, size: int) -> None:
    x = operands(19, log=log)
    mask = torch.arange(19).expand(2, -1) < torch.tensor([[19], [11]])
    options = {"log_features": log, "window": x.window(size), "mask": mask, "causal": causal}
    weights = linear_attention_weights(x.q, x.k, **options)
    logs = linear_attention_log_weights(x.q, x.k, **options)
    torch.testing.assert_close(logs.exp(), weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, all_pairs(x, size, log=log, causal=causal, mask=mask), rtol=0, atol=1e-12)


@both_directions
@pytest.mark.parametrize("scale", [1.0, 10.0, 25.0])
@pytest.mark.parametrize("size", [0, 4])
def test_logarithms_of_any_size_give_finite_and_right_outputs(causal: bool, scale: float, size: int) -> None:
    """exp of such features overflows float32, and small ones vanish beside large ones."""
    x = operands(40, log=True)
    signs = (
        torch.randn(2, 4, 40, 3, dtype=torch.float64) * scale,
        torch.randn(2, 2, 40, 3, dtype=torch.float64) * scale,
    )
    x = x._replace(q=torch.cat([signs[0], -signs[0]], -1).float(), k=torch.cat([signs[1], -signs[1]], -1).float())
    exact = oracle(x, size, log=True, causal=causal)
    single = x.to(torch.float32)
    y = attend(single, size, log=True, causal=causal, chunk_size=8)
    assert y.isfinite().all()
    # a weight moves by its exponent's rounding, which grows with the scale
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("scale", [60.0, 100.0, 200.0, 1000.0])
@pytest.mark.parametrize("size", [0, 4])
def test_features_with_large_biases_weigh_alike_in_chunks_and_steps(scale: float, size: int) -> None:
    """Keys and queries of some models (Qwen) carry large biases: features differ by more than e^87, keys do not."""
    x = operands(40, log=True)
    bias = torch.randn(6, dtype=torch.float64) * scale
    x = x._replace(q=(x.q + bias.flip(0) / 4).float(), k=(x.k + bias).float())
    exact, weights = (f(x, size, log=True, causal=True) for f in (oracle, all_pairs))
    single = x.to(torch.float32)
    for chunk in (1, 8, 64):
        y = attend(single, size, log=True, causal=True, chunk_size=chunk)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-6 * scale)
    logs = linear_attention_log_weights(single.q, single.k, log_features=True, window=single.window(size))
    torch.testing.assert_close(logs.exp().double(), weights, rtol=0, atol=1e-6 * scale)


@both_directions
@pytest.mark.parametrize("size", [0, 4])
def test_logarithms_beyond_the_range_of_the_dtype_still_give_means_of_values(causal: bool, size: int) -> None:
    x = operands(40, log=True, scale=1e4).to(torch.float32)
    y = attend(x, size, log=True, causal=causal, chunk_size=8)
    low, high = (getattr(x.v, limit)(dim=2, keepdim=True).repeat_interleave(2, dim=1) for limit in ("amin", "amax"))
    assert ((y >= low - 1e-5) & (y <= high + 1e-5)).all()
    assert y.abs().amax(-1).gt(0).all()


@every_form
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_inputs_and_outputs_only(log: bool, size: int, dtype: torch.dtype) -> None:
    x = operands(300, log=log).to(dtype)
    y, state = causal_linear_attention(x.q, x.k, x.v, log_features=log, window=x.window(size))
    assert y.dtype == dtype
    assert state.sums.dtype == torch.float32
    expected = oracle(x, size, log=log, causal=True)
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@every_form
def test_rows_do_not_know_their_neighbours(log: bool) -> None:
    x = operands(33, log=log, batch=3)
    alone = Operands(*[y[1:2] for y in x[:5]], x.log_weight)  # pyright: ignore (it does not count the slice)
    together = attend(x.to(torch.float32), 5, log=log, causal=True)[1:2]
    torch.testing.assert_close(attend(alone.to(torch.float32), 5, log=log, causal=True), together, rtol=0, atol=1e-6)


@every_form
def test_many_steps_of_equal_keys_do_not_drift(log: bool) -> None:
    """Rounding of equal terms has a direction, which a float32 sum alone follows."""
    torch.manual_seed(0)
    length = 4_096
    q, k = torch.rand(1, 1, length, 4), torch.full((1, 1, length, 4), 0.1)
    v = torch.rand(1, 1, length, 2)
    state, outputs = None, []
    for t in range(length):
        step = (x[:, :, t : t + 1] for x in (q, k, v))
        y, state = causal_linear_attention(*step, log_features=log, state=state)
        outputs.append(y)
    mean = v.double().cumsum(2) / torch.arange(1, length + 1).view(-1, 1)  # all keys are alike
    assert (torch.cat(outputs, dim=2) - mean).abs().max() < 2e-6


@every_form
@windows
@pytest.mark.parametrize("masked", [False, True])
def test_features_of_keys_that_stay_inside_the_window_are_not_read(log: bool, size: int, masked: bool) -> None:
    x = operands(37, log=log).to(torch.float32)
    mask = torch.rand(2, 37) > 0.3 if masked else None
    options = {"log_features": log, "window": x.window(size), "mask": mask}
    y, state = causal_linear_attention(x.q, x.k, x.v, **options)
    fewer = x.k[:, :, : max(0, 37 - max(size, 1) + 1)]
    again, same = causal_linear_attention(x.q, fewer, x.v, **options)
    assert again.equal(y)
    assert all(a is b is None or a.equal(b) for a, b in zip(same, state, strict=True))
    if size > 2:
        with pytest.raises(ValueError, match="last ones of a window"):
            causal_linear_attention(x.q, x.k[:, :, :-1], x.v, **options)


@pytest.mark.parametrize("size", [0, 4], ids=lambda size: f"window {size}")
@pytest.mark.parametrize("norm", [50, 100])
@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_softmax", "hedgehog_joint_softmax", "exp_2", "performer"])
def test_gradients_are_finite_where_queries_and_keys_are_large_and_against_each_other(
    name: str, norm: float, size: int
) -> None:
    """One strong channel of opposite signs: products of features are as small as the dtype allows."""
    sizes = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "feature_dim": None, "max_length": 128}
    layer = LinearAttention(**sizes, feature_map=name, window=size, scaling=1 / 8, is_causal=True)
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, heads, 128, 64) for heads in (4, 2, 2))
        k[..., 3] += 24
        q[..., 3 if seed else 5] -= 24
        q, k = (norm * torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        q.requires_grad_()
        k.requires_grad_()
        features = layer.query_features(q, None), layer.k_map(k)
        y, _ = causal_linear_attention(*features, v, log_features=layer.is_log, window=layer.softmax_window(q, k))
        loss = attention_divergence(*features, SoftmaxWindow(q / 8, k, 1), log_features=layer.is_log)
        for total in (y.square().sum() * 2**16, loss * 2**16):  # as GradScaler has it
            gradients = torch.autograd.grad(total, (q, k), retain_graph=True, materialize_grads=True)
            assert all(gradient.isfinite().all() for gradient in gradients)


@every_form
@pytest.mark.parametrize("size", [0, 9], ids=lambda size: f"window {size}")
def test_autocast_lowers_the_precision_of_no_sum(log: bool, size: int) -> None:
    x = operands(100, log=log).to(torch.float32)
    teacher = SoftmaxWindow(x.query, x.key, max(1, size), x.log_weight)

    def everything() -> list[Tensor | None]:
        window = x.window(size)
        y, state = causal_linear_attention(x.q, x.k, x.v, log_features=log, window=window)
        rest = bidirectional_linear_attention(x.q, x.k, x.v, log_features=log, window=window)
        weights = (linear_attention_weights, linear_attention_log_weights)
        of_weights = [function(x.q, x.k, log_features=log, window=window) for function in weights]
        loss = attention_divergence(x.q, x.k, teacher, log_features=log, hybrid=size > 0)
        return [y, *state, *fold(state, x.k, with_ones(x.v)), rest, *of_weights, loss]

    expected = everything()
    with torch.autocast("cpu", torch.bfloat16):
        found = everything()
    assert all(a is b is None or a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8, 6)}, "multiple of the key heads"),
        ({"q": torch.zeros(2, 4, 8, 5)}, "n at most N"),
        ({"v": torch.zeros(2, 2, 7, 5)}, "n at most N"),
        ({"v": torch.zeros(2, 2, 9, 5)}, "in all 9 columns"),
        ({"q": torch.zeros(4, 8, 6)}, "expected q"),
        ({"q": torch.zeros(2, 4, 3, 6)}, "earlier keys belong in the state"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    x = operands(8, log=False).to(torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=message):
        causal_linear_attention(x.q, x.k, x.v)


def test_options_that_do_not_fit_are_refused() -> None:
    x = operands(8, log=False)
    _, state = causal_linear_attention(x.q, x.k, x.v)
    cases = [
        ({"window": SoftmaxWindow(x.query, x.key, 0)}, "size 0"),
        ({"window": SoftmaxWindow(x.query[:, :2], x.key, 2)}, "rows, heads and columns"),
        ({"window": SoftmaxWindow(x.query[..., :2], x.key, 2)}, "differ in width"),
        ({"window": SoftmaxWindow(x.query, x.key, 2, torch.zeros(3))}, "4 query heads"),
        ({"mask": torch.ones(2, 8)}, "mask must be bool"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"state": state, "log_features": True}, "start with state=None"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            causal_linear_attention(x.q, x.k, x.v, **options)
