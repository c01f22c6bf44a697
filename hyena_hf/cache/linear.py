# SPDX-License-Identifier: Apache-2.0
"""The past of linear attention: a state, and the keys and values of its window."""

from typing import Protocol

import torch
from torch import Tensor

from hyena_hf.ops.linear_attention import LinearState

from .history import History, shift_right


class LinearOperator(Protocol):
    """What a history of linear attention asks of the layer that it belongs to."""

    def respond(
        self, q: Tensor, kv: Tensor, filled: Tensor | None, state: LinearState | None, positions: Tensor
    ) -> tuple[Tensor, LinearState]:
        """Outputs (B, C', n), and the state behind all columns but those of the window.

        Args:
            q: Queries (B, Q, n).
            kv: Keys and values (B, C - Q, T + n).
            filled: True for the columns that hold any (B, T + n); None: all.
            state: Of everything before these columns.
            positions: Of the columns in their sequences, (T + n,) or (B, T + n).
        """
        ...

    def fold(self, kv: Tensor, filled: Tensor | None, state: LinearState | None, positions: Tensor) -> LinearState:
        """The state with columns of keys and values added; arguments as in `respond`."""
        ...


class _Held:
    """The operator that committed last; copies of a cache share it instead of copying the model."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator

    def __deepcopy__(self, memo: dict) -> "_Held":
        return self


class LinearHistory(History):
    """Constant memory for any number of tokens: a state of features times values, and a window of `limit` columns.

    Args:
        window: Columns that softmax attention sees, the current one included; 0 for linear attention alone.
        fixed, queries: As in `History`.
    """

    needs_taps = False

    def __init__(self, window: int, *, fixed: bool = False, queries: int = 0) -> None:
        super().__init__(max(window - 1, 0), fixed=fixed, queries=queries)
        self.sums: Tensor | None = None
        self.log_scale: Tensor | None = None
        self.carry: Tensor | None = None
        self.count: int | Tensor = 0  # tokens committed: an int, (B,) where rows differ, or 0-d where static
        self.held: _Held | None = None
        # what `respond` knows of the state behind inputs that `commit` may get next
        self.following: tuple[Tensor, LinearState] | None = None

    @property
    def state(self) -> LinearState | None:
        """Everything before the window."""
        return None if self.sums is None else LinearState(self.sums, self.log_scale, self.carry)

    def _columns(self, past: int, new: int, device: torch.device) -> Tensor:
        """Positions of past and new columns, (T + n,) or (B, T + n)."""
        columns = torch.arange(past + new, device=device) - past
        return columns + (self.count.unsqueeze(-1) if isinstance(self.count, Tensor) else self.count)

    def respond(self, w: Tensor, operator: LinearOperator) -> Tensor:
        """Attention of new queries, keys and values w (B, C, n) to everything up to each."""
        past = self.past(w)
        kv = torch.cat([past, w[:, self.queries :]], dim=-1)
        filled = None
        if self.lead is not None:
            filled = torch.arange(kv.shape[-1], device=w.device) >= self.lead.unsqueeze(1)
        positions = self._columns(past.shape[-1], w.shape[-1], w.device)
        self.held = _Held(operator)
        y, state = operator.respond(w[:, : self.queries], kv, filled, self.state, positions)
        self.following = w, state
        return y

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Fold what leaves the window into the state; of row b only the first counts[b] columns (None: all) exist."""
        assert self.held is not None  # noqa: S101 (`respond` came first)
        following, self.following = self.following, None
        if counts is None and following is not None and following[0] is w and not self.fixed:
            state = following[1]
        else:
            state = self._folded(w, counts, self.held.operator)
        super().commit(w, counts)
        new = w.shape[-1] if counts is None else counts
        if self.fixed:
            self._count_in_place(new, w)
        else:
            self.count = self.count + new
        for name, tensor in zip(LinearState._fields, state, strict=True):
            self._replace(name, tensor)

    def _folded(self, w: Tensor, counts: Tensor | None, operator: LinearOperator) -> LinearState:
        """The state with everything that w pushes out of the window."""
        past = self.past(w)
        full = torch.cat([past, w[:, self.queries :]], dim=-1)
        positions, lead = self._columns(past.shape[-1], w.shape[-1], w.device), self.lead
        if self.fixed and self.buffer is None:  # nothing is held yet, but as many columns will stay
            limit = self.limit or 0
            full = torch.nn.functional.pad(full, (limit, 0))
            positions = torch.nn.functional.pad(positions, (limit, 0))
            lead = torch.full(w.shape[:1], limit, device=w.device)
        if counts is not None:
            short = w.shape[-1] - counts
            full, positions = shift_right(full, short), positions - short.unsqueeze(1)
            lead = short + (0 if lead is None else lead)
        drop = max(full.shape[-1] - (self.limit or 0), 0)
        filled = None if lead is None else torch.arange(drop, device=w.device) >= lead.unsqueeze(1)
        return operator.fold(full[..., :drop], filled, self.state, positions[..., :drop])

    def _count_in_place(self, new: int | Tensor, w: Tensor) -> None:
        if isinstance(self.count, int):
            shape = () if isinstance(new, int) else (len(w),)
            self.count = torch.zeros(shape, dtype=torch.long, device=w.device)
        if isinstance(new, Tensor) and not self.count.ndim:
            self.count = self.count + new
        else:
            self.count.add_(new)

    def _replace(self, name: str, tensor: Tensor | None) -> None:
        """Take over a tensor; in place where a compiled step must find it where it was."""
        held = getattr(self, name)
        if tensor is not None and held is not None and self.fixed:
            held.copy_(tensor)
        else:
            setattr(self, name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that has a batch dimension, by attribute name."""
        own = {name: getattr(self, name) for name in LinearState._fields}
        if isinstance(self.count, Tensor) and self.count.ndim:
            own["count"] = self.count
        return super().tensors() | {name: tensor for name, tensor in own.items() if tensor is not None}

    def forget_ahead(self) -> None:
        """Forget the state behind inputs that are no longer those that were answered."""
        self.following = None


__all__ = ["LinearHistory", "LinearOperator"]
