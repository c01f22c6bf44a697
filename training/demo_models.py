"""The models of the demo: a Hyena, and GPT-2 and Llama of the same width, depth and number of trainable parameters.

Parameters are counted as trained: a tied embedding once, GPT-2's position table not at all (Hyena and Llama have
none). The peers' MLP width is what makes the numbers equal; both counts are linear in it, so two sizes give the third.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from hyena_hf import HyenaConfig


@dataclass(frozen=True)
class Size:
    """What the three models share, and the MLP width of Hyena."""

    vocab_size: int
    length: int
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 432
    initializer_range: float = (
        0.06  # the usual 0.02 suits widths near 1,000: a narrow model starts too quietly from it
    )
    end_token: int | None = None


def hyena_config(size: Size) -> PreTrainedConfig:
    """Plain order-2 Hyena with implicit filters, no attention; norms and MLP are those of Llama."""
    return HyenaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=size.length,
        initializer_range=size.initializer_range,
        short_conv_kernel=5,
        gated_mlp=True,
        hidden_act="silu",
        norm_type="rms_norm",
        eos_token_id=size.end_token,
    )


def gpt2_config(size: Size, intermediate_size: int) -> PreTrainedConfig:
    """GPT-2, without dropout as the others: no token is seen twice."""
    return GPT2Config(
        vocab_size=size.vocab_size,
        n_embd=size.hidden_size,
        n_layer=size.num_hidden_layers,
        n_head=size.num_attention_heads,
        n_inner=intermediate_size,
        n_positions=size.length,
        initializer_range=size.initializer_range,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=size.end_token,
        eos_token_id=size.end_token,
    )


def llama_config(size: Size, intermediate_size: int) -> PreTrainedConfig:
    """Llama with a tied embedding."""
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=size.length,
        initializer_range=size.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=size.end_token,
        eos_token_id=size.end_token,
    )


def equal_configs(size: Size) -> dict[str, PreTrainedConfig]:
    """Configurations of Hyena, GPT-2 and Llama with parameter counts within 1%: as near as MLP widths allow."""
    hyena = hyena_config(size)
    target = count_config(hyena)
    peers = {"gpt2": gpt2_config, "llama": llama_config}
    return {"hyena": hyena, **{name: _of_equal_size(size, make, target) for name, make in peers.items()}}


def _of_equal_size(size: Size, make: Callable[[Size, int], PreTrainedConfig], target: int) -> PreTrainedConfig:
    at_one, at_two = count_config(make(size, 1)), count_config(make(size, 2))
    return make(size, max(1, round(1 + (target - at_one) / (at_two - at_one))))


def count_config(config: PreTrainedConfig) -> int:
    """Trained parameters of the model that a configuration describes, without making its weights."""
    with torch.device("meta"):
        return count_parameters(AutoModelForCausalLM.from_config(config))


def count_parameters(model: PreTrainedModel) -> int:
    """Trained parameters: tied ones once, GPT-2's position table left out."""
    positions = model.transformer.wpe.weight.numel() if isinstance(model, GPT2LMHeadModel) else 0
    return model.num_parameters(only_trainable=True) - positions
