"""The config: every field changes something that one can observe, and nothing impossible is accepted."""

import json

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from hyena_hf import (
    HyenaConfig,
    HyenaForCausalLM,
    HyenaForMaskedLM,
    HyenaForSequenceClassification,
    HyenaModel,
)
from tests.models import COMBINATIONS, FULL, HEDGEHOG, HYENA, SLIDING, config_of, new_model, tokens


# Observables of a config that differs from the tiny one in some fields.


def shapes(**changes):
    with torch.device("meta"):
        model = HyenaForCausalLM(config_of(**changes))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def body_shapes(**changes):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in HyenaModel(config_of(**changes)).named_parameters()}


def masked_lm_shapes(**changes):
    with torch.device("meta"):
        model = HyenaForMaskedLM(config_of(is_causal=False, **changes))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def logits(dtype=torch.float32, **changes):
    with torch.no_grad():
        return new_model(dtype=dtype, **changes)(tokens(1, 40), use_cache=False).logits.tolist()


def logits_in_bfloat16(**changes):
    return logits(dtype=torch.bfloat16, **changes)


def logits_in_training(**changes):
    model = new_model(**changes).train()
    torch.manual_seed(0)
    with torch.no_grad():
        return model(tokens(1, 40), use_cache=False).logits.tolist()


def initial_weights(**changes):
    torch.manual_seed(0)
    return {name: p.double().std().item() for name, p in HyenaForCausalLM(config_of(**changes)).named_parameters()}


def longest_input(**changes):
    try:
        new_model(**changes)(tokens(1, 257))
    except ValueError:
        return "refused"
    return "accepted"


def returns_a_cache(**changes):
    return new_model(**changes)(tokens(1, 4)).past_key_values is not None


def kinds_of_memory(**changes):
    past = new_model(**changes)(tokens(1, 4)).past_key_values
    return [type(history) for layer in past.layers for history in layer.histories]


def class_scores(**changes):
    torch.manual_seed(0)
    model = HyenaForSequenceClassification(config_of(num_labels=3, **changes)).eval()
    with torch.no_grad():
        return model(tokens(1, 40)).logits.tolist()


def generation_ids(**changes):
    generation = GenerationConfig.from_model_config(config_of(**changes))
    return generation.pad_token_id, generation.bos_token_id, generation.eos_token_id


ATTENTION = {"layer_types": [HYENA, FULL, SLIDING], "sliding_window": 8}
LINEAR = {"layer_types": [HYENA, HEDGEHOG, FULL]}

# field: (observable, one value, another value, what both configs share)
EFFECTS = {
    "vocab_size": (shapes, 97, 98),
    "hidden_size": (shapes, 32, 48),
    "num_hidden_layers": (shapes, 3, 2),
    "intermediate_size": (shapes, 64, 65),
    "max_position_embeddings": (logits, 256, 100),
    "order": (shapes, 2, 3),
    "num_heads": (shapes, None, 8),
    "is_causal": (body_shapes, True, False),
    "layer_types": (shapes, None, [HYENA, FULL, HYENA]),
    "filter_types": (shapes, None, ["implicit", "explicit", "implicit"]),
    "filter_length": (logits, None, [7, 8, 9]),
    "state_size": (shapes, 8, [3, 4, 5], {"filter_types": ["modal"] * 3}),
    "num_poles": (shapes, None, 5, {"filter_types": ["modal"] * 3}),
    "frequency_sparsity": (logits, 0.0, 0.5, {"filter_length": 300}),
    "filter_hidden_size": (shapes, 16, 8),
    "filter_num_layers": (shapes, 4, 2),
    "filter_num_bands": (shapes, 4, 3),
    "trainable_positional_features": (shapes, False, True),
    "sine_frequency": (logits, 14.0, 1),
    "modulation": (logits, True, False),
    "fast_decay": (logits, 0.3, 0.4),
    "slow_decay": (logits, 1.5, 1),
    "modulation_target": (logits, 0.01, 0.1),
    "modulation_shift": (logits, 0.0, 0.05),
    "filter_groups": (shapes, None, 4, {"filter_types": ["explicit"] * 3}),
    "short_conv_kernel": (shapes, 3, 4),
    "residual_conv": (body_shapes, False, True, {"is_causal": False}),
    "block_type": (logits, "pre_norm", "monarch_mixer"),
    "learned_positions": (shapes, False, True),
    "type_vocab_size": (shapes, 0, 2),
    "norm_type": (shapes, "layer_norm", "rms_norm"),
    "norm_eps": (logits, 1e-5, 1e-2),
    "hidden_act": (logits, "gelu_pytorch_tanh", "silu"),
    "gated_mlp": (shapes, False, True),
    "mlp_bias": (shapes, True, ["down_proj"]),
    "mlp_blocks": (shapes, 1, 4),
    "use_bias": (shapes, True, False),
    "num_attention_heads": (logits, 4, 2, ATTENTION),
    "num_key_value_heads": (shapes, 4, 2, ATTENTION),
    "head_dim": (shapes, 8, 4, ATTENTION),
    "sliding_window": (logits, 8, 9, ATTENTION),
    "feature_map": (logits, "hedgehog", "hedgehog_softmax", LINEAR),
    "feature_dim": (shapes, None, 3, LINEAR),
    "linear_attention_window": (logits, 2, 3, LINEAR),
    "rope_parameters": (logits, None, {"rope_type": "default", "rope_theta": 100.0}, ATTENTION),
    "rope_frequency_dtype": (logits, "float32", "bfloat16", ATTENTION),
    "beyond_trained_length": (longest_input, "extrapolate", "refuse"),
    "decode_cache": (kinds_of_memory, "history", "online"),
    "residual_in_fp32": (logits_in_bfloat16, False, True),
    "initializer_range": (initial_weights, 0.02, 0.1),
    "embed_dropout": (logits_in_training, 0.0, 0.5),
    "resid_dropout": (logits_in_training, 0.0, 0.5),
    "mlp_dropout": (logits_in_training, 0.0, 0.5),
    "hyena_dropout": (logits_in_training, 0.0, 0.5),
    "attention_dropout": (logits_in_training, 0.0, 0.5, ATTENTION),
    "classifier_pooling": (class_scores, "last", "mean"),
    "use_cache": (returns_a_cache, True, False),
    "tie_word_embeddings": (shapes, True, False),
    "lm_head_transform": (masked_lm_shapes, False, True),
    "pad_token_id": (generation_ids, None, 3),
    "bos_token_id": (generation_ids, None, 3),
    "eos_token_id": (generation_ids, 3, [3, 4]),
}


def test_the_table_of_effects_lists_every_field():
    assert set(EFFECTS) == set(HyenaConfig.__annotations__)


@pytest.mark.parametrize("field", EFFECTS)
def test_every_field_changes_something(field):
    observable, one, other, *shared = EFFECTS[field]
    shared = shared[0] if shared else {}
    assert observable(**{**shared, field: one}) != observable(**{**shared, field: other})


@pytest.mark.parametrize("dropout", ["hyena_dropout", "attention_dropout"])
@pytest.mark.parametrize("changes", [{"num_heads": 8}, {"order": 3}], ids=["heads", "order 3"])
def test_dropout_reaches_every_operator_in_training_only(dropout, changes):
    shared = {**ATTENTION, **changes}
    assert logits_in_training(**shared, **{dropout: 0.5}) != logits_in_training(**shared)
    assert logits(**shared, **{dropout: 0.5}) == logits(**shared)


HYBRID = {"layer_types": [HYENA, FULL, HYENA]}
SPARSE = {"frequency_sparsity": 0.5, "filter_length": [256, 300, 9]}
ROTARY = {"rope_theta": 10000.0}

REFUSED = [
    # wrong types
    ({"hidden_size": "32"}, TypeError, ["hidden_size", "int", "str"]),
    ({"order": 2.0}, TypeError, ["order", "int", "float"]),
    ({"num_hidden_layers": True}, TypeError, ["num_hidden_layers", "int", "bool"]),
    ({"use_bias": "yes"}, TypeError, ["use_bias", "bool", "str"]),
    ({"modulation": 1}, TypeError, ["modulation", "bool", "int"]),
    ({"sine_frequency": "14"}, TypeError, ["sine_frequency", "float", "str"]),
    ({"layer_types": "hyena"}, TypeError, ["layer_types", "list", "str"]),
    ({"filter_length": [1.5, 2, 3]}, TypeError, ["filter_length"]),
    ({"norm_type": "batch_norm"}, (TypeError, ValueError), ["norm_type", "layer_norm", "rms_norm", "batch_norm"]),
    ({"decode_cache": "tiles"}, (TypeError, ValueError), ["decode_cache", "auto", "history", "online", "tiles"]),
    ({"beyond_trained_length": "cut"}, (TypeError, ValueError), ["beyond_trained_length", "refuse", "cut"]),
    # unknown keys
    ({"hiden_size": 32}, ValueError, ["'hiden_size'", "did you mean 'hidden_size'?"]),
    ({"d_model": 32, "zzz": 1}, ValueError, ["'d_model', 'zzz'"]),
    # impossible shapes
    ({"num_heads": 5}, ValueError, ["(32)", "(5)", "num_heads=4"]),
    ({"num_heads": 33}, ValueError, ["(32)", "(33)", "num_heads=32"]),
    ({"num_heads": 8, "order": 3}, ValueError, ["(8)", "(32)", "order 3", "order=2"]),
    ({"num_heads": 8, "is_causal": False}, ValueError, ["(8)", "(32)", "is_causal=True"]),
    ({"use_cache": True, "is_causal": False}, ValueError, ["use_cache is True", "leave it out"]),
    ({"is_causal": "no"}, TypeError, ["is_causal", "bool", "str"]),
    ({"order": 1}, ValueError, ["order (1)", "at least 2"]),
    ({"vocab_size": 0}, ValueError, ["vocab_size (0)", "at least 1"]),
    ({"short_conv_kernel": -1}, ValueError, ["short_conv_kernel (-1)", "at least 1"]),
    ({"filter_num_layers": 1}, ValueError, ["filter_num_layers (1)", "at least 2"]),
    ({"block_type": "post_norm"}, (TypeError, ValueError), ["block_type", "pre_norm", "monarch_mixer", "post_norm"]),
    ({"type_vocab_size": -1}, ValueError, ["type_vocab_size (-1)", "at least 0"]),
    ({"mlp_blocks": 0}, ValueError, ["mlp_blocks (0)", "at least 1"]),
    ({"mlp_blocks": 5}, ValueError, ["hidden_size (32)", "mlp_blocks (5)", "divisor"]),
    ({"mlp_blocks": 4, "intermediate_size": 66}, ValueError, ["intermediate_size (66)", "mlp_blocks (4)"]),
    ({"mlp_bias": ["gate_proj"]}, ValueError, ["'gate_proj'", "down_proj"]),
    ({"residual_conv": True}, ValueError, ["residual_conv", "is_causal=True", "leave it out"]),
    ({"residual_conv": True, "is_causal": False, "order": 3}, ValueError, ["residual_conv", "order 3"]),
    ({"residual_in_fp32": True, "block_type": "monarch_mixer"}, ValueError, ["residual_in_fp32", "'monarch_mixer'"]),
    ({"mlp_dropout": 1.0}, ValueError, ["mlp_dropout (1.0)", "below 1"]),
    ({"filter_length": [3, 0, 3]}, ValueError, ["filter_length (0)", "at least 1"]),
    ({"filter_length": [3, 3]}, ValueError, ["2 entries", "(3)", "one a layer"]),
    ({"layer_types": [HYENA]}, ValueError, ["1 entries", "(3)", "one a layer"]),
    ({"filter_types": ["implicit"] * 4}, ValueError, ["4 entries", "(3)", "one a layer"]),
    ({"layer_types": [HYENA, "moe", HYENA]}, ValueError, ["'moe'", "sliding_attention"]),
    ({"filter_types": ["implicit", "modal?", "implicit"]}, ValueError, ["'modal?'", "explicit"]),
    ({**HYBRID, "num_attention_heads": 3, "num_key_value_heads": 2}, ValueError, ["(3)", "(2)", "divisor"]),
    ({**HYBRID, "head_dim": 7}, ValueError, ["head_dim (7)", "even", "(4)"]),
    ({**HYBRID, "num_attention_heads": 0}, ValueError, ["num_attention_heads (0)", "at least 1"]),
    ({**LINEAR, "feature_map": "hedge"}, ValueError, ["'hedge'", "hedgehog_softmax"]),
    ({**LINEAR, "feature_map": "elu", "feature_dim": 8}, ValueError, ["feature_dim (8)", "'elu'", "leave it out"]),
    ({**LINEAR, "feature_dim": 0}, ValueError, ["feature_dim (0)", "at least 1"]),
    ({**LINEAR, "linear_attention_window": -1}, ValueError, ["linear_attention_window (-1)", "at least 0"]),
    ({"layer_types": [SLIDING] * 3}, ValueError, ["sliding_window is None", "set sliding_window"]),
    ({**HYBRID, "rope_parameters": {"rope_type": "spiral", **ROTARY}}, ValueError, ["'spiral'", "'yarn'"]),
    ({**HYBRID, "rope_parameters": {"rope_type": "linear", **ROTARY}}, ValueError, ["factor"]),
    ({**HYBRID, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROTARY}}, ValueError, ["'dynamic'"]),
    (
        {**HYBRID, "rope_parameters": {"partial_rotary_factor": 0.5, **ROTARY}},
        ValueError,
        ["partial_rotary_factor 0.5"],
    ),
    # ranges and ids
    ({"frequency_sparsity": 1}, ValueError, ["frequency_sparsity (1)", "below 1"]),
    ({"frequency_sparsity": -0.1}, ValueError, ["frequency_sparsity (-0.1)", "at least 0"]),
    ({"frequency_sparsity": True}, TypeError, ["frequency_sparsity", "bool"]),
    ({**SPARSE, "beyond_trained_length": "refuse"}, ValueError, ["(0.5)", "filter_length (300)", "(256)", "shorten"]),
    ({**SPARSE, "trainable_positional_features": True}, ValueError, ["filter_length (300)", "(256)", "shorten"]),
    ({"embed_dropout": 1.0}, ValueError, ["embed_dropout (1.0)", "below 1"]),
    ({"resid_dropout": -0.1}, ValueError, ["resid_dropout (-0.1)", "at least 0"]),
    ({"hyena_dropout": float("nan")}, ValueError, ["hyena_dropout (nan)"]),
    ({"modulation_target": 1.0}, ValueError, ["modulation_target (1.0)", "between 0 and 1"]),
    ({"fast_decay": 0}, ValueError, ["fast_decay (0)", "above 0"]),
    ({"norm_eps": -1e-5}, ValueError, ["norm_eps (-1e-05)", "above 0"]),
    ({"hidden_act": "gleu"}, ValueError, ["'gleu'", "ACT2FN"]),
    ({"pad_token_id": 97}, ValueError, ["pad_token_id (97)", "vocabulary of 97", "raise vocab_size"]),
    ({"eos_token_id": [0, -1]}, ValueError, ["eos_token_id (-1)", "vocabulary of 97"]),
]


@pytest.mark.parametrize(("changes", "error", "parts"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_work_is_refused_with_the_numbers_and_a_remedy(changes, error, parts):
    with pytest.raises(error) as raised:
        config_of(**changes)
    for part in parts:
        assert part in str(raised.value)


def test_a_field_keeps_its_type_and_the_whole_its_sense_after_construction():
    config = config_of()
    with pytest.raises(TypeError, match="hidden_size"):
        config.hidden_size = "wide"
    config.order = 1
    with pytest.raises(ValueError, match=r"order \(1\)"):
        config.validate()


def test_a_model_refuses_a_config_file_with_an_unknown_field(tmp_path):
    config_of().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, "filter_lenght": 3}))
    for load in (HyenaConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="did you mean 'filter_length'"):
            load(tmp_path)


def test_what_others_hang_on_a_config_does_not_spoil_its_file(tmp_path):
    config = config_of("hybrid", id2label={0: "a", 1: "b", 2: "c"}, rope_parameters={"rope_theta": 7.0})
    plain = HyenaConfig(**config.to_dict())
    config.rms_norm_eps = config.note = 1.0  # as transformers' own tests and training libraries do
    config.save_pretrained(tmp_path)
    for loaded in (HyenaConfig.from_pretrained(tmp_path), HyenaConfig.from_dict(config.to_dict())):
        assert loaded.to_dict() == plain.to_dict()
        assert (loaded.num_labels, loaded.rope_parameters["rope_theta"]) == (3, 7.0)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_config_comes_back_from_its_file_as_it_was(name, tmp_path):
    config = config_of(name, eos_token_id=[1, 2], modulation_shift=0.25)
    config.save_pretrained(tmp_path)
    for loaded in (HyenaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is HyenaConfig
        fields = HyenaConfig.__annotations__
        assert {field: getattr(loaded, field) for field in fields} == {
            field: getattr(config, field) for field in fields
        }
    assert HyenaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_auto_config_builds_a_config_by_its_type():
    assert AutoConfig.for_model("hyena", hidden_size=64).hidden_size == 64


def test_what_is_left_out_follows_from_what_is_given():
    config = HyenaConfig(num_hidden_layers=2, hidden_size=256)
    assert config.layer_types == [HYENA] * 2
    assert config.filter_types == ["implicit"] * 2
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 64)
    assert config.num_filters == 256
    assert [config.filter_support(layer) for layer in range(2)] == [None, None]
    assert config.use_cache
    assert not HyenaConfig(is_causal=False).use_cache


def test_a_filter_without_its_high_frequencies_ends_at_its_length_or_the_trained_one():
    assert [config_of(frequency_sparsity=0.5).filter_support(layer) for layer in range(3)] == [256] * 3
    assert [config_of(**SPARSE).filter_support(layer) for layer in range(3)] == [256, 300, 9]
    unaffected = {"layer_types": [HYENA, FULL, HYENA], "filter_types": ["implicit", "implicit", "explicit"]}
    for bound in ({"beyond_trained_length": "refuse"}, {"trainable_positional_features": True}):
        config_of(frequency_sparsity=0.5, filter_length=[256, 300, 300], **unaffected, **bound)


def test_defaults_are_the_published_153m_model():
    with torch.device("meta"):
        model = HyenaForCausalLM(HyenaConfig())
    assert 152e6 < model.num_parameters() < 154e6


def test_the_docstring_describes_every_field():
    for field in HyenaConfig.__annotations__:
        assert field in HyenaConfig.__doc__
