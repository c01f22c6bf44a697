# SPDX-License-Identifier: Apache-2.0
"""Turn any batch into dense rows for the operators that mix along the sequence, and back.

A stream (B, L, C) may hold padding on either side, holes, or several documents in a row. Operators that mix along time
see none of it: `over_rows` gathers every sequence into a dense row that starts at column 0, runs the operator, and
scatters its outputs back to where the tokens stood. So a sequence's outputs cannot depend on its neighbours: masked
tokens do not exist. Behind a row's last token lies anything finite: causal operators never look there, a cache takes
in only as many columns as the row's count, and operators that look ahead put zeros there first (`zero_behind`).

Without a cache a row is a document, and documents are grouped by length so that short ones do not pay for long ones.
With a cache a row is a row of the batch, because that is what the cache remembers.

B batch, L length of the stream, R rows, n their width, M real tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the tokens of some dense rows stand in the flattened stream.

    Attributes:
        index: Stream position of every cell of the rows (R, n); cells behind a row's end repeat some token.
        source: Stream positions of the real tokens (M,).
        slot: Their cells in the flattened rows (M,).
        counts: Real tokens of every row (R,).
    """

    index: Tensor
    source: Tensor
    slot: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Segments:
    """A batch that is not dense, as groups of dense rows.

    Attributes:
        groups: Rows of similar length; with a cache exactly one group, row b being batch row b.
        positions: Index of every token of the stream in its sequence (B, L); 0 for masked tokens.
        max_length: Width of the widest row.
    """

    groups: tuple[Rows, ...]
    positions: Tensor
    max_length: int


def filled_cells(width: int, counts: Tensor) -> Tensor:
    """True for the cells of rows of that width that hold tokens, (R, width); counts (R,)."""
    return torch.arange(width, device=counts.device) < counts.unsqueeze(1)


def zero_behind(x: Tensor, counts: Tensor | None) -> Tensor:
    """Rows x (R, C, n) with zeros behind each row's last token; counts (R,), None when all rows are full.

    What stands there is not zero by itself: biases and gates act on every cell. Causal operators never look there.
    """
    if counts is None:
        return x
    return x.masked_fill(~filled_cells(x.shape[-1], counts).unsqueeze(1), 0)


def over_rows(
    segments: Segments | None, function: Callable[[Tensor, Tensor | None], Tensor], stream: Tensor
) -> Tensor:
    """Apply a sequence operator to the dense rows of a stream.

    Args:
        segments: How the stream divides; None for a dense batch, which is handed over as it is.
        function: Maps rows (R, n, C) and their counts (R,), None when all rows are full, to rows (R, n, C').
        stream: (B, L, C).

    Returns:
        (B, L, C'); zero for masked tokens.
    """
    if segments is None:
        return function(stream, None)
    batch, length, channels = stream.shape
    flat = stream.reshape(batch * length, channels)
    out = None
    for group in segments.groups:
        rows = flat.index_select(0, group.index.flatten()).view(*group.index.shape, channels)
        result = function(rows, group.counts)
        if out is None:
            out = result.new_zeros(batch * length, result.shape[-1])
        out = out.index_copy(0, group.source, result.flatten(0, 1).index_select(0, group.slot))
    assert out is not None  # noqa: S101 (every segmentation has a group; narrows the type)
    return out.view(batch, length, -1)


def segments_from_mask(mask: Tensor) -> Segments:
    """One row per batch row, its tokens moved to the left: what a cache needs. mask (B, L), True for real tokens.

    A compiled graph may read no tensor: its rows are as wide as the stream, and masked tokens get the output of the
    token before them.
    """
    batch, length = mask.shape
    counts = mask.sum(dim=1)
    compiling = torch.compiler.is_compiling()
    width = length if compiling else max(int(counts.max()), 1)
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    # behind a row's end its last token again: masked ones may hold anything, even what is no number
    cells = torch.arange(width, device=mask.device).minimum((counts - 1).clamp(min=0).unsqueeze(1))
    order = order.gather(1, cells)
    starts = torch.arange(batch, device=mask.device).unsqueeze(1)
    row_positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    slot = (starts * width + row_positions).flatten()
    if compiling:
        source = torch.arange(batch * length, device=mask.device)
    else:
        source = mask.flatten().nonzero().squeeze(1)
        slot = slot[source]
    group = Rows(index=order + starts * length, source=source, slot=slot, counts=counts)
    return Segments(groups=(group,), positions=row_positions * mask, max_length=width)


def segments_from_documents(documents: Tensor, mask: Tensor) -> Segments:
    """One row per document, grouped by powers of two of their length.

    Args:
        documents: Document number of every token (B, L), never decreasing along the flattened stream.
        mask: True for real tokens (B, L).
    """
    device = mask.device
    source = mask.flatten().nonzero().squeeze(1)
    _, row_of_token, lengths = torch.unique_consecutive(
        documents.flatten()[source], return_inverse=True, return_counts=True
    )
    starts = lengths.cumsum(0) - lengths
    position = torch.arange(source.numel(), device=device) - starts[row_of_token]
    positions = torch.zeros(mask.numel(), dtype=torch.long, device=device)
    positions[source] = position

    host_lengths = lengths.tolist()
    size_class = torch.tensor([(length - 1).bit_length() for length in host_lengths], device=device)
    groups = []
    for size in sorted({(length - 1).bit_length() for length in host_lengths}):
        members = (size_class == size).nonzero().squeeze(1)
        width = max(length for length in host_lengths if (length - 1).bit_length() == size)
        cells = torch.arange(width, device=device).minimum(lengths[members, None] - 1) + starts[members, None]
        row = torch.full_like(lengths, -1)
        row[members] = torch.arange(members.numel(), device=device)
        tokens = (row[row_of_token] >= 0).nonzero().squeeze(1)
        slot = row[row_of_token[tokens]] * width + position[tokens]
        groups.append(Rows(index=source[cells], source=source[tokens], slot=slot, counts=lengths[members]))
    if not groups:  # every token is masked: one cell to run on, nothing to scatter
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        groups.append(Rows(torch.zeros(1, 1, dtype=torch.long, device=device), nothing, nothing, nothing.new_zeros(1)))
    return Segments(
        groups=tuple(groups), positions=positions.view(mask.shape), max_length=max(host_lengths, default=1)
    )


def _whole_numbers(name: str, tensor: Tensor) -> Tensor:
    """The tensor as int64: differences of unsigned numbers never fall."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of whole numbers, got {got}; convert it with .long()")
    return tensor.long()


def _starts_from_seq_idx(seq_idx: Tensor, batch: int, length: int) -> Tensor:
    seq_idx = _whole_numbers("seq_idx", seq_idx)
    if seq_idx.shape not in ((batch, length), (1, length)):
        raise ValueError(f"seq_idx must have shape {(batch, length)}, that of the tokens, got {tuple(seq_idx.shape)}")
    step = seq_idx.diff(dim=1)
    if bool((step < 0).any()):
        raise ValueError("seq_idx decreases within a row; number the documents of a row in order")
    return torch.nn.functional.pad(step != 0, (1, 0), value=True).expand(batch, length)


_ENDS = (
    "cu_seq_lens_q must rise from 0 to the number of tokens, by max_length_q at most, with an end at each row's end"
)


def segments_from_ends(cu_seq_lens: Tensor, width: int, batch: int, length: int) -> Segments:
    """One row per document, all of one group, without reading a tensor: what a compiled graph needs.

    Args:
        cu_seq_lens: Ends of the documents in the flattened stream (R + 1,), from 0 to B * L.
        width: Length of the longest document, or more.
        batch, length: Shape of the stream.

    Raises:
        RuntimeError: The ends contradict the shape or the width; on accelerators asynchronously.
    """
    ends = cu_seq_lens.long()
    starts, lengths = ends[:-1], ends.diff()
    right = (ends[0] == 0) & (ends[-1] == batch * length) & (lengths.min() >= 0) & (lengths.max() <= width)
    row_starts = torch.arange(batch, device=ends.device) * length
    right = right & torch.isin(row_starts, ends).all()
    # a message of numbers would be another graph for every shape
    torch.ops.aten._assert_async.msg(right, _ENDS)
    source = torch.arange(batch * length, device=ends.device)
    row = torch.searchsorted(ends, source, right=True) - 1
    position = source - starts[row]
    cells = torch.arange(width, device=ends.device).minimum((lengths[:, None] - 1).clamp(min=0)) + starts[:, None]
    group = Rows(index=cells.clamp(max=batch * length - 1), source=source, slot=row * width + position, counts=lengths)
    return Segments(groups=(group,), positions=position.view(batch, length), max_length=width)


def _starts_from_cu_seq_lens(cu_seq_lens: Tensor, batch: int, length: int) -> Tensor:
    total = batch * length
    cu_seq_lens = _whole_numbers("cu_seq_lens_q", cu_seq_lens)
    ends = cu_seq_lens.flatten().tolist()
    if cu_seq_lens.ndim != 1 or not ends or ends[0] != 0 or ends[-1] != total or sorted(ends) != ends:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the number of tokens ({total}), got {ends[:3]} ... {ends[-1:]}; count "
            f"every token of the batch once"
        )
    if not set(range(0, total, length)).issubset(ends):
        raise ValueError(
            f"a document of cu_seq_lens_q goes on in the next row; documents end with their row, so give an end at "
            f"every multiple of the length ({length})"
        )
    starts = torch.zeros(total + 1, dtype=torch.bool, device=cu_seq_lens.device)
    starts[cu_seq_lens] = True
    return starts[:total].view(batch, length)


def document_starts(
    batch: int,
    length: int,
    *,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor | None:
    """Where documents begin, from any of the three usual descriptions of a packed batch.

    Args:
        batch, length: Shape of the stream.
        seq_idx: Number of the document of each token (B, L) or (1, L).
        cu_seq_lens: Ends of the documents in the flattened stream, from 0 to B * L.
        position_ids: Positions (B, L) or (1, L); where nothing else describes the documents, one begins wherever they
            do not rise by one.

    Returns:
        (B, L) bool, or None when every row is one document.

    Raises:
        ValueError: A description contradicts the shape of the batch or itself.
    """
    found = []
    if seq_idx is not None:
        found.append(_starts_from_seq_idx(seq_idx, batch, length))
    if cu_seq_lens is not None:
        found.append(_starts_from_cu_seq_lens(cu_seq_lens, batch, length))
    if len(found) == 2 and bool((found[0] != found[1].to(found[0].device)).any()):
        raise ValueError("seq_idx and cu_seq_lens_q describe different documents; pass one of them")
    if position_ids is not None and not found and length > 1:
        _check_position_shape(position_ids, batch, length)
        resets = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
        found.append(resets.expand(batch, length))
    if not found:
        return None
    return found[0] if bool(found[0][:, 1:].any()) else None


def _check_position_shape(position_ids: Tensor, batch: int, length: int) -> None:
    _whole_numbers("position_ids", position_ids)
    if position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(f"position_ids must have shape {(batch, length)}, got {tuple(position_ids.shape)}")


def number_documents(
    batch: int, length: int, seq_idx: Tensor | None, cu_seq_lens: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Number of the document of every token (B, L), or None when every row is one; arguments as in `document_starts`.

    Nothing is checked in a compiled graph, which may read no tensor.
    """
    if not torch.compiler.is_compiling():
        starts = document_starts(batch, length, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens, position_ids=position_ids)
        return None if starts is None else starts.cumsum(1)
    if cu_seq_lens is None:
        return None if seq_idx is None else seq_idx.expand(batch, length)
    tokens = torch.arange(batch * length, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens.long(), tokens, right=True).view(batch, length)


def check_positions(
    position_ids: Tensor, batch: int, length: int, segments: Segments | None, seen: Tensor | int | None
) -> bool:
    """Refuse positions that say something else about the sequences than the segments do.

    Args:
        position_ids: Positions of the caller (B, L) or (1, L).
        batch, length: Shape of the stream.
        segments: How the stream divides; None when every row is one sequence.
        seen: Real tokens that a cache holds, an int, 0-d or (B,): positions must go on from them. None: they may begin
            anywhere, and need only rise by one from each token of a sequence to the next.

    Returns:
        Whether they count the tokens of every sequence from 0; a compiled graph may not look, and says yes.

    Raises:
        ValueError: They contradict the segments or the cache.
    """
    if torch.compiler.is_compiling():
        return True
    _check_position_shape(position_ids, batch, length)
    device = position_ids.device
    if segments is None:
        index = torch.arange(length, device=device).expand(batch, length)
        source = torch.arange(batch * length, device=device)
    else:
        index = segments.positions
        source = torch.cat([group.source for group in segments.groups]).sort().values
    offset = (position_ids.expand(batch, length) - index).flatten()
    wrong = torch.zeros(batch * length, dtype=torch.bool, device=device)
    if seen is None:
        wrong[source[1:]] = (offset[source].diff() != 0) & (index.flatten()[source[1:]] > 0)
    else:
        wrong[source] = offset[source] != torch.as_tensor(seen, device=device).expand(batch)[source // length]
    if bool(wrong.any()):
        row, column = divmod(int(wrong.nonzero()[0]), length)
        raise ValueError(
            f"position_ids contradict the attention_mask, the cache or the documents: in row {row} the position "
            f"{int(position_ids.expand(batch, length)[row, column])} in column {column} does not follow that of the "
            f"token before it in its sequence; leave position_ids out, they are counted from the mask"
        )
    return seen is not None or not bool(offset[source].any())


def build_segments(mask: Tensor | None, documents: Tensor | Segments | None, *, cached: bool) -> Segments | None:
    """Choose the rows of a batch.

    Args:
        mask: True for real tokens (B, L), or None when all are.
        documents: True where a document begins (B, L), or None when every row is one; or the segments of a batch
            without masked tokens.
        cached: Whether a cache follows the rows; then `documents` must be None.

    Returns:
        None when the batch is dense, so that nothing has to move.
    """
    if isinstance(documents, Segments):
        if mask is not None:
            raise ValueError("a compiled packed batch takes cu_seq_lens_q or an attention_mask, not both")
        return documents
    if mask is None and documents is None:
        return None
    if cached or (torch.compiler.is_compiling() and documents is None):
        assert mask is not None and documents is None  # noqa: S101, PT018 (the caller refused packing with a cache)
        return segments_from_mask(mask)
    if documents is None:
        assert mask is not None  # noqa: S101 (narrows the type)
        documents = torch.zeros_like(mask)
    starts = documents.clone()
    starts[:, 0] = True
    if mask is None:
        mask = torch.ones_like(starts)
    return segments_from_documents(starts.flatten().cumsum(0).view(starts.shape), mask)
