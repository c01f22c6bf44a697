"""The operators equal their float64 oracles, at any length, dtype, memory layout and batching.

Run: python -m pytest tests/test_ops.py -q

Fast float32 results may be at most twice as far from the oracle as the obvious torch version (Dao et al.'s rule in the
tests of FlashAttention). Letters: B batch, C channels, H filters, L length, K taps, T tokens of the past.
"""

import re

import numpy as np
import pytest
import torch

from hyena_hf.ops import (
    bidirectional_fftconv,
    causal_fftconv,
    engine,
    hyena_conv,
    multihead,
    multihead_conv,
    over_rows,
    short_conv,
)
from hyena_hf.ops.backends.fft import fft_length
from hyena_hf.ops.segments import build_segments, document_starts
from tests import oracles


NAMES = ("u", "h", "direct", "pregate", "postgate")
SIZES = [  # B, C, H, L, K
    *[(2, 4, 4, length, length) for length in (1, 2, 3, 64, 127, 1000, 1025)],
    (2, 4, 4, 127, 5),
    (2, 6, 3, 1000, 40),
    (2, 4, 4, 127, 300),
    (2, 4, 4, 1000, 1),
    (1, 6, 2, 127, 127),
    (1, 6, 1, 64, 40),
    (3, 6, 3, 3, 9),
]


def make_inputs(batch, channels, filters, length, taps, dtype=torch.float64):
    shapes = {
        "u": (batch, channels, length),
        "h": (filters, taps),
        "direct": (filters,),
        "pregate": (batch, channels, length),
        "postgate": (batch, channels, length),
    }
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for name, shape in shapes.items()}


def run(function, inputs, **options):
    """Output, and gradients of sum(y * cotangent) by the name of the input."""
    y = function(**inputs, **options)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return {"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), cotangent), strict=True))


def oracle_results(inputs):
    """The same from the oracle, in float64, for exactly these (rounded) inputs."""
    arrays = {name: tensor.detach().double().numpy() for name, tensor in inputs.items()}
    y = oracles.gated_causal_conv(**arrays)
    dtype = inputs["u"].dtype
    cotangent = torch.linspace(-1, 1, y.size, dtype=torch.float64).view(y.shape).to(dtype).double().numpy()
    return {"y": y} | oracles.gated_causal_conv_gradients(**arrays, dy=cotangent)


def naive_fftconv(u, h, direct, pregate, postgate):
    """The obvious version: real FFTs of twice the length, one filter a channel, gradients by autograd."""
    length, n = u.shape[-1], 2 * max(u.shape[-1], h.shape[-1])
    taps, skip = (x.repeat_interleave(u.shape[1] // h.shape[0], dim=0) for x in (h, direct))
    w = pregate * u
    y = torch.fft.irfft(torch.fft.rfft(w, n=n) * torch.fft.rfft(taps, n=n), n=n)[..., :length]
    return postgate * (y + skip.unsqueeze(-1) * w)


def pooled(results):
    """Results of several batches as one."""
    results = list(results)
    stack = torch.stack if isinstance(results[0]["y"], torch.Tensor) else np.stack
    return {name: stack([result[name] for result in results]) for name in results[0]}


def relative_error(actual, reference):
    """Relative root mean square error."""
    return np.linalg.norm(actual.double().numpy() - reference) / np.linalg.norm(reference)


# FFT lengths


def is_smooth(n, largest):
    for prime in (2, 3, 5, 7, 11):
        while prime <= largest and n % prime == 0:
            n //= prime
    return n == 1


def test_fft_length_never_wraps_and_is_the_smallest_even_5_smooth_size():
    sizes = [n for n in range(2, 4100, 2) if is_smooth(n, 5)]
    for needed in range(1, 2050):
        length = needed // 2 + 1
        taps = needed + 1 - length
        expected = next(n for n in sizes if n >= needed)
        if length == taps and is_smooth(length, 11):
            expected = 2 * length
        assert fft_length(length, taps) == expected, (length, taps)


@pytest.mark.parametrize("length", [2**20, 1_000_000, 450_000, 999_983, 2**17 + 1])
def test_fft_length_of_long_inputs_is_even_smooth_and_at_most_a_twelfth_too_long(length):
    n = fft_length(length, length)
    assert 2 * length - 1 <= n <= (2 * length) * 13 / 12
    assert n % 2 == 0
    assert is_smooth(n, 11)


# long convolution


both_sums = pytest.mark.parametrize("exact", [False, True], ids=["float32 sums", "float64 sums"])


def by_every_backend(shapes):
    """Parametrize by shape and backend; frames are for filters of at most half the length of the input."""
    pairs = [
        (sizes, backend)
        for sizes in shapes
        for backend in ("torch", "blocked", "overlap_save", "matrix")
        if backend != "overlap_save" or 2 * sizes[4] <= sizes[3]
    ]
    return pytest.mark.parametrize(("sizes", "backend"), pairs, ids=str)


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks of the size that the machine likes, or so small that every shape takes many."""
    if request.param == "small blocks":
        monkeypatch.setattr(engine, "block_floats", lambda n: 3 * n)


@by_every_backend(SIZES)
@pytest.mark.usefixtures("blocks")
def test_fftconv_and_all_its_gradients_equal_the_oracle_in_float64(sizes, backend):
    inputs = make_inputs(*sizes)
    results, expected = run(causal_fftconv, inputs, backend=backend), oracle_results(inputs)
    assert results.keys() == {"y", *NAMES}
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name], rtol=0, atol=1e-12 * np.abs(expected[name]).max())


@by_every_backend(SIZES)
@both_sums
def test_fftconv_in_float32_is_at_most_twice_as_far_from_the_oracle_as_the_obvious_version(sizes, backend, exact):
    # over many batches, so that no lucky rounding of few numbers decides
    batches = [make_inputs(*sizes, dtype=torch.float32) for _ in range(5 if sizes[3] > 200 else 12)]
    expected = pooled(oracle_results(inputs) for inputs in batches)
    fast = pooled(run(causal_fftconv, inputs, backend=backend, exact=exact) for inputs in batches)
    naive = pooled(run(naive_fftconv, inputs) for inputs in batches)
    for name, result in fast.items():
        assert result.dtype == torch.float32
        # where the obvious version happens to be exact, one rounding of the result is allowed
        allowed = max(2 * relative_error(naive[name], expected[name]), torch.finfo(torch.float32).eps)
        assert relative_error(result, expected[name]) <= allowed, name


@by_every_backend([(2, 4, 4, 127, 127), (2, 6, 2, 1000, 64), (1, 2, 1, 3, 9)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 2e-2)])
def test_fftconv_of_half_precision_inputs_loses_only_their_rounding(sizes, dtype, tolerance, backend):
    inputs = make_inputs(*sizes, dtype=dtype)
    results, expected = run(causal_fftconv, inputs, backend=backend), oracle_results(inputs)
    for name, result in results.items():
        assert result.dtype == dtype
        assert relative_error(result, expected[name]) <= tolerance, name


def test_half_precision_inputs_meet_float32_filters_and_keep_their_dtype():
    inputs = make_inputs(2, 4, 4, 64, 64, dtype=torch.bfloat16)
    inputs["h"], inputs["direct"] = inputs["h"].float().detach(), inputs["direct"].float().detach()
    y = causal_fftconv(**inputs)
    assert y.dtype == torch.bfloat16
    wide = causal_fftconv(**{name: tensor.float() for name, tensor in inputs.items()})
    torch.testing.assert_close(y, wide.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("given", [(), ("direct",), ("pregate",), ("postgate",), ("direct", "postgate")], ids=str)
def test_absent_direct_and_gates_count_as_zero_and_one(given):
    inputs = make_inputs(2, 4, 2, 17, 17)
    some = {name: tensor for name, tensor in inputs.items() if name in ("u", "h", *given)}
    neutral = {"direct": torch.zeros(2).double()}
    neutral |= {name: torch.ones(2, 4, 17).double() for name in ("pregate", "postgate")}
    full = neutral | some
    torch.testing.assert_close(causal_fftconv(**some), causal_fftconv(**full), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 9, 9), (1, 2, 2, 7, 3), (1, 3, 1, 4, 9), (2, 2, 2, 1, 1)], ids=str)
def test_fftconv_passes_gradcheck(sizes):
    inputs = make_inputs(*sizes)

    def function(u, h, direct, pregate, postgate):
        return causal_fftconv(u, h, direct, pregate=pregate, postgate=postgate)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_gradients_flow_to_each_input_alone():
    inputs = make_inputs(2, 4, 2, 9, 9)
    together = run(causal_fftconv, inputs)
    for name in NAMES:
        frozen = {key: tensor.detach() for key, tensor in inputs.items()}
        frozen[name].requires_grad_()
        y = causal_fftconv(**frozen)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        torch.testing.assert_close(frozen[name].grad, together[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["linear", "quadratic"])
def test_a_second_derivative_raises_rather_than_being_dropped(loss):
    inputs = make_inputs(1, 2, 2, 5, 5)
    y = causal_fftconv(inputs["u"], inputs["h"])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(y), inputs["u"], create_graph=True)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="empty input"):
        causal_fftconv(torch.randn(0, 4, 9), torch.randn(2, 9))


@pytest.mark.parametrize("past", [torch.zeros(2, 4, 3), torch.zeros(1, 4, 2)], ids=["length", "batch"])
def test_a_short_convolution_refuses_a_past_of_another_shape(past):
    with pytest.raises(ValueError, match="past must hold the 2 inputs"):
        short_conv(torch.zeros(2, 4, 5), torch.zeros(4, 3), past=past)


def test_a_multihead_convolution_refuses_heads_that_do_not_divide_the_channels():
    x = torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match="H dividing the 4 channels"):
        multihead_conv(x, x, x, torch.zeros(3, 5), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("length", "taps", "t"), [(100, 100, 0), (100, 7, 98), (333, 400, 130), (1025, 1025, 127)])
def test_not_a_bit_of_an_output_depends_on_later_inputs(length, taps, t, dtype):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 4, 2, length, taps, dtype).items()}
    changed = inputs | {name: inputs[name].clone() for name in ("u", "pregate", "postgate")}
    for name in ("u", "pregate", "postgate"):
        # what float64 transforms leave of inputs a million times larger would show in float32
        size = 100 if dtype == torch.float64 else 1
        changed[name][..., t + 1 :] = size * torch.randn(2, 4, length - 1 - t, dtype=dtype)
    y, y_changed = causal_fftconv(**inputs, exact=True), causal_fftconv(**changed, exact=True)
    assert torch.equal(y[..., : t + 1], y_changed[..., : t + 1])
    assert not torch.allclose(y[..., t + 1 :], y_changed[..., t + 1 :])


def test_exact_float32_outputs_on_a_cpu_are_the_same_bits_whatever_the_length_of_the_input():
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 4, 4, 1000, 1000, torch.float32).items()}
    whole = causal_fftconv(**inputs, exact=True)
    for n in (1, 63, 131, 640, 999):
        prefix = {name: x[..., :n] if x.ndim > 1 else x for name, x in inputs.items()}
        assert torch.equal(causal_fftconv(**prefix, exact=True), whole[..., :n])


def test_lower_float32_precision_of_torch_brings_float32_transforms_to_exact_convolutions():
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 4, 4, 1000, 1000, torch.float32).items()}
    exact, plain = causal_fftconv(**inputs, exact=True), causal_fftconv(**inputs)
    torch.set_float32_matmul_precision("high")
    assert torch.equal(causal_fftconv(**inputs, exact=True), plain)
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(exact, plain)


def test_memory_layout_does_not_matter():
    inputs = {name: tensor.detach() for name, tensor in make_inputs(2, 6, 3, 33, 33).items()}
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in inputs.items()}
    strided["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["h"] = inputs["h"].flip(-1).contiguous().flip(-1)
    assert not any(tensor.is_contiguous() for name, tensor in strided.items() if name != "h")
    torch.testing.assert_close(causal_fftconv(**strided), causal_fftconv(**inputs), rtol=0, atol=1e-13)


def test_an_expanded_gate_is_read_as_what_it_shows():
    u, h = torch.randn(2, 4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    gate = torch.randn(1, 1, 9, dtype=torch.float64)
    y = causal_fftconv(u, h, pregate=gate.expand(2, 4, 9))
    torch.testing.assert_close(y, causal_fftconv(u * gate, h), rtol=0, atol=1e-14)


def test_inputs_stay_unchanged():
    inputs = make_inputs(2, 4, 2, 17, 30)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    causal_fftconv(**inputs).square().sum().backward()
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"u": torch.ones(4, 9)}, ValueError, r"u \(B, C, L\).*got u \(4, 9\)"),
        ({"h": torch.ones(1, 2, 9)}, ValueError, r"h \(H, K\).*got .* h \(1, 2, 9\)"),
        ({"h": torch.ones(3, 9)}, ValueError, r"channels of u \(4\) must be a multiple of the filters in h \(3\)"),
        ({"h": torch.ones(8, 9)}, ValueError, r"channels of u \(4\) must be a multiple of the filters in h \(8\)"),
        ({"h": torch.ones(2, 0)}, ValueError, "empty input"),
        ({"u": torch.ones(2, 4, 0)}, ValueError, "empty input"),
        ({"direct": torch.ones(4)}, ValueError, r"direct must have shape \(2,\).*got \(4,\)"),
        ({"pregate": torch.ones(2, 4, 1)}, ValueError, r"pregate must have the shape of u, \(2, 4, 9\)"),
        ({"postgate": torch.ones(4, 9)}, ValueError, r"postgate must have the shape of u, \(2, 4, 9\)"),
        ({"u": torch.ones(2, 4, 9, dtype=torch.complex64)}, TypeError, "u of torch.complex64"),
        ({"h": torch.ones(2, 9, dtype=torch.complex64)}, TypeError, "h of torch.complex64"),
        ({"direct": torch.ones(2, dtype=torch.long)}, TypeError, "direct of torch.int64"),
        ({"h": torch.ones(2, 9, device="meta")}, ValueError, "h lies on meta but u on cpu"),
        ({"postgate": torch.ones(2, 4, 9, device="meta")}, ValueError, "postgate lies on meta but u on cpu"),
        ({"backend": "cuda"}, ValueError, "no backend 'cuda'; choose one of torch, blocked"),
        ({"backend": "overlap_save"}, ValueError, r"cannot serve .* at most half as long as u \(9\)"),
        ({"backend": "triton"}, ValueError, "the backend 'triton' cannot serve this convolution: "),
        ({"backend": "flashfftconv"}, ValueError, "the backend 'flashfftconv' cannot serve this convolution: "),
        ({"h": torch.ones(2, 9, dtype=torch.float64)}, TypeError, "h is torch.float64 but u torch.float32"),
        ({"direct": torch.ones(2, dtype=torch.float64)}, TypeError, "direct is torch.float64 but u torch.float32"),
        ({"pregate": torch.ones(2, 4, 9, dtype=torch.float64)}, TypeError, "pregate is torch.float64 but u"),
    ],
)
def test_fftconv_refuses_what_it_cannot_convolve(changes, error, match):
    inputs = {"u": torch.ones(2, 4, 9), "h": torch.ones(2, 9)} | changes
    with pytest.raises(error, match=match):
        causal_fftconv(**inputs)


# short convolution


@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_short_conv_equals_the_oracle(length, taps):
    x, weight, bias = torch.randn(2, 6, length).double(), torch.randn(6, taps).double(), torch.randn(6).double()
    expected = oracles.short_conv(x.mT.numpy(), weight.numpy(), bias.numpy())
    np.testing.assert_allclose(short_conv(x, weight, bias).mT, expected, rtol=0, atol=1e-14)
    expected = oracles.short_conv(x.mT.numpy(), weight.numpy())
    np.testing.assert_allclose(short_conv(x, weight).mT, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("taps", [1, 2, 5])
@pytest.mark.parametrize("cut", [0, 1, 7, 12])
def test_short_conv_goes_on_from_its_past(taps, cut):
    x, weight, bias = torch.randn(2, 6, 13), torch.randn(6, taps), torch.randn(6)
    past = torch.nn.functional.pad(x, (taps - 1, 0))[..., cut : cut + taps - 1]
    y = short_conv(x[..., cut:], weight, bias, past)
    torch.testing.assert_close(y, short_conv(x, weight, bias)[..., cut:], rtol=0, atol=0)


def test_short_conv_passes_gradcheck_with_a_past():
    shapes = (2, 3, 4), (3, 3), (3,), (2, 3, 2)
    tensors = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(short_conv, tensors)


def test_short_conv_returns_the_promoted_dtype():
    x, weight = torch.randn(1, 2, 5, dtype=torch.bfloat16), torch.randn(2, 3)
    assert short_conv(x, weight).dtype == torch.float32
    assert short_conv(x, weight.bfloat16()).dtype == torch.bfloat16


# MultiHyena


@pytest.fixture(params=["products", "convolutions"])
def form(request, monkeypatch):
    """Either form of the operator, whatever the length."""
    monkeypatch.setattr(multihead, "_MATMUL_LENGTH", 10**9 if request.param == "products" else 0)


def make_heads(heads, width, new, past, taps, dtype=torch.float64):
    shapes = (2, heads * width, new), (2, heads * width, past + new), (2, heads * width, past + new)
    return [torch.randn(shape, dtype=dtype) for shape in (*shapes, (heads, taps), (heads,))]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("heads", "width"), [(1, 4), (2, 3), (4, 1)])
@pytest.mark.parametrize(("new", "past", "taps"), [(1, 0, 1), (1, 20, 21), (13, 0, 13), (13, 7, 5), (66, 3, 90)])
def test_multihead_conv_equals_the_oracle_in_both_forms(heads, width, new, past, taps):
    q, k, v, h, direct = make_heads(heads, width, new, past, taps)
    padded = torch.nn.functional.pad(q, (past, 0))
    expected = oracles.multihyena_core(*(x.numpy() for x in (padded, k, v, h, direct)))[..., past:]
    y = multihead_conv(q, k, v, h, direct)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("new", "past", "taps"), [(3, 0, 3), (2, 2, 2)])
def test_multihead_conv_passes_gradcheck_in_both_forms(new, past, taps):
    tensors = tuple(x.requires_grad_() for x in make_heads(2, 2, new, past, taps))
    assert torch.autograd.gradcheck(multihead_conv, tensors)


@pytest.mark.usefixtures("form")
def test_heads_of_width_1_are_plain_hyena():
    q, k, v, h, direct = make_heads(6, 1, 40, 0, 40)
    expected = q * causal_fftconv(k * v, h, direct)
    torch.testing.assert_close(multihead_conv(q, k, v, h, direct), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("form")
def test_multihead_conv_of_half_precision_computes_in_float32_and_returns_the_dtype():
    q, k, v, h, direct = make_heads(2, 4, 33, 5, 38, dtype=torch.bfloat16)
    y = multihead_conv(q, k, v, h, direct)
    wide = multihead_conv(*(x.double() for x in (q, k, v, h, direct)))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, wide.numpy()) <= 2e-2


def test_the_form_is_chosen_by_the_number_of_queries(monkeypatch):
    calls = []
    for name in ("_by_products", "_by_convolutions"):
        form = getattr(multihead, name)
        monkeypatch.setattr(multihead, name, lambda *args, name=name, form=form: calls.append(name) or form(*args))
    for new in (1, 64, 65):
        multihead_conv(*make_heads(2, 2, new, 100, 100))
    assert calls == ["_by_products", "_by_products", "_by_convolutions"]


# segments


def causal_function(rows, counts):  # noqa: ARG001 (a causal function needs no counts)
    """Something causal, nonlinear and aware of time, with more channels out than in; exact on whole numbers."""
    time = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype).view(1, -1, 1)
    return torch.cat([rows.cumsum(1) * time, rows.square().cumsum(1) - time], dim=-1)


def whole_function(rows, counts):
    """Something that looks at the whole row: the row reversed in time."""
    if counts is None:
        return rows.flip(1)
    kept = rows.masked_fill((torch.arange(rows.shape[1]) >= counts[:, None]).unsqueeze(-1), 0)
    index = counts.unsqueeze(1) - 1 - torch.arange(rows.shape[1])
    return kept.gather(1, index.clamp(min=0).unsqueeze(-1).expand_as(kept))


def whole_numbers(*shape):
    return torch.randint(-9, 10, shape).double()


def documents_of(mask, starts):
    """Stream positions (row, columns) of every sequence: real tokens between two starts of one row."""
    batch, length = mask.shape
    for row in range(batch):
        numbers = starts[row].cumsum(0) if starts is not None else torch.zeros(length)
        for number in numbers.unique():
            columns = (mask[row] & (numbers == number)).nonzero().squeeze(1)
            if columns.numel():
                yield row, columns


def random_batch(seed, packed):
    torch.manual_seed(seed)
    batch, length = int(torch.randint(1, 5, ())), int(torch.randint(1, 24, ()))
    mask = torch.rand(batch, length) < torch.rand(batch, 1)
    starts = torch.rand(batch, length) < 0.3 if packed else None
    return mask, starts


@pytest.mark.parametrize("function", [causal_function, whole_function])
@pytest.mark.parametrize("kind", ["cached", "masked", "packed"])
@pytest.mark.parametrize("seed", range(12))
def test_over_rows_equals_running_every_sequence_alone(seed, kind, function):
    mask, starts = random_batch(seed, kind == "packed")
    stream = whole_numbers(*mask.shape, 3)
    segments = build_segments(mask, starts, cached=kind == "cached")
    expected = torch.zeros_like(function(stream, None))
    for row, columns in documents_of(mask, starts):
        expected[row, columns] = function(stream[row : row + 1, columns], None)[0]
    assert torch.equal(over_rows(segments, function, stream), expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["cached", "masked", "packed"])
def test_positions_count_the_tokens_of_each_sequence_and_max_length_is_the_longest(seed, kind):
    mask, starts = random_batch(seed + 100, kind == "packed")
    segments = build_segments(mask, starts, cached=kind == "cached")
    expected, longest = torch.zeros(mask.shape, dtype=torch.long), 1
    for row, columns in documents_of(mask, starts):
        expected[row, columns] = torch.arange(columns.numel())
        longest = max(longest, columns.numel())
    if segments is None:
        assert bool(mask.all())
        return
    assert torch.equal(segments.positions, expected)
    assert segments.max_length == longest


@pytest.mark.parametrize("cached", [True, False])
def test_masked_tokens_get_no_gradient_and_do_not_touch_others(cached):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 0]]).bool()
    stream = whole_numbers(2, 5, 3).requires_grad_()
    y = over_rows(build_segments(mask, None, cached=cached), causal_function, stream)
    y.sum().backward()
    assert not stream.grad[~mask].any()
    poisoned = torch.where(mask.unsqueeze(-1), stream, 1e6)
    again = over_rows(build_segments(mask, None, cached=cached), causal_function, poisoned)
    assert torch.equal(again, y)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_a_batch_of_masked_tokens_only_gives_zeros_and_finite_gradients(shape, cached):
    segments = build_segments(torch.zeros(shape, dtype=torch.bool), None, cached=cached)
    stream = whole_numbers(*shape, 3).requires_grad_()
    y = over_rows(segments, causal_function, stream)
    y.sum().backward()
    assert y.shape == (*shape, 6)
    assert not y.any()
    assert not stream.grad.any()


def test_a_row_of_masked_tokens_among_others_stays_zero():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()
    stream = whole_numbers(3, 3, 2)
    y = over_rows(build_segments(mask, None, cached=True), causal_function, stream)
    assert not y[1].any()
    assert torch.equal(y[2, 1:], causal_function(stream[2:, 1:], None)[0])


def test_a_dense_batch_is_handed_over_as_it_is():
    seen = []
    stream = whole_numbers(2, 5, 3)
    assert build_segments(None, None, cached=False) is None
    over_rows(None, lambda rows, counts: seen.append((rows, counts)) or rows, stream)
    assert seen[0][0] is stream
    assert seen[0][1] is None


def test_documents_are_grouped_so_that_rows_are_at_most_twice_as_wide_as_their_documents():
    starts = torch.zeros(1, 40).bool()
    starts[0, [0, 1, 2, 5, 9, 10, 30]] = True
    segments = build_segments(None, starts, cached=False)
    assert sum(len(group.counts) for group in segments.groups) == 7
    for group in segments.groups:
        assert group.index.shape[1] == group.counts.max()
        assert (2 * group.counts > group.counts.max()).all()


STARTS = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    "description",
    [
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2], [4, 7, 7, 7, 7, 7]])},
        {"cu_seq_lens": torch.tensor([0, 3, 5, 6, 7, 12], dtype=torch.int32)},
        pytest.param(
            {"cu_seq_lens": torch.tensor([0, 3, 3, 5, 6, 7, 7, 12, 12])}, id="cu_seq_lens-with-empty-documents"
        ),
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])},
        {
            "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]]),
            "cu_seq_lens": torch.tensor([0, 3, 5, 6, 7, 12]),
        },
    ],
    ids=lambda description: "-".join(description),
)
def test_every_description_of_a_packed_batch_gives_the_same_starts(description):
    assert torch.equal(document_starts(2, 6, **description), STARTS)


def test_one_row_of_seq_idx_or_position_ids_serves_the_whole_batch():
    expected = torch.tensor([[1, 0, 1, 0]]).bool().expand(3, 4)
    assert torch.equal(document_starts(3, 4, seq_idx=torch.tensor([[0, 0, 1, 1]])), expected)
    assert torch.equal(document_starts(3, 4, position_ids=torch.tensor([[0, 1, 0, 1]])), expected)


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"seq_idx": torch.tensor([[0, 0, 0], [1, 1, 1]])},
        {"cu_seq_lens": torch.tensor([0, 3, 6])},
        {"position_ids": torch.tensor([[0, 1, 2], [5, 6, 7]])},
    ],
    ids=lambda description: "-".join(description) or "nothing",
)
def test_rows_of_one_document_each_have_no_starts(description):
    assert document_starts(2, 3, **description) is None


@pytest.mark.parametrize(
    ("description", "match"),
    [
        ({"seq_idx": torch.tensor([[0, 1, 0], [0, 0, 0]])}, "seq_idx decreases within a row"),
        ({"seq_idx": torch.zeros(3, 3).long()}, r"seq_idx must have shape \(2, 3\).*got \(3, 3\)"),
        ({"seq_idx": torch.zeros(3).long()}, r"seq_idx must have shape \(2, 3\).*got \(3,\)"),
        ({"cu_seq_lens": torch.tensor([0, 2, 5])}, r"rise from 0 to the number of tokens \(6\).*\[5\]"),
        ({"cu_seq_lens": torch.tensor([1, 3, 6])}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor([0, 4, 3, 6])}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor([0, 6, 9])}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor([[0, 3], [3, 6]])}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor([], dtype=torch.long)}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor(6)}, "rise from 0"),
        ({"cu_seq_lens": torch.tensor([0, 4, 6])}, "goes on in the next row.*every multiple of the length"),
        ({"seq_idx": torch.tensor([[0, 1, 0], [0, 0, 0]]).to(torch.uint8)}, "seq_idx decreases within a row"),
        (
            {"seq_idx": torch.tensor([[0, 0, 1], [0, 0, 0]]), "cu_seq_lens": torch.tensor([0, 1, 3, 6])},
            "describe different documents",
        ),
    ],
)
def test_descriptions_that_contradict_the_batch_are_refused(description, match):
    with pytest.raises(ValueError, match=match):
        document_starts(2, 3, **description)


U, H, P, W = torch.ones(1, 2, 8), torch.ones(2, 8), torch.ones(1, 6, 8), torch.ones(6, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (causal_fftconv, (U, None), "h of type NoneType"),
        (causal_fftconv, (None, H), "u of type NoneType"),
        (bidirectional_fftconv, (U, H, None), "h_reverse of type NoneType"),
        (hyena_conv, (P, None, None, H), "weight of type NoneType"),
        (hyena_conv, (P, W, None, None), "h of type NoneType"),
        (hyena_conv, (P + 0j, W, None, H), "p of torch.complex64"),
        (hyena_conv, (P, W.double(), None, H), "weight is torch.float64 but p torch.float32"),
        (short_conv, (None, W), "x of type NoneType"),
        (short_conv, (P + 0j, W), "x of torch.complex64"),
        (causal_fftconv, (U.to_sparse(), H), "u of torch.float32 in layout torch.sparse_coo"),
        (causal_fftconv, (U.to(torch.float8_e4m3fn), H), "u of torch.float8_e4m3fn"),
    ],
)
def test_errors_name_the_argument_as_the_function_does(function, arguments, name):
    with pytest.raises(TypeError, match=re.escape(name)):
        function(*arguments)
