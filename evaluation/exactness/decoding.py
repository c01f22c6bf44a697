"""The questions about tokens: does every way to decode choose those that the model chooses without a cache?

Greedy truths are computed by a plain loop over the model alone. Where two tokens are equally good within rounding, a
greedy decoder may take either: such a difference counts as a tie if every token it chose was, given those before it,
as good as the best within twice the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.exactness.cases import Case, Cell, padded_left, sequences, tokens
from evaluation.exactness.models import Subject, call, scale


def prompts() -> list[Tensor]:
    """A prompt that repeats a phrase, so that prompt lookup finds something, and two shorter ones."""
    return [tokens(7, seed=5).repeat(3), *sequences((11, 4))]


def greedy_alone(subject: Subject, prompt: Tensor, new: int) -> Tensor:
    """`new` tokens, each the best of the whole sequence so far, run alone without a cache."""
    ids = prompt[None]
    for _ in range(new):
        ids = torch.cat([ids, call(subject.model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :]


def generated(subject: Subject, rows: Sequence[Tensor], new: int, **settings: Any) -> list[Tensor]:
    """The new tokens of every row of a batch padded on the left."""
    ids, mask = padded_left(rows)
    torch.manual_seed(0)
    out = subject.model.generate(  # pyright: ignore (the mixin's self is a protocol)
        ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **{"do_sample": False, **settings}
    )
    return list(out[:, ids.shape[1] :])


def first_difference(got: Sequence[Tensor], truth: Sequence[Tensor]) -> int | None:
    """Number of the first new token, from 1, that differs in any row."""
    found = [int((a != b).nonzero()[0]) + 1 for a, b in zip(got, truth, strict=True) if not torch.equal(a, b)]
    return min(found, default=None)


def tied(subject: Subject, prompt: Tensor, new: Tensor) -> bool:
    """Whether every new token was as good as the best within rounding."""
    whole = torch.cat([prompt, new])
    logits, _ = subject.alone(whole)
    choices = logits[len(prompt) - 1 : -1]
    loss = choices.max(-1).values - choices.gather(-1, new[:, None])[:, 0]
    return loss.max().item() <= 2 * subject.bound(whole) * scale(logits)


def same_tokens(got: Sequence[Tensor], truth: Sequence[Tensor]) -> Cell:
    """Good where no token differs."""
    at = first_difference(got, truth)
    return Cell(at is None, "same tokens" if at is None else f"differs at {at}")


def greedily(subject: Subject, rows: Sequence[Tensor], new: int, **settings: Any) -> Cell:
    """A way to decode greedily against the plain loop."""
    got = generated(subject, rows, new, **settings)
    cell = same_tokens(got, [greedy_alone(subject, row, new) for row in rows])
    if not cell.good and all(tied(subject, row, tokens) for row, tokens in zip(rows, got, strict=True)):
        return Cell(good=True, text="same, a tie", reason=f"{cell.text}, where both tokens are equally good")
    return cell


def beam_search(subject: Subject, new: int) -> Cell:
    """Three beams for a padded batch with a cache against each prompt alone without one."""
    rows = prompts()
    truth = [generated(subject, [row], new, num_beams=3, use_cache=False)[0] for row in rows]
    return same_tokens(generated(subject, rows, new, num_beams=3), truth)


def sampling(subject: Subject, new: int) -> Cell:
    """Three samples of a prompt from the same seed, with and without a cache."""
    settings = {"do_sample": True, "num_return_sequences": 3}
    truth = generated(subject, prompts()[:1], new, use_cache=False, **settings)
    return same_tokens(generated(subject, prompts()[:1], new, **settings), truth)


def token_cases(*, smoke: bool = False) -> list[Case]:
    """All cases of this module, of fewer tokens when `smoke`."""
    new = 8 if smoke else 32

    def one_row(subject: Subject, **settings: Any) -> Cell:
        return greedily(subject, prompts()[:1], new, **settings)

    static = {"cache_implementation": "static", "disable_compile": True}
    return [
        Case("greedy with a cache, padded batch", lambda subject: greedily(subject, prompts(), new)),
        Case("greedy, static cache, padded batch", lambda subject: greedily(subject, prompts(), new, **static)),
        Case("beam search, padded batch", lambda subject: beam_search(subject, new)),
        Case("sampling with a cache", lambda subject: sampling(subject, new)),
        Case("prompt lookup", lambda subject: one_row(subject, prompt_lookup_num_tokens=5)),
        Case("assisted decoding", lambda subject: one_row(subject, assistant_model=subject.assistant())),
    ]
