# SPDX-License-Identifier: Apache-2.0
"""The past of a modal filter in constant memory; formulas in `hyena_hf.ops.modal`."""

from typing import Protocol, cast

import torch
from torch import Tensor

from hyena_hf.ops import causal_fftconv, multihead_conv
from hyena_hf.ops.hyena_step import hyena_step
from hyena_hf.ops.modal import (
    ModalStep,
    ModalSystem,
    advance,
    advance_one,
    decayed,
    modal_response,
    modal_step,
    read_out,
)
from hyena_hf.ops.precision import is_short

from .history import History, check_same, shift_right
from .taps import Evaluable, Taps
from .window import Window


# Columns of outer products that exist at once.
_BLOCK = 256


class Modal(Protocol):
    """What a state asks of a filter, see `hyena_hf.filters.ModalFilter`."""

    def system(self, index: int) -> tuple[ModalSystem, Tensor]:
        """The recurrence of one convolution, and its tap at lag 0 (H,)."""
        ...


class ModalState(History):
    """d numbers a channel instead of all inputs of a modal filter: a token takes constant time and memory.

    The state is the `buffer` (B, d, C); `used` counts nothing. There is no difference between static and growing
    caches, but that steps of a static one are written in place.

    Args:
        fixed: Write in place, so that a compiled step finds its state where it was.
        exact: As in `causal_fftconv`.
        queries: As in `History`.
    """

    needs_taps = False

    def __init__(self, *, fixed: bool = False, exact: bool = False, queries: int = 0) -> None:
        super().__init__(None, fixed=fixed, queries=queries)
        self.exact = exact
        self.system: ModalSystem | None = None  # of the filter, once for all calls
        self.coefficients: ModalStep | None = None
        self.direct: Tensor | None = None  # (C,): the filter's tap at lag 0
        self.ahead: Tensor | None = None  # the state behind pending inputs, where it is known
        self.source: tuple[Evaluable, int, int, Tensor] | None = None  # of these three, until the first commit

    def _state(self, w: Tensor, channels: int) -> Tensor | None:
        """The state (B, d, C), after checking that it is of the same batch and dtype; None before the first commit."""
        state = self.buffer
        if state is not None:
            check_same((len(state), state.shape[2]), state.dtype, (len(w), channels), w.dtype)
        return state

    def _prepare(self, long_filter: Evaluable, index: int, channels: int, w: Tensor) -> tuple[ModalSystem, ModalStep]:
        if self.system is None or self.coefficients is None:
            self.system, direct = cast("Modal", long_filter).system(index)
            self.coefficients = modal_step(self.system, channels, w.dtype)
            self.direct = direct.to(w.dtype).repeat_interleave(channels // len(direct))
        return self.system, self.coefficients

    def respond(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Convolution of everything up to each new input; arguments as in `ExactHistory.respond`."""
        channels = w.shape[1]
        state = self._state(w, channels)
        if state is None:  # nobody may ever commit: an exported graph could not ask how large a state is
            self.source = long_filter, index, channels, w
            return self._alone(w, taps, long_filter, index, direct)
        return self._answer(state, w, taps, long_filter, index, direct)

    def _answer(
        self, state: Tensor, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor
    ) -> Tensor:
        """Outputs for inputs w behind a state; the others as in `respond`."""
        system, step = self._prepare(long_filter, index, w.shape[1], w)
        if w.shape[-1] == 1:
            return self._output(state, w[..., 0], step, direct).unsqueeze(-1)
        return self._alone(w, taps, long_filter, index, direct) + modal_response(state, w.shape[-1], system)

    def follow(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor | None:
        """Outputs behind committed and pending inputs, from a state behind both; arguments as in `respond`."""
        if self.ahead is None:
            if self.pending is None:
                return None
            self._prepare_to_commit()
            self.ahead = self._advanced(self.buffer, self.pending)
        y = self._answer(self.ahead, w, taps, long_filter, index, direct)
        self.ahead = self._advanced(self.ahead, w)
        return y

    def forget_ahead(self) -> None:
        """Forget the state behind pending inputs."""
        self.ahead = None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that has a batch dimension, by attribute name."""
        named = super().tensors()
        return named if self.ahead is None else {**named, "ahead": self.ahead}

    def step(self, x: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Answer one input x (B, C) a row and advance the state; arguments as in `respond`, (B, C)."""
        state = self.buffer
        if state is None:
            return super().step(x, taps, long_filter, index, direct)
        check_same((len(state), state.shape[2]), state.dtype, x.shape, x.dtype)
        _, step = self._prepare(long_filter, index, x.shape[1], x)
        y = self._output(state, x, step, direct)
        self.replace(advance_one(state, x, step))
        return y

    def step_operator(
        self,
        window: Window,
        p: Tensor,
        short: tuple[Tensor, Tensor | None],
        long_filter: Evaluable,
        direct: Tensor,
    ) -> Tensor | None:
        """One token of an order-2 operator, its short convolution included; None while there is no state.

        Args:
            window: Of the short convolution.
            p: Projections (B, 3 D).
            short: Weight and bias of the short convolution, in the dtype of p.
            long_filter: The filter.
            direct: Extra tap at lag 0, (D,).

        Returns:
            (B, D).
        """
        state, past = self.buffer, window.buffer
        if state is None or past is None:
            return None
        width = p.shape[1] // 3
        check_same((len(state), state.shape[2]), state.dtype, (len(p), width), p.dtype)
        _, step = self._prepare(long_filter, 0, width, p)
        y, past, state = hyena_step(p, past, *short, state, step, self._at_once(direct, width, p.dtype))
        window.replace(past)
        self.replace(state)
        return y

    def _at_once(self, direct: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        """Weight of an input in the output that goes with it, (C,)."""
        assert self.direct is not None  # noqa: S101 (set by `_prepare`)
        direct = direct.to(dtype)
        if len(direct) != channels:
            direct = direct.repeat_interleave(channels // len(direct))
        return self.direct + direct

    def _output(self, state: Tensor, x: Tensor, step: ModalStep, direct: Tensor) -> Tensor:
        """The output (B, C) that goes with an input x (B, C)."""
        return torch.addcmul(read_out(state, step), x, self._at_once(direct, x.shape[1], x.dtype))

    def _alone(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Convolution of the new inputs."""
        h = taps.rising(long_filter, index, w.shape[-1])
        exact = self.exact or is_short(w.shape[-1])
        return causal_fftconv(w, h, direct.to(h.dtype), exact=exact, check_finite=False)

    def _prepare_to_commit(self) -> None:
        if self.system is None:
            assert self.source is not None  # noqa: S101 (`respond` came first)
            self._prepare(*self.source)
        self.source = None

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Fold inputs w (B, C, n) into the state; of row b only the first counts[b] (None: all)."""
        self._prepare_to_commit()
        assert self.system is not None  # noqa: S101 (narrows the type)
        state = self.buffer
        if counts is None:
            following = self._advanced(state, w)
        else:
            following = advance(None, shift_right(w, w.shape[-1] - counts), self.system)
            if state is not None:
                following = decayed(state, counts, self.system) + following
        self.replace(following)

    def _advanced(self, state: Tensor | None, w: Tensor) -> Tensor:
        """The state behind inputs w (B, C, n)."""
        assert self.system is not None and self.coefficients is not None  # noqa: S101, PT018 (narrows the types)
        if w.shape[-1] == 1 and state is not None:
            return advance_one(state, w[..., 0], self.coefficients)
        return advance(state, w, self.system)


class HeadModalState(ModalState):
    """The same for MultiHyena heads: d numbers for each product of a key and a value, d D P in all."""

    def __init__(self, heads: int, *, fixed: bool = False, queries: int = 0) -> None:
        super().__init__(fixed=fixed, queries=queries)
        self.heads = heads

    def _products(self, kv: Tensor) -> Tensor:
        """Outer products of keys and values (B, 2 D, n) in each head, (B, D P, n)."""
        batch, _, new = kv.shape
        k, v = (x.reshape(batch, self.heads, -1, new) for x in kv.chunk(2, dim=1))
        return (k.unsqueeze(3) * v.unsqueeze(2)).flatten(1, 3)

    def _ask(self, q: Tensor, z: Tensor) -> Tensor:
        """Queries (B, D, n) contracted with matrices (B, D P, n): (B, D, n)."""
        batch, width, new = q.shape
        q = q.reshape(batch, self.heads, -1, 1, new)
        return (q * z.view(batch, self.heads, q.shape[2], -1, new)).sum(dim=2).view(batch, width, new)

    def step(self, x: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """Answer one query, key and value x (B, 3 D) a row and advance the states: (B, D)."""
        state = self.buffer
        if state is None:
            return super().step(x, taps, long_filter, index, direct)
        q, k, v = (part.view(len(x), self.heads, -1) for part in x.chunk(3, dim=1))
        products = (k.unsqueeze(3) * v.unsqueeze(2)).flatten(1)
        check_same((len(state), state.shape[2]), state.dtype, products.shape, products.dtype)
        _, step = self._prepare(long_filter, index, products.shape[1], products)
        z = self._output(state, products, step, direct).view(*q.shape, -1)
        self.replace(advance_one(state, products, step))
        return (q.unsqueeze(3) * z).sum(dim=2).flatten(1)

    def respond(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        """MultiHyena convolution; w holds queries, keys and values (B, 3 D, n), the rest as in `HeadHistory`."""
        channels = self.queries * (self.queries // self.heads)
        state = self._state(w, channels)
        if state is None:
            self.source = long_filter, index, channels, w
            return self._alone(w, taps, long_filter, index, direct)
        return self._answer(state, w, taps, long_filter, index, direct)

    def _alone(self, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor) -> Tensor:
        q, k, v = w.chunk(3, dim=1)
        return multihead_conv(q, k, v, taps.rising(long_filter, index, w.shape[-1]), direct)

    def _answer(
        self, state: Tensor, w: Tensor, taps: Taps, long_filter: Evaluable, index: int, direct: Tensor
    ) -> Tensor:
        q, kv = w[:, : self.queries], w[:, self.queries :]
        system, step = self._prepare(long_filter, index, state.shape[2], w)
        if w.shape[-1] == 1:
            z = self._output(state, self._products(kv)[..., 0], step, direct)
            return self._ask(q, z.unsqueeze(-1))
        y = self._alone(w, taps, long_filter, index, direct)
        pieces = []
        for part in q.split(_BLOCK, dim=-1):
            pieces.append(self._ask(part, modal_response(state, part.shape[-1], system)))
            state = decayed(state, torch.tensor([part.shape[-1]], device=w.device), system)
        return y + torch.cat(pieces, dim=-1)

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Fold keys and values into the state, a block of outer products after the other."""
        self._prepare_to_commit()
        if counts is not None:
            # nothing comes before a row's tokens: its keys and values are moved, its products are zero there
            shifted = shift_right(w[:, self.queries :], w.shape[-1] - counts)
            following = self._folded(None, shifted)
            if self.buffer is not None:
                assert self.system is not None  # noqa: S101 (`respond` came first)
                following = decayed(self.buffer, counts, self.system) + following
            self.replace(following)
        else:
            self.replace(self._advanced(self.buffer, w))

    def _advanced(self, state: Tensor | None, w: Tensor) -> Tensor:
        kv = w[:, self.queries :]
        if w.shape[-1] == 1 and state is not None:
            return super()._advanced(state, self._products(kv))
        return self._folded(state, kv)

    def _folded(self, state: Tensor | None, kv: Tensor) -> Tensor:
        assert self.system is not None  # noqa: S101 (`respond` came first)
        for part in kv.split(_BLOCK, dim=-1):
            state = advance(state, self._products(part), self.system)
        assert state is not None  # noqa: S101 (there is at least one input)
        return state


__all__ = ["HeadModalState", "ModalState"]
