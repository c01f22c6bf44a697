"""Filters equal their formulas, do not depend on the length asked for, and stay in float32.

Run: python -m pytest tests/test_filters.py -q
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.filters import (
    ExplicitFilter,
    FilterLinear,
    ImplicitFilter,
    decay_rates,
    filter_times,
    positional_features,
    without_high_frequencies,
)
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


# evaluation without gradients

LONG = 2048 + 512 + 7  # more than a tile, a block and a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained_length", [100, 3000])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"modulation": False, "order": 3},
        {"modulation_shift": 0.05},
        {"num_heads": 2, "fast_decay": 0.01, "filter_num_layers": 2},
        {"is_causal": False},
        {"trainable_positional_features": True},
        {"filter_length": 513},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_taps_without_gradients_are_those_with_gradients(fields, trained_length, dtype):
    module = make_filter(**fields, max_position_embeddings=trained_length).to(dtype)
    length = trained_length if module.features is not None else LONG
    for reverse in (False, True)[: 1 if module.is_causal else 2]:
        taps = module(length, reverse=reverse)
        assert taps.requires_grad
        with torch.no_grad():
            tiled = module(length, reverse=reverse)
        frozen = module.requires_grad_(False)(length, reverse=reverse)
        module.requires_grad_()
        assert torch.equal(frozen, tiled)
        assert tiled.is_contiguous()
        bound = 1e-12 if dtype == torch.float64 else FLOAT32_TAPS * float(taps.detach().abs().max())
        torch.testing.assert_close(tiled, taps, rtol=0, atol=bound)


def test_windows_are_no_products_where_time_does_not_rise_evenly():
    slow = {"slow_decay": 3000, "fast_decay": 1000}  # windows still of order 1 behind the first block
    module = make_filter(max_position_embeddings=1, filter_num_bands=1, sine_frequency=0.01, **slow)
    torch.nn.init.constant_(module.frequency, 0.01)
    assert filter_times(4, 1).tolist() == [0, 2, 3, 4]
    with torch.no_grad():
        tiled = module(600)
    torch.testing.assert_close(tiled, module(600).detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"modulation_shift": 0.05}, {"modulation": False, "hidden_size": 128}])
def test_without_gradients_a_shorter_filter_is_a_bitwise_prefix(fields):
    module = make_filter(**fields, max_position_embeddings=2000).requires_grad_(False)
    whole = module(LONG)
    for length in (*range(1, 40), 511, 512, 513, 1001, 2047, 2048, 2049, 2065):
        assert torch.equal(module(length), whole[..., :length]), length


@pytest.mark.parametrize("trained_length", [300, 4000])
def test_windows_made_of_products_are_as_exact_as_those_made_of_exponentials(trained_length):
    # one hidden unit: a tap is one product, so windows are its only sums
    fields = {"max_position_embeddings": trained_length, "filter_hidden_size": 1, "filter_num_layers": 2}
    module = make_filter(**fields).requires_grad_(False)
    torch.nn.init.constant_(module.layers[0].weight, 1e-3)
    torch.nn.init.constant_(module.layers[0].bias, 0.05)
    times, rates = filter_times(LONG, trained_length), module.decay_rates
    wide = module(LONG) / module.output.weight.view(1, -1, 1)
    module.decay_rates = None
    found = (wide / (module(LONG) / module.output.weight.view(1, -1, 1)))[0]
    exponents = rates.T.abs().double() * times.double()
    seen = exponents < 60  # smaller windows are no float32 numbers
    error = (found.double() / torch.exp(-exponents) - 1).abs()
    assert (error[seen] <= 1e-6 + 2.4e-7 * exponents[seen]).all()


class LargestTensors(TorchDispatchMode):
    """Sizes of what operators return, by name of the operator."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = func.is_view or "out" in (kwargs or {})
        self.sizes += [0 if views else x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


def test_a_long_filter_needs_memory_for_its_taps_and_one_tile():
    module, length = make_filter(hidden_size=64, filter_hidden_size=64, max_position_embeddings=2**16), 2**16
    with torch.no_grad(), LargestTensors() as tensors:
        taps = module(length)
    assert taps.shape == (1, 64, length)
    *others, largest = sorted(tensors.sizes)
    assert largest == taps.numel()
    assert max(others) <= 64 * 2048
    with LargestTensors() as tensors:
        module(length)
    assert max(tensors.sizes) == 64 * length


@pytest.mark.parametrize("gradients", [True, False])
def test_parameters_that_are_there_only_while_their_module_is_called_serve(gradients):
    module = make_filter(filter_num_layers=5)
    expected = {True: module(LONG).detach(), False: module.requires_grad_(False)(LONG)}[gradients]
    module.requires_grad_(gradients)
    calls = []
    for layer in (m for m in module.modules() if isinstance(m, FilterLinear)):
        held = dict(layer.named_parameters())

        def fetch(layer, _, held=held):
            calls.append(layer)
            for name, parameter in held.items():
                setattr(layer, name, torch.nn.Parameter(parameter.detach().clone(), gradients))

        def drop(layer, *_):
            for parameter in layer.parameters():
                parameter.data.fill_(float("nan"))

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(drop)
    assert torch.equal(module(LONG).detach(), expected)
    assert len(calls) == len(set(calls)) == 5


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("fields", [{}, {"frequency_sparsity": 0.5}])
def test_a_partial_filter_computes_only_the_taps_within_its_support(fields, gradients):
    module = make_filter(filter_length=48, max_position_embeddings=64, **fields)
    flops = []
    for length in (48, 5000):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            assert module(length).shape[-1] == length
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("fields", [{}, {"filter_length": 9}, {"frequency_sparsity": 0.25}])
def test_an_exported_filter_takes_any_length_and_is_real_where_frequencies_are_all_there(fields):
    class Taps(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner.exact_taps(x.shape[0] if self.inner.support is None else self.inner.support)

    module = make_filter(**fields).double().requires_grad_(False)
    sizes = {"x": {0: torch.export.Dim("length", min=2, max=200)}}
    program = torch.export.export(Taps(module), (torch.zeros(20),), dynamic_shapes=sizes)
    for length in (2, 33, 200):
        found = program.module()(torch.zeros(length))
        expected = module(length if module.support is None else module.support)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    values = [value for graph in graphs for node in graph.nodes for value in tree_leaves(node.meta.get("val"))]
    assert any(x.is_complex() for x in values if isinstance(x, torch.Tensor)) == ("frequency_sparsity" in fields)


# high frequencies


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("length", [1, 2, 7, 24, 101])
def test_removed_frequencies_are_those_of_a_masked_spectrum_cut_to_its_first_taps(length, sparsity):
    h = torch.randn(2, 3, length, dtype=torch.float64)
    mask = np.arange(length + 1) < length + 1 - min(round(sparsity * (length + 1)), length)
    expected = np.fft.irfft(mask * np.fft.rfft(h.numpy(), 2 * length), 2 * length)[..., :length]
    np.testing.assert_allclose(without_high_frequencies(h, sparsity), expected, rtol=0, atol=1e-13)
    found = without_high_frequencies(h.float(), sparsity)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(h.abs().max()))


def test_many_filters_are_low_passed_in_blocks_with_the_same_result(monkeypatch):
    h = torch.randn(3, 5, 40, dtype=torch.float64)
    expected = without_high_frequencies(h, 0.5)
    monkeypatch.setattr("hyena_hf.filters._FFT_BLOCK", 80)
    torch.testing.assert_close(without_high_frequencies(h, 0.5), expected, rtol=0, atol=1e-15)


def test_a_removed_band_of_frequencies_keeps_little_of_the_spectrum():
    # decays long before its end, where it is cut off
    h = torch.exp(-torch.arange(400) / 10.0) * torch.randn(8, 400)
    before, after = (
        torch.fft.rfft(x, 800)[:, 202:].abs().square().sum() for x in (h, without_high_frequencies(h, 0.5))
    )
    assert after < 0.2 * before


@pytest.mark.parametrize(
    ("kind", "fields", "support"),
    [
        (ImplicitFilter, {}, TRAINED),
        (ImplicitFilter, {"filter_length": 10, "order": 3}, 10),
        (ImplicitFilter, {"filter_length": TRAINED + 5}, TRAINED + 5),
        (ImplicitFilter, {"trainable_positional_features": True, "is_causal": False}, TRAINED),
        (ExplicitFilter, {"filter_length": 10, "is_causal": False}, 10),
        (ExplicitFilter, {"num_heads": 3}, TRAINED),
    ],
)
def test_every_filter_loses_its_high_frequencies_whatever_length_is_asked_for(kind, fields, support):
    sparse = make_filter(kind, frequency_sparsity=0.4, **fields).double()
    plain = make_filter(kind, **{"filter_length": support, **fields}).double()
    plain.load_state_dict(sparse.state_dict())
    assert sparse.support == support
    for reverse in (False, True)[: 1 if sparse.is_causal else 2]:
        expected = without_high_frequencies(plain(support, reverse=reverse), 0.4)
        assert (expected - plain(support, reverse=reverse)).abs().max() > 0.01
        for length in (1, 7, TRAINED, 3 * TRAINED)[: 3 if sparse.max_length else 4]:
            taps = sparse(length, reverse=reverse)
            inside = min(length, support)
            torch.testing.assert_close(taps[..., :inside], expected[..., :inside], rtol=0, atol=1e-12)
            assert taps.shape[-1] == length
            assert not taps[..., inside:].any()


@pytest.mark.parametrize("kind", [ImplicitFilter, ExplicitFilter])
def test_gradients_flow_through_the_low_pass(kind):
    module = make_filter(kind, frequency_sparsity=0.5, filter_length=12).double()
    module(20).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    h = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: without_high_frequencies(h, 0.5), h)


def test_a_model_without_high_frequencies_sees_no_later_token():
    model = HyenaForCausalLM(make_config(frequency_sparsity=0.5)).double().eval()
    ids = torch.randint(0, 8, (1, 3 * TRAINED))
    later = ids.clone()
    later[:, 30:] = (later[:, 30:] + 1) % 8
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :30], model(later).logits[:, :30], rtol=0, atol=1e-14)


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


@pytest.mark.parametrize("fields", [{}, {"modulation": False}, {"trainable_positional_features": True}])
def test_with_gradients_too_a_shorter_filter_is_a_bitwise_prefix(fields):
    module = make_filter(**fields, max_position_embeddings=256)
    whole = module(256)
    assert whole.requires_grad
    for length in (1, 7, 13, 16, 97, 250):
        assert torch.equal(module(length), whole[..., :length]), length
