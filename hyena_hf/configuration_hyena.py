# SPDX-License-Identifier: Apache-2.0
"""Describe a Hyena model: widths, the mixer of every layer, the filter of every Hyena layer.

The config refuses what cannot work. A wrong type raises `TypeError`, an impossible shape or an unknown key
`ValueError`; both name the value, what was expected and what to do.
"""

import difflib
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig

from ._peft import enter_peft_defaults
from .auto_map import write_stub


if TYPE_CHECKING:
    # None until `__post_init__` has filled them in, so never None where they are read
    from typing import Any as ResolvedBool
    from typing import Any as ResolvedDict
    from typing import Any as ResolvedInt
    from typing import Any as ResolvedNames
    from typing import Any as ResolvedPooling
else:
    ResolvedInt, ResolvedBool, ResolvedNames, ResolvedDict = int | None, bool | None, list[str] | None, dict | None
    ResolvedPooling = Literal["first", "last", "mean"] | None

LAYER_TYPES = ("hyena", "full_attention", "sliding_attention", "hedgehog")
FEATURE_MAP_NAMES = (
    *("hedgehog", "hedgehog_softmax", "hedgehog_joint_softmax", "relu", "elu"),
    *("exp_1", "exp_2", "cosformer", "performer", "taylor"),
)
# of them, those without anything whose width could be chosen
MAPS_WITHOUT_WIDTH = ("elu", "exp_1", "exp_2", "cosformer", "taylor")
FILTER_TYPES = ("implicit", "explicit", "modal")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
NORM_TYPES = ("layer_norm", "rms_norm", "rms_norm_outer_eps")
# Layers that `use_bias` may name: those of Hyena mixers, then those of attention
BIASED_LAYERS = ("in_proj", "short_conv", "out_proj", "qkv_proj", "attention_out_proj")

# Keys that transformers itself passes or stores beside the fields of a config.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "is_encoder_decoder",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
    }
)


def plain_errors(method: Callable) -> Callable:
    """Turn the errors of `@strict`, which are neither ValueError nor TypeError, into the one that caused them."""

    @wraps(method)
    def wrapper(self: "HyenaConfig", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__
            kind = TypeError if isinstance(cause, TypeError) else ValueError
            raise kind(f"{type(self).__name__}: {cause or error}") from None
        except KeyError as error:  # transformers' word for an incomplete rope_parameters
            raise ValueError(f"{type(self).__name__}: {error.args[0]}") from None

    return wrapper


def _refuse_unknown(keys: set[str], known: set[str]) -> None:
    unknown = sorted(keys - _TRANSFORMERS_KEYS - known)
    if not unknown:
        return
    near = difflib.get_close_matches(unknown[0], known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "the fields are listed in the docstring of HyenaConfig"
    raise ValueError(f"HyenaConfig has no field {', '.join(map(repr, unknown))}; {remedy}")


@strict
class HyenaConfig(PreTrainedConfig):
    r"""Configuration of a Hyena language model.

    Hyena: Poli et al. 2023, arXiv 2302.10866. MultiHyena heads: Massaroli et al. 2023, arXiv 2310.18780. The defaults
    are the published 153M language model (safari, `hyena-small-150b-tok`).

    Args:
        vocab_size (`int`): Number of token ids.
        hidden_size (`int`): Model width D.
        num_hidden_layers (`int`): Number of blocks.
        intermediate_size (`int`): Width of the MLP inside a block.
        max_position_embeddings (`int`): Filter length l_max: filter time runs from 0 to 1 over this many tokens.
        order (`int`): Number of gated steps N >= 2; a layer has N gates and N - 1 long convolutions.
        num_heads (`int`, *optional*): Filters per long convolution. None means `hidden_size`, plain Hyena; fewer heads
            are MultiHyena, which is defined for causal models of order 2 only.
        is_causal (`bool`): Whether tokens see only what stands before them, in every layer. Otherwise convolutions
            have a second filter over later tokens and attention sees both sides; such a model takes no cache.
        layer_types (`list[str]`, *optional*): Mixer of every layer: `"hyena"` (default), `"full_attention"`,
            `"sliding_attention"` or `"hedgehog"`, linear attention.
        filter_types (`list[str]`, *optional*): Filter of every layer, read where the mixer is `"hyena"`:
            `"implicit"` (default), `"explicit"` or `"modal"`, the form of distilled models (causal ones only).
        filter_length (`int` or `list[int]`, *optional*): Number of taps (one value, or one a layer). An explicit
            filter has this many parameters a head (None: `max_position_embeddings`); an implicit one is zero from this
            lag on (None: never), a partial convolution. A filter that ends within `max_position_embeddings` never
            extrapolates, however long the input.
        state_size (`int` or `list[int]`): Real numbers that a modal filter remembers of the past (one value, or one a
            layer): a complex pole, stored once for its conjugate pair, takes 2 of them, a real one 1.
        num_poles (`int` or `list[int]`, *optional*): Stored poles of a modal filter (None: half of `state_size`, all
            complex).
        frequency_sparsity (`float`): Share of every filter's spectrum that is zero, the highest frequencies, at least
            0 and below 1. With K taps (`filter_length`, or `max_position_embeddings` where that is None) the filter is
            the first K taps of `irfft(mask * rfft(taps, 2 * K))` and ends there: causal, and the same for every length
            of the input. Cut off so, its spectrum is small where it was zero: no causal filter has an empty band.
        filter_hidden_size (`int`): Width of the filter's sine MLP.
        filter_num_layers (`int`): Linear layers of the filter's MLP, first and last included; at least 2.
        filter_num_bands (`int`): K frequency bands give 2K + 1 positional features.
        trainable_positional_features (`bool`): Learn the positional features (a table of
            `max_position_embeddings` rows) instead of computing them; such a model takes no longer input.
        sine_frequency (`float`): Initial frequency of the sine activations.
        modulation (`bool`): Multiply implicit filters by a decaying exponential window.
        fast_decay, slow_decay (`float`): Shares of l_max after which the fastest and the slowest window reach
            `modulation_target`.
        modulation_target (`float`): Value of the windows there, between 0 and 1.
        modulation_shift (`float`): Constant added to every window (0.05 in the published HyenaDNA inference code).
        filter_groups (`int` or `list[int]`, *optional*): Different filters in an explicit filter (one value, or one a
            layer): as many parameters, each for `num_heads / filter_groups` neighbouring heads (None: one a head).
        short_conv_kernel (`int`): Taps of the depthwise convolution before the gates.
        residual_conv (`bool`): Add a second long convolution, of a mixer's input itself, to its gated output
            (bidirectional models of order 2 only).
        block_type (`str`): `"pre_norm"`: x + mixer(norm(x)), then x + mlp(norm(x)), and a norm behind the last block.
            `"monarch_mixer"`: y = mixer(x), then norm(y + mlp(y)), and a norm behind the embeddings.
            `"monarch_mixer_norm"`: the same with mixer(norm(x)), where this norm has the epsilon 1e-5.
        learned_positions (`bool`): Add an embedding of a token's position to that of the token: a trained table of
            `max_position_embeddings` rows, so that such a model takes no longer input.
        type_vocab_size (`int`): Token types (`token_type_ids`) whose embedding is added; 0: none.
        norm_type (`str`): `"layer_norm"`, `"rms_norm"`, or `"rms_norm_outer_eps"`, which adds the epsilon to the root
            mean square and not to the mean square (StripedHyena, Evo).
        norm_eps (`float`): Epsilon of all norms.
        hidden_act (`str` or `list[str]`): Activation of the MLP, a name of `transformers.activations.ACT2FN` (one, or
            one a layer; `"linear"` is none, a bilinear MLP where it is gated, as in Evo 2).
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        mlp_bias (`bool` or `list[str]`): Biases in the MLP, or the names of its layers that have one: `"up_proj"`,
            with which the gate goes, and `"down_proj"`.
        mlp_blocks (`int`): The weights of the MLP are block-diagonal with so many blocks; 1: dense.
        use_bias (`bool` or `list[str]`): Biases in the projections of all mixers and in the short convolution, or the
            names of those that have one: `"in_proj"`, `"short_conv"` and `"out_proj"` of Hyena mixers, `"qkv_proj"`
            and `"attention_out_proj"` of attention.
        num_attention_heads (`int`, *optional*): Query heads of attention layers (None: `hidden_size // 64`, at
            least 1).
        num_key_value_heads (`int`, *optional*): Key-value heads (None: as many as query heads).
        head_dim (`int`, *optional*): Width of an attention head (None: `hidden_size // num_attention_heads`).
        sliding_window (`int`, *optional*): Tokens that a `"sliding_attention"` layer sees, the current one included.
        feature_map (`str`): Feature map of `"hedgehog"` layers, a name of `hyena_hf.feature_maps.FEATURE_MAPS`. The
            cosformer's refuses inputs longer than `max_position_embeddings`.
        feature_dim (`int`, *optional*): Outputs of a learned feature map, of which Hedgehog's have two features each,
            or random features of the Performer (None: `head_dim`).
        linear_attention_window (`int`): Tokens that keep softmax attention in a `"hedgehog"` layer, the current one
            included (bidirectional: as many on either side); 0 for linear attention alone.
        rope_parameters (`dict`, *optional*): Rotary position embedding of the attention layers, in transformers' form.
        rope_frequency_dtype (`str`): `"float32"`, or `"bfloat16"` for rotary frequencies rounded to it: the files of
            Evo 2 hold such, and its published code uses them.
        beyond_trained_length (`str`): What to do with inputs longer than `max_position_embeddings`: `"extrapolate"`
            or `"refuse"`, which refuses them also where every filter ends before.
        decode_cache (`str`): What a growing cache keeps of the inputs of a long convolution: `"history"`, all of them,
            O(t) time a token; `"online"`, tiles besides, the same outputs in O(log^2 t); `"auto"`, tiles where
            `generate` announces so many tokens that they are faster. An attribute of that name on the generation
            config comes first. Modal filters always keep their state; filters that end, MultiHyena heads and static
            caches always a history.
        residual_in_fp32 (`bool`): Keep the residual stream of a half-precision model in float32.
        initializer_range (`float`): Standard deviation of the initial weights.
        embed_dropout, resid_dropout, mlp_dropout, hyena_dropout, attention_dropout (`float`): Dropout after the
            embedding, after mixers and MLPs, inside MLPs, on the gated inputs of the long convolutions, on the
            weights of softmax attention.
        classifier_pooling (`str`, *optional*): What a head for whole sequences reads: `"last"`, the last real token
            (default of causal models), `"first"`, or `"mean"`, the mean of all real tokens (default of others).
        use_cache (`bool`, *optional*): Return a cache from `forward` unless told otherwise (None: `is_causal`).
        tie_word_embeddings (`bool`): Share the embedding with the language-model head.
        lm_head_transform (`bool`): In `HyenaForMaskedLM`, a linear layer, GELU and a norm before the head, and a bias
            in it, as in BERT.
        pad_token_id, bos_token_id, eos_token_id: Special token ids.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: An unknown key, or fields that contradict each other.
    """

    model_type = "hyena"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own spelling)

    vocab_size: int = 50264
    hidden_size: int = 864
    num_hidden_layers: int = 18
    intermediate_size: int = 1728
    max_position_embeddings: int = 2048
    order: int = 2
    num_heads: int | None = None
    is_causal: bool = True
    layer_types: ResolvedNames = None
    filter_types: ResolvedNames = None
    filter_length: int | list[int] | None = None
    state_size: int | list[int] = 16
    num_poles: int | list[int] | None = None
    frequency_sparsity: float | int = 0.0
    filter_hidden_size: int = 64
    filter_num_layers: int = 4
    filter_num_bands: int = 16
    trainable_positional_features: bool = False
    sine_frequency: float | int = 14.0
    modulation: bool = True
    fast_decay: float | int = 0.3
    slow_decay: float | int = 1.5
    modulation_target: float = 1e-2
    modulation_shift: float | int = 0.0
    filter_groups: int | list[int] | None = None
    short_conv_kernel: int = 3
    residual_conv: bool = False
    block_type: Literal["pre_norm", "monarch_mixer", "monarch_mixer_norm"] = "pre_norm"
    learned_positions: bool = False
    type_vocab_size: int = 0
    norm_type: Literal["layer_norm", "rms_norm", "rms_norm_outer_eps"] = "layer_norm"
    norm_eps: float = 1e-5
    hidden_act: str | list[str] = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    mlp_bias: bool | list[str] = True
    mlp_blocks: int = 1
    use_bias: bool | list[str] = True
    num_attention_heads: ResolvedInt = None
    num_key_value_heads: ResolvedInt = None
    head_dim: ResolvedInt = None
    sliding_window: int | None = None
    feature_map: str = "hedgehog"
    feature_dim: int | None = None
    linear_attention_window: int = 0
    rope_parameters: ResolvedDict = None
    rope_frequency_dtype: Literal["float32", "bfloat16"] = "float32"
    beyond_trained_length: Literal["extrapolate", "refuse"] = "extrapolate"
    decode_cache: Literal["auto", "history", "online"] = "auto"
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    embed_dropout: float | int = 0.0
    resid_dropout: float | int = 0.0
    mlp_dropout: float | int = 0.0
    hyena_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_pooling: ResolvedPooling = None
    use_cache: ResolvedBool = None
    tie_word_embeddings: bool = True
    lm_head_transform: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown(set(kwargs), {field.name for field in fields(self)})
        if self.layer_types is None:
            self.layer_types = ["hyena"] * self.num_hidden_layers
        if self.filter_types is None:
            self.filter_types = ["implicit"] * self.num_hidden_layers
        if self.use_cache is None:
            self.use_cache = self.is_causal
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_causal else "mean"
        if self.num_attention_heads is None:
            self.num_attention_heads = max(1, self.hidden_size // 64)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def num_filters(self) -> int:
        """Filters per long convolution: `num_heads`, or one a channel in plain Hyena."""
        return self.hidden_size if self.num_heads is None else self.num_heads

    @property
    def has_attention(self) -> bool:
        """Whether any layer is an attention layer."""
        return any(layer_type != "hyena" for layer_type in self.layer_types)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: files of an installed package are not copied into checkpoints, see `hyena_hf.auto_map`."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, and with an `auto_map` the file that it names."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if "auto_map" in vars(self):
            write_stub(save_directory)

    def to_dict(self) -> dict[str, Any]:
        """All fields; PEFT, which reads this, finds its defaults for our models too."""
        enter_peft_defaults(self.model_type)
        return self._without_foreign(super().to_dict())

    def has_mlp_bias(self, layer: str) -> bool:
        """Whether a layer of the MLP, by its name in `mlp_bias`, has a bias."""
        return self.mlp_bias if isinstance(self.mlp_bias, bool) else layer in self.mlp_bias

    def has_bias(self, layer: str) -> bool:
        """Whether a projection or the short convolution, by its name in `use_bias`, has a bias."""
        return self.use_bias if isinstance(self.use_bias, bool) else layer in self.use_bias

    def activation(self, layer: int) -> str:
        """Name of the activation in the MLP of one layer."""
        return self.hidden_act if isinstance(self.hidden_act, str) else self.hidden_act[layer]

    def group_count(self, layer: int) -> int:
        """Different filters in the explicit filter of one layer."""
        groups = self.filter_groups[layer] if isinstance(self.filter_groups, list) else self.filter_groups
        return self.num_filters if groups is None else groups

    def pole_count(self, layer: int) -> int:
        """Stored poles of the modal filter of one layer."""
        count = self.num_poles[layer] if isinstance(self.num_poles, list) else self.num_poles
        size = self.state_size[layer] if isinstance(self.state_size, list) else self.state_size
        return -(-size // 2) if count is None else count

    def filter_support(self, layer: int) -> int | None:
        """Taps of the filter of one layer; None where it never ends."""
        if self.filter_types[layer] == "modal":
            return None
        length = self.filter_length[layer] if isinstance(self.filter_length, list) else self.filter_length
        if length is None and (self.frequency_sparsity or self.filter_types[layer] == "explicit"):
            return self.max_position_embeddings
        return length

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what a config file holds."""
        return self._without_foreign(super().to_diff_dict())

    def _without_foreign(self, stored: dict[str, Any]) -> dict[str, Any]:
        # Other libraries hang attributes of their own on configs. In the file they would be unknown fields, and the
        # checkpoint could not be loaded again.
        known = {field.name for field in fields(self)} | _TRANSFORMERS_KEYS | {"transformers_version"}
        return {key: value for key, value in stored.items() if key in known}

    # `@strict` runs every `validate_*` method; these two replace transformers' own of the same name, whose list of
    # layer types is closed.
    def validate_layer_type(self) -> None:
        """Refuse lists of another length than the model and entries that name no mixer or filter."""
        for name, allowed in (("layer_types", LAYER_TYPES), ("filter_types", FILTER_TYPES)):
            entries = getattr(self, name)
            if len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(entries)} entries for num_hidden_layers ({self.num_hidden_layers}); give one a "
                    f"layer"
                )
            for entry in entries:
                if entry not in allowed:
                    raise ValueError(f"{name} holds {entry!r}; choose each entry from {', '.join(allowed)}")
        for name in ("filter_length", "state_size", "num_poles", "filter_groups", "hidden_act"):
            entries = getattr(self, name)
            if isinstance(entries, list) and len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(entries)} entries for num_hidden_layers ({self.num_hidden_layers}); give one "
                    f"value, or one a layer"
                )
        self._validate_poles()  # lists have one entry a layer from here on

    def validate_architecture(self) -> None:
        """Refuse sizes that no model can have."""
        from transformers.activations import ACT2FN  # here, because it imports accelerate where that is installed

        self._validate_sizes()
        self._validate_ranges()
        self._validate_heads()
        self._validate_sparsity()
        self._validate_blocks()
        if self.has_attention:
            self._validate_attention()
        for name in self.hidden_act if isinstance(self.hidden_act, list) else [self.hidden_act]:
            if name not in ACT2FN:
                raise ValueError(f"hidden_act is {name!r}; choose a name of transformers.activations.ACT2FN")
        for name in self.use_bias if isinstance(self.use_bias, list) else ():
            if name not in BIASED_LAYERS:
                raise ValueError(f"use_bias names {name!r}; choose True, False or names from {BIASED_LAYERS}")

    def validate_token_ids(self) -> None:
        """Refuse special tokens outside the vocabulary."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name} ({token}) lies outside the vocabulary of {self.vocab_size}; raise vocab_size or "
                        f"choose an id below it"
                    )

    def _validate_sizes(self) -> None:
        least = {"order": 2, "filter_num_layers": 2, "type_vocab_size": 0, "linear_attention_window": 0}
        names = (
            *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
            *("order", "num_heads", "filter_hidden_size", "filter_num_layers", "filter_num_bands"),
            *("short_conv_kernel", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
            *("type_vocab_size", "mlp_blocks", "feature_dim", "linear_attention_window"),
        )
        values = [(name, getattr(self, name)) for name in names]
        for name in ("filter_length", "state_size", "num_poles", "filter_groups"):
            entries = getattr(self, name)
            values += [(name, entry) for entry in (entries if isinstance(entries, list) else [entries])]
        for name, value in values:
            if isinstance(value, bool):
                raise TypeError(f"{name} is {value}; give a whole number")
            if value is not None and value < least.get(name, 1):
                raise ValueError(f"{name} ({value}) must be at least {least.get(name, 1)}")

    def _validate_ranges(self) -> None:
        for name in ("fast_decay", "slow_decay", "norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        finite = ("sine_frequency", "fast_decay", "slow_decay", "modulation_shift", "norm_eps", "initializer_range")
        for name in finite:
            if not abs(getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be a finite number")
        if not 0 < self.modulation_target < 1:
            raise ValueError(f"modulation_target ({self.modulation_target}) must lie between 0 and 1")
        dropouts = ("embed_dropout", "resid_dropout", "mlp_dropout", "hyena_dropout", "attention_dropout")
        for name in ("frequency_sparsity", *dropouts):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and below 1")

    def _validate_heads(self) -> None:
        if self.hidden_size % self.num_filters:
            lower = next(heads for heads in range(self.num_filters, 0, -1) if self.hidden_size % heads == 0)
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_filters}); choose "
                f"num_heads={lower} or another hidden_size"
            )
        if self.num_filters < self.hidden_size and self.order != 2:
            raise ValueError(
                f"num_heads ({self.num_heads}) below hidden_size ({self.hidden_size}) needs order 2, got order "
                f"{self.order}; leave num_heads out or set order=2"
            )
        if self.num_filters < self.hidden_size and not self.is_causal:
            raise ValueError(
                f"num_heads ({self.num_heads}) below hidden_size ({self.hidden_size}) needs a causal model; leave "
                f"num_heads out or set is_causal=True"
            )
        for layer, kind in enumerate(self.filter_types):
            if kind == "explicit" and self.num_filters % self.group_count(layer):
                raise ValueError(
                    f"filter_groups ({self.group_count(layer)}) must divide the number of filters "
                    f"({self.num_filters}) in layer {layer}; choose a divisor, or leave it out"
                )
        if "modal" in self.filter_types and not self.is_causal:
            raise ValueError("filter_types holds 'modal', a recurrence over the past, but is_causal is False")
        if self.use_cache and not self.is_causal:
            raise ValueError("use_cache is True but is_causal False: later tokens change earlier ones; leave it out")

    def _validate_poles(self) -> None:
        sizes = self.state_size if isinstance(self.state_size, list) else [self.state_size] * self.num_hidden_layers
        for layer, size in enumerate(sizes):
            count = self.pole_count(layer)
            if self.filter_types[layer] == "modal" and count > size:
                raise ValueError(
                    f"num_poles ({count}) exceeds state_size ({size}) in layer {layer}: a complex pole takes 2 "
                    f"numbers of the state, a real one 1; raise state_size, or leave num_poles out"
                )

    def _validate_sparsity(self) -> None:
        endless = self.beyond_trained_length == "extrapolate" and not self.trainable_positional_features
        if not self.frequency_sparsity or endless:
            return
        for layer, mixer in enumerate(self.layer_types):
            support = self.filter_support(layer) or 0
            beyond = support > self.max_position_embeddings
            if mixer == "hyena" and self.filter_types[layer] == "implicit" and beyond:
                raise ValueError(
                    f"frequency_sparsity ({self.frequency_sparsity}) needs all taps of a filter, but filter_length "
                    f"({support}) exceeds max_position_embeddings ({self.max_position_embeddings}), behind which this "
                    f"model has none; shorten filter_length"
                )

    def _validate_blocks(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % self.mlp_blocks:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of mlp_blocks ({self.mlp_blocks}); choose a "
                    f"common divisor of hidden_size and intermediate_size"
                )
        for name in self.mlp_bias if isinstance(self.mlp_bias, list) else ():
            if name not in ("up_proj", "down_proj"):
                raise ValueError(f"mlp_bias names {name!r}; choose True, False or names from ('up_proj', 'down_proj')")
        if self.residual_conv and (self.is_causal or self.order != 2):
            raise ValueError(
                f"residual_conv needs is_causal=False and order 2, got is_causal={self.is_causal} and order "
                f"{self.order}; leave it out"
            )
        if self.residual_in_fp32 and self.block_type != "pre_norm":
            raise ValueError(
                f"residual_in_fp32 is True, but a block of type {self.block_type!r} has no residual stream; leave it "
                f"out or set block_type='pre_norm'"
            )

    def _validate_attention(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups}); choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even for rotary embeddings; set head_dim or num_attention_heads "
                f"({heads}) so that it is"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types holds 'sliding_attention' but sliding_window is None; set sliding_window")
        if self.feature_map not in FEATURE_MAP_NAMES:
            raise ValueError(f"feature_map is {self.feature_map!r}; choose one of {', '.join(FEATURE_MAP_NAMES)}")
        if self.feature_dim is not None and self.feature_map in MAPS_WITHOUT_WIDTH:
            raise ValueError(
                f"feature_dim ({self.feature_dim}) has no meaning for feature_map {self.feature_map!r}, which has "
                f"nothing to learn or draw; leave it out"
            )
        rope_type = self.rope_parameters["rope_type"]
        if not 0 < self.rope_parameters["rope_theta"] < float("inf"):
            raise ValueError(f"rope_theta ({self.rope_parameters['rope_theta']}) must be a finite number above 0")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters has rope_type {rope_type!r}; choose one of {ROPE_TYPES} ('dynamic' and 'longrope' "
                f"turn keys by the length of the longest sequence in a batch)"
            )
        if self.rope_frequency_dtype == "bfloat16" and rope_type not in ("default", "linear"):
            raise ValueError(
                f"rope_frequency_dtype 'bfloat16' is for rope_type 'default' or 'linear', not {rope_type!r}"
            )
        partial = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ValueError(
                f"rope_parameters has partial_rotary_factor {partial}; only whole heads turn, leave it out"
            )


HyenaConfig.__init__ = plain_errors(HyenaConfig.__init__)
HyenaConfig.__setattr__ = plain_errors(HyenaConfig.__setattr__)
HyenaConfig.validate = plain_errors(HyenaConfig.validate)  # pyright: ignore (made by @strict)

__all__ = ["HyenaConfig"]
