"""Our modules reproduce what the published references computed, from the published parameters.

Run: python -m pytest tests/test_golden_model.py -q

`to_ours` translates published parameter names and channel packing into ours, for parameters and gradients alike. The
files and their precision are described in tests/golden/README.md.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyena_hf import HyenaConfig, HyenaForCausalLM, HyenaModel
from hyena_hf.filters import decay_rates, filter_times, positional_features
from hyena_hf.mixers import HyenaMixer
from tests import golden_reader, oracles


STANDALONE = ["standalone_op_order2_L64_D16", "standalone_op_order3_L64_D16"]
OPERATORS = [*STANDALONE, "safari_op_order2_L64_D16", "safari_op_order3_L64_D16"]
VARIANTS = ["safari_op_variant_nomod", "safari_op_variant_shift05", "safari_op_variant_short5"]
BACKBONE = "hyenadna_standalone_backbone"
LANGUAGE_MODEL = "safari_simplelm_order2"
FLOAT32 = 2e-5  # relative to the maximum: the float32 references deviate this much from float64
# float32 rounding of the sines of frequency 14, in the reference itself: its gradients are 7.8e-5 of their maximum off
FLOAT32_VARIANT_GRADIENTS = 1e-4

RENAMED = {
    "backbone.embeddings.word_embeddings": "model.embed_tokens",
    "backbone.layers": "model.layers",
    "backbone.ln_f": "model.norm",
    "norm1": "mixer_norm",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "short_filter": "short_conv",
    "filter_fn.bias": "skip",
    "filter_fn.modulation.deltas": "filter.decay_rates",
    "filter_fn.pos_emb.z": "filter.features",
    "filter_fn.implicit_filter.0": "filter.layers.0",
    "filter_fn.implicit_filter.2": "filter.layers.1",
    "filter_fn.implicit_filter.4": "filter.layers.2",
    "filter_fn.implicit_filter.6": "filter.output",
    "filter_fn.implicit_filter.1.freq": "filter.frequency",
}
PACKED = ("skip", "filter.decay_rates", "filter.output.weight")


def to_ours(arrays, module, order=2, channel_major=False):
    """Published arrays under our names and in the shapes of `module`, those that it has."""
    ours = {}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, array in arrays.items():
        for published, own in RENAMED.items():
            name = name.replace(published, own)
        if isinstance(module, HyenaModel):
            name = name.removeprefix("model.")
        if name not in shapes:
            continue
        array = np.asarray(array)
        if name.endswith(PACKED):
            rows = array if name.endswith("output.weight") else array.ravel()
            array = oracles.unpack_channels(rows, order, channel_major)
        ours[name] = torch.from_numpy(np.ascontiguousarray(array)).view(shapes[name])
    return ours


def make_config(sizes, **fields):
    """Our config from the published constructor arguments."""
    sizes = sizes | sizes.get("layer", {})
    vocab_size, multiple = sizes.get("vocab_size", 8), sizes.get("pad_vocab_size_multiple", 8)
    return HyenaConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes.get("n_layer", 1),
        intermediate_size=sizes.get("d_inner", 64),
        max_position_embeddings=sizes["l_max"] if "l_max" in sizes else sizes["max_seq_len"],
        order=sizes.get("order", 2),
        filter_hidden_size=sizes["filter_order"],
        filter_num_layers=sizes.get("num_inner_mlps", 2) + 2,
        filter_num_bands=(sizes["emb_dim"] - 1) // 2,
        sine_frequency=sizes["w"] if "w" in sizes else sizes["activation_freq"],
        modulation=sizes.get("modulate", True),
        modulation_shift=sizes.get("shift", 0.0),
        short_conv_kernel=sizes.get("short_filter_order", 3),
        residual_in_fp32=sizes.get("residual_in_fp32", False),
        **fields,
    )


def load(golden, kind):
    """A module of ours with the parameters of a golden file, in evaluation mode."""
    trained = any(name.endswith("pos_emb.z") for name in golden.grads)
    config = make_config(golden.meta, trainable_positional_features=trained)
    module = HyenaMixer(config, 0) if kind is HyenaMixer else kind(config)
    module.load_state_dict(to_ours(golden.state, module, golden.order, golden.channel_major))
    return module.eval()


def assert_near(actual, reference, relative=FLOAT32, absolute=0.0):
    """Differences are at most `relative` times the reference's maximum plus `absolute`."""
    reference = np.asarray(reference)
    actual = actual.detach().numpy()
    assert actual.dtype == reference.dtype
    assert actual.shape == reference.shape
    np.testing.assert_allclose(actual, reference, rtol=0, atol=relative * np.abs(reference).max() + absolute)


def cotangent_of(y):
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)


def assert_published_gradients(module, golden, tolerance):
    expected = to_ours(golden.grads, module, golden.order, golden.channel_major)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= tolerance * expected[name].abs().max(), name


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_the_published_outputs_in_float64(name):
    golden = golden_reader.load_golden(name)
    mixer = load(golden, HyenaMixer).double()
    y = mixer(torch.from_numpy(golden.inputs["x"]).double())
    assert_near(y, golden.outputs["y_float64"], relative=0, absolute=1e-10)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_oracle_in_float64(name):
    golden = golden_reader.load_golden(name)
    mixer = load(golden, HyenaMixer).double()
    y = mixer(torch.from_numpy(golden.inputs["x"]).double())
    expected = oracles.hyena_operator(golden.inputs["x"], golden_reader.operator_params(golden))
    assert_near(y, expected, relative=0, absolute=1e-10)


@pytest.mark.parametrize("name", OPERATORS + VARIANTS)
def test_operators_and_variants_agree_with_the_published_outputs_in_float32(name):
    golden = golden_reader.load_golden(name)
    y = load(golden, HyenaMixer)(torch.from_numpy(golden.inputs["x"]))
    assert_near(y, golden.outputs["y"])


@pytest.mark.parametrize("name", OPERATORS + VARIANTS)
def test_every_gradient_of_the_operators_agrees_with_the_published_one(name):
    golden = golden_reader.load_golden(name)
    tolerance = FLOAT32_VARIANT_GRADIENTS if name in VARIANTS else FLOAT32
    mixer = load(golden, HyenaMixer)
    x = torch.from_numpy(golden.inputs["x"]).requires_grad_()
    y = mixer(x)
    (y * cotangent_of(y)).sum().backward()
    assert_near(x.grad, golden.grads["x"], tolerance)
    assert_published_gradients(mixer, golden, tolerance)


@pytest.mark.parametrize("name", ["safari_op_order3_L64_D16", *VARIANTS])
def test_in_float64_the_slope_along_any_direction_is_the_one_of_the_oracle(name):
    golden = golden_reader.load_golden(name)
    mixer = load(golden, HyenaMixer).double()
    y = mixer(torch.from_numpy(golden.inputs["x"]).double())
    (y * cotangent_of(y)).sum().backward()
    for seed, (key, published) in enumerate(golden.grads.items()):
        if key == "x":
            continue
        direction = np.random.default_rng(seed).standard_normal(published.shape)

        def loss(point, key=key):
            params = golden_reader.operator_params(golden, golden.state | {key: point})
            output = oracles.hyena_operator(golden.inputs["x"], params)
            return (output * cotangent_of(y).numpy()).sum()

        slope = oracles.directional_derivative(loss, golden.state[key], direction)
        ((own, along),) = to_ours({key: direction}, mixer, golden.order, golden.channel_major).items()
        gradient = mixer.get_parameter(own).grad
        assert abs((gradient * along).sum() - slope) <= 1e-10 * gradient.norm() * along.norm(), key


@pytest.mark.parametrize("name", STANDALONE)
def test_shorter_inputs_use_a_prefix_of_the_filter(name):
    golden = golden_reader.load_golden(name)
    y = load(golden, HyenaMixer)(torch.from_numpy(golden.inputs["x_short"]))
    assert_near(y, golden.outputs["y_short"])


@pytest.mark.parametrize("name", STANDALONE)
def test_longer_inputs_keep_their_length_and_begin_like_the_published_truncated_output(name):
    golden = golden_reader.load_golden(name)
    x = torch.from_numpy(golden.inputs["x_long"])
    y = load(golden, HyenaMixer)(x)
    assert y.shape == x.shape == (2, 71, 16)
    assert_near(y[:, :64], golden.outputs["y_long"])


def test_the_wrong_channel_packing_is_noticed_at_order_3():
    golden = golden_reader.load_golden("safari_op_order3_L64_D16")
    mixer = load(golden, HyenaMixer)
    mixer.load_state_dict(to_ours(golden.state, mixer, order=3, channel_major=False))
    error = np.abs(mixer(torch.from_numpy(golden.inputs["x"])).detach().numpy() - golden.outputs["y"]).max()
    assert error > 0.1 * np.abs(golden.outputs["y"]).max()


@pytest.mark.parametrize("name", OPERATORS + VARIANTS)
def test_regenerated_features_times_and_decays_are_the_published_ones_bit_for_bit(name):
    golden = golden_reader.load_golden(name)
    published = golden.state["filter_fn.pos_emb.z"][0]
    length, num_bands = len(published), published.shape[1] // 2
    features = positional_features(length, length, num_bands)
    rates = decay_rates(make_config(golden.meta))
    np.testing.assert_array_equal(features, published)
    np.testing.assert_array_equal(filter_times(length, length), golden.state["filter_fn.pos_emb.t"].ravel())
    np.testing.assert_array_equal(rates.ravel(), golden.state["filter_fn.modulation.deltas"].ravel())


def test_the_language_model_agrees_with_the_published_logits_in_float64():
    golden = golden_reader.load_golden(LANGUAGE_MODEL)
    model = load(golden, HyenaForCausalLM).double()
    logits = model(torch.from_numpy(golden.inputs["input_ids"])).logits
    assert_near(logits, golden.outputs["logits_float64"], relative=0, absolute=1e-10)


def test_the_language_model_agrees_with_the_published_logits_hidden_states_and_loss_in_float32():
    golden = golden_reader.load_golden(LANGUAGE_MODEL)
    model = load(golden, HyenaForCausalLM)
    ids = torch.from_numpy(golden.inputs["input_ids"])
    output = model(ids, labels=ids)
    assert_near(output.logits, golden.outputs["logits"])
    assert_near(model.model(ids).last_hidden_state, golden.outputs["hidden"])
    assert_near(model(ids[:, :17]).logits, golden.outputs["logits_short17"])
    assert_near(output.loss, golden.outputs["loss"], relative=1e-6)


def test_every_gradient_of_the_language_model_agrees_with_the_published_one():
    golden = golden_reader.load_golden(LANGUAGE_MODEL)
    model = load(golden, HyenaForCausalLM)
    ids = torch.from_numpy(golden.inputs["input_ids"])
    model(ids, labels=ids).loss.backward()
    assert len(golden.grads) == 49
    assert_published_gradients(model, golden, FLOAT32)


def test_the_hyenadna_backbone_agrees_up_to_its_float32_residual():
    golden = golden_reader.load_golden(BACKBONE)
    model = load(golden, HyenaModel)
    ids = torch.from_numpy(golden.inputs["input_ids"])
    assert model.config.residual_in_fp32
    assert_near(model(ids).last_hidden_state, golden.outputs["out"])
    assert_near(model.double()(ids).last_hidden_state, golden.outputs["out_float64"], relative=0, absolute=1e-6)


def read_checkpoint(name):
    """State dict with safari's names, and the constructor arguments, of a tiny checkpoint in a published layout."""
    folder = golden_reader.GOLDEN / "checkpoints" / name
    if name == "safari-lm":
        state = torch.load(folder / "hyena_tiny.ckpt", weights_only=True)  # noqa: TID251
        return state, json.loads((folder / "model_config.json").read_text())
    sizes = json.loads((folder / "config.json").read_text()) | {"shift": 0.05}
    if name == "hf":
        state = load_file(folder / "model.safetensors")
        return {key.removeprefix("hyena."): tensor for key, tensor in state.items()}, sizes
    state = torch.load(folder / "weights.ckpt", weights_only=True)["state_dict"]  # noqa: TID251
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}, sizes


@pytest.mark.parametrize("name", ["safari-lm", "longsafari-seqlen", "hf"])
def test_tiny_checkpoints_in_published_layouts_give_the_published_hidden_states_and_logits(name):
    state, sizes = read_checkpoint(name)
    model = HyenaForCausalLM(make_config(sizes, tie_word_embeddings=name == "safari-lm")).eval()
    model.load_state_dict(to_ours(state, model))
    expected = np.load(golden_reader.GOLDEN / "checkpoints" / name / "expected.npz")
    ids = torch.from_numpy(expected["input_ids"])
    assert_near(model.model(ids).last_hidden_state, expected["hidden"], relative=0, absolute=1e-5)
    assert_near(model(ids).logits, expected["logits"], relative=0, absolute=1e-5)


def randomise(module, scale=0.3):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=scale)


def oracle_params(mixer, length):
    """Arguments of `oracles.hyena_operator`; the filters are those of the module, tested in test_filters.py."""
    state = {name: tensor.numpy() for name, tensor in mixer.state_dict().items()}
    return {
        "in_proj": golden_reader.linear_params(state, "in_proj"),
        "short_conv": golden_reader.linear_params(state, "short_conv"),
        "h": mixer.filter(length).detach().numpy(),
        "skip": state["skip"],
        "out_proj": golden_reader.linear_params(state, "out_proj"),
    }


@pytest.mark.parametrize("length", [1, 2, 13, 80])
@pytest.mark.parametrize(
    "fields",
    [
        {"order": 4},
        {"order": 5, "filter_types": ["explicit"], "filter_length": 6},
        {"num_heads": 1},
        {"num_heads": 4, "use_bias": False},
        {"num_heads": 2, "short_conv_kernel": 1, "filter_types": ["explicit"]},
        {"short_conv_kernel": 7, "filter_length": 5, "use_bias": False},
    ],
    ids=lambda fields: "-".join(f"{key}={value}" for key, value in fields.items()),
)
def test_other_orders_heads_and_filters_agree_with_the_oracle_in_float64(fields, length):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "filter_hidden_size": 8, "max_position_embeddings": 16}
    mixer = HyenaMixer(HyenaConfig(**small, **fields), 0).double()
    randomise(mixer)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    expected = oracles.hyena_operator(x.numpy(), oracle_params(mixer, length))
    assert_near(mixer(x), expected, relative=1e-12)
