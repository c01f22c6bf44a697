"""What the pipeline mixin runs for each task: the release's own checks are not in its source distribution.

The interface is the mixin's: `get_test_pipeline` gives a pipeline and examples for it, `run_pipeline_test` checks
outputs. The mixin itself then runs ten examples in batches of four.
"""

import json
from typing import ClassVar

import torch
from transformers import pipeline, set_seed

from hyena_hf import HyenaByteTokenizer

from .release import CHECKPOINTS


TEXTS = ["This is a test", "Another, longer test"]


def write_checkpoints(pipeline_module, configs_and_classes) -> None:
    """Make a checkpoint with a byte tokenizer for every model, and tell the mixin of them."""
    summary = {}
    for config, classes in configs_and_classes:
        for model_class in classes:
            set_seed(0)
            folder = CHECKPOINTS / config.model_type / model_class.__name__
            model_class(config).save_pretrained(folder)
            HyenaByteTokenizer().save_pretrained(folder)
            summary[model_class.__name__] = {"tokenizer_classes": ["HyenaByteTokenizer"], "processor_classes": []}
    (CHECKPOINTS / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))
    pipeline_module.tiny_model_summary.update(summary)


class TaskTests:
    """Base: a pipeline of one task, with texts as examples."""

    task: str
    examples = TEXTS
    settings: ClassVar = {}

    def get_test_pipeline(self, model, tokenizer, *, dtype, **_):
        dtype = getattr(torch, dtype)
        return pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **self.settings), self.examples


class FeatureExtraction(TaskTests):
    task = "feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        assert [len(pipe(text)[0]) for text in examples] == [len(pipe.tokenizer(text).input_ids) for text in examples]
        assert len(pipe(examples[0])[0][0]) == pipe.model.config.hidden_size


class TextGeneration(TaskTests):
    task = "text-generation"

    def run_pipeline_test(self, pipe, examples):
        (whole,) = pipe(examples[0], max_new_tokens=5, do_sample=False)
        assert whole["generated_text"].startswith(examples[0])
        (rest,) = pipe(examples[0], max_new_tokens=5, do_sample=False, return_full_text=False)
        assert whole["generated_text"] == examples[0] + rest["generated_text"]
        (ids,) = pipe(examples[0], max_new_tokens=5, do_sample=False, return_tensors=True)
        assert len(ids["generated_token_ids"]) <= len(pipe.tokenizer(examples[0]).input_ids) + 5
        assert [len(outputs) for outputs in pipe(examples, max_new_tokens=5, num_return_sequences=2)] == [2, 2]


class TextClassification(TaskTests):
    task = "text-classification"

    def run_pipeline_test(self, pipe, examples):
        labels = set(pipe.model.config.id2label.values())
        assert {answer["label"] for answer in pipe(examples)} <= labels
        every = pipe(examples[0], top_k=None)
        assert {answer["label"] for answer in every} == labels
        assert abs(sum(answer["score"] for answer in every) - 1) < 1e-2


class TokenClassification(TaskTests):
    task = "token-classification"

    def run_pipeline_test(self, pipe, examples):
        answers = pipe(examples[0], ignore_labels=[])
        assert [answer["index"] for answer in answers] == sorted(answer["index"] for answer in answers)
        assert {answer["entity"] for answer in answers} <= set(pipe.model.config.id2label.values())
        assert len(answers) == len(examples[0])


class FillMask(TaskTests):
    task = "fill-mask"
    examples: ClassVar = ["This is a t<|mask|>st", "Anoth<|mask|>r test"]
    settings: ClassVar = {"tokenizer_kwargs": {"split_special_tokens": False}}  # text is bytes unless told otherwise

    def run_pipeline_test(self, pipe, examples):
        assert [len(pipe(text, top_k=3)) for text in examples] == [3, 3]
        best, second, _ = pipe(examples[0], top_k=3)
        assert best["score"] >= second["score"]


TASKS = (FeatureExtraction, TextGeneration, TextClassification, TokenClassification, FillMask)
