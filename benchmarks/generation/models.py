"""Models of one size: Hyena, GPT-2, Llama, Mamba, Mamba-2 and LFM2 with random weights.

    model = make_model(MODAL, FULL, 2048)

Parameters are counted as trained: tied embeddings once, position tables not at all. The width of the MLPs makes the
counts equal; Mamba and Mamba-2 have none, but 11 layers in the place of 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
)
from transformers.configuration_utils import PreTrainedConfig

from benchmarks.report import markdown_table
from hyena_hf import HyenaConfig


GPT2, LLAMA, MAMBA, MAMBA2, LFM2 = "GPT-2", "Llama", "Mamba", "Mamba-2", "LFM2"
EXACT, MODAL, HEADS = "Hyena", "Hyena, modal", "MultiHyena, modal"
HISTORY, ONLINE = "Hyena, history", "Hyena, online"  # what the cache of an exact model keeps
STATES = 16  # real numbers that a modal filter remembers


@dataclass(frozen=True)
class Scale:
    """What all models share.

    Attributes:
        parameters: That MLP widths aim at.
        head: Width of a head of attention, and of Mamba-2.
    """

    vocab_size: int
    width: int
    layers: int
    parameters: int
    head: int

    def shared(self, layers: int | None = None) -> dict[str, Any]:
        """Fields of every config; another number of layers where models are made of smaller ones."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": layers or self.layers,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    @property
    def mamba_layers(self) -> int:
        """A layer without an MLP is smaller."""
        return round(11 / 6 * self.layers)


FULL = Scale(vocab_size=8192, width=320, layers=6, parameters=10_000_000, head=64)
TINY = Scale(vocab_size=64, width=32, layers=2, parameters=26_000, head=16)


def hyena_config(scale: Scale, inner: int, length: int, filter_type: str = "implicit", **fields: Any) -> HyenaConfig:
    """Ours; blocks like those of GPT-2."""
    return HyenaConfig(
        **scale.shared(),
        intermediate_size=inner,
        max_position_embeddings=length,
        filter_types=[filter_type] * scale.layers,
        state_size=STATES,
        **fields,
    )


def modal_config(scale: Scale, inner: int, length: int) -> HyenaConfig:
    """As distilled: half as many complex modes as states."""
    return hyena_config(scale, inner, length, "modal")


def heads_config(scale: Scale, inner: int, length: int) -> HyenaConfig:
    """Heads of 8 channels."""
    return hyena_config(scale, inner, length, "modal", num_heads=scale.width // 8)


def gpt2_config(scale: Scale, inner: int, length: int) -> PreTrainedConfig:
    """With the cheaper of its two activations."""
    return GPT2Config(
        **scale.shared(),
        n_positions=length,
        n_head=scale.width // scale.head,
        n_inner=inner,
        activation_function="gelu_pytorch_tanh",
    )


def llama_config(scale: Scale, inner: int, length: int) -> PreTrainedConfig:
    """As many key-value heads as query heads."""
    return LlamaConfig(
        **scale.shared(),
        intermediate_size=inner,
        num_attention_heads=scale.width // scale.head,
        max_position_embeddings=length,
    )


def lfm2_config(scale: Scale, inner: int, length: int) -> PreTrainedConfig:
    """Two short convolutions to one layer of attention."""
    kinds = ("full_attention", "conv", "conv") if scale.layers < 3 else ("conv", "conv", "full_attention")
    heads = scale.width // scale.head
    return Lfm2Config(
        **scale.shared(),
        intermediate_size=inner,
        block_auto_adjust_ff_dim=False,
        layer_types=[kinds[index % 3] for index in range(scale.layers)],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
    )


def mamba_config(scale: Scale, *_: int) -> PreTrainedConfig:
    """16 states."""
    return MambaConfig(**scale.shared(scale.mamba_layers), state_size=16)


def mamba2_config(scale: Scale, *_: int) -> PreTrainedConfig:
    """64 states."""
    return Mamba2Config(
        **scale.shared(scale.mamba_layers),
        state_size=64,
        head_dim=scale.head,
        num_heads=2 * scale.width // scale.head,
        n_groups=1,
    )


CONFIGS: Mapping[str, Callable[[Scale, int, int], PreTrainedConfig]] = {
    GPT2: gpt2_config,
    LLAMA: llama_config,
    MAMBA: mamba_config,
    MAMBA2: mamba2_config,
    LFM2: lfm2_config,
    EXACT: hyena_config,
    MODAL: modal_config,
    HEADS: heads_config,
}


def count(config: PreTrainedConfig) -> int:
    """Parameters but those of GPT-2's positions, without making any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    positions = config.n_positions * config.n_embd if isinstance(config, GPT2Config) else 0
    return model.num_parameters() - positions


@cache
def inner_width(name: str, scale: Scale) -> int:
    """Width of the MLP that comes nearest to the size; counts are linear in it."""
    one, two = (count(CONFIGS[name](scale, inner, 64)) for inner in (1, 2))
    return 1 if one == two else max(1, round(1 + (scale.parameters - one) / (two - one)))


def equal_config(name: str, scale: Scale, length: int) -> PreTrainedConfig:
    """As large as the others."""
    return CONFIGS[name](scale, inner_width(name, scale), length)


def make_model(name: str, scale: Scale, length: int) -> Any:
    """For sequences up to a length; `HISTORY` and `ONLINE` are the exact model."""
    torch.manual_seed(0)
    config = equal_config(EXACT if name in (HISTORY, ONLINE) else name, scale, length)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig()  # no token ends a generation
    return model.eval().requires_grad_(False)


def random_tokens(scale: Scale, batch: int, length: int) -> torch.Tensor:
    """(B, L)."""
    return torch.randint(scale.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def size_table(scale: Scale, names: Iterable[str]) -> list[str]:
    """Parameters of every model."""
    sizes = {name: count(equal_config(name, scale, 64)) for name in names}
    return markdown_table(["model", "parameters"], [(name, f"{size / 1e6:.2f}M") for name, size in sizes.items()])
