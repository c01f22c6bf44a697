"""Section `prefill`: the state behind a prompt, by blocks of powers or by an FFT of every mode."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.report import markdown_table
from benchmarks.timing import Call, Settings
from hyena_hf.ops.modal import ModalSystem, advance, canonical_poles, modal_system

from .figures import Page, reached


SIZES = 1, 64, 8, 4096  # B, D, N, L
GOAL = 50
MODAL_FFT, BLOCKS = "modal FFT", "blocks of powers"


def modal_fft_state(poles: Tensor, w: Tensor) -> Tensor:
    """States (B, D, N) of modes behind inputs w (B, D, L), as StripedHyena's prefill computes them.

    The response of every mode is convolved with the input by an FFT of 2 L points, and the last output of the L is
    kept: a complex tensor of (B, D, N, 2 L) numbers and its inverse transform.
    """
    length = w.shape[-1]
    responses = poles.unsqueeze(-1) ** torch.arange(length)  # (D, N, L)
    spectra = torch.fft.fft(responses, n=2 * length)
    product = torch.fft.fft(w.to(responses.dtype), n=2 * length).unsqueeze(2) * spectra
    return torch.fft.ifft(product)[..., length - 1]


def make_inputs(batch: int, channels: int, modes: int, length: int) -> tuple[ModalSystem, Tensor, Tensor]:
    """Poles that remember 10 to `length` inputs, the same packed, and inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = channels, modes
    log_radius = -1 / torch.logspace(1, torch.tensor(length).log10(), modes).expand(shape)
    angle = torch.rand(shape, generator=generator) * 3
    residues = torch.randn(2, *shape, generator=generator)
    poles = canonical_poles(log_radius, angle).to(torch.complex64)
    return modal_system(log_radius, angle, *residues), poles, torch.randn(batch, channels, length, generator=generator)


def prepare(name: str, *sizes: int) -> Call:
    """The call whose time and memory count."""
    system, poles, w = make_inputs(*sizes)
    return partial(advance, None, w, system) if name == BLOCKS else partial(modal_fft_state, poles, w)


def difference(*sizes: int) -> float:
    """Relative RMS; our numbers are the real and imaginary part of (1 + i) times a mode."""
    system, poles, w = make_inputs(*sizes)
    truth = modal_fft_state(poles.to(torch.complex128), w.double())
    re, im = advance(None, w, system).double().chunk(2, dim=1)
    found = (torch.complex(re, im) / (1 + 1j)).transpose(1, 2)
    return float((found - truth).norm() / truth.norm())


def section(settings: Settings) -> Page:
    """Time, memory and difference of both."""
    sizes = (1, 4, 2, 300) if settings.smoke else SIZES
    error = difference(*sizes)
    if not error < 1e-4:
        raise RuntimeError(f"the two ways to a state differ by {error:.1e} relative RMS")
    with torch.no_grad():
        found = settings.compare({name: prepare(name, *sizes) for name in (MODAL_FFT, BLOCKS)})
    ratio, rows = found.ratio(BLOCKS), []
    for name in (MODAL_FFT, BLOCKS):
        peak = settings.peak_memory(prepare, name, *sizes)
        rows.append((name, f"{found.milliseconds(name):.3g}", "-" if peak is None else f"{peak.mebibytes:.1f}"))
    lines = [
        "## State behind a prompt",
        "Inputs (B, D, L) = ({0}, {1}, {3}), {2} complex modes a channel. The modal FFT convolves with the response "
        "of every mode and keeps one output; we multiply blocks of 256 inputs by powers of the poles.".format(*sizes),
        "",
        *markdown_table(["way", "CPU ms", "peak memory, MiB"], rows),
        "",
        f"Ratio {ratio}, {found.rounds} rounds; the modal FFT over itself: {found.control}. Goal: {GOAL}, reached: "
        f"{reached(ratio, GOAL)}. Their states differ by {error:.1e} relative RMS.",
    ]
    return lines, {}
