# SPDX-License-Identifier: Apache-2.0
"""Turn trained attention models into linear attention (Hedgehog, Zhang et al. 2024, arXiv 2402.04347).

    model = convert_attention(AutoModelForCausalLM.from_pretrained(folder), window=64)
    report = attention_transfer(model, batches, steps=200)         # trains the feature maps, nothing else
    model.save_pretrained(converted)                              # a model type of its own, `hedgehog_llama`
    AutoModelForCausalLM.from_pretrained(converted).generate(...)  # constant memory a sequence

Families: Llama, Mistral, Qwen 2 and 3, GPT-2, BERT encoders. Everything is imported on first use.
"""

import typing as _typing
from importlib import import_module as _import_module


if _typing.TYPE_CHECKING:
    from .convert import convert_attention
    from .modes import attention_mode
    from .transfer import TransferReport, attention_transfer

_MODULES = {
    "TransferReport": "transfer",
    "attention_mode": "modes",
    "attention_transfer": "transfer",
    "convert_attention": "convert",
}

__all__ = ["TransferReport", "attention_mode", "attention_transfer", "convert_attention"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    if name.startswith("Hedgehog"):
        module = "configurations" if name.endswith("Config") else "modeling"
        return getattr(_import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
