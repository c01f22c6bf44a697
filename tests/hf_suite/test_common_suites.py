"""transformers' own common suites on our models, and on Lfm2 and Mamba2 for comparison.

    python -m pytest -m hf_suite

What a model skips here, beside what the suites skip by themselves, has its reason in one line.
"""

import unittest

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2Model, Mamba2Config, Mamba2ForCausalLM, Mamba2Model

import hyena_hf
from hyena_hf import HyenaByteTokenizer, HyenaConfig, HyenaForCausalLM, HyenaModel
from hyena_hf.heads import (
    HyenaForMaskedLM,
    HyenaForQuestionAnswering,
    HyenaForSequenceClassification,
    HyenaForTokenClassification,
)

from . import pipelines, release


pytestmark = [pytest.mark.hf_suite, pytest.mark.filterwarnings("default")]  # transformers' own tests warn

SUITES = release.load()
PIPELINE = SUITES["pipeline_mixin"]
PIPELINE.transformers_module = hyena_hf  # where it looks for tokenizers
for task in pipelines.TASKS:
    PIPELINE.pipeline_test_mapping[task.task] = {"test": f"{task.__module__}.{task.__name__}"}

TASK_OF_HEAD = {
    "Model": "feature-extraction",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}


def task_of(model_class: type) -> str | None:
    """The pipeline that a class serves; question answering has none any more."""
    return next((task for head, task in TASK_OF_HEAD.items() if model_class.__name__.endswith(head)), None)


class ModelTester:
    """A tiny config and a batch: what the suites ask of the tester of a model."""

    batch_size, seq_length, vocab_size, hidden_size = 13, 7, 99, 32
    num_hidden_layers, num_attention_heads, num_labels, type_sequence_label_size = 2, 2, 3, 2
    is_training = True

    def __init__(self, parent: "CommonSuites") -> None:
        self.parent = parent
        self.base_model_class = parent.all_model_classes[0]
        self.causal_lm_class = next((c for c in parent.all_model_classes if c.__name__.endswith("ForCausalLM")), None)

    def get_config(self, **changes):
        return self.parent.config_class(**{**self.parent.tiny, **changes})

    def prepare_config_and_inputs_for_common(self):
        shape = self.batch_size, self.seq_length
        ids = torch.randint(1, self.vocab_size, shape)
        # the suites' own batch: row b has b + 1 tokens and padding at the right
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class CommonSuites(
    SUITES["modeling_common"].ModelTesterMixin,
    PIPELINE.PipelineTesterMixin,
    SUITES["training_mixin"].TrainingTesterMixin,
    SUITES["tensor_parallel_mixin"].TensorParallelTesterMixin,
    SUITES["fsdp_mixin"].FSDPTesterMixin,
):
    """All suites for one model; a subclass names config and classes."""

    config_class: type
    all_model_classes: tuple[type, ...]
    tiny: dict
    model_tester = None
    pipeline_model_mapping = None

    def setUp(self):
        self.model_tester = ModelTester(self)
        tasks = {task_of(model_class): model_class for model_class in self.all_model_classes}
        self.pipeline_model_mapping = {task: model_class for task, model_class in tasks.items() if task is not None}
        tester = SUITES["configuration_common"].ConfigTester
        self.config_tester = tester(self, config_class=self.config_class, common_properties=["hidden_size"])

    def test_config(self):
        self.config_tester.run_common_tests()


SHAPE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HYENA = {
    **SHAPE,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "filter_num_bands": 4,
    "filter_hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
HEADS = HyenaForSequenceClassification, HyenaForTokenClassification, HyenaForQuestionAnswering


def skip(reason: str):
    """A test that is skipped, whatever it would test."""

    def test(self):
        self.skipTest(reason)

    return test


class SomeLayersAttend:
    """For models of which some layers only are attention: the suite expects weights from every layer."""

    def test_attention_outputs(self):
        self.model_tester.num_hidden_layers = self.tiny["layer_types"].count("full_attention")
        super().test_attention_outputs()


class NoLayerAttends:
    has_attentions = False
    test_model_rope_scaling_from_config_0_linear = skip("no layer turns by its position")
    test_model_rope_scaling_from_config_1_dynamic = skip("no layer turns by its position")
    test_model_rope_scaling_from_config_2_yarn = skip("no layer turns by its position")


class TestHyena(NoLayerAttends, CommonSuites, release.GenerationTesterMixin, unittest.TestCase):
    config_class, tiny = HyenaConfig, HYENA
    all_model_classes = (HyenaModel, HyenaForCausalLM, *HEADS)
    _torch_compile_train_cls = HyenaForCausalLM


class TestHyenaHybrid(SomeLayersAttend, CommonSuites, release.GenerationTesterMixin, unittest.TestCase):
    config_class, tiny = HyenaConfig, {**HYENA, "layer_types": ["full_attention", "hyena"]}
    all_model_classes = (HyenaModel, HyenaForCausalLM, *HEADS)
    _torch_compile_train_cls = HyenaForCausalLM

    test_retain_grad_hidden_states_attentions = skip("weights of a padded batch are a copy in its columns")
    test_model_rope_scaling_from_config_1_dynamic = skip("dynamic rotary: its logits depend on tokens to come")
    test_model_rope_scaling_frequencies = skip("dynamic rotary: its logits depend on tokens to come")


class TestHyenaBidirectional(NoLayerAttends, CommonSuites, unittest.TestCase):
    config_class, tiny = HyenaConfig, {**HYENA, "is_causal": False}
    all_model_classes = (HyenaModel, HyenaForMaskedLM, *HEADS)
    _torch_compile_train_cls = HyenaForMaskedLM

    test_training_overfit = skip("the suite trains and prompts causal models only")


LFM2 = {
    **SHAPE,
    "intermediate_size": 37,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "layer_types": ["full_attention", "conv"],
}
MAMBA2 = {
    **SHAPE,
    "num_heads": 8,
    "n_groups": 8,
    "state_size": 2,
    "head_dim": 8,
    "conv_kernel": 4,
    "chunk_size": 8,
    "tie_word_embeddings": False,
}


class TestLfm2(SomeLayersAttend, CommonSuites, release.GenerationTesterMixin, unittest.TestCase):
    config_class, tiny = Lfm2Config, LFM2
    all_model_classes = (Lfm2Model, Lfm2ForCausalLM)
    _torch_compile_train_cls = Lfm2ForCausalLM


class TestMamba2(CommonSuites, release.GenerationTesterMixin, unittest.TestCase):
    config_class, tiny = Mamba2Config, MAMBA2
    all_model_classes = (Mamba2Model, Mamba2ForCausalLM)
    has_attentions = False
    test_missing_keys = False  # as in its own test


CASES = (TestHyena, TestHyenaHybrid, TestHyenaBidirectional, TestLfm2, TestMamba2)


@pytest.fixture(scope="module", autouse=True)
def _checkpoints():
    bytes_ = {"vocab_size": len(HyenaByteTokenizer()), "pad_token_id": HyenaByteTokenizer().pad_token_id}
    pipelines.write_checkpoints(
        PIPELINE, [(case.config_class(**{**case.tiny, **bytes_}), case.all_model_classes) for case in CASES]
    )
