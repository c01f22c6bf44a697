# SPDX-License-Identifier: Apache-2.0
"""Configs of attention models in which linear attention replaces softmax attention, in some layers or all.

Each has its own model type, so that stock transformers refuses their files instead of dropping the feature maps.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from hyena_hf.configuration_hyena import FEATURE_MAP_NAMES, MAPS_WITHOUT_WIDTH, plain_errors


HEDGEHOG = "hedgehog"


def check_maps(feature_map: str, feature_dim: int | None, window: int) -> None:
    """Refuse feature maps and windows that do not exist.

    Raises:
        TypeError: A size is no whole number.
        ValueError: One of them does not.
    """
    for name, value in (("feature_dim", feature_dim), ("the window", window)):
        if type(value) is not int and not (value is None and name == "feature_dim"):
            raise TypeError(f"{name} ({value!r}) must be a whole number")
    if feature_map not in FEATURE_MAP_NAMES:
        raise ValueError(f"feature_map is {feature_map!r}; choose one of {', '.join(FEATURE_MAP_NAMES)}")
    if feature_dim is not None and feature_map in MAPS_WITHOUT_WIDTH:
        raise ValueError(f"feature_dim ({feature_dim}) has no meaning for feature_map {feature_map!r}; leave it out")
    if feature_dim is not None and feature_dim < 1:
        raise ValueError(f"feature_dim ({feature_dim}) must be at least 1")
    if window < 0:
        raise ValueError(f"the window ({window}) must be at least 0; 0 is linear attention alone")


class LinearAttentionSettings:
    """What the configs below have beside the fields of their family.

    Args:
        layer_types (`list[str]`): `"hedgehog"` for every converted layer; the others are those of the family.
        feature_map (`str`): Name in `hyena_hf.feature_maps.FEATURE_MAPS`.
        feature_dim (`int`, *optional*): Outputs of a learned map (None: the width of a head).
        linear_attention_window (`int`): Tokens that keep softmax attention, the current one included; 0 for none.
    """

    layer_types: Any
    feature_map: str
    feature_dim: int | None
    linear_attention_window: int
    num_hidden_layers: int
    num_attention_heads: int

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [HEDGEHOG] * self.num_hidden_layers
        super().__post_init__(**kwargs)  # pyright: ignore (the config of the family stands behind)

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the converted layers."""
        return [index for index, kind in enumerate(self.layer_types) if kind == HEDGEHOG]

    def validate_linear_attention(self) -> None:
        """Refuse feature maps, windows and layers that do not exist."""
        check_maps(self.feature_map, self.feature_dim, self.linear_attention_window)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        groups = getattr(self, "num_key_value_heads", None) or self.num_attention_heads
        if self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({groups}); choose a divisor"
            )


@strict
class HedgehogLlamaConfig(LinearAttentionSettings, LlamaConfig):
    """Config of a Llama (SmolLM2, Llama 2 and 3) with linear attention."""

    model_type = "hedgehog_llama"

    layer_types: list[str] | None = None
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


@strict
class HedgehogMistralConfig(LinearAttentionSettings, MistralConfig):
    """Config of a Mistral with linear attention."""

    model_type = "hedgehog_mistral"

    layer_types: list[str] | None = None
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


@strict
class HedgehogQwen2Config(LinearAttentionSettings, Qwen2Config):
    """Config of a Qwen 2 or 2.5 with linear attention."""

    model_type = "hedgehog_qwen2"

    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


@strict
class HedgehogQwen3Config(LinearAttentionSettings, Qwen3Config):
    """Config of a Qwen 3 with linear attention."""

    model_type = "hedgehog_qwen3"

    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


@strict
class HedgehogGPT2Config(LinearAttentionSettings, GPT2Config):
    """Config of a GPT-2 with linear attention."""

    model_type = "hedgehog_gpt2"

    layer_types: list[str] | None = None
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


@strict
class HedgehogBertConfig(LinearAttentionSettings, BertConfig):
    """Config of a BERT encoder with linear attention."""

    model_type = "hedgehog_bert"

    layer_types: list[str] | None = None
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": HedgehogLlamaConfig,
    "mistral": HedgehogMistralConfig,
    "qwen2": HedgehogQwen2Config,
    "qwen3": HedgehogQwen3Config,
    "gpt2": HedgehogGPT2Config,
    "bert": HedgehogBertConfig,
}

for _config in CONFIGS.values():
    _config.__init__ = plain_errors(_config.__init__)
    _config.__setattr__ = plain_errors(_config.__setattr__)
