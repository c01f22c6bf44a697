# SPDX-License-Identifier: Apache-2.0
"""Softmax attention, full or sliding, grouped-query, rotary: the other mixer of hybrid models.

It runs through transformers' attention interface, so every implementation registered there serves. Like all mixers it
sees dense left-aligned rows; keys and values of earlier calls are right-aligned before them, hence the usual causal
and sliding masks are right for every row, and unequal rows differ only by empty columns at the left. In bidirectional
models there are no earlier calls, and unequal rows differ by empty columns at the right.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyena_hf.cache import AttentionHistory, HyenaCacheLayer, NoMemory
from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import AtLeastFloat32
from hyena_hf.ops import Segments, over_rows
from hyena_hf.ops.attention_weights import weights_with_past, weights_without_past
from hyena_hf.ops.segments import filled_cells


def rotary_frequencies(config: HyenaConfig) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary embedding in float32 (head_dim / 2,), and the factor on cosine and sine."""
    rope_type = config.rope_parameters["rope_type"]
    if config.rope_frequency_dtype == "bfloat16":
        # rounded before positions are scaled, as in the published files
        factor = config.rope_parameters["factor"] if rope_type == "linear" else 1.0
        return rotary_formula(config).to(torch.bfloat16).to(torch.float32) / factor, 1.0
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config)
    return rotary_formula(config), 1.0


def rotary_formula(config: HyenaConfig) -> Tensor:
    """Inverse frequencies of the original formula in float32 (head_dim / 2,)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents


class RotaryEmbedding(AtLeastFloat32):
    """Cosine and sine of the rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves not interleaved.

    Frequencies rounded to bfloat16 would turn distant positions by a wrong angle.
    """

    inv_freq: Tensor

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        frequencies, self.scaling = rotary_frequencies(config)
        self.register_buffer("inv_freq", frequencies.to(torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, L, head_dim) in the dtype of x for positions (B, L), formed in float32 at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        angles = position_ids.unsqueeze(-1).to(exact) * self.inv_freq.to(exact)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x (B, L, H, P) by their positions, given cosine and sine (B, L, P)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(2)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for `attn_implementation="eager"`: query (B, H, n, P) -> ((B, n, H, P), weights)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


Attend = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Memory = HyenaCacheLayer | NoMemory


def _see_earlier(window: int | None) -> Callable:
    """Mask function of causal attention."""
    return causal_mask_function if window is None else sliding_window_causal_mask_function(window)


def _see_both_sides(window: int | None) -> Callable:
    """Mask function of bidirectional attention; a window is as wide on either side as that of causal attention."""
    if window is None:
        return bidirectional_mask_function

    def within_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 (interface)
        return (query - key).abs() < window

    return within_window


def _attend_to_memory(memory: Memory, x: Tensor, counts: Tensor | None, queries: int, attend: Attend) -> Tensor:
    """Attention of new tokens x (B, C, n) to the remembered ones and to each other."""
    del queries  # the memory knows
    return memory.push(0, x, counts, attend)


def _attend_to_row(memory: Memory, x: Tensor, counts: Tensor | None, queries: int, attend: Attend) -> Tensor:
    """Attention of whole rows x (R, C, n) to themselves; a bidirectional model remembers nothing."""
    del memory
    filled = None if counts is None else filled_cells(x.shape[-1], counts.clamp(min=1))  # softmax needs one key
    return attend(x[:, :queries], x[:, queries:], filled)


def remembered(make: Callable, cache_layer: HyenaCacheLayer | None, hidden_states: Tensor) -> Memory:
    """The cache layer, set up by `make` on first use; without one, empty histories for this call alone."""
    if cache_layer is None:
        return NoMemory(make(None, None))
    cache_layer.attach(make, hidden_states.shape[0], hidden_states.device)
    return cache_layer


class AttentionWeights(nn.Module):
    """Passes the weights of a layer on, (B, H, L, S + L): transformers records what goes through."""

    def forward(self, weights: Tensor) -> Tensor:
        """The weights as they come."""
        return weights


class HeadProjections(nn.Module):
    """Queries, keys and values of the heads of a layer, and the way back.

    Args:
        config: The model's config.
    """

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        width, bias = config.hidden_size, config.has_bias("qkv_proj")
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=config.has_bias("attention_out_proj"))

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values (B, L, (H + 2 H_kv) P) of (B, L, D), the first two turned by their positions."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k = (projection(hidden_states).view(heads) for projection in (self.q_proj, self.k_proj))
        if position_embeddings is not None:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        return torch.cat([q.flatten(2), k.flatten(2), self.v_proj(hidden_states)], dim=-1)


class HyenaAttention(HeadProjections):
    """Softmax attention, full or over a sliding window, causal or not.

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__(config)
        self.is_causal = config.is_causal  # read by transformers' attention functions
        self.visible = _see_earlier if config.is_causal else _see_both_sides
        self.attend_in_rows = _attend_to_memory if config.is_causal else _attend_to_row
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.weights = AttentionWeights()

    def make_histories(self, length: int | None, expected: int | None) -> list[AttentionHistory]:
        """One empty history of keys and values; arguments as in `HyenaMixer.make_histories`."""
        limit = length if self.sliding_window is None else self.sliding_window - 1
        queries = self.num_heads * self.head_dim
        return [AttentionHistory(limit, fixed=length is not None, capacity=expected, queries=queries)]

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        cache_layer: HyenaCacheLayer | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend to tokens of the same sequence.

        Args:
            hidden_states: (B, L, D).
            segments: How the batch divides into sequences; None for a dense batch.
            cache_layer: What this layer remembers of earlier calls, or None.
            position_embeddings: Cosine and sine (B, L, head_dim).
            kwargs: Handed to the attention function.

        Returns:
            (B, L, D).
        """
        memory = remembered(self.make_histories, cache_layer, hidden_states)
        stream = self.project(hidden_states, position_embeddings)

        lay_out = self.layout(memory, segments, hidden_states, kwargs)
        parts: list[Tensor] = []

        def attend(q: Tensor, kv: Tensor, filled: Tensor | None) -> Tensor:
            y, weights = self.attend(q, kv, filled, **kwargs)
            if lay_out is not None and weights is not None:
                parts.append(weights)
            return y

        def mix(rows: Tensor, counts: Tensor | None) -> Tensor:
            x = rows.transpose(1, 2)
            return self.attend_in_rows(memory, x, counts, self.num_heads * self.head_dim, attend).transpose(1, 2)

        y = over_rows(segments, mix, stream)
        if lay_out is not None and parts:
            self.weights(lay_out(parts))
        return self.out_proj(y)

    def layout(
        self, memory: Memory, segments: Segments | None, hidden_states: Tensor, kwargs: dict
    ) -> Callable[[list[Tensor]], Tensor] | None:
        """How the weights of this call become those over the caller's columns; None when nobody asks for them.

        To be called before the call's tokens are pushed.
        """
        if not kwargs.get("output_attentions", self.config.output_attentions):
            return None
        batch, length = hidden_states.shape[:2]
        if isinstance(memory, NoMemory):
            return lambda parts: weights_without_past(parts, segments, batch, length)
        past, dense = memory.real_columns(), torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        if segments is not None:
            dense = torch.zeros_like(dense).flatten()
            dense[segments.groups[0].source] = True
        real = torch.cat([past, dense.view(batch, length)], dim=1)
        committed = past.sum(1) - memory.histories[0].waiting
        width = real.shape[1] if memory.max_cache_len is None else memory.max_cache_len
        equal_rows = segments is None and not memory.ragged

        def lay_out(parts: list[Tensor]) -> Tensor:
            if equal_rows and parts[0].shape[-2:] == (length, width):
                return parts[0]
            return weights_with_past(parts[0], real, length, committed, width)

        return lay_out

    def attend(self, q: Tensor, kv: Tensor, filled: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention of the last n columns to all.

        Args:
            q: Queries (B, H P, n).
            kv: Keys and values (B, 2 H_kv P, T + n), right-aligned.
            filled: True for the columns of each row that hold keys and values (B, T + n); None: all.
            kwargs: Handed to the attention function.

        Returns:
            (B, H P, n), and the weights (B, H, n, T + n) where the implementation gives them.
        """
        batch, new, total = q.shape[0], q.shape[-1], kv.shape[-1]
        query, key, value = (
            x.view(batch, -1, self.head_dim, x.shape[-1]).mT.contiguous() for x in (q, *kv.chunk(2, dim=1))
        )
        implementation = self.config._attn_implementation or "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value,
            self.mask(batch, new, total, filled, q),
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output.reshape(batch, new, -1).mT, weights

    def mask(self, batch: int, new: int, total: int, filled: Tensor | None, like: Tensor) -> Tensor | None:
        """The mask in the form that the attention implementation reads."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation or "eager"](
            batch_size=batch,
            q_length=new,
            kv_length=total,
            q_offset=total - new,
            kv_offset=0,
            mask_function=self.visible(self.sliding_window),
            attention_mask=filled,
            local_size=self.sliding_window,
            allow_is_causal_skip=self.is_causal,
            allow_is_bidirectional_skip=not self.is_causal,
            dtype=like.dtype,
            device=like.device,
            config=self.config,
        )


__all__ = ["AttentionWeights", "HyenaAttention", "RotaryEmbedding"]
