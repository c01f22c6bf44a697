"""Bidirectional models: equal to their formulas and to published outputs, and exact in any batch.

Run: python -m pytest tests/test_bidirectional.py -q

The truth of the batching tests is the sequence alone, without padding. Bounds are relative to max(1, largest value):
1e-10 in float64; in float32 1e-5, or the sequence's own error against float64 if that is more.
"""

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from hyena_hf import HyenaConfig, HyenaForCausalLM, HyenaForMaskedLM, HyenaModel
from hyena_hf.filters import ExplicitFilter, ImplicitFilter, positional_features
from hyena_hf.mixers import HyenaMixer
from hyena_hf.ops import bidirectional_fftconv
from tests import golden_reader, oracles
from tests.models import FULL, HEDGEHOG, HYENA, SLIDING, config_of, linear_attention, new_model, tokens


NAMES = ("u", "h", "h_reverse", "direct", "pregate", "postgate")
SIZES = [  # B, C, H, L, K, K'
    *[(2, 4, 4, length, length, length) for length in (1, 2, 3, 64, 127, 1000)],
    (2, 4, 4, 127, 5, 300),
    (2, 4, 2, 127, 300, 1),
    (1, 6, 1, 64, 40, 63),
    (3, 6, 3, 3, 9, 9),
]
MODELS = {
    "order 2": {},
    "order 3": {"order": 3},
    "order 4, gated": {"order": 4, "gated_mlp": True, "norm_type": "rms_norm", "use_bias": False},
    "explicit": {"filter_types": ["explicit"] * 3, "filter_length": [5, 300, 16]},
    "hybrid": {
        "layer_types": [SLIDING, HYENA, FULL],
        "sliding_window": 6,
        "filter_types": ["implicit", "explicit", "implicit"],
        "filter_length": 9,
    },
    "trained features": {"trainable_positional_features": True, "tie_word_embeddings": False},
    "partial": {"modulation": False, "filter_length": 11, "residual_in_fp32": True, "num_hidden_layers": 2},
    "hedgehog": {"layer_types": [HEDGEHOG, HYENA, HEDGEHOG]},
    "hedgehog window": {
        "layer_types": [HEDGEHOG, FULL, HEDGEHOG],
        "feature_map": "hedgehog_softmax",
        "linear_attention_window": 4,
    },
    "cosformer": {"layer_types": [HEDGEHOG] * 3, "feature_map": "cosformer"},
    "monarch mixer": {
        "block_type": "monarch_mixer_norm",
        "residual_conv": True,
        "learned_positions": True,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "gated_mlp": True,
        "mlp_blocks": 4,
        "mlp_bias": ["down_proj"],
        "lm_head_transform": True,
        "norm_eps": 1e-12,
        "filter_types": ["implicit", "explicit", "implicit"],
    },
}
LENGTHS = (45, 12, 28, 6, 7)

every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


# the operator


def make_inputs(batch, channels, filters, length, taps, reverse_taps, dtype=torch.float64):
    signal = batch, channels, length
    shapes = signal, (filters, taps), (filters, reverse_taps), (filters,), signal, signal
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(u, h, h_reverse, direct, pregate, postgate):
    return bidirectional_fftconv(u, h, h_reverse, direct, pregate=pregate, postgate=postgate)


def oracle_conv(u, h, h_reverse, direct, pregate, postgate):
    return postgate * oracles.bidirectional_conv(pregate * oracles.exact(u), h, h_reverse, direct)


def arrays_of(inputs):
    return [tensor.detach().double().numpy() for tensor in inputs]


def naive(u, h, h_reverse, direct, pregate, postgate):
    """The obvious version: one convolution forwards, one backwards on the reversed signal."""
    w, groups, n = pregate * u, u.shape[1] // h.shape[0], 2 * max(u.shape[-1], h.shape[-1], h_reverse.shape[-1])
    h, h_reverse, direct = (x.repeat_interleave(groups, dim=0) for x in (h, h_reverse, direct))

    def conv(x, taps):
        return torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(taps, n=n), n=n)[..., : u.shape[-1]]

    later = conv(w.flip(-1), h_reverse).flip(-1)
    return postgate * (conv(w, h) + nn.functional.pad(later[..., 1:], (0, 1)) + direct[:, None] * w)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_operator_equals_its_oracle_in_float64(sizes):
    inputs = make_inputs(*sizes)
    expected = oracle_conv(*arrays_of(inputs))
    np.testing.assert_allclose(run(*inputs).detach(), expected, rtol=0, atol=1e-12 * max(1, abs(expected).max()))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_its_gradients_are_the_derivatives_of_the_oracle(sizes):
    inputs = make_inputs(*sizes)
    y = run(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    gradients = torch.autograd.grad(y, inputs, cotangent)
    arrays = arrays_of(inputs)
    for place, gradient in enumerate(gradients):
        direction = np.random.default_rng(place).standard_normal(gradient.shape)

        def along(x, place=place):
            return (oracle_conv(*arrays[:place], x, *arrays[place + 1 :]) * cotangent.numpy()).sum()

        expected = oracles.directional_derivative(along, arrays[place], direction)
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs((gradient.numpy() * direction).sum() - expected) <= 1e-12 * max(1, scale), NAMES[place]


@pytest.mark.parametrize("sizes", [(2, 4, 4, 1, 1, 1), (1, 4, 2, 5, 3, 9), (2, 2, 1, 7, 9, 2)], ids=str)
def test_it_passes_gradcheck(sizes):
    assert torch.autograd.gradcheck(run, make_inputs(*sizes))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_its_float32_error_is_at_most_twice_that_of_two_plain_convolutions(sizes):
    inputs = make_inputs(*sizes, dtype=torch.float32)
    expected = oracle_conv(*arrays_of(inputs))
    ours, plain = (np.linalg.norm(f(*inputs).detach().numpy() - expected) for f in (run, naive))
    assert ours <= max(2 * plain, 2e-7 * np.linalg.norm(expected))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_half_precision_inputs_are_rounded_only_at_the_end(dtype, limit):
    inputs = make_inputs(2, 4, 2, 127, 127, 127, dtype=dtype)
    y, expected = run(*inputs), oracle_conv(*arrays_of(inputs))
    assert y.dtype == dtype
    assert np.linalg.norm(y.detach().double().numpy() - expected) <= limit * np.linalg.norm(expected)


def test_every_argument_but_u_and_the_filters_may_be_left_out():
    u, h, h_reverse, *_ = make_inputs(2, 4, 2, 33, 33, 33)
    expected = oracles.bidirectional_conv(*arrays_of([u, h, h_reverse]))
    np.testing.assert_allclose(bidirectional_fftconv(u, h, h_reverse).detach(), expected, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused():
    u, h, h_reverse, *_ = make_inputs(1, 2, 2, 8, 8, 8)
    y = bidirectional_fftconv(u, h, h_reverse).square().sum()
    with pytest.raises(RuntimeError, match="a long convolution is differentiable once"):
        torch.autograd.grad(y, u, create_graph=True)


BAD = [
    ({"h_reverse": torch.ones(3, 5)}, ValueError, r"h_reverse must have shape \(2, K'\).*\(3, 5\)"),
    ({"h_reverse": torch.ones(2, 0)}, ValueError, "at least 1"),
    ({"h_reverse": torch.ones(2, 5, dtype=torch.complex64)}, TypeError, "bidirectional_fftconv.*h_reverse.*complex"),
    ({"h_reverse": torch.ones(2, 5, device="meta")}, ValueError, "h_reverse lies on meta"),
    ({"h": torch.ones(3, 5)}, ValueError, r"channels of u \(4\).*\(3\)"),
    ({"u": torch.ones(4, 9)}, ValueError, r"expected u \(B, C, L\)"),
    ({"direct": torch.ones(4)}, ValueError, r"direct must have shape \(2,\)"),
    ({"pregate": torch.ones(1, 4, 8)}, ValueError, "pregate must have the shape of u"),
    ({"backend": "triton"}, ValueError, "the backend 'triton' cannot serve .*: it convolves causally"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_tensors_that_do_not_fit_are_refused(changes, error, message):
    good = {"u": torch.ones(1, 4, 9), "h": torch.ones(2, 5), "h_reverse": torch.ones(2, 5)}
    with pytest.raises(error, match=message):
        bidirectional_fftconv(**{**good, **changes})


# Monarch Mixer

PUBLISHED = {
    "in_linear": "in_proj",
    "short_filter": "short_conv",
    "out_linear": "out_proj",
    "filter_fn.bias": "skip",
    "filter_fn.modulation.deltas": "filter.decay_rates",
    "filter_fn.pos_emb.z": "filter.features",
    "filter_fn.implicit_filter.1.freq": "filter.frequency",
    **{f"filter_fn.implicit_filter.{2 * i}": f"filter.layers.{i}" for i in range(3)},
    **{f"filter_fn.implicit_filter_rev.{2 * i}": f"filter.reverse_layers.{i}" for i in range(3)},
    "filter_fn.implicit_filter.6": "filter.output",
    "filter_fn.implicit_filter_rev.6": "filter.reverse_output",
}


def monarch_mixer():
    """Our mixer with the parameters of the published one, whose first block of projections gates before, not after."""
    golden = golden_reader.load_golden("m2_mixer_bidir1_resid0")
    width, swap = 16, np.r_[16:32, :16, 32:48]
    config = HyenaConfig(
        vocab_size=8, hidden_size=width, num_hidden_layers=1, intermediate_size=8, max_position_embeddings=64,
        filter_hidden_size=32, filter_num_bands=2, sine_frequency=10, trainable_positional_features=True,
        is_causal=False,
    )  # fmt: skip
    mixer = HyenaMixer(config, 0).eval()
    shapes = {name: tensor.shape for name, tensor in mixer.state_dict().items()}
    state = {}
    for name, array in golden.state.items():
        stem, _, last = name.rpartition(".")
        ours = PUBLISHED.get(name, f"{PUBLISHED.get(stem)}.{last}")
        if ours in shapes:
            array = array[swap] if name.startswith(("in_linear", "short_filter")) else array
            state[ours] = torch.from_numpy(array.copy()).view(shapes[ours])
    mixer.load_state_dict(state)
    return golden, mixer


def test_the_published_bidirectional_mixer_is_reproduced_in_float64():
    golden, mixer = monarch_mixer()
    x = torch.from_numpy(golden.inputs["x"])
    np.testing.assert_allclose(mixer.double()(x.double()).detach(), golden.outputs["y_float64"], rtol=0, atol=1e-10)


def test_the_published_bidirectional_mixer_is_reproduced_in_float32_with_its_gradient_and_filters():
    golden, mixer = monarch_mixer()
    x = torch.from_numpy(golden.inputs["x"]).requires_grad_()
    y = mixer(x)
    y.sum().backward()  # what the file holds the gradient of
    pairs = {
        "y": (y.detach(), golden.outputs["y"]),
        "x": (x.grad, golden.grads["x"]),
        "k": (mixer.filter(64)[0].T.detach(), golden.outputs["k"]),
        "k_rev": (mixer.filter(64, reverse=True)[0].T.detach(), golden.outputs["k_rev"]),
    }
    for name, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * abs(theirs).max(), err_msg=name)


# filters


@pytest.mark.parametrize(
    "fields", [{}, {"order": 3}, {"filter_length": 10}, {"beyond_trained_length": "refuse"}], ids=str
)
@pytest.mark.parametrize("kind", [ImplicitFilter, ExplicitFilter])
def test_the_filters_of_both_directions_have_one_shape_and_other_values(kind, fields):
    types = ["explicit" if kind is ExplicitFilter else "implicit"] * 3
    module = new_model(kind=HyenaModel, is_causal=False, filter_types=types, **fields).layers[0].mixer.filter
    assert type(module) is kind
    forward, reverse = module(33), module(33, reverse=True)
    assert forward.shape == reverse.shape == (module.order - 1 if kind is ImplicitFilter else len(forward), 32, 33)
    assert (forward[..., :10] != reverse[..., :10]).all()
    assert torch.equal(forward[..., 10:] == 0, reverse[..., 10:] == 0)
    torch.testing.assert_close(module(9, reverse=True), reverse[..., :9], rtol=0, atol=5e-5)


@pytest.mark.parametrize("types", ["implicit", "explicit"])
def test_a_causal_filter_has_no_taps_for_later_tokens(types):
    module = HyenaModel(config_of(filter_types=[types] * 3)).layers[0].mixer.filter
    with pytest.raises(ValueError, match="is_causal=False"):
        module(5, reverse=True)


def test_reverse_filters_start_like_forward_ones_and_get_their_policy():
    torch.manual_seed(0)
    model = HyenaModel(config_of("order 2", is_causal=False, filter_types=["implicit", "explicit", "implicit"]))
    own = [name for name in model.parameter_policy() if "reverse" in name]
    assert len(own) == 2 * 7 + 1
    assert {model.parameter_policy()[name] for name in own} == {(False, "filter")}
    for name, parameter in model.named_parameters():
        if "reverse" in name:
            twin = model.get_parameter(name.replace("reverse_", ""))
            assert parameter.std().item() == pytest.approx(twin.std().item(), rel=0.3, abs=0), name
            assert name.endswith("bias") or not torch.equal(parameter, twin), name


# the model against its formulas


REVERSED = {"h": "", "h_reverse": "reverse_"}


def linear(module):
    return {"weight": module.weight.numpy(), "bias": None if module.bias is None else module.bias.numpy()}


def norm(module):
    return {"weight": module.weight.numpy(), "bias": getattr(module, "bias", None)}


def filter_taps(config, module, length, prefix=""):
    """Taps of a filter from its parameters, by the oracle."""
    if isinstance(module, ExplicitFilter):
        return getattr(module, f"{prefix}weight").numpy()
    features = positional_features(length, 256, config.filter_num_bands).numpy()
    features = module.features.numpy()[:length] if config.trainable_positional_features else features
    layers = [linear(layer) for layer in (*getattr(module, f"{prefix}layers"), getattr(module, f"{prefix}output"))]
    decays = oracles.decay_rates((config.order - 1) * config.num_filters) if config.modulation else None
    times = oracles.filter_times(256, length)
    h = oracles.implicit_filter(features, layers, module.frequency.numpy(), times, decays)
    return oracles.unpack_channels(h[:, : config.filter_length or length], config.order)


def residual(config, module, length):
    if module is None:
        return {}
    taps = {name: filter_taps(config, module.filter, length, kind)[0] for name, kind in REVERSED.items()}
    return {"residual": {**taps, "skip": module.skip[0].numpy()}}


def mixer(model, index, length):
    config, module = model.config, model.model.layers[index].mixer
    if config.layer_types[index] == HYENA:
        return {
            **{name: linear(getattr(module, name)) for name in ("in_proj", "short_conv", "out_proj")},
            "h": filter_taps(config, module.filter, length),
            "h_reverse": filter_taps(config, module.filter, length, "reverse_"),
            "skip": module.skip.numpy(),
            **residual(config, module.residual, length),
        }
    if config.layer_types[index] == HEDGEHOG:
        kind = {"linear": linear_attention(config, module.attention) | {"causal": False}}
    else:
        kind = {"window": module.sliding_window, "causal": False}
    angles = np.tile(np.outer(np.arange(length), model.model.rotary_emb.inv_freq.numpy()), 2)
    return {
        **{name: linear(getattr(module, name)) for name in ("q_proj", "k_proj", "v_proj")},
        "o_proj": linear(module.out_proj),
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rotary": (np.cos(angles), np.sin(angles)),
        **kind,
    }


def monarch_mixer_oracle(model, ids):
    layers = []
    for index, layer in enumerate(model.model.layers):
        inner = {"gate_up": linear(layer.mlp.up_proj), "down": linear(layer.mlp.down_proj)}
        norms = {"mixer_norm": norm(layer.mixer_norm), "norm": norm(layer.mlp_norm)}
        layers.append({**norms, "mixer": mixer(model, index, ids.shape[1]), "mlp": inner})
    params = {
        "embedding": model.model.embed_tokens.weight.numpy(),
        "types": model.model.embed_token_types.weight.numpy(),
        "positions": model.model.embed_positions.weight.numpy(),
        "embed_norm": norm(model.model.embed_norm),
        "layers": layers,
        "dense": linear(model.lm_transform.dense),
        "norm": norm(model.lm_transform.norm),
        "bias": model.lm_head.bias.numpy(),
    }
    return oracles.bert_logits(oracles.monarch_mixer_states(ids.numpy(), params), params)


def oracle(model, ids):
    if model.config.block_type != "pre_norm":
        return monarch_mixer_oracle(model, ids)
    layers = []
    for index, layer in enumerate(model.model.layers):
        inner = {"up": linear(layer.mlp.up_proj), "down": linear(layer.mlp.down_proj)}
        if model.config.gated_mlp:
            inner["gate"] = linear(layer.mlp.gate_proj)
        norms = {"norm1": norm(layer.mixer_norm), "norm2": norm(layer.mlp_norm)}
        layers.append({**norms, "mixer": mixer(model, index, ids.shape[1]), "mlp": inner})
    params = {
        "embedding": model.model.embed_tokens.weight.numpy(),
        "layers": layers,
        "final_norm": norm(model.model.norm),
        "lm_head": model.lm_head.weight.numpy(),
    }
    return oracles.logits(
        oracles.hidden_states(ids.numpy(), params, model.config.norm_type.removesuffix("_norm")), params
    )


@cache
def model_of(name, dtype=torch.float64):
    return new_model(dtype=dtype, kind=HyenaForMaskedLM, is_causal=False, **MODELS[name]).requires_grad_(False)


@every_model
@pytest.mark.parametrize("length", [1, 2, 61])
def test_logits_equal_the_oracle_in_float64(name, length):
    ids = tokens(2, length)
    truth = oracle(model_of(name), ids)
    assert abs(model_of(name)(ids).logits.numpy() - truth).max() <= 1e-10 * max(1.0, abs(truth).max())


@every_model
def test_float32_logits_are_close_to_float64_and_bfloat16_costs_no_more_than_twice_the_rounding_of_weights(name):
    ids = tokens(2, 61)
    exact, single = (model_of(name, dtype)(ids).logits for dtype in (torch.float64, torch.float32))
    assert (single - exact).abs().max().item() <= 1e-4 * exact.abs().max().item()
    model = copy.deepcopy(model_of(name, torch.float32)).to(torch.bfloat16)
    half = model(ids).logits
    assert half.dtype == torch.bfloat16
    rounded = model.float()(ids).logits
    assert (half - exact).norm() <= 2 * (rounded - exact).norm()


@every_model
def test_every_token_sees_later_and_earlier_ones(name):
    model, ids = model_of(name), tokens(1, 21)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    moved = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    near = slice(5, 16) if name == "hybrid" else slice(None)
    assert (moved[near] > 1e-6).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_sliding_window_sees_as_far_ahead_as_back(implementation):
    config = config_of(layer_types=[SLIDING], sliding_window=4, num_hidden_layers=1, is_causal=False)
    config._attn_implementation = implementation
    model, ids = HyenaModel(config).eval(), tokens(1, 21)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 97
    with torch.no_grad():
        before, after = (model(x).last_hidden_state for x in (ids, changed))
    assert ((before - after).abs().amax(-1)[0] > 0).nonzero().flatten().tolist() == list(range(7, 14))


# batching


@cache
def sequences():
    return [tokens(length, seed=length) for length in LENGTHS]


@cache
def alone(name, dtype):
    return [model_of(name, dtype)(s[None]).logits[0] for s in sequences()]


def check(name, dtype, row, got):
    truth, exact = alone(name, dtype)[row], alone(name, torch.float64)[row]
    scale = max(1.0, exact.abs().max().item())
    bound = 1e-10 * scale
    if dtype == torch.float32:
        bound = max(1e-5 * scale, (truth - exact).abs().max().item())
    assert (got - truth).abs().max().item() <= bound


def layout(kind):
    """Ids and mask (5, columns), tokens of each sequence at the left, at the right, or anywhere."""
    columns = 53
    ids, mask = tokens(5, columns, seed=99), torch.zeros(5, columns, dtype=torch.long)
    for row, sequence in enumerate(sequences()):
        n = len(sequence)
        places = {
            "left": torch.arange(columns - n, columns),
            "right": torch.arange(n),
            "holes": torch.randperm(columns, generator=torch.Generator().manual_seed(row))[:n].sort().values,
        }[kind]
        mask[row, places] = 1
        ids[row, places] = sequence
    return ids, mask


@every_dtype
@every_model
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_masked_tokens_do_not_exist(name, dtype, kind):
    ids, mask = layout(kind)
    logits = model_of(name, dtype)(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row in range(5):
        check(name, dtype, row, logits[row, mask[row].bool()])


def packed():
    """The sequences in one row, described in the three usual ways."""
    lengths = torch.tensor(LENGTHS)
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return torch.cat(sequences())[None], {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
        "seq_idx": {"seq_idx": torch.repeat_interleave(torch.arange(5), lengths)[None].to(torch.int32)},
        "cu_seq_lens_q": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 45, "max_length_k": 45},
    }


@every_dtype
@every_model
@pytest.mark.parametrize("described_by", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_documents_do_not_see_each_other(name, dtype, described_by):
    ids, descriptions = packed()
    logits = model_of(name, dtype)(ids, **descriptions[described_by]).logits
    for row, part in enumerate(logits[0].split(LENGTHS)):
        check(name, dtype, row, part)


@every_model
def test_a_row_that_is_all_padding_is_finite_and_disturbs_nobody(name):
    ids, mask = layout("holes")
    mask[1] = 0
    logits = model_of(name)(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row in (0, 2, 3, 4):
        check(name, torch.float64, row, logits[row, mask[row].bool()])
    assert model_of(name)(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_is_exact_in_every_implementation(implementation):
    model = new_model(dtype=torch.float64, kind=HyenaForMaskedLM, is_causal=False, **MODELS["hybrid"])
    model.set_attn_implementation(implementation)
    ids, mask = layout("holes")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for row in range(5):
        check("hybrid", torch.float64, row, logits[row, mask[row].bool()])


@every_model
def test_gradients_of_padded_documents_are_those_of_the_documents_alone(name):
    model = new_model(dtype=torch.float64, kind=HyenaForMaskedLM, is_causal=False, **MODELS[name])
    weights = torch.randn(sum(LENGTHS), 97, dtype=torch.float64)

    def gradients(logits):
        model.zero_grad()
        (logits * weights).sum().backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    truth = gradients(torch.cat([model(s[None]).logits[0] for s in sequences()]))
    ids, mask = layout("holes")
    packed_ids, descriptions = packed()
    batches = {"holes": model(ids, attention_mask=mask).logits[mask.bool()]}
    batches["packed"] = model(packed_ids, **descriptions["seq_idx"]).logits[0]
    for way, logits in batches.items():
        for key, gradient in gradients(logits).items():
            error = (gradient - truth[key]).abs().max().item()
            assert error <= 1e-10 * max(1.0, truth[key].abs().max().item()), (way, key)


@every_model
def test_padding_gets_no_gradient(name):
    ids, mask = layout("holes")
    embeds = model_of(name).get_input_embeddings()(ids).requires_grad_()
    logits = model_of(name)(inputs_embeds=embeds, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    assert embeds.grad[~mask.bool()].eq(0).all()
    assert embeds.grad[mask.bool()].abs().sum(-1).gt(0).all()


# what transformers and torch do with models


@every_model
def test_every_parameter_learns_and_gradient_checkpointing_changes_nothing(name):
    model, ids = new_model(kind=HyenaForMaskedLM, is_causal=False, sine_frequency=5, **MODELS[name]), tokens(2, 40)
    model.train()
    model(ids, labels=ids).loss.backward()
    plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    for key, gradient in plain.items():
        assert gradient.isfinite().all(), key
        # a key's bias cannot move a softmax
        assert gradient.abs().max() > (0 if key.endswith("k_proj.bias") else 1e-12), key
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-5, atol=1e-6)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_comes_back_bit_by_bit(name, dtype, tmp_path):
    model = new_model(kind=HyenaModel, is_causal=False, **MODELS[name]).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is HyenaModel
    assert not loaded.config.is_causal
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".filter." in key else dtype), key
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("name", ["order 3", "hybrid"])
def test_a_copied_and_a_pickled_model_compute_the_same(name):
    model, ids = model_of(name), tokens(1, 15)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("name", ["order 3", "hybrid", "monarch mixer"])
def test_a_bidirectional_model_compiles_to_one_graph(name):
    torch.compiler.reset()
    model, ids = model_of(name, torch.float32), tokens(2, 24)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["order 3", "explicit", "hybrid", "monarch mixer"])
def test_a_bidirectional_model_exports_with_any_batch_and_length(name):
    model = model_of(name, torch.float32)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=250)}
    program = torch.export.export(model, (), {"input_ids": tokens(2, 33)}, dynamic_shapes={"input_ids": sizes})
    for shape in ((3, 7), (1, 130)):
        ids = tokens(*shape)
        logits = program.module()(input_ids=ids).logits
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


# refusals


def test_a_cache_is_refused_and_none_is_made():
    model, ids = model_of("order 2"), tokens(1, 5)
    assert model.config.use_cache is False
    assert model.model(ids).past_key_values is None
    for cached in (model, model.model):
        with pytest.raises(ValueError, match="use_cache=True was passed to a bidirectional model"):
            cached(ids, use_cache=True)
        with pytest.raises(ValueError, match="past_key_values was passed to a bidirectional model"):
            cached(ids, past_key_values=DynamicCache(config=model.config))


def test_a_model_that_sees_later_tokens_cannot_predict_the_next_nor_the_other_way_round():
    with pytest.raises(ValueError, match="use HyenaForMaskedLM"):
        HyenaForCausalLM(config_of(is_causal=False))
    with pytest.raises(ValueError, match=r"is_causal=False.*HyenaForCausalLM"):
        HyenaForMaskedLM(config_of())
