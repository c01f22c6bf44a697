"""Linear attention by Triton equals the float64 oracles, run by Triton's interpreter on the CPU.

Run: python -m pytest tests/test_linear_attention_triton.py -q

Letters: B batch, H query heads, K key heads, n queries, F features, P value width. Chunks of 16 cut short rows as long
ones are cut on a GPU.
"""

import importlib
import runpy
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hyena_hf.linear_attention import convert_attention
from hyena_hf.ops import linear_attention as door
from hyena_hf.ops.backends import triton_linear as backend
from hyena_hf.ops.linear_attention import LinearState, SoftmaxWindow, causal_linear_attention
from tests import oracles


pytest.importorskip("triton")

KERNELS = "hyena_hf.ops.backends._triton_linear"
SINGLE = (torch.float32,) * 3
CPU = torch.device("cpu")
UNSOUND = backend._unsound  # tests put another in its place


@contextmanager
def kernels(interpret):
    """Import the kernels anew, interpreted or compiled; afterwards things are as if nobody had."""
    importlib.import_module("triton.language")  # its own functions stay compilable
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
    patch.delitem(sys.modules, KERNELS, raising=False)
    UNSOUND.cache_clear()
    try:
        yield importlib.import_module(KERNELS)
    finally:
        sys.modules.pop(KERNELS, None)
        UNSOUND.cache_clear()
        patch.undo()


@pytest.fixture(scope="module")
def interpreter():
    with kernels(interpret=True) as module:
        yield module


@pytest.fixture(autouse=True)
def _sound(request, monkeypatch):
    """Skip the self-check, which has its own tests."""
    if "self_check" not in request.node.name:
        monkeypatch.setattr(backend, "_unsound", lambda *_: None)


pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # the interpreter of Triton 3.6
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

every_form = pytest.mark.parametrize("log", [False, True], ids=["plain", "log"])


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    query: Tensor
    key: Tensor
    log_weight: Tensor
    sums: Tensor

    def to(self, dtype):
        return Inputs(*(x.to(dtype) for x in self))


def make_inputs(length, *, log, batch=1, heads=2, key_heads=1, features=21, width=19, scale=1.0):
    """Random ones of odd widths: features positive, or logarithms on both sides of zero; and sums of a state."""
    q, k = (torch.randn(batch, n, length, features) * scale for n in (heads, key_heads))
    if not log:
        q, k = q.softmax(-1), k.softmax(-1)
    v = torch.randn(batch, key_heads, length, width)
    query, key = (torch.randn(batch, n, length, 3) for n in (heads, key_heads))
    return Inputs(q, k, v, query, key, torch.randn(heads), torch.rand(batch, key_heads, features, width + 1))


def state_of(x, log):
    scale = torch.zeros_like(x.sums[..., 0]) if log else None
    return LinearState(x.sums, scale, None)


def attend(x, name, *, log, size=0, chunk=16, **options):
    window = SoftmaxWindow(x.query, x.key, size, x.log_weight) if size else None
    options = {"log_features": log, "window": window, "chunk_size": chunk} | options
    return causal_linear_attention(x.q, x.k, x.v, backend=name, **options)


def everything(x, name, dtype, *, log, size, mask=None):
    """Outputs, the state, and gradients of both in all inputs, by name."""
    leaves = Inputs(*(y.to(dtype).requires_grad_() for y in x))
    y, state = attend(leaves, name, log=log, size=size, mask=mask, state=state_of(leaves, log))
    random = torch.Generator().manual_seed(1)
    directions = [torch.randn(z.shape, generator=random).to(z.dtype) for z in (y, state.sums)]
    total = (y * directions[0]).sum() + (state.sums * directions[1]).sum()
    used = [name for name in Inputs._fields if size or name in ("q", "k", "v", "sums")]
    gradients = torch.autograd.grad(total, [getattr(leaves, name) for name in used], materialize_grads=True)
    found = {"y": y, "state": state.sums} | dict(zip(used, gradients, strict=True))
    return found | ({"scale": state.log_scale} if log else {})


def relative_error(actual, reference):
    """Relative root mean square error; what is zero must be so in both."""
    actual, reference = (
        np.asarray(x.detach() if isinstance(x, Tensor) else x, dtype=float) for x in (actual, reference)
    )
    norm = np.linalg.norm(reference)
    return np.linalg.norm(actual - reference) / (norm if norm else 1)


def assert_close(found, expected, tolerance=1e-6):
    assert relative_error(found, expected) <= tolerance


@every_form
def test_features_of_keys_that_stay_inside_the_window_may_be_left_out(log):
    x = make_inputs(37, log=log)
    y, state = attend(x, "triton", log=log, size=6)
    again, same = attend(x._replace(k=x.k[:, :, :-5]), "triton", log=log, size=6)
    assert again.equal(y)
    assert all(a is b is None or a.equal(b) for a, b in zip(same, state, strict=True))


# against the oracles


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_softmax"])
@pytest.mark.parametrize(("size", "length"), [(0, 37), (0, 1), (6, 50)])
def test_outputs_are_at_most_twice_as_far_from_the_oracle_as_those_of_pytorch(name, size, length):
    log, joint = name == "hedgehog", name == "hedgehog"
    q, k, v = (torch.randn(1, n, length, 7).numpy() for n in (4, 2, 2))
    maps = [
        {"name": name, "weight": torch.randn(n, 7, 9).numpy() / 3, "bias": torch.randn(n, 9).numpy()} for n in (4, 2)
    ]
    factor = torch.randn(4)
    params = {"q_map": maps[0], "k_map": maps[1], "window": size, "window_factor": factor.numpy(), "joint": joint}
    expected = oracles.linear_attention(q, k, v, params)
    features = [oracles.feature_map(x, one) for x, one in zip((q, k), maps, strict=True)]
    if log:  # the oracle's weights beside a window are means of 18 products
        features = [np.log(features[0]) - (np.log(18) if size else 0), np.log(features[1])]
    features = [torch.from_numpy(x).float() for x in features]
    query, key = torch.from_numpy(q) / 7**0.5, torch.from_numpy(k)
    x = Inputs(*features, torch.from_numpy(v), query, key, torch.nn.functional.logsigmoid(factor), torch.empty(0))
    errors = [relative_error(attend(x, by, log=log, size=size)[0], expected) for by in door.BACKENDS]
    assert errors[1] <= 2 * errors[0]


@every_form
@pytest.mark.parametrize(
    ("size", "length", "key_heads"), [(0, 1, 1), (0, 33, 1), (1, 16, 2), (5, 37, 2), (100, 20, 1)]
)
def test_gradients_are_at_most_twice_as_far_from_float64_as_those_of_pytorch(log, size, length, key_heads):
    x = make_inputs(length, log=log, heads=2 * key_heads, key_heads=key_heads)
    exact = everything(x, "torch", torch.float64, log=log, size=size)
    worst = []
    for name in door.BACKENDS:
        found = everything(x, name, torch.float32, log=log, size=size)
        assert found.keys() == exact.keys()
        worst.append(max(relative_error(value, exact[key]) for key, value in found.items()))
    assert worst[1] <= 2 * worst[0]


@every_form
def test_features_and_values_of_any_width_are_cut_into_blocks(log):
    x = make_inputs(19, log=log, heads=1, features=70, width=40)
    exact = everything(x, "torch", torch.float64, log=log, size=3)
    for name, value in everything(x, "triton", torch.float32, log=log, size=3).items():
        assert relative_error(value, exact[name]) <= 1e-6, name


@every_form
@pytest.mark.parametrize("chunk", [1, 32, 1000])
def test_results_do_not_depend_on_the_chunk(log, chunk):
    x = make_inputs(70, log=log, heads=1)
    expected, _ = attend(x.to(torch.float64), "torch", log=log, size=4)
    assert_close(attend(x, "triton", log=log, size=4, chunk=chunk)[0], expected)


@every_form
def test_stretches_of_any_length_give_the_same_outputs_states_and_gradients(log, monkeypatch):
    x = make_inputs(61, log=log, heads=1)
    whole = everything(x, "triton", torch.float32, log=log, size=3)
    monkeypatch.setattr(backend, "_LEAST_STRETCH", 32)
    monkeypatch.setattr(backend, "_PROGRAMS", 1)
    for name, value in everything(x, "triton", torch.float32, log=log, size=3).items():
        assert relative_error(value, whole[name]) <= 3e-7, name


# states, masks, scales, dtypes


@every_form
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_state_goes_on_where_the_last_call_stopped(log, size):
    x = make_inputs(39, log=log, heads=1)
    expected, _ = attend(x.to(torch.float64), "torch", log=log, size=size)
    state, outputs, start = None, [], 0
    for length in (18, 1, 20):
        low, stop = max(0, start - max(size - 1, 0)), start + length
        part = [
            y[:, :, start if name in ("q", "query") else low : stop] for name, y in zip(x._fields[:5], x, strict=False)
        ]
        y, state = attend(Inputs(*part, *x[5:]), "triton", log=log, size=size, state=state)
        outputs.append(y)
        start = stop
    assert_close(torch.cat(outputs, dim=2), expected)


@every_form
def test_more_earlier_keys_than_the_window_reaches_are_folded_before_the_first_query(log):
    x = make_inputs(60, log=log, heads=1)
    expected, whole = attend(x.to(torch.float64), "torch", log=log, size=3)
    late = x._replace(q=x.q[:, :, 40:], query=x.query[:, :, 40:])
    y, state = attend(late, "triton", log=log, size=3)
    assert_close(y, expected[:, :, 40:])
    assert_close(state.sums, whole.sums)


@every_form
@pytest.mark.parametrize("size", [0, 4])
def test_keys_that_do_not_exist_are_never_read(log, size):
    x = make_inputs(30, log=log, batch=2, heads=1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 13:] = False
    mask[1, :18] = False  # more than a chunk: its first queries see nothing
    expected = everything(x, "torch", torch.float64, log=log, size=size, mask=mask)
    hidden = ~mask[:, None, :, None]
    poisoned = x._replace(**{name: getattr(x, name).masked_fill(hidden, torch.nan) for name in ("k", "v")})
    for name, value in everything(poisoned, "triton", torch.float32, log=log, size=size, mask=mask).items():
        assert relative_error(value, expected[name]) <= 1e-6, name


@every_form
def test_queries_that_see_no_key_get_zero_and_no_gradient(log):
    x = make_inputs(20, log=log)
    leaves = [y.requires_grad_() for y in x[:3]]
    mask = torch.zeros(1, 20, dtype=torch.bool)
    y, state = attend(Inputs(*leaves, *x[3:]), "triton", log=log, mask=mask)
    assert not y.any()
    assert not state.sums.any()
    assert not any(grad.any() for grad in torch.autograd.grad((y + 1).sum(), leaves))


@pytest.mark.parametrize(("kind", "scale"), [("spread", 10.0), ("spread", 25.0), ("bias", 60.0), ("bias", 1000.0)])
def test_logarithms_of_any_size_are_as_exact_as_by_pytorch(kind, scale):
    """exp of such features overflows float32, and features differ by more than e^87."""
    x = make_inputs(40, log=True, features=6)
    if kind == "spread":
        x = x._replace(q=torch.cat([x.q, -x.q], -1) * scale, k=torch.cat([x.k, -x.k], -1) * scale)
        x = x._replace(sums=x.sums.repeat(1, 1, 2, 1))
    else:
        bias = torch.randn(6) * scale
        x = x._replace(q=x.q + bias.flip(0) / 4, k=x.k + bias)
    found = []
    for name, dtype in (("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        leaves = [y.to(dtype).requires_grad_() for y in x[:3]]
        y, _ = attend(Inputs(*leaves, *x[3:]), name, log=True)
        found.append([y, *torch.autograd.grad((y * x.q.new_tensor([1.0, -2.0] * 9 + [1.0])).sum(), leaves)])
    for name, exact, theirs, ours in zip(("y", "q", "k", "v"), *found, strict=True):
        # against all gradients: those of biases that all keys share cancel
        size = max(1.0, np.linalg.norm(exact.detach().numpy()))
        errors = [np.linalg.norm(y.detach().double().numpy() - exact.detach().numpy()) / size for y in (theirs, ours)]
        assert errors[1] <= max(2 * errors[0], 1e-6 * scale), name
        assert errors[1] <= 1e-6 * scale, name


def test_logarithms_beyond_the_range_of_the_dtype_still_give_means_of_values():
    x = make_inputs(40, log=True, scale=1e4)
    y, _ = attend(x, "triton", log=True, size=4)
    low, high = (getattr(x.v, limit)(dim=2, keepdim=True) for limit in ("amin", "amax"))
    assert ((y >= low - 1e-5) & (y <= high + 1e-5)).all()
    assert y.abs().amax(-1).gt(0).all()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_inputs_outputs_and_gradients_only(log, dtype):
    x = make_inputs(40, log=log).to(dtype)
    leaves = [y.requires_grad_() for y in x[:3]]
    y, state = attend(Inputs(*leaves, *x[3:]), "triton", log=log)
    found = [y, *torch.autograd.grad(y.sum(), leaves)]
    doubles = [y.detach().double().requires_grad_() for y in leaves]
    expected, whole = attend(Inputs(*doubles, *x[3:]), "torch", log=log)
    exact = [expected, *torch.autograd.grad(expected.sum(), doubles)]
    assert [z.dtype for z in found] == [dtype] * 4
    assert state.sums.dtype == torch.float32
    assert_close(state.sums, whole.sums)
    for mine, other in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, other.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@every_form
def test_what_rounding_adds_to_a_state_is_carried_to_the_next_call(log):
    x = make_inputs(16, log=log)
    sums = x.sums + 4096  # a unit of rounding is 5e-4 there
    zeros = torch.zeros_like(sums, dtype=torch.bfloat16)
    scale = torch.full_like(sums[..., 0], 9.0) if log else None  # far above all keys, whose sums are small then
    state, exact = (
        LinearState(sums, scale, zeros),
        LinearState(sums.double(), None if scale is None else scale.double(), None),
    )
    for _ in range(4):
        _, state = attend(x, "triton", log=log, state=state)
        _, exact = attend(x.to(torch.float64), "torch", log=log, state=exact)
    assert state.carry.dtype == torch.bfloat16
    carried = (state.sums.double() - state.carry.double() - exact.sums).abs().max()
    dropped = (state.sums.double() - exact.sums).abs().max()
    assert carried < 1e-5 < 1e-4 < dropped


# gradients and memory


@every_form
def test_gradients_come_alone_where_only_one_is_needed(log):
    x = make_inputs(10, log=log, heads=1)
    together = everything(x, "triton", torch.float32, log=log, size=0)
    random = torch.Generator().manual_seed(1)
    for name in ("q", "k", "v", "sums"):
        leaves = x._replace(**{name: getattr(x, name).clone().requires_grad_()})
        y, state = attend(leaves, "triton", log=log, state=state_of(leaves, log))
        random.manual_seed(1)
        directions = [torch.randn(z.shape, generator=random) for z in (y, state.sums)]
        total = (y * directions[0]).sum() + (state.sums * directions[1]).sum()
        assert torch.equal(torch.autograd.grad(total, getattr(leaves, name))[0], together[name])


def test_memory_layout_does_not_matter_and_nothing_is_changed_in_place():
    x = make_inputs(20, log=True)
    strided = Inputs(*(torch.stack([y, y], dim=-1)[..., 0] for y in x))
    copies = [y.clone() for y in strided]
    found, expected = (attend(y, "triton", log=True, state=state_of(y, True)) for y in (strided, x))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].sums, expected[1].sums)
    assert all(torch.equal(y, z) for y, z in zip(strided, copies, strict=True))


@every_form
def test_every_number_is_written_even_into_poisoned_memory(log, monkeypatch):
    x = make_inputs(19, log=log, heads=1)
    expected, empty, empty_like = (
        everything(x, "triton", torch.float32, log=log, size=3),
        torch.empty,
        torch.empty_like,
    )
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: empty_like(tensor, **options).fill_(torch.nan))
    for name, value in everything(x, "triton", torch.float32, log=log, size=3).items():
        assert torch.equal(value, expected[name]), name


@every_form
def test_outputs_without_gradients_are_the_same_bits(log):
    x = make_inputs(16, log=log)
    expected, _ = attend(x._replace(q=x.q.clone().requires_grad_()), "triton", log=log)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attend(x, "triton", log=log)[0], expected)


def test_a_second_derivative_is_refused_and_not_wrong():
    x = make_inputs(16, log=False)
    q = x.q.requires_grad_()
    y, _ = attend(x, "triton", log=False)
    with pytest.raises(RuntimeError, match=r"differentiable once; .* take backend='torch'"):
        torch.autograd.grad(y.square().sum(), q, create_graph=True)


def test_what_belongs_to_chunks_takes_the_same_room_however_long_the_row():
    rooms = []
    for length in (100_000, 1_000_000):
        x = [torch.empty(1, n, length, 128, device="meta") for n in (8, 2, 2)]
        work = backend.Work.of(*x, delay=0, log=True, chunk=64)
        room = backend._Rooms(work, torch.device("meta"), gradients=True)
        rooms.append(sum(y.numel() for y in vars(room).values()))
        kept = len(work.stretches()) * 128 * 129
        assert kept <= length * 128 / 20  # a twentieth of the keys
    assert rooms[0] == rooms[1]


@pytest.mark.parametrize("options", [{}, {"feature_map": "hedgehog_softmax", "window": 6}], ids=["log", "plain"])
def test_a_converted_model_trains_and_generates_as_by_pytorch(options, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, pad_token_id=0, eos_token_id=None, **sizes)
    model = convert_attention(LlamaForCausalLM(config).eval(), **options)
    ids, mask = torch.randint(1, 50, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    found = []
    for name in door.BACKENDS:
        monkeypatch.setattr(door, "_chosen", lambda *_, name=name: name)
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
        gradients = torch.autograd.grad(out.loss, list(model.parameters()))
        settings = {"max_new_tokens": 2, "do_sample": False, "attention_mask": mask}
        found.append((out.logits[mask == 1], gradients, model.generate(ids, **settings)))
    (theirs, their_gradients, their_tokens), (ours, gradients, new_tokens) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-4, atol=1e-7)
    assert torch.equal(new_tokens, their_tokens)


# the choice


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no backend 'cuda'; choose one of torch, triton or leave it out"):
        attend(make_inputs(4, log=False), "cuda", log=False)


def test_what_triton_cannot_serve_is_refused_by_name_and_done_by_pytorch_otherwise():
    x = make_inputs(40, log=False)
    double = x.to(torch.float64)
    with pytest.raises(
        ValueError, match=r"cannot serve this linear attention: it computes float32.*float64.*leave backend out"
    ):
        attend(double, "triton", log=False)
    state = state_of(double, False)
    with pytest.raises(ValueError, match=r"its states are float32, but the given one is torch\.float64"):
        attend(x, "triton", log=False, state=state)
    with pytest.raises(ValueError, match="nothing to compute"):
        attend(make_inputs(0, log=False), "triton", log=False)
    assert "one device, but lie on cpu, meta" in backend.refusal(x.q, x.k, x.v.to("meta"), None, log=False)
    assert attend(double, None, log=False)[0].dtype == torch.float64


def test_cpus_are_served_by_pytorch_to_the_bit(monkeypatch):
    x = make_inputs(40, log=True)
    monkeypatch.setattr(backend, "linear_sums", None)
    found, expected = (attend(x, name, log=True, size=3) for name in (None, "torch"))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].sums, expected[1].sums)


@pytest.mark.parametrize(
    ("cuda", "length", "reason", "chosen"),
    [
        (True, 65, None, "triton"),
        (True, 64, None, "torch"),
        (True, 65, "no compiler", "torch"),
        (False, 65, None, "torch"),
    ],
)
def test_gpus_get_kernels_for_more_than_a_chunk_unless_these_are_refused(cuda, length, reason, chosen, monkeypatch):
    monkeypatch.setattr(backend, "refusal", lambda *_, **__: reason)
    q = SimpleNamespace(is_cuda=cuda, shape=(1, 1, length, 3))
    assert door._chosen(None, q, q, q, None, False, 64) == chosen


def test_refusals_name_what_stands_in_the_way(monkeypatch):
    x = make_inputs(4, log=False)
    with kernels(interpret=False):
        assert "CUDA devices, not on cpu" in backend.refusal(x.q, x.k, x.v, None, log=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert backend.refusal(x.q, x.k, x.v, None, log=False) == "triton is not installed"


def test_importing_the_backend_imports_no_kernels(monkeypatch):
    monkeypatch.delitem(sys.modules, KERNELS)
    assert "refusal" in runpy.run_path(backend.__file__, run_name="triton_linear_backend")
    assert KERNELS not in sys.modules


@pytest.mark.parametrize(("name", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_tf32_is_taken_where_torch_may_take_it(name, precision):
    x = make_inputs(4, log=False)
    torch.set_float32_matmul_precision(name)  # a fixture of all tests sets it back
    assert backend.Work.of(x.q, x.k, x.v, delay=0, log=False, chunk=64).precision == precision


# the self-check


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_self_check_passes(log, dtype):
    assert backend._unsound((torch.float32, torch.float32, dtype), CPU, log, "ieee") is None


def test_the_self_check_does_not_depend_on_the_modes_of_the_first_call():
    with torch.inference_mode(), torch.device("meta"):
        assert backend._unsound(SINGLE, CPU, False, "ieee") is None
    UNSOUND.cache_clear()


@pytest.mark.parametrize("wrong", ["sums", "gradients"])
def test_the_self_check_finds_kernels_that_are_wrong(wrong, monkeypatch):
    right = backend._forward if wrong == "sums" else backend._backward

    def spoilt(*arguments, **options):
        first, *rest = right(*arguments, **options)
        return first * (1 + 1e-4 * torch.randn_like(first)), *rest

    monkeypatch.setattr(backend, "_forward" if wrong == "sums" else "_backward", spoilt)
    assert backend.self_check(SINGLE, CPU, log=False) > 5e-5
    backend._unsound.cache_clear()
    x = make_inputs(4, log=False)
    assert "self-check in torch.float32, torch.float32, torch.float32 on cpu is off by" in backend.refusal(
        x.q, x.k, x.v, None, log=False
    )
    backend._unsound.cache_clear()


def test_the_self_check_asks_once_and_passes_on_the_message_of_the_compiler(monkeypatch):
    calls = []

    def fail(*arguments, **options):
        calls.append((arguments, options))
        raise OSError("no ptxas")

    monkeypatch.setattr(backend, "self_check", fail)
    backend._unsound.cache_clear()
    x = make_inputs(4, log=False)
    for _ in range(3):
        assert backend.refusal(x.q, x.k, x.v, None, log=False).endswith("failed with OSError: no ptxas")
    with pytest.raises(ValueError, match="cannot serve this linear attention: its self-check"):
        attend(x, "triton", log=False)
    assert len(calls) == 1
    backend._unsound.cache_clear()


# GPUs that are not there

NUMBERS = {"groups", "key_heads", "queries", "keys", "features", "width", "shift", "limit", "first", "chunks"}


def shared_by(kernel, work, arch):
    """Bytes of shared memory of a kernel, compiled for a GPU."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in work.numbers().items() if name not in NUMBERS}
    absent = () if work.log else ("scale", "scales", "new_scale", "tops", "levels")
    types, values = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            types[name], values[(place,)] = "constexpr", constants.get(name)
        elif name in NUMBERS:
            types[name] = "i32"
        else:
            special = {"mask": "*u8", "carry": "*bf16", "new_carry": "*bf16", "v": "*bf16", "grad_v": "*bf16"}
            types[name] = special.get(name, "*fp32")
    options = {"num_warps": work.warps, "num_stages": 1, "enable_fp_fusion": True}
    source = ASTSource(kernel, types, values)
    return compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options).metadata.shared


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_every_kernel_compiles_for_gpus_within_the_shared_memory_of_all(precision, arch, log, tmp_path, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    torch.set_float32_matmul_precision(precision)
    x = torch.empty(1, 2, 1000, 128, device="meta")
    work = backend.Work.of(x, x[:, :1], x[:, :1, :, :64], delay=64, log=log, chunk=64)
    with kernels(interpret=False) as module:
        for name in ("fold", "attend", "grad_queries", "unfold", "grad_keys", "grad_values"):
            assert shared_by(getattr(module, name), work, arch) <= 49_152, name
