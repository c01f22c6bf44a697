# SPDX-License-Identifier: Apache-2.0
"""Lay attention weights of dense rows out over the columns of the stream that a caller knows.

Mixers work on dense rows (`hyena_hf.ops.segments`), so their weights tell which token of a row looks at which. Callers
expect query and key columns of their own batch, padding and earlier calls included; pairs without a weight get 0.

B batch, L new columns, S columns of earlier calls, R rows, H heads, n queries and m keys of a row.
"""

import torch
from torch import Tensor

from .segments import Segments, filled_cells


def _place(out: Tensor, weights: Tensor, batch_rows: Tensor, queries: Tensor, keys: Tensor) -> None:
    """out[batch_rows[r], :, queries[r, i], keys[r, j]] = weights[r, :, i, j], where both columns are at least 0."""
    row, query, key = ((queries >= 0).unsqueeze(2) & (keys >= 0).unsqueeze(1)).nonzero(as_tuple=True)
    out[batch_rows[row], :, queries[row, query], keys[row, key]] = weights[row, :, query, key]


def weights_without_past(parts: list[Tensor], segments: Segments | None, batch: int, length: int) -> Tensor:
    """Weights of a batch that has no past.

    Args:
        parts: Weights of every group of rows (R, H, n, n); of the batch itself when it is dense.
        segments: How the stream divides; None for a dense batch.
        batch, length: Shape of the stream.

    Returns:
        (B, H, L, L).
    """
    if segments is None:
        return parts[0]
    out = parts[0].new_zeros(batch, parts[0].shape[1], length, length)
    for weights, group in zip(parts, segments.groups, strict=True):
        columns = torch.where(filled_cells(group.index.shape[1], group.counts), group.index % length, -1)
        _place(out, weights, group.index[:, 0] // length, columns, columns)
    return out


def weights_with_past(weights: Tensor, real: Tensor, new: int, committed: Tensor, width: int) -> Tensor:
    """Weights of a batch whose rows continue a cache.

    Args:
        weights: (B, H, n, T + n): keys are T committed columns, right-aligned, then n left-aligned ones; the last of
            these are the new tokens, the others are pending.
        real: True for the columns of the stream that hold tokens, those of earlier calls first, (B, S + L).
        new: L.
        committed: Tokens of each row that are committed, (B,).
        width: Key columns to give, at least S + L.

    Returns:
        (B, H, L, width).
    """
    batch, past = real.shape[0], real.shape[1] - new
    before, total = real[:, :past].sum(1, keepdim=True), real.sum(1, keepdim=True)
    columns = torch.argsort((~real).to(torch.int8), dim=1, stable=True)  # of token number k of each row

    def column_of(number: Tensor, known: Tensor) -> Tensor:
        return torch.where(known, columns.gather(1, number.clamp(0, real.shape[1] - 1)), -1)

    queries, keys = (torch.arange(size, device=real.device) for size in weights.shape[-2:])
    query = committed.unsqueeze(1) + queries
    key = committed.unsqueeze(1) + keys - (keys.numel() - queries.numel())
    query_columns = column_of(query, (query >= before) & (query < total)) - past
    out = weights.new_zeros(batch, weights.shape[1], new, width)
    rows = torch.arange(batch, device=real.device)
    _place(out, weights, rows, query_columns, column_of(key, (key >= 0) & (key < total)))
    return out


__all__ = ["weights_with_past", "weights_without_past"]
