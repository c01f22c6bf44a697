"""One door, several backends: who is chosen, what torch knows of the operators, what is kept and what is refused.

Run: python -m pytest tests/test_engine.py -q

That every backend equals the oracle is said in tests/test_ops.py. Letters: B batch, C channels, H filters, L length.
"""

import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import library

from hyena_hf.ops import BACKENDS, bidirectional_fftconv, causal_fftconv, engine, filter_spectrum, use_backend
from hyena_hf.ops.backends import flashfftconv, overlap_save
from hyena_hf.ops.continued import continued_fftconv
from tests import oracles


def tensors(batch=2, channels=4, filters=2, length=9, taps=9, dtype=torch.float32):
    """u, h, direct, pregate, postgate."""
    shapes = (
        (batch, channels, length),
        (filters, taps),
        (filters,),
        (batch, channels, length),
        (batch, channels, length),
    )
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def relative_error(actual, reference):
    return np.linalg.norm(actual.double().numpy() - reference) / np.linalg.norm(reference)


# the choice


@pytest.mark.parametrize(
    ("sizes", "dtype", "backend"),
    [
        ((1, 2, 2, 9, 9), torch.float32, "torch"),
        ((1, 64, 64, 20_000, 20_000), torch.float32, "blocked"),
        ((1, 64, 64, 20_000, 20_000), torch.bfloat16, "blocked"),
        ((1, 8, 8, 16384, 64), torch.float32, "overlap_save"),
        ((1, 8, 8, 16384, 16384), torch.float64, "torch"),
    ],
)
def test_the_choice_is_written_to_the_debug_log_once(sizes, dtype, backend, caplog):
    engine._note.cache_clear()
    u, h, *_ = tensors(*sizes, dtype=dtype)
    with caplog.at_level(logging.DEBUG, logger="hyena_hf.ops.engine"):
        causal_fftconv(u, h)
        causal_fftconv(u, h)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].endswith(f"backend {backend}")


@pytest.mark.parametrize("backend", ["torch", "blocked", "overlap_save", "matrix"])
def test_use_backend_sends_every_convolution_to_one_backend(backend):
    u, h, *_ = tensors(length=40, taps=9)
    expected = causal_fftconv(u, h, backend=backend)
    with use_backend("torch"), use_backend(backend):
        assert torch.equal(causal_fftconv(u, h), expected)
        assert engine.requested_backend("", None, u) == backend
    assert engine.requested_backend("", None, u) is None


def test_use_backend_refuses_an_unknown_name_and_is_left_after_an_error():
    with pytest.raises(ValueError, match="no backend 'cuda'; choose one of torch, blocked"), use_backend("cuda"):
        pass
    u, h, *_ = tensors()
    with pytest.raises(ValueError, match="'overlap_save' cannot serve"), use_backend("overlap_save"):
        causal_fftconv(u, h)
    causal_fftconv(u, h)


def test_every_backend_that_is_not_fit_says_why():
    u, h, *_ = tensors()
    for backend in BACKENDS:
        reason = engine.refusal(backend, engine.Conv(u, h, None, None, None, None, exact=False))
        assert (reason is None) == (backend in ("torch", "blocked", "matrix")), backend


@pytest.mark.parametrize("backend", ["overlap_save", "triton", "flashfftconv"])
def test_causal_backends_refuse_filters_over_later_tokens(backend):
    u, h, *_ = tensors()
    with pytest.raises(ValueError, match="it convolves causally, but there are filters over later tokens"):
        bidirectional_fftconv(u, h, h, backend=backend)


# torch's view of the operators


@pytest.mark.parametrize("given", ["all", "no gates", "reverse", "spectrum"])
@pytest.mark.parametrize("backend", ["torch", "blocked", ""])
def test_torch_finds_no_fault_with_the_operator(given, backend):
    u, h, direct, pregate, postgate = (x.requires_grad_() for x in tensors())
    reverse = torch.randn(2, 8).requires_grad_() if given == "reverse" else None
    if given == "no gates":
        direct = pregate = postgate = None
    spectrum = filter_spectrum(h, 9, direct).spectrum if given == "spectrum" else None
    if spectrum is not None:
        h, direct = h.detach(), direct.detach()
    arguments = u, h, reverse, direct, pregate, postgate, spectrum, backend, False
    library.opcheck(engine.long_conv, arguments)


@pytest.mark.parametrize("needs", [[True] * 6, [True, False, False, False, False, True], [False, True, False] * 2])
@pytest.mark.parametrize("backend", ["torch", "blocked", "overlap_save"])
def test_torch_finds_no_fault_with_the_operator_of_gradients(needs, backend):
    u, h, direct, pregate, postgate = tensors(taps=4)
    arguments = u.clone(), u, h, None, direct, pregate, postgate, None, backend, False, needs
    library.opcheck(engine.long_conv_backward, arguments)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 33, 33), (1, 4, 4, 8192, 60)], ids=str)
def test_a_compiled_convolution_is_one_graph_without_complex_numbers(sizes):
    inputs = [x.requires_grad_() for x in tensors(*sizes)]
    seen = []

    def inspect(graph, _):
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        seen.extend(value.dtype for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    def function(u, h, direct, pregate, postgate):
        return causal_fftconv(u, h, direct, pregate=pregate, postgate=postgate)

    compiled = torch.compile(function, backend=inspect, fullgraph=True)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert seen
    assert not any(dtype.is_complex for dtype in seen)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# spectra


@pytest.mark.parametrize("sizes", [(2, 4, 4, 300, 300), (2, 6, 2, 300, 40), (1, 4, 4, 5, 300)], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_filters_transformed_once_give_what_the_filters_give(sizes, exact):
    u, h, direct, pregate, postgate = tensors(*sizes)
    gates = {"pregate": pregate, "postgate": postgate, "exact": exact}
    spectrum = filter_spectrum(h, 300, direct, exact=exact)
    assert spectrum.nbytes() > h.nbytes
    expected = oracles.gated_causal_conv(*(x.double().numpy() for x in (u, h, direct, pregate, postgate)))
    assert relative_error(causal_fftconv(u, spectrum, **gates), expected) <= 1e-6
    leaf = u.clone().requires_grad_()
    found = torch.autograd.grad(causal_fftconv(leaf, spectrum, **gates).square().sum(), leaf)
    wanted = torch.autograd.grad(causal_fftconv(leaf, h, direct, **gates).square().sum(), leaf)
    torch.testing.assert_close(found, wanted)


def test_a_spectrum_refuses_what_it_was_not_made_for():
    u, h, direct, *_ = tensors()
    spectrum = filter_spectrum(h, 8)
    with pytest.raises(ValueError, match="serves inputs of up to 8 tokens, but there are 9"):
        causal_fftconv(u, spectrum)
    u = u[..., :8]
    with pytest.raises(ValueError, match="direct beside a FilterSpectrum; give it to filter_spectrum"):
        causal_fftconv(u, spectrum, direct)
    with pytest.raises(ValueError, match="exact is True, but the FilterSpectrum was made with exact=False"):
        causal_fftconv(u, spectrum, exact=True)
    with pytest.raises(ValueError, match="the backend 'matrix' takes taps, not a FilterSpectrum"):
        causal_fftconv(u, spectrum, backend="matrix")
    with pytest.raises(ValueError, match=r"length \(0\) must be a whole number, at least 1"):
        filter_spectrum(h, 0)


def test_a_spectrum_of_float32_refuses_float64_inputs():
    u, h, *_ = tensors()
    with pytest.raises(TypeError, match=r"made of torch\.float32 for inputs of torch\.float64"):
        causal_fftconv(u.double(), filter_spectrum(h, 9))


@pytest.mark.parametrize("taps", [1, 100])
def test_outputs_are_contiguous_whatever_the_layout_of_the_inputs(taps):
    u, post = (torch.randn(8, 2, 1000).transpose(0, 1) for _ in range(2))
    h, direct = torch.randn(1, taps).expand(8, taps), torch.randn(1).expand(8)
    for backend in ("torch", "blocked", "overlap_save", "matrix"):
        y = causal_fftconv(u, h, direct, postgate=post, backend=backend)
        assert y.is_contiguous(), backend


def test_blocks_of_use_backend_may_end_in_any_order():
    first, second = use_backend("torch"), use_backend("matrix")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert engine.requested_backend("", None, torch.ones(1)) == "matrix"
    second.__exit__(None, None, None)
    assert engine.requested_backend("", None, torch.ones(1)) is None


# values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["u", "h", "direct", "pregate", "postgate"])
def test_a_value_that_is_not_finite_is_refused_by_name_and_place(name, value):
    inputs = dict(zip(("u", "h", "direct", "pregate", "postgate"), tensors(), strict=True))
    place = tuple(size - 1 for size in inputs[name].shape)
    inputs[name][place] = value
    with pytest.raises(ValueError, match=rf"causal_fftconv: {name} holds {value} at \({place[0]},"):
        causal_fftconv(**inputs)


def test_large_numbers_whose_sum_overflows_are_no_error():
    u = torch.full((1, 2, 4), 8e37)
    y = causal_fftconv(u, torch.ones(2, 1))
    assert y.sum().isinf()
    torch.testing.assert_close(y, u)


# long and awkward lengths


@pytest.mark.parametrize("length", [1 << 20, 1_000_003, 450_001])
def test_a_million_tokens_of_any_number_equal_float64(length):
    u, h = torch.randn(1, 2, length), torch.randn(2, length) * torch.linspace(0, -12, length).exp()
    expected = causal_fftconv(u.double(), h.double(), backend="blocked")
    assert relative_error(causal_fftconv(u, h), expected.numpy()) <= 1e-6


def test_float64_convolutions_of_odd_lengths_equal_direct_sums_at_chosen_places():
    length = 10_007
    u, h, direct, pregate, postgate = tensors(1, 2, 2, length, length, torch.float64)
    y = causal_fftconv(u, h, direct, pregate=pregate, postgate=postgate)
    for t in (0, 1, 63, 64, 5000, length - 1):
        w = (u * pregate)[0, :, : t + 1]
        expected = postgate[0, :, t] * ((w * h[:, : t + 1].flip(-1)).sum(-1) + direct * w[:, t])
        torch.testing.assert_close(y[0, :, t], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [8192, 65_536])
@pytest.mark.parametrize("backend", ["torch", "blocked"])
def test_the_first_outputs_of_a_long_row_are_five_times_as_exact_as_one_transform_makes_them(length, backend):
    u, h, direct, pregate, postgate = tensors(1, 4, 2, length, length)
    y = causal_fftconv(u, h, direct, pregate=pregate, postgate=postgate, backend=backend)
    w, taps, n = pregate * u, h.repeat_interleave(2, dim=0), 2 * length
    plain = torch.fft.irfft(torch.fft.rfft(w, n=n) * torch.fft.rfft(taps, n=n), n=n)[..., :length]
    plain = postgate * (plain + direct.repeat_interleave(2).unsqueeze(-1) * w)
    inputs = (x[..., :64].double().numpy() for x in (u, h))
    gates = (x[..., :64].double().numpy() for x in (pregate, postgate))
    expected = oracles.gated_causal_conv(*inputs, direct.double().numpy(), *gates)
    assert relative_error(y[..., :64], expected) <= 0.2 * relative_error(plain[..., :64], expected)


# frames


@pytest.mark.parametrize(("length", "taps"), [(8192, 128), (32768, 1024), (10_007, 100), (65_536, 4096), (9000, 2)])
def test_frames_cover_the_input_with_few_idle_points(length, taps):
    frames = overlap_save.Frames.of(length, taps)
    assert frames.count * frames.step >= length > (frames.count - 1) * frames.step
    assert frames.size >= frames.step + taps - 1
    assert frames.count * frames.size <= 1.3 * length + frames.size


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("length", [8192, 10_007])
def test_partial_convolutions_and_their_gradients_in_frames_equal_float64(length, row_by_row, monkeypatch):
    if row_by_row:
        monkeypatch.setattr(engine, "block_floats", lambda n: n)
    inputs = tensors(2, 4, 2, length, 100)
    assert engine._fastest(engine.Conv(inputs[0], inputs[1], None, *inputs[2:], exact=False)) == "overlap_save"
    wide = [x.double().requires_grad_() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for u, h, direct, pregate, postgate in (leaves, wide):
        out = causal_fftconv(u, h, direct, pregate=pregate, postgate=postgate)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), [u, h, direct, pregate, postgate])])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected.numpy()) <= 1e-6


# going on from a past


@pytest.mark.parametrize(("before", "new", "taps"), [(0, 9, 9), (5, 9, 14), (40, 7, 47), (40, 7, 5), (3, 8, 30)])
@pytest.mark.parametrize("channels", [2, 6])
def test_a_continued_convolution_equals_the_end_of_the_whole_one(before, new, taps, channels):
    u, h, direct, *_ = tensors(2, channels, 2, before + new, taps)
    expected = oracles.causal_conv(u.double().numpy(), h.double().numpy(), direct.double().numpy())[..., before:]
    for exact in (False, True):
        y = continued_fftconv(u[..., :before], u[..., before:], h, direct, exact=exact)
        assert relative_error(y, expected) <= 1e-6


# a package that may be there


class FakeFlash:
    """Stands in for the compiled package: the same call, computed by torch."""

    def __init__(self, points, dtype):
        self.points, self.dtype = points, dtype

    def to(self, device):  # noqa: ARG002 (the package's signature)
        return self

    train = lambda self: self  # noqa: E731

    def __call__(self, u, k, *gates):
        assert u.is_contiguous() and u.dtype == self.dtype and k.dtype == torch.float32  # noqa: PT018
        assert len(gates) in (0, 2)
        w = u * gates[0] if gates else u
        y = torch.fft.irfft(torch.fft.rfft(w.float(), n=self.points) * torch.fft.rfft(k, n=self.points))
        y = y[..., : u.shape[-1]].to(u.dtype)
        return y * gates[1] if gates else y


@pytest.mark.parametrize("given", ["all", "postgate alone", "no gates"])
def test_flashfftconv_gets_padded_inputs_both_gates_and_one_filter_a_channel(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashfftconv", SimpleNamespace(FlashFFTConv=FakeFlash))
    flashfftconv._module.cache_clear()
    u, h, direct, pregate, postgate = tensors(2, 4, 2, 100, 60, torch.bfloat16)
    if given != "all":
        pregate = None
    if given == "no gates":
        postgate = None
    inputs = u, h.float(), direct.float(), pregate, postgate
    y = flashfftconv.forward(*inputs)
    expected = causal_fftconv(u, h.float(), direct.float(), pregate=pregate, postgate=postgate)
    assert relative_error(y, expected.double().numpy()) <= 2e-2
    needs = [x is not None for x in inputs]
    for x, grad in zip(inputs, flashfftconv.backward(torch.ones_like(u), *inputs, needs), strict=True):
        assert (grad is None) == (x is None)
    flashfftconv._module.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dtype", "room", "reason"),
    [
        ((1, 16, 256), torch.float32, 10**6, "takes float16 and bfloat16, but u is torch.float32"),
        ((1, 24, 20_000), torch.bfloat16, 10**6, "multiple of 16 channels at 65536 points, but u has 24"),
        ((1, 16, 3_000_000), torch.bfloat16, 10**6, "at most 4194304 points, but 3000000 tokens need 8388608"),
        (
            (1, 16, 16_000),
            torch.float16,
            101_376,
            "needs 135168 bytes of shared memory a block, the device has 101376",
        ),
        ((1, 16, 16_000), torch.float16, 232_448, None),
    ],
)
def test_flashfftconv_is_refused_beyond_its_limits(shape, dtype, room, reason, monkeypatch):
    monkeypatch.setattr(flashfftconv.importlib.util, "find_spec", lambda _: object())
    properties = SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    u = SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda"))
    found = flashfftconv.refusal(u, None, None, None, None)
    assert found is None if reason is None else reason in found


def test_flashfftconv_is_refused_without_the_package_or_off_a_gpu(monkeypatch):
    u, h, *_ = tensors(dtype=torch.bfloat16)
    assert flashfftconv.refusal(u, h, None, None, None) == "the package flashfftconv is not installed"
    monkeypatch.setattr(flashfftconv.importlib.util, "find_spec", lambda _: object())
    assert "needs a CUDA device, but u lies on cpu" in flashfftconv.refusal(u, h, None, None, None)
