# SPDX-License-Identifier: Apache-2.0
"""Linear attention as a mixer: the projections of attention, feature maps in the place of its softmax."""

from torch import Tensor

from hyena_hf.cache import HyenaCacheLayer
from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.ops import Segments

from .attention import AttentionWeights, HeadProjections
from .linear_attention import LinearAttention, wants_weights


class HedgehogMixer(HeadProjections):
    """Linear attention, alone or with a window of softmax attention, causal or not.

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:  # noqa: ARG002 (one interface)
        super().__init__(config)
        self.config, self.weights = config, AttentionWeights()
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
            # measured on a language model and on recall (benchmarks/results/linear_attention_tried.md): alone, linear
            # attention needs scores as large as softmax's to begin with; beside a window, exponentials that large bury
            # it. A tenth, as where trained attention is converted, would bury it as well
            initial_scale=1.0 if config.linear_attention_window else self.head_dim**0.25,
            initial_window_weight=0.9,
        )

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
            kwargs: Only `output_attentions` is read.

        Returns:
            (B, L, D).
        """
        stream = self.project(hidden_states, position_embeddings)
        y, weights = self.attention(stream, segments, cache_layer, weigh=wants_weights(self.config, kwargs))
        if weights is not None:
            self.weights(weights)
        return self.out_proj(y)


__all__ = ["HedgehogMixer"]
