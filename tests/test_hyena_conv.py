"""The short convolution and the fused order-2 operator equal their float64 oracles, forward and backward.

Run: python -m pytest tests/test_hyena_conv.py -q

Letters: B batch, D channels, L length, K taps of the short convolution.
"""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import library

from hyena_hf.ops import causal_fftconv, filter_spectrum, hyena_conv, short_conv, use_backend
from tests import oracles


SIZES = [
    (2, 4, 9, 3, 9),
    (1, 3, 17, 4, 5),
    (2, 5, 1, 3, 1),
    (1, 2, 2, 5, 7),
    (2, 6, 127, 1, 127),
    (1, 3, 1000, 3, 400),
]


def make(batch, width, length, taps, long_taps, dtype=torch.float64):
    """p, weight, bias, h, direct."""
    shapes = (batch, 3 * width, length), (3 * width, taps), (3 * width,), (width, long_taps), (width,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def oracle(p, weight, bias, h, direct):
    """In numpy float64."""
    x = oracles.short_conv(np.swapaxes(p, -1, -2), weight, bias)
    gate, key, value = np.split(np.swapaxes(x, -1, -2), 3, axis=1)
    return gate * oracles.causal_conv(key * value, h, direct)


def relative_error(actual, reference):
    return np.linalg.norm(actual.double().numpy() - reference) / np.linalg.norm(reference)


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks of the size that the machine likes, or of two channels."""
    if request.param == "small blocks":
        fused, short = (import_module(f"hyena_hf.ops.{name}") for name in ("hyena_conv", "short_conv"))
        monkeypatch.setattr(fused, "block_floats", lambda n: 2 * n)
        monkeypatch.setattr(short, "_BLOCK", 0)


# the fused operator


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_fused_operator_equals_the_oracle(sizes):
    inputs = make(*sizes)
    expected = oracle(*(x.detach().numpy() for x in inputs))
    with torch.no_grad():
        np.testing.assert_allclose(hyena_conv(*inputs), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_the_fused_operator_passes_gradcheck(sizes):
    assert torch.autograd.gradcheck(hyena_conv, tuple(make(*sizes)))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_gradients_come_in_any_layout(layout):
    inputs = make(2, 5, 70, 3, 70)
    y = hyena_conv(*inputs)
    grad = torch.randn(2, 70, 5).double().mT if layout == "transposed" else torch.ones((), dtype=y.dtype).expand_as(y)
    found = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(y, inputs, grad.contiguous()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", SIZES[4:], ids=str)
def test_the_fused_operator_in_float32_is_at_most_twice_as_far_from_float64_as_the_separate_ones(sizes):
    def separate(p, weight, bias, h, direct):
        padded = torch.nn.functional.pad(p, (weight.shape[1] - 1, 0))
        x = torch.nn.functional.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])
        gate, key, value = x.chunk(3, dim=1)
        w, n = key * value, 2 * p.shape[-1]
        y = torch.fft.irfft(torch.fft.rfft(w, n=n) * torch.fft.rfft(h[:, : p.shape[-1]], n=n), n=n)
        return gate * (y[..., : p.shape[-1]] + direct.unsqueeze(-1) * w)

    def results(function, inputs):
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]

    inputs = make(*sizes, dtype=torch.float32)
    truth = results(separate, [x.detach().double().requires_grad_() for x in inputs])
    fused, plain = results(hyena_conv, inputs), results(separate, inputs)
    for index, (a, b, exact) in enumerate(zip(fused, plain, truth, strict=True)):
        error = relative_error(a, exact.numpy())
        assert error <= max(2 * relative_error(b, exact.numpy()), torch.finfo(torch.float32).eps), index
        assert error <= 1e-6, index


def test_torch_finds_no_fault_with_the_fused_operator():
    inputs = make(2, 4, 9, 3, 9, torch.float32)
    library.opcheck(torch.ops.hyena_hf.hyena_conv.default, (*inputs, None, True))
    detached = [x.detach() for x in inputs]
    kept, grad = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    for needs in (True, False):
        library.opcheck(torch.ops.hyena_hf.hyena_conv_backward.default, (grad, kept, *detached, None, needs))


def test_a_compiled_fused_operator_is_one_graph_with_the_same_gradients():
    inputs = make(2, 4, 33, 3, 33, torch.float32)
    compiled = torch.compile(hyena_conv, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(hyena_conv(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_fused_operator_takes_a_spectrum_and_gives_the_other_gradients():
    p, weight, bias, h, direct = make(2, 4, 30, 3, 30)
    spectrum = filter_spectrum(h, 40, direct)
    found = torch.autograd.grad(hyena_conv(p, weight, bias, spectrum).square().sum(), (p, weight, bias))
    wanted = torch.autograd.grad(hyena_conv(p, weight, bias, h, direct).square().sum(), (p, weight, bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_spectrum_serves_any_number_of_backward_passes_and_refuses_what_it_is_not_for():
    p, weight, bias, h, direct = make(2, 4, 30, 3, 30)
    spectrum = filter_spectrum(h, 30, direct)
    before = spectrum.spectrum.clone()
    for _ in range(2):
        hyena_conv(p, weight, bias, spectrum).sum().backward()
        assert torch.equal(spectrum.spectrum, before)
    with pytest.raises(ValueError, match="hyena_conv got direct beside a FilterSpectrum"):
        hyena_conv(p, weight, bias, spectrum, direct)
    with pytest.raises(ValueError, match="exact is False, but the FilterSpectrum was made with exact=True"):
        hyena_conv(p, weight, bias, filter_spectrum(h, 30, exact=True))
    with pytest.raises(TypeError, match=r"made of torch\.float32 for inputs of torch\.float64"):
        hyena_conv(p, weight, bias, filter_spectrum(h.float(), 30))
    with (
        pytest.raises(ValueError, match="but use_backend asks for 'matrix'"),
        use_backend("matrix"),
    ):
        hyena_conv(p, weight, bias, h)


@pytest.mark.parametrize(
    ("index", "value", "error", "match"),
    [
        (0, torch.ones(2, 4, 0), ValueError, r"expected x \(B, C, L\) and weight \(C, K\), every size at least 1"),
        (0, torch.ones(2, 4, 5, dtype=torch.complex64), TypeError, "got x of torch.complex64"),
        (0, [1.0], TypeError, "short_conv takes tensors, got x of type list"),
        (1, torch.ones(4, 0), ValueError, "every size at least 1"),
        (1, torch.ones(4, 3, device="meta"), ValueError, "weight lies on meta"),
        (2, torch.ones(1), ValueError, r"bias must have shape \(4,\), one value a channel, got \(1,\)"),
    ],
)
def test_the_short_convolution_refuses_what_does_not_fit(index, value, error, match):
    inputs = [torch.ones(2, 4, 5), torch.ones(4, 3), torch.ones(4)]
    inputs[index] = value
    with pytest.raises(error, match=match):
        short_conv(*inputs)


def test_absent_bias_and_direct_count_as_zero_and_nothing_is_changed_in_place():
    p, weight, bias, h, direct = (x.detach() for x in make(2, 4, 30, 3, 30))
    before = [x.clone() for x in (p, weight, h)]
    y = hyena_conv(p, weight, None, h)
    torch.testing.assert_close(y, hyena_conv(p, weight, torch.zeros_like(bias), h, torch.zeros_like(direct)))
    for x, old in zip((p, weight, h), before, strict=True):
        assert torch.equal(x, old)


def test_a_second_derivative_of_the_fused_operator_raises():
    inputs = make(1, 2, 5, 3, 5)
    with pytest.raises(RuntimeError, match="hyena_conv is differentiable once"):
        torch.autograd.grad(hyena_conv(*inputs).square().sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize(
    ("index", "value", "error", "match"),
    [
        (0, torch.ones(2, 13, 9), ValueError, r"expected p \(B, 3 D, L\) and h \(D, K\), got \(2, 13, 9\)"),
        (0, torch.ones(12, 9), ValueError, r"expected p \(B, 3 D, L\)"),
        (0, torch.ones(2, 12, 9, dtype=torch.bfloat16), TypeError, "p is torch.bfloat16 and weight torch.float32"),
        (1, torch.ones(4, 3), ValueError, r"expected weight \(3 D, K\) and bias \(3 D,\), got \(4, 3\)"),
        (2, torch.ones(4), ValueError, r"got \(12, 3\) and \(4,\)"),
        (3, torch.ones(5, 9), ValueError, r"got \(2, 12, 9\) and \(5, 9\)"),
        (3, torch.ones(4, 9, device="meta"), ValueError, "h lies on meta but p on cpu"),
        (3, torch.ones(4, 9, dtype=torch.complex64), TypeError, "got h of torch.complex64"),
        (4, torch.ones(3), ValueError, r"direct must have shape \(4,\)"),
        (0, torch.full((2, 12, 9), torch.nan), ValueError, "hyena_conv: p holds nan"),
    ],
)
def test_the_fused_operator_refuses_what_does_not_fit(index, value, error, match):
    inputs = [x.detach() for x in make(2, 4, 9, 3, 9, torch.float32)]
    inputs[index] = value
    with pytest.raises(error, match=match):
        hyena_conv(*inputs)


# the short convolution


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("layout", ["time contiguous", "channels contiguous"])
@pytest.mark.parametrize(("length", "taps"), [(1, 3), (2, 5), (13, 1), (40, 4)])
def test_the_short_convolution_and_its_gradients_equal_conv1d_in_either_layout(layout, length, taps):
    x = torch.randn(2, 40, 6, dtype=torch.float64)[:, :length].transpose(1, 2)
    x = x.contiguous() if layout == "time contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = [t.requires_grad_() for t in (x, torch.randn(6, taps).double(), torch.randn(6).double())]

    def reference(x, weight, bias):
        return torch.nn.functional.conv1d(torch.nn.functional.pad(x, (taps - 1, 0)), weight[:, None], bias, groups=6)

    y, expected = short_conv(*inputs), reference(*inputs)
    torch.testing.assert_close(y, expected)
    assert y.stride() == x.stride()
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_short_convolution_in_float32_is_as_exact_as_conv1d():
    x, weight, bias = torch.randn(1, 64, 2048), torch.randn(64, 3), torch.randn(64)
    truth = oracles.short_conv(x.mT.double().numpy(), weight.double().numpy(), bias.double().numpy())
    padded = torch.nn.functional.pad(x, (2, 0))
    naive = relative_error(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=64).mT, truth)
    assert relative_error(short_conv(x, weight, bias).mT, truth) <= 2 * naive


@pytest.mark.parametrize("mixed", [False, True])
def test_the_short_convolution_of_bfloat16_rounds_once(mixed):
    x, weight, bias = torch.randn(2, 6, 50).bfloat16(), torch.randn(6, 3).bfloat16(), torch.randn(6).bfloat16()
    weight = weight.float() if mixed else weight
    wide = short_conv(x.float(), weight.float(), bias.float())
    y = short_conv(x, weight, bias)
    assert y.dtype == (torch.float32 if mixed else torch.bfloat16)
    torch.testing.assert_close(y, wide.to(y.dtype), rtol=0, atol=0)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grads = torch.autograd.grad(short_conv(*leaves).float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def test_the_short_convolution_goes_on_from_a_past_with_its_gradients_in_compiled_graphs_too():
    shapes = (2, 4, 9), (4, 3), (4,), (2, 4, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    compiled = torch.compile(short_conv, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(short_conv(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_of_one_filter_a_channel_agree_with_the_gated_convolution():
    p, weight, bias, h, direct = make(2, 4, 50, 3, 50)
    gate, key, value = short_conv(p, weight, bias).chunk(3, dim=1)
    y = causal_fftconv(value, h, direct, pregate=key, postgate=gate)
    torch.testing.assert_close(y, hyena_conv(p, weight, bias, h, direct))
