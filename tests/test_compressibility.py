"""Penalties that make trained filters easy to distil.

.venv/bin/python -m pytest tests/test_compressibility.py
"""

import pytest
import torch

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.distillation import HankelPenalty, RoughnessPenalty, fit_modal, hankel_singular_values
from hyena_hf.distillation.compressibility import hankel_tail, roughness
from tests.filters_to_distil import modal, smoothed_noise
from tests.models import FULL, HYENA, new_model
from training.data import pack_documents
from training.recipe import Recipe, train


def true_tail(h, states):
    sigma = hankel_singular_values(h.detach()).square()
    return sigma[:, states:].sum(dim=1) / sigma.sum(dim=1)


@pytest.mark.parametrize("states", [4, 16])
def test_the_tail_is_from_above_and_near_the_share_of_singular_values(states):
    h = torch.cat([smoothed_noise(6, 256), torch.randn(3, 256, dtype=torch.float64)])
    found, truth = hankel_tail(h, states), true_tail(h, states)
    assert (found >= truth - 1e-12).all()
    assert (found - truth).max() <= 0.15


def test_the_tail_of_an_exact_filter_is_nothing_and_its_scale_does_not_matter():
    h, _, _, _ = modal(3, 6, 200)
    assert hankel_tail(h, 6).abs().max() <= 1e-9
    noise = smoothed_noise(3, 100)
    torch.testing.assert_close(hankel_tail(noise * 1e3, 4), hankel_tail(noise, 4))
    assert torch.isfinite(hankel_tail(torch.zeros(1, 40), 4)).all()


def test_the_gradient_of_the_tail_is_that_of_the_share_where_the_space_is_found():
    base, _, _, _ = modal(1, 3, 60)
    h = (base + 1e-4 * torch.randn(1, 60, dtype=torch.float64)).requires_grad_()
    hankel_tail(h, 3).sum().backward()
    for lag in (1, 5, 40):
        step = torch.zeros_like(base)
        step[0, lag] = 1e-6
        slope = (true_tail(h + step, 3) - true_tail(h - step, 3)) / 2e-6
        assert abs(float(slope) - float(h.grad[0, lag])) <= 0.02 * float(h.grad.abs().max())
    assert h.grad[0, 0] == 0  # lag 0 costs no state


@pytest.mark.parametrize("penalty", [lambda h: hankel_tail(h, 4), roughness])
def test_descent_on_a_penalty_makes_fits_better(penalty):
    h = smoothed_noise(4, 100).float().requires_grad_()
    before = fit_modal(h.detach(), state_size=4)[3].relative_l2
    optimizer = torch.optim.Adam([h], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        penalty(h).sum().backward()
        optimizer.step()
    after = fit_modal(h.detach(), state_size=4)[3].relative_l2
    assert after.mean() <= 0.8 * before.mean()


def test_roughness_is_between_that_of_a_constant_and_of_alternating_signs():
    lag = torch.arange(101)
    constant, signs = torch.ones(1, 101), ((-1.0) ** lag).unsqueeze(0)
    assert roughness(constant).item() == 0
    assert roughness(signs).item() == pytest.approx(0.99)


@pytest.mark.parametrize("states", [0, 20, 25])
def test_a_tail_with_nothing_in_it_is_refused(states):
    with pytest.raises(ValueError, match=r"must be from 1 to 19: a Hankel matrix of 40 taps has 20 rows"):
        hankel_tail(torch.ones(1, 40), states)


@pytest.mark.parametrize("penalty", [HankelPenalty(2.0, states=3), RoughnessPenalty(2.0)])
def test_a_penalty_is_a_mean_over_the_filters_of_all_layers_and_reaches_their_parameters(penalty):
    model = new_model("hybrid", num_hidden_layers=3, layer_types=[HYENA, FULL, HYENA], max_position_embeddings=50)
    value = penalty(model)
    taps = torch.cat([model.model.layers[i].mixer.filter(50)[0] for i in (0, 2)])
    each = hankel_tail(taps, 3) if isinstance(penalty, HankelPenalty) else roughness(taps)
    torch.testing.assert_close(value, 2 * each.mean())
    value.backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched
    assert all(".filter." in name for name in touched)
    with pytest.raises(ValueError, match="train this one without it"):
        penalty(new_model("modal"))


def trained(folder, penalty):
    torch.manual_seed(0)
    config = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=16)
    model = HyenaForCausalLM(HyenaConfig(**config))
    rows = pack_documents([[(i * j) % 16 for i in range(20)] for j in range(12)], 16)
    recipe = Recipe(steps=8, batch_size=2, log_every=1, save_every=4, evaluate_every=8, learning_rate=1e-2)
    return model, train(model, rows, rows, output_dir=folder, recipe=recipe, penalty=penalty)


def test_training_with_a_penalty_lowers_it_and_logs_the_loss_without_it(tmp_path):
    penalty = HankelPenalty(100.0, states=2)
    plain, result = trained(tmp_path / "plain", None)
    penalised, other = trained(tmp_path / "penalised", penalty)
    assert penalty(penalised).item() < 0.9 * penalty(plain).item()
    assert other.loss_curve[0][1] == pytest.approx(result.loss_curve[0][1])
    assert trained(tmp_path / "penalised", HankelPenalty(100.0, states=2))[1] == other
    for another in (None, HankelPenalty(100.0, states=3)):
        with pytest.raises(ValueError, match="holds another run: penalty"):
            trained(tmp_path / "penalised", another)
