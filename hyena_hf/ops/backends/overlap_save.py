# SPDX-License-Identifier: Apache-2.0
"""Partial convolutions: filters much shorter than the input, by overlapping frames of a few filter lengths.

Overlap-save (Stockham 1966): frame j holds the inputs from K - 1 before output j S on, N = S + K - 1 of them; of its
circular convolution with the filter the last S values do not wrap around. So transforms have the size of the filter
and not of the input. Backward is the transposed chain: gradients of the frames, whose overlaps are added.

B batch, H filters, G channels that share one, L length, K taps, N FFT length, S new outputs of a frame, M frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .fft import Blocks, Gradients, Kernel, Needs, Rows, Work, gated, multiply_into, write


# Smallest frame: below it the overhead of a transform shows.
_SMALLEST = 1024


@dataclass(frozen=True)
class Frames:
    """M frames of N points over L inputs, the last S > N / 2 of each new."""

    count: int
    step: int
    size: int

    @classmethod
    def of(cls, length: int, taps: int) -> "Frames":
        """Frames whose transforms cost least.

        Powers of two, which FFT libraries do faster per point than other smooth sizes, of up to 32 filter
        lengths; the price of a point grows by about an eighth with each doubling.
        """
        smallest = max(_SMALLEST, 1 << (2 * taps - 1).bit_length())
        options = [cls._whole(length, taps, smallest << k) for k in range(5)]
        return min(options, key=lambda frames: frames.count * frames.size * (frames.size.bit_length() - 3))

    @classmethod
    def _whole(cls, length: int, taps: int, size: int) -> "Frames":
        step = size - taps + 1
        return cls(-(-length // step), step, size)

    def blocks(self, rows: Rows, work: Work) -> Blocks:
        """Blocks of whole rows; larger ones lose more to memory that the allocator returns than they save in calls."""
        return Blocks.of(rows.sizes, max(work.floats // (self.count * self.size), 1))

    @property
    def lead(self) -> int:
        """Points of a frame before the new ones, K - 1."""
        return self.size - self.step

    def scaled(self, spectrum: Tensor) -> Tensor:
        """Spectra of filters (h, 1, F) as (h, 1, 1, F), times the 1 / N of all inverse transforms to come."""
        return spectrum.unsqueeze(-2) * (1 / self.size)

    def inverse(self, spectra: Tensor) -> Tensor:
        """Frames (.., M, N) from products with `scaled` spectra."""
        return torch.fft.irfft(spectra, n=self.size, norm="forward")

    def pairs(self, z: Tensor, x: Tensor, gate: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """New values of frames z (.., M, N) beside those of x and gate (.., L): of whole frames, then of the last."""
        whole, rest = divmod(x.shape[-1], self.step)
        for first, count, size in ((0, whole, self.step), (whole, 1, rest)):
            if count * size:
                times = slice(first * self.step, first * self.step + count * size)
                new, shape = z[..., first : first + count, self.lead : self.lead + size], (count, size)
                factors = None if gate is None else gate[..., times].unflatten(-1, shape)
                yield new, x[..., times].unflatten(-1, shape), factors

    def read(self, out: Tensor, z: Tensor, gate: Tensor | None) -> Tensor:
        """Set out (.., L) to the gate times the new values of frames z (.., M, N), one after the other."""
        for new, values, factors in self.pairs(z, out, gate):
            multiply_into(values, new, factors)
        return out

    def values(self, z: Tensor, length: int) -> Tensor:
        """The new values of frames z (.., M, N), one after the other, (.., L)."""
        return self.read(z.new_empty(*z.shape[:-2], length), z, None)


def serves(length: int, taps: int) -> bool:
    """Whether frames are faster than one transform: measured in benchmarks/results/fftconv.md."""
    return length >= 4 * _SMALLEST and 12 * taps <= length


class _Room:
    """Frames of one block of rows, written in place (a transform copies overlapping views), zero behind the input.

    Args:
        like: A tensor of the same device.
        blocks: How rows (B, H, G) divide.
        frames: How time divides.
        dtype: Of the transforms.
    """

    def __init__(self, like: Tensor, blocks: Blocks, frames: Frames, dtype: torch.dtype) -> None:
        sizes = blocks.batch, blocks.filters, blocks.group, frames.count, frames.size
        self.frames, self.room = frames, like.new_zeros(sizes, dtype=dtype)

    def transform(self, x: Tensor, gate: Tensor | None, *, overlapping: bool) -> Tensor:
        """Spectra (b, h, g, M, F) of frames of gate * x (b, h, g, L): of the inputs, or of their new values alone."""
        room, lead = self.room[: x.shape[0], : x.shape[1], : x.shape[2]], self.frames.lead
        for new, values, factors in self.frames.pairs(room, x, gate):
            write(new, values, factors)
        if overlapping:
            room[..., 1:, :lead] = room[..., :-1, self.frames.step :]
        else:
            room[..., 1:, :lead] = 0
        return torch.fft.rfft(room)


def forward(
    u: Tensor, kernel: Kernel, gates: tuple[Tensor | None, Tensor | None], work: Work, frames: Frames
) -> Tensor:
    """Compute postgate * (kernel conv (pregate * u)); arguments as in `fft.forward`, `work.n` of a frame."""
    rows = Rows.of(u, gates, kernel.h.shape[0])
    blocks = frames.blocks(rows, work)
    room = _Room(u, blocks, frames, work.dtype)
    y = torch.empty_like(rows.u, memory_format=torch.contiguous_format)
    for part in blocks.over_filters(kernel.h.shape[0]):
        kernel_spectrum = frames.scaled(kernel.transform(part, work))
        for at in blocks.over_rows(part, rows.sizes):
            spectra = room.transform(*rows.input(at), overlapping=True)
            frames.read(y[at], frames.inverse(spectra.mul_(kernel_spectrum)), rows.gate(at))
            del spectra  # the next ones take its memory
    return y.flatten(1, 2)


def backward(
    grad: Tensor,
    u: Tensor,
    kernel: Kernel,
    gates: tuple[Tensor | None, Tensor | None],
    work: Work,
    frames: Frames,
    needs: Needs,
) -> Gradients:
    """Gradients of `forward`; arguments and result as in `fft.backward`."""
    rows = Rows.of(u, gates, kernel.h.shape[0], grad)
    blocks, length = frames.blocks(rows, work), u.shape[-1]
    room, out = _Room(u, blocks, frames, work.dtype), Gradients.of(rows, kernel, needs, work)
    for part in blocks.over_filters(kernel.h.shape[0]):
        kernel_spectrum = frames.scaled(kernel.transform(part, work))
        reverse, total = torch.conj_physical(kernel_spectrum), None
        for at in blocks.over_rows(part, rows.sizes):
            spectra = None
            if needs.postgate or needs.kernel:
                spectra = room.transform(*rows.input(at), overlapping=True)
            if needs.postgate and spectra is not None:
                out.enter_postgate(at, frames.values(frames.inverse(spectra * kernel_spectrum), length))
            if not needs.conv:
                continue
            dz, dz_gate = rows.grad_output(at)
            if needs.direct:
                out.enter_direct(part, gated(*rows.input(at), work.dtype), gated(dz, dz_gate, work.dtype))
            later = room.transform(dz, dz_gate, overlapping=False)
            if needs.kernel and spectra is not None:
                product = spectra.conj_physical_().mul_(later).sum(dim=(0, 2, 3))
                total = product if total is None else total.add_(product)
            del spectra  # what follows takes its memory
            if needs.input:
                dw = frames.inverse(later.mul_(reverse))
                dw[..., :-1, frames.step :] += dw[..., 1:, : frames.lead]  # inputs of two frames
                out.enter_input(at, frames.values(dw, length))
                del dw
            del later
        if total is not None:
            out.enter_kernel(part, torch.fft.irfft(total, n=frames.size))
    return out


__all__ = ["Frames", "backward", "forward", "serves"]
