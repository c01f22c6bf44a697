"""Filters equal their formulas, do not depend on the length asked for, and stay in float32.

Run: python -m pytest tests/test_filters.py -q
"""

import contextlib

import numpy as np
import pytest
import torch

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.filters import ExplicitFilter, ImplicitFilter, decay_rates, filter_times, positional_features
from tests import oracles


TRAINED = 24
# sines of frequency 14 amplify float32 rounding to this share of the largest tap: see tests/golden/README.md
FLOAT32_TAPS = 5e-5


def make_config(**fields):
    sizes = {"vocab_size": 8, "hidden_size": 6, "num_hidden_layers": 1, "intermediate_size": 8}
    filters = {"filter_hidden_size": 10, "filter_num_bands": 3, "max_position_embeddings": TRAINED}
    return HyenaConfig(**(sizes | filters | fields))


def make_filter(kind=ImplicitFilter, **fields):
    """A filter with random parameters."""
    if kind is ExplicitFilter:
        fields = {"filter_types": ["explicit"]} | fields
    module = kind(make_config(**fields), 0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def state_of(module):
    """Parameters and buffers, by name; copies."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# values


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modulation": False},
        {"modulation_shift": 0.05},
        {"order": 2, "num_heads": 2},
        {"order": 4, "fast_decay": 0.1, "slow_decay": 2.0, "modulation_target": 0.1},
        {"filter_num_layers": 2, "filter_num_bands": 1},
        {"trainable_positional_features": True, "filter_num_layers": 6},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
@pytest.mark.parametrize("length", [1, 7, TRAINED])
def test_an_implicit_filter_equals_its_formula_in_float64(length, fields):
    module = make_filter(**fields).double()
    state = {name: tensor.numpy() for name, tensor in state_of(module).items()}
    features = state.get("features", positional_features(TRAINED, TRAINED, module.num_bands).numpy())[:length]
    linears = [
        {"weight": state[f"layers.{i}.weight"], "bias": state[f"layers.{i}.bias"]} for i in range(len(module.layers))
    ]
    expected = oracles.implicit_filter(
        features,
        [*linears, {"weight": state["output.weight"]}],
        state["frequency"],
        oracles.filter_times(TRAINED, length),
        state.get("decay_rates"),
        module.shift,
    )
    shape = module.order - 1, module.num_heads, length
    np.testing.assert_allclose(module(length).detach(), expected.reshape(shape), rtol=0, atol=1e-12)


def test_an_explicit_filter_is_its_taps_then_zeros():
    module = make_filter(ExplicitFilter, order=3, filter_length=5)
    assert torch.equal(module(3), module.weight[..., :3])
    assert torch.equal(module(9)[..., :5], module.weight)
    assert module(9).shape == (2, 6, 9)
    assert not module(9)[..., 5:].any()


@pytest.mark.parametrize(("trained_length", "num_bands"), [(1, 1), (2, 2), (24, 3), (129, 16), (1000, 8)])
def test_positional_features_equal_the_oracle_up_to_one_float32_rounding(trained_length, num_bands):
    features = positional_features(trained_length, trained_length, num_bands)
    assert features.dtype == torch.float32
    expected = oracles.positional_features(trained_length, num_bands)
    np.testing.assert_allclose(features, expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("trained_length", [2, 24, 129])
def test_beyond_the_trained_length_time_goes_on_at_the_same_pace(trained_length):
    length = 3 * trained_length
    times = filter_times(length, trained_length)
    expected = np.arange(length) / (trained_length - 1)
    np.testing.assert_allclose(times, expected, rtol=1.2e-7)
    angles = np.float64(2 * np.pi) * np.arange(length)[:, None] * np.linspace(1e-4, 2, 3) / trained_length
    features = positional_features(length, trained_length, 3)
    np.testing.assert_allclose(features[:, 1:], np.concatenate([np.cos(angles), -np.sin(angles)], 1), atol=4e-6)


def test_decay_rates_run_from_slow_to_fast_over_all_filters():
    rates = decay_rates(make_config(order=3, fast_decay=0.2, slow_decay=2.0, modulation_target=0.05))
    assert rates.shape == (2, 6)
    np.testing.assert_array_equal(rates.ravel()[[0, -1]], np.float32(np.log(0.05)) / np.float32([2.0, 0.2]))
    np.testing.assert_allclose(rates.ravel(), oracles.decay_rates(12, 0.2, 2.0, 0.05), rtol=1.2e-7)
    reached = torch.exp(-torch.tensor([2.0, 0.2]) * rates.ravel()[[0, -1]].abs())
    torch.testing.assert_close(reached, torch.full((2,), 0.05))


# length


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ImplicitFilter, {}),
        (ImplicitFilter, {"order": 3, "modulation_shift": 0.05}),
        (ImplicitFilter, {"filter_length": 10}),
        (ExplicitFilter, {"filter_length": 10}),
        (ExplicitFilter, {}),
    ],
)
def test_a_shorter_filter_is_the_prefix_of_a_longer_one_also_beyond_the_trained_length(kind, fields):
    module = make_filter(kind, **fields)
    with torch.no_grad():
        single, double = module(3 * TRAINED), module.double()(3 * TRAINED)
        for length in (1, 2, 9, 10, 11, TRAINED - 1, TRAINED, TRAINED + 1, 2 * TRAINED):
            torch.testing.assert_close(module(length), double[..., :length], rtol=0, atol=1e-12)
            prefix = module.float()(length)
            torch.testing.assert_close(
                prefix, single[..., :length], rtol=0, atol=float(FLOAT32_TAPS * single.abs().max())
            )
            module.double()


def test_features_of_a_shorter_filter_are_a_bitwise_prefix():
    features = positional_features(3 * TRAINED, TRAINED, 16)
    for length in range(1, 3 * TRAINED):
        assert torch.equal(positional_features(length, TRAINED, 16), features[:length])


def test_an_implicit_filter_goes_on_beyond_the_trained_length():
    taps = make_filter(modulation=False)(3 * TRAINED)
    assert taps.shape == (1, 6, 3 * TRAINED)
    assert (taps[..., TRAINED:].std(dim=-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ImplicitFilter, {"beyond_trained_length": "refuse"}),
        (ImplicitFilter, {"trainable_positional_features": True}),
        (ImplicitFilter, {"beyond_trained_length": "refuse", "filter_length": 4}),
        (ExplicitFilter, {"beyond_trained_length": "refuse"}),
    ],
)
def test_a_filter_longer_than_trained_is_refused_where_the_config_says_so(kind, fields):
    module = make_filter(kind, **fields)
    assert module(TRAINED).shape[-1] == TRAINED
    with pytest.raises(
        ValueError, match=f"filter of {TRAINED + 1} taps was asked for, but it was trained for {TRAINED}"
    ):
        module(TRAINED + 1)


@pytest.mark.parametrize("support", [1, 5, TRAINED, TRAINED + 6])
@pytest.mark.parametrize("length", [4, TRAINED, 2 * TRAINED])
def test_a_partial_filter_is_the_whole_one_within_its_support_and_zero_beyond(support, length):
    partial = make_filter(filter_length=support).double()
    whole = make_filter().double()
    whole.load_state_dict(partial.state_dict())
    taps = partial(length)
    torch.testing.assert_close(taps[..., :support], whole(length)[..., :support], rtol=0, atol=1e-12)
    assert taps.shape[-1] == length
    assert not taps[..., support:].any()


def test_every_layer_has_its_own_support():
    config = make_config(
        num_hidden_layers=3, filter_length=[3, 5, 7], filter_types=["implicit", "explicit", "implicit"]
    )
    filters = [ImplicitFilter(config, 0), ExplicitFilter(config, 1), ImplicitFilter(config, 2)]
    assert [module.support for module in filters] == [3, 5, 7]
    assert filters[1].weight.shape == (1, 6, 5)


@pytest.mark.parametrize("kind", [ImplicitFilter, ExplicitFilter])
def test_gradients_reach_every_parameter(kind):
    fields = {"trainable_positional_features": True} if kind is ImplicitFilter else {}
    module = make_filter(kind, **fields)
    module(TRAINED).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# dtype


@pytest.mark.parametrize("kind", [ImplicitFilter, ExplicitFilter])
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.to(device="cpu", dtype=torch.float16),
        lambda module: torch.nn.Sequential(module, torch.nn.Linear(2, 2)).bfloat16()[0],
    ],
    ids=["to-bfloat16", "half", "device-and-dtype", "inside-a-module"],
)
def test_a_half_precision_cast_leaves_filters_in_float32_with_the_same_values(cast, kind):
    fields = {"trainable_positional_features": True} if kind is ImplicitFilter else {}
    module = make_filter(kind, **fields)
    before, taps = state_of(module), module(TRAINED)
    module = cast(module)
    after = state_of(module)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(module(TRAINED), taps)


@pytest.mark.parametrize("kind", [ImplicitFilter, ExplicitFilter])
def test_double_raises_filters_to_float64_and_float_brings_them_back(kind):
    module = make_filter(kind)
    before = state_of(module)
    assert {tensor.dtype for tensor in state_of(module.double()).values()} == {torch.float64}
    assert module(TRAINED).dtype == torch.float64
    for name, tensor in state_of(module.float()).items():
        assert torch.equal(tensor, before[name]), name


def test_a_move_to_another_device_keeps_parameters_shapes_and_dtypes():
    module = make_filter().to(device="meta", dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    assert module(TRAINED).shape == (1, 6, TRAINED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [False, True])
def test_construction_under_a_half_precision_default_gives_exact_float32_filters(trainable, dtype):
    config = make_config(trainable_positional_features=trainable)
    expected = state_of(ImplicitFilter(config, 0))
    with default_dtype(dtype):
        state = state_of(ImplicitFilter(config, 0))
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, name
    for name in {"frequency", "decay_rates", "features"} & state.keys():
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_taps_do_not_depend_on_the_default_dtype(dtype):
    module = make_filter(filter_num_bands=8)
    taps = module(2 * TRAINED)
    with default_dtype(dtype):
        again = module(2 * TRAINED)
        assert filter_times(TRAINED, TRAINED).dtype == torch.float32
        assert positional_features(TRAINED, TRAINED, 3).dtype == torch.float32
    assert torch.equal(again, taps)


def filter_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".filter." in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loaded_in_half_precision_keeps_its_filters_exactly_in_float32(dtype, tmp_path):
    config = make_config(
        num_hidden_layers=2, filter_types=["implicit", "explicit"], trainable_positional_features=True
    )
    model = HyenaForCausalLM(config)
    model.save_pretrained(tmp_path)
    loaded = HyenaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = filter_state(model)
    assert len(expected) == 11
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if name in expected else dtype), name
        assert name not in expected or torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("cast", [HyenaForCausalLM.bfloat16, HyenaForCausalLM.half], ids=["bfloat16", "half"])
def test_a_model_cast_to_half_precision_keeps_its_filters_exactly_in_float32(cast):
    model = HyenaForCausalLM(make_config())
    expected = {name: tensor.clone() for name, tensor in filter_state(model).items()}
    model = cast(model)
    assert model.model.embed_tokens.weight.dtype in (torch.bfloat16, torch.float16)
    for name, tensor in filter_state(model).items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name


def test_a_model_made_in_bfloat16_starts_from_exact_float32_decays_and_frequencies():
    config = make_config(trainable_positional_features=True)
    expected, made = (
        filter_state(HyenaForCausalLM._from_config(config, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    for name, tensor in made.items():
        assert tensor.dtype == torch.float32, name
        if name.endswith(("decay_rates", "frequency", "features")):
            assert torch.equal(tensor, expected[name]), name


def test_a_model_trained_in_bfloat16_gives_its_filters_float32_gradients():
    model = HyenaForCausalLM(make_config()).bfloat16()
    ids = torch.randint(0, 8, (2, 12))
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if ".filter." in name}
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
