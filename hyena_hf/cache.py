# SPDX-License-Identifier: Apache-2.0
"""What a Hyena model remembers between calls of `forward`.

One `HyenaCacheLayer` per block holds one history per operator that mixes along the sequence: the short convolution,
every long convolution, or the keys and values of attention. All histories follow one rule:

    committed inputs are right-aligned:      every row's past ends at the same column
    new and pending inputs are left-aligned: every row's new tokens begin at the next column

so past and new are gapless in every row however unequal the rows are, answering needs no index and no mask, and only
`commit` takes counts: it shifts row b right by the columns in which it received nothing.

While a cache records its past (assisted decoding), the last inputs stay pending. `crop` drops some of them and commits
the rest: rollback is exact, and costs nothing else.

B batch, C channels of an operator, T committed columns, n new columns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .configuration_hyena import HyenaConfig
from .ops import FilterSpectrum, causal_fftconv, filter_spectrum, multihead_conv, short_conv
from .ops.continued import continued_fftconv
from .ops.engine import takes_spectra
from .ops.precision import is_short


# Columns that stay pending while a cache records its past, at least: a call leaves all of its own.
MAX_PENDING = 64

# Lengths of input for which a convolution with a frozen filter keeps a spectrum.
_MAX_SPECTRA = 8

# New tokens up to which each output is one dot product with the past instead of an FFT over everything.
_DOT_LENGTH = 4


def _shift_right(x: Tensor, by: Tensor) -> Tensor:
    """Shift row b of x (B, C, T) right by by[b] >= 0 columns, zeros coming in."""
    index = torch.arange(x.shape[-1], device=x.device) - by.unsqueeze(1)  # (B, T)
    moved = x.gather(2, index.clamp(min=0).unsqueeze(1).expand_as(x))
    return moved.masked_fill((index < 0).unsqueeze(1), 0)


def _shift_left(x: Tensor, by: Tensor) -> Tensor:
    """Columns by[b] onwards of row b of x (B, C, T); what comes in at the right is unspecified."""
    index = torch.arange(x.shape[-1], device=x.device) + by.unsqueeze(1)
    return x.gather(2, index.clamp(max=x.shape[-1] - 1).unsqueeze(1).expand_as(x))


class Evaluable(Protocol):
    """What the cache asks of a filter, see `hyena_hf.filters.LongFilter`."""

    support: int | None
    max_length: int | None

    def __call__(self, length: int) -> Tensor:
        """Taps (order - 1, H, length)."""
        ...

    def exact_taps(self, length: int) -> Tensor:
        """Taps within the support, not padded."""
        ...


class Taps:
    """The filter of one layer, evaluated once for a whole generation, or while it is frozen.

    Grows by doubling when a generation gets longer than announced. It holds tensors only, never the filter itself, so
    that copying a cache copies no weights. What belongs together is replaced at once: an evaluation that fails, or
    another thread, leaves it as it was.

    Args:
        capacity: Taps to evaluate at first; a hint.
        frozen: Evaluate without gradients, and keep spectra too.
    """

    def __init__(self, capacity: int | None = None, *, frozen: bool = False) -> None:
        self.capacity, self.frozen = capacity, frozen
        self.evaluated: tuple[Tensor, int] | None = None  # (order - 1, H, up to the support), the length they serve
        self.reversed: Tensor | None = None  # (order - 1, H, any width), lag 0 last
        self.spectra: dict[int, tuple[tuple[int, FilterSpectrum], ...]] = {}  # of each convolution, by length of input

    @property
    def h(self) -> Tensor | None:
        """The taps evaluated so far, (order - 1, H, up to the support)."""
        return None if self.evaluated is None else self.evaluated[0]

    def _reach(self, long_filter: Evaluable, length: int) -> tuple[Tensor, int]:
        """The taps, and the length that they serve."""
        if isinstance(length, torch.SymInt):  # an exported graph: no comparison may depend on the length
            return long_filter.exact_taps(length if long_filter.support is None else long_filter.support), length
        if self.evaluated is not None and self.evaluated[1] >= length:
            return self.evaluated
        hint = max(self.capacity or 0, 0 if self.evaluated is None else 2 * self.evaluated[1])
        # a filter that ends is asked for no more than its taps and the few new tokens of a step
        length = max(length, hint if long_filter.support is None else min(hint, long_filter.support))
        # the model has refused inputs longer than max_length; lags behind it meet only empty columns
        needed = min([length, *(n for n in (long_filter.support, long_filter.max_length) if n is not None)])
        if self.frozen:
            with torch.inference_mode(False), torch.no_grad():
                evaluated = long_filter(needed), length
        else:
            evaluated = long_filter(needed), length
        self.evaluated, self.reversed = evaluated, None
        return evaluated

    def rising(self, long_filter: Evaluable, index: int, length: int) -> Tensor:
        """Taps of convolution `index` for lags 0, 1, ... (H, K); all taps from K on are zero or out of reach."""
        h = self._reach(long_filter, length)[0][index]
        return h if isinstance(length, torch.SymInt) else h[:, :length]

    def falling(self, long_filter: Evaluable, index: int, length: int) -> Tensor:
        """Taps of convolution `index` for lags length - 1, ..., 0 (H, length), the order of a stored past."""
        h, served = self._reach(long_filter, length)
        backwards = self.reversed
        if backwards is None or backwards.shape[-1] < length:
            # of a filter that ends no more zeros than a step of a bounded past can reach
            end = served if long_filter.support is None else long_filter.support + _DOT_LENGTH
            width = max(length, h.shape[-1], min(served, end))
            self.reversed = backwards = pad(h, (0, width - h.shape[-1])).flip(-1)
        return backwards[index, :, backwards.shape[-1] - length :]

    def keeps_spectra(self, long_filter: Evaluable, length: int) -> bool:
        """Whether spectra are kept for inputs of a length: not in graphs, and not for frames of short filters."""
        if not self.frozen or isinstance(length, torch.SymInt):
            return False
        return takes_spectra(self._reach(long_filter, length)[0].device, length, long_filter.support)

    def spectrum(
        self, long_filter: Evaluable, index: int, length: int, direct: Tensor, *, exact: bool = False
    ) -> FilterSpectrum:
        """Transformed taps and extra tap `direct` of convolution `index` for inputs of a length."""
        known = self.spectra.get(index, ())
        for size, spectrum in known:
            if size == length and spectrum.exact == exact:
                return spectrum
        h = self.rising(long_filter, index, length)
        with torch.inference_mode(False):
            spectrum = filter_spectrum(h, length, direct.detach().to(h.dtype), exact=exact)
        # the oldest goes: batches of many lengths may not fill the memory
        self.spectra[index] = (*known[-_MAX_SPECTRA + 1 :], (length, spectrum))
        return spectrum

    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(tensor.nbytes for tensor in (self.h, self.reversed) if tensor is not None)
        return held + sum(x.spectrum.nbytes for known in self.spectra.values() for _, x in known)


class FrozenTaps:
    """Taps of a layer's filters that outlive calls. A copy of the model that holds them is not frozen."""

    def __init__(self) -> None:
        self.taps, self.reverse_taps = Taps(frozen=True), Taps(frozen=True)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class History:
    """Inputs of one operator: committed ones right-aligned, then pending ones left-aligned.

    Args:
        limit: Committed columns that are ever needed; None for all.
        fixed: Allocate `limit` columns at once and never move them (static caches): columns before a row's first token
            are zero, and `lead` counts them.
        capacity: Columns to allocate at first where there is no limit; a hint.
        queries: Leading channels that only ask and need not be remembered once committed.
    """

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
        if self.buffer.dtype != w.dtype or self.buffer.shape[:2] != w[:, self.queries :].shape[:2]:
            raise ValueError(
                f"the cache holds inputs {tuple(self.buffer.shape[:2])} of {self.buffer.dtype}, but the model gives "
                f"{tuple(w[:, self.queries :].shape[:2])} of {w.dtype}; start with an empty cache after changing the "
                f"model's dtype"
            )
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
                full = _shift_right(full, short)
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
            full = _shift_right(full, short)
        self.buffer.copy_(full[..., full.shape[-1] - self.used :])
        self.lead.sub_(w.shape[-1] - (0 if short is None else short)).clamp_(min=0)

    def _append(self, w: Tensor) -> None:
        """Write behind the past in place; the buffer doubles when it is full."""
        end = self.used + w.shape[-1]
        stale = self.buffer is not None and self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.buffer is None or self.buffer.shape[-1] < end or stale:
            room = max(end, self.capacity or 0, 0 if self.buffer is None else 2 * self.used)
            grown = w.new_empty(*w.shape[:2], room)
            if self.buffer is not None:
                grown[..., : self.used] = self.buffer[..., : self.used]
            self.buffer = grown
        self.buffer[..., self.used : end] = w
        self.used = end

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
        merged, merged_counts, offset = self._merge(w, counts)
        y = self.respond(merged, *operator)
        self._keep_last(merged, merged_counts, keep)
        if isinstance(offset, int):
            return y[..., offset:]
        return _shift_left(y, offset)[..., : w.shape[-1]]

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
            self.pending = _shift_left(merged, overflow)[..., : max(int(self.pending_counts.max()), 1)]
        if not keep:
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


class Window(History):
    """The last K - 1 inputs of the short convolution."""

    def respond(self, w: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Short convolution with taps weight (C, K) and bias (C,)."""
        past = self.past(w)
        return short_conv(w, weight, bias, pad(past, (weight.shape[1] - 1 - past.shape[-1], 0)))


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
        if before == 0 or w.shape[-1] > _DOT_LENGTH:
            h = taps.rising(long_filter, index, total)
            if self.fixed:  # reversed here, so that the compiled steps to come find it done
                taps.falling(long_filter, index, total)
            return continued_fftconv(past, w, h, direct, exact=exact)
        y = self._dot(past, w, taps.falling(long_filter, index, total))
        return y + w * direct.to(w.dtype).repeat_interleave(w.shape[1] // direct.shape[0]).unsqueeze(-1)

    @staticmethod
    def _dot(past: Tensor, w: Tensor, h: Tensor) -> Tensor:
        """Few new inputs: output i is sum_s past_s h[T + i - s] + sum_{j <= i} w_j h[i - j]; h falling, (H, T + n)."""
        batch, channels, before = past.shape
        new, last = w.shape[-1], h.shape[-1]
        shape = batch, h.shape[0], channels // h.shape[0], -1
        past, w, h = past.view(shape), w.reshape(shape), h.to(past.dtype)
        outputs = []
        for i in range(new):
            old = torch.einsum("bhct,ht->bhc", past, h[:, new - 1 - i : new - 1 - i + before])
            recent = torch.einsum("bhct,ht->bhc", w[..., : i + 1], h[:, last - 1 - i :])
            outputs.append(old + recent)
        return torch.stack(outputs, dim=-1).view(batch, channels, new)


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
        self.buffer = _shift_right(self.buffer[..., : self.used], removed)
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


class HyenaCacheLayer(CacheLayerMixin):
    """The cache of one block of a Hyena model, whatever its mixer.

    transformers builds it from `layer_types` before any width is known, so it is constructed empty; the mixer attaches
    its histories on first use.

    Args:
        max_cache_len: Capacity in tokens of a static cache; None for one that grows.
    """

    _layer_type = "hyena"
    supports_early_init = False
    is_sliding = False
    is_croppable = True

    def __init__(self, max_cache_len: int | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.expected_length: int | None = max_cache_len
        self.max_pending = MAX_PENDING
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.histories: Sequence[History] = []
        self.taps = Taps()
        self.length: int | Tensor = 0  # columns of the stream seen, what generate() counts
        self.tokens: int | Tensor = 0  # real tokens seen: an int, 0-d, or (B,) where rows differ
        self.recorded: list[Tensor | int] = []  # columns since the last crop: widths, or (B, n) masks
        # first column and mask (B, n) of every call with masked tokens; attention layers only
        self.ragged: list[tuple[int, Tensor]] = []
        self.owner: int | None = None
        self.dtype: torch.dtype | None = None  # of the weights that filled it
        self.is_initialized = False

    def attach(
        self,
        make: Callable[[int | None, int | None], Sequence[History]],
        batch: int,
        device: torch.device,
        frozen: FrozenTaps | None = None,
    ) -> None:
        """Set up the histories on first use: make(static capacity or None, length to make room for or None).

        Taps of a frozen filter are shared by all caches of that time.
        """
        if self.is_initialized:
            return
        self.histories = make(self.max_cache_len, self.expected_length)
        if frozen is not None:
            self.taps = frozen.taps
        self.taps.capacity = self.expected_length
        self.batch_size, self.device = batch, device
        self.is_initialized = True
        if self.max_cache_len is not None:
            # tensors, so that a compiled step does not depend on their values
            self.length = torch.zeros((), dtype=torch.long, device=device)
            self.tokens = torch.zeros((), dtype=torch.long, device=device)

    def push(self, index: int, w: Tensor, counts: Tensor | None, *operator) -> Tensor:
        """Answer new inputs w (B, C, n) of operator number `index` and remember them."""
        keep = 0
        if self.record_past:
            keep = max(self.max_pending, w.shape[-1])
        return self.histories[index].push(w, counts, keep, *operator)

    def advance(self, columns: int, mask: Tensor | None) -> None:
        """Count a call of `columns` stream columns, of which mask (B, n) were real (None: all). Once a call."""
        real = columns if mask is None else mask.sum(dim=1)
        attends = any(isinstance(history, AttentionHistory) for history in self.histories)
        if mask is not None and attends and not torch.compiler.is_compiling():
            self.ragged.append((int(self.length), mask))
        if self.max_cache_len is not None and mask is None:
            self.tokens.add_(columns)  # pyright: ignore (a tensor where static)
        else:
            self.tokens = self.tokens + real
        if self.max_cache_len is not None:
            self.length.add_(columns)  # pyright: ignore (a tensor where static)
        else:
            self.length = self.length + columns
        if self.record_past:
            self.recorded.append(columns if mask is None else mask)

    # what transformers asks of a cache layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """Not used: mixers call `attach`."""
        raise TypeError("a HyenaCacheLayer stores no keys and values; use the cache with a Hyena model")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Not used: mixers call `push`."""
        raise TypeError("a HyenaCacheLayer stores no keys and values; use the cache with a Hyena model")

    def get_seq_length(self) -> int:
        """Columns of the stream seen so far, padding included."""
        return self.length  # pyright: ignore (0-d tensor where static, as transformers' static layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that an attention mask must cover, and the first of them."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Capacity in tokens; -1 where the layer grows."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def activate_past_recording(self) -> None:
        """Keep the inputs to come pending so that `crop` can take them back."""
        if self.max_cache_len is not None:
            raise ValueError("a static cache cannot be rolled back; use the default (dynamic) cache")
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last -tokens_to_remove columns of the stream and commit the rest of the pending ones."""
        if tokens_to_remove != int(tokens_to_remove):
            raise ValueError(f"crop takes a whole number of tokens to remove, got {tokens_to_remove}")
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 hands over a 0-d tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if not self.record_past and all(history.keeps_all for history in self.histories):
            self._rewind(remove)
            return
        recorded = sum(part if isinstance(part, int) else part.shape[1] for part in self.recorded)
        removed = self._real_among_last(remove)
        if remove > recorded or not all(history.can_crop(removed) for history in self.histories):
            raise ValueError(
                f"crop({tokens_to_remove}) reaches beyond the tokens that can still be taken back ({recorded} were "
                f"fed since the last crop; of several calls only the last {self.max_pending} columns are kept); call "
                f"activate_past_recording() before the tokens are fed"
            )
        for history in self.histories:
            history.crop(removed)
        self.tokens = self.tokens - removed
        self.length = self.length - remove
        self.recorded = []
        self._forget_masks()

    def _rewind(self, remove: int) -> None:
        """Take back committed columns: transformers asks attention layers for it without announcing it."""
        if remove > int(self.length):
            raise ValueError(f"crop(-{remove}) reaches beyond the {int(self.length)} columns that the cache holds")
        removed: int | Tensor = remove
        if self.ragged:
            removed = self.real_columns()[:, int(self.length) - remove :].sum(dim=1)
        for history in self.histories:
            history.rewind(removed)
        self.tokens = self.tokens - removed
        self.length = self.length - remove
        self._forget_masks()

    def _forget_masks(self) -> None:
        end = int(self.length)
        self.ragged = [(start, mask[:, : end - start]) for start, mask in self.ragged if start < end]

    def _real_among_last(self, columns: int) -> int | Tensor:
        """Real tokens among the last recorded stream columns: an int, or (B,)."""
        total: int | Tensor = 0
        for part in reversed(self.recorded):
            width = min(columns, part if isinstance(part, int) else part.shape[1])
            if width:
                total = total + (width if isinstance(part, int) else part[:, -width:].sum(dim=1))
            columns -= width
        return total

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply function to every tensor with a batch dimension."""
        for history in self.histories:
            history.map(function)
        if isinstance(self.tokens, Tensor) and self.tokens.ndim:
            self.tokens = function(self.tokens)
        self.recorded = [part if isinstance(part, int) else function(part) for part in self.recorded]
        self.ragged = [(start, function(mask)) for start, mask in self.ragged]

    def real_columns(self) -> Tensor:
        """True for the columns of the stream seen so far that held tokens, (B, length)."""
        real = torch.ones(self.batch_size, int(self.length), dtype=torch.bool, device=self.device)
        for start, mask in self.ragged:
            real[:, start : start + mask.shape[1]] = mask
        return real

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row beam_idx[b] as row b."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
        if self.is_initialized:
            self.batch_size = beam_idx.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))
        if self.is_initialized:
            self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map(lambda x: x[indices.to(x.device)])
        if self.is_initialized:
            self.batch_size = int(torch.arange(self.batch_size)[indices.cpu()].shape[0])

    def reset(self) -> None:
        """Forget everything."""
        self._forget()

    def offload(self) -> None:
        """Move the histories to the CPU; counts stay, because the next call reads them before any layer runs."""
        for history in self.histories:
            history.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the histories back to the device that they came from."""
        for history in self.histories:
            history.map(lambda x: x.to(self.device, non_blocking=True))

    def nbytes(self) -> int:
        """Bytes held by the histories and by the evaluated filter."""
        return self.taps.nbytes() + sum(history.nbytes() for history in self.histories)


STATIC_LAYER_TYPE_MAPPING["hyena"] = HyenaCacheLayer

_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def adopt_cache(
    cache: Cache, config: HyenaConfig, batch: int, owner: int, dtype: torch.dtype, capacity: int | None = None
) -> list[HyenaCacheLayer]:
    """Make a transformers cache fit for a Hyena model, in place, or refuse it.

    transformers gives attention layers its own cache layers, which keep columns of the stream: with unequal rows a
    sliding window would then count padding. Empty ones are replaced by ours.

    Args:
        cache: The cache that `forward` was given.
        config: Config of the model.
        batch: Rows of the batch.
        owner: Identity of the model.
        dtype: Dtype of the model's weights.
        capacity: Tokens that a new static cache must hold, where its sliding layers do not tell.

    Returns:
        The layers of the cache.

    Raises:
        ValueError: The cache belongs to another model, dtype or batch size, or cannot serve this model.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}; use DynamicCache")
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers.extend(HyenaCacheLayer() for _ in range(config.num_hidden_layers))
        cache.layer_class_to_replicate = None
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers but the model {config.num_hidden_layers}; it belongs to "
            f"another model: build one with DynamicCache(config=model.config)"
        )
    if not all(isinstance(layer, HyenaCacheLayer) for layer in cache.layers):
        _replace_layers(cache, capacity)
    layers = cast("list[HyenaCacheLayer]", cache.layers)
    for layer in layers:
        if not layer.is_initialized:
            continue
        if layer.owner != owner:
            raise ValueError("the cache was filled by another model; start with an empty one for each model")
        if layer.dtype != dtype:
            raise ValueError(
                f"the cache was filled in {layer.dtype}, but the model's weights are {dtype}; start with an empty "
                f"cache after changing the model's dtype"
            )
        if layer.batch_size != batch:
            raise ValueError(
                f"the cache holds {layer.batch_size} sequences but the batch has {batch}; use "
                f"batch_select_indices or batch_repeat_interleave, or start with an empty cache"
            )
    return layers


def _replace_layers(cache: Cache, capacity: int | None) -> None:
    """Put our layers in the place of transformers' empty attention layers."""
    capacity = capacity or max(layer.get_max_length() for layer in cache.layers)
    # what `Cache.is_recording_past` says, which transformers 5.17 lacks
    recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, HyenaCacheLayer):
            ours = layer
        elif isinstance(layer, _REPLACEABLE) and type(layer) in _REPLACEABLE and not _holds_tokens(layer):
            ours = HyenaCacheLayer(capacity if isinstance(layer, StaticLayer) else None)
        else:
            raise ValueError(
                f"layer {index} of the cache is a {type(layer).__name__} that a Hyena model cannot use (filled by "
                f"another model, or quantized); pass an empty DynamicCache(config=model.config)"
            )
        ours.record_past = recording
        cache.layers[index] = ours


def in_turn(cache: Cache) -> Iterable[HyenaCacheLayer]:
    """The layers one after the other; those of an offloaded cache are on their device only while it is their turn."""
    layers = cast("list[HyenaCacheLayer]", cache.layers)
    return _offloading(cache, layers) if cache.offloading else layers


def _offloading(cache: Cache, layers: Sequence[HyenaCacheLayer]) -> Iterator[HyenaCacheLayer]:
    # transformers moves layers in `Cache.update`, which our mixers do not call. As there, the next layer travels on a
    # stream of its own while this one computes.
    layers[0].prefetch()
    for index, layer in enumerate(layers):
        following = layers[(index + 1) % len(layers)]
        if layer.is_initialized and layer.device.type != "cpu":
            # neither stream may read what the other one still writes
            current, transfers = torch.accelerator.current_stream(layer.device), cache.prefetch_stream
            current.wait_stream(transfers)
            transfers.wait_stream(current)
            with transfers:
                following.prefetch()
        else:
            following.prefetch()
        yield layer
        layer.offload()


def _holds_tokens(layer: CacheLayerMixin) -> bool:
    return layer.is_initialized and int(layer.get_seq_length()) > 0


__all__ = [
    "AttentionHistory",
    "ExactHistory",
    "FrozenTaps",
    "HeadHistory",
    "HyenaCacheLayer",
    "NoMemory",
    "Window",
    "adopt_cache",
    "in_turn",
]
