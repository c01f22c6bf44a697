# SPDX-License-Identifier: Apache-2.0
"""What a distillation did to a model: errors of every filter, and of the logits on text; as lines, JSON and plots.

The errors of a filter bound the error of its one convolution (`hyena_hf.distillation.certificates`). Gates multiply
outputs and layers follow each other, so they are no bound on logits: what the whole model loses is measured on a
calibration set, or not known.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fit import FitReport


@dataclass
class Sample:
    """One filter for the eye: taps and fit (L,), and which one it is."""

    channel: int
    taps: Tensor
    fit: Tensor


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        layer: Its number.
        state_size: Real numbers that each of its filters may remember.
        filters: Of all filters, in the order (convolution, head).
        sigma: Hankel singular values, median over the filters of each, as a share of the largest, (count,).
        bounds: Relative l2 error that no filter of 1, ..., count states is below, median over the filters, (count,).
        samples: The filter of median and the one of largest error.
    """

    layer: int
    state_size: int
    filters: FitReport
    sigma: Tensor
    bounds: Tensor
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Calibration:
    """A model against its original on the same tokens.

    Attributes:
        tokens: Predicted tokens.
        kl: Kullback-Leibler divergence of the new distribution of the next token from the original, mean, in nats.
        perplexity_before, perplexity_after: Of the original and of the new model.
    """

    tokens: int
    kl: float
    perplexity_before: float
    perplexity_after: float

    @property
    def change(self) -> float:
        """Relative change of the perplexity."""
        return self.perplexity_after / self.perplexity_before - 1


@dataclass
class DistillationReport:
    """A whole model.

    Attributes:
        layers: The distilled ones.
        tolerance: Relative error that was asked for, or None.
        calibration: On text, or None where none was given.
        weighted: Whether filters were fitted for the spectra of their inputs; then the tolerance is on
            `relative_output`, else on `relative_l2`, which is the same there.
    """

    layers: list[LayerReport]
    tolerance: float | None = None
    calibration: Calibration | None = None
    weighted: bool = False

    def missed(self) -> list[tuple[int, int]]:
        """(layer, filter) of every filter whose error is above the tolerance."""
        if self.tolerance is None:
            return []
        return [
            (one.layer, int(channel))
            for one in self.layers
            for channel in (one.filters.relative_output > self.tolerance).nonzero().flatten()
        ]

    def __str__(self) -> str:
        head = "layer  filters  states  relative l2: median    worst    lower bound: median"
        lines = [f"{head}    of outputs: median    worst" if self.weighted else head]
        for one in self.layers:
            error, bound, output = one.filters.relative_l2, one.filters.lower_bound, one.filters.relative_output
            cells = f"{one.layer:5d}  {len(error):7d}  {one.state_size:6d}  {error.median():19.3g}"
            cells += f"  {error.max():7.3g}  {bound.median():22.3g}"
            lines.append(f"{cells}  {output.median():20.3g}  {output.max():7.3g}" if self.weighted else cells)
        if missed := self.missed():
            lines.append(
                f"TOLERANCE MISSED: {len(missed)} filters are further than {self.tolerance:g} from their originals "
                f"(layer, filter: {missed[:5]}{', ...' if len(missed) > 5 else ''})"
            )
        if self.calibration is None:
            lines.append("no calibration set: what the logits lose is not known")
        else:
            one = self.calibration
            lines.append(
                f"{one.tokens} calibration tokens: KL {one.kl:.3g} nats, perplexity {one.perplexity_before:.4f} -> "
                f"{one.perplexity_after:.4f} ({one.change:+.3%})"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, without samples."""
        layers = [
            {
                "layer": one.layer,
                "state_size": one.state_size,
                "filters": {key: _plain(value) for key, value in vars(one.filters).items()},
                "hankel_singular_values": one.sigma.tolist(),
                "lower_bounds_by_order": one.bounds.tolist(),
            }
            for one in self.layers
        ]
        calibration = None if self.calibration is None else asdict(self.calibration)
        return {
            "layers": layers,
            "tolerance": self.tolerance,
            "missed": self.missed(),
            "calibration": calibration,
            "weighted": self.weighted,
        }

    def save(self, folder: str | Path) -> None:
        """Write distillation.txt and distillation.json, and the plots where matplotlib is installed.

        Args:
            folder: An existing one.
        """
        folder = Path(folder)
        (folder / "distillation.txt").write_text(f"{self}\n")
        (folder / "distillation.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            return
        figure = Figure(figsize=(13, 4), layout="tight")
        self.draw(*figure.subplots(1, 3))
        figure.savefig(folder / "distillation.png", dpi=120)

    def draw(self, spectra: Any, errors: Any, filters: Any) -> None:
        """Draw into three matplotlib axes: Hankel spectra, bounds of all orders with the fits at theirs, a filter."""
        for number, one in enumerate(self.layers):
            label, color, orders = f"layer {one.layer}", f"C{number % 10}", range(1, len(one.sigma) + 1)
            spectra.semilogy(orders, one.sigma.clamp(min=1e-12), label=label, color=color)
            errors.plot(orders, one.bounds.clamp(min=1e-12), color=color)
            low, middle, high = torch.quantile(one.filters.relative_l2, torch.tensor([0.0, 0.5, 1.0]).double())
            spread = [[middle - low], [high - middle]]
            errors.errorbar(one.state_size, middle, spread, fmt="o", capsize=3, color=color, label=label)
        spectra.set(xlabel="order", ylabel="singular value / largest", title="Hankel singular values, median")
        title = "Error of fits (bars: all filters), lower bound"
        errors.set(xlabel="order", ylabel="relative l2", title=title, yscale="log")
        spectra.legend(fontsize="small")
        worst = max(self.layers, key=lambda one: float(one.filters.relative_l2.max()))
        for sample in worst.samples[-1:]:
            shown = min(len(sample.taps), 256)
            filters.plot(sample.taps[:shown], label="filter")
            filters.plot(sample.fit[:shown], "--", label="fit")
            filters.set(xlabel="lag", title=f"Worst: layer {worst.layer}, filter {sample.channel}")
            filters.legend(fontsize="small")


def _plain(value: Any) -> Any:
    """For JSON; values that are not finite as null."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Calibration", "DistillationReport", "LayerReport", "Sample"]
