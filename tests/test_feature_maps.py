# SPDX-License-Identifier: Apache-2.0
"""Every feature map has the kernel that its table says, in every dtype, with positive weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.configuration_hyena import FEATURE_MAP_NAMES
from hyena_hf.feature_maps import FEATURE_MAPS, FeatureMap, LearnedMap, make_feature_map
from hyena_hf.ops.linear_attention import linear_attention_weights


HEADS, WIDTH, LENGTH, LONGEST = 3, 5, 11, 40


def softmax(y: Tensor) -> Tensor:
    return y.exp() / y.exp().sum(-1, keepdim=True)


def both(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.cat([function(y), function(-y)], dim=-1)


LEARNED: dict[str, Callable[[Tensor], Tensor]] = {
    "hedgehog": both(torch.exp),
    "hedgehog_softmax": both(softmax),
    "hedgehog_joint_softmax": lambda y: softmax(torch.cat([y, -y], dim=-1)),
    "relu": lambda y: y.clamp(min=0),
}
FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: torch.where(x > 0, 1 + x, x.exp()),
    "exp_1": torch.exp,
    "exp_2": lambda x: (2 * x).exp(),
}

every_map = pytest.mark.parametrize("name", FEATURE_MAPS)


def a_map(name: str) -> FeatureMap:
    """A map in float64 whose learned part is random."""
    phi = make_feature_map(name, HEADS, WIDTH, max_length=LONGEST).double()
    for parameter in phi.parameters():
        torch.nn.init.normal_(parameter)
    return phi


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, HEADS, LENGTH, WIDTH, dtype=torch.float64)


def kernel(phi_q: FeatureMap, phi_k: FeatureMap, q: Tensor, k: Tensor) -> Tensor:
    """phi(q) . phi(k) of all pairs (B, H, n, n)."""
    positions = torch.arange(LENGTH)
    return product(phi_q(q, positions), phi_k(k, positions), is_log=phi_q.is_log)


def product(q_features: Tensor, k_features: Tensor, *, is_log: bool) -> Tensor:
    return q_features.exp() @ k_features.exp().mT if is_log else q_features @ k_features.mT


@pytest.mark.parametrize("name", LEARNED)
def test_learned_maps_are_those_of_the_table(name: str) -> None:
    phi, x = a_map(name), tokens()
    assert isinstance(phi, LearnedMap)
    y = torch.stack([x[:, h] @ phi.weight[h] + phi.bias[h] for h in range(HEADS)], dim=1)
    features = phi(x).exp() if phi.is_log else phi(x)
    torch.testing.assert_close(features, LEARNED[name](y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("feature_dim", [3, 5])
def test_learned_maps_start_as_the_identity(name: str, feature_dim: int) -> None:
    phi, x = make_feature_map(name, HEADS, WIDTH, feature_dim), tokens()
    features = phi(x).exp() if phi.is_log else phi(x)
    torch.testing.assert_close(features, LEARNED[name](x[..., :feature_dim]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_softmax", "hedgehog_joint_softmax"])
@pytest.mark.parametrize("feature_dim", [None, 2 * 6])
def test_maps_of_a_model_from_scratch_start_with_the_scores_of_softmax_attention(
    name: str, feature_dim: int | None
) -> None:
    width = 6
    config = HyenaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=1,
        layer_types=["hedgehog"],
        feature_map=name,
        feature_dim=feature_dim,
    )
    layer = HyenaForCausalLM(config).double().model.layers[0].mixer.attention

    def log_weight(q: Tensor, k: Tensor) -> Tensor:
        features = (phi(x.expand(1, 2, 1, width)) for phi, x in ((layer.q_map, q), (layer.k_map, k)))
        return product(*features, is_log=layer.is_log)[0, 0].log().squeeze()

    zero = torch.zeros(width, dtype=torch.float64)
    mixed = torch.autograd.functional.hessian(log_weight, (zero, zero))[0][1]  # of q . k / sqrt(P): I / sqrt(P)
    expected = torch.eye(width, dtype=torch.float64)
    if name == "hedgehog_softmax":  # takes no notice of what all y have in common
        mean = layer.q_map.weight[0].mean(-1, keepdim=True)
        expected = expected - mean @ mean.mT * width**0.5
    torch.testing.assert_close(mixed * width**0.5, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_every_feature_of_a_map_wider_than_its_head_learns_in_a_way_of_its_own(name: str) -> None:
    phi_q, phi_k = (make_feature_map(name, HEADS, WIDTH, 3 * WIDTH + 2).double() for _ in range(2))
    assert isinstance(phi_q, LearnedMap)
    weight = phi_q.weight.detach()
    for start in range(0, 3 * WIDTH, WIDTH):
        block = weight[0, :, start : start + WIDTH]
        torch.testing.assert_close(block.mT @ block, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-6)
    assert weight.equal(make_feature_map(name, HEADS, WIDTH, 3 * WIDTH + 2).double().weight)
    weights = kernel(phi_q, phi_k, tokens(), tokens())
    (weights / weights.sum(-1, keepdim=True)).square().sum().backward()
    gradient = torch.nn.functional.normalize(phi_q.weight.grad[0], dim=0)  # (P, D)
    assert (gradient.norm(dim=0) > 0.5).all()
    assert (gradient.mT @ gradient).fill_diagonal_(0).abs().max() < 1 - 1e-6


@pytest.mark.parametrize("name", FIXED)
def test_fixed_maps_are_those_of_the_table(name: str) -> None:
    phi, x = a_map(name), tokens()
    features = phi(x).exp() if phi.is_log else phi(x)
    torch.testing.assert_close(features, FIXED[name](x), rtol=1e-12, atol=1e-12)


def test_the_cosformer_weighs_by_distance() -> None:
    q, k, phi = tokens(), tokens(), a_map("cosformer")
    column = torch.arange(LENGTH, dtype=torch.float64)
    distance = column.unsqueeze(1) - column
    expected = q.clamp(min=0) @ k.clamp(min=0).mT * (math.pi / 2 * distance / LONGEST).cos()
    torch.testing.assert_close(kernel(phi, phi, q, k), expected, rtol=1e-12, atol=1e-12)


def test_the_cosformer_takes_positions_of_each_row() -> None:
    x, phi = tokens(), a_map("cosformer")
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) + 7])
    torch.testing.assert_close(phi(x, positions)[1], phi(x[1:], positions[1])[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="pass positions"):
        phi(x)


def test_the_taylor_map_is_the_second_order_of_the_exponential() -> None:
    q, k, phi = tokens(), tokens(), a_map("taylor")
    score = q @ k.mT / WIDTH**0.5
    torch.testing.assert_close(kernel(phi, phi, q, k), 1 + score + score**2 / 2, rtol=1e-12, atol=1e-12)
    assert phi.num_features == 1 + WIDTH + WIDTH * (WIDTH + 1) // 2


def test_the_performer_estimates_the_kernel_of_softmax() -> None:
    q, k = tokens() / 2, tokens() / 2
    errors = []
    for feature_dim in (100, 10_000):
        phi = make_feature_map("performer", HEADS, WIDTH, feature_dim).double()
        exact = (q @ k.mT / WIDTH**0.5).exp()
        errors.append(((kernel(phi, phi, q, k) - exact).abs() / exact).mean())
    assert errors[1] < 0.05  # its spread falls with the root of the number of features
    assert errors[1] < errors[0] / 5


def test_directions_of_the_performer_are_orthogonal_in_blocks_and_alike_for_queries_and_keys() -> None:
    first, second = (make_feature_map("performer", heads, WIDTH, 12).get_buffer("directions") for heads in (3, 1))
    assert torch.equal(first, second)
    assert first.shape == (12, WIDTH)
    gram = first[:WIDTH] @ first[:WIDTH].mT
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5)


@every_map
def test_weights_are_those_of_the_kernel(name: str) -> None:
    q, k = tokens(), tokens()
    phi_q, phi_k = a_map(name), a_map(name)
    positions = torch.arange(LENGTH)
    pairs = kernel(phi_q, phi_k, q, k).tril()
    weights = linear_attention_weights(phi_q(q, positions), phi_k(k, positions), log_features=phi_q.is_log)
    total = pairs.sum(-1, keepdim=True)
    expected = pairs / torch.where(total == 0, 1, total)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@every_map
def test_no_weight_is_negative(name: str) -> None:
    phi_q, phi_k = a_map(name), a_map(name)
    assert kernel(phi_q, phi_k, 3 * tokens(), 3 * tokens()).min() >= 0


@every_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_low_precision_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    phi, x = a_map(name).to(dtype), tokens().to(dtype)
    features = phi(x, torch.arange(LENGTH))
    assert features.dtype == torch.float32
    expected = phi.double()(x.double(), torch.arange(LENGTH))
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)


@every_map
def test_every_parameter_has_a_gradient(name: str) -> None:
    phi = a_map(name)
    x = tokens().requires_grad_()
    (phi(x, torch.arange(LENGTH)) * torch.randn(phi.num_features, dtype=torch.float64)).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in (x, *phi.parameters()))


@every_map
def test_the_number_of_features_is_told(name: str) -> None:
    phi = a_map(name)
    assert phi(tokens(), torch.arange(LENGTH)).shape == (2, HEADS, LENGTH, phi.num_features)
    assert str(phi.num_features) in repr(phi)


def test_the_config_knows_every_map() -> None:
    assert set(FEATURE_MAP_NAMES) == set(FEATURE_MAPS)
    for name in FEATURE_MAPS:
        fixed = not FEATURE_MAPS[name].has_feature_dim
        options = {"layer_types": ["hedgehog"] * 18, "feature_map": name, "feature_dim": 8}
        if fixed:
            with pytest.raises(ValueError, match="leave it out"):
                HyenaConfig(**options)
        else:
            assert HyenaConfig(**options).feature_dim == 8


def test_wrong_names_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="no feature map is called 'hedge'; known are hedgehog"):
        make_feature_map("hedge", 1, 4)
    with pytest.raises(ValueError, match="fixed number of features"):
        make_feature_map("elu", 1, 4, feature_dim=8)
    with pytest.raises(ValueError, match="at least 1"):
        make_feature_map("hedgehog", 1, 4, feature_dim=0)


@every_map
def test_autocast_lowers_the_precision_of_no_feature(name: str) -> None:
    phi, x = a_map(name).float(), tokens().float()
    expected = phi(x, torch.arange(LENGTH))
    with torch.autocast("cpu", torch.bfloat16):
        assert phi(x, torch.arange(LENGTH)).equal(expected)
