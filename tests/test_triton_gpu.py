"""The Triton kernels equal float64 convolutions on a GPU: every dtype, lengths up to a million, gates, gradients.

Run: python -m pytest tests/test_triton_gpu.py -q -m gpu

The reference is torch's float64 FFT with autograd, which shares nothing with the kernels. Letters: B batch,
C channels, H filters, L length, K taps.
"""

import pytest
import torch

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.ops import hyena_step as fused
from hyena_hf.ops.backends import triton as backend
from hyena_hf.ops.backends.triton import plan_for


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = ("u", "h", "direct", "pregate", "postgate")
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
CONSUMER = 101_376  # bytes of shared memory a program: RTX 3090 and 4090


def make_inputs(batch, channels, filters, length, taps, dtype):
    shapes = dict.fromkeys(("u", "pregate", "postgate", "grad"), (batch, channels, length))
    inputs = {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}
    return inputs | {
        "h": torch.randn(filters, taps, device="cuda"),
        "direct": torch.randn(filters, device="cuda"),
    }


def exact(inputs):
    """Output and gradients in float64."""
    u, h, direct, pregate, postgate = leaves = [inputs[name].double().requires_grad_() for name in NAMES]
    length, group = u.shape[-1], u.shape[1] // h.shape[0]
    taps, skip = (x.repeat_interleave(group, dim=0) for x in (h, direct))
    w = pregate * u
    spectrum = torch.fft.rfft(w, n=2 * length) * torch.fft.rfft(taps, n=2 * length)
    y = postgate * (torch.fft.irfft(spectrum, n=2 * length)[..., :length] + skip[:, None] * w)
    return {"y": y.detach()} | dict(zip(NAMES, torch.autograd.grad(y, leaves, inputs["grad"].double()), strict=True))


def run(inputs, plans=(None, None)):
    tensors = [inputs[name] for name in NAMES]
    gradients = backend.backward(inputs["grad"], *tensors, (True,) * 5, plans[1])
    return {"y": backend.forward(*tensors, plans[0])} | dict(zip(NAMES, gradients, strict=True))


def check(results, expected, dtype):
    for name, result in results.items():
        error = (result.double() - expected[name]).norm() / expected[name].norm()
        assert error <= TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_self_check_passes(dtype):
    u = torch.zeros(1, 1, 5, dtype=dtype, device="cuda")
    assert backend.refusal(u, torch.zeros(1, 5, device="cuda"), None, None, None) is None


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 127, 256, 257, 1000, 1024, 2047, 4096, 8191, 16384, 16385, 65_536])
def test_outputs_and_gradients_equal_float64_at_any_length(length, dtype):
    inputs = make_inputs(3, 8, 4, length, length, dtype)
    check(run(inputs), exact(inputs), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [999_983, 2**20])
def test_outputs_and_gradients_equal_float64_at_a_million(length, dtype):
    inputs = make_inputs(1, 2, 1, length, length, dtype)
    check(run(inputs), exact(inputs), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("given", [(), ("direct",), ("pregate",), ("postgate",)], ids=str)
def test_absent_direct_and_gates_count_as_zero_and_one(given, dtype):
    inputs = make_inputs(2, 4, 4, 3000, 100, dtype)
    neutral = {name: torch.full_like(inputs[name], name != "direct") for name in ("direct", "pregate", "postgate")}
    absent = [name for name in neutral if name not in given]
    expected = exact(inputs | {name: neutral[name] for name in absent})
    results = run(inputs | dict.fromkeys(absent))
    assert [results.pop(name) for name in absent] == [None] * len(absent)
    check(results, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [500, 5000, 40_000])
def test_bits_do_not_change_from_run_to_run(length, dtype):
    inputs = make_inputs(8, 4, 2, length, length, dtype)
    first, second = run(inputs), run(inputs)
    assert all(torch.equal(result, second[name]) for name, result in first.items())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [2000, 10_000, 16_384, 100_000])
def test_plans_for_consumer_cards_are_right_too(length, dtype):
    inputs = make_inputs(2, 4, 2, length, 1000, dtype)
    plans = [plan_for(length, dtype, CONSUMER, 82, gradients=gradients) for gradients in (False, True)]
    check(run(inputs, plans), exact(inputs), dtype)


def test_the_second_device_is_served_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    inputs = make_inputs(1, 2, 2, 300, 300, torch.float32)
    there = {name: tensor.to("cuda:1") for name, tensor in inputs.items()}
    expected = {name: tensor.to("cuda:1") for name, tensor in exact(inputs).items()}
    check(run(there), expected, torch.float32)


def test_the_fused_token_passes_its_self_check():
    device = torch.device("cuda", 0)
    assert fused.kernel_fault(device) is None
    assert fused.self_check(device) <= 1e-6


@pytest.mark.parametrize("kind", [None, "static"])
def test_a_model_of_modal_filters_generates_as_by_the_formula(kind, monkeypatch):
    """By the kernel; with a static cache by a step that transformers compiles and captures on this device."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 80, "num_hidden_layers": 2, "intermediate_size": 160}
    model = HyenaForCausalLM(HyenaConfig(**sizes, filter_types=["modal"] * 2, initializer_range=0.2)).cuda()
    ids = torch.randint(97, (3, 20), device="cuda")
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    found = model.eval().generate(ids, cache_implementation=kind, **options)
    monkeypatch.setattr(fused, "_kernel_serves", lambda *_: False)
    assert torch.equal(found, model.generate(ids, **options))
