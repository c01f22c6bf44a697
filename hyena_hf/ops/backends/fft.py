# SPDX-License-Identifier: Apache-2.0
"""Long convolutions by torch's FFT, in blocks of channels that stay in the processor's cache.

The linear convolution is the circular one of signals padded with zeros (Poli et al. 2023, arXiv 2302.10866, section
3.3). Three things make it several times faster than the formula written down in torch:

- a block of channels goes through all steps before the next one, in one zero-padded buffer that is reused, so that the
  workspace is a few hundred kilobytes instead of several copies of the input;
- gradients are written out in real transforms, where autograd would use complex ones of twice the size;
- `direct` is added to tap 0 and gates are multiplied on the way into and out of the buffer.

A two-sided convolution is the same with a kernel that goes round the circle.

B batch, H filters, G channels that share one, L length, K taps, n FFT length, F = n / 2 + 1 frequencies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


Gates = tuple[Tensor | None, Tensor | None]
At = tuple[slice, slice, slice]


def next_even_5_smooth(n: int) -> int:
    """Smallest even number from n on without prime factor above 5."""
    best = 1 << (n - 1).bit_length() if n > 1 else 2
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            candidate = three << max((rest - 1).bit_length(), 1)
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def _is_11_smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7, 11):
        while n % prime == 0:
            n //= prime
    return n == 1


def fft_length(length: int, taps: int) -> int:
    """Smallest convenient FFT size at which `length` inputs and `taps` taps do not wrap around.

    FFT libraries are several times slower at sizes with large prime factors. Twice the length is kept where it has no
    prime factor above 11, otherwise the next even number without prime factor above 5 is taken.
    """
    if taps == length and _is_11_smooth(2 * length):
        return 2 * length
    return next_even_5_smooth(max(length + taps - 1, 2))


# Share of a row that is computed again, and the shortest one for which that is worth it.
_HEAD, _SHORTEST_HEAD = 32, 128


# Rows below which a real transform costs clearly more a row; a single one several times as much.
_FEW = 8


@dataclass(frozen=True)
class Work:
    """How a convolution is computed: FFT length, dtype of the transforms, numbers that one block should hold."""

    n: int
    dtype: torch.dtype
    floats: int


@dataclass(frozen=True)
class Kernel:
    """The filters of one convolution on a circle of n points: lag t at t, the lag of t tokens ahead at n - t.

    Attributes:
        h: Filters over current and earlier tokens (H, K).
        h_reverse: Filters over later tokens, the next one first (H, K'), or None.
        direct: Extra tap at lag 0 (H,), or None.
        spectrum: Transform of all that (H, F), where somebody has it already.
    """

    h: Tensor
    h_reverse: Tensor | None = None
    direct: Tensor | None = None
    spectrum: Tensor | None = None

    def transform(self, part: slice, work: Work) -> Tensor:
        """Spectra of some of the filters, (h, 1, F)."""
        if self.spectrum is not None:
            return self.spectrum[part].unsqueeze(1)
        h = self.h[part]
        if self.h_reverse is None and self.direct is None:
            return torch.fft.rfft(h.to(work.dtype), n=work.n).unsqueeze(1)
        taps = h.new_zeros(h.shape[0], work.n, dtype=work.dtype)
        taps[:, : h.shape[1]] = h
        if self.h_reverse is not None:
            taps[:, work.n - self.h_reverse.shape[1] :] = self.h_reverse[part].flip(-1)
        if self.direct is not None:
            taps[:, 0] += self.direct[part]
        return torch.fft.rfft(taps).unsqueeze(1)

    def refine(self, z: Tensor, w: Tensor, part: slice) -> None:
        """Compute the first outputs of long rows again, from the first inputs alone.

        The rounding of a transform is spread evenly over a row, but the first outputs have few terms and are small: in
        a model the error of the first logits of 65,536 was 5e-5, and 4e-6 with this. It costs a thirtieth.

        Args:
            z: Outputs (b, h, g, L), overwritten.
            w: Inputs (b, h, g, >= L).
            part: The filters.
        """
        length = z.shape[-1] // _HEAD
        if length < _SHORTEST_HEAD or self.h_reverse is not None:
            return
        kernel = Kernel(self.h[part, :length], direct=None if self.direct is None else self.direct[part])
        n = next_even_5_smooth(2 * length)
        spectrum = torch.fft.rfft(w[..., :length], n=n)
        found = torch.fft.irfft(spectrum.mul_(kernel.transform(slice(None), Work(n, w.dtype, 0))), n=n)[..., :length]
        kernel.refine(found, w, slice(None))
        z[..., :length] = found

    def split(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of some filters and reversed filters, from that of their kernels (h, n)."""
        behind = None if self.h_reverse is None else grad[:, grad.shape[1] - self.h_reverse.shape[1] :].flip(-1)
        return grad[:, : self.h.shape[1]], behind


def block_floats(n: int) -> int:
    """Numbers that one block should hold.

    Small blocks stay in the cache and let the allocator recycle their memory; MKL's real transforms of few long rows
    are several times slower.
    """
    return max(1 << 18, 8 * n) * torch.get_num_threads()


@dataclass(frozen=True)
class Blocks:
    """How (B, H, G) rows divide: a block holds so many rows of the batch, filters, and channels of each filter."""

    batch: int
    filters: int
    group: int

    @classmethod
    def of(cls, sizes: tuple[int, int, int], rows: int) -> "Blocks":
        """Blocks of about that many rows, of enough filters that their own transforms are not of a few rows each."""
        batch, filters, group = sizes
        rows = max(rows, 1)
        filters = min(max(rows // (batch * group), min(rows, _FEW)), filters)
        group = min(max(rows // filters, 1), group)
        return cls(min(max(rows // (filters * group), 1), batch), filters, group)

    def over_filters(self, filters: int) -> Iterator[slice]:
        """Slices of the filters."""
        return (slice(f, min(f + self.filters, filters)) for f in range(0, filters, self.filters))

    def over_rows(self, part: slice, sizes: tuple[int, int, int]) -> Iterator[At]:
        """Slices of (B, H, G, L) that belong to a slice of the filters."""
        for b in range(0, sizes[0], self.batch):
            for g in range(0, sizes[2], self.group):
                yield slice(b, min(b + self.batch, sizes[0])), part, slice(g, min(g + self.group, sizes[2]))


def write(out: Tensor, x: Tensor, gate: Tensor | None) -> None:
    """Set out to gate * x, rounded in the dtype of `out` only."""
    if gate is None:
        out.copy_(x)
    elif x.dtype == out.dtype:
        torch.mul(x, gate, out=out)
    else:
        out.copy_(x).mul_(gate)


def gated(x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return gate * x in a dtype."""
    return x.to(dtype) if gate is None else x.to(dtype) * gate


def multiply_into(out: Tensor, z: Tensor, gate: Tensor | None) -> None:
    """Set out to gate * z, rounded to the dtype of `out` at the end."""
    if gate is None:
        out.copy_(z)
    elif z.dtype == out.dtype:
        torch.mul(z, gate, out=out)
    else:
        out.copy_(z * gate)


@dataclass(frozen=True)
class Rows:
    """Tensors (B, C, L) of a convolution as (B, H, G, L): input, gates, and in backward the gradient of the output."""

    u: Tensor
    pregate: Tensor | None
    postgate: Tensor | None
    grad: Tensor | None

    @classmethod
    def of(cls, u: Tensor, gates: Gates, filters: int, grad: Tensor | None = None) -> "Rows":
        """Divide the channels among the filters."""
        x, *others = (None if t is None else t.unflatten(1, (filters, -1)) for t in (u, *gates, grad))
        assert x is not None  # noqa: S101 (narrows the type)
        return cls(x, *others)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B, H, G)."""
        return self.u.shape[0], self.u.shape[1], self.u.shape[2]

    def input(self, at: At) -> tuple[Tensor, Tensor | None]:
        """Input of a block and what multiplies it."""
        return self.u[at], None if self.pregate is None else self.pregate[at]

    def grad_output(self, at: At) -> tuple[Tensor, Tensor | None]:
        """Gradient of a block's output and what multiplies it."""
        assert self.grad is not None  # noqa: S101 (backward only)
        return self.grad[at], self.gate(at)

    def gate(self, at: At) -> Tensor | None:
        """What multiplies a block's output."""
        return None if self.postgate is None else self.postgate[at]


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    u: bool
    kernel: bool
    direct: bool
    pregate: bool
    postgate: bool

    @property
    def input(self) -> bool:
        """Whether any needs the gradient of pregate * u."""
        return self.u or self.pregate

    @property
    def conv(self) -> bool:
        """Whether any needs more of the output than its value before the postgate."""
        return self.input or self.kernel or self.direct


@dataclass(frozen=True)
class Gradients:
    """Gradients, filled block by block: (B, H, G, L) of input and gates, those of the kernel as `Kernel` has them."""

    rows: Rows
    kernel: Kernel
    u: Tensor | None
    pregate: Tensor | None
    postgate: Tensor | None
    h: Tensor | None
    h_reverse: Tensor | None
    direct: Tensor | None

    @classmethod
    def of(cls, rows: Rows, kernel: Kernel, needs: Needs, work: Work) -> "Gradients":
        """Empty ones."""

        def like(x: Tensor | None, need: bool, dtype: torch.dtype) -> Tensor | None:
            if x is None or not need:
                return None
            return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)

        direct = like(kernel.direct, needs.direct, work.dtype)
        return cls(
            rows,
            kernel,
            u=like(rows.u, needs.u, rows.u.dtype),
            pregate=like(rows.pregate, needs.pregate, rows.u.dtype),
            postgate=like(rows.postgate, needs.postgate, rows.u.dtype),
            h=like(kernel.h, needs.kernel, work.dtype),
            h_reverse=like(kernel.h_reverse, needs.kernel, work.dtype),
            direct=None if direct is None else direct.zero_(),
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Of u, h, h_reverse, direct, pregate, postgate, in their shapes."""
        u, pregate, postgate = (None if x is None else x.flatten(1, 2) for x in (self.u, self.pregate, self.postgate))
        return u, self.h, self.h_reverse, self.direct, pregate, postgate

    def enter_input(self, at: At, dw: Tensor) -> None:
        """From the gradient of pregate * u in one block."""
        x, gate = self.rows.input(at)
        if self.u is not None:
            multiply_into(self.u[at], dw, gate)
        if self.pregate is not None:
            multiply_into(self.pregate[at], dw, x)

    def enter_postgate(self, at: At, z: Tensor) -> None:
        """From what the postgate multiplied in one block."""
        if self.postgate is not None and self.rows.grad is not None:
            multiply_into(self.postgate[at], z, self.rows.grad[at])

    def enter_kernel(self, part: slice, grad: Tensor) -> None:
        """From the gradient of some filters on the circle, (h, n)."""
        of_h, of_reverse = self.kernel.split(grad)
        if self.h is not None:
            self.h[part] = of_h
        if self.h_reverse is not None and of_reverse is not None:
            self.h_reverse[part] = of_reverse

    def enter_direct(self, part: slice, w: Tensor, dz: Tensor) -> None:
        """From pregate * u and postgate * grad in one block, (b, h, g, L).

        torch's pairwise sum: BLAS products are several times less exact, and so is what the transforms give at lag 0,
        which has the rounding of all lags.
        """
        if self.direct is not None:
            self.direct[part] += (w * dz).sum(dim=(0, 2, 3))


class _Buffer:
    """Zero-padded room for one block of rows, (b, h, g, n)."""

    def __init__(self, like: Tensor, blocks: Blocks, work: Work) -> None:
        self.room = like.new_zeros(blocks.batch, blocks.filters, blocks.group, work.n, dtype=work.dtype)

    def fill(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Rows of gate * x with zeros behind, (b, h, g, n)."""
        room = self.room[: x.shape[0], : x.shape[1], : x.shape[2]]
        write(room[..., : x.shape[-1]], x, gate)
        return room


def forward(u: Tensor, kernel: Kernel, gates: Gates, work: Work) -> Tensor:
    """Compute postgate * (kernel conv (pregate * u)).

    Args:
        u: (B, C, L).
        kernel: Of H filters.
        gates: pregate and postgate (B, C, L), or None.
        work: Sizes.

    Returns:
        (B, C, L) in the dtype of `u`.
    """
    filters, length = kernel.h.shape[0], u.shape[-1]
    rows = Rows.of(u, gates, filters)
    blocks = Blocks.of(rows.sizes, work.floats // work.n)
    buffer = _Buffer(u, blocks, work)
    y = torch.empty_like(rows.u, memory_format=torch.contiguous_format)
    for part in blocks.over_filters(filters):
        kernel_spectrum = kernel.transform(part, work)
        for at in blocks.over_rows(part, rows.sizes):
            w = buffer.fill(*rows.input(at))
            z = torch.fft.irfft(torch.fft.rfft(w).mul_(kernel_spectrum), n=work.n)[..., :length]
            kernel.refine(z, w, part)
            multiply_into(y[at], z, rows.gate(at))
    return y.flatten(1, 2)


def backward(grad: Tensor, u: Tensor, kernel: Kernel, gates: Gates, work: Work, needs: Needs) -> Gradients:
    """Gradients of `forward`.

    Args:
        grad: Of the output (B, C, L).
        u, kernel, gates, work: As there.
        needs: Which are wanted.

    Returns:
        Gradients; those of the kernel in the dtype of the transforms.
    """
    filters, length = kernel.h.shape[0], u.shape[-1]
    rows = Rows.of(u, gates, filters, grad)
    blocks = Blocks.of(rows.sizes, work.floats // work.n)
    inputs, later = _Buffer(u, blocks, work), _Buffer(u, blocks, work)
    out = Gradients.of(rows, kernel, needs, work)
    for part in blocks.over_filters(filters):
        kernel_spectrum = kernel.transform(part, work)
        reverse, total = torch.conj_physical(kernel_spectrum), None
        for at in blocks.over_rows(part, rows.sizes):
            w, spectrum = inputs.fill(*rows.input(at)), None
            if needs.kernel or needs.postgate:
                spectrum = torch.fft.rfft(w)
            if needs.postgate and spectrum is not None:
                out.enter_postgate(at, torch.fft.irfft(spectrum * kernel_spectrum, n=work.n)[..., :length])
            if not needs.conv:
                continue
            dz = later.fill(*rows.grad_output(at))
            out.enter_direct(part, w[..., :length], dz[..., :length])
            dz_spectrum = torch.fft.rfft(dz)
            if needs.kernel and spectrum is not None:
                # correlation with a signal is convolution with its reversal: the conjugate spectrum
                product = sum_of_rows(spectrum.conj_physical_().mul_(dz_spectrum))
                total = product if total is None else total.add_(product)
            if needs.input:
                out.enter_input(at, torch.fft.irfft(dz_spectrum.mul_(reverse), n=work.n)[..., :length])
        if total is not None:
            out.enter_kernel(part, torch.fft.irfft(total, n=work.n))
    return out


def sum_of_rows(x: Tensor) -> Tensor:
    """Add up rows that share a filter, (b, h, g, F) -> (h, F)."""
    return x[0, :, 0] if x.shape[0] * x.shape[2] == 1 else x.sum(dim=(0, 2))


__all__ = [
    "Blocks",
    "Gradients",
    "Kernel",
    "Needs",
    "Rows",
    "Work",
    "backward",
    "block_floats",
    "fft_length",
    "forward",
]
