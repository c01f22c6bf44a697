"""Train a language model to predict what a teacher predicts: every token of text teaches a whole distribution.

    L = mean over predicted tokens of KL(softmax(teacher's logits), softmax(logits))          (Hinton et al. 2015)

Logits of all tokens are never held: a block of them is made from the last hidden states, compared, and turned into
gradients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyena_hf.linear_attention import attention_mode
from training.data import UNPREDICTED
from training.parameter_groups import unwrap


# the student inside its wrappers, and inputs of the body: the teacher's last hidden states (B, L, D) and head (V, D)
Teacher = Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]]

_BLOCK = 2**24  # logits at a time


class ModelTeacher:
    """A model that stays as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        head_of(model)
        self.model = model.eval().requires_grad_(requires_grad=False)

    def __call__(self, student: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict; on the student's device."""
        self.model.to(student.device)
        with torch.no_grad():
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden, head_of(self.model)


class FormerSelf:
    """What a converted model was: softmax attention, without its adapters. It needs no second copy of the weights."""

    def __call__(self, student: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict with the student's own frozen weights.

        Raises:
            ValueError: The student has no adapters: its weights are no longer those of the teacher.
        """
        if not hasattr(student, "disable_adapter"):
            raise ValueError("a model that is trained in full is not its own teacher any more; give a copy of it")
        inner: Any = unwrap(student)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        with torch.no_grad(), _evaluating(student), student.disable_adapter(), attention_mode(inner, "softmax"):
            for parameter in trained:  # PEFT has frozen them, and FSDP2 asks at its first forward what is trained
                parameter.requires_grad_(requires_grad=True)
            hidden = last_states(student, inputs)
        return hidden, head_of(inner)


def last_states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states (B, L, D), through the whole model, where wrappers share gradients among devices."""
    return model(**inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states[-1]


def imitation_loss(
    model: nn.Module, inner: Any, batch: dict[str, Tensor], teacher: Teacher, total: Tensor | None = None
) -> Tensor:
    """Sum over predicted tokens of the divergence from the teacher, divided by their number.

    Args:
        model: The student in its wrappers.
        inner: The same without those of distribution, perhaps a `PeftModel`.
        batch: Packed rows, with labels that tell which tokens are predicted.
        teacher: Of this batch.
        total: What to divide by; None: the tokens of this batch.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    predicted = (batch["labels"][:, 1:] != UNPREDICTED).flatten()
    wanted, wanted_head = teacher(inner, given)
    hidden = last_states(model, given)
    hidden, wanted = (x[:, :-1].flatten(0, 1)[predicted] for x in (hidden, wanted))
    loss = divergence_from_teacher(hidden, head_of(unwrap(inner)), wanted, wanted_head)
    return loss / (predicted.sum() if total is None else total).clamp(min=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside a `with` block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def head_of(model: Any) -> Tensor:
    """The matrix (V, D) that turns last hidden states into logits, whole where it lies in shards.

    Raises:
        ValueError: The model has none, or a bias beside it; or it is trained and lies in shards.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"{type(model).__name__} makes its logits by {type(head).__name__}; imitation needs a linear head without "
            f"a bias"
        )
    if not isinstance(head.weight, DTensor):
        return head.weight
    if head.weight.requires_grad:
        raise ValueError(
            "the head is trained and was sharded again after the forward, so gradients of its use in the loss would "
            "not be shared; call fully_shard on it with reshard_after_forward=False, as accelerate does"
        )
    return head.weight.full_tensor()


def divergence_from_teacher(hidden: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher, student), in nats.

    Args:
        hidden: Last hidden states of the student (N, D).
        head: (V, D) of the student; gets a gradient where it is trained.
        wanted: Those of the teacher (N, E).
        wanted_head: (V, E) of the teacher.

    Returns:
        Float32 at least.

    Raises:
        ValueError: The vocabularies differ.
    """
    if len(head) != len(wanted_head):
        raise ValueError(f"student and teacher have vocabularies of {len(head)} and {len(wanted_head)}; expected one")
    total: Any = _Divergence.apply(hidden, head, wanted, wanted_head)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        to_hidden = torch.empty_like(hidden)
        to_head = torch.zeros_like(head, dtype=exact) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        size = max(1, _BLOCK // len(head))
        for x, y, out in zip(hidden.split(size), wanted.split(size), to_hidden.split(size), strict=True):
            student = (x @ head.mT).to(exact).log_softmax(-1)
            teacher = (y @ wanted_head.mT).to(exact).log_softmax(-1)
            p = teacher.exp()
            total += (p * (teacher - student)).sum()
            change = (student.exp() - p).to(head.dtype)
            out.copy_(change @ head)
            if to_head is not None:
                to_head += change.mT.to(exact) @ x.to(exact)
        ctx.save_for_backward(to_hidden, None if to_head is None else to_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore (one output)
        to_hidden, to_head = ctx.saved_tensors
        return to_hidden * grad.to(to_hidden.dtype), None if to_head is None else to_head * grad, None, None
