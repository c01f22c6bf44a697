"""Distillation of filters: how close fits are to what is possible, to other methods, and what they cost.

    python -m benchmarks.bench_distill               (about 8 minutes; --smoke: seconds, page in runs/smoke)
    python -m benchmarks.bench_distill --only quality

- quality: smoothed noise times exponentials (`tests/filters_to_distil.py`, fixed seeds). Beside `fit_modal`: its two
  starts alone, ERA poles with least-squares residues as they are, balanced truncation with least-squares residues, and
  the paper's gradient fit over a sweep of rates, starts and steps, as it ends and with least-squares residues.
- exponentials: filters of `ImplicitFilter` with one band, 4 states.
- weighted: fits for coloured inputs, beside unweighted ones: power of the error of outputs on samples of such inputs.
- time: CPU seconds of one filter, alone and in a batch.
- layer: the filters of one layer of a model with 18 layers of 864 filters of 2048 taps, times 18.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import scipy.signal
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Settings, run_sections
from hyena_hf.distillation import fit_modal
from hyena_hf.distillation.gradient import Start, gradient_poles
from hyena_hf.distillation.hankel import hankel_factors, window_size
from hyena_hf.distillation.modes import packed, powers, response, taps_of
from hyena_hf.distillation.poles import era_poles
from hyena_hf.distillation.refine import least_squares
from tests import oracles
from tests.filters_to_distil import exponential_like, smoothed_noise


Page = tuple[list[str], dict[str, Figure]]

SIZES = 16, 32
RATES = 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1
STARTS: tuple[Start, ...] = ("spectrum", "random")
STEPS, LONGER = 1500, 6000
COLOURS = {"low": [0.9], "high": [-0.9], "band": [0.95 * np.exp(0.6j), 0.95 * np.exp(-0.6j)]}  # poles of the inputs
LAYERS, FILTERS, TAPS = 18, 864, 2048


def era_with_least_squares(h: Tensor, states: int) -> Tensor:
    """Relative l2 errors (C,) of windowed ERA without refinement."""
    size = window_size(h.shape[1])
    poles = era_poles(hankel_factors(h[:, 1 : 2 * size], size, states), states)
    taps = taps_of(h[:, 1:].contiguous())
    return (least_squares(taps, packed(poles)).cost / taps.energy).sqrt()


def gradient_sweep(h: Tensor, states: int, steps: int) -> dict[tuple[Start, float, int], Tensor]:
    """Relative l2 errors of the gradient fit by start, rate and steps; the best three again with more steps.

    Returns:
        (2, C) each: as it ends, and with residues fitted to its poles.
    """
    taps = taps_of(h[:, 1:].contiguous())

    def errors(start: Start, rate: float, count: int) -> Tensor:
        modes = gradient_poles(taps, states, start=start, learning_rate=rate, steps=count)
        with torch.no_grad():
            found = response(powers(modes.log_pole, taps.blocks), modes.residue, taps.length)
            ended = (found - taps.blocks).square().sum(dim=(1, 2))
            cost = torch.stack([ended, least_squares(taps, modes).cost]).nan_to_num(torch.inf)
        return (cost / taps.energy).sqrt()

    cells = list(itertools.product(STARTS, RATES))
    found = {(*cell, steps): errors(*cell, steps) for cell in tqdm(cells, desc=f"gradient fit, {states} states")}
    for start, rate, _ in sorted(found, key=lambda cell: float(found[cell][0].mean()))[:3]:
        found[start, rate, steps * LONGER // STEPS] = errors(start, rate, steps * LONGER // STEPS)
    return found


def quality(settings: Settings) -> Page:
    """Errors by method and size."""
    channels, length, steps = (3, 128, 20) if settings.smoke else (16, 1024, STEPS)
    lines = [
        "## Errors",
        f"{channels} filters of {length} taps, mean (worst) relative l2 error; the bound is what no filter of that "
        f"size can be below. Ratios are of means: `auto` over the others, and over the bound.",
    ]
    h = smoothed_noise(channels, length)
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for states in SIZES:
        auto = fit_modal(h, state_size=states)[3]
        found = {"lower bound": auto.lower_bound, "auto": auto.relative_l2}
        for method in ("era", "pursuit", "balanced"):
            found[method] = fit_modal(h, state_size=states, method=method)[3].relative_l2
        found["era, least squares only"] = era_with_least_squares(h, states)
        sweep = gradient_sweep(h, states, steps)
        for number, note in enumerate(("", ", residues refitted")):
            best = min(sweep, key=lambda cell: float(sweep[cell][number].mean()))
            name = f"gradient{note}, best of {len(sweep)} ({best[0]}, rate {best[1]:g}, {best[2]} steps)"
            found[name] = sweep[best][number]
        rows = [(name, _written(e), f"{float(auto.relative_l2.mean() / e.mean()):.2f}") for name, e in found.items()]
        lines += ["", f"{states} states:", "", *markdown_table(["method", "relative l2", "auto over it"], rows)]
        cells = [(start, f"{rate:g}", count, *map(_written, e)) for (start, rate, count), e in sweep.items()]
        lines += [
            "",
            "The sweep:",
            "",
            *markdown_table(["start", "rate", "steps", "relative l2", "residues refitted"], cells),
        ]
        for name, marker in (("lower bound", "_"), ("auto", "o"), ("balanced", "x")):
            axes.semilogy(found[name], marker, label=f"{name}, {states} states")
    axes.set(xlabel="filter (time constant grows)", ylabel="relative l2", title="Errors and bounds")
    axes.legend(fontsize="small")
    return lines, {"errors": figure}


def _written(errors: Tensor) -> str:
    return f"{float(errors.mean()):.4g} ({float(errors.max()):.4g})"


def exponentials(settings: Settings) -> Page:
    """Filters that are nearly exponentials."""
    channels, length = (3, 128) if settings.smoke else (64, 1024)
    rows = []
    for seed in range(3):
        h = exponential_like(channels, length, seed)
        for name, taps in (("float64", h), ("float32", h.float())):
            report = fit_modal(taps, state_size=4)[3]
            rows.append((seed, name, _written(report.relative_l2), _written(report.lower_bound)))
    columns = ["seed", "taps in", "relative l2, 4 states", "lower bound"]
    return [f"## Filters like exponentials\n\n{channels} filters each.", *markdown_table(columns, rows)], {}


def weighted(settings: Settings) -> Page:
    """Fits for inputs of a known spectrum."""
    channels, length, samples = (3, 128, 2_000) if settings.smoke else (16, 1024, 200_000)
    h, rows = smoothed_noise(channels, length), []
    for (name, poles), states in itertools.product(COLOURS.items(), (8, 16)):
        denominator = np.poly(poles).real
        gain = 1 / np.polyval(denominator, np.exp(1j * np.linspace(0, np.pi, 257)))
        noise = np.random.default_rng(0).standard_normal(samples)
        inputs = np.asarray(scipy.signal.lfilter([1], denominator, noise))
        spectrum, cells = torch.tensor(abs(gain) ** 2).expand(channels, -1), []
        for power in (None, spectrum):
            start = time.process_time()
            poles_of, residues, _, report = fit_modal(h, state_size=states, spectrum=power)
            cells.append((heard(h, poles_of, residues, inputs), report.relative_l2, time.process_time() - start))
        (plain, plain_l2, plain_seconds), (ours, ours_l2, seconds) = cells
        share = (ours / plain).square()
        l2 = f"{float(plain_l2.mean()):.4f} / {float(ours_l2.mean()):.4f}"
        errors = f"{float(plain.mean()):.4f} / {float(ours.mean()):.4f}"
        power_left = f"{float(share.mean()):.2f} ({float(share.max()):.2f})"
        rows.append((name, states, errors, l2, power_left, f"{seconds / plain_seconds:.1f}"))
    columns = [
        "input",
        "states",
        "error of outputs",
        "relative l2",
        "power of weighted over unweighted",
        "time over it",
    ]
    note = (
        f"{channels} filters of {length} taps, unweighted / weighted, means over filters; errors of outputs are "
        f"relative RMS on {samples} samples, lag 0 left out; the power ratio is its mean (worst) over filters."
    )
    return ["## Inputs of a known spectrum", note, "", *markdown_table(columns, rows)], {}


def heard(h: Tensor, poles: Tensor, residues: Tensor, inputs: np.ndarray) -> Tensor:
    """Relative root mean square error of outputs, (C,)."""
    fit = oracles.modal_filter(poles.numpy(), residues.numpy(), np.zeros(len(h)), h.shape[1])
    found = []
    for taps, its_fit in zip(h.numpy(), fit, strict=True):
        tail = np.r_[0, taps[1:]]
        error, output = (scipy.signal.fftconvolve(inputs, x)[: len(inputs)] for x in (tail - its_fit, tail))
        found.append(np.linalg.norm(error) / np.linalg.norm(output))
    return torch.tensor(found)


def times(settings: Settings) -> Page:
    """Seconds of a filter."""
    lines, rows = ["## Time", "One core, CPU seconds a filter."], []
    for length, count, states in ((1024, 16, 16), (1024, 16, 32), (8192, 8, 16), (131072, 2, 16)):
        h = smoothed_noise(*((2, 128) if settings.smoke else (count, length)))
        batch = settings.compare({"batch": lambda h=h, states=states: fit_modal(h, state_size=states)}, control=False)
        alone = settings.compare(
            {"one": lambda h=h, states=states: fit_modal(h[-1:], state_size=states)}, control=False
        )
        seconds = batch.milliseconds("batch") / 1e3 / len(h), alone.milliseconds("one") / 1e3
        rows.append((h.shape[1], states, len(h), *(f"{one:.3f}" for one in seconds)))
    columns = ["taps", "states", "batch", "seconds a filter", "seconds of one filter alone"]
    return [*lines, "", *markdown_table(columns, rows)], {}


def layer(settings: Settings) -> Page:
    """A whole layer once."""
    channels, length = (4, 128) if settings.smoke else (FILTERS, TAPS)
    h = smoothed_noise(channels, length)
    start = time.process_time()
    report = fit_modal(h, progress=not settings.smoke)[3]
    seconds = time.process_time() - start
    line = (
        f"{channels} filters of {length} taps with 16 states took {seconds:.1f} CPU seconds; {LAYERS} such layers on "
        f"two cores, a process each: {LAYERS * seconds / 2 / 60:.1f} minutes (computed). Mean relative l2 "
        f"{float(report.relative_l2.mean()):.3g}."
    )
    return ["## A whole model", line], {}


SECTIONS = {"quality": quality, "exponentials": exponentials, "weighted": weighted, "time": times, "layer": layer}


if __name__ == "__main__":
    run_sections("distill", "Fits of filters by few exponentials", __doc__, SECTIONS)
