# SPDX-License-Identifier: Apache-2.0
"""Run a converted model with another attention: that of its teacher, or one of its two branches alone.

    with attention_mode(model, "softmax"):
        teacher = model(**batch)

| mode | attention |
|---|---|
| softmax | full softmax attention with the model's projections: the teacher, while these are untrained |
| window | softmax over the window, without the linear branch |
| linear | the linear branch alone, over all tokens |

There are no caches meanwhile: `generate` reads everything again for every token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyena_hf.mixers.linear_attention import LinearAttention, Replacement
from hyena_hf.ops.linear_attention import bidirectional_linear_attention, causal_linear_attention
from hyena_hf.ops.precision import outside_autocast


Mode = Literal["softmax", "window", "linear"]


def linear_attentions(model: nn.Module) -> dict[int, LinearAttention]:
    """The converted layers of a model, by their index.

    Raises:
        ValueError: It has none.
    """
    holders = [
        module for module in model.modules() if isinstance(getattr(module, "linear_attention", None), nn.Module)
    ]
    found = {int(holder.layer_idx): holder.linear_attention for holder in holders}  # pyright: ignore (modules of ours)
    if not found:
        raise ValueError(f"{type(model).__name__} holds no converted attention; convert it first, convert_attention")
    return found  # pyright: ignore


def is_replaced(model: Any) -> bool:
    """Whether the attention of some layer is computed by another function at the moment."""
    return any(getattr(module, "replacement", None) is not None for module in model.modules())


@contextmanager
def replaced_attention(model: nn.Module, replacements: dict[int, Replacement]) -> Iterator[None]:
    """Compute the attention of some converted layers by other functions inside a `with` block; without caches."""
    layers = linear_attentions(model)
    before = []
    for index, replacement in replacements.items():
        layer = layers[index]
        # PEFT puts a module of its own around the original and its trained copies, and calls one of these
        inside = [module for module in layer.modules() if isinstance(module, LinearAttention)]
        before += [(module, module.replacement) for module in inside]
        for module in inside:
            module.replacement = replacement if module is layer else partial(_for_wrapper, replacement, layer)
    try:
        yield
    finally:
        for module, replacement in before:
            module.replacement = replacement


def _for_wrapper(replacement: Replacement, wrapper: Any, _: LinearAttention, *operands: Any) -> Tensor:
    return replacement(wrapper, *operands)


@contextmanager
def attention_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Run the converted layers in one of the modes of the table inside a `with` block; without caches.

    Args:
        model: A converted model.
        mode: `"softmax"`, `"window"` or `"linear"`.

    Raises:
        ValueError: There is no such mode, or no window.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose one of {', '.join(MODES)}")
    layers = linear_attentions(model)
    if mode == "window" and not all(layer.window for layer in layers.values()):
        raise ValueError("the model has no window: its attention is linear alone")
    with replaced_attention(model, dict.fromkeys(layers, MODES[mode])):
        yield


def visible_keys(layer: LinearAttention, length: int, filled: Tensor | None, device: torch.device) -> Tensor:
    """True for the keys that each query sees, (n, n) or (R, 1, n, n); rows without any see their first cell."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    visible = visible.tril() if layer.is_causal else visible
    if filled is None:
        return visible
    first = torch.zeros(1, dtype=torch.long, device=device)
    return visible & filled.index_fill(1, first, True)[:, None, None, :]


@outside_autocast
def softmax_log_weights(layer: LinearAttention, q: Tensor, k: Tensor, filled: Tensor | None) -> Tensor:
    """Logarithms of the weights of softmax attention (R, H, n, n) in float32 at least, -inf for hidden keys."""
    exact = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(layer.num_heads // layer.num_key_value_heads, dim=1)
    scores = q.to(exact) @ k.to(exact).mT * layer.scaling
    return scores.masked_fill(~visible_keys(layer, q.shape[2], filled, q.device), -torch.inf).log_softmax(dim=-1)


def _softmax(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
    mask = None if filled is None else visible_keys(layer, q.shape[2], filled, q.device)
    return nn.functional.scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=mask,
        is_causal=layer.is_causal and mask is None,
        scale=layer.scaling,
        enable_gqa=layer.num_heads != layer.num_key_value_heads,
    )


def _linear(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
    features = layer.features(q, k)
    options = {"log_features": layer.is_log, "mask": filled}
    if layer.is_causal:
        return causal_linear_attention(*features, v, **options)[0]
    return bidirectional_linear_attention(*features, v, **options)


def _window(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
    # features of zero: the linear branch has no weight
    nothing = q.new_zeros(*q.shape[:3], 1), k.new_zeros(*k.shape[:3], 1)
    options = {"window": layer.softmax_window(q, k), "mask": filled}
    if layer.is_causal:
        return causal_linear_attention(*nothing, v, **options)[0]
    return bidirectional_linear_attention(*nothing, v, **options)


MODES: dict[str, Replacement] = {"softmax": _softmax, "window": _window, "linear": _linear}

__all__ = [
    "attention_mode",
    "is_replaced",
    "linear_attentions",
    "replaced_attention",
    "softmax_log_weights",
    "visible_keys",
]
