"""The oracles agree with the published reference outputs and with facts that do not come from us.

Run: python -m pytest tests/test_oracles.py -q
"""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.special
import scipy.stats
import torch
import transformers

from tests import golden_reader, oracles


OPERATORS = [
    "standalone_op_order2_L64_D16",
    "standalone_op_order3_L64_D16",
    "safari_op_order2_L64_D16",
    "safari_op_order3_L64_D16",
]
VARIANTS = ["safari_op_variant_nomod", "safari_op_variant_shift05", "safari_op_variant_short5"]
FLOAT32 = 2e-5  # relative to max |y|: the float32 references deviate this much from float64
FLOAT32_TAPS = (
    5e-5  # sines of frequency 14 amplify float32 rounding: numpy in float32 is 3.8e-5 off there, as torch is
)


def randn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_near_float32(actual, reference, tolerance=FLOAT32):
    np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * np.abs(reference).max())


def assert_gradients_agree(golden, loss, tolerance):
    """Along one random direction per array, the slope of `loss` is what the published gradient says."""
    arrays = golden.state | golden.inputs
    for seed, (name, gradient) in enumerate(golden.grads.items()):
        direction = randn(*gradient.shape, seed=seed)
        slope = oracles.directional_derivative(
            lambda point, name=name: loss(arrays | {name: point}), arrays[name], direction
        )
        assert abs(slope - (gradient * direction).sum()) <= tolerance * np.linalg.norm(gradient), name


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_the_published_float64_outputs(name):
    golden = golden_reader.load_golden(name)
    y = oracles.hyena_operator(golden.inputs["x"], golden_reader.operator_params(golden))
    np.testing.assert_allclose(y, golden.outputs["y_float64"], rtol=0, atol=1e-10)
    assert_near_float32(y, golden.outputs["y"])


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_published_float32_outputs(name):
    golden = golden_reader.load_golden(name)
    y = oracles.hyena_operator(golden.inputs["x"], golden_reader.operator_params(golden))
    assert_near_float32(y, golden.outputs["y"])


@pytest.mark.parametrize("name", OPERATORS + VARIANTS)
def test_filters_agree_with_the_published_taps(name):
    golden = golden_reader.load_golden(name)
    taps = golden_reader.filter_taps(golden.state, "filter_fn.", golden.shift, golden.modulate)
    assert_near_float32(taps.T, golden.outputs["k"], FLOAT32_TAPS)


@pytest.mark.parametrize("name", OPERATORS[:2])
def test_shorter_inputs_use_a_prefix_of_the_filter(name):
    golden = golden_reader.load_golden(name)
    y = oracles.hyena_operator(golden.inputs["x_short"], golden_reader.operator_params(golden))
    assert_near_float32(y, golden.outputs["y_short"])


@pytest.mark.parametrize("name", OPERATORS[:2])
def test_longer_inputs_begin_like_the_published_truncated_output(name):
    golden = golden_reader.load_golden(name)
    y = oracles.hyena_operator(golden.inputs["x_long"], golden_reader.operator_params(golden))
    assert y.shape[1] == 71
    assert_near_float32(y[:, :64], golden.outputs["y_long"])


def test_the_two_channel_packings_are_different_operators_at_order_3():
    golden = golden_reader.load_golden("safari_op_order3_L64_D16")
    params = golden_reader.operator_params(golden)
    params["h"] = oracles.unpack_channels(np.concatenate(list(np.swapaxes(params["h"], 0, 1))), 3)
    error = np.abs(oracles.hyena_operator(golden.inputs["x"], params) - golden.outputs["y"]).max()
    assert error > 0.1 * np.abs(golden.outputs["y"]).max()


@pytest.mark.parametrize("name", OPERATORS + VARIANTS)
def test_every_gradient_of_the_operators_agrees_with_the_published_one(name):
    golden = golden_reader.load_golden(name)
    cotangent = np.linspace(-1, 1, golden.outputs["y"].size).reshape(golden.outputs["y"].shape)

    def loss(arrays):
        params = golden_reader.operator_params(golden, arrays)
        return (oracles.hyena_operator(arrays["x"], params) * cotangent).sum()

    assert len(golden.grads) >= 15
    # the rounding of the variants' taps moves all their gradients: see the next test
    assert_gradients_agree(golden, loss, 1e-4 if name in VARIANTS else FLOAT32)


@pytest.mark.parametrize("name", VARIANTS)
def test_given_the_published_float32_taps_all_other_gradients_of_the_variants_agree_closely(name):
    golden = golden_reader.load_golden(name)
    cotangent = np.linspace(-1, 1, golden.outputs["y"].size).reshape(golden.outputs["y"].shape)
    taps = {"h": golden.outputs["k"].T[None]}

    def loss(arrays):
        params = golden_reader.operator_params(golden, arrays) | taps
        return (oracles.hyena_operator(arrays["x"], params) * cotangent).sum()

    outside = {
        key: gradient for key, gradient in golden.grads.items() if "implicit" not in key and "pos_emb" not in key
    }
    assert_gradients_agree(dataclasses.replace(golden, grads=outside), loss, 1e-5)


def test_language_model_agrees_with_the_published_logits_hidden_states_and_loss():
    golden = golden_reader.load_golden("safari_simplelm_order2")
    params = golden_reader.language_model_params(golden)
    hidden = oracles.hidden_states(golden.inputs["input_ids"], params)
    scores = oracles.logits(hidden, params)
    np.testing.assert_allclose(scores, golden.outputs["logits_float64"], rtol=0, atol=1e-10)
    assert_near_float32(hidden, golden.outputs["hidden"])
    assert_near_float32(scores[:, :17], golden.outputs["logits_short17"])
    np.testing.assert_allclose(
        oracles.next_token_loss(scores, golden.inputs["input_ids"]), golden.outputs["loss"], rtol=2e-7
    )


def test_every_gradient_of_the_language_model_agrees_with_the_published_one():
    golden = golden_reader.load_golden("safari_simplelm_order2")

    def loss(arrays):
        params = golden_reader.language_model_params(golden, arrays)
        hidden = oracles.hidden_states(arrays["input_ids"], params)
        return oracles.next_token_loss(oracles.logits(hidden, params), arrays["input_ids"])

    assert len(golden.grads) == 49
    assert_gradients_agree(golden, loss, FLOAT32)


def test_hyenadna_backbone_agrees_up_to_its_float32_residual():
    golden = golden_reader.load_golden("hyenadna_standalone_backbone")
    hidden = oracles.hidden_states(golden.inputs["input_ids"], golden_reader.language_model_params(golden))
    np.testing.assert_allclose(hidden, golden.outputs["out_float64"], rtol=0, atol=1e-6)
    assert_near_float32(hidden, golden.outputs["out"])


def test_bidirectional_monarch_mixer_agrees_with_its_published_output_and_input_gradient():
    golden = golden_reader.load_golden("m2_mixer_bidir1_resid0")
    params = golden_reader.mixer_m2_params(golden)
    np.testing.assert_allclose(
        oracles.hyena_operator(golden.inputs["x"], params), golden.outputs["y_float64"], rtol=0, atol=1e-10
    )
    assert_near_float32(params["h_reverse"][0].T, golden.outputs["k_rev"])
    # this file's gradient is that of sum(y)
    assert_gradients_agree(golden, lambda arrays: oracles.hyena_operator(arrays["x"], params).sum(), FLOAT32)


@pytest.mark.parametrize("name", [*OPERATORS, *VARIANTS, "m2_mixer_bidir1_resid0"])
def test_positional_tables_and_decays_are_the_published_float32_values(name):
    golden = golden_reader.load_golden(name)
    z = golden.state["filter_fn.pos_emb.z"][0]
    length, num_bands = len(z), z.shape[1] // 2
    deltas = golden.state["filter_fn.modulation.deltas"].ravel()
    np.testing.assert_array_equal(oracles.filter_times(length), golden.state["filter_fn.pos_emb.t"].ravel())
    np.testing.assert_array_equal(oracles.decay_rates(len(deltas))[[0, -1]], deltas[[0, -1]])
    np.testing.assert_allclose(oracles.decay_rates(len(deltas)), deltas, rtol=1.2e-7)
    np.testing.assert_allclose(oracles.positional_features(length, num_bands), z, rtol=0, atol=6e-8)


def test_task_files_hold_the_published_layout_of_examples():
    golden = golden_reader.load_golden("task_assoc_recall_v20_l40")
    train, test = golden.outputs["train"], golden.outputs["test"]
    assert train.shape == (64, 2, 42)
    assert test.shape == (32, 2, 42)
    np.testing.assert_array_equal(train[:, 0, 1:], train[:, 1, :-1])
    assert (test[:, 1, :-1] == -100).all()
    assert (test[:, 1, -1] >= 0).all()
    assert list(golden.outputs["vocab"]) == sorted(golden.outputs["vocab"])
    assert (train[:, 0, -2] == list(golden.outputs["vocab"]).index("=>")).all()


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 5), (7, 3), (7, 7), (7, 20), (97, 64)])
def test_causal_conv_is_numpys_convolution_cut_to_the_input_with_shared_filters(length, taps):
    u, h, direct = randn(2, 6, length), randn(3, taps, seed=1), randn(3, seed=2)
    y = oracles.causal_conv(u, h, direct)
    for batch in range(2):
        for channel in range(6):
            expected = (
                np.convolve(u[batch, channel], h[channel // 2])[:length] + direct[channel // 2] * u[batch, channel]
            )
            np.testing.assert_allclose(y[batch, channel], expected, rtol=0, atol=1e-13)


def test_causal_conv_refuses_filters_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="5 channels cannot share 2 filters"):
        oracles.causal_conv(randn(5, 4), randn(2, 3))


@pytest.mark.parametrize(("length", "taps"), [(1, 3), (11, 4), (11, 30)])
def test_gated_conv_gradients_are_the_derivatives_of_the_gated_conv(length, taps):
    u, pregate, postgate, dy = (randn(2, 6, length, seed=seed) for seed in range(4))
    point = {"u": u, "h": randn(3, taps), "direct": randn(3), "pregate": pregate, "postgate": postgate}
    gradients = oracles.gated_causal_conv_gradients(**point, dy=dy)
    for name, value in point.items():
        direction = randn(*value.shape, seed=9)
        slope = oracles.directional_derivative(
            lambda x, name=name: (oracles.gated_causal_conv(**(point | {name: x})) * dy).sum(), value, direction
        )
        np.testing.assert_allclose((gradients[name] * direction).sum(), slope, rtol=1e-11, err_msg=name)


def test_conv_gradients_without_a_direct_path_leave_it_out():
    u, h, dy = randn(2, 4, 9), randn(4, 9, seed=1), randn(2, 4, 9, seed=2)
    du, dh, ddirect = oracles.causal_conv_gradients(u, h, None, dy)
    np.testing.assert_allclose(du, scipy.signal.fftconvolve(dy[..., ::-1], h[None], axes=-1)[..., 8::-1], atol=1e-13)
    np.testing.assert_allclose((dh * h).sum(), (oracles.causal_conv(u, h) * dy).sum(), rtol=1e-12)
    assert ddirect is None


def test_complex_step_differentiates_exactly():
    slope = oracles.directional_derivative(lambda x: np.sin(x) ** 3, np.array(0.7), np.array(2.0))
    np.testing.assert_allclose(slope, 6 * np.sin(0.7) ** 2 * np.cos(0.7), rtol=1e-15)


def test_bidirectional_conv_is_a_toeplitz_matrix_with_the_reverse_filter_from_lag_one():
    v, h, h_reverse = randn(1, 13), randn(1, 20, seed=1), randn(1, 20, seed=2)
    matrix = scipy.linalg.toeplitz(h[0, :13], np.concatenate([h[0, :1], h_reverse[0, :12]]))
    np.testing.assert_allclose(oracles.bidirectional_conv(v, h, h_reverse)[0], matrix @ v[0], atol=1e-13)


@pytest.mark.parametrize("taps", [1, 3, 5])
def test_short_conv_is_a_moving_average_filter_whose_last_tap_is_now(taps):
    x, weight, bias = randn(2, 11, 4), randn(4, 1, taps, seed=1), randn(4, seed=2)
    y = oracles.short_conv(x, weight, bias)
    for channel in range(4):
        expected = scipy.signal.lfilter(weight[channel, 0, ::-1], 1.0, x[..., channel]) + bias[channel]
        np.testing.assert_allclose(y[..., channel], expected, atol=1e-13)


@pytest.mark.parametrize(("trained", "num_bands"), [(64, 2), (65, 16), (130, 1)])
def test_positional_features_beyond_the_trained_length_continue_the_formula(trained, num_bands):
    z = oracles.positional_features(trained, num_bands, 5 * trained)
    n, bands = (
        np.arange(5 * trained)[:, None],
        np.linspace(1e-4, num_bands - 1, num_bands) if num_bands > 1 else [1e-4],
    )
    angles = 2 * np.pi * n * bands / trained
    np.testing.assert_allclose(z[:, 0], n[:, 0] / (trained - 1), rtol=2e-7)
    np.testing.assert_allclose(z[:, 1 : num_bands + 1], np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(z[:, num_bands + 1 :], -np.sin(angles), atol=1e-4)
    np.testing.assert_array_equal(z[:trained], oracles.positional_features(trained, num_bands))


def test_a_single_trained_position_cannot_be_continued():
    assert oracles.filter_times(1).tolist() == [0.0]
    with pytest.raises(ValueError, match="one point has no step"):
        oracles.filter_times(1, 2)


def test_modulation_multiplies_by_a_decaying_window_plus_the_shift():
    features, times = oracles.positional_features(33, 2, 50), oracles.filter_times(33, 50)
    linears = [{"weight": randn(8, 5), "bias": randn(8)}, {"weight": randn(3, 8, seed=1)}]
    decays = oracles.decay_rates(3)
    plain = oracles.implicit_filter(features, linears, np.full(8, 10.0))
    windowed = oracles.implicit_filter(features, linears, np.full(8, 10.0), times, decays, 0.05)
    assert plain.shape == (3, 50)
    np.testing.assert_allclose(
        plain[:, 4], linears[1]["weight"] @ np.sin(10 * (linears[0]["weight"] @ features[4] + linears[0]["bias"]))
    )
    np.testing.assert_allclose(windowed / plain, np.exp(np.outer(decays, times)) + 0.05, rtol=1e-9)
    np.testing.assert_allclose(
        np.exp(decays * [1.5, 1.5 / 3 * 1, 0.3]), [0.01, np.exp(decays[1] / 2), 0.01], rtol=1e-6
    )


def hyena_params(width, order, num_heads, length, seed=0):
    def dense(outputs, inputs, seed):
        return {"weight": randn(outputs, inputs, seed=seed) / np.sqrt(inputs), "bias": randn(outputs, seed=seed + 1)}

    return {
        "in_proj": dense((order + 1) * width, width, seed),
        "short_conv": {
            "weight": randn((order + 1) * width, 3, seed=seed + 2),
            "bias": randn((order + 1) * width, seed=seed + 3),
        },
        "h": randn(order - 1, num_heads, length, seed=seed + 4),
        "skip": randn(order - 1, num_heads, seed=seed + 5),
        "out_proj": dense(width, width, seed + 6),
    }


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_operator_is_the_product_of_diagonal_and_toeplitz_matrices(order):
    length, width = 12, 3
    u, params = randn(length, width), hyena_params(width, order, width, length)
    projected = oracles.short_conv(oracles.linear(u, params["in_proj"]), **params["short_conv"])
    gates_and_value = projected.reshape(length, order + 1, width)
    mixed = np.empty((length, width))
    for d in range(width):
        matrix = np.eye(length)
        for step in range(order - 1):
            toeplitz = scipy.linalg.toeplitz(params["h"][step, d], np.zeros(length)) + params["skip"][
                step, d
            ] * np.eye(length)
            matrix = toeplitz @ np.diag(gates_and_value[:, order - 1 - step, d]) @ matrix
        mixed[:, d] = np.diag(gates_and_value[:, 0, d]) @ matrix @ gates_and_value[:, order, d]
    np.testing.assert_allclose(
        oracles.hyena_operator(u, params), oracles.linear(mixed, params["out_proj"]), atol=1e-10
    )


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_heads_are_unnormalised_attention_weighted_by_the_filter(num_heads):
    q, k, v = (randn(8, 19, seed=seed) for seed in range(3))
    h, skip = randn(num_heads, 19, seed=3), randn(num_heads, seed=4)
    y = oracles.multihyena_core(q, k, v, h, skip).reshape(num_heads, -1, 19)
    q, k, v = (x.reshape(num_heads, -1, 19) for x in (q, k, v))
    for head in range(num_heads):
        weights = scipy.linalg.toeplitz(h[head], np.zeros(19)) + skip[head] * np.eye(19)
        np.testing.assert_allclose(y[head], v[head] @ (weights * (q[head].T @ k[head])).T, atol=1e-11)


def test_as_many_heads_as_channels_are_the_plain_operator():
    u, params = randn(2, 15, 6), hyena_params(6, 2, 6, 15)
    projected = oracles.short_conv(oracles.linear(u, params["in_proj"]), **params["short_conv"])
    q, k, v = np.split(np.swapaxes(projected, -1, -2), 3, axis=-2)
    heads = np.swapaxes(oracles.multihyena_core(q, k, v, params["h"][0], params["skip"][0]), -1, -2)
    np.testing.assert_allclose(
        oracles.linear(heads, params["out_proj"]), oracles.hyena_operator(u, params), atol=1e-11
    )


def test_operator_with_fewer_heads_than_channels_runs_at_order_2_only():
    params = hyena_params(6, 2, 3, 15)
    shared = params | {"h": np.repeat(params["h"], 2, axis=1), "skip": np.repeat(params["skip"], 2, axis=1)}
    u = randn(2, 15, 6)
    assert np.abs(oracles.hyena_operator(u, params) - oracles.hyena_operator(u, shared)).max() > 0.1
    with pytest.raises(ValueError, match="order 2 only"):
        oracles.hyena_operator(u, hyena_params(6, 3, 3, 15))


def test_attention_over_equal_keys_is_the_mean_of_what_the_window_shows():
    q, k, v = randn(4, 9, 2), np.zeros((2, 9, 2)), randn(2, 9, 2, seed=2)
    running = np.cumsum(v, axis=1) / np.arange(1, 10)[:, None]
    np.testing.assert_allclose(oracles.attention(q, k, v), np.repeat(running, 2, axis=0), atol=1e-14)
    last3 = np.stack([v[:, max(0, t - 2) : t + 1].mean(1) for t in range(9)], axis=1)
    np.testing.assert_allclose(oracles.attention(q, k, v, window=3), np.repeat(last3, 2, axis=0), atol=1e-14)
    everything = np.broadcast_to(v.mean(1, keepdims=True), v.shape)
    np.testing.assert_allclose(oracles.attention(q, k, v, causal=False), np.repeat(everything, 2, axis=0), atol=1e-14)


def test_rotary_positions_turn_pairs_so_that_scores_depend_on_the_lag_only():
    q, k = randn(1, 8), randn(1, 8, seed=1)
    cos, sin = oracles.rotary_tables(np.array([5, 2, 905, 902]), 8)
    scores = oracles.rotate(np.repeat(q, 4, 0), cos, sin) @ oracles.rotate(np.repeat(k, 4, 0), cos, sin).T
    np.testing.assert_allclose(scores[0, 1], scores[2, 3], rtol=1e-10)
    turned = (q[0, :4] + 1j * q[0, 4:]) * np.exp(1j * 5 * 10000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(oracles.rotate(q, cos[:1], sin[:1])[0], np.r_[turned.real, turned.imag], atol=1e-13)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_attention_language_model_agrees_with_transformers(family):
    window = {"sliding_window": 5} if family == "Mistral" else {}
    sizes = dict(vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{family}Config")(
        **sizes, **window, num_key_value_heads=2, rms_norm_eps=1e-4, initializer_range=0.5, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    ids = torch.randint(17, (2, 23))
    with torch.no_grad():
        expected = model(ids, labels=ids, use_cache=False)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = llama_params(state, window.get("sliding_window"))
    scores = oracles.logits(oracles.hidden_states(ids, params, "rms", 1e-4, "silu"), params)
    # transformers computes norms, softmax and angles in float32 whatever the dtype
    np.testing.assert_allclose(scores, expected.logits.numpy(), atol=2e-5)
    np.testing.assert_allclose(oracles.next_token_loss(scores, ids), expected.loss.item(), rtol=1e-5)


def llama_params(state, window):
    def layer(prefix):
        attention = {f"{name}_proj": {"weight": state[f"{prefix}self_attn.{name}_proj.weight"]} for name in "qkvo"}
        return {
            "norm1": {"weight": state[f"{prefix}input_layernorm.weight"]},
            "mixer": attention | {"num_heads": 4, "num_key_value_heads": 2, "window": window},
            "norm2": {"weight": state[f"{prefix}post_attention_layernorm.weight"]},
            "mlp": {name: {"weight": state[f"{prefix}mlp.{name}_proj.weight"]} for name in ("gate", "up", "down")},
        }

    return {
        "embedding": state["model.embed_tokens.weight"],
        "layers": [layer(f"model.layers.{index}.") for index in range(2)],
        "final_norm": {"weight": state["model.norm.weight"]},
        "lm_head": state["lm_head.weight"],
    }


def test_layer_norm_standardises_and_rms_norm_scales():
    x, weight, bias = randn(5, 31) * 3 + 2, randn(31, seed=1), randn(31, seed=2)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(oracles.layer_norm(x, weight, bias, eps=1e-3), expected * weight + bias, atol=1e-13)
    rms = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(31)
    np.testing.assert_allclose(oracles.rms_norm(x, weight, eps=0.0), x / rms * weight, atol=1e-13)
    with pytest.raises(ValueError, match="expected 'layer', 'rms' or 'rms_outer'"):
        oracles.norm(x, {"weight": weight}, "batch")


def test_activations_are_x_times_a_distribution_function():
    x = np.linspace(-800, 800, 4001)
    np.testing.assert_allclose(oracles.gelu(x), x * scipy.stats.norm.cdf(x), atol=1e-12)
    np.testing.assert_allclose(oracles.silu(x), x * scipy.special.expit(x), atol=1e-12)
    np.testing.assert_allclose(oracles.gelu_tanh(x), oracles.gelu(x), atol=5e-4)
    x = np.linspace(-4, 4, 81)
    assert 1e-4 < np.abs(oracles.gelu_tanh(x) - oracles.gelu(x)).max() < 5e-4


def test_next_token_loss_of_equal_scores_is_log_vocabulary_and_skips_ignored_labels():
    labels = np.array([[3, 1, -100, 2], [0, -100, -100, 4]])
    np.testing.assert_allclose(oracles.next_token_loss(np.zeros((2, 4, 7)), labels), np.log(7), rtol=1e-14)
    scores = randn(2, 4, 7) * 50
    log_probabilities = scipy.special.log_softmax(scores, axis=-1)
    expected = -np.mean([log_probabilities[0, 0, 1], log_probabilities[0, 2, 2], log_probabilities[1, 2, 4]])
    np.testing.assert_allclose(oracles.next_token_loss(scores, labels), expected, rtol=1e-12)
