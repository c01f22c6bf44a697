# SPDX-License-Identifier: Apache-2.0
"""Long convolutions by torch's FFT as the formula stands: the reference, the fastest for small inputs, and for GPUs.

    y = postgate * irfft(rfft(pregate * u) rfft(kernel))

Gradients are written out in real transforms, where autograd would use complex ones of twice the size. Spectra are kept
from forward to backward where they are small. Shapes and names as in `fft`, which does the same in blocks.
"""

import torch
from torch import Tensor

from .fft import Gates, Kernel, Needs, Work, gated, sum_of_rows


Kept = tuple[Tensor, Tensor]


def forward(u: Tensor, kernel: Kernel, gates: Gates, work: Work) -> tuple[Tensor, Kept]:
    """Compute postgate * (kernel conv (pregate * u)).

    Args:
        u: (B, C, L).
        kernel: Of H filters.
        gates: pregate and postgate (B, C, L), or None.
        work: FFT length and dtype of the transforms.

    Returns:
        Output (B, C, L) in the dtype of `u`, and the spectra of the input (B, H, G, F) and of the kernel (H, 1, F).
    """
    w = gated(u, gates[0], work.dtype).unflatten(1, (kernel.h.shape[0], -1))
    spectrum, kernel_spectrum = torch.fft.rfft(w, n=work.n), kernel.transform(slice(None), work)
    z = torch.fft.irfft(spectrum * kernel_spectrum, n=work.n)[..., : u.shape[-1]]
    kernel.refine(z, w, slice(None))
    z = z.flatten(1, 2)
    y = z.contiguous() if gates[1] is None else z * gates[1]
    return y.to(u.dtype), (spectrum, kernel_spectrum)


def backward(
    grad: Tensor, u: Tensor, kernel: Kernel, gates: Gates, work: Work, needs: Needs, kept: Kept | None = None
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`.

    Args:
        grad: Of the output (B, C, L).
        u, kernel, gates, work: As there.
        needs: Which are wanted.
        kept: Spectra that `forward` returned, if they are still there.

    Returns:
        Of u, h, h_reverse, direct, pregate, postgate; those of the kernel in the dtype of the transforms.
    """
    pregate, postgate = gates
    filters, length = kernel.h.shape[0], u.shape[-1]
    dz = gated(grad, postgate, work.dtype).unflatten(1, (filters, -1))
    w = None
    if needs.direct or kept is None:
        w = gated(u, pregate, work.dtype).unflatten(1, (filters, -1))
    if kept is None:
        kept = torch.fft.rfft(w, n=work.n), kernel.transform(slice(None), work)  # pyright: ignore (w is there)
    spectrum, kernel_spectrum = kept
    of_u = of_h = of_reverse = of_direct = of_pregate = of_postgate = None
    if needs.postgate:
        z = torch.fft.irfft(spectrum * kernel_spectrum, n=work.n)[..., :length].flatten(1, 2)
        of_postgate = (z * grad).to(u.dtype)
    if needs.kernel or needs.input:
        dz_spectrum = torch.fft.rfft(dz, n=work.n)
        if needs.kernel:
            # Correlation with a signal is convolution with its reversal: the conjugate spectrum. Not the lazy `conj`,
            # whose mark graphs of the compiler lose inside a custom operator.
            of_kernel = torch.fft.irfft(sum_of_rows(torch.conj_physical(spectrum).mul_(dz_spectrum)), n=work.n)
            of_h, of_reverse = kernel.split(of_kernel)
        if needs.input:
            dw = torch.fft.irfft(dz_spectrum.mul_(torch.conj_physical(kernel_spectrum)), n=work.n)[
                ..., :length
            ].flatten(1, 2)
            of_u = (dw.contiguous() if pregate is None else dw * pregate).to(u.dtype) if needs.u else None
            of_pregate = (dw * u).to(u.dtype) if needs.pregate else None
    if needs.direct and w is not None:
        of_direct = (w * dz).sum(dim=(0, 2, 3))
    return of_u, of_h, of_reverse, of_direct, of_pregate, of_postgate


__all__ = ["backward", "forward"]
