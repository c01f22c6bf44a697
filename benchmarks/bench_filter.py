"""What evaluating the implicit filter of a layer costs: this package beside the published arithmetic.

    python -m benchmarks.bench_filter            (--smoke: one small shape, 2 rounds, page in runs/smoke)

CPU time of one thread, in shuffled rounds; every ratio is published over ours within one round. The published filter
is measured twice under two names: where these two differ, so does the package by chance. About 5 minutes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from hyena_hf import HyenaConfig
from hyena_hf.filters import ImplicitFilter


BANDS, HIDDEN, LINEARS, FREQUENCY = 16, 64, 4, 14.0
SHAPES = [(width, length) for width in (256, 768) for length in (1024, 2048, 8192, 65536)]
GOALS = {(768, 2048): 1.5, (768, 8192): 3.5, (768, 65536): 4.0}
MEMORY = [(128, 65536), (128, 1_048_576)]
SMOKE_SHAPES, SMOKE_MEMORY = [(32, 256)], [(128, 65536)]
PUBLISHED, CONTROL, PACKAGE = "published", "published again (control)", "package"

Times = dict[str, list[float]]


class Sine(nn.Module):
    """x -> sin(frequency * x), one module for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((1, HIDDEN), FREQUENCY))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.frequency * x)


class PublishedFilter(nn.Module):
    """The arithmetic of safari's `HyenaFilter` (Poli et al. 2023), time before channels, tables held as buffers."""

    times: Tensor
    features: Tensor
    rates: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        times, sine = torch.linspace(0, 1, length).view(1, -1, 1), Sine()
        angles = torch.linspace(1e-4, BANDS - 1, BANDS) * (2 * math.pi / length * torch.arange(length)).view(1, -1, 1)
        self.register_buffer("times", times)
        self.register_buffer("features", torch.cat([times, torch.cos(angles), -torch.sin(angles)], dim=-1))
        rates = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, width)
        self.register_buffer("rates", rates.view(1, 1, -1))
        layers = [nn.Linear(2 * BANDS + 1, HIDDEN), sine]
        for _ in range(LINEARS - 2):
            layers += [nn.Linear(HIDDEN, HIDDEN), sine]
        self.network = nn.Sequential(*layers, nn.Linear(HIDDEN, width, bias=False))
        self.shift = 0.0

    def forward(self) -> Tensor:
        """Taps (D, L), in the order of memory in which the package gives them."""
        h = self.network(self.features)
        h = h * (torch.exp(-self.times * self.rates.abs()) + self.shift)
        return h[0].T.contiguous()


def package_filter(width: int, length: int) -> ImplicitFilter:
    """Ours of the same sizes."""
    config = HyenaConfig(
        hidden_size=width,
        num_hidden_layers=1,
        max_position_embeddings=length,
        filter_num_bands=BANDS,
        filter_hidden_size=HIDDEN,
        filter_num_layers=LINEARS,
        sine_frequency=FREQUENCY,
    )
    return ImplicitFilter(config, 0)


def forward_backward(module: nn.Module, evaluate: Callable[[], Tensor], gradient: Tensor) -> None:
    """Gradients of all parameters."""
    module.zero_grad()
    h = evaluate()
    h.backward(gradient.view_as(h))


def measure(width: int, length: int, rounds: int, *, gradients: bool) -> Times:
    """CPU seconds of every filter in every round, after a round that does not count; each round has its own order."""
    torch.manual_seed(0)
    published, package = PublishedFilter(width, length), package_filter(width, length)
    gradient = torch.randn(width, length)
    modules: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        PUBLISHED: (published, published),
        CONTROL: (published, published),
        PACKAGE: (package, lambda: package(length)),
    }
    order, times = random.Random(0), {name: [] for name in modules}
    for counts in [False] + [True] * rounds:
        for name in order.sample(list(modules), len(modules)):
            module, evaluate = modules[name]
            start = time.process_time()
            if gradients:
                forward_backward(module, evaluate, gradient)
            else:
                with torch.no_grad():
                    h = evaluate()
                del h  # the next one gets its memory
            if counts:
                times[name].append(time.process_time() - start)
    return times


def ratios(times: Times, name: str) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of published over `name`, round by round."""
    low, middle, high = quantiles([a / b for a, b in zip(times[PUBLISHED], times[name], strict=True)], n=4)
    return low, middle, high


def written(values: tuple[float, float, float]) -> str:
    """Median and quartiles in one cell."""
    low, middle, high = values
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def peak_here(name: str, width: int, length: int) -> tuple[float, float]:
    """`peak_memory` in this process, where freed memory that it still holds is not counted."""
    torch.set_num_threads(1)
    module = PublishedFilter(width, length) if name == PUBLISHED else package_filter(width, length)
    with torch.no_grad():
        package_filter(width, 16)(16)  # what the first call of anything loads
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _resident("VmRSS")
        h = module() if isinstance(module, PublishedFilter) else module(length)
    return _resident("VmHWM") - before, h.nbytes / 2**20


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def peak_memory(name: str, width: int, length: int) -> tuple[float, float]:
    """MiB that evaluating a filter once takes at most, and MiB of its taps; in a process of its own, on Linux."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_here, (name, width, length))


def time_table(shapes: list[tuple[int, int]], rounds: int, *, gradients: bool) -> tuple[list[str], dict]:
    """The lines of a table of times, and the ratios by shape."""
    rows, found = [], {}
    for width, length in tqdm(shapes, desc="gradients" if gradients else "taps"):
        times = measure(width, length, rounds, gradients=gradients)
        found[width, length] = ratios(times, PACKAGE)
        each = [f"{median(times[name]) * 1e3:.2f}" for name in (PUBLISHED, PACKAGE)]
        goal = [] if gradients else [GOALS.get((width, length), "")]
        rows.append((width, length, *each, written(ratios(times, CONTROL)), written(found[width, length]), *goal))
    columns = ["width", "length", "published, ms", "package, ms", "control", "published / package"]
    return markdown_table(columns if gradients else [*columns, "goal"], rows), found


def page(
    shapes: list[tuple[int, int]], memory: Sequence[tuple[int, int]], rounds: int
) -> tuple[list[str], dict[tuple[int, int], tuple[float, float, float]]]:
    """The page, and the ratios of evaluation without gradients by width and length."""
    taps, found = time_table(shapes, rounds, gradients=False)
    gradients, _ = time_table(shapes, rounds, gradients=True)
    rows = []
    for width, length in memory:
        (published, size), (package, _) = (peak_memory(name, width, length) for name in (PUBLISHED, PACKAGE))
        cells = (f"{size:.0f}", f"{published:.0f}", f"{package:.0f}", f"{package / size:.2f}")
        rows.append((width, f"{length:,}", *cells))
    lines = [
        f"Filter of one layer, {BANDS} bands, {LINEARS} linear layers of width {HIDDEN}, one thread, CPU time, "
        f"{rounds} shuffled rounds: medians of milliseconds, median [quartiles] of ratios round by round. The "
        f"published filter holds its positional features and gives taps as (L, D), which are copied to (D, L); the "
        f"package computes features each time.",
        "",
        "## Taps, no gradients",
        "",
        *taps,
        "",
        "## Taps and gradients of all parameters",
        "",
        *gradients,
        "",
        "## Peak memory without gradients, MiB",
        "",
        *markdown_table(["width", "length", "taps", "published", "package", "package / taps"], rows),
    ]
    return lines, found


def ratio_plot(found: dict[tuple[int, int], tuple[float, float, float]]) -> Figure:
    """Ratio over length, one line a width, quartiles shaded."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for width in sorted({width for width, _ in found}):
        lengths = [length for own, length in found if own == width]
        low, middle, high = zip(*(found[width, length] for length in lengths), strict=True)
        axes.plot(lengths, middle, "o-", label=f"width {width}")
        axes.fill_between(lengths, low, high, alpha=0.2)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="length", ylabel="published / package, CPU time", title="Evaluating a filter")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="one small shape, 2 rounds, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds ({arguments.rounds}) must be at least 2")
    torch.set_num_threads(1)
    shapes, memory, rounds, folder = SHAPES, MEMORY, arguments.rounds, RESULTS
    if arguments.smoke:
        shapes, memory, rounds, folder = SMOKE_SHAPES, SMOKE_MEMORY, 2, SMOKE_RESULTS
    lines, found = page(shapes, memory, rounds)
    figures = {"ratio": ratio_plot(found)}
    command = command_line("bench_filter")
    path = write_result("filter", "Evaluating implicit filters", command, lines, figures, folder=folder)
    print(path.read_text())


if __name__ == "__main__":
    main()
