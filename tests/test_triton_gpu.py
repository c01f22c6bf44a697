"""The Triton kernels equal float64 on a GPU: every dtype, lengths up to a million, gates, states, gradients.

Run: python -m pytest tests/test_triton_gpu.py -q -m gpu

The reference of convolutions is torch's float64 FFT with autograd, that of linear attention its float64 sums; neither
shares anything with the kernels. Letters: B batch, C channels, H filters, L length, K taps.
"""

import pytest
import torch

from benchmarks import bench_linear_kernel, timing
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.ops import hyena_step as fused
from hyena_hf.ops.backends import triton as backend
from hyena_hf.ops.backends import triton_linear
from hyena_hf.ops.backends.triton import plan_for
from hyena_hf.ops.linear_attention import SoftmaxWindow, causal_linear_attention


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


# linear attention

every_form = pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])


def make_operands(length, dtype, *, log, heads=6, key_heads=2, features=128, width=64):
    """Features in float32, as feature maps give them, values, and the queries and keys of a window in dtype."""
    q, k = (torch.randn(2, n, length, features, device="cuda") for n in (heads, key_heads))
    if not log:
        q, k = q.softmax(-1), k.softmax(-1)
    v = torch.randn(2, key_heads, length, width, device="cuda").to(dtype)
    query, key = (torch.randn(2, n, length, width, device="cuda").to(dtype) / 8 for n in (heads, key_heads))
    return [q, k, v, query, key]


def attend_linearly(name, operands, *, log, size, mask=None):
    """The output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in operands]
    q, k, v, query, key = leaves
    window = SoftmaxWindow(query, key, size) if size else None
    y, _ = causal_linear_attention(q, k, v, log_features=log, window=window, mask=mask, backend=name)
    direction = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves if size else leaves[:3], direction, materialize_grads=True)]


def distances(found, exact):
    return [((x.double() - y).norm() / (y.norm().item() or 1)).item() for x, y in zip(found, exact, strict=True)]


@every_form
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_linear_attention_passes_its_self_check(dtype, precision, log):
    torch.set_float32_matmul_precision(precision)  # a fixture of all tests sets it back
    x = torch.zeros(1, 1, 5, 4, device="cuda")
    assert triton_linear.refusal(x, x, x.to(dtype), None, log=log) is None
    assert triton_linear.refusal(x.to(dtype), x.to(dtype), x.to(dtype), None, log=log) is None


@every_form
@pytest.mark.parametrize("size", [0, 64])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [1, 63, 65, 1000, 4096])
def test_linear_attention_is_at_most_twice_as_far_from_float64_as_by_pytorch(length, dtype, size, log):
    operands = make_operands(length, dtype, log=log)
    mask = torch.rand(2, length, device="cuda") > 0.1
    mask[:, 0] = True
    exact = attend_linearly("torch", [x.double() for x in operands], log=log, size=size, mask=mask)
    errors = []
    for name in ("torch", "triton"):
        errors.append(distances(attend_linearly(name, operands, log=log, size=size, mask=mask), exact))
    # exponentials of the kernels are the device's own, a few units of rounding off
    assert max(errors[1]) <= max(2 * max(errors[0]), 1e-6)


@every_form
@pytest.mark.parametrize(("features", "width"), [(21, 19), (256, 128), (2145, 64)])
def test_linear_attention_takes_features_and_values_of_any_width(features, width, log):
    operands = make_operands(300, torch.bfloat16, log=log, heads=3, key_heads=1, features=features, width=width)
    exact = attend_linearly("torch", [x.double() for x in operands], log=log, size=0)
    assert max(distances(attend_linearly("triton", operands, log=log, size=0), exact)) <= TOLERANCES[torch.bfloat16]


@every_form
def test_linear_attention_over_a_long_row_in_bfloat16_does_not_drift(log):
    operands = make_operands(2**17 + 3, torch.bfloat16, log=log, heads=2, key_heads=1)
    exact = attend_linearly("torch", [x.double() for x in operands], log=log, size=64)
    found = attend_linearly("triton", operands, log=log, size=64)
    late = slice(-1000, None)
    assert max(distances([x[:, :, late] for x in found], [x[:, :, late] for x in exact])) <= TOLERANCES[torch.bfloat16]


@every_form
def test_linear_attention_on_a_gpu_takes_the_kernels_and_the_same_bits_each_time(log):
    operands = make_operands(1000, torch.bfloat16, log=log)
    first, second = (attend_linearly(name, operands, log=log, size=64) for name in (None, "triton"))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_every_section_of_the_page_on_linear_attention_runs_on_tiny_shapes():
    for section in bench_linear_kernel.SECTIONS.values():
        (heading, *lines), _ = section(timing.Settings(rounds=2, smoke=True))
        assert heading.startswith("## ")
        assert sum(line.startswith("| ") for line in lines) > 2
