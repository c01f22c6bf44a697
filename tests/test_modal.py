"""Modal filters: taps, recurrences and their agreement.

.venv/bin/python -m pytest tests/test_modal.py
"""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from hyena_hf.filters import ModalFilter
from hyena_hf.ops import causal_fftconv, modal
from hyena_hf.ops.modal import (
    NO_POLE,
    PI,
    advance,
    advance_one,
    canonical_poles,
    impulse_response,
    modal_response,
    modal_step,
    modal_system,
    read_out,
)
from tests import oracles
from tests.models import config_of, new_model, tokens


def draw(heads=6, poles=5, longest=200.0, seed=0):
    """Log-radii, angles, residues (H, N): complex, positive and negative real poles, and slots without one."""
    rng = torch.Generator().manual_seed(seed)
    constants = 3 * (longest / 3) ** torch.rand(heads, poles, generator=rng, dtype=torch.float64)
    angle = torch.rand(heads, poles, generator=rng, dtype=torch.float64) * 3
    angle[1:, 0], angle[2:, 1] = 0.0, PI
    log_radius = -1 / constants
    log_radius[3:, 2] = NO_POLE
    re, im = torch.randn(2, heads, poles, generator=rng, dtype=torch.float64)
    return log_radius, angle, re, im


def taps(parts, direct, length):
    log_radius, _, re, im = (x.double().numpy() for x in parts)
    poles = canonical_poles(*parts[:2]).numpy()
    residues = np.where(log_radius > NO_POLE, re + 1j * im, 0)
    return oracles.modal_filter(poles, residues, direct.double().numpy(), length)


def worst_channel(found, truth):
    """Largest relative RMS error of a channel (B, C, L)."""
    return float(((found.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


@pytest.mark.parametrize("length", [1, 2, 3, 255, 256, 257, 1000])
def test_taps_are_the_sum_of_exponentials(length):
    parts, direct = draw(), torch.randn(6, dtype=torch.float64)
    h = impulse_response(*parts, direct, length)
    truth = taps(parts, direct, length)
    assert abs(h.numpy() - truth).max() <= 1e-12 * abs(truth).max()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 1000])
def test_taps_of_any_length_are_the_first_of_more(length):
    parts, direct = draw(), torch.zeros(6, dtype=torch.float64)
    longer = impulse_response(*parts, direct, 3000)[:, :length]
    torch.testing.assert_close(impulse_response(*parts, direct, length), longer, rtol=0, atol=1e-13)


def test_canonical_poles_have_float32_parts_within_the_unit_disc():
    poles = canonical_poles(*draw()[:2])
    assert torch.equal(poles, poles.to(torch.complex64).to(torch.complex128))
    assert (poles.abs() < 1).all()
    assert (canonical_poles(torch.tensor([NO_POLE]), torch.tensor([1.0])) == 0).all()


def test_a_complex_pole_takes_two_numbers_of_the_state_and_a_real_one_takes_one():
    log_radius = torch.full((1, 3), -0.1, dtype=torch.float64)
    ones = torch.ones(1, 3, dtype=torch.float64)
    for angles, size in (([1.0, 0.0, PI], 4), ([0.0, 0.0, PI], 4), ([0.0, PI, 0.5], 4), ([1.0, 2.0, 0.5], 6)):
        assert modal_system(log_radius, torch.tensor([angles], dtype=torch.float64), ones, ones).size == size


@pytest.mark.parametrize(
    "pieces", [[700], [1, 699], [255, 1, 256, 188], [3, 4, 693], [15, 16, 17, 1, 31, 33, 587], [257, 512, 258]]
)
@pytest.mark.parametrize("at_once", [1, 2**13, 2**20])
def test_blocks_of_inputs_give_the_outputs_and_the_state_of_single_steps(pieces, at_once, monkeypatch):
    monkeypatch.setattr(modal, "_AT_ONCE", at_once)
    parts, direct = draw(), torch.zeros(6, dtype=torch.float64)
    system = modal_system(*parts)
    w = torch.randn(2, 6, sum(pieces), dtype=torch.float64)
    step, state, outputs = modal_step(system, 6, w.dtype), torch.zeros(2, system.size, 6, dtype=torch.float64), []
    for t in range(w.shape[-1]):
        outputs.append(read_out(state, step))
        state = advance_one(state, w[..., t], step)
    truth = oracles.causal_conv(w.numpy(), taps(parts, direct, w.shape[-1]))
    assert abs(torch.stack(outputs, dim=-1).numpy() - truth).max() <= 1e-11 * abs(truth).max()
    carried, blocks = None, []
    for piece in w.split(pieces, dim=-1):
        h = impulse_response(*parts, direct, piece.shape[-1])
        y = causal_fftconv(piece, h)
        blocks.append(y if carried is None else y + modal_response(carried, piece.shape[-1], system))
        carried = advance(carried, piece, system)
    assert abs(torch.cat(blocks, dim=-1).numpy() - truth).max() <= 1e-11 * abs(truth).max()
    assert (carried - state).abs().max() <= 1e-11 * state.abs().max()


@pytest.mark.parametrize(("length", "bound"), [(4096, 1e-5), pytest.param(131_072, 3e-5, marks=pytest.mark.slow)])
def test_the_parallel_form_in_float32_equals_single_steps_with_memories_as_long_as_the_input(length, bound):
    parts = [x.float() for x in draw(heads=16, poles=8, longest=length)]
    system = modal_system(*parts)
    w = torch.randn(1, 16, length)
    step, state = modal_step(system, 16, torch.float32), torch.zeros(1, system.size, 16)
    outputs = torch.empty(1, 16, length)
    for t in range(length):
        outputs[..., t] = read_out(state, step)
        state = advance_one(state, w[..., t], step)
    h = impulse_response(*parts, torch.zeros(16), length)
    assert worst_channel(outputs, causal_fftconv(w.double(), h.double(), backend="blocked")) <= bound
    assert worst_channel(outputs, causal_fftconv(w, h).double()) <= bound
    assert worst_channel(advance(None, w, system).mT, state.mT.double()) <= bound


def test_training_that_leaves_the_unit_disc_is_projected_back_without_a_change_of_the_taps():
    torch.manual_seed(0)
    modal = ModalFilter(config_of("modal"), 0).double()
    with torch.no_grad():
        modal.residue_re.normal_()
        modal.residue_im.normal_()
        modal.angle.add_(5.0).mul_(-1)
        before = modal(20)
        modal.project_()
        assert (modal(20) - before).abs().max() <= 1e-5 * before.abs().max()  # poles are rounded to float32
        assert modal.angle.min() >= 0
        assert modal.angle.max() <= PI
        modal.log_radius.fill_(0.3)
        modal.project_()
        assert (canonical_poles(modal.log_radius, modal.angle).abs() < 1).all()


def test_gradients_of_a_modal_filter_are_those_of_its_formula():
    log_radius, angle, re, im = (x[:2, :3].clone().requires_grad_() for x in draw(seed=3))
    with torch.no_grad():
        log_radius.clamp_(min=-1)
        angle.clamp_(0.2, 2.9)
    direct = torch.randn(2, dtype=torch.float64, requires_grad=True)
    inputs = log_radius, angle, re, im, direct
    weight = torch.randn(2, 9, dtype=torch.float64)
    found = torch.autograd.grad((impulse_response(*inputs, 9) * weight).sum(), inputs)
    poles, lags = torch.exp(torch.complex(log_radius, angle)), torch.arange(8)
    tail = (torch.complex(re, im).unsqueeze(-1) * poles.unsqueeze(-1) ** lags).sum(1).real
    truth = torch.autograd.grad((torch.cat([direct.unsqueeze(1), tail], 1) * weight).sum(), inputs)
    for one, other in zip(found, truth, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()  # rounding of poles is straight-through


def test_a_modal_filter_made_in_float64_can_be_initialised():
    """Its parameters once were views of fewer numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        modal = ModalFilter(config_of("modal"), 0)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        modal.log_radius.copy_(modal.log_radius - 1)
        modal.angle.mul_(2)
    assert modal.log_radius.dtype == torch.float64


def test_a_model_of_modal_filters_in_float64_exports_for_any_length():
    """An empty state once asked for its size, which a graph cannot know."""
    model = new_model("modal", torch.float64).requires_grad_(False)
    length = torch.export.Dim("length", min=2, max=100)
    inputs = {"input_ids": tokens(1, 20), "use_cache": False}
    exported = torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": {1: length}, "use_cache": None})
    for count in (2, 77):
        ids = tokens(1, count)
        assert (exported.module()(input_ids=ids, use_cache=False).logits - model(ids).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["modal", "modal heads"])
def test_the_cache_of_a_long_prompt_is_no_larger_than_that_of_a_short_one(name, kind):
    """Taps of the whole prompt once stayed behind."""
    held = []
    for length in (200, 600):
        model = new_model(name)
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=length + 4)
        with torch.no_grad():
            model(tokens(2, length), past_key_values=cache)
            model(tokens(2, 1), past_key_values=cache)
        held.append(sum(layer.nbytes() for layer in cache.layers))
    assert held[0] == held[1]
