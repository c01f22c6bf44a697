# SPDX-License-Identifier: Apache-2.0
"""What one operator remembers of its inputs; the rule that all follow stands in `hyena_hf.cache`."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hyena_hf.ops import causal_fftconv, multihead_conv
from hyena_hf.ops.continued import continued_fftconv
from hyena_hf.ops.precision import is_short

from .taps import DOT_LENGTH, Evaluable, FrozenTaps, Taps


# Products that exist at once in a sum over a past: they fit a cache.
_WORK = 1 << 17


def shift_right(x: Tensor, by: Tensor) -> Tensor:
    """Shift row b of x (B, C, T) right by by[b] >= 0 columns, zeros coming in."""
    index = torch.arange(x.shape[-1], device=x.device) - by.unsqueeze(1)  # (B, T)
    moved = x.gather(2, index.clamp(min=0).unsqueeze(1).expand_as(x))
    return moved.masked_fill((index < 0).unsqueeze(1), 0)


def shift_left(x: Tensor, by: Tensor) -> Tensor:
    """Columns by[b] onwards of row b of x (B, C, T); what comes in at the right is unspecified."""
    index = torch.arange(x.shape[-1], device=x.device) + by.unsqueeze(1)
    return x.gather(2, index.clamp(max=x.shape[-1] - 1).unsqueeze(1).expand_as(x))


def check_same(held: Sequence[int], held_dtype: torch.dtype, given: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse inputs of other rows, channels or dtype than a cache holds.

    Raises:
        ValueError: They differ.
    """
    if held_dtype != dtype or tuple(held) != tuple(given):
        raise ValueError(
            f"the cache holds {held[0]} rows and {held[1]} channels of {held_dtype}, but the model gives {given[0]} "
            f"rows and {given[1]} channels of {dtype}; start with an empty cache after changing the model's dtype"
        )


def thawed(held: Any) -> Any:
    """What a cache holds, with copies of the tensors in it that were made in inference mode."""
    if isinstance(held, Tensor):
        return held.clone() if held.is_inference() else held
    if isinstance(held, dict):
        return {key: thawed(value) for key, value in held.items()}
    if isinstance(held, list):
        return [thawed(value) for value in held]
    if isinstance(held, tuple):
        parts = [thawed(value) for value in held]
        return type(held)(*parts) if hasattr(held, "_fields") else tuple(parts)
    if is_dataclass(held) and not isinstance(held, type):
        return replace(held, **{field.name: thawed(getattr(held, field.name)) for field in fields(held)})
    return held


class History:
    """Inputs of one operator: committed ones right-aligned, then pending ones left-aligned.

    Args:
        limit: Committed columns that are ever needed; None for all.
        fixed: Allocate `limit` columns at once and never move them (static caches): columns before a row's first token
            are zero, and `lead` counts them.
        capacity: Columns to allocate at first where there is no limit; a hint.
        queries: Leading channels that only ask and need not be remembered once committed.
    """

    # whether taps of the filter are needed once inputs are committed
    needs_taps = True

    def __init__(
        self, limit: int | None, *, fixed: bool = False, capacity: int | None = None, queries: int = 0
    ) -> None:
        self.limit, self.fixed, self.capacity, self.queries = limit, fixed, capacity, queries
        self.buffer: Tensor | None = None  # (B, C - queries, >= used)
        self.used = 0
        self.lead: Tensor | None = None  # empty columns before each row's past (B,); None: no row has any
        self.pending: Tensor | None = None  # (B, C, P)
        self.pending_counts: Tensor | None = None  # (B,); None: P for every row

    def past(self, w: Tensor) -> Tensor:
        """Committed inputs (B, C - queries, T); empty before the first commit."""
        if self.buffer is None:
            return w[:, self.queries :, :0]
        check_same(self.buffer.shape[:2], self.buffer.dtype, (len(w), w.shape[1] - self.queries), w.dtype)
        return self.buffer[..., : self.used]

    def reachable(self, w: Tensor) -> Tensor:
        """The past without the columns that must be empty, because w would not fit into a static cache otherwise."""
        past = self.past(w)
        return past[..., w.shape[-1] :] if self.fixed else past

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Add inputs w (B, C, n) behind the past; of row b only the first counts[b] (None: all)."""
        past, w = self.past(w), w[:, self.queries :]
        short = None if counts is None else w.shape[-1] - counts
        if self.fixed:
            self._commit_fixed(past, w, short)
        elif short is None and self.limit is None and not w.requires_grad:
            self._append(w)
        else:
            full = torch.cat([past, w], dim=-1)
            if short is not None:
                self.lead = short + (0 if self.lead is None else self.lead)
                full = shift_right(full, short)
            drop = 0 if self.limit is None else max(full.shape[-1] - self.limit, 0)
            if drop and self.lead is not None:
                self.lead = (self.lead - drop).clamp(min=0)
            self.buffer, self.used = full[..., drop:].contiguous(), full.shape[-1] - drop

    def _commit_fixed(self, past: Tensor, w: Tensor, short: Tensor | None) -> None:
        if self.buffer is None or self.lead is None:
            self.used = self.limit or 0
            self.buffer = w.new_zeros(*w.shape[:2], self.used)
            self.lead = torch.full(w.shape[:1], self.used, device=w.device)
            past = self.buffer
        full = torch.cat([past, w], dim=-1)
        if short is not None:
            full = shift_right(full, short)
        self.buffer.copy_(full[..., full.shape[-1] - self.used :])
        self.lead.sub_(w.shape[-1] - (0 if short is None else short)).clamp_(min=0)

    def _append(self, w: Tensor) -> None:
        """Write behind the past in place; the buffer doubles when it is full."""
        end = self.used + w.shape[-1]
        if self.buffer is None or self.buffer.shape[-1] < end:
            room = max(end, self.capacity or 0, 0 if self.buffer is None else 2 * self.used)
            grown = w.new_empty(*w.shape[:2], room)
            if self.buffer is not None:
                grown[..., : self.used] = self.buffer[..., : self.used]
            self.buffer = grown
        self.buffer[..., self.used : end] = w
        self.used = end

    def replace(self, following: Tensor) -> None:
        """Go on from another buffer; in place where a compiled step must find it where it was.

        What matrix products leave has another layout, which every step to come would inherit.
        """
        if self.fixed and self.buffer is not None:
            self.buffer.copy_(following)
        else:
            self.buffer = following.contiguous()

    def respond(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs for left-aligned new inputs w (B, C, n), given what is committed; changes nothing.

        Subclasses take w and what their operator needs beside it.
        """
        raise NotImplementedError

    def push(self, w: Tensor, counts: Tensor | None, keep: int, *operator) -> Tensor:
        """Answer new inputs and remember them.

        Args:
            w: New inputs (B, C, n), left-aligned.
            counts: Real tokens of each row (B,); None: all n.
            keep: Columns that must stay pending, 0 when the cache does not record its past.
            operator: What `respond` needs beside the inputs.

        Returns:
            Outputs (B, C', n).
        """
        if self.pending is None and not keep:
            y = self.respond(w, *operator)
            self.commit(w, counts)
            return y
        if self.pending is not None and self.pending_counts is None and counts is None:
            y = self.follow(w, *operator)
            if y is not None:
                self._keep_last(torch.cat([self.pending, w], dim=-1), None, keep)
                return y
        self.forget_ahead()
        merged, merged_counts, offset = self._merge(w, counts)
        y = self.respond(merged, *operator)
        self._keep_last(merged, merged_counts, keep)
        if isinstance(offset, int):
            return y[..., offset:]
        return shift_left(y, offset)[..., : w.shape[-1]]

    def follow(self, *args: Any, **kwargs: Any) -> Tensor | None:  # noqa: ARG002 (one interface)
        """Outputs for new inputs w (B, C, n) behind committed and pending ones, as many in every row.

        None where `respond` has to answer pending inputs again beside them. Takes what `respond` does.
        """
        return None

    def forget_ahead(self) -> None:
        """Forget what `follow` knows of pending inputs, which are no longer those that it has seen."""

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Answer one input of every row and remember it, with nothing pending and nothing recorded.

        What `push` does for a column, in as few calls as there are: a step of a model is hundreds of them. Takes x
        (B, C) and what the operator needs beside it; returns (B, C').
        """
        x, *operator = args
        return self.push(x.unsqueeze(-1), None, 0, *operator, **kwargs).squeeze(-1)

    def _merge(self, w: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None, int | Tensor]:
        """Pending and new inputs in one left-aligned tensor, its counts, and where the new ones begin."""
        if self.pending is None:
            return w, counts, 0
        waiting = self.pending.shape[-1]
        merged = torch.cat([self.pending, w], dim=-1)
        if self.pending_counts is None:
            return merged, None if counts is None else waiting + counts, waiting
        # move each row's new tokens left over the columns that its pending ones do not fill
        columns = torch.arange(merged.shape[-1], device=w.device)
        gap = (waiting - self.pending_counts).unsqueeze(1)
        index = torch.where(columns < self.pending_counts.unsqueeze(1), columns, columns + gap)
        merged = merged.gather(2, index.clamp(max=merged.shape[-1] - 1).unsqueeze(1).expand_as(merged))
        total = self.pending_counts + (w.shape[-1] if counts is None else counts)
        return merged, total, self.pending_counts

    def _keep_last(self, merged: Tensor, counts: Tensor | None, keep: int) -> None:
        if counts is None:
            overflow = max(merged.shape[-1] - keep, 0)
            if overflow:
                self.commit(merged[..., :overflow], None)
            self.pending, self.pending_counts = merged[..., overflow:], None
        else:
            overflow = (counts - keep).clamp(min=0)
            most = int(overflow.max())
            if most:
                self.commit(merged[..., :most], overflow)
            self.pending_counts = counts - overflow
            self.pending = shift_left(merged, overflow)[..., : max(int(self.pending_counts.max()), 1)]
        if not keep:
            self.forget_ahead()
            self.pending = self.pending_counts = None

    @property
    def waiting(self) -> int | Tensor:
        """Inputs that are pending: an int, or (B,) per row."""
        if self.pending is None:
            return 0
        return self.pending.shape[-1] if self.pending_counts is None else self.pending_counts

    def can_crop(self, removed: int | Tensor) -> bool:
        """Whether that many inputs (an int, or (B,) per row) are still pending."""
        return bool(torch.as_tensor(self.waiting >= removed).all())

    def crop(self, removed: int | Tensor) -> None:
        """Forget the last `removed` pending inputs (an int, or (B,) per row) and commit the others."""
        if self.pending is None:
            return
        left = self.waiting - removed
        self.forget_ahead()
        pending, self.pending, self.pending_counts = self.pending, None, None
        if isinstance(left, int):
            if left:
                self.commit(pending[..., :left], None)
        else:
            self.commit(pending, left)

    @property
    def keeps_all(self) -> bool:
        """Whether committed inputs can be taken back."""
        return False

    def rewind(self, removed: int | Tensor) -> None:
        """Take back the last committed inputs (an int, or (B,) per row)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that has a batch dimension, by attribute name."""
        named = {name: getattr(self, name) for name in ("buffer", "lead", "pending", "pending_counts")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by function(tensor): reorder, repeat, select, move."""
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class ExactHistory(History):
    """All gated inputs of one long convolution: exact, O(T) time a token and O(T) memory.

    This is the reference that every other summary of the past is measured against. Filters that end need no inputs
    beyond their last tap: `limit` columns are all that a cache of such a layer ever holds.

    Args:
        exact: As in `causal_fftconv`; the others as in `History`.
    """

    def __init__(
        self, limit: int | None, *, fixed: bool = False, capacity: int | None = None, exact: bool = False
    ) -> None:
        super().__init__(limit, fixed=fixed, capacity=capacity)
        self.exact = exact

    def respond(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Long convolution of everything up to each new input.

        Args:
            w: New inputs (B, C, n).
            taps: The layer's evaluated filter.
            long_filter: The filter itself.
            index: Which of the layer's convolutions this is.
            direct: Extra tap at lag 0, (H,).
        """
        past = self.reachable(w)
        before, total = past.shape[-1], past.shape[-1] + w.shape[-1]
        exact = self.exact or is_short(total)
        if before == 0 and taps.keeps_spectra(long_filter, total):
            spectrum = taps.spectrum(long_filter, index, total, direct, exact=exact)
            return causal_fftconv(w, spectrum, exact=exact, check_finite=False)
        if before == 0 or w.shape[-1] > DOT_LENGTH:
            h = taps.rising(long_filter, index, total)
            if self.fixed:  # reversed here, so that the compiled steps to come find it done
                taps.falling(long_filter, index, total)
            return continued_fftconv(past, w, h, direct, exact=exact)
        y = self._dot(past, w, taps.falling(long_filter, index, total), w.shape[-1])
        return y + w * direct.to(w.dtype).repeat_interleave(w.shape[1] // direct.shape[0]).unsqueeze(-1)

    def follow(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor | None:
        """Few inputs behind committed and pending ones; arguments as in `respond`."""
        if w.shape[-1] > DOT_LENGTH or self.pending is None:
            return None
        past, recent = self.past(w), torch.cat([self.pending, w], dim=-1)
        h = taps.falling(long_filter, index, past.shape[-1] + recent.shape[-1])
        y = self._dot(past, recent, h, w.shape[-1])
        return y + w * direct.to(w.dtype).repeat_interleave(w.shape[1] // direct.shape[0]).unsqueeze(-1)

    @staticmethod
    def _dot(past: Tensor, w: Tensor, h: Tensor, count: int) -> Tensor:
        """The last `count` outputs of few new inputs.

        Output i is sum_s past_s h[T + i - s] + sum_{j <= i} w_j h[i - j]; h falling, (H, T + n).
        """
        batch, channels, before = past.shape
        new, last = w.shape[-1], h.shape[-1]
        shape = batch, h.shape[0], channels // h.shape[0], -1
        past, w, h = past.view(shape), w.reshape(shape), h.to(past.dtype)
        outputs = []
        for i in range(new - count, new):
            old = _dot_products(past, h[:, new - 1 - i : new - 1 - i + before])
            outputs.append(old + _dot_products(w[..., : i + 1], h[:, last - 1 - i :]))
        return torch.stack(outputs, dim=-1).view(batch, channels, count)


def _dot_products(x: Tensor, h: Tensor) -> Tensor:
    """Sums over time of x (B, H, P, T) times h (H, T): (B, H, P).

    Products of a few filters at a time, so that they stay in a cache: fresh memory costs more than the products do,
    and a batched product of vectors takes twice to five times as long.
    """
    h = h.unsqueeze(1)
    if torch.compiler.is_compiling() or x.requires_grad or h.requires_grad or x.numel() <= _WORK:
        return (x * h).sum(dim=-1)
    filters = max(1, _WORK * h.shape[0] // x.numel())
    parts = [(p * q).sum(dim=-1) for p, q in zip(x.split(filters, dim=1), h.split(filters), strict=True)]
    return torch.cat(parts, dim=1)


class HeadHistory(History):
    """Keys and values of MultiHyena heads: 2 D numbers a token instead of the D P of their outer products."""

    def respond(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """MultiHyena convolution; w holds queries, keys and values (B, 3 D, n), the rest as in `ExactHistory`."""
        kv = torch.cat([self.reachable(w), w[:, self.queries :]], dim=-1)
        keys, values = kv.chunk(2, dim=1)
        h = taps.rising(long_filter, index, kv.shape[-1])
        return multihead_conv(w[:, : self.queries], keys, values, h, direct)


class AttentionHistory(History):
    """Keys and values of an attention layer, all of them or those of a sliding window."""

    @property
    def keeps_all(self) -> bool:
        """Whether committed inputs can be taken back: those of full attention are all there, as they came."""
        return self.limit is None and self.pending is None

    def rewind(self, removed: int | Tensor) -> None:
        """Take back the last committed inputs (an int, or (B,) per row)."""
        if self.buffer is None:
            return
        if isinstance(removed, int):
            self.used -= removed
            return
        self.buffer = shift_right(self.buffer[..., : self.used], removed)
        self.lead = removed + (0 if self.lead is None else self.lead)

    def respond(self, w: Tensor, attend: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """attend(w, kv, filled): queries of w, keys and values (B, C - queries, T + n), columns that hold any."""
        kv = torch.cat([self.past(w), w[:, self.queries :]], dim=-1)
        filled = None
        if self.lead is not None:
            filled = torch.arange(kv.shape[-1], device=w.device) >= self.lead.unsqueeze(1)
        return attend(w[:, : self.queries], kv, filled)


class NoMemory:
    """Stands in for a cache layer when nothing is remembered.

    Args:
        histories: Empty ones.
        capacity: Length of the longest row to come, where that is known.
        frozen: Taps and those over later tokens that outlive this call, or None.
    """

    def __init__(
        self, histories: Sequence[History], capacity: int | None = None, frozen: FrozenTaps | None = None
    ) -> None:
        self.histories = histories
        self.taps = Taps(capacity) if frozen is None else frozen.taps
        self.reverse_taps = Taps(capacity) if frozen is None else frozen.reverse_taps

    def push(self, index: int, w: Tensor, counts: Tensor | None, *operator) -> Tensor:  # noqa: ARG002 (one interface)
        """Answer inputs w (B, C, n) that have no past."""
        return self.histories[index].respond(w, *operator)


__all__ = [
    "AttentionHistory",
    "ExactHistory",
    "HeadHistory",
    "History",
    "NoMemory",
    "check_same",
    "shift_left",
    "shift_right",
    "thawed",
]
