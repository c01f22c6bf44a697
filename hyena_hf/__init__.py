# SPDX-License-Identifier: Apache-2.0
"""Hyena language models in transformers: long convolutions for training, exact cached generation.

Importing this package registers its models, so that `AutoModelForCausalLM.from_pretrained(folder)` finds them. The
models themselves are imported on first use.
"""

import typing as _typing
from importlib import import_module as _import_module


if _typing.TYPE_CHECKING:
    from .configuration_hyena import HyenaConfig
    from .heads import (
        HyenaForMaskedLM,
        HyenaForQuestionAnswering,
        HyenaForSequenceClassification,
        HyenaForTextEncoding,
        HyenaForTokenClassification,
    )
    from .modeling_hyena import HyenaForCausalLM, HyenaModel, HyenaPreTrainedModel
    from .tokenization_byte import HyenaByteTokenizer
    from .tokenization_nucleotide import HyenaNucleotideTokenizer

_MODULES = {
    "HyenaConfig": "configuration_hyena",
    "HyenaForCausalLM": "modeling_hyena",
    "HyenaForMaskedLM": "heads",
    "HyenaForQuestionAnswering": "heads",
    "HyenaForSequenceClassification": "heads",
    "HyenaForTextEncoding": "heads",
    "HyenaForTokenClassification": "heads",
    "HyenaModel": "modeling_hyena",
    "HyenaPreTrainedModel": "modeling_hyena",
    "HyenaByteTokenizer": "tokenization_byte",
    "HyenaNucleotideTokenizer": "tokenization_nucleotide",
}

__version__ = "0.1.0"
__all__ = [
    "HyenaByteTokenizer",
    "HyenaConfig",
    "HyenaForCausalLM",
    "HyenaForMaskedLM",
    "HyenaForQuestionAnswering",
    "HyenaForSequenceClassification",
    "HyenaForTextEncoding",
    "HyenaForTokenClassification",
    "HyenaModel",
    "HyenaNucleotideTokenizer",
    "HyenaPreTrainedModel",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    from ._registration import register

    register()


_register()
