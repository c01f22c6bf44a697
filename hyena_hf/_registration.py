# SPDX-License-Identifier: Apache-2.0
"""Make transformers' Auto classes find our models, without importing the models.

`AutoModel.register` takes the class itself, and importing a modeling file costs seconds. transformers' own models are
entered by name instead and imported on first use; ours are entered in the same tables in the same way.
"""

import sys
from importlib import import_module

from transformers import AutoConfig, AutoTokenizer, configuration_utils
from transformers.models.auto import CONFIG_MAPPING, modeling_auto

from .configuration_hyena import HyenaConfig
from .tokenization_byte import HyenaByteTokenizer
from .tokenization_nucleotide import HyenaNucleotideTokenizer


_MODELS = {
    "MODEL_MAPPING": "HyenaModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "HyenaForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING": "HyenaForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "HyenaForSequenceClassification",
    "MODEL_FOR_TEXT_ENCODING_MAPPING": "HyenaForTextEncoding",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "HyenaForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "HyenaForQuestionAnswering",
}


# converted attention models, `hedgehog_NAME`: their classes live in `hyena_hf.linear_attention`
_CAUSAL = {
    "MODEL_MAPPING": "Model",
    "MODEL_FOR_CAUSAL_LM_MAPPING": "ForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "ForSequenceClassification",
}
_ENCODER = {
    "MODEL_MAPPING": "Model",
    "MODEL_FOR_MASKED_LM_MAPPING": "ForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "ForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "ForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING": "ForQuestionAnswering",
    "MODEL_FOR_TEXT_ENCODING_MAPPING": "Model",
}
_CONVERTED = {
    **{name: (family, _CAUSAL) for name, family in (("llama", "Llama"), ("mistral", "Mistral"), ("gpt2", "GPT2"))},
    **{name: (family, _CAUSAL) for name, family in (("qwen2", "Qwen2"), ("qwen3", "Qwen3"))},
    "bert": ("Bert", _ENCODER),
}


def register() -> None:
    """Enter config, models and tokenizers; calling it twice does no harm."""
    model_type = HyenaConfig.model_type
    AutoConfig.register(model_type, HyenaConfig, exist_ok=True)
    # Trainer reads the config of a checkpoint as a plain PreTrainedConfig, whose list of mixers is closed
    known = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
    ours = tuple(name for name in ("hyena", "hedgehog") if name not in known)
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*known, *ours)
    # `transformers serve` takes other classes from its own package only
    for table, class_name in {**_MODELS, "MODEL_FOR_MULTIMODAL_LM_MAPPING": "HyenaForCausalLM"}.items():
        getattr(modeling_auto, f"{table}_NAMES")[model_type] = class_name
        mapping = getattr(modeling_auto, table)
        mapping._reverse_config_mapping[HyenaConfig.__name__] = model_type
        mapping._modules[model_type] = sys.modules["hyena_hf"]
    # the class registered last serves folders that do not name their tokenizer
    for tokenizer in (HyenaNucleotideTokenizer, HyenaByteTokenizer):
        AutoTokenizer.register(HyenaConfig, tokenizer_class=tokenizer, exist_ok=True)
    _register_converted()


def _register_converted() -> None:
    """Enter converted attention models by name: importing their configs would import torch."""
    package = import_module(".linear_attention", __package__)
    for name, (family, heads) in _CONVERTED.items():
        model_type, config = f"hedgehog_{name}", f"Hedgehog{family}Config"
        CONFIG_MAPPING._mapping[model_type] = config  # the table of names itself
        CONFIG_MAPPING._modules[model_type] = package
        for table, head in heads.items():
            getattr(modeling_auto, f"{table}_NAMES")[model_type] = f"Hedgehog{family}{head}"
            mapping = getattr(modeling_auto, table)
            mapping._reverse_config_mapping[config] = model_type
            mapping._modules[model_type] = package
