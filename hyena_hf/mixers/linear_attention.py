# SPDX-License-Identifier: Apache-2.0
"""Linear attention between given queries, keys and values: feature maps, and a window of softmax attention."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hyena_hf.cache import HyenaCacheLayer, LinearHistory
from hyena_hf.feature_maps import LearnedMap, PerformerMap, make_feature_map
from hyena_hf.ops import Segments, over_rows
from hyena_hf.ops.attention_weights import weights_without_past
from hyena_hf.ops.linear_attention import (
    LinearState,
    SoftmaxWindow,
    bidirectional_linear_attention,
    causal_linear_attention,
    empty_state,
    fold,
    has_unknown_length,
    linear_attention_weights,
    with_ones,
)
from hyena_hf.ops.segments import filled_cells, zero_behind

from .attention import remembered


# attention of whole rows by other means: (layer, q (R, H, n, P), k (R, K, n, P), v, filled (R, n)) -> (R, H, n, P)
Replacement = Callable[["LinearAttention", Tensor, Tensor, Tensor, Tensor | None], Tensor]


class LinearAttention(nn.Module):
    """Feature maps of queries and keys, and what they do to rows of them.

    Args:
        num_heads, num_key_value_heads, head_dim: H, K, P.
        feature_map: Name in `FEATURE_MAPS`.
        feature_dim: As in `FeatureMap`.
        window: Tokens that keep softmax attention, the current one included; 0 for none.
        scaling: Factor on the scores of softmax attention.
        max_length: Positions that a map of positions covers.
        is_causal: Whether tokens see earlier ones only.
        initial_scale: As in `FeatureMap`.
        initial_window_weight: What a token of the window counts at first beside one of the linear attention, between 0
            and 1.
    """

    def __init__(  # noqa: PLR0913 (sizes of a layer, each needed)
        self,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        feature_map: str,
        feature_dim: int | None,
        window: int,
        scaling: float,
        max_length: int,
        is_causal: bool,
        initial_scale: float = 1.0,
        initial_window_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.scaling, self.is_causal = window, scaling, is_causal
        sizes = (head_dim, feature_dim, max_length, initial_scale)
        self.q_map = make_feature_map(feature_map, num_heads, *sizes)
        self.k_map = make_feature_map(feature_map, num_key_value_heads, *sizes)
        # asked of the maps here, because adapters may wrap them
        self.is_log, self.sums_exponentials = self.q_map.is_log, self.q_map.sums_exponentials
        self.initial_window_weight = initial_window_weight
        self.window_factor = nn.Parameter(self.initial_window_factor()) if window else None
        self.replacement: Replacement | None = None  # see `hyena_hf.linear_attention.modes`

    def initial_window_factor(self) -> Tensor:
        """A logit of `initial_window_weight` for each query head (H,)."""
        weight = self.initial_window_weight
        return torch.full((self.num_heads,), math.log(weight / (1 - weight)))

    def forward(
        self,
        stream: Tensor,
        segments: Segments | None = None,
        cache_layer: HyenaCacheLayer | None = None,
        *,
        weigh: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend_in_stream`, and `weights_in_stream` if asked: a call, as hooks that load parameters wait for it."""
        weights = weights_in_stream(self, stream, segments, cache_layer) if weigh else None
        return attend_in_stream(self, stream, segments, cache_layer), weights

    def respond(
        self,
        q: Tensor,
        kv: Tensor,
        filled: Tensor | None = None,
        state: LinearState | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, LinearState]:
        """Causal attention of the last n columns to all, as `LinearOperator` says: q (B, H P, n) -> (B, H P, n)."""
        query, (key, value) = self.heads(q), map(self.heads, kv.chunk(2, dim=1))
        first = None if positions is None else positions[..., kv.shape[-1] - q.shape[-1] :]
        leaving, past = key, positions
        if self.window and not has_unknown_length(key):  # features of what stays in the window are not needed
            leaving = key[:, :, : max(0, key.shape[2] - self.window + 1)]
            past = None if positions is None else positions[..., : leaving.shape[2]]
        y, state = causal_linear_attention(
            self.query_features(query, first),
            self.k_map(leaving, past),
            value,
            log_features=self.is_log,
            window=self.softmax_window(query, key),
            mask=filled,
            state=state,
        )
        return y.transpose(2, 3).flatten(1, 2), state

    def attend_both_sides(self, q: Tensor, kv: Tensor, filled: Tensor | None) -> Tensor:
        """Attention of every column to all that are filled (B, n); None: all. q (B, H P, n) -> (B, H P, n)."""
        query, (key, value) = self.heads(q), map(self.heads, kv.chunk(2, dim=1))
        y = bidirectional_linear_attention(
            *self.features(query, key),
            value,
            log_features=self.is_log,
            window=self.softmax_window(query, key),
            mask=filled,
        )
        return y.transpose(2, 3).flatten(1, 2)

    def weights(self, query: Tensor, key: Tensor, filled: Tensor | None) -> Tensor:
        """Weights of whole rows of queries (R, H, n, P) on keys (R, K, n, P), of those that are filled (R, n)."""
        if self.replacement is not None:  # its output for values that pick one key each
            eye = torch.eye(key.shape[2], dtype=query.dtype, device=query.device).expand(*key.shape[:3], -1)
            return self.replacement(self, query, key, eye, filled)
        return linear_attention_weights(
            *self.features(query, key),
            log_features=self.is_log,
            window=self.softmax_window(query, key),
            mask=filled,
            causal=self.is_causal,
        ).to(query.dtype)

    def fold(self, kv: Tensor, filled: Tensor | None, state: LinearState | None, positions: Tensor) -> LinearState:
        """The state with columns added, as `LinearOperator` says."""
        key, value = map(self.heads, kv.chunk(2, dim=1))
        features, values = self.k_map(key, positions), with_ones(value, filled)
        exact = torch.promote_types(features.dtype, values.dtype)
        features, values = features.to(exact), values.to(exact)
        if filled is not None:
            nothing = -math.inf if self.is_log else 0.0
            features = features.masked_fill(~filled[:, None, :, None], nothing)
        if state is None:
            state = empty_state(features, self.head_dim, log_features=self.is_log)
        return fold(state, features, values)

    def softmax_window(self, query: Tensor, key: Tensor) -> SoftmaxWindow | None:
        """The window over queries (B, H, n, P) and keys (B, K, N, P); None without one."""
        if self.window_factor is None:
            return None
        exact = torch.promote_types(query.dtype, torch.float32)
        log_weight = nn.functional.logsigmoid(self.window_factor.to(exact))
        return SoftmaxWindow(query.to(exact) * self.scaling, key, self.window, log_weight)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features of whole rows of queries (R, H, n, P) and keys (R, K, n, P), or their logarithms."""
        positions = torch.arange(q.shape[2], device=q.device)
        return self.query_features(q, positions), self.k_map(k, positions)

    def query_features(self, q: Tensor, positions: Tensor | None) -> Tensor:
        """Features of queries (R, H, n, P), or their logarithms.

        Logarithms that share a scale with a window are those of phi / F where phi is a plain list of exponentials: a
        weight is the mean of F products then, as large as exp(score) is for small scores, instead of F times that.
        """
        features = self.q_map(q, positions)
        if self.window_factor is None or not self.sums_exponentials:
            return features
        return features - math.log(features.shape[-1])

    def heads(self, x: Tensor) -> Tensor:
        """Channels (B, H P, n) as heads (B, H, n, P)."""
        return x.unflatten(1, (-1, self.head_dim)).transpose(2, 3)


def attend_in_stream(
    attention: LinearAttention, stream: Tensor, segments: Segments | None, cache_layer: HyenaCacheLayer | None
) -> Tensor:
    """Linear attention of the tokens of a stream to tokens of the same sequence.

    Args:
        attention: The layer's.
        stream: Queries, keys and values (B, L, (H + 2 K) P).
        segments: How the batch divides into sequences; None for a dense batch.
        cache_layer: What the layer remembers of earlier calls, or None.

    Returns:
        (B, L, H P); zero for masked tokens.

    Raises:
        ValueError: The attention is replaced, and there is a cache.
    """
    queries = attention.num_heads * attention.head_dim

    def make_histories(length: int | None, expected: int | None) -> list[LinearHistory]:  # noqa: ARG001 (interface)
        return [LinearHistory(attention.window, fixed=length is not None, queries=queries)]

    def causal(rows: Tensor, counts: Tensor | None) -> Tensor:
        return memory.push(0, rows.transpose(1, 2), counts, attention).transpose(1, 2)

    def whole_rows(rows: Tensor, counts: Tensor | None) -> Tensor:
        x = zero_behind(rows.transpose(1, 2), counts)
        filled = None if counts is None else filled_cells(x.shape[-1], counts)
        if attention.replacement is None:
            return attention.attend_both_sides(x[:, :queries], x[:, queries:], filled).transpose(1, 2)
        query, (key, value) = attention.heads(x[:, :queries]), map(attention.heads, x[:, queries:].chunk(2, dim=1))
        return attention.replacement(attention, query, key, value, filled).transpose(1, 2).flatten(2)

    if attention.replacement is not None and cache_layer is not None:
        raise ValueError("while its attention is replaced, the model takes no cache; pass use_cache=False")
    if attention.replacement is not None or not attention.is_causal:
        return over_rows(segments, whole_rows, stream)
    memory = remembered(make_histories, cache_layer, stream)
    return over_rows(segments, causal, stream)


def weights_in_stream(
    attention: LinearAttention, stream: Tensor, segments: Segments | None, cache_layer: HyenaCacheLayer | None
) -> Tensor:
    """The weights with which `attend_in_stream` takes the mean of values; to be called before it.

    They take O(L^2 F) time and O(L^2) memory, which the attention itself does not.

    Args:
        attention, stream, segments, cache_layer: As there.

    Returns:
        (B, H, L, L), or (B, H, L, S) with a static cache of S tokens; zero for masked tokens.

    Raises:
        ValueError: The cache holds earlier tokens.
    """
    if cache_layer is not None and int(torch.as_tensor(cache_layer.get_seq_length()).max()) > 0:
        raise ValueError(
            "linear attention remembers the sum of earlier keys and values, so there are no weights over each of "
            "them; for output_attentions=True give the whole sequence at once, with use_cache=False"
        )
    queries, keys = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_key_value_heads))
    parts: list[Tensor] = []

    def weigh(rows: Tensor, counts: Tensor | None) -> Tensor:
        x = zero_behind(rows.transpose(1, 2), counts)
        filled = None if counts is None else filled_cells(x.shape[-1], counts)
        q, k = (attention.heads(part) for part in (x[:, :queries], x[:, queries : queries + keys]))
        parts.append(attention.weights(q, k, filled))
        return rows

    batch, length = stream.shape[:2]
    over_rows(segments, weigh, stream)
    weights = weights_without_past(parts, segments, batch, length)
    capacity = None if cache_layer is None else cache_layer.max_cache_len
    return weights if capacity is None else nn.functional.pad(weights, (0, capacity - length))


def init_linear_attention(module: nn.Module) -> bool:
    """Initialise a module of linear attention, as `_init_weights` of a model does; False for any other."""
    if isinstance(module, LinearAttention):
        if module.window_factor is not None:
            init.copy_(module.window_factor, module.initial_window_factor().to(module.window_factor))
    elif isinstance(module, LearnedMap):
        init.copy_(module.weight, module.initial_weight().to(module.weight))
        init.zeros_(module.bias)
    elif isinstance(module, PerformerMap):
        init.copy_(module.directions, module.initial_directions().to(module.directions))
    else:
        return False
    return True


def wants_weights(config: Any, options: dict) -> bool:
    """Whether a call with these options is to give attention weights: as in transformers, eager attention does."""
    asked = options.get("output_attentions", config.output_attentions)
    return bool(asked) and config._attn_implementation == "eager"


__all__ = ["LinearAttention", "init_linear_attention", "wants_weights"]
