"""What one long convolution costs: this package beside the arithmetic of published code.

    python -m benchmarks.bench_fftconv                        (--smoke: tiny shapes, 2 rounds, page in runs/smoke)
    python -m benchmarks.bench_fftconv --only shapes,lengths  (those sections alone; the others stay on the page)

CPU time of one thread unless a section says otherwise, in shuffled rounds; every ratio is the time of the naive
convolution over that of another one within one round, its median and quartiles. Naive is what published code does:
real FFTs of input and filter at twice the length, product, inverse, autograd. Measured twice under two names it shows
what chance alone does. On a machine with a CUDA device `--only gpu` adds a table in time on the device.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.published import (
    complex_fftconv,
    naive_cached,
    naive_fftconv,
    smooth_cached,
    smooth_fftconv,
    smooth_length,
)
from benchmarks.report import markdown_table
from benchmarks.timing import (
    KEEPING_ALLOCATOR,
    Call,
    Comparison,
    Ratio,
    Settings,
    device_time,
    memory_plot,
    ratio_plot,
    ratio_table,
    run_sections,
    verdict,
    wall_time,
)
from hyena_hf.ops import causal_fftconv, filter_spectrum, short_conv


Page = tuple[list[str], dict[str, Figure]]
Convolution = Callable[[Tensor, Tensor], Tensor]

SHAPES = [(8, 768, 512), (4, 256, 2048), (1, 768, 8192), (4, 64, 16384), (1, 64, 65536), (1, 64, 1024)]
LENGTHS = [1025, 4097, 8191, 10007]
PARTIAL = [(8192, 128), (32768, 1024)]
MEMORY_SHAPE = (4, 256, 8192)
ERROR_SHAPES = [(2, 8, 1000), (2, 8, 1024), (1, 4, 65536)]
SHORT_SHAPE = (1, 2304, 2048)
TWO_THREADS = [(4, 256, 2048), (1, 768, 8192), (4, 64, 16384), (1, 64, 65536)]
KEYS = ["B", "C", "L"]
OURS = "this package"
# bytes for each number of the input that the greediest convolution holds on a GPU, forward and with gradients
GPU_BYTES = {"forward": 100, "forward and backward": 250}


def tensors(batch: int, channels: int, length: int, taps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Input, decaying filters and a gradient of the output."""
    u = torch.randn(batch, channels, length)
    taps = taps or length
    h = torch.randn(channels, taps) * torch.exp(-torch.arange(taps) * 5 / taps) / math.sqrt(taps)
    return u, h, torch.randn_like(u)


def with_gradients(convolve: Convolution, u: Tensor, h: Tensor, grad: Tensor) -> Call:
    """Forward and backward, gradients of input and filters."""
    u, h = u.detach().requires_grad_(), h.detach().requires_grad_()
    return lambda: torch.autograd.grad(convolve(u, h), (u, h), grad)


def without_gradients(convolve: Callable[..., Tensor], *arguments: object) -> Call:
    """Forward alone."""

    def call() -> Tensor:
        with torch.no_grad():
            return convolve(*arguments)

    return call


def training(
    settings: Settings, shape: tuple[int, int, int], *, others: bool = True, control: bool = True
) -> Comparison:
    """Forward and backward of all convolutions."""
    u, h, grad = tensors(*shape)
    convolutions = {"naive": naive_fftconv, "smooth": smooth_fftconv, "complex": complex_fftconv, OURS: causal_fftconv}
    if not others:
        convolutions = {"naive": naive_fftconv, OURS: causal_fftconv}
    cases = {name: with_gradients(convolve, u, h, grad) for name, convolve in convolutions.items()}
    return settings.compare(cases, control=control)


def inference(
    settings: Settings, shape: tuple[int, int, int], *, others: bool = True, control: bool = True
) -> Comparison:
    """Forward alone; ours, and others where it says so, have the spectrum of the filters."""
    u, h, _ = tensors(*shape)
    length, n = shape[-1], smooth_length(2 * shape[-1] - 1)
    cases = {"naive": without_gradients(naive_fftconv, u, h)}
    if others:
        own, smooth = torch.fft.rfft(h, n=2 * length), torch.fft.rfft(h, n=n)
        cases["naive, spectrum kept"] = without_gradients(naive_cached, u, own)
        cases["smooth, spectrum kept"] = without_gradients(smooth_cached, u, smooth, n)
        cases["complex"] = without_gradients(complex_fftconv, u, h)
        cases["this package, taps"] = without_gradients(causal_fftconv, u, h)
    cases[OURS] = without_gradients(causal_fftconv, u, filter_spectrum(h, length))
    return settings.compare(cases, control=control)


def shapes(settings: Settings) -> Page:
    """The six shapes, with gradients and without."""
    chosen = [(1, 4, 64), (2, 4, 100)] if settings.smoke else SHAPES
    train = {shape: settings.in_subprocess(training, settings, shape) for shape in tqdm(chosen, desc="gradients")}
    infer = {shape: settings.in_subprocess(inference, settings, shape) for shape in tqdm(chosen, desc="inference")}
    lines = [
        "## Shapes",
        "Forward and backward, gradients of input and filters; time of naive over each:",
        "",
        *ratio_table(KEYS, train),
        "",
        verdict(train, OURS, "geometric mean 2.6, each lower quartile 1.4"),
        "",
        "Inference, the spectrum of the filters kept from call to call by this package and where it is said:",
        "",
        *ratio_table(KEYS, infer),
        "",
        verdict(infer, OURS, "geometric mean 2.3"),
        "",
        "Every row has a process of its own: the allocator's history decides what a large temporary costs. The same "
        "with an allocator that keeps its memory (mmap_max=0, no trimming), forward and backward, then inference:",
    ]
    for function in (training, inference):
        kept = {
            shape: settings.in_subprocess(function, settings, shape, environment=KEEPING_ALLOCATOR)
            for shape in tqdm(chosen, desc="keeping allocator")
        }
        lines += ["", *ratio_table(KEYS, kept)]
    return lines, {}


def lengths(settings: Settings) -> Page:
    """Lengths whose double has large prime factors."""
    chosen = [(1, 4, 67)] if settings.smoke else [(1, 64, length) for length in LENGTHS]
    train = {shape: settings.in_subprocess(training, settings, shape) for shape in tqdm(chosen, desc="gradients")}
    infer = {shape: settings.in_subprocess(inference, settings, shape) for shape in tqdm(chosen, desc="inference")}
    lines = ["## Awkward lengths", "Naive transforms at n = 2 L. Forward and backward:", "", *ratio_table(KEYS, train)]
    lines += ["", verdict(train, OURS, "3.3"), "", "Inference:", "", *ratio_table(KEYS, infer)]
    return [*lines, "", verdict(infer, "this package, taps", "3.3"), "", verdict(infer, OURS, "3.3")], {}


def partial_filters(settings: Settings) -> Page:
    """Filters far shorter than the input."""
    chosen = [(256, 16)] if settings.smoke else PARTIAL
    goals = "128 taps 5, 1024 taps 4.3 over the transform of twice the input"
    lines = ["## Short filters on long inputs", f"B = 1, C = 32; naive transforms at n = 2 L. Goal: {goals}."]
    for title in ("Forward", "Forward and backward"):
        found = {}
        for length, taps in tqdm(chosen, desc=title):
            u, h, grad = tensors(1, 32, length, taps)
            convolutions = {"naive": naive_fftconv, "smooth": smooth_fftconv, OURS: causal_fftconv}
            if title == "Forward":
                cases = {name: without_gradients(convolve, u, h) for name, convolve in convolutions.items()}
            else:
                cases = {name: with_gradients(convolve, u, h, grad) for name, convolve in convolutions.items()}
            found[length, taps] = settings.compare(cases)
        lines += ["", f"{title}:", "", *ratio_table(["L", "taps"], found, means=False)]
    return lines, {}


def prepare_training(name: str, batch: int, channels: int, length: int) -> Call:
    """Forward and backward of one convolution, for `peak_memory`."""
    convolutions = {"naive": naive_fftconv, "smooth": smooth_fftconv, OURS: causal_fftconv}
    with_gradients(convolutions[name], *tensors(1, 2, 64))()  # what a first call loads
    return with_gradients(convolutions[name], *tensors(batch, channels, length))


def memory(settings: Settings) -> Page:
    """Peak of forward and backward above the inputs, each in a fresh process."""
    chosen = [(1, 4, 64)] if settings.smoke else [(4, 64, 1 << e) for e in range(10, 19, 2)] + [MEMORY_SHAPE]
    names, rows = ("naive", "smooth", OURS), []
    curves: dict[str, dict[int, float]] = {name: {} for name in names}
    for shape in tqdm(chosen, desc="memory"):
        peaks = [settings.peak_memory(prepare_training, name, *shape) for name in names]
        if None in peaks:
            return ["## Memory", "Resident memory is read on Linux only."], {}
        found = dict(zip(names, (peak.mebibytes for peak in peaks if peak is not None), strict=True))
        cells = [f"{value:.0f}" for value in found.values()]
        rows.append(
            (*shape, f"{math.prod(shape) / 2**18:.0f}", *cells, f"{found['naive'] / max(found[OURS], 0.01):.1f}")
        )
        if shape[:2] == (4, 64) or settings.smoke:
            for name, value in found.items():
                curves[name][shape[-1]] = value
    columns = [*KEYS, "input, MiB", *(f"{name}, MiB" for name in names), f"naive / {OURS}"]
    note = f"Forward and backward, gradients included. Goal at {MEMORY_SHAPE}: a quarter of naive."
    figure = memory_plot(curves, "Convolution, forward and backward, B = 4, C = 64")
    return ["## Memory", note, "", *markdown_table(columns, rows)], {"memory": figure}


def direct_convolution(u: Tensor, h: Tensor) -> Tensor:
    """In float64, as a sum over lags where that is not too long; by FFT in float64 elsewhere."""
    u, h = u.double(), h.double()
    length, taps = u.shape[-1], h.shape[-1]
    if length > 2048:
        return naive_fftconv(u, h)
    padded = torch.nn.functional.pad(u, (taps - 1, 0))
    return torch.nn.functional.conv1d(padded, h.flip(-1).unsqueeze(1), groups=h.shape[0])


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    found, truth = found.detach().double(), truth.detach()
    return float((found - truth).norm() / truth.norm())


def errors(settings: Settings) -> Page:
    """Relative errors of outputs and gradients."""
    chosen, rows = [(1, 4, 64)] if settings.smoke else ERROR_SHAPES, []
    goals = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
    for shape in chosen:
        for dtype, goal in goals.items():
            u, h, grad = tensors(*shape)
            u, grad = u.to(dtype), grad.to(dtype)
            results = {}
            for name, convolve in (("truth", direct_convolution), ("naive", naive_fftconv), (OURS, causal_fftconv)):
                exact = name == "truth"
                inputs = [(x.double() if exact else x).detach().requires_grad_() for x in (u, h)]
                y = convolve(*inputs)
                results[name] = [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]
            truth = results.pop("truth")
            found = {
                name: [relative_error(*two) for two in zip(own, truth, strict=True)] for name, own in results.items()
            }
            worst = max(ours / naive for ours, naive in zip(found[OURS], found["naive"], strict=True))
            cells = [f"{value:.1e}" for pair in zip(found[OURS], found["naive"], strict=True) for value in pair]
            rows.append((*shape, str(dtype).removeprefix("torch."), *cells, f"{worst:.2f}", f"{goal:.0e}"))
    parts = ("y", "gradient of u", "gradient of h")
    columns = [*KEYS, "u", *(f"{part}, {who}" for part in parts for who in (OURS, "naive"))]
    note = "Relative RMS error against a direct convolution in float64 (by FFT in float64 where L > 2048) of the same "
    note += "rounded inputs; filters in float32."
    return ["## Errors", note, "", *markdown_table([*columns, "ours / naive, worst", "goal"], rows)], {}


def prepare_short(p: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None) -> dict[str, Call]:
    """The short convolution of p (B, L, C) by torch and by this package, on both layouts of its input."""

    def torch_conv(x: Tensor, taps: Tensor, shift: Tensor) -> Tensor:
        padding = taps.shape[1] - 1
        y = torch.nn.functional.conv1d(x, taps.unsqueeze(1), shift, padding=padding, groups=len(taps))
        return y[..., : x.shape[-1]]

    transposed, contiguous = p.transpose(1, 2), p.transpose(1, 2).contiguous()
    calls: dict[str, Call] = {}
    for label, x in (("transposed view", transposed), ("contiguous", contiguous)):
        for name, convolve in (("conv1d", torch_conv), (OURS, short_conv)):
            if grad is None:
                calls[f"{name}, {label}"] = without_gradients(convolve, x, weight, bias)
                continue
            inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            # the gradient comes in the layout of the output
            own = torch.empty_like(convolve(*inputs)).copy_(grad)
            calls[f"{name}, {label}"] = partial(_gradients, convolve, inputs, own)
    return calls


def _gradients(convolve: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(convolve(*inputs), inputs, grad)


def short(settings: Settings) -> Page:
    """The short convolution before the gates."""
    batch, channels, length = (1, 12, 64) if settings.smoke else SHORT_SHAPE
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        p, weight = torch.randn(batch, length, channels), torch.randn(channels, 3)
        parts = [x.to(dtype) for x in (p, weight, torch.randn(channels), torch.randn(batch, channels, length))]
        for title, grad in (("forward", None), ("forward and backward", parts[3])):
            cases = prepare_short(parts[0], parts[1], parts[2], grad)
            found[str(dtype).removeprefix("torch."), title] = settings.compare(cases)
    over = [(*key, one.ratio(f"{OURS}, contiguous", "conv1d, contiguous")) for key, one in found.items()]
    lines = [
        "## Short convolution",
        f"Depthwise, 3 taps, {(batch, channels, length)}; the base is grouped conv1d on the transposed view of "
        f"(B, L, C), as in published code. Goal in float32: 4 forward, 2.5 forward and backward.",
        "",
        *ratio_table(["dtype", "what"], found, means=False),
        "",
        "Over conv1d where both have contiguous input:",
        "",
        *markdown_table(["dtype", "what", OURS], over),
    ]
    return lines, {}


def threads(settings: Settings) -> Page:
    """Two threads against one."""
    if (os.cpu_count() or 1) < 2:
        return ["## Two threads", "This machine has one core."], {}
    chosen = [(1, 4, 64)] if settings.smoke else TWO_THREADS
    lines = ["## Two threads", "Wall-clock time of one thread over two. Goal: 1.5 on an idle machine."]
    for title in ("Forward and backward", "Inference, spectrum kept"):
        found = {}
        for shape in tqdm(chosen, desc=title):
            u, h, grad = tensors(*shape)
            if title == "Forward and backward":
                call = with_gradients(causal_fftconv, u, h, grad)
            else:
                call = without_gradients(causal_fftconv, u, filter_spectrum(h, shape[-1]))
            cases = {"one thread": call, "two threads": call}
            found[shape] = settings.compare(cases, meter=wall_time, threads={"one thread": 1, "two threads": 2})
        lines += ["", f"{title}:", "", *ratio_table(KEYS, found)]
    return lines, {}


def scaling(settings: Settings) -> Page:
    """Ratio over length."""
    exponents = range(6, 8) if settings.smoke else range(8, 21, 2)
    curves: dict[str, dict[int, Ratio]] = {"forward and backward": {}, "inference, spectrum kept": {}}
    rows = []
    for exponent in tqdm(exponents, desc="scaling"):
        shape = 1, 32, 1 << exponent
        for name, measure in zip(curves, (training, inference), strict=True):
            one = measure(settings, shape, others=False, control=False)
            curves[name][shape[-1]] = one.ratio(OURS)
            times = f"{one.milliseconds('naive'):.3g}", f"{one.milliseconds(OURS):.3g}"
            rows.append((f"{shape[-1]:,}", name, one.rounds, *times, one.ratio(OURS)))
    columns = ["L", "what", "rounds", "naive, ms", f"{OURS}, ms", f"naive / {OURS}"]
    figure = ratio_plot(curves, "Long convolution, B = 1, C = 32", f"naive / {OURS}, CPU time")
    return ["## Over length", "B = 1, C = 32.", "", *markdown_table(columns, rows)], {"ratio": figure}


def fitting(length: int, bytes_each: int) -> tuple[int, int]:
    """Batch and channels, 64 and 768 where the device has the memory."""
    batch, channels, free = 64, 768, torch.cuda.mem_get_info()[0]
    while batch * channels * length * bytes_each > 0.8 * free and channels > 48:
        batch, channels = (batch // 2, channels) if batch > 1 else (1, channels // 2)
    return batch, channels


def gated(convolve: Convolution, u: Tensor, h: Tensor, pregate: Tensor, postgate: Tensor) -> Tensor:
    """With both gates as operations of their own."""
    return convolve(u * pregate, h) * postgate


def gpu_cases(batch: int, channels: int, length: int, *, gradients: bool) -> dict[str, Call]:
    """Gated convolutions in float16 on the current CUDA device."""
    device = torch.device("cuda")
    u, pregate, postgate, grad = (
        torch.randn(batch, channels, length, device=device, dtype=torch.float16) * 0.1 for _ in range(4)
    )
    h = torch.randn(channels, length, device=device) / math.sqrt(length)

    def ours(u: Tensor, h: Tensor, pregate: Tensor, postgate: Tensor) -> Tensor:
        return causal_fftconv(u, h, pregate=pregate, postgate=postgate)

    convolutions: dict[str, Callable[..., Tensor]] = {
        "rfft": partial(gated, naive_fftconv),
        "complex": partial(gated, complex_fftconv),
        OURS: ours,
    }
    if importlib.util.find_spec("flashfftconv") is not None and 2 * length <= 1 << 22:
        from flashfftconv import FlashFFTConv  # pyright: ignore[reportMissingImports]

        convolutions["flashfftconv"] = FlashFFTConv(2 * length, dtype=torch.float16).to(device)
    inputs = [tensor.requires_grad_(gradients) for tensor in (u, h, pregate, postgate)]
    if gradients:
        return {name: partial(_gradients, convolve, inputs, grad) for name, convolve in convolutions.items()}
    return {name: without_gradients(convolve, *inputs) for name, convolve in convolutions.items()}


def gpu(settings: Settings) -> Page:
    """Gated convolutions on a CUDA device."""
    if not torch.cuda.is_available():
        return ["## GPU", "No CUDA device was at hand."], {}
    lines = [
        "## GPU",
        f"{torch.cuda.get_device_name()}, gated, float16 with filters in float32, time on the device; rfft is the "
        f"naive convolution. Batch and channels are halved where memory does not suffice. Goal: 5 over rfft, 7.9 over "
        f"complex, 1.0 over flashfftconv.",
    ]
    exponents = range(8, 11, 2) if settings.smoke else range(8, 23, 2)
    for title, bytes_each in GPU_BYTES.items():
        found = {}
        for exponent in tqdm(exponents, desc=title):
            length = 1 << exponent
            shape = *fitting(length, bytes_each), length
            found[shape] = settings.compare(gpu_cases(*shape, gradients="backward" in title), meter=device_time)
            torch.cuda.empty_cache()
        rows = [
            (
                *key,
                *(
                    one.ratio(OURS, base) if base in one.seconds else "-"
                    for base in ("rfft", "complex", "flashfftconv")
                ),
            )
            for key, one in found.items()
        ]
        lines += ["", f"{title.capitalize()}:", "", *ratio_table(KEYS, found), "", f"Time of others over {OURS}:", ""]
        lines += markdown_table([*KEYS, "rfft", "complex", "flashfftconv"], rows)
    return lines, {}


SECTIONS = {
    "shapes": shapes,
    "lengths": lengths,
    "partial": partial_filters,
    "memory": memory,
    "errors": errors,
    "short": short,
    "threads": threads,
    "scaling": scaling,
    "gpu": gpu,
}


if __name__ == "__main__":
    run_sections("fftconv", "Long convolutions", __doc__, SECTIONS)
