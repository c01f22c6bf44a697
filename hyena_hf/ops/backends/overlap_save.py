# SPDX-License-Identifier: Apache-2.0
"""Partial convolutions: filters much shorter than the input, by overlapping frames of a few filter lengths.

Overlap-save (Stockham 1966): frame j holds the inputs from K - 1 before output j S on, N = S + K - 1 of them; of its
circular convolution with the filter the last S values do not wrap around. So transforms have the size of the filter
and not of the input. Backward is the transposed chain: gradients of the frames, whose overlaps are added.

B batch, H filters, G channels that share one, L length, K taps, N FFT length, S new outputs of a frame, M frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .fft import Blocks, Gradients, Kernel, Needs, Rows, Work, gated, multiply_into, write


# Smallest frame: below it the overhead of a transform shows.
_SMALLEST = 1024


@dataclass(frozen=True)
class Frames:
    """M frames of N points, S of them new, over L inputs."""

    count: int
    step: int
    size: int

    @classmethod
    def of(cls, length: int, taps: int) -> "Frames":
        """Frames whose transforms cost least.

        Powers of two, which FFT libraries do faster per point than other smooth sizes, of up to 32 filter
        lengths; the price of a point grows with the logarithm of the size, and by the cache that it no longer fits.
        """
        smallest = max(_SMALLEST, 1 << (2 * taps - 1).bit_length())
        options = [cls._whole(length, taps, smallest << k) for k in range(5)]
        return min(options, key=lambda frames: frames.count * frames.size * (9 + frames.size.bit_length()))

    @classmethod
    def _whole(cls, length: int, taps: int, size: int) -> "Frames":
        step = size - taps + 1
        return cls(-(-length // step), step, size)


def serves(length: int, taps: int) -> bool:
    """Whether frames are faster than one transform: measured in benchmarks/results/fftconv.md."""
    return length >= 4 * _SMALLEST and 12 * taps <= length


class _Signal:
    """Room for one block of rows of a signal, with zeros around it.

    Args:
        like: A tensor of the same device.
        blocks: How rows (B, H, G) divide.
        frames: How time divides.
        dtype: Of the transforms.
    """

    def __init__(self, like: Tensor, blocks: Blocks, frames: Frames, dtype: torch.dtype) -> None:
        self.frames = frames
        points = (frames.count - 1) * frames.step + frames.size
        self.room = like.new_zeros(blocks.batch, blocks.filters, blocks.group, points, dtype=dtype)

    def transform(self, x: Tensor, gate: Tensor | None, lead: int) -> Tensor:
        """Spectra of all frames of gate * x (b, h, g, L) behind `lead` zeros, (b, h, g, M, F)."""
        room = self.room[: x.shape[0], : x.shape[1], : x.shape[2]]
        room[..., :lead] = 0
        room[..., lead + x.shape[-1] :] = 0
        write(room[..., lead : lead + x.shape[-1]], x, gate)
        return torch.fft.rfft(room.unfold(-1, self.frames.size, self.frames.step))

    def apart(self, w: Tensor) -> Tensor:
        """Spectra of the S values of w (b, h, g, L) that are new in each frame, alone at its beginning, (.., M, F)."""
        steps = self.frames.count * self.frames.step
        w = torch.nn.functional.pad(w, (0, steps - w.shape[-1])).unflatten(-1, (self.frames.count, -1))
        return torch.fft.rfft(w, n=self.frames.size)

    def back_into(self, out: Tensor, gate: Tensor | None, spectra: Tensor, first: int) -> None:
        """Set out (b, h, g, L) to the gate times values first to first + S - 1 of each frame, one after the other."""
        z = torch.fft.irfft(spectra, n=self.frames.size)[..., first : first + self.frames.step]
        count = out.shape[-1] // self.frames.step
        shape, cut = (count, self.frames.step), count * self.frames.step
        if count:
            whole = None if gate is None else gate[..., :cut].unflatten(-1, shape)
            multiply_into(out[..., :cut].unflatten(-1, shape), z[..., :count, :], whole)
        if cut < out.shape[-1]:
            rest = z[..., count, : out.shape[-1] - cut]
            multiply_into(out[..., cut:], rest, None if gate is None else gate[..., cut:])

    def back(self, spectra: Tensor, first: int, length: int) -> Tensor:
        """Values first to first + S - 1 of each frame, one after the other, (b, h, g, L)."""
        z = torch.fft.irfft(spectra, n=self.frames.size)
        return z[..., first : first + self.frames.step].flatten(-2)[..., :length]


def forward(
    u: Tensor, kernel: Kernel, gates: tuple[Tensor | None, Tensor | None], work: Work, frames: Frames
) -> Tensor:
    """Compute postgate * (kernel conv (pregate * u)); arguments as in `fft.forward`, `work.n` of a frame."""
    rows = Rows.of(u, gates, kernel.h.shape[0])
    blocks = Blocks.of(rows.sizes, work.floats // (frames.count * frames.size))
    signal, lead = _Signal(u, blocks, frames, work.dtype), kernel.h.shape[1] - 1
    y = torch.empty_like(rows.u, memory_format=torch.contiguous_format)
    for part in blocks.over_filters(kernel.h.shape[0]):
        kernel_spectrum = kernel.transform(part, work).unsqueeze(-2)
        for at in blocks.over_rows(part, rows.sizes):
            spectra = signal.transform(*rows.input(at), lead)
            signal.back_into(y[at], rows.gate(at), spectra.mul_(kernel_spectrum), lead)
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
    blocks = Blocks.of(rows.sizes, work.floats // (frames.count * frames.size))
    signal, lead, length = _Signal(u, blocks, frames, work.dtype), kernel.h.shape[1] - 1, u.shape[-1]
    out = Gradients.of(rows, kernel, needs, work)
    for part in blocks.over_filters(kernel.h.shape[0]):
        kernel_spectrum = kernel.transform(part, work).unsqueeze(-2)
        total = None
        for at in blocks.over_rows(part, rows.sizes):
            if needs.postgate:
                spectra = signal.transform(*rows.input(at), lead)
                out.enter_postgate(at, signal.back(spectra.mul_(kernel_spectrum), lead, length))
            if not needs.conv:
                continue
            dz, dz_gate = rows.grad_output(at)
            later = signal.transform(dz, dz_gate, 0)  # frame j begins with output j S
            w = gated(*rows.input(at), work.dtype) if needs.kernel or needs.direct else None
            if w is not None:
                out.enter_direct(part, w, gated(dz, dz_gate, work.dtype))
            if needs.kernel and w is not None:
                product = signal.apart(w).conj_physical_().mul_(later).sum(dim=(0, 2, 3))
                total = product if total is None else total.add_(product)
            if needs.input:
                out.enter_input(at, signal.back(later.mul_(torch.conj_physical(kernel_spectrum)), 0, length))
        if total is not None:
            out.enter_kernel(part, torch.fft.irfft(total, n=frames.size))
    return out


__all__ = ["Frames", "backward", "forward", "serves"]
