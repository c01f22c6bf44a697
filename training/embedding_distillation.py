# SPDX-License-Identifier: Apache-2.0
"""Train an encoder to give the embeddings of another one, on text without labels.

    student = convert_attention(teacher)
    attention_transfer(student, batches, steps=80)                   # the feature maps alone
    distil_embeddings(student, teacher, batches, steps=200)         # all weights but the embeddings of tokens
    agreement(embed(student, chunks), embed(teacher, chunks))        # cosine, nearest neighbours

Attention transfer trains every layer on the inputs that the teacher gives it; this trains all layers together on their
own, so that they make up for each other's errors. The loss of a batch is

    1 - mean cosine of embeddings + mean over layers of (squared error of hidden states / their mean square)

Sentence encoders (all-MiniLM-L6-v2) embed a text as the mean of the last hidden states of its tokens.

B rows, L tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Agreement:
    """How near embeddings are to those of a teacher.

    Attributes:
        cosine: Mean cosine of a text's two embeddings.
        neighbours: Share of texts whose nearest other text, by cosine, is the same with both.
    """

    cosine: float
    neighbours: float


def text_chunks(tokenizer: PreTrainedTokenizerBase, text: str, length: int = 128) -> Tensor:
    """Token ids (B, L) of a text cut into rows of `length`, the tokenizer's special tokens around each; no padding.

    Raises:
        ValueError: `length` has no room for a token beside the special ones, or the text is shorter than a row.
    """
    special = tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise ValueError(f"length ({length}) must be at least {special + 1}, special tokens included")
    encoded: Any = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
    rows = [ids for ids in encoded["input_ids"] if len(ids) == length]
    if not rows:
        raise ValueError(f"the text is shorter than a row of {length} tokens; give a longer text")
    return torch.tensor(rows)


@torch.no_grad()
def embed(model: PreTrainedModel, ids: Tensor, batch_size: int = 32) -> Tensor:
    """Embeddings (B, D), the mean of the last hidden states, of rows of ids (B, L) without padding."""
    was_training = model.training
    model.eval()
    try:
        parts = [model(input_ids=part.to(model.device)).last_hidden_state.mean(1) for part in ids.split(batch_size)]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def agreement(found: Tensor, expected: Tensor) -> Agreement:
    """Compare embeddings (B, D) of a student and its teacher.

    Raises:
        ValueError: Shapes differ, or there are fewer than three rows, so that every neighbour is known beforehand.
    """
    if found.shape != expected.shape or len(found) < 3:
        raise ValueError(
            f"embeddings must have one shape (B, D) with B of 3 or more, got {tuple(found.shape)} and "
            f"{tuple(expected.shape)}"
        )
    ours, theirs = (nn.functional.normalize(x.double(), dim=1) for x in (found, expected))
    nearest = [(x @ x.mT).fill_diagonal_(-math.inf).argmax(dim=1) for x in (ours, theirs)]
    return Agreement(float((ours * theirs).sum(1).mean()), float((nearest[0] == nearest[1]).double().mean()))


def distil_embeddings(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[Any],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    map_learning_rate: float = 1e-3,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train an encoder in place towards the hidden states and embeddings of its teacher.

    AdamW without weight decay, a tenth of the steps warm-up, a cosine to zero, gradients clipped to norm 1, and no
    dropout. The embeddings of tokens stay as they are: most have no token in a batch.

    Args:
        student: A bare encoder, for instance from `convert_attention`.
        teacher: An encoder of the same layers and width.
        batches: One a step: ids (B, L), or dicts with `input_ids` and perhaps `attention_mask`. They are begun again
            at the end.
        steps: Optimizer steps.
        learning_rate: The peak, of all weights but feature maps.
        map_learning_rate: The peak, of feature maps.
        progress: Called after each step with its number, from 1, and its loss.

    Returns:
        The loss of every step.

    Raises:
        ValueError: `steps` or a learning rate is not positive, there are no batches, the encoders differ in shape, or
            a loss is no finite number.
    """
    if steps < 1 or not min(learning_rate, map_learning_rate) > 0:
        raise ValueError(
            f"steps ({steps}) and the learning rates ({learning_rate}, {map_learning_rate}) must be positive"
        )
    losses: list[float] = []
    with _trainable(student, teacher) as (others, maps):
        groups = [{"params": others, "lr": learning_rate}, {"params": maps, "lr": map_learning_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for step, batch in enumerate(_repeated(batches, steps), start=1):
            loss = distillation_loss(student, teacher, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"the loss is {losses[-1]} at step {step}; lower the learning rates")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*others, *maps], 1.0)
            optimizer.step()
            rates.step()
            if progress is not None:
                progress(step, losses[-1])
    return losses


def distillation_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Any) -> Tensor:
    """The loss of the module's docstring, (); masked tokens count nowhere.

    Raises:
        ValueError: The encoders differ in layers or width.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    inputs = {name: inputs[name].to(student.device) for name in ("input_ids", "attention_mask") if name in inputs}
    with torch.no_grad():
        expected = teacher(**inputs, output_hidden_states=True).hidden_states[1:]
    found = student(**inputs, output_hidden_states=True).hidden_states[1:]
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ValueError(
            f"the student has {len(found)} layers of width {found[-1].shape[-1]}, the teacher {len(expected)} of "
            f"{expected[-1].shape[-1]}; they must be alike"
        )
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).unsqueeze(-1).to(found[-1])  # (B, L, 1)
    errors = [
        ((x - y).square() * mask).sum() / (y.square() * mask).sum() for x, y in zip(found, expected, strict=True)
    ]
    pooled = [(x * mask).sum(1) for x in (found[-1], expected[-1])]
    return 1 - nn.functional.cosine_similarity(*pooled, dim=-1).mean() + torch.stack(errors).mean()


@contextmanager
def _trainable(student: PreTrainedModel, teacher: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Weights to train, feature maps apart: all but tables of embeddings and the pooler, which no hidden state depends
    on. Meanwhile the others have no gradients, and neither model has dropout."""
    tables = {id(p) for module in student.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    before = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    was_training = student.training, teacher.training
    student.eval()
    teacher.eval()
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in student.named_parameters():
        trained = id(parameter) not in tables and not name.startswith("pooler.")
        parameter.requires_grad_(trained)
        if trained:
            parts[".linear_attention." in name].append(parameter)
    try:
        yield parts
    finally:
        for parameter, wanted in before:
            parameter.grad = None
            parameter.requires_grad_(wanted)
        student.train(was_training[0])
        teacher.train(was_training[1])


def _rate(step: int, steps: int) -> float:
    """Fraction of the peak: linear for a tenth of the steps, then a cosine to zero."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    kept = list(islice(batches, steps))
    if not kept:
        raise ValueError("there are no batches to train on; give some")
    return islice(cycle(kept), steps)
