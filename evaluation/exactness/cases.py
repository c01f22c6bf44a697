"""The questions about logits: every layout of a batch, every way to feed a cache, packing, causality, export.

A case is a title and a function of a `Subject`, which returns a `Cell`. In each, sequences are laid out in some way
and every one is compared with itself alone; the columns between them hold random tokens, which must not be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from evaluation.exactness.models import VOCABULARY, Subject, call, relative_error


@dataclass(frozen=True)
class Cell:
    """What a case found.

    Attributes:
        good: within the bound, or the same tokens.
        text: a few words for the table.
        error: the largest error in units of the largest logit, where the case measures one.
        bound: what that error had to stay within.
        reason: why a model refused, or where it differs.
    """

    good: bool
    text: str
    error: float | None = None
    bound: float | None = None
    reason: str = ""


class Case(NamedTuple):
    """A row of the table."""

    title: str
    ask: Callable[[Subject], Cell]


def words(error: float) -> str:
    """An error for the table."""
    return "0" if error == 0 else f"{error:.1f}" if 0.1 <= error < 1000 else f"{error:.1e}"


def measured(errors: Iterable[tuple[float, float]]) -> Cell:
    """The worst of some (error, bound) pairs: the one that is largest beside its bound."""
    error, bound = max(errors, key=lambda pair: (pair[0] / pair[1], pair[0]))
    return Cell(good=error <= bound, text=words(error), error=error, bound=bound)


def tokens(*shape: int, seed: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def sequences(lengths: Iterable[int]) -> list[Tensor]:
    """One random sequence of each length; those of one length are the same in every case."""
    return [tokens(length, seed=1000 + length) for length in lengths]


def layout(rows: Sequence[Tensor], columns: int, places: Sequence[Iterable[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, columns): row b holds its tokens at `places[b]`, noise elsewhere."""
    ids, mask = tokens(len(rows), columns, seed=7), torch.zeros(len(rows), columns, dtype=torch.long)
    for row, (sequence, where) in enumerate(zip(rows, places, strict=True)):
        index = torch.tensor(list(where))
        ids[row, index] = sequence
        mask[row, index] = 1
    return ids, mask


def padded_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows that end at the same column."""
    columns = max(len(row) for row in rows)
    return layout(rows, columns, [range(columns - len(row), columns) for row in rows])


def padded_right(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows that begin at the same column."""
    return layout(rows, max(len(row) for row in rows), [range(len(row)) for row in rows])


def feed(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, sizes: Iterable[int]) -> Tensor:
    """Logits of consecutive calls of these sizes with one cache; what is left over makes a last call."""
    past, outputs, done = DynamicCache(config=model.config), [], 0
    for size in [*sizes, ids.shape[1]]:
        until = min(done + size, ids.shape[1])
        if until > done:
            outputs.append(call(model, ids[:, done:until], None if mask is None else mask[:, :until], past))
        done = until
    return torch.cat(outputs, dim=1)


def compared(subject: Subject, rows: Sequence[Tensor], logits: Tensor, mask: Tensor) -> Cell:
    """The logits of every row at its real tokens against the row alone; a row without tokens must be finite."""
    pairs = []
    for row, sequence in enumerate(rows):
        real = mask[row].bool()
        if real.any():
            truth, own = subject.alone(sequence)
            pairs.append((relative_error(logits[row, real], truth), subject.limit(own)))
        elif not logits[row].isfinite().all():
            return Cell(good=False, text="not finite")
    return measured(pairs)


def _at_once(subject: Subject, rows: Sequence[Tensor], batch: tuple[Tensor, Tensor]) -> Cell:
    return compared(subject, rows, call(subject.model, *batch), batch[1])


def _fed(subject: Subject, rows: Sequence[Tensor], batch: tuple[Tensor, Tensor], sizes: Iterable[int]) -> Cell:
    return compared(subject, rows, feed(subject.model, *batch, sizes), batch[1])


def left_padding_of_one(subject: Subject, lengths: Sequence[int]) -> Cell:
    """The longest and the shortest sequence, each alone in a row of ten times the shortest."""
    columns, pairs = 10 * lengths[-1], []
    for sequence in sequences((columns // 2, lengths[-1])):
        ids, mask = layout([sequence], columns, [range(columns - len(sequence), columns)])
        truth, own = subject.alone(sequence)
        got = call(subject.model, ids, mask)[0, mask[0].bool()]
        pairs.append((relative_error(got, truth), subject.limit(own)))
    return measured(pairs)


def left_padding(subject: Subject, lengths: Sequence[int]) -> Cell:
    rows = sequences(lengths)
    return _at_once(subject, rows, padded_left(rows))


def right_padding(subject: Subject, lengths: Sequence[int]) -> Cell:
    rows = sequences(lengths)
    return _at_once(subject, rows, padded_right(rows))


def right_padding_then_steps(subject: Subject, lengths: Sequence[int]) -> Cell:
    """Prompts padded on the right in one call, then 20 tokens for every row, one by one."""
    steps, columns = 20, max(lengths) + 20
    rows = sequences(length + steps for length in lengths)
    places = [[*range(length), *range(columns - steps, columns)] for length in lengths]
    return _fed(subject, rows, layout(rows, columns, places), [columns - steps, *[1] * steps])


def _scattered(lengths: Sequence[int]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    rows, columns = sequences(lengths), max(lengths) * 5 // 4
    orders = [torch.randperm(columns, generator=torch.Generator().manual_seed(row)) for row in range(len(rows))]
    places = [order[: len(row)].sort().values.tolist() for row, order in zip(rows, orders, strict=True)]
    return rows, layout(rows, columns, places)


def holes(subject: Subject, lengths: Sequence[int]) -> Cell:
    """Every row's tokens at random columns."""
    rows, batch = _scattered(lengths)
    return _at_once(subject, rows, batch)


def padding_in_a_later_chunk(subject: Subject, lengths: Sequence[int]) -> Cell:
    """A conversation: a full first turn, a second turn padded on either side, a full third one."""
    first, second, third = 30, max(lengths), 10
    rows = sequences(first + length + third for length in lengths)
    places = []
    for row, length in enumerate(lengths):
        begin = first + (second - length if row % 2 else 0)
        places.append([*range(first), *range(begin, begin + length), *range(first + second, first + second + third)])
    return _fed(subject, rows, layout(rows, first + second + third, places), [first, second])


def chunks(subject: Subject, lengths: Sequence[int]) -> Cell:
    """Calls of 1, 14, 3, 22 columns and the rest, rows padded on the left."""
    rows = sequences(lengths)
    return _fed(subject, rows, padded_left(rows), [1, 14, 3, 22])


def chunks_of_equal_rows(subject: Subject, lengths: Sequence[int]) -> Cell:
    """The same calls, rows of equal length, no mask."""
    rows = [tokens(max(lengths), seed=seed) for seed in (1, 2)]
    logits = feed(subject.model, torch.stack(rows), None, [1, 14, 3, 22])
    return compared(subject, rows, logits, torch.ones(2, max(lengths)))


def token_by_token(subject: Subject, lengths: Sequence[int]) -> Cell:
    """One column a call, the padding on the left too."""
    rows = sequences(lengths)
    return _fed(subject, rows, padded_left(rows), [1] * max(lengths))


def token_by_token_of_equal_rows(subject: Subject, lengths: Sequence[int]) -> Cell:
    rows = [tokens(max(lengths), seed=seed) for seed in (1, 2)]
    logits = feed(subject.model, torch.stack(rows), None, [1] * max(lengths))
    return compared(subject, rows, logits, torch.ones(2, max(lengths)))


def several_tokens_a_call(subject: Subject, lengths: Sequence[int]) -> Cell:
    """A prompt of 10 columns, then 5, 2, 3, 4, 5, 2, ... at a time."""
    rows = sequences(lengths)
    return _fed(subject, rows, padded_left(rows), [10, *[5, 2, 3, 4] * (max(lengths) // 14)])


def masked_rows(subject: Subject, lengths: Sequence[int]) -> Cell:
    """Two rows without any token among others, in one call and 5 steps: finite, and they disturb nobody."""
    rows = sequences(lengths)
    ids, mask = padded_left(rows)
    mask[1], mask[-1] = 0, 0
    return _fed(subject, rows, (ids, mask), [max(lengths) - 5, *[1] * 5])


def unusual_lengths(subject: Subject) -> Cell:
    """Lengths 1, 2, primes and past the trained 256: in one padded call, and each alone, its last tokens as steps."""
    rows = sequences((1, 2, 3, 7, 31, 131, 300))
    ids, mask = padded_left(rows)
    cells = [compared(subject, rows, call(subject.model, ids, mask), mask)]
    for row in rows:
        steps = min(10, len(row) - 1)
        logits = feed(subject.model, row[None], None, [len(row) - steps, *[1] * steps])
        cells.append(compared(subject, [row], logits, torch.ones(1, len(row))))
    return max(cells, key=lambda cell: (cell.error or 0.0) / (cell.bound or 1.0))


def causality(subject: Subject, length: int) -> Cell:
    """Another token in the middle: logits before it stay."""
    (before,), at = sequences((length,)), length // 2
    after = before.clone()
    after[at] = (after[at] + 1) % VOCABULARY
    (truth, own), (got, _) = subject.alone(before), subject.alone(after)
    bound = {torch.float64: 1e-14, torch.float32: 1e-5}.get(subject.dtype, subject.limit(own))
    return measured([(relative_error(got[:at], truth[:at]), bound)])


# packed documents

DOCUMENTS = (45, 12, 1, 28, 6, 31)


def _by_position_ids(lengths: Sequence[int]) -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def _by_seq_idx(lengths: Sequence[int]) -> dict[str, Any]:
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {**_by_position_ids(lengths), "seq_idx": numbers[None].to(torch.int32)}


def _by_cu_seq_lens(lengths: Sequence[int]) -> dict[str, Any]:
    ends = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {**_by_position_ids(lengths), "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **longest}


# as transformers' DataCollatorWithFlattening gives them: positions always, the other two on request
PACKINGS = {"position_ids": _by_position_ids, "seq_idx": _by_seq_idx, "cu_seq_lens_q": _by_cu_seq_lens}


def packed(subject: Subject, described_by: str) -> Cell:
    """Documents one after the other in one row."""
    rows = sequences(DOCUMENTS)
    logits = call(subject.model, torch.cat(rows)[None], **PACKINGS[described_by](DOCUMENTS))[0]
    truths = [subject.alone(row) for row in rows]
    pairs = zip(logits.split(DOCUMENTS), truths, strict=True)
    return measured((relative_error(part, truth), subject.limit(own)) for part, (truth, own) in pairs)


def _gradients(model: PreTrainedModel, calls: Iterable[tuple[Tensor, dict[str, Any]]]) -> dict[str, Tensor]:
    """Gradients of all parameters, summed over calls, of fixed random projections of every token's logits."""
    model.zero_grad()
    done = 0
    with torch.enable_grad():
        for ids, packing in calls:
            logits = call(model, ids, **packing)
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(sum(DOCUMENTS), VOCABULARY, generator=generator).to(logits.dtype)
            (logits[0] * weights[done : done + ids.shape[1]]).sum().backward()
            done += ids.shape[1]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def packed_backward(subject: Subject, described_by: str) -> Cell:
    """Gradients of all parameters from packed documents against the sum over the documents alone."""
    rows = sequences(DOCUMENTS)
    apart = [(row[None], {}) for row in rows]
    together = [(torch.cat(rows)[None], PACKINGS[described_by](DOCUMENTS))]
    truth, got = _gradients(subject.model, apart), _gradients(subject.model, together)
    with subject.finer_arithmetic():
        finer = _gradients(subject.finer, apart)
    error = max(relative_error(got[name], truth[name]) for name in truth)
    own = max(relative_error(truth[name], finer[name]) for name in truth)
    return measured([(error, subject.limit(own))])


def export(subject: Subject) -> Cell:
    """torch.export for a range of lengths, the exported model at both ends and between."""
    length = torch.export.Dim("length", min=2, max=250)
    exported = torch.export.export(
        subject.model,
        (),
        {"input_ids": tokens(1, 40, seed=3), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    ).module()
    pairs = []
    for sequence in sequences((2, 77, 250)):
        truth, own = subject.alone(sequence)
        got = exported(input_ids=sequence[None], use_cache=False).logits[0]
        pairs.append((relative_error(got, truth), subject.limit(own)))
    return measured(pairs)


def logit_cases(*, smoke: bool = False) -> list[Case]:
    """All cases of this module; smaller ones, and no export, when `smoke`."""
    lengths = (48, 23, 12, 5) if smoke else (120, 97, 73, 60, 41, 29, 18, 12)
    batched = {
        "left padding, batch of 1": left_padding_of_one,
        "left padding, up to 90%": left_padding,
        "right padding": right_padding,
        "right-padded prompts, then 20 steps": right_padding_then_steps,
        "holes in the mask": holes,
        "padding inside a later chunk": padding_in_a_later_chunk,
        "chunked prefill 1/14/3/22, equal rows": chunks_of_equal_rows,
        "chunked prefill 1/14/3/22, ragged rows": chunks,
        "token by token, equal rows": token_by_token_of_equal_rows,
        "token by token, ragged rows": token_by_token,
        "several new tokens a call": several_tokens_a_call,
        "rows that are masked entirely": masked_rows,
    }
    cases = [Case(title, lambda subject, ask=ask: ask(subject, lengths)) for title, ask in batched.items()]
    cases.append(Case("lengths 1, primes, past the trained", unusual_lengths))
    for title, ask in (("packed by", packed), ("gradients, packed by", packed_backward)):
        cases += [Case(f"{title} {key}", lambda subject, ask=ask, key=key: ask(subject, key)) for key in PACKINGS]
    cases.append(Case("a later token changes nothing before", lambda subject: causality(subject, 131)))
    return cases if smoke else [*cases, Case("torch.export, any length from 2 to 250", export)]
