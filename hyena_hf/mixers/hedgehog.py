# SPDX-License-Identifier: Apache-2.0
"""Linear attention as a mixer: the projections of attention, feature maps in the place of its softmax."""

from torch import Tensor

from hyena_hf.cache import HyenaCacheLayer, LinearHistory, NoMemory
from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.ops import Segments, over_rows
from hyena_hf.ops.segments import filled_cells, zero_behind

from .attention import HeadProjections, remembered
from .linear_attention import LinearAttention


class HedgehogMixer(HeadProjections):
    """Linear attention, alone or with a window of softmax attention, causal or not.

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:  # noqa: ARG002 (one interface)
        super().__init__(config)
        self.attention = LinearAttention(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            feature_map=config.feature_map,
            feature_dim=config.feature_dim,
            window=config.linear_attention_window,
            scaling=self.scaling,
            max_length=config.max_position_embeddings,
            is_causal=config.is_causal,
        )

    def make_histories(self, length: int | None, expected: int | None) -> list[LinearHistory]:  # noqa: ARG002
        """One empty history; arguments as in `HyenaMixer.make_histories`."""
        queries = self.num_heads * self.head_dim
        return [LinearHistory(self.attention.window, fixed=length is not None, queries=queries)]

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        cache_layer: HyenaCacheLayer | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_,
    ) -> Tensor:
        """Attend to tokens of the same sequence.

        Args:
            hidden_states: (B, L, D).
            segments: How the batch divides into sequences; None for a dense batch.
            cache_layer: What this layer remembers of earlier calls, or None.
            position_embeddings: Cosine and sine (B, L, head_dim).

        Returns:
            (B, L, D).
        """
        memory = remembered(self.make_histories, cache_layer, hidden_states)
        attend = self._attend_to_memory if self.attention.is_causal else self._attend_to_row

        def mix(rows: Tensor, counts: Tensor | None) -> Tensor:
            return attend(memory, rows.transpose(1, 2), counts).transpose(1, 2)

        return self.out_proj(over_rows(segments, mix, self.project(hidden_states, position_embeddings)))

    def _attend_to_memory(self, memory: HyenaCacheLayer | NoMemory, x: Tensor, counts: Tensor | None) -> Tensor:
        """Linear attention of new tokens x (B, C, n) to the remembered ones and to each other."""
        return memory.push(0, x, counts, self.attention)

    def _attend_to_row(self, memory: HyenaCacheLayer | NoMemory, x: Tensor, counts: Tensor | None) -> Tensor:
        """The same of whole rows x (R, C, n) to themselves; a bidirectional model remembers nothing."""
        del memory
        queries = self.num_heads * self.head_dim
        x = zero_behind(x, counts)
        filled = None if counts is None else filled_cells(x.shape[-1], counts)
        return self.attention.attend_both_sides(x[:, :queries], x[:, queries:], filled)


__all__ = ["HedgehogMixer"]
