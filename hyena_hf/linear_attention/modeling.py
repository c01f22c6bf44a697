# SPDX-License-Identifier: Apache-2.0
"""Attention models of transformers with linear attention in the place of softmax attention.

Everything but the converted attention modules is transformers' own. A converted module keeps its projections, and asks
a `LinearAttention` what its softmax was asked. Padding, packing and caches are those of Hyena models: dense rows
(`hyena_hf.ops.segments`) and `HyenaCacheLayer`s, so a sequence's outputs do not depend on its batch, and a cache holds
constant memory; layers that keep softmax attention keep transformers' masks and cache layers beside them.
"""

# families take the arguments of `forward` in orders of their own; ours are always passed by name
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hyena_hf.cache import HyenaCacheLayer
from hyena_hf.mixers.linear_attention import (
    LinearAttention,
    init_linear_attention,
    wants_weights,
)
from hyena_hf.modeling_hyena import HyenaModel, check_stream, real_tokens
from hyena_hf.ops import Segments
from hyena_hf.ops.segments import build_segments, document_starts

from .configurations import (
    HEDGEHOG,
    HedgehogBertConfig,
    HedgehogGPT2Config,
    HedgehogLlamaConfig,
    HedgehogMistralConfig,
    HedgehogQwen2Config,
    HedgehogQwen3Config,
)
from .modes import is_replaced


def make_linear_attention(
    config: Any, head_dim: int, key_heads: int, scaling: float, *, is_causal: bool
) -> LinearAttention:
    """The module that takes the place of a layer's softmax."""
    return LinearAttention(
        num_heads=config.num_attention_heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        feature_map=config.feature_map,
        feature_dim=config.feature_dim,
        window=config.linear_attention_window,
        scaling=scaling,
        max_length=config.max_position_embeddings,
        is_causal=is_causal,
    )


def attend(
    attention: LinearAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | None,
    cache_layer: HyenaCacheLayer | None,
    *,
    weigh: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries (B, L, H, P), keys and values (B, L, K, P): (B, L, H P), and weights if asked."""
    stream = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    return attention(stream, segments, cache_layer, weigh=weigh)


class _RotaryAttention:
    """Attention of the Llama family: own projections, norms of queries and keys where there are any, rotary turns."""

    linear_attention: LinearAttention
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    layer_idx: int

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # pyright: ignore (the stock class stands behind)
        self.linear_attention = make_linear_attention(
            config, self.head_dim, config.num_key_value_heads, self.head_dim**-0.5, is_causal=True
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,  # noqa: ARG002 (read where segments are made)
        past_key_values: Cache | None = None,
        segments: Segments | None = None,
        weigh: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D), and the weights (B, H, L, L) if asked."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (projection(hidden_states).view(shape) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if isinstance(self, Qwen3Attention):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        cache_layer = cache_layer_of(past_key_values, self.layer_idx)
        y, weights = attend(self.linear_attention, q, k, v, segments, cache_layer, weigh=weigh)
        return self.o_proj(y), weights


class HedgehogLlamaAttention(_RotaryAttention, LlamaAttention):
    """Linear attention in a Llama."""


class HedgehogMistralAttention(_RotaryAttention, MistralAttention):
    """Linear attention in a Mistral."""


class HedgehogQwen2Attention(_RotaryAttention, Qwen2Attention):
    """Linear attention in a Qwen 2."""


class HedgehogQwen3Attention(_RotaryAttention, Qwen3Attention):
    """Linear attention in a Qwen 3."""


class HedgehogGPT2Attention(GPT2Attention):
    """Linear attention in a GPT-2."""

    linear_attention: LinearAttention
    layer_idx: int

    def __init__(self, config: HedgehogGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.linear_attention = make_linear_attention(
            config, self.head_dim, self.num_heads, self.scaling, is_causal=True
        )

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 (read where segments are made)
        segments: Segments | None = None,
        weigh: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D), and the weights (B, H, L, L) if asked."""
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        q, k, v = (x.view(shape) for x in self.c_attn(hidden_states).split(self.split_size, dim=2))
        cache_layer = cache_layer_of(past_key_values, self.layer_idx)
        y, weights = attend(self.linear_attention, q, k, v, segments, cache_layer, weigh=weigh)
        return self.resid_dropout(self.c_proj(y.contiguous())), weights  # the projection views its input


class HedgehogBertSelfAttention(BertSelfAttention):
    """Linear attention in a BERT encoder."""

    linear_attention: LinearAttention

    def __init__(self, config: HedgehogBertConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        heads = self.num_attention_heads
        self.linear_attention = make_linear_attention(
            config, self.attention_head_size, heads, self.scaling, is_causal=False
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002 (read where segments are made)
        past_key_values: Cache | None = None,  # noqa: ARG002 (an encoder has none)
        segments: Segments | None = None,
        weigh: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D), and the weights (B, H, L, L) if asked."""
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q, k, v = (projection(hidden_states).view(shape) for projection in (self.query, self.key, self.value))
        return attend(self.linear_attention, q, k, v, segments, None, weigh=weigh)


def cache_layer_of(cache: Cache | None, layer_idx: int) -> HyenaCacheLayer | None:
    """The layer of a cache, which `_Converted.forward` has seen to."""
    return None if cache is None else cache.layers[layer_idx]  # pyright: ignore (its kind was checked)


class _Loaded:
    """What all converted models share: initialisation of the maps, and no file without them."""

    config: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not init_linear_attention(module):
            super()._init_weights(module)  # pyright: ignore (the stock class stands behind)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002 (its signature)
        # modules without parameters of their own are not skipped: all of ours go through `init`
        super()._initialize_weights(module)  # pyright: ignore (the stock class stands behind)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a model as transformers does, but refuse a file without feature maps.

        Raises:
            ValueError: Tensors of linear attention are missing: they would be random.
        """
        loaded: Any = super().from_pretrained(  # pyright: ignore (the stock class stands behind)
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if ".linear_attention." in key)
        if missing and not output_loading_info:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of linear attention (first "
                f"{missing[:2]}): no converted model was saved there; use convert_attention on a model of softmax "
                f"attention"
            )
        return loaded if output_loading_info else model

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """The mask as it is: `forward` makes of it what each kind of layer needs."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        """None while the attention is replaced (`attention_mode`): every token then reads all before it again."""
        if is_replaced(self) and model_kwargs.get("past_key_values") is None:
            generation_config.use_cache = False
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # pyright: ignore


class _Converted(_Loaded):
    """A base model whose converted layers get segments and cache layers."""

    masks_by_type = False  # whether the family's layers look their mask up by the name of their type

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model, but for what follows.

        Args:
            attention_mask: 1 for real tokens (B, past + L). Masked tokens do not exist: the others get the values of
                the sequence without them, in encoders too.
            position_ids: Counted without masked tokens where left out. (Stock BERT and a plain forward of stock GPT-2
                count those as well, so with left padding they differ from the sequence alone; given positions are used
                as they are.) Without a mask and a cache a document begins wherever they do not rise by one.
            kwargs: Those of the family. `seq_idx` and `cu_seq_lens_q` divide packed batches, as in `HyenaModel`.
                `output_attentions` gives weights of all layers with eager attention; behind tokens in a cache there
                are none, and it is refused.

        Raises:
            ValueError: Packed documents behind a cache, or in layers that cannot tell them apart.
        """
        config = self.config
        batch, length, device = check_stream(input_ids, inputs_embeds, config)
        stream: Any = input_ids if input_ids is not None else inputs_embeds
        cache, layers = past_key_values, []
        told = attention_mask is not None or cache is not None
        starts = document_starts(
            batch,
            length,
            seq_idx=kwargs.get("seq_idx"),
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
            position_ids=None if told else position_ids,
        )
        if starts is not None and cache is not None:
            raise ValueError(
                "packed documents cannot share a cache with what follows them; leave past_key_values out, or give "
                "each document its own row"
            )
        use_cache = self._uses_cache(use_cache) and starts is None
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if cache is not None:
            layers = _layers_of(cache, config, id(self), batch)
        first = layers[0] if layers else None
        mask = real_tokens(attention_mask, batch, length, 0 if first is None else first.get_seq_length())
        segments = build_segments(mask, starts, cached=first is not None)
        self._check_distances(first, length if segments is None else segments.max_length)
        if position_ids is None:
            position_ids = HyenaModel._positions(first, segments, length, device)
        output = super().forward(  # pyright: ignore (the stock class stands behind)
            # GPT-2 views what a chunked prefill slices
            input_ids=None if input_ids is None else input_ids.contiguous(),
            attention_mask=self._softmax_mask(
                stream, attention_mask, position_ids, cache, None if starts is None else segments
            ),
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            segments=segments,
            weigh=wants_weights(config, kwargs),  # GPT-2 hands no such option on to its layers
            **({"past_key_values": cache, "use_cache": use_cache} if self._is_decoder() else {}),
            **kwargs,
        )
        for layer in layers:
            layer.owner = id(self)
            layer.advance(length, mask)
        return output

    def _check_distances(self, first: HyenaCacheLayer | None, new: int) -> None:
        """Refuse sequences over which the cosformer's weights would turn negative."""
        config = self.config
        if config.feature_map != "cosformer" or torch.compiler.is_compiling():
            return
        total = new + (0 if first is None else int(torch.as_tensor(first.tokens).max()))
        if total > config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {total} tokens exceeds max_position_embeddings ({config.max_position_embeddings}), "
                f"beyond which the cosformer map gives negative weights; shorten it"
            )

    def _is_decoder(self) -> bool:
        return True

    def _uses_cache(self, use_cache: bool | None) -> bool:
        wanted = self.config.use_cache if use_cache is None else use_cache
        checkpointing = getattr(self, "gradient_checkpointing", False) and getattr(self, "training", False)
        return bool(wanted) and not checkpointing and not (use_cache is None and is_replaced(self))

    def _softmax_mask(
        self,
        stream: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        packed: Segments | None,
    ) -> Any:
        """What the layers with softmax attention get; where there are none, something that makes no square mask.

        Args:
            stream: Ids (B, L) or embeddings (B, L, D).
            attention_mask: As in `forward`.
            position_ids: (B, L).
            cache: The call's, or None.
            packed: Where documents are packed: how.
        """
        softmax = {kind for kind in self.config.layer_types if kind != HEDGEHOG}
        unused = torch.zeros(1, 1, 1, 1, device=stream.device)
        if packed is not None and softmax:
            attention_mask = self._without_padding(attention_mask)
            position_ids = packed.positions  # by which transformers tells documents apart
        if not self.masks_by_type:
            if not softmax:
                return unused
            if packed is None:
                return None if attention_mask is None else attention_mask.contiguous()
            return self._mask_of("full_attention", stream, attention_mask, position_ids, cache)
        masks: dict[str, Any] = {HEDGEHOG: None}
        return masks | {kind: self._mask_of(kind, stream, attention_mask, position_ids, cache) for kind in softmax}

    def _mask_of(
        self, kind: str, stream: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None
    ) -> Any:
        make = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        return make(
            config=self.config,
            inputs_embeds=stream if stream.ndim == 3 else stream.unsqueeze(-1).to(self.dtype),  # pyright: ignore
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )

    def _without_padding(self, attention_mask: Tensor | None) -> None:
        """Refuse what layers with softmax attention cannot do with packed documents."""
        if not self._is_decoder():
            raise ValueError(
                "layers of this encoder that keep softmax attention cannot tell packed documents apart; give each "
                "document its own row, or convert all layers"
            )
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "packed documents with masked tokens among them cannot be told apart by the layers that keep softmax "
                "attention; leave attention_mask out and make the padding a document of its own"
            )


def _layers_of(cache: Cache, config: Any, owner: int, batch: int) -> list[HyenaCacheLayer]:
    """The layers of a cache that belong to converted layers; an empty cache without a config gets its layers here.

    Raises:
        TypeError: It is no transformers cache.
        ValueError: It was made for another model, or for another number of sequences.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}; use DynamicCache")
    if isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            "past_key_values is an EncoderDecoderCache, but these models are no encoder-decoders; use DynamicCache"
        )
    if not cache.layers and cache.layer_class_to_replicate is not None:
        kinds = [HyenaCacheLayer if kind == HEDGEHOG else DynamicLayer for kind in config.layer_types]
        cache.layers.extend(kind() for kind in kinds)
        cache.layer_class_to_replicate = None
    ours = [cache.layers[index] for index in config.linear_layers if index < len(cache.layers)]
    known = [layer for layer in ours if isinstance(layer, HyenaCacheLayer)]
    if len(cache.layers) != len(config.layer_types) or len(known) != len(ours):
        raise ValueError("the cache was made for another model; build one with DynamicCache(config=model.config)")
    if any(layer.is_initialized and layer.owner != owner for layer in known):
        raise ValueError("the cache was filled by another model; start with an empty one for each model")
    held = {layer.batch_size for layer in known if layer.is_initialized}
    if held and held != {batch}:
        raise ValueError(
            f"the cache holds {min(held)} sequences but the batch has {batch}; use batch_select_indices or "
            f"batch_repeat_interleave, or start with an empty cache"
        )
    return known


class HedgehogBertModel(_Converted, BertModel):
    """A BERT encoder with linear attention."""

    config_class = HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig, add_pooling_layer: bool = True) -> None:
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("only BERT encoders are converted, and is_decoder or add_cross_attention is True")
        super().__init__(config, add_pooling_layer)
        for index in config.linear_layers:
            self.encoder.layer[index].attention.self = HedgehogBertSelfAttention(config, index)  # pyright: ignore (a module)
        self.post_init()

    def _is_decoder(self) -> bool:
        return False

    def _uses_cache(self, use_cache: bool | None) -> bool:  # noqa: ARG002 (one interface)
        return False


class HedgehogGPT2Model(_Converted, GPT2Model):
    """A GPT-2 with linear attention."""

    config_class = HedgehogGPT2Config

    def __init__(self, config: HedgehogGPT2Config) -> None:
        if config.add_cross_attention:
            raise ValueError("a GPT-2 with cross-attention is not converted; set add_cross_attention=False")
        super().__init__(config)
        for index in config.linear_layers:
            self.h[index].attn = HedgehogGPT2Attention(config, index)
        self.post_init()


class HedgehogLlamaModel(_Converted, LlamaModel):
    """A Llama with linear attention."""

    config_class = HedgehogLlamaConfig

    def __init__(self, config: HedgehogLlamaConfig) -> None:
        super().__init__(config)
        for index in config.linear_layers:
            self.layers[index].self_attn = HedgehogLlamaAttention(config, index)
        self.post_init()


class HedgehogLlamaForCausalLM(_Loaded, LlamaForCausalLM):
    """A Llama language model with linear attention."""

    config_class = HedgehogLlamaConfig

    def __init__(self, config: HedgehogLlamaConfig) -> None:
        super().__init__(config)
        self.model = HedgehogLlamaModel(config)
        self.post_init()


class HedgehogLlamaForSequenceClassification(_Loaded, LlamaForSequenceClassification):
    """A Llama classifier of sequences with linear attention."""

    config_class = HedgehogLlamaConfig

    def __init__(self, config: HedgehogLlamaConfig) -> None:
        super().__init__(config)
        self.model = HedgehogLlamaModel(config)
        self.post_init()


class HedgehogMistralModel(_Converted, MistralModel):
    """A Mistral with linear attention."""

    config_class = HedgehogMistralConfig

    def __init__(self, config: HedgehogMistralConfig) -> None:
        super().__init__(config)
        for index in config.linear_layers:
            self.layers[index].self_attn = HedgehogMistralAttention(config, index)
        self.post_init()


class HedgehogMistralForCausalLM(_Loaded, MistralForCausalLM):
    """A Mistral language model with linear attention."""

    config_class = HedgehogMistralConfig

    def __init__(self, config: HedgehogMistralConfig) -> None:
        super().__init__(config)
        self.model = HedgehogMistralModel(config)
        self.post_init()


class HedgehogMistralForSequenceClassification(_Loaded, MistralForSequenceClassification):
    """A Mistral classifier of sequences with linear attention."""

    config_class = HedgehogMistralConfig

    def __init__(self, config: HedgehogMistralConfig) -> None:
        super().__init__(config)
        self.model = HedgehogMistralModel(config)
        self.post_init()


class HedgehogQwen2Model(_Converted, Qwen2Model):
    """A Qwen2 with linear attention."""

    config_class = HedgehogQwen2Config
    masks_by_type = True

    def __init__(self, config: HedgehogQwen2Config) -> None:
        super().__init__(config)
        for index in config.linear_layers:
            self.layers[index].self_attn = HedgehogQwen2Attention(config, index)
        self.post_init()


class HedgehogQwen2ForCausalLM(_Loaded, Qwen2ForCausalLM):
    """A Qwen2 language model with linear attention."""

    config_class = HedgehogQwen2Config

    def __init__(self, config: HedgehogQwen2Config) -> None:
        super().__init__(config)
        self.model = HedgehogQwen2Model(config)
        self.post_init()


class HedgehogQwen2ForSequenceClassification(_Loaded, Qwen2ForSequenceClassification):
    """A Qwen2 classifier of sequences with linear attention."""

    config_class = HedgehogQwen2Config

    def __init__(self, config: HedgehogQwen2Config) -> None:
        super().__init__(config)
        self.model = HedgehogQwen2Model(config)
        self.post_init()


class HedgehogQwen3Model(_Converted, Qwen3Model):
    """A Qwen3 with linear attention."""

    config_class = HedgehogQwen3Config
    masks_by_type = True

    def __init__(self, config: HedgehogQwen3Config) -> None:
        super().__init__(config)
        for index in config.linear_layers:
            self.layers[index].self_attn = HedgehogQwen3Attention(config, index)
        self.post_init()


class HedgehogQwen3ForCausalLM(_Loaded, Qwen3ForCausalLM):
    """A Qwen3 language model with linear attention."""

    config_class = HedgehogQwen3Config

    def __init__(self, config: HedgehogQwen3Config) -> None:
        super().__init__(config)
        self.model = HedgehogQwen3Model(config)
        self.post_init()


class HedgehogQwen3ForSequenceClassification(_Loaded, Qwen3ForSequenceClassification):
    """A Qwen3 classifier of sequences with linear attention."""

    config_class = HedgehogQwen3Config

    def __init__(self, config: HedgehogQwen3Config) -> None:
        super().__init__(config)
        self.model = HedgehogQwen3Model(config)
        self.post_init()


class HedgehogGPT2ForCausalLM(_Loaded, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with linear attention."""

    config_class = HedgehogGPT2Config

    def __init__(self, config: HedgehogGPT2Config) -> None:
        super().__init__(config)
        self.transformer = HedgehogGPT2Model(config)
        self.post_init()


class HedgehogGPT2ForSequenceClassification(_Loaded, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` with linear attention."""

    config_class = HedgehogGPT2Config

    def __init__(self, config: HedgehogGPT2Config) -> None:
        super().__init__(config)
        self.transformer = HedgehogGPT2Model(config)
        self.post_init()


class HedgehogBertForMaskedLM(_Loaded, BertForMaskedLM):
    """`BertForMaskedLM` with linear attention."""

    config_class = HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig) -> None:
        super().__init__(config)
        self.bert = HedgehogBertModel(config, add_pooling_layer=False)
        self.post_init()


class HedgehogBertForSequenceClassification(_Loaded, BertForSequenceClassification):
    """`BertForSequenceClassification` with linear attention."""

    config_class = HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig) -> None:
        super().__init__(config)
        self.bert = HedgehogBertModel(config, add_pooling_layer=True)
        self.post_init()


class HedgehogBertForTokenClassification(_Loaded, BertForTokenClassification):
    """`BertForTokenClassification` with linear attention."""

    config_class = HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig) -> None:
        super().__init__(config)
        self.bert = HedgehogBertModel(config, add_pooling_layer=False)
        self.post_init()


class HedgehogBertForQuestionAnswering(_Loaded, BertForQuestionAnswering):
    """`BertForQuestionAnswering` with linear attention."""

    config_class = HedgehogBertConfig

    def __init__(self, config: HedgehogBertConfig) -> None:
        super().__init__(config)
        self.bert = HedgehogBertModel(config, add_pooling_layer=False)
        self.post_init()
