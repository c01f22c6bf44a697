"""Small training runs of several models at one budget: what a result is made from, its file, rates, seeds, curves.

    kept(RUNS / "softmax-seed1.json", made_from, run)       # a finished run is not repeated by the same code

Each model's learning rate is the best with a seed of its own; the reported runs have other seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hyena_hf.feature_maps import FEATURE_MAPS


ROOT = Path(__file__).parents[1]
Result = dict[str, Any]
WINDOW = ", window "  # between a feature map and the tokens beside it that keep softmax attention
# what a new model's outputs and gradients depend on
MODEL_CODE = ("hyena_hf/*.py", "hyena_hf/cache/*.py", "hyena_hf/mixers/*.py", "hyena_hf/ops/**/*.py")


def code_digest(*patterns: str) -> str:
    """A hash of the files that match patterns below the repository's root."""
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def kept(path: Path, made_from: Mapping[str, Any], run: Callable[[], Result]) -> Result:
    """The result of a run together with what it was made from, out of a file if it is there.

    Args:
        path: File of the run, written once it is finished.
        made_from: All that the result depends on, as JSON gives it back.
        run: Makes the result.
    """
    if path.exists():
        result = json.loads(path.read_text())
        if all(result.get(name) == value for name, value in made_from.items()):
            return result
    result = {**made_from, **run()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return result


def choose_and_repeat(
    models: Iterable[str],
    rates: Sequence[float],
    seeds: tuple[int, Sequence[int]],
    run: Callable[[str, float, int], Result],
    rank: Callable[[Result], Any],
) -> tuple[dict[str, list[Result]], dict[str, list[Result]]]:
    """Runs of every model at every rate with the first seed, and those of the other seeds at the best rate.

    Args:
        models: Names.
        rates: Learning rates to choose from.
        seeds: The one that chooses, and those that are reported.
        run: Of a model, a rate and a seed.
        rank: Of a result; the lowest is the best.

    Returns:
        Trials and results by model.
    """
    chosen, results = {}, {}
    choosing, reported = seeds
    for model in models:
        trials = {rate: run(model, rate, choosing) for rate in rates}
        best = min(rates, key=lambda rate: rank(trials[rate]))
        chosen[model] = list(trials.values())
        results[model] = [run(model, best, seed) for seed in reported]
    return chosen, results


def rate_factor(step: int, *, steps: int, warmup: int, final_rate: float) -> float:
    """Linear warm-up, then a cosine from 1 to `final_rate` at the end of the budget."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / warmup) * (final_rate + (1 - final_rate) * cosine)


def known_kind(kind: str) -> str:
    """A kind of linear attention that `attention_fields` knows, for argparse."""
    name, _, window = kind.partition(WINDOW)
    if name not in FEATURE_MAPS or (window and not window.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{kind!r} is no feature map (one of {', '.join(FEATURE_MAPS)}), also with '{WINDOW}N'"
        )
    return kind


def attention_fields(kind: str, layers: int) -> dict[str, Any]:
    """Config fields of a model of attention alone.

    Args:
        kind: `"softmax"`; linear attention by the name of its feature map; or `"hedgehog, window 16"`, such a map
            beside softmax attention to the nearest tokens.
        layers: Number of them.
    """
    if kind == "softmax":
        return {"layer_types": ["full_attention"] * layers}
    name, _, window = kind.partition(WINDOW)
    fields = {"layer_types": ["hedgehog"] * layers, "feature_map": name}
    return {**fields, "linear_attention_window": int(window)} if window else fields


def spread(values: Sequence[float], form: str) -> str:
    """Mean (lowest to highest), each written by `form`."""
    if not values:
        return "none"
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def seed_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]], ylabel: str, goal: float) -> Figure:
    """A line for each seed and a colour for each model, the goal dotted.

    Args:
        curves: Of every model, points (step, value) of every seed.
        ylabel: Of the values.
        goal: Value of the dotted line.
    """
    figure = Figure(figsize=(6.4, 3.6))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (model, seeds) in enumerate(curves.items()):
        for number, points in enumerate(seeds):
            label = f"{model}, {len(seeds)} seeds" if number == 0 else None
            axes.plot(*zip(*points, strict=True), color=f"C{index}", label=label, linewidth=1)
    axes.axhline(goal, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.legend(frameon=False, fontsize="small")
    return figure
