"""The matrix backend equals the float64 oracles in real arithmetic, in eager, compiled and exported form.

Run: python -m pytest tests/test_matrix.py -q

Letters: B batch, C channels, H filters, G channels a filter, L length, K taps, n points of a transform.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hyena_hf.ops.backends import matrix
from hyena_hf.ops.backends.matrix import bidirectional, choose_factors, convolve
from tests import oracles
from tests.test_ops import make_inputs, naive_fftconv, oracle_results, pooled, relative_error, run


SIZES = [  # B, C, H, L, K
    *[(2, 4, 4, length, length) for length in (1, 2, 3, 64, 127, 1000, 1025)],
    (1, 2, 2, 4096, 4096),
    (2, 4, 4, 127, 5),
    (2, 4, 4, 1000, 1),
    (1, 6, 2, 127, 127),
    (1, 6, 1, 64, 40),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_convolution_and_all_its_gradients_equal_the_oracle_in_float64(sizes):
    inputs = make_inputs(*sizes)
    expected = oracle_results(inputs)
    for name, result in run(convolve, inputs).items():
        np.testing.assert_allclose(result, expected[name], rtol=0, atol=1e-12 * np.abs(expected[name]).max())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_in_float32_it_is_at_most_twice_as_far_from_the_oracle_as_ffts(sizes):
    # over many batches, so that no lucky rounding of few numbers decides
    batches = [make_inputs(*sizes, dtype=torch.float32) for _ in range(3 if sizes[3] > 200 else 12)]
    expected = pooled(oracle_results(inputs) for inputs in batches)
    results = pooled(run(convolve, inputs) for inputs in batches)
    naive = pooled(run(naive_fftconv, inputs) for inputs in batches)
    for name, result in results.items():
        error = relative_error(result, expected[name])
        assert result.dtype == torch.float32
        assert error <= 1e-6, name
        # where the obvious version happens to be exact, one rounding of the result is allowed
        assert error <= max(2 * relative_error(naive[name], expected[name]), torch.finfo(torch.float32).eps), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sizes", [(2, 4, 4, 127, 127), (2, 6, 2, 1000, 64), (1, 2, 1, 3, 2)], ids=str)
def test_half_precision_inputs_lose_only_their_rounding(sizes, dtype, tolerance):
    inputs = make_inputs(*sizes, dtype=dtype)
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in ("h", "direct")}
    expected = oracle_results(inputs)
    for name, result in run(convolve, inputs).items():
        assert result.dtype == (torch.float32 if name in ("h", "direct") else dtype)
        assert relative_error(result, expected[name]) <= tolerance, name


@pytest.mark.parametrize(("length", "taps"), [(2**17, 2**17), (100_003, 100_003), (100_003, 1025)])
def test_long_inputs_equal_ffts_in_float64(length, taps):
    u, h = torch.randn(1, 2, length, dtype=torch.float64), torch.randn(2, taps, dtype=torch.float64)
    n = 2 * length
    expected = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(h, n=n), n=n)[..., :length]
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        y = convolve(u.to(dtype), h.to(dtype), None, None, None)
        exact = expected if dtype == torch.float64 else None
        if exact is None:  # of the rounded inputs
            rounded = [torch.fft.rfft(x.float().double(), n=n) for x in (u, h)]
            exact = torch.fft.irfft(rounded[0] * rounded[1], n=n)[..., :length]
        assert relative_error(y, exact.numpy()) <= tolerance


@pytest.mark.parametrize("given", [(), ("direct",), ("pregate",), ("postgate",), ("direct", "postgate")], ids=str)
def test_absent_direct_and_gates_count_as_zero_and_one(given):
    inputs = make_inputs(2, 4, 2, 17, 17)
    neutral = {"direct": torch.zeros(2), "pregate": torch.ones(2, 4, 17), "postgate": torch.ones(2, 4, 17)}
    some = {name: inputs[name] if name in given else None for name in neutral}
    full = neutral | {name: inputs[name] for name in given}
    u, h = inputs["u"], inputs["h"]
    torch.testing.assert_close(convolve(u, h, **some), convolve(u, h, **full), rtol=0, atol=1e-14)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 9, 9), (1, 2, 2, 7, 3), (2, 2, 2, 1, 1), (1, 1, 1, 40, 30)], ids=str)
def test_first_and_second_derivatives_pass_gradcheck(sizes):
    inputs = tuple(make_inputs(*sizes).values())
    assert torch.autograd.gradcheck(convolve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, inputs, fast_mode=True)


def test_inputs_may_lie_in_memory_in_any_order_and_stay_as_they_are():
    inputs = make_inputs(2, 4, 2, 33, 33)
    expected = convolve(**inputs)
    strided = {name: inputs[name].detach().mT.contiguous().mT for name in ("u", "h", "pregate", "postgate")}
    strided["direct"] = inputs["direct"].detach().repeat_interleave(2)[::2]
    kept = {name: tensor.clone() for name, tensor in strided.items()}
    torch.testing.assert_close(convolve(**strided), expected, rtol=0, atol=1e-13)
    assert all(torch.equal(kept[name], tensor) for name, tensor in strided.items())


def test_autocast_does_not_lower_the_precision_of_the_products():
    inputs = {name: x.detach() for name, x in make_inputs(2, 4, 2, 200, 200, dtype=torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(**inputs)
    assert torch.equal(y, convolve(**inputs))


def test_matrices_remembered_from_inference_mode_serve_training():
    inputs = make_inputs(1, 2, 2, 77, 77)
    with torch.inference_mode():
        convolve(**{name: x.detach() for name, x in inputs.items()})
    convolve(**inputs).sum().backward()
    assert inputs["h"].grad.any()


@pytest.mark.parametrize("needed", [1, 2, 3, 127, 2049, 20_005, 2**17 - 1, 2**21, 1_999_965])
def test_circles_are_hardly_larger_than_needed_and_factors_are_small(needed):
    factors = choose_factors(needed, (needed + 1) // 2)
    assert needed <= math.prod(factors) <= max(1.03 * needed, needed + 12)
    assert factors[0] % 2 == 0
    assert max(factors) <= 128


# graphs


class Conv(torch.nn.Module):
    def forward(self, u, h, direct, pregate, postgate):
        return convolve(u, h, direct, pregate, postgate)


class TwoSided(torch.nn.Module):
    def forward(self, u, h, direct, pregate, postgate):
        return bidirectional(u, h, h.flip(-1), direct, pregate, postgate)


def graph_nodes(program):
    """Nodes of a graph and of the graphs inside it."""
    modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return list(itertools.chain.from_iterable(module.graph.nodes for module in modules))


@pytest.mark.parametrize("module", [Conv(), TwoSided()], ids=lambda module: type(module).__name__)
def test_an_exported_graph_of_any_batch_and_length_holds_no_complex_number(module):
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2)
    shapes = {name: {0: batch, 2: length} for name in ("u", "pregate", "postgate")} | {
        "h": {1: length},
        "direct": None,
    }
    arguments = {name: x.detach() for name, x in make_inputs(2, 4, 2, 50, 50).items()}
    program = torch.export.export(module, (), arguments, dynamic_shapes=shapes)
    values = [node.meta["val"] for node in graph_nodes(program) if "val" in node.meta]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) > 50
    assert not any(tensor.is_complex() for tensor in tensors)
    for sizes in ((3, 4, 2, 2, 2), (1, 4, 2, 511, 511), (1, 4, 2, 512, 512), (2, 4, 2, 1300, 1300)):
        inputs = {name: x.detach() for name, x in make_inputs(*sizes).items()}
        torch.testing.assert_close(program.module()(**inputs), module(**inputs), rtol=0, atol=1e-10)


def test_the_exported_form_of_a_short_filter_takes_any_length():
    length = torch.export.Dim("length", min=2)
    u, h = torch.randn(1, 2, 50, dtype=torch.float64), torch.randn(2, 9, dtype=torch.float64)
    shapes = {name: {2: length} for name in ("u", "pregate", "postgate")} | {"h": None, "direct": None}
    arguments = {"u": u, "h": h, "direct": h[:, 0], "pregate": u, "postgate": u}
    program = torch.export.export(Conv(), (), arguments, dynamic_shapes=shapes).module()
    for new in (2, 8, 9, 700):
        x = torch.randn(1, 2, new, dtype=torch.float64)
        expected = oracles.gated_causal_conv(*(tensor.numpy() for tensor in (x, h, h[:, 0], x, x)))
        actual = program(u=x, h=h, direct=h[:, 0], pregate=x, postgate=x)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_it_compiles_to_one_graph_with_its_matrices_as_constants():
    inputs = {name: x.detach() for name, x in make_inputs(1, 2, 1, 20, 20).items()}
    y = torch.compile(convolve, fullgraph=True)(**inputs)
    torch.testing.assert_close(y, convolve(**inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("module", "dynamic"), [(Conv(), False), (Conv(), True), (TwoSided(), True)], ids=str)
def test_traced_gradients_are_those_of_the_operator(module, dynamic):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (70, 90):
        inputs = make_inputs(1, 2, 1, length, length)
        expected = run(module, inputs)
        for name, result in run(compiled, inputs).items():
            torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-11)


# two sides, and sparse in frequency


def two_sided_inputs(length, taps, reverse_taps):
    inputs = {name: x.detach() for name, x in make_inputs(2, 4, 2, length, taps).items()}
    return inputs | {"h_reverse": torch.randn(2, reverse_taps, dtype=torch.float64)}


@pytest.mark.parametrize(
    "lengths", [(1, 1, 1), (2, 2, 1), (3, 9, 9), (127, 127, 126), (127, 5, 40), (1000, 1000, 3)], ids=str
)
def test_the_two_sided_form_equals_the_oracle(lengths):
    inputs = two_sided_inputs(*lengths)
    arrays = {name: x.numpy() for name, x in inputs.items()}
    w = arrays["u"] * arrays["pregate"]
    expected = oracles.bidirectional_conv(w, arrays["h"], arrays["h_reverse"], arrays["direct"]) * arrays["postgate"]
    np.testing.assert_allclose(bidirectional(**inputs), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def masked_spectrum_conv(w, h, h_reverse, keep):
    """Dense sums: every frequency of the skew circle, those above keep / 2 cycles a token set to zero."""
    length, taps, reverse_taps = w.shape[-1], h.shape[-1], h_reverse.shape[-1]
    n = math.prod(choose_factors(length + max(taps - 1, reverse_taps), length, keep))
    kernel = torch.cat([h, h.new_zeros(len(h), n - taps - reverse_taps), -h_reverse.flip(-1)], dim=-1)
    frequencies = torch.arange(n, dtype=torch.float64) + 0.5
    waves = torch.exp(-2j * math.pi * torch.outer(frequencies, torch.arange(n)) / n)
    kept = torch.minimum(frequencies, n - frequencies) <= keep * n / 2
    spectrum = (torch.nn.functional.pad(w, (0, n - length)) + 0j) @ waves.T * ((kernel + 0j) @ waves.T) * kept
    return (spectrum @ waves.conj() / n).real[..., :length]


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.25, 0.03])
@pytest.mark.parametrize("length", [5, 100, 700])
def test_a_sparse_spectrum_equals_the_dense_product_with_a_masked_one(length, keep):
    inputs = two_sided_inputs(length, length, length - 1)
    w, h, h_reverse = inputs["u"], inputs["h"].repeat_interleave(2, 0), inputs["h_reverse"].repeat_interleave(2, 0)
    expected = masked_spectrum_conv(w, h, h_reverse, keep)
    y = bidirectional(w, inputs["h"], inputs["h_reverse"], None, None, None, keep)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * float(expected.abs().max() + 1))


def count_flops(length, keep):
    inputs = torch.randn(1, 1, length), torch.randn(1, length), torch.randn(1, length - 1)
    with FlopCounterMode(display=False) as counter:
        bidirectional(*inputs, None, None, None, keep)
    return counter.get_total_flops()


def test_half_of_the_spectrum_takes_four_fifths_of_the_multiplications_and_an_eighth_little_more_than_half():
    half, eighth = (count_flops(32_768, keep) / count_flops(32_768, 1.0) for keep in (0.5, 0.125))
    assert half <= 0.8
    assert eighth <= 0.55


def test_products_of_the_last_factor_fall_in_proportion_to_what_is_kept(monkeypatch):
    monkeypatch.setattr(matrix, "choose_factors", lambda *_: (32, 8, 64))
    matrix._cached.cache_clear()
    rows, inputs = 32 * 8 // 2, 2 * 64  # of the last product, in each of three transforms
    counts = [count_flops(8000, keep) for keep in (1.0, 0.75, 0.5, 0.25)]
    matrix._cached.cache_clear()
    assert np.diff(counts).tolist() == [-3 * 2 * rows * inputs * (2 * 16)] * 3


def test_a_causal_filter_whose_spectrum_is_cut_sees_later_tokens():
    h = torch.randn(1, 256, dtype=torch.float64) * torch.exp(-torch.arange(256) / 64)
    future = torch.zeros(1, 1, 256, dtype=torch.float64)
    future[..., 200] = 1
    arguments = future, h, torch.zeros(1, 1, dtype=torch.float64), None, None, None
    assert bidirectional(*arguments)[..., :200].abs().max() < 1e-12
    before, after = bidirectional(*arguments, keep=0.25).tensor_split([200], dim=-1)
    assert before.norm() > 0.1 * after.norm()


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, math.nan])
def test_a_share_of_the_spectrum_out_of_range_is_refused(keep):
    u, h = torch.randn(1, 2, 9), torch.randn(2, 9)
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\]"):
        bidirectional(u, h, h, None, None, None, keep)
