# SPDX-License-Identifier: Apache-2.0
"""Hyena language models as transformers models.

What differs from a Llama-style model:

- the mixer of each layer is a Hyena operator (long convolutions and gates) or attention, as `config.layer_types` says;
- there are no positions but for rotary attention: order lives in the filters;
- padding, packing and caches are resolved once per `forward` into `Segments`; mixers see dense rows only;
- filters stay in float32 whatever the dtype of the model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block_diagonal import BlockDiagonalLinear
from .cache import FrozenTaps, HyenaCacheLayer, Plan, adopt_cache, in_turn
from .configuration_hyena import HyenaConfig
from .filters import FILTERS, ExplicitFilter, FilterLinear, ImplicitFilter, ModalFilter, decay_rates
from .mixers import HedgehogMixer, HyenaAttention, HyenaMixer, RotaryEmbedding
from .mixers.attention import AttentionWeights, rotary_frequencies
from .mixers.hyena import ResidualConv, ShortConv
from .mixers.linear_attention import init_linear_attention
from .mixers.projections import is_plain
from .ops import Segments
from .ops.engine import is_traced
from .ops.segments import build_segments, check_positions, document_starts, number_documents, segments_from_ends


class HyenaRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (exact * self.scale(exact)).to(x.dtype)

    def scale(self, x: Tensor) -> Tensor:
        """What every row of x (..., D) is multiplied by, (..., 1)."""
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class HyenaOuterEpsRMSNorm(HyenaRMSNorm):
    """x / (sqrt(mean(x^2)) + eps) * weight: the norm of StripedHyena and Evo."""

    def scale(self, x: Tensor) -> Tensor:
        """What every row of x (..., D) is multiplied by, (..., 1)."""
        # a norm, whose gradient at zero is zero, where that of a root is infinite
        return 1 / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + self.eps)


class HyenaLayerNorm(nn.LayerNorm):
    """Layer norm whose weight gradients are summed in float32 at least: torch's CPU kernel sums them in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype == self.weight.dtype == torch.float32:
            return super().forward(input)
        exact = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        return nn.functional.layer_norm(input.to(exact), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


NORMS: dict[str, type[HyenaLayerNorm] | type[HyenaRMSNorm]] = {
    "layer_norm": HyenaLayerNorm,
    "rms_norm": HyenaRMSNorm,
    "rms_norm_outer_eps": HyenaOuterEpsRMSNorm,
}


def make_norm(config: HyenaConfig, eps: float | None = None) -> nn.LayerNorm | HyenaRMSNorm:
    """The norm that the config names, with its epsilon unless one is given."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps if eps is None else eps)


def make_mixer_norm(config: HyenaConfig) -> nn.LayerNorm | HyenaRMSNorm | None:
    """The norm before a mixer, where blocks have one."""
    if config.block_type == "pre_norm":
        return make_norm(config)
    # its published form has torch's epsilon, whatever that of the other norms
    return make_norm(config, eps=1e-5) if config.block_type == "monarch_mixer_norm" else None


class HyenaMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    Without gradients a CPU takes the tokens in tiles: nobody needs the inner activations of a whole long input, and
    fresh memory for them costs a system more than an activation function. Not in training mode, where checkpointing
    runs a layer without gradients first and must draw the same dropout again, nor where adapters or hooks would see
    tiles instead of rows.
    """

    _TILE = 1024  # tokens

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        inner, bias = config.intermediate_size, config.has_mlp_bias("up_proj")
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.has_mlp_bias("down_proj"))
        self.activation = ACT2FN[config.activation(layer_idx)]
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.training or torch.is_grad_enabled() or is_traced()
        if whole or x.shape[:-1].numel() <= self._TILE or not self._is_plain(x):
            return self._apply_to(x)
        tiles = x.flatten(0, -2).split(self._TILE)
        return torch.cat([self._apply_to(tile) for tile in tiles]).unflatten(0, x.shape[:-1])

    def _is_plain(self, x: Tensor) -> bool:
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return all(is_plain(linear, x) for linear in linears if linear is not None)

    def _apply_to(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x)) * up
        return self.down_proj(self.dropout(inner))


class BlockDiagonalMLP(nn.Module):
    """`HyenaMLP` with block-diagonal weights; when gated, one of them gives what gates and then what is gated.

    That is the form of M2-BERT, in which the two halves do not see the same inputs: with two blocks the first half of
    the inputs gates what comes from the second.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner, blocks = config.hidden_size, config.intermediate_size, config.mlp_blocks
        self.gated = config.gated_mlp
        outputs = 2 * inner if self.gated else inner
        self.up_proj = BlockDiagonalLinear(width, outputs, blocks, config.has_mlp_bias("up_proj"))
        self.down_proj = BlockDiagonalLinear(inner, width, blocks, config.has_mlp_bias("down_proj"))
        self.activation = ACT2FN[config.activation(layer_idx)]
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(up)
        return self.down_proj(self.dropout(inner))


MIXERS: dict[str, type[HyenaMixer | HyenaAttention | HedgehogMixer]] = {
    "hyena": HyenaMixer,
    "full_attention": HyenaAttention,
    "sliding_attention": HyenaAttention,
    "hedgehog": HedgehogMixer,
}


class HyenaDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or a block of M2-BERT, see `block_type` of the config."""

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        mixer = MIXERS[config.layer_types[layer_idx]]
        self.is_pre_norm = config.block_type == "pre_norm"
        self.mixer_norm = make_mixer_norm(config)
        self.mixer = mixer(config, layer_idx)
        self.mlp_norm = make_norm(config)
        mlp = HyenaMLP if config.mlp_blocks == 1 else BlockDiagonalMLP
        self.mlp = mlp(config, layer_idx)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        segments: Segments | None = None,
        cache_layer: HyenaCacheLayer | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        # the residual stream may be wider (float32) than the weights; quantised projections have no such dtype
        dtype = self.mlp_norm.weight.dtype
        mixed = self.mixer(
            hidden_states if self.mixer_norm is None else self.mixer_norm(hidden_states.to(dtype)),
            segments=segments,
            cache_layer=cache_layer,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if not self.is_pre_norm:
            mixed = self.dropout(mixed)
            return self.mlp_norm(mixed + self.dropout(self.mlp(mixed)))
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states.to(dtype))))


class CheckpointShapeError(ValueError, RuntimeError):
    """A checkpoint holds tensors of other shapes than the model; transformers' word for it is RuntimeError."""


class HyenaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by all Hyena models."""

    config: HyenaConfig
    config_class = HyenaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyenaDecoderLayer"]  # noqa: RUF012 (transformers' own spelling)
    _skip_keys_device_placement = ["past_key_values", "cache_layer"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HyenaDecoderLayer, "attentions": AttentionWeights}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["mixer.filter", "mixer.residual.filter"]  # noqa: RUF012

    def __init__(self, config: HyenaConfig, *args, **kwargs) -> None:
        if not isinstance(config, HyenaConfig):
            raise TypeError(f"a {type(self).__name__} takes a HyenaConfig, got {type(config).__name__}")
        config.validate()  # fields may have been set one by one since it was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module.

        | parameter | init | weight decay | learning rate |
        |---|---|---|---|
        | embeddings, heads, all projections: weight | N(0, r^2), r = initializer_range | yes | base |
        | mixer.out_proj, mlp.down_proj in pre-norm blocks: weight | N(0, r^2 / (2 num_hidden_layers)) | yes | base |
        | block-diagonal mlp.up_proj, mlp.down_proj: weight | U(-1/sqrt(n), 1/sqrt(n)), n inputs a block | yes | base |
        | projections, heads: bias | 0 | no | base |
        | norms: weight, bias | 1, 0 | no | base |
        | mixer.short_conv: weight, bias | U(-1/sqrt(K), 1/sqrt(K)) | no | base |
        | mixer.skip, mixer.residual.skip | N(0, 1) | no | base |
        | mixer.attention.q_map, .k_map: weight | head_dim^(1/4) I in every head, I beside a window | no | base |
        | mixer.attention.q_map, .k_map: bias | 0 | no | base |
        | mixer.attention.window_factor | logit of 0.9 | no | base |
        | mixer.attention.q_map.directions, .k_map.directions (buffers) | formula in feature_maps.py | | |
        | mixer.filter.layers, .output, .reverse_layers, .reverse_output | N(0, r^2), bias 0 | no | filter |
        | mixer.filter.frequency | sine_frequency | no | filter |
        | mixer.filter.features (where trained) | formula in filters.py | no | filter |
        | mixer.filter.weight, .reverse_weight (explicit) | U(-1/sqrt(K), 1/sqrt(K)) | no | filter |
        | mixer.filter.log_radius, .angle (modal) | `ModalFilter.initial_poles` | no | filter |
        | mixer.filter.residue_re, .residue_im (modal) | N(0, -log_radius / N) | no | filter |
        | mixer.filter.direct (modal) | 0 | no | filter |
        | mixer.filter.decay_rates (buffer) | formula in filters.py | | |

        The filter of `mixer.residual` starts as that of the mixer. As in the published code (safari,
        `long_conv_lm.py`): its language-model init also redraws the filter's MLP.
        """
        super()._init_weights(module)
        if isinstance(module, ShortConv):
            bound = 1 / math.sqrt(module.weight.shape[1])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, rotary_frequencies(self.config)[0])
        elif isinstance(module, BlockDiagonalLinear):
            bound = 1 / math.sqrt(module.weight.shape[2])
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HyenaDecoderLayer) and module.is_pre_norm:
            # residual branches start smaller so that the stream's variance does not grow with depth
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.mixer.out_proj.weight, std=std)
            if isinstance(module.mlp, HyenaMLP):
                init.normal_(module.mlp.down_proj.weight, std=std)
        elif isinstance(module, HyenaMixer | ResidualConv):
            init.normal_(module.skip)
        elif not init_linear_attention(module):
            self._init_filter(module)

    def _init_filter(self, module: nn.Module) -> None:
        """The rows of the table for `mixer.filter`."""
        if isinstance(module, FilterLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ImplicitFilter):
            init.constant_(module.frequency, self.config.sine_frequency)
            if module.features is not None:
                init.copy_(module.features, module.initial_features())
            if module.decay_rates is not None:
                init.copy_(module.decay_rates, decay_rates(self.config))
        elif isinstance(module, ExplicitFilter):
            bound = 1 / math.sqrt(module.weight.shape[-1])
            init.uniform_(module.weight, -bound, bound)
            if module.reverse_weight is not None:
                init.uniform_(module.reverse_weight, -bound, bound)
        elif isinstance(module, ModalFilter):
            self._init_modal(module)

    @staticmethod
    def _init_modal(module: ModalFilter) -> None:
        log_radius, angle = module.initial_poles(module.log_radius.shape)
        std = (-log_radius / log_radius.shape[-1]).sqrt()
        init.copy_(module.log_radius, log_radius.to(module.log_radius))
        init.copy_(module.angle, angle.to(module.angle))
        for parameter in (module.residue_re, module.residue_im):
            init.copy_(parameter, (torch.randn_like(std) * std).to(parameter))
        init.zeros_(module.direct)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002 (its signature)
        # In models from outside, transformers skips modules without parameters of their own, such as our blocks, for
        # fear of in-place writes. All of ours go through `init`, which leaves loaded tensors alone.
        super()._initialize_weights(module)

    def parameter_policy(self) -> dict[str, tuple[bool, str]]:
        """Weight decay (yes or no) and learning-rate group (`"base"` or `"filter"`) of every parameter, by name.

        The table of `_init_weights`. Tied parameters appear once, under their first name.
        """
        policy = {}
        for name, parameter in self.named_parameters():
            if ".filter." in name:
                policy[name] = False, "filter"
            else:
                whole = not name.endswith((".skip", "short_conv.weight", "_map.weight", "_map.bias"))
                policy[name] = parameter.ndim > 1 and whole, "base"
        return policy

    @contextmanager
    def frozen_filters(self) -> Iterator[None]:
        """Evaluate every long filter once for all calls inside a `with` block.

        Where one transform of the whole input serves (causal layers of one filter a channel, outside compiled graphs),
        its spectrum is kept too, for the last eight lengths of input of each convolution: 8 bytes a tap and channel,
        16 where sums are float64. Filters and skips get no gradients in the block, and changing them has no effect
        until it ends. Copies of the model made inside are not frozen.
        """
        kinds = HyenaMixer, ResidualConv
        mixers = [module for module in self.modules() if isinstance(module, kinds) and module.frozen is None]
        for mixer in mixers:
            mixer.frozen = FrozenTaps()
        try:
            yield
        finally:
            for mixer in mixers:
                mixer.frozen = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args, output_loading_info: bool = False, **kwargs
    ) -> Any:
        """Load a model as transformers does, but refuse a file that does not hold the whole model.

        Raises:
            ValueError: The weights are corrupt, truncated, or those of another model. A new task head on a complete
                base model is no error, nor is anything listed for a caller who passed `output_loading_info=True`.
        """
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} are corrupt or truncated ({error}); copy them again "
                f"or load an earlier checkpoint"
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise CheckpointShapeError(
                f"{pretrained_model_name_or_path} holds tensors of other shapes than this {cls.__name__} ({error}); "
                f"check that config.json and the weights come from the same model"
            ) from error
        model, info = loaded
        if output_loading_info:  # who asks for the lists judges them
            return model, info
        base = f"{cls.base_model_prefix}."
        inside = [key for key in model.state_dict() if key.startswith(base)] or list(model.state_dict())
        parts = {key.removeprefix(base).split(".")[0] for key in inside}
        missing = sorted(set(info["missing_keys"]) & set(inside))
        foreign = sorted(key for key in info["unexpected_keys"] if key.removeprefix(base).split(".")[0] in parts)
        if missing or foreign:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no complete checkpoint of this {cls.__name__}: {len(missing)} "
                f"tensors are missing (first {missing[:3]}), {len(foreign)} do not belong (first {foreign[:3]}); "
                f"check that config.json and the weights come from the same model"
            )
        return model


def check_stream(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: HyenaConfig
) -> tuple[int, int, torch.device]:
    """Batch, length and device of the tokens or embeddings, after refusing what is neither."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"pass input_ids or inputs_embeds, exactly one of them; got {given}")
    stream = input_ids if input_ids is not None else inputs_embeds
    if not isinstance(stream, Tensor):
        raise TypeError(f"input_ids and inputs_embeds are tensors, got {type(stream).__name__}; use torch.tensor")
    expected = 2 if input_ids is not None else 3
    if stream.ndim != expected or (expected == 3 and stream.shape[-1] != config.hidden_size):
        shape = "(batch, length)" if input_ids is not None else f"(batch, length, {config.hidden_size})"
        raise ValueError(f"expected a tensor of shape {shape}, got {tuple(stream.shape)}")
    batch, length = stream.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"empty input: batch {batch}, length {length}; both must be at least 1")
    if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be integers (int64 or int32), got {input_ids.dtype}")
    # on accelerators the check would wait for the device at every step
    if input_ids is not None and input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"input_ids range from {low} to {high}, outside the vocabulary of {config.vocab_size}")
    return batch, length, stream.device


def check_labels(labels: Tensor, shape: tuple[int, ...] | None, count: int, what: str) -> Tensor:
    """Refuse labels of another shape (None: any), and any but -100 outside `count` classes, which `what` names.

    Returns the labels as int64, the only kind that torch's losses take.
    """
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}; convert them with .long()")
    labels = labels.long()
    if torch.compiler.is_compiling():
        return labels
    if shape is not None and labels.shape != shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but the batch {tuple(shape)}; give one label a token, -100 for "
            f"positions without loss"
        )
    wrong = ((labels < 0) | (labels >= count)) & (labels != -100)
    if bool(wrong.any()):
        raise ValueError(
            f"labels hold {labels[wrong][0].item()}, outside the {what} of {count}; use -100 for positions without "
            f"loss"
        )
    return labels


def real_tokens(attention_mask: Tensor | None, batch: int, length: int, past: int | Tensor) -> Tensor | None:
    """True where the new columns hold real tokens (B, L), or None when all do."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask must be a 2-D tensor of shape (batch, past + new tokens), 1 for real tokens, got {got}"
        )
    if attention_mask.shape != (batch, int(past) + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the batch has {batch} rows of {int(past)} "
            f"cached and {length} new tokens; its shape must be {(batch, int(past) + length)}"
        )
    mask = attention_mask[:, -length:] == 1
    if torch.compiler.is_compiling():
        return mask
    if not bool((mask | (attention_mask[:, -length:] == 0)).all()):
        raise ValueError(
            "attention_mask must hold 1 (or True) for real tokens and 0 (or False) for masked ones; an additive mask, "
            "of 0 and -inf, means the opposite"
        )
    return None if bool(mask.all()) else mask


class HyenaModel(HyenaPreTrainedModel):
    """Embedding, blocks and final norm; returns hidden states."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        positions, types, width = config.max_position_embeddings, config.type_vocab_size, config.hidden_size
        self.embed_token_types = nn.Embedding(types, width) if types else None
        self.embed_positions = nn.Embedding(positions, width) if config.learned_positions else None
        self.embed_norm = None if config.block_type == "pre_norm" else make_norm(config)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(HyenaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.block_type == "pre_norm" else nn.Identity()
        self.rotary_emb = RotaryEmbedding(config) if config.has_attention else None
        self.gradient_checkpointing = False
        # sharded training wraps each class named here, and a filter in float32 cannot share a unit with bfloat16
        kinds = zip(config.layer_types, config.filter_types, strict=True)
        filters = {FILTERS[filter_type].__name__ for layer_type, filter_type in kinds if layer_type == "hyena"}
        self._no_split_modules = ["HyenaDecoderLayer", *sorted(filters)]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch, whatever its padding or packing.

        Args:
            input_ids: Token ids (B, L), or give `inputs_embeds`.
            attention_mask: 1 for real tokens (B, cached + L). Masked tokens do not exist: all others get the values of
                the sequence without them; theirs are finite and unspecified.
            position_ids: Positions for rotary attention and learned positions (B, L). Without a mask and a cache, a
                document begins wherever they do not rise by one.
            past_key_values: Cache of earlier calls; refused by bidirectional models.
            inputs_embeds: Embeddings of the tokens (B, L, D), to which those of positions and types are added.
            use_cache: Return a cache. Packed batches without a cache of the caller's make none.
            seq_idx: Number of the document of each token (B, L), for packed batches.
            cu_seq_lens_q: Ends of the documents in the flattened batch, from 0 to B L, for packed batches. With the
                length of the longest one beside them (`max_length_q`, an int) a packed forward compiles to one graph.
            token_type_ids: Type of every token (B, L), 0 if left out; ignored by models that know no types.
            kwargs: Handed to attention functions.

        Returns:
            `last_hidden_state` (B, L, D) and `past_key_values`.

        Raises:
            ValueError, TypeError: Inputs that contradict each other or the model.
        """
        batch, length, device = check_stream(input_ids, inputs_embeds, self.config)
        self._check_cache(use_cache, past_key_values)
        documents = self._documents(
            batch, length, attention_mask, position_ids, past_key_values, seq_idx, cu_seq_lens_q, kwargs
        )
        cache = past_key_values
        cache_layers = self._cache_layers(cache, batch, packed=documents is not None)
        first = None if cache_layers is None else cache_layers[0]
        mask = real_tokens(attention_mask, batch, length, 0 if first is None else first.length)
        makes_cache = cache is None and bool(use_cache) and documents is None
        segments = build_segments(mask, documents, cached=cache is not None or makes_cache)
        seen = None if first is None else first.tokens
        if position_ids is not None and not check_positions(position_ids, batch, length, segments, seen):
            makes_cache = False  # it could not go on from positions that it did not count
        if makes_cache:
            cache = DynamicCache(config=self.config)
            cache_layers = self._cache_layers(cache, batch, packed=False)
            first = None if cache_layers is None else cache_layers[0]
        self._check_length(first, length if segments is None else segments.max_length, length)

        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None and (self.rotary_emb is not None or self.embed_positions is not None):
            position_ids = self._positions(first, segments, length, device)
        hidden_states = self.embed_dropout(self._embed(embeds, token_type_ids, position_ids, mask))
        position_embeddings = None
        if self.rotary_emb is not None:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.config.residual_in_fp32:
            hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))

        turns = repeat(None) if cache is None else in_turn(cache)
        for cache_layer, layer in zip(turns, self.layers, strict=False):
            hidden_states = layer(
                hidden_states,
                segments=segments,
                cache_layer=cache_layer,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        for cache_layer in cache_layers or ():
            cache_layer.owner, cache_layer.dtype = id(self), self.embed_tokens.weight.dtype
            cache_layer.advance(length, mask)
        hidden_states = self.norm(hidden_states.to(self.embed_tokens.weight.dtype))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=cache)

    def _embed(
        self, embeds: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Embeddings of the tokens (B, L, D) with those of their types and positions, normed where the model does."""
        if self.embed_token_types is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            self._check_types(token_type_ids, embeds.shape[:2])
            embeds = embeds + self.embed_token_types(token_type_ids)
        if self.embed_positions is not None:
            assert position_ids is not None  # noqa: S101 (narrows the type)
            if mask is not None:  # masked tokens may have any
                position_ids = position_ids.masked_fill(~mask, 0)
            self._check_learned_positions(position_ids)
            embeds = embeds + self.embed_positions(position_ids)
        return embeds if self.embed_norm is None else self.embed_norm(embeds)

    def _check_learned_positions(self, position_ids: Tensor) -> None:
        if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(x) for x in position_ids.aminmax())
        count = self.config.max_position_embeddings
        if low < 0 or high >= count:
            raise ValueError(
                f"position_ids range from {low} to {high}, but the model has embeddings of {count} positions "
                f"(max_position_embeddings); shorten the input, or count from 0"
            )

    def _check_types(self, token_type_ids: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(token_type_ids, Tensor) or token_type_ids.dtype not in (torch.int64, torch.int32):
            got = token_type_ids.dtype if isinstance(token_type_ids, Tensor) else type(token_type_ids).__name__
            raise TypeError(f"token_type_ids must be a tensor of integers (int64 or int32), got {got}")
        if token_type_ids.shape != shape:
            raise ValueError(
                f"token_type_ids have shape {tuple(token_type_ids.shape)}, but the tokens {tuple(shape)}; give one a "
                f"token"
            )
        if token_type_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(x) for x in token_type_ids.aminmax())
        if low < 0 or high >= self.config.type_vocab_size:
            raise ValueError(
                f"token_type_ids range from {low} to {high}, but the model knows {self.config.type_vocab_size} types"
            )

    def _documents(
        self,
        batch: int,
        length: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        kwargs: dict,
    ) -> Tensor | Segments | None:
        """Starts of packed documents, or their segments where no tensor may be read, or None."""
        widest = kwargs.get("max_length_q")
        if torch.compiler.is_compiling() and cu_seq_lens_q is not None and isinstance(widest, int):
            if seq_idx is not None:
                raise ValueError("seq_idx and cu_seq_lens_q both describe the documents; a compiled graph takes one")
            return segments_from_ends(cu_seq_lens_q, widest, batch, length)
        told = attention_mask is not None or past_key_values is not None or torch.compiler.is_exporting()
        return document_starts(
            batch,
            length,
            seq_idx=seq_idx,
            cu_seq_lens=cu_seq_lens_q,
            position_ids=None if told else position_ids,
        )

    def _check_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> None:
        if self.config.is_causal or not (use_cache or past_key_values is not None):
            return
        asked = "use_cache=True" if past_key_values is None else "past_key_values"
        raise ValueError(
            f"{asked} was passed to a bidirectional model, in which later tokens change earlier ones; leave it out"
        )

    def _cache_layers(self, cache: Cache | None, batch: int, *, packed: bool) -> list[HyenaCacheLayer] | None:
        if cache is None:
            return None
        if packed:
            raise ValueError(
                "packed documents cannot share a cache with what follows them; leave past_key_values out, or give "
                "each document its own row"
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing runs blocks twice, which a cache cannot follow; pass use_cache=False"
            )
        return adopt_cache(cache, self.config, batch, id(self), self.embed_tokens.weight.dtype)

    def _check_length(self, first: HyenaCacheLayer | None, new: int, columns: int) -> None:
        """Refuse sequences beyond the trained length where the config says so, and beyond a static cache."""
        if torch.compiler.is_compiling():
            return
        if first is not None and first.max_cache_len is not None and int(first.length) + columns > first.max_cache_len:
            raise ValueError(
                f"the static cache holds {first.max_cache_len} tokens, but {int(first.length)} + {columns} are asked "
                f"for; make it longer or use a DynamicCache"
            )
        config = self.config
        distances = config.feature_map == "cosformer" and "hedgehog" in config.layer_types
        tables = config.trainable_positional_features or config.learned_positions
        if config.beyond_trained_length != "refuse" and not tables and not distances:
            return
        past = 0 if first is None else int(torch.as_tensor(first.tokens).max())
        if past + new > self.config.max_position_embeddings:
            what = "positional features" if self.config.trainable_positional_features else "position embeddings"
            reason = f"its {what} are a trained table" if tables else "its cosformer map would give negative weights"
            if self.config.beyond_trained_length == "refuse":
                reason = "beyond_trained_length is 'refuse'"
            raise ValueError(
                f"a sequence of {past + new} tokens exceeds max_position_embeddings "
                f"({self.config.max_position_embeddings}), and {reason}; shorten it"
            )

    @staticmethod
    def _positions(
        first: HyenaCacheLayer | None, segments: Segments | None, length: int, device: torch.device
    ) -> Tensor:
        """Index of every token in its own sequence, (B, L) or (1, L)."""
        if segments is None:
            positions = torch.arange(length, device=device).unsqueeze(0)
        else:
            positions = segments.positions
        if first is None:
            return positions
        seen = first.tokens
        return positions + (seen.unsqueeze(-1) if isinstance(seen, Tensor) and seen.ndim else seen)


def labels_of_next_token(labels: Tensor, real: Tensor | None, document: Tensor | None) -> Tensor:
    """The label of the next real token of the same document at every real token, -100 elsewhere.

    Args:
        labels: (B, L).
        real: True for real tokens (B, L); None: all.
        document: Number of each token's document (B, L); None: a row is one.

    Returns:
        (B, L).
    """
    length = labels.shape[1]
    at = torch.arange(length, device=labels.device).expand_as(labels)
    if real is not None:
        at = at.masked_fill(~real, length)
    # the first real column from each column on, then of the columns behind it
    first = torch.nn.functional.pad(at.flip(1).cummin(dim=1).values.flip(1)[:, 1:], (0, 1), value=length)
    following = torch.nn.functional.pad(labels, (0, 1), value=-100).gather(1, first)
    if document is not None:
        same = torch.nn.functional.pad(document, (0, 1), value=-1).gather(1, first) == document
        following = following.masked_fill(~same, -100)
    return following if real is None else following.masked_fill(~real, -100)


class HyenaForCausalLM(HyenaPreTrainedModel, GenerationMixin):
    """A Hyena language model: `HyenaModel` and a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012 # pyright: ignore (typed too narrowly)
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: HyenaConfig) -> None:
        if not config.is_causal:
            raise ValueError("is_causal is False, but HyenaForCausalLM predicts the next token; use HyenaForMaskedLM")
        super().__init__(config)
        self.model = HyenaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position.

        Arguments as in `HyenaModel.forward`, and two more.

        Args:
            labels: Token ids (B, L), -100 where no loss is wanted; shifted inside, so pass the input ids. Masked
                tokens neither predict nor count, and no document predicts the next: the loss is that of the sequences
                alone.
            logits_to_keep: Compute logits for the last so many positions only (0: all), or at given positions.

        Returns:
            `logits` (B, L, V), `loss` when labels are given, `past_key_values`.
        """
        labels = self._checked_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, logits_to_keep)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
        elif logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
            hidden_states = hidden_states[logits_to_keep]
        elif logits_to_keep.ndim == 2:
            hidden_states = torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            if "shift_labels" not in kwargs and labels.shape == logits.shape[:2]:
                real = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].bool()
                told = attention_mask is not None or past_key_values is not None
                seq_idx, ends = kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q")
                batch, length = labels.shape
                document = number_documents(batch, length, seq_idx, ends, None if told else position_ids)
                kwargs["shift_labels"] = labels_of_next_token(labels, real, document)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def stream(
        self,
        input_ids: Tensor,
        *,
        chunk_length: int = 65536,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Iterator[CausalLMOutputWithPast]:
        """Run a long input in chunks, in the memory of one chunk and of what the layers must remember.

        A Hyena layer remembers its gated inputs (4 bytes a channel and token in float32; of a partial filter only its
        length) and its filter. No gradients.

        Args:
            input_ids: (B, L).
            chunk_length: Tokens of a chunk.
            attention_mask: (B, L), as in `forward`.
            logits_to_keep: Of each chunk, as in `forward`.

        Returns:
            An iterator over what `forward` returns for each chunk; chunks run as they are asked for.

        Raises:
            ValueError: chunk_length below 1, a mask of another shape, or inputs that `forward` refuses.
        """
        if not isinstance(chunk_length, int) or isinstance(chunk_length, bool) or chunk_length < 1:
            raise ValueError(f"chunk_length ({chunk_length}) must be a whole number, at least 1")
        check_stream(input_ids, None, self.config)
        if attention_mask is not None and tuple(attention_mask.shape) != tuple(input_ids.shape):
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        return self._chunks(input_ids, chunk_length, attention_mask, logits_to_keep)

    @torch.no_grad()
    def _chunks(
        self, input_ids: Tensor, chunk_length: int, attention_mask: Tensor | None, logits_to_keep: int | Tensor
    ) -> Iterator[CausalLMOutputWithPast]:
        batch, length = input_ids.shape
        cache = DynamicCache(config=self.config)
        for layer in adopt_cache(cache, self.config, batch, id(self.model), self.model.dtype):
            layer.expected_length = length
        for start in range(0, length, chunk_length):
            stop = min(start + chunk_length, length)
            mask = None if attention_mask is None else attention_mask[:, :stop]
            chunk = input_ids[:, start:stop]
            yield self(chunk, attention_mask=mask, past_key_values=cache, logits_to_keep=logits_to_keep)

    def _checked_labels(
        self, labels: Tensor | None, stream: Tensor | None, logits_to_keep: int | Tensor
    ) -> Tensor | None:
        """The labels as int64, after refusing what is none; before the model runs, so that a cache stays as it was."""
        if not isinstance(logits_to_keep, Tensor) and (not isinstance(logits_to_keep, int) or logits_to_keep < 0):
            raise ValueError(f"logits_to_keep must be a number of positions, 0 for all, got {logits_to_keep!r}")
        if labels is None:
            return None
        if isinstance(logits_to_keep, int) and logits_to_keep:
            raise ValueError("labels need the logits of all positions; leave logits_to_keep out")
        shape = stream.shape[:2] if isinstance(stream, Tensor) and isinstance(logits_to_keep, int) else None
        return check_labels(labels, shape, self.config.vocab_size, "vocabulary")

    # generation

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> None:
        """None: the model counts tokens itself.

        Those of transformers contradict the mask where an assistant has drafted the padding token: a new mask is
        inferred from its tokens, but old positions are only extended.
        """

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Tell a cache how long the generation can get and how far it may be rolled back.

        Buffers and filters of a new one are then made once, and an assistant can take all its candidates back. An
        attribute `decode_cache` of the generation config comes before that of the model's config.
        """
        given = model_kwargs.get("past_key_values")
        prepare: Callable = super()._prepare_cache_for_generation  # pyright: ignore (its self is a protocol)
        prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        if cache is not given:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            lookup = generation_config.prompt_lookup_num_tokens or 0
            for layer in adopt_cache(cache, self.config, rows, id(self.model), self.model.dtype, max_cache_length):
                if layer.max_cache_len is None:
                    layer.expected_length = max_cache_length + 1 + lookup
        # nobody else sees the cache, and only single tokens follow the prompt
        ends = cache is not given and not generation_config.return_dict_in_generate
        ends = ends and not generation_config.is_assistant and generation_mode != GenerationMode.ASSISTED_GENERATION
        plan = self._plan(generation_config, model_kwargs.get("attention_mask"), max_cache_length, ends)
        for layer in cache.layers:
            if not isinstance(layer, HyenaCacheLayer):
                continue
            if not layer.is_initialized:
                layer.plan = plan
            if layer.record_past:
                layer.max_pending = max(layer.max_pending, generation_config.max_new_tokens or 0)

    @staticmethod
    def _plan(generation_config: Any, attention_mask: Tensor | None, longest: int, ends: bool) -> Plan:
        new = generation_config.max_new_tokens
        if new is None:
            new = longest + 1 - (0 if attention_mask is None else attention_mask.shape[1])
        return Plan(vars(generation_config).get("decode_cache"), new, ends)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None, **_):
        """Keep the 2-D mask where it says something about the new columns; a compiled step then needs none."""
        if attention_mask is None or inputs_embeds is None:
            return attention_mask
        new = attention_mask[:, -inputs_embeds.shape[1] :]
        return None if bool(new.all()) else attention_mask

    def get_compiled_call(self, compile_config: Any) -> Callable:
        """A compiled call for steps of one token; longer inputs (chunks of a prompt) run as they are."""
        compiled = super().get_compiled_call(compile_config)

        def call(*args, **kwargs):
            input_ids = kwargs.get("input_ids")
            step = input_ids is not None and input_ids.shape[1] == 1 and kwargs.get("attention_mask") is None
            return compiled(*args, **kwargs) if step else self(*args, **kwargs)

        return call


__all__ = ["HyenaForCausalLM", "HyenaModel", "HyenaPreTrainedModel"]
