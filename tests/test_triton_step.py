"""One fused token equals the recurrence in float64, run by Triton's interpreter on the CPU.

Run: python -m pytest tests/test_triton_step.py -q

Letters: B batch, D channels, K taps, d numbers of state.
"""

import importlib
import sys

import numpy as np
import pytest
import torch

from hyena_hf.ops import hyena_step as door
from hyena_hf.ops.modal import ModalStep


pytest.importorskip("triton")

KERNELS = "hyena_hf.ops.backends._triton_step"


@pytest.fixture(scope="module")
def interpreter():
    importlib.import_module("triton.language")  # its own functions stay compilable
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    patch.delitem(sys.modules, KERNELS, raising=False)
    try:
        yield importlib.import_module(KERNELS)
    finally:
        sys.modules.pop(KERNELS, None)
        door.kernel_fault.cache_clear()
        patch.undo()


pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # the interpreter of Triton 3.6
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


def make_inputs(batch, width, taps, size, *, bias=True, pairs=True):
    random = torch.Generator().manual_seed(batch + width + taps + size)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    cross = (draw(size // 2, width), draw(size // 2, width)) if pairs else None
    step = ModalStep(draw(size, width), cross, draw(size, width))
    window, weight = draw(batch, taps - 1, 3 * width), draw(3 * width, taps)
    skew = draw(3 * width) if bias else None
    return draw(batch, 3 * width), window, weight, skew, draw(batch, size, width), step, draw(width)


def one_token(p, window, weight, bias, state, step, direct):
    """The formula, number by number, in numpy float64."""
    p, window, weight, state, direct = (x.double().numpy() for x in (p, window, weight, state, direct))
    decay, readout = step.decay.double().numpy(), step.readout.double().numpy()
    inputs = np.concatenate([window, p[:, None]], axis=1)  # (B, K, 3 D)
    s = np.einsum("bkc,ck->bc", inputs, weight) + (0 if bias is None else bias.double().numpy())
    gate, key, value = np.split(s, 3, axis=1)
    w = key * value
    y = gate * (np.einsum("bdc,dc->bc", state, readout) + direct * w)
    following = decay * state + w[:, None]
    if step.cross is not None:
        half = len(decay) // 2
        following[:, :half] += step.cross[0].double().numpy() * state[:, half:]
        following[:, half:] += step.cross[1].double().numpy() * state[:, :half]
    return y, inputs[:, 1:], following


def worst_error(found, expected):
    pairs = [(a.double().numpy(), b) for a, b in zip(found, expected, strict=True) if b.size]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


@pytest.mark.parametrize("way", [door._fused, door.reference], ids=["kernel", "formula"])
@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize("taps", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch", "width"), [(1, 63), (3, 70), (2, 130)])
def test_a_token_is_that_of_the_formula_in_float64(way, batch, width, taps, size):
    inputs = make_inputs(batch, width, taps, size)
    assert worst_error(way(*inputs), one_token(*inputs)) <= 1e-6


@pytest.mark.parametrize("way", [door._fused, door.reference], ids=["kernel", "formula"])
def test_real_poles_and_no_bias_are_served(way):
    inputs = make_inputs(2, 20, 3, 4, bias=False, pairs=False)
    assert worst_error(way(*inputs), one_token(*inputs)) <= 1e-6


def test_inputs_stay_as_they_are():
    inputs = make_inputs(2, 20, 3, 4)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    door._fused(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_self_check_finds_a_kernel_that_is_wrong(monkeypatch):
    assert door.kernel_fault(torch.device("cpu")) is None
    right = door._fused

    def wrong(*inputs):
        y, window, state = right(*inputs)
        return y, window, state * (1 + 1e-4)

    monkeypatch.setattr(door, "_fused", wrong)
    door.kernel_fault.cache_clear()
    assert "is off by" in door.kernel_fault(torch.device("cpu"))
    door.kernel_fault.cache_clear()
