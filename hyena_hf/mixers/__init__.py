# SPDX-License-Identifier: Apache-2.0
"""What mixes along the sequence in a block: one class each, all with forward(hidden_states, segments, cache_layer)."""

from .attention import HyenaAttention, RotaryEmbedding
from .hedgehog import HedgehogMixer
from .hyena import HyenaMixer


__all__ = ["HedgehogMixer", "HyenaAttention", "HyenaMixer", "RotaryEmbedding"]
