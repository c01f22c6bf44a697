# SPDX-License-Identifier: Apache-2.0
"""Put linear attention in the place of a trained model's softmax attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hyena_hf.feature_maps import LearnedMap

from . import modeling
from .configurations import CONFIGS, HEDGEHOG, check_maps


_RENAMED = {"GPT2LMHeadModel": "HedgehogGPT2ForCausalLM"}


def convert_attention(
    model: PreTrainedModel,
    *,
    layers: Literal["all"] | Iterable[int] = "all",
    feature_map: str = "hedgehog",
    feature_dim: int | None = None,
    window: int = 0,
    init: Literal["identity", "random"] = "identity",
) -> PreTrainedModel:
    """A model whose attention is linear in some layers or all; it is to be trained (`attention_transfer`).

    Args:
        model: A Llama, Mistral, Qwen 2 or 3 or GPT-2, bare, as a language model or as a classifier of sequences; or a
            BERT encoder, bare or with a head for masked tokens, sequences, tokens or answers. It stays as it is:
            weights are copied. One on the meta device is converted there, which tells shapes and sizes.
        layers: Indices of the layers to convert, or `"all"`. Negative ones count from the end.
        feature_map: Name in `hyena_hf.feature_maps.FEATURE_MAPS`.
        feature_dim: Outputs of a learned map (None: the width of a head).
        window: Tokens that keep softmax attention, the current one included; 0 for linear attention alone.
        init: Start of learned maps: the identity, or a random rotation of every head, the same for queries and keys.

    Returns:
        A model of its own type (`hedgehog_llama`, ...) in the mode and on the device of the one given. Weights keep
        their dtypes, and are frozen where those given are; maps are in the dtype of the model and can be trained.
        Converted layers have no dropout of attention weights, which they never hold; layers that stay keep theirs.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: Its attention is not known, already linear, or quantised; its weights are offloaded; a layer, map
            or window does not exist.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    check_maps(feature_map, feature_dim, window)
    if init not in ("identity", "random"):
        raise ValueError(f"init is {init!r}; choose 'identity' or 'random'")
    name = _converted_name(model)
    config = _converted_config(model, layers, feature_map, feature_dim, window)
    with no_init_weights():
        converted = getattr(modeling, name)(config).to(device=model.device)
    for module in converted.modules():
        if isinstance(module, modeling.LinearAttention):
            module.to(dtype=model.dtype)
    converted.tie_weights()
    _initialise(converted, init)
    _take_over(converted, model)
    converted.train(model.training)
    if model.can_generate():
        converted.generation_config = copy.deepcopy(model.generation_config)
    return converted


def _converted_name(model: PreTrainedModel) -> str:
    """Name of the class of the converted model."""
    family, name = model.config.model_type, type(model).__name__
    if family.startswith(f"{HEDGEHOG}_"):
        kinds = model.config.layer_types
        raise ValueError(
            f"this model is converted already: layers {model.config.linear_layers} of {len(kinds)} are linear; "
            f"convert the model of softmax attention that it came from"
        )
    ours = _RENAMED.get(name, f"Hedgehog{name}")
    if family not in CONFIGS or not hasattr(modeling, ours):
        known = sorted(key for key in vars(modeling) if key.startswith("Hedgehog") and "For" in key)
        raise ValueError(
            f"{name} (model type {family!r}) is no model whose attention can be converted; its layers that look like "
            f"attention are {_attention_like(model) or 'none'}. Known are the model types {sorted(CONFIGS)} "
            f"with the heads of {', '.join(known)}"
        )
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the weights are quantised; load them with dequantised ones, for GGUF files "
            "from_pretrained(..., gguf_file=..., quantization_config=GgufConfig(dequantize=True))"
        )
    return ours


def _take_over(converted: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copy every tensor of the model, each in its own dtype, and which of them are trained.

    Frequencies of rotary embeddings are buffers that no file holds and that stay in float32 where weights are loaded
    in bfloat16; rounded, they would turn distant positions by a wrong angle.

    Raises:
        ValueError: The model holds other tensors than transformers' own, or some whose values are not there.
    """
    theirs, ours = _tensors(model), _tensors(converted)
    own = [key for key in ours if ".linear_attention." not in key]
    foreign = sorted(set(own).symmetric_difference(theirs))
    foreign = foreign or [key for key in own if ours[key].shape != theirs[key].shape]
    if foreign:
        raise ValueError(
            f"{type(model).__name__} holds other tensors than transformers' own (first {foreign[:3]}); merge adapters "
            f"and convert the plain model"
        )
    absent = [key for key in own if theirs[key].is_meta]
    if 0 < len(absent) < len(own):  # a model wholly on the meta device has shapes alone, and so has this one
        raise ValueError(
            f"the values of {len(absent)} tensors of the model are elsewhere (first {absent[:3]}), on a disk or in "
            f"the memory of another device; load it without offloading and convert it then"
        )
    if len({id(theirs[key]) for key in own}) != len({id(ours[key]) for key in own}):
        raise ValueError(
            "embeddings and output weights of the model are apart, but its config says tie_word_embeddings=True, or "
            "the other way round; set model.config.tie_word_embeddings to what is the case"
        )
    for key in own:
        ours[key].data = theirs[key].detach().clone()
        ours[key].requires_grad_(theirs[key].requires_grad)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _attention_like(model: nn.Module) -> list[str]:
    """Kinds of modules of a model that call themselves attention."""
    return sorted(
        {type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()}
    )


def _converted_config(
    model: PreTrainedModel, layers: Any, feature_map: str, feature_dim: int | None, window: int
) -> Any:
    config: Any = model.config
    count = config.num_hidden_layers
    chosen = set(range(count))
    if layers != "all":
        asked = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else None
        if asked is None or not all(type(index) is int and -count <= index < count for index in asked):
            raise ValueError(f"layers must be 'all' or indices of the {count} layers of the model, got {layers!r}")
        if not asked:
            raise ValueError("layers is empty: nothing would be converted")
        chosen = {index % count for index in asked}
    _check_source_windows(config, chosen)
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    fields = config.to_dict()
    for key in ("model_type", "architectures", "layer_types", "transformers_version"):
        fields.pop(key, None)
    make: Any = CONFIGS[config.model_type]
    return make(
        **fields,
        layer_types=[HEDGEHOG if index in chosen else kind for index, kind in enumerate(types)],
        feature_map=feature_map,
        feature_dim=feature_dim,
        linear_attention_window=window,
        attn_implementation=config._attn_implementation,
    )


def _check_source_windows(config: Any, chosen: set[int]) -> None:
    """Refuse layers whose own attention sees a sliding window only: their teacher would not be full attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    sliding = sorted(index for index in chosen if types[index] == "sliding_attention")
    if window and sliding:
        raise ValueError(
            f"layers {sliding[:5]} attend to a sliding window of {window} tokens; linear attention to all tokens is "
            f"not what they were trained for. Convert other layers, or set config.sliding_window=None before loading "
            f"where all sequences are shorter"
        )


@torch.no_grad()
def _initialise(model: Any, init: str) -> None:
    """Give every module of linear attention its first values."""
    for module in model.modules():
        if isinstance(module, modeling.LinearAttention):
            for part in module.modules():
                modeling.init_linear_attention(part)
            if init == "random" and isinstance(module.q_map, LearnedMap) and isinstance(module.k_map, LearnedMap):
                _rotate(module.q_map, module.k_map)


def _rotate(q_map: LearnedMap, k_map: LearnedMap) -> None:
    """Turn the features of every group of heads by an orthogonal matrix of its own: scores keep their sizes."""
    groups = q_map.num_heads // k_map.num_heads
    for key_head in range(k_map.num_heads):
        turn = torch.linalg.qr(torch.randn(k_map.head_dim, k_map.head_dim, dtype=torch.float32)).Q
        rotated = turn.to(k_map.weight) @ k_map.weight[key_head]
        k_map.weight[key_head].copy_(rotated)
        for head in range(key_head * groups, (key_head + 1) * groups):
            q_map.weight[head].copy_(rotated)


__all__ = ["convert_attention"]
