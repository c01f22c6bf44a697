"""What others compute, as baselines: the arithmetic of published code in plain torch, written anew.

| here | source |
|---|---|
| naive_fftconv | safari, hyena-dna: `fftconv_ref` in src/models/sequence/hyena.py (HazyResearch), without its skip |
| complex_fftconv | flash-fft-conv: the baseline in benchmarks/benchmark_flashfftconv.py (HazyResearch) |
| smooth_fftconv | none: what an afternoon of care makes of the first, a good size and a backward that keeps spectra |
| PublishedFilter, PublishedOperator | safari: `HyenaFilter`, `HyenaOperator` (order 2, one head) in the same file |
| published_mixer_core | the part of `HyenaOperator.forward` between its two projections |

Hyena: Poli et al. 2023, arXiv 2302.10866. FlashFFTConv: Fu et al. 2023, arXiv 2311.05908. The scaling by 1 / n is left
to the inverse transform, where it costs nothing; safari divides the spectrum of the filter by n.

B batch, D or C channels, L length, K taps, n FFT length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def naive_fftconv(u: Tensor, h: Tensor) -> Tensor:
    """Causal convolution of u (.., C, L) with h (C, K), in the dtype of h and through autograd; dtype of u."""
    length = u.shape[-1]
    spectrum = torch.fft.rfft(u.to(h.dtype), n=2 * length) * torch.fft.rfft(h, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(u.dtype)


def naive_cached(u: Tensor, spectrum: Tensor) -> Tensor:
    """`naive_fftconv` with the spectrum of the filters (C, L + 1) at hand; the published code has no such thing."""
    length = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * spectrum, n=2 * length)[..., :length]


def complex_fftconv(u: Tensor, h: Tensor) -> Tensor:
    """The same by complex transforms of real numbers."""
    length = u.shape[-1]
    spectrum = torch.fft.fft(u.to(h.dtype), n=2 * length) * torch.fft.fft(h, n=2 * length)
    return torch.fft.ifft(spectrum, n=2 * length).real[..., :length].to(u.dtype)


def smooth_length(least: int) -> int:
    """Smallest even number from `least` on without prime factors above 5."""
    n = least + least % 2
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


class _Smooth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, h: Tensor) -> Tensor:
        n = smooth_length(u.shape[-1] + h.shape[-1] - 1)
        of_u, of_h = torch.fft.rfft(u, n=n), torch.fft.rfft(h, n=n)
        ctx.save_for_backward(of_u, of_h)
        ctx.n, ctx.taps = n, h.shape[-1]
        return torch.fft.irfft(of_u * of_h, n=n)[..., : u.shape[-1]]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grad_outputs
        of_u, of_h = ctx.saved_tensors
        of_grad = torch.fft.rfft(grad, n=ctx.n)
        grad_u = torch.fft.irfft(of_grad * of_h.conj(), n=ctx.n)[..., : grad.shape[-1]]
        grad_h = torch.fft.irfft((of_grad * of_u.conj()).sum(0), n=ctx.n)[..., : ctx.taps]
        return grad_u, grad_h


def smooth_fftconv(u: Tensor, h: Tensor) -> Tensor:
    """Causal convolution of u (B, C, L) with h (C, K) at the next even 5-smooth size, spectra kept for backward."""
    y = _Smooth.apply(u, h)
    assert isinstance(y, Tensor)  # noqa: S101 (narrows the type)
    return y


def smooth_cached(u: Tensor, spectrum: Tensor, n: int) -> Tensor:
    """`smooth_fftconv` with the spectrum of the filters (C, n / 2 + 1) at hand."""
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * spectrum, n=n)[..., : u.shape[-1]]


def published_mixer_core(p: Tensor, short: nn.Conv1d, k: Tensor, skip: Tensor) -> Tensor:
    """From the output of the first projection to the input of the second one.

    Args:
        p: Projections (B, L, 3 D), x_0, x_1, v side by side.
        short: Depthwise convolution of 3 D channels and 3 taps, padded by 2 on both sides.
        k: Long filters (L, D) as the filter's MLP leaves them.
        skip: Published name D, (D,).

    Returns:
        (B, L, D), a transposed view.
    """
    length = p.shape[1]
    x0, x1, v = short(p.transpose(1, 2))[..., :length].chunk(3, dim=1)
    w = v * x1
    z = naive_fftconv(w, k.T) + w * skip.unsqueeze(-1)
    return (z * x0).transpose(1, 2)


class Sine(nn.Module):
    """x -> sin(frequency * x)."""

    def __init__(self, width: int, frequency: float) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((1, width), frequency))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


class PublishedFilter(nn.Module):
    """A sine MLP of time with an exponential window; tables of time are buffers.

    Args:
        width: Channels D.
        length: Longest filter.
        bands: Frequencies of the positional features.
        hidden: Width of the MLP.
        linears: Linear layers of the MLP.
    """

    times: Tensor
    features: Tensor
    rates: Tensor

    def __init__(self, width: int, length: int, bands: int = 16, hidden: int = 64, linears: int = 4) -> None:
        super().__init__()
        times, turns = torch.linspace(0, 1, length), 2 * math.pi / length * torch.arange(length)
        angles = turns.unsqueeze(-1) * torch.linspace(1e-4, bands - 1, bands)
        self.register_buffer("times", times.unsqueeze(-1))
        self.register_buffer("features", torch.cat([times.unsqueeze(-1), angles.cos(), -angles.sin()], dim=-1))
        self.register_buffer("rates", torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, width))
        sine = Sine(hidden, 14.0)  # one for all layers
        layers = [nn.Linear(2 * bands + 1, hidden), sine]
        for _ in range(linears - 2):
            layers += [nn.Linear(hidden, hidden), sine]
        self.network = nn.Sequential(*layers, nn.Linear(hidden, width, bias=False))

    def forward(self, length: int) -> Tensor:
        """Taps (L, D)."""
        return self.network(self.features[:length]) * torch.exp(-self.times[:length] * self.rates.abs())


class PublishedOperator(nn.Module):
    """Hyena operator of order 2 on (B, L, D), for inputs of up to `length` tokens."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.short = nn.Conv1d(3 * width, 3 * width, 3, groups=3 * width, padding=2)
        self.filter = PublishedFilter(width, length)
        self.skip = nn.Parameter(torch.randn(width))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Whatever else a block hands to its mixer is of no use here."""
        k = self.filter(hidden_states.shape[1])
        return self.out_proj(published_mixer_core(self.in_proj(hidden_states), self.short, k, self.skip))
