"""Small random Hyena models and ragged batches that the model, cache and generation tests share.

Weights are large (logits of a few units, filters that do not decay at once), so that a wrong token in the past shows.
"""

from functools import cache

import torch

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.cache import online
from hyena_hf.ops.modal import NO_POLE, PI


HYENA, FULL, SLIDING, HEDGEHOG = "hyena", "full_attention", "sliding_attention", "hedgehog"

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "filter_num_bands": 4,
    "filter_hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# the models whose batching, caching and generation is tested
MODELS = {
    "order 2": {},
    "order 3": {"order": 3},
    "online": {"decode_cache": "online"},
    "online order 3": {"order": 3, "layer_types": [HYENA, FULL, HYENA], "decode_cache": "online"},
    "heads": {"num_heads": 8},
    "hybrid": {"layer_types": [HYENA, FULL, HYENA]},
    "modal": {"filter_types": ["modal"] * 3, "state_size": 8},
    "modal order 3": {"filter_types": ["modal", "implicit", "modal"], "order": 3, "state_size": [4, 1, 7]},
    "modal heads": {"filter_types": ["modal"] * 3, "num_heads": 8, "state_size": 6, "num_poles": 4},
    "sliding": {
        "layer_types": [SLIDING, HYENA, FULL],
        "sliding_window": 6,
        "filter_types": ["implicit", "explicit", "implicit"],
        "filter_length": 9,
    },
    "hedgehog": {"layer_types": [HYENA, HEDGEHOG, HYENA]},
    "hedgehog window": {
        "layer_types": [HEDGEHOG, HYENA, HEDGEHOG],
        "feature_map": "hedgehog_softmax",
        "linear_attention_window": 6,
    },
}

# what else a config can combine
COMBINATIONS = {
    **MODELS,
    "gated": {
        "norm_type": "rms_norm",
        "gated_mlp": True,
        "hidden_act": "silu",
        "mlp_bias": False,
        "use_bias": False,
        "short_conv_kernel": 1,
    },
    "cosformer": {"layer_types": [HEDGEHOG, FULL, HEDGEHOG], "feature_map": "cosformer", "linear_attention_window": 3},
    "performer": {"layer_types": [HEDGEHOG] * 3, "feature_map": "performer", "feature_dim": 12},
    "taylor": {"layer_types": [HEDGEHOG] * 3, "feature_map": "taylor"},
    "attention only": {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 4},
    "explicit order 3": {"order": 3, "filter_types": ["explicit"] * 3, "short_conv_kernel": 4},
    "explicit heads": {"num_heads": 1, "filter_types": ["explicit"] * 3, "filter_length": [5, 300, 16]},
    "trained features": {"trainable_positional_features": True, "tie_word_embeddings": False},
    "partial": {"modulation": False, "filter_length": 11, "filter_num_layers": 2, "residual_in_fp32": True},
    "striped": {  # as Evo 2: three kinds of filters, groups, a norm and MLPs of its own, biases in some places
        "layer_types": [HYENA, FULL, HYENA],
        "filter_types": ["explicit", "implicit", "modal"],
        "filter_length": 7,
        "filter_groups": 4,
        "state_size": 5,
        "num_poles": 5,
        "norm_type": "rms_norm_outer_eps",
        "norm_eps": 1e-3,
        "gated_mlp": True,
        "mlp_bias": False,
        "hidden_act": ["gelu", "linear", "linear"],
        "use_bias": ["out_proj", "attention_out_proj"],
    },
    "shifted": {"modulation_shift": 0.05, "order": 4, "norm_type": "rms_norm"},
}


def config_of(name: str = "order 2", **changes) -> HyenaConfig:
    """Config of a combination, with some fields changed."""
    return HyenaConfig(**{**SHAPE, **COMBINATIONS[name], **changes})


def new_model(
    name: str = "order 2", dtype: torch.dtype = torch.float32, seed: int = 0, *, kind=HyenaForCausalLM, **changes
):
    """A model with large random weights, drawn in float32; every dtype of a name has the same ones."""
    torch.manual_seed(seed)
    model = kind(config_of(name, **changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "short_conv" in key:
                parameter.normal_(0, 0.5)
            elif key.partition("filter.")[2].startswith(("output", "weight", "reverse_output", "reverse_weight")):
                parameter.normal_(0, 0.4)
            elif key.partition("filter.")[2].startswith(("residue", "direct")):
                parameter.normal_(0, 0.2)
            elif key.endswith(("log_radius", "angle")):
                _mix_poles(key, parameter)
            elif key.partition("filter.")[2].startswith(("layers", "reverse_layers")):
                parameter.normal_(0, 0.05)
            elif ".skip" not in key and "filter.frequency" not in key and "filter.features" not in key:
                parameter.normal_(0, 0.15)
    return model.to(dtype)


def _mix_poles(key: str, parameter: torch.Tensor) -> None:
    """Real poles of both signs and an unused slot among the complex ones, differently in each filter."""
    for index, row in enumerate(parameter.flatten(0, 1)):
        if "angle" in key:
            row[: index % 3] = 0.0
            row[-1:] = PI if index % 4 == 1 else row[-1:]
        elif index % 5 == 3:
            row[-1] = NO_POLE


@cache
def _model_of(name: str, dtype: torch.dtype) -> HyenaForCausalLM:
    return new_model(name, dtype).requires_grad_(False)


def model_of(name: str = "order 2", dtype: torch.dtype = torch.float64) -> HyenaForCausalLM:
    """The model of `new_model`, built once: for tests that leave it as it is."""
    return _model_of(name, dtype)


def shrink_tiles(monkeypatch) -> None:
    """Let tiles begin after a few tokens, and be of a few, so that short sequences meet all there is."""
    for name, value in {"NEAR": 8, "BLOCK": 2, "PATIENCE": 0, "_CHUNK": 16, "_KEPT": 8}.items():
        monkeypatch.setattr(online, name, value)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def linear_attention(config, module):
    """Parameters of linear attention as the oracle takes them."""

    def feature_map(phi):
        return {
            "name": config.feature_map,
            "max_length": config.max_position_embeddings,
            **{name: tensor.numpy() for name, tensor in phi.state_dict().items()},
        }

    factor = module.window_factor
    return {
        "q_map": feature_map(module.q_map),
        "k_map": feature_map(module.k_map),
        "window": module.window,
        "window_factor": None if factor is None else factor.numpy(),
        "joint": module.q_map.is_log,
    }
