"""A distilled model drafts for its own teacher: the teacher's tokens in fewer of its calls.

Run: python -m pytest tests/test_distilled_assistant.py -q
"""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.distillation import distill
from tests.models import tokens
from tests.test_distill_model import KINDS, smooth


NEW = 24
OPTIONS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@cache
def teacher_and_student(name):
    teacher = smooth(name).double()
    student, _ = distill(teacher, state_size=12)
    # as many drafts a round as may be, whatever the student thinks of them
    student.generation_config.num_assistant_tokens = 4
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0
    return teacher, student


def calls_of(model, monkeypatch):
    """Widths of the inputs of every call."""
    widths, forward = [], type(model).forward

    def counted(self, input_ids=None, **kwargs):
        if self is model:
            widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return widths


@pytest.mark.parametrize("name", list(KINDS))
def test_a_distilled_model_drafts_for_its_teacher_without_a_change(name, monkeypatch):
    teacher, student = teacher_and_student(name)
    ids = tokens(1, 30)
    alone = teacher.generate(ids, **OPTIONS)
    widths = calls_of(teacher, monkeypatch)
    assert torch.equal(teacher.generate(ids, assistant_model=student, **OPTIONS), alone)
    # the prompt and its drafts, then five tokens a round at best; half of the drafts are good enough here
    assert len(widths) <= NEW / 2


@pytest.mark.parametrize("name", list(KINDS))
def test_a_distilled_model_takes_drafts_from_its_prompt(name):
    _, student = teacher_and_student(name)
    ids = tokens(1, 12).repeat(1, 3)
    assert torch.equal(student.generate(ids, prompt_lookup_num_tokens=5, **OPTIONS), student.generate(ids, **OPTIONS))


def test_a_distilled_model_is_drafted_for_by_its_teacher():
    teacher, student = teacher_and_student("order 2")
    ids = tokens(1, 30)
    assert torch.equal(student.generate(ids, assistant_model=teacher, **OPTIONS), student.generate(ids, **OPTIONS))


@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
def test_float32_steps_of_a_distilled_model_give_the_logits_of_the_whole_sequence(initializer_range):
    """Filters that few states cannot hold once got residues of 1e5, whose float32 steps were off by 1e-2."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    model = HyenaForCausalLM(
        HyenaConfig(**sizes, max_position_embeddings=512, initializer_range=initializer_range)
    ).requires_grad_(False)
    ids = torch.randint(0, 61, (2, 300))
    for state_size in (4, 8, 16):
        student, _ = distill(model.eval(), state_size=state_size)
        past = DynamicCache(config=student.config)
        steps = [student(part, past_key_values=past).logits for part in ids.split([100, *[1] * 200], dim=1)]
        whole = student(ids, use_cache=False).logits
        assert (torch.cat(steps, dim=1) - whole).abs().max() <= 1e-5 * max(1, whole.abs().max())
