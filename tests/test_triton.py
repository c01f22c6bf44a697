"""The Triton kernels equal the float64 oracles, run by Triton's interpreter on the CPU.

Run: python -m pytest tests/test_triton.py -q

Letters: B batch, C channels, H filters, L length, K taps. A plan cuts short rows as long ones are cut on a GPU.
"""

import importlib
import runpy
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hyena_hf.ops.backends import triton as backend
from hyena_hf.ops.backends.triton import Plan, outer_tile, plan_for, shared_bytes
from tests import oracles


pytest.importorskip("triton")

KERNELS = "hyena_hf.ops.backends._triton_kernels"
NAMES = ("u", "h", "direct", "pregate", "postgate")
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
CONSUMER, DATACENTRE = 101_376, 232_448  # bytes of shared memory a program: RTX 3090 and 4090, H100
TWO, THREE, OUTER = Plan((32, 16)), Plan((16, 16, 16)), Plan((16, 16), outer=2)


@contextmanager
def kernels(interpret):
    """Import the kernels anew, interpreted or compiled; afterwards things are as if nobody had."""
    importlib.import_module("triton.language")  # its own functions stay compilable
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
    patch.delitem(sys.modules, KERNELS, raising=False)
    backend._unsound.cache_clear()
    try:
        yield importlib.import_module(KERNELS)
    finally:
        sys.modules.pop(KERNELS, None)
        backend._unsound.cache_clear()
        patch.undo()


@pytest.fixture(scope="module")
def interpreter():
    with kernels(interpret=True) as module:
        try:
            backend.self_check(torch.float32, torch.device("cpu"), Plan((16, 16)))
        except Exception as error:
            if "only 0-dimensional arrays can be converted" not in str(error):
                raise
            pytest.skip("this version of Triton cannot interpret loops with numpy 2.4 or later")
        yield module


@pytest.fixture
def sound(monkeypatch):
    """Skip the self-check, which has its own tests."""
    monkeypatch.setattr(backend, "_unsound", lambda *_: None)


pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # the interpreter of Triton 3.6
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


def make_inputs(batch, channels, filters, length, taps, dtype=torch.float32):
    signals = {name: torch.randn(batch, channels, length).to(dtype) for name in ("u", "pregate", "postgate", "grad")}
    return signals | {"h": torch.randn(filters, taps), "direct": torch.randn(filters)}


def run(inputs, plan=None, needs=(True,) * 5):
    """Output and gradients by name."""
    tensors = [inputs[name] for name in NAMES]
    gradients = backend.backward(inputs["grad"], *tensors, needs, plan)
    return {"y": backend.forward(*tensors, plan)} | dict(zip(NAMES, gradients, strict=True))


def oracle_results(inputs):
    arrays = {name: inputs[name].double().numpy() for name in NAMES}
    gradients = oracles.gated_causal_conv_gradients(**arrays, dy=inputs["grad"].double().numpy())
    return {"y": oracles.gated_causal_conv(**arrays)} | gradients


def relative_error(actual, reference):
    """Relative root mean square error."""
    return np.linalg.norm(actual.double().numpy() - reference) / np.linalg.norm(reference)


def check(results, expected, dtype):
    for name, result in results.items():
        assert relative_error(result, expected[name]) <= TOLERANCES[dtype], name


# against the oracle


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "plan"),
    [
        ((2, 4, 2, 200, 200), Plan((16, 16))),
        ((1, 2, 2, 127, 5), Plan((16, 32))),
        ((1, 2, 1, 1000, 1000), Plan((32, 32))),
        ((1, 1, 1, 2048, 300), Plan((64, 32))),
        ((1, 2, 2, 4001, 100), THREE),
        ((1, 1, 1, 16384, 40), Plan((32, 32, 16))),
        ((1, 2, 1, 700, 700), Plan((16, 16), outer=3)),
        ((1, 2, 2, 1031, 1031), Plan((16, 16), outer=5)),
        ((1, 1, 1, 8191, 64), Plan((16, 16, 16), outer=2)),
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_the_oracle_at_every_number_of_levels(sizes, plan, dtype):
    inputs = make_inputs(*sizes, dtype=dtype)
    results = run(inputs, plan)
    check(results, oracle_results(inputs), dtype)
    assert all(results[name].dtype == inputs[name].dtype for name in NAMES)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, THREE, OUTER], ids=["two", "three", "outer"])
def test_bfloat16_results_carry_their_rounding_and_little_more(plan):
    inputs = make_inputs(1, 2, 1, 500, 500, torch.bfloat16)
    results, expected = run(inputs, plan), oracle_results(inputs)
    check(results, expected, torch.bfloat16)
    assert relative_error(results["h"], expected["h"]) <= TOLERANCES[torch.float16]  # not rounded to bfloat16


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [Plan((32, 32)), THREE, Plan((16, 16), outer=3)], ids=["two", "three", "outer"])
def test_float32_outputs_are_at_most_twice_as_far_from_the_oracle_as_those_of_real_ffts(plan):
    inputs = make_inputs(2, 2, 2, 700, 700)
    u, h, direct, pregate, postgate = (inputs[name] for name in NAMES)
    spectrum = torch.fft.rfft(pregate * u, n=1400) * torch.fft.rfft(h, n=1400)
    naive = postgate * (torch.fft.irfft(spectrum, n=1400)[..., :700] + direct[:, None] * pregate * u)
    fast, expected = backend.forward(u, h, direct, pregate, postgate, plan), oracle_results(inputs)["y"]
    assert relative_error(fast, expected) <= 2 * relative_error(naive, expected)


@pytest.mark.usefixtures("sound")
def test_an_outer_stage_sums_over_blocks_of_its_points():
    inputs = make_inputs(1, 1, 1, 33 * 256 - 3, 64)  # a block is 32 of them in float32
    check(run(inputs, Plan((16, 16), outer=33)), oracle_results(inputs), torch.float32)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 1), (3, 3), (255, 255), (256, 256), (257, 200), (1009, 9)])
def test_the_default_plan_serves_any_length(length, taps, dtype):
    inputs = make_inputs(1, 2, 1, length, taps, dtype)
    check(run(inputs), oracle_results(inputs), dtype)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, OUTER], ids=["chip", "outer"])
@pytest.mark.parametrize("given", [(), ("direct",), ("pregate",), ("postgate",), ("pregate", "postgate")], ids=str)
def test_absent_direct_and_gates_count_as_zero_and_one(given, plan):
    inputs = make_inputs(1, 2, 2, 400, 50)
    some = {name: tensor if name in ("u", "h", "grad", *given) else None for name, tensor in inputs.items()}
    neutral = {"direct": torch.zeros(2), "pregate": torch.ones(1, 2, 400), "postgate": torch.ones(1, 2, 400)}
    expected = oracle_results(neutral | {name: tensor for name, tensor in some.items() if tensor is not None})
    results = run(some, plan)
    absent = [name for name in NAMES if some[name] is None]
    assert [results.pop(name) for name in absent] == [None] * len(absent)
    check(results, expected, torch.float32)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, OUTER], ids=["chip", "outer"])
@pytest.mark.parametrize("wanted", NAMES)
def test_gradients_come_alone_where_only_one_is_needed(wanted, plan):
    inputs = make_inputs(1, 2, 1, 300, 80)
    together = run(inputs, plan)
    alone = run(inputs, plan, tuple(name == wanted for name in NAMES))
    assert torch.equal(alone.pop(wanted), together[wanted])
    assert torch.equal(alone.pop("y"), together["y"])
    assert set(alone.values()) == {None}


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("outer", [1, 2])
def test_rows_of_a_filter_divide_among_programs_in_any_number(outer):
    inputs = make_inputs(3, 2, 1, 200, 9)  # 6 rows a filter
    expected = oracle_results(inputs)
    for programs in (1, 4 * outer, 1000):
        check(run(inputs, Plan((16, 16), outer, programs=programs)), expected, torch.float32)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, OUTER], ids=["chip", "outer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_vanishes(dtype, plan):
    inputs = make_inputs(2, 1, 1, 400, 400, dtype)
    inputs["u"][0] *= 3e3  # the sum of a row is far beyond float16
    inputs["u"][0] += 2e4
    inputs["u"][1] *= 1e-4
    inputs["grad"] *= 1e-3
    inputs["h"] *= 1e-6
    inputs["direct"] *= 1e-6
    results, expected = run(inputs, plan), oracle_results(inputs)
    for name in ("y", "pregate"):
        for row in range(2):
            # float16 results may be subnormal: multiples of 6e-8
            step = 6e-8 / np.sqrt(np.mean(expected[name][row] ** 2)) if dtype == torch.float16 else 0
            assert relative_error(results[name][row], expected[name][row]) <= TOLERANCES[dtype] + step, (name, row)
    assert relative_error(results["h"], expected["h"]) <= TOLERANCES[dtype]


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, OUTER], ids=["chip", "outer"])
def test_a_row_of_zeros_gives_zeros_and_no_nan(plan):
    inputs = make_inputs(2, 2, 2, 260, 20, torch.float16)
    inputs["u"][0] = 0
    inputs["h"][1] = 0
    results = run(inputs, plan)
    assert not results["y"][0].any()
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, OUTER], ids=["chip", "outer"])
def test_memory_layout_does_not_matter_and_nothing_is_changed_in_place(plan):
    inputs = make_inputs(2, 2, 1, 100, 100)
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in inputs.items()}
    strided["u"] = inputs["u"].mT.contiguous().mT
    copies = {name: tensor.clone() for name, tensor in strided.items()}
    results, expected = run(strided, plan), run(inputs, plan)
    for name, result in results.items():
        assert torch.equal(result, expected[name])
        assert result.is_contiguous()
    assert all(torch.equal(strided[name], copies[name]) for name in strided)


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize("plan", [TWO, THREE, OUTER], ids=["two", "three", "outer"])
def test_every_number_of_an_output_is_written_even_into_poisoned_memory(plan, monkeypatch):
    inputs = make_inputs(2, 2, 1, 301, 30)
    expected, empty, empty_like = run(inputs, plan), torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    assert all(torch.equal(result, expected[name]) for name, result in run(inputs, plan).items())


# plans


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shared", [49_152, 65_536, CONSUMER, 166_912, DATACENTRE])
def test_plans_fit_the_shared_memory_and_hold_the_row(shared, dtype, gradients):
    for length in (1, 2, 255, 257, 1000, 4096, 5000, 8191, 16384, 16385, 99_991, 2**20, 2**22 + 1):
        plan = plan_for(length, dtype, shared, 108, gradients=gradients)
        assert shared_bytes(plan.factors, dtype) <= shared
        assert length <= plan.points <= max(256, 2 * length - 1)
        assert plan.outer == 1 or plan.points - length < plan.chip


def test_smaller_shared_memory_means_shorter_transforms_on_chip_and_none_at_all_is_refused():
    assert plan_for(16384, torch.float16, DATACENTRE).factors == (32, 32, 16)
    assert plan_for(16384, torch.float16, CONSUMER).outer == 1
    assert plan_for(16384, torch.float16, 65_536) == Plan((16, 16, 16), outer=4, warps=8, programs=8)
    with pytest.raises(ValueError, match="4096 bytes of shared memory hold no transform"):
        plan_for(1, torch.float16, 4096)


HALVES = {"u", "grad", "y", "y1", "y2", "pregate", "postgate", "gate1", "gate2", "grad_u", "grad_pregate"} | {
    "grad_postgate", "matrices", "matrix", "values", "w_values", "g_values"
}  # fmt: skip
NUMBERS = {"rows", "share", "group", "channels", "length", "OUTER"}


def shared_by(kernel, dtype, arch, warps, **constants):
    """Bytes of shared memory of a kernel, compiled with all gates and gradients for a GPU that is not there."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    half = dtype == torch.float16
    absent = {} if half else dict.fromkeys(("gain", "scale", "w_scale", "g_scale"))
    types, values = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            types[name], values[(place,)] = "constexpr", constants.get(name)
        else:
            types[name] = "i32" if name in NUMBERS else "*fp16" if half and name in HALVES else "*fp32"
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    source = ASTSource(kernel, types, values)
    return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kernel_compiles_for_gpus_and_the_bound_on_shared_memory_holds(dtype, arch, tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    lengths = (256, 512, 1024, 2048, 4096, 8192, 16384)
    with kernels(interpret=False) as module:
        for kernel, gradients in ((module.convolve, False), (module.gradients, True), (module.inner, True)):
            plans = {plan_for(length, dtype, DATACENTRE, gradients=gradients) for length in lengths}
            options = {"CONVOLVE": True, "CORRELATE": True} if kernel is module.inner else {}
            for plan in plans:
                shared = shared_by(kernel, dtype, arch, plan.warps, **plan.sizes, **options)
                assert shared <= shared_bytes(plan.factors, dtype), (kernel.__name__, plan)
        for outer in (2, 20, 200):
            tile = outer_tile(outer, 512, dtype)
            for kernel in (module.outer_transform, module.outer_inverse):
                assert shared_by(kernel, dtype, arch, 4, **tile) <= 49_152, kernel.__name__


# the self-check and refusals


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_self_check_passes_in_the_interpreter(dtype):
    backend._unsound.cache_clear()
    assert backend.refusal(torch.zeros(1, 1, 5, dtype=dtype), torch.zeros(1, 5), None, None, None) is None


def test_the_self_check_runs_once_for_a_device_and_a_dtype(monkeypatch):
    calls = []
    monkeypatch.setattr(backend, "self_check", lambda *arguments: calls.append(arguments) or 0.0)
    backend._unsound.cache_clear()
    for _ in range(3):
        backend.refusal(torch.zeros(1, 1, 5), torch.zeros(1, 5), None, None, None)
    assert len(calls) == len(set(calls)) == 2
    backend._unsound.cache_clear()


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_result_of_the_self_check_refuses_and_raises(error, monkeypatch):
    monkeypatch.setattr(backend, "self_check", lambda *_: error)
    backend._unsound.cache_clear()
    tensors = torch.zeros(1, 1, 5), torch.zeros(1, 5), None, None, None
    assert "self-check in torch.float32 on cpu is off by" in backend.refusal(*tensors)
    with pytest.raises(RuntimeError, match="triton backend cannot be used: its self-check"):
        backend.forward(*tensors)
    with pytest.raises(RuntimeError, match="choose another backend"):
        backend.backward(tensors[0], *tensors, (True,) * 5)
    backend._unsound.cache_clear()


def test_a_kernel_that_does_not_compile_refuses_with_the_message_of_the_compiler(monkeypatch):
    def fail(*_):
        raise OSError("no ptxas")

    monkeypatch.setattr(backend, "self_check", fail)
    backend._unsound.cache_clear()
    reason = backend.refusal(torch.zeros(1, 1, 5), torch.zeros(1, 5), None, None, None)
    assert reason.endswith("failed with OSError: no ptxas")
    backend._unsound.cache_clear()


def test_the_self_check_notices_wrong_constants(monkeypatch):
    roots = backend._roots
    monkeypatch.setattr(backend, "_roots", lambda *arguments: roots(*arguments) * (1 + 1e-4))
    caches = backend._tables, backend._outer_matrix, backend._twists
    for cache in caches:
        cache.cache_clear()
    assert backend.self_check(torch.float32, torch.device("cpu"), Plan((16, 16))) > 1e-4
    for cache in caches:
        cache.cache_clear()


def test_refusals_name_what_stands_in_the_way(monkeypatch):
    h = torch.zeros(1, 5)
    long = torch.zeros(1, 1, 2_200_000)
    assert "at most 4096 points" in backend.refusal(long, h, None, None, None)
    assert backend.refusal(long.half(), h, None, None, None) is None
    assert "not torch.float64" in backend.refusal(torch.zeros(1, 1, 5, dtype=torch.float64), h, None, None, None)
    with kernels(interpret=False):
        assert "CUDA devices, not on cpu" in backend.refusal(torch.zeros(1, 1, 5), h, None, None, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert backend.refusal(torch.zeros(1, 1, 5), h, None, None, None) == "triton is not installed"


def test_importing_the_backend_imports_no_kernels(monkeypatch):
    monkeypatch.delitem(sys.modules, KERNELS)
    assert "refusal" in runpy.run_path(backend.__file__, run_name="triton_backend")
    assert KERNELS not in sys.modules
