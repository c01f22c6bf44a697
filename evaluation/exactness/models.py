"""Small random models of equal sizes with strong weights, and the truth that their answers are measured against.

Weights are drawn so that a wrong token in the past shows: logits of a few units, filters, convolutions and states that
do not fade at once. The truth is always the sequence run alone, without padding and without a cache, in the dtype that
is tested.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.cache import online
from hyena_hf.linear_attention import convert_attention


VOCABULARY, WIDTH, LAYERS, TRAINED_LENGTH = 97, 32, 3, 256
WINDOW = 6  # tokens with softmax attention in converted models
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "tie_word_embeddings": True}
COMMON |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
DECODER: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": TRAINED_LENGTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama(layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DECODER, num_hidden_layers=layers))


def _mamba2(layers: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16}
    return Mamba2ForCausalLM(Mamba2Config(**COMMON, **sizes, num_hidden_layers=layers))


def _lfm2(layers: int) -> PreTrainedModel:
    layer_types = ["conv", "full_attention", "conv"][:layers]
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "layer_types": layer_types,
        "block_auto_adjust_ff_dim": False,
    }
    return Lfm2ForCausalLM(Lfm2Config(**DECODER, **sizes))


def _hyena(layers: int, **changes) -> PreTrainedModel:
    sizes: dict[str, Any] = {**DECODER, "filter_num_bands": 4, "filter_hidden_size": 16}
    return HyenaForCausalLM(HyenaConfig(**sizes, num_hidden_layers=layers, **changes))


def _hybrid(layers: int) -> PreTrainedModel:
    return _hyena(layers, layer_types=["hyena", "full_attention", "hyena"][:layers])


def _linear_gpt2(layers: int) -> PreTrainedModel:
    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_inner": 2 * WIDTH, "n_head": 4, "n_positions": 512}
    return convert_attention(GPT2LMHeadModel(GPT2Config(**COMMON, **sizes, n_layer=layers)), window=WINDOW)


def _linear_hybrid(layers: int) -> PreTrainedModel:
    """The middle one of three layers keeps softmax attention."""
    model = Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, num_hidden_layers=layers))
    return convert_attention(model, layers=[0, -1], window=WINDOW)


def short_tiles() -> AbstractContextManager:
    """Context in which tiles begin after a few tokens: the table's sequences are too short for them otherwise."""
    return patch.multiple(online, NEAR=8, BLOCK=2, PATIENCE=0, _CHUNK=16, _KEPT=8)


class Spec(NamedTuple):
    """A column of the table.

    Attributes:
        build: Makes a model of some layers.
        ours: Whether it is one of this package.
        context: In which all its answers are found.
    """

    build: Callable[[int], PreTrainedModel]
    ours: bool
    context: Callable[[], AbstractContextManager] = nullcontext


MODELS = {
    "Llama": Spec(_llama, ours=False),
    "Mamba2": Spec(_mamba2, ours=False),
    "LFM2": Spec(_lfm2, ours=False),
    "Hyena order 2": Spec(_hyena, ours=True),
    "Hyena order 3": Spec(lambda layers: _hyena(layers, order=3), ours=True),
    "MultiHyena": Spec(lambda layers: _hyena(layers, num_heads=8), ours=True),
    "Hyena hybrid": Spec(_hybrid, ours=True),
    "modal filters": Spec(lambda layers: _hyena(layers, filter_types=["modal"] * layers), ours=True),
    "online tiles": Spec(lambda layers: _hyena(layers, decode_cache="online"), ours=True, context=short_tiles),
    "linear Llama": Spec(lambda layers: convert_attention(_llama(layers)), ours=True),
    "linear GPT-2, window": Spec(_linear_gpt2, ours=True),
    "linear Qwen3, hybrid": Spec(_linear_hybrid, ours=True),
}

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FINER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
FLOOR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

# the first rule whose word is in a parameter's name gives its mean (None: as initialised) and standard deviation
DRAWS = (
    ("norm", (1.0, 0.1)),
    ("ln_", (1.0, 0.1)),  # GPT-2
    ("_map.weight", (0.0, 0.5)),  # linear attention: features that tell keys apart
    ("short_conv", (0.0, 0.5)),  # Hyena
    ("conv1d", (0.0, 0.5)),  # Mamba2
    ("conv.conv", (0.0, 0.5)),  # LFM2
    ("dt_bias", (-2.0, 0.5)),  # Mamba2: steps of about 0.1, a memory of many tokens
    ("A_log", None),
    ("mixer.D", None),
    ("filter.output", (0.0, 0.4)),
    ("filter.layers", (0.0, 0.05)),
    ("filter.", None),
    ("skip", None),
    ("", (0.0, 0.15)),
)


def new_model(spec: Spec, *, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A model in evaluation mode with strong weights, float32."""
    torch.manual_seed(seed)
    model = spec.build(layers).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = next(rule for word, rule in DRAWS if word in name)
            if draw is not None:
                mean = 0.0 if name.endswith("bias") and "norm" in name else draw[0]
                parameter.normal_(mean, draw[1])
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself, moved to a dtype."""
    return model.to(dtype)  # pyright: ignore (transformers' decorator hides the signature)


class Float64Throughout(TorchFunctionMode):
    """Read every float32 in a model's code as float64.

    Norms, softmax and scans of transformers compute in float32 by name, so a model moved to float64 would still round
    to float32 and be no reference.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.type_as:
            return func(*args, **(kwargs or {}))
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def arithmetic(dtype: torch.dtype) -> AbstractContextManager:
    """The context in which a model of this dtype runs."""
    return Float64Throughout() if dtype == torch.float64 else nullcontext()


def call(
    model: PreTrainedModel,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    past: Cache | None = None,
    **packing: Any,
) -> Tensor:
    """Logits (B, L, V) of one call, as `generate` would make it.

    Args:
        model: any causal language model of transformers.
        ids: the new tokens (B, L).
        mask: 1 for real tokens, cached columns included (B, T); positions are counted over it where the model takes
            them.
        past: cache of earlier calls, extended in place; None: no cache.
        packing: descriptions of packed documents.
    """
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": past is not None, **packing}
    if past is not None:
        arguments["past_key_values" if "past_key_values" in known else "cache_params"] = past
    if mask is not None:
        arguments["attention_mask"] = mask
        if "position_ids" in known and ids is not None:
            positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
    return model(input_ids=ids, **arguments).logits


def scale(truth: Tensor) -> float:
    """What errors are relative to: max(1, largest value)."""
    return max(1.0, truth.abs().max().item())


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over `scale`; infinite where something is not finite."""
    error = (got.to(torch.float64) - truth.to(torch.float64)).abs().max().item()
    return error / scale(truth) if error == error else float("inf")


class Subject:
    """A model in the dtype that is tested, a smaller one of its kind, and the truth about its sequences.

    Args:
        name: column of the table, a key of `MODELS`.
        dtype: what is tested.
        seed: of the weights.
        model: tested instead of a new one.
    """

    def __init__(
        self, name: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, model: PreTrainedModel | None = None
    ) -> None:
        spec = MODELS[name]
        self.name, self.ours, self.dtype = name, spec.ours, dtype
        self.model = in_dtype(new_model(spec, seed=seed) if model is None else model, dtype)
        self.finer = in_dtype(copy.deepcopy(self.model), FINER[dtype]) if dtype in FINER else self.model
        self._new_assistant = lambda: in_dtype(new_model(spec, layers=LAYERS - 1, seed=seed + 1), dtype)
        self._truths: dict[tuple[int, ...], tuple[Tensor, float]] = {}

    def assistant(self) -> PreTrainedModel:
        """A model of one layer less with other weights."""
        return self._new_assistant()

    def finer_arithmetic(self) -> AbstractContextManager:
        """The context in which `finer` runs."""
        return arithmetic(FINER.get(self.dtype, self.dtype))

    def alone(self, sequence: Tensor) -> tuple[Tensor, float]:
        """Logits (n, V) of one sequence (n,) by itself, and their relative error against the finer dtype."""
        key = tuple(sequence.tolist())
        if key not in self._truths:
            with torch.no_grad():
                truth = call(self.model, sequence[None])[0]
                with self.finer_arithmetic():
                    finer = call(self.finer, sequence[None])[0]
            self._truths[key] = truth, relative_error(truth, finer)
        return self._truths[key]

    def bound(self, sequence: Tensor) -> float:
        """How far the logits of a sequence may be off in any batch, relative to `scale`."""
        return self.limit(self.alone(sequence)[1])

    def limit(self, own_error: float) -> float:
        """The bound of something whose own rounding error is known."""
        return max(FLOOR[self.dtype], own_error)

    def noise(self) -> float:
        """Largest error against the finer dtype of all sequences so far; 0 in float64."""
        return max((error for _, error in self._truths.values()), default=0.0)
