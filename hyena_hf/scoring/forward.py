# SPDX-License-Identifier: Apache-2.0
"""What scoring and embedding ask of a model: hidden states and log-probabilities, of batches and of long rows.

Written for Hyena models; other models of transformers run through their public `forward`, whose logits are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from hyena_hf.cache import adopt_cache
from hyena_hf.modeling_hyena import HyenaForCausalLM, HyenaPreTrainedModel


_LOGITS = 1 << 22  # logits that are held at once in float64


class Forward:
    """A model, as scoring sees it.

    Args:
        model: A model of transformers; adapters of peft around it are seen through.

    Attributes:
        model: The transformers model.
        limit: Most tokens of a row; None: any number.
        in_chunks: Whether a row can run in chunks: whether the model is causal.
        num_layers: Blocks.
        vocabulary: Tokens that the model knows.
    """

    def __init__(self, model: Any) -> None:
        inner = model.get_base_model() if type(model).__name__.startswith("PeftModel") else model
        if not isinstance(inner, PreTrainedModel):
            raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
        self.model: Any = inner
        self.base: Any = inner.base_model
        config = inner.config.get_text_config()
        self.is_hyena = isinstance(inner, HyenaPreTrainedModel)
        self.in_chunks = bool(config.is_causal) if self.is_hyena else inner.can_generate()
        self.limit: int | None = _limit(config, self.is_hyena)
        self.num_layers: int = config.num_hidden_layers
        embeddings: Any = inner.get_input_embeddings()
        self.vocabulary: int = embeddings.weight.shape[0]
        self.device: torch.device = embeddings.weight.device

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients, in evaluation mode, with every long filter evaluated once."""
        training = self.model.training
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.is_hyena:
                stack.enter_context(self.model.frozen_filters())
            try:
                self.model.eval()
                yield
            finally:
                self.model.train(training)

    # log-probabilities

    def check_causal(self) -> None:
        """Refuse a model that predicts no next token."""
        if isinstance(self.model, HyenaForCausalLM) or (not self.is_hyena and self.model.can_generate()):
            return
        raise TypeError(
            f"a log-likelihood needs a model that predicts the next token, such as HyenaForCausalLM; got "
            f"{type(self.model).__name__}"
        )

    def log_probs(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logarithms of the probabilities of tokens 1 .. L - 1 of every row given those before.

        What masked columns get is unspecified.

        Args:
            ids: (B, L).
            mask: (B, L), 1 for real tokens; None: all.

        Returns:
            float64 (B, L - 1).
        """
        return self._chosen(self._features(ids, mask, None)[:, :-1], ids[:, 1:])

    def log_probs_in_chunks(self, ids: Tensor, chunk_length: int) -> Iterator[Tensor]:
        """The same of one long row: (1, n) float64 for each chunk.

        Args:
            ids: (1, L).
            chunk_length: Tokens of a chunk.
        """
        start = 0
        for features in self._chunks(ids, chunk_length, self._features):
            following = ids[:, start + 1 : start + 1 + features.shape[1]]
            yield self._chosen(features[:, : following.shape[1]], following)
            start += features.shape[1]

    def _features(self, ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """What logits are made of, hidden states of our models (B, L, D), or logits themselves (B, L, V)."""
        if isinstance(self.model, HyenaForCausalLM):
            return self.hidden(ids, mask, cache, self.num_layers)
        options = {} if cache is None else {"past_key_values": cache}
        return self.model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **options).logits

    def _chosen(self, features: Tensor, following: Tensor) -> Tensor:
        """Log-probabilities of tokens, never holding all logits in float64."""
        head = self.model.lm_head if isinstance(self.model, HyenaForCausalLM) else None
        vocabulary = features.shape[-1] if head is None else self.model.config.vocab_size
        step = max(_LOGITS // (vocabulary * features.shape[0]), 1)
        parts = []
        for start in range(0, features.shape[1], step):
            part = features[:, start : start + step]
            logits = (part if head is None else head(part)).double()
            picked = logits.gather(-1, following[:, start : start + step, None].to(logits.device)).squeeze(-1)
            parts.append(picked - logits.logsumexp(-1))
        return torch.cat(parts, dim=1) if parts else torch.zeros(features.shape[0], 0, dtype=torch.float64)

    # hidden states

    def hidden(self, ids: Tensor, mask: Tensor | None, cache: Any, layer: int) -> Tensor:
        """Hidden states (B, L, D): 0 the embeddings, i those behind block i, the last one behind the final norm."""
        options = {} if cache is None else {"past_key_values": cache}
        if self.in_chunks:
            options["use_cache"] = cache is not None
        if layer == self.num_layers:
            return self.base(input_ids=ids, attention_mask=mask, **options).last_hidden_state
        if not self.is_hyena:
            return self.base(input_ids=ids, attention_mask=mask, output_hidden_states=True, **options).hidden_states[
                layer
            ]
        caught: list[Tensor] = []
        # one layer's, not all of them; the input of a block is the output of the one before
        hook = self.base.layers[layer].register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        try:
            self.base(input_ids=ids, attention_mask=mask, **options)
        finally:
            hook.remove()
        return caught[0]

    def hidden_in_chunks(self, ids: Tensor, chunk_length: int, layer: int) -> Iterator[Tensor]:
        """Hidden states of one long row: (1, n, D) for each chunk."""
        return self._chunks(ids, chunk_length, lambda part, mask, cache: self.hidden(part, mask, cache, layer))

    def _chunks(self, ids: Tensor, chunk_length: int, call: Any) -> Iterator[Tensor]:
        cache = DynamicCache(config=self.model.config)
        if self.is_hyena:
            config, dtype = self.model.config, self.model.dtype
            for cache_layer in adopt_cache(cache, config, ids.shape[0], id(self.base), dtype):
                cache_layer.expected_length = ids.shape[1]
        for part in ids.split(chunk_length, dim=1):
            yield call(part, None, cache)


def _limit(config: Any, is_hyena: bool) -> int | None:
    """Most tokens that a model takes; None: any number."""
    if not is_hyena:
        return getattr(config, "max_position_embeddings", None)
    bounded = config.beyond_trained_length == "refuse" or config.trainable_positional_features
    return config.max_position_embeddings if bounded else None
