# SPDX-License-Identifier: Apache-2.0
"""Softmax attention, full or sliding, grouped-query, rotary: the other mixer of hybrid models.

It runs through transformers' attention interface, so every implementation registered there serves. Like all mixers it
sees dense left-aligned rows; keys and values of earlier calls are right-aligned before them, hence the usual causal
and sliding masks are right for every row, and unequal rows differ only by empty columns at the left.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hyena_hf.cache import AttentionHistory, HyenaCacheLayer, NoMemory
from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import AtLeastFloat32
from hyena_hf.ops import Segments, over_rows


def rotary_frequencies(config: HyenaConfig) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary embedding in float32 (head_dim / 2,), and the factor on cosine and sine."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


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
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, L, 1, head_dim) for positions (B, L), formed in float32 at least."""
        exact = torch.promote_types(dtype, torch.float32)
        angles = position_ids.unsqueeze(-1).to(exact) * self.inv_freq.to(exact)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(2)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x (B, L, H, P) by their positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


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


class HyenaAttention(nn.Module):
    """Causal softmax attention, full or over a sliding window.

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    is_causal = True  # read by transformers' attention functions

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        width, bias = config.hidden_size, config.use_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)

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
        """Attend to earlier tokens of the same sequence.

        Args:
            hidden_states: (B, L, D).
            segments: How the batch divides into sequences; None for a dense batch.
            cache_layer: What this layer remembers of earlier calls, or None.
            position_embeddings: Cosine and sine (B, L, 1, head_dim).
            kwargs: Handed to the attention function.

        Returns:
            (B, L, D).
        """
        if cache_layer is None:
            memory = NoMemory(self.make_histories(None, None))
        else:
            memory = cache_layer
            memory.attach(self.make_histories, hidden_states.shape[0], hidden_states.device)

        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k = (projection(hidden_states).view(heads) for projection in (self.q_proj, self.k_proj))
        if position_embeddings is not None:
            q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        stream = torch.cat([q.flatten(2), k.flatten(2), self.v_proj(hidden_states)], dim=-1)

        def attend(q: Tensor, kv: Tensor, empty: Tensor | None) -> Tensor:
            return self.attend(q, kv, empty, **kwargs)

        def mix(rows: Tensor, counts: Tensor | None) -> Tensor:
            return memory.push(0, rows.transpose(1, 2), counts, attend).transpose(1, 2)

        return self.out_proj(over_rows(segments, mix, stream))

    def attend(self, q: Tensor, kv: Tensor, empty: Tensor | None, **kwargs) -> Tensor:
        """Attention of the last n columns to all.

        Args:
            q: Queries (B, H P, n).
            kv: Keys and values (B, 2 H_kv P, T + n), right-aligned.
            empty: Columns at the left of each row that hold nothing (B,); None: none.
            kwargs: Handed to the attention function.

        Returns:
            (B, H P, n).
        """
        batch, new, total = q.shape[0], q.shape[-1], kv.shape[-1]
        query, key, value = (
            x.view(batch, -1, self.head_dim, x.shape[-1]).mT.contiguous() for x in (q, *kv.chunk(2, dim=1))
        )
        implementation = self.config._attn_implementation or "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, _ = attention(
            self,
            query,
            key,
            value,
            self.mask(batch, new, total, empty, q),
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output.reshape(batch, new, -1).mT

    def mask(self, batch: int, new: int, total: int, empty: Tensor | None, like: Tensor) -> Tensor | None:
        """The mask in the form that the attention implementation reads."""
        window = self.sliding_window
        filled = None
        if empty is not None:
            filled = torch.arange(total, device=like.device) >= empty.unsqueeze(1)
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation or "eager"](
            batch_size=batch,
            q_length=new,
            kv_length=total,
            q_offset=total - new,
            kv_offset=0,
            mask_function=causal_mask_function if window is None else sliding_window_causal_mask_function(window),
            attention_mask=filled,
            local_size=window,
            allow_is_causal_skip=True,
            dtype=like.dtype,
            device=like.device,
            config=self.config,
        )


__all__ = ["HyenaAttention", "RotaryEmbedding"]
