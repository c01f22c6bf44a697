"""A distilled model drafts for its own teacher: the teacher's tokens in fewer of its calls.

Run: python -m pytest tests/test_distilled_assistant.py -q
"""

from functools import cache

import pytest
import torch

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
