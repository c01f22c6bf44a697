"""Write the table as text, JSON, Markdown and a picture whose good and bad cells differ without colour too."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from benchmarks.report import commit, machine, markdown_table, write_result, write_whole


GOOD, BAD = "\u2713", "\u2717"  # check mark, ballot cross
PALE, DARK = "#dcebf7", "#a8320a"


def titles(results: Mapping[str, Any]) -> list[str]:
    """Titles of the rows."""
    return list(next(iter(results["models"].values()))["cells"])


def own_error(results: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """A model's rounding error; float64 has no reference."""
    return "-" if results["dtype"] == "float64" else f"{model['own_error']:.1e}"


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The table as words: cells with their mark, then each model's own error and how many cells are good."""
    models, names = results["models"].values(), titles(results)
    table = []
    for title in names:
        cells = [model["cells"][title] for model in models]
        table.append([title, *(f"{GOOD if cell['good'] else BAD} {cell['text']}" for cell in cells)])
    table.append([own_error_title(results), *(own_error(results, model) for model in models)])
    table.append(["cells within their bound", *(f"{model['good']} of {len(names)}" for model in models)])
    return table


def own_error_title(results: Mapping[str, Any]) -> str:
    finer = {"float32": "float64", "bfloat16": "float32"}.get(results["dtype"])
    return f"own {results['dtype']} error, against {finer}" if finer else "own error"


def reasons(results: Mapping[str, Any]) -> list[str]:
    """Why models refused, one line for each reason of a model."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, model in results["models"].items():
        for title, cell in model["cells"].items():
            if cell["reason"]:
                found.setdefault((name, cell["reason"]), []).append(title)
    return [f"{name}, {'; '.join(where)}: {reason}" for (name, reason), where in found.items()]


def legend(results: Mapping[str, Any]) -> str:
    """What the numbers are and what counts as good."""
    own = (
        "" if results["dtype"] == "float64" else f", or that sequence's own {own_error_title(results)[4:]}, if larger"
    )
    sizes = ", ".join(f"{key} {value}" for key, value in results["sizes"].items())
    return (
        f"Largest error of a sequence's logits in each situation against the same sequence run alone, without padding "
        f"and cache, in {results['dtype']}, relative to max(1, largest logit); gradients likewise, of all parameters, "
        f"against the sum over the documents alone; decoding: whether tokens are those chosen without a cache. "
        f"{GOOD} within the bound ({results['floor']:.0e}{own}), {BAD} not. A later token may change those before it "
        f"by 1e-05 in float32, 1e-14 in float64. Random models of equal sizes ({sizes}), seed {results['seed']}."
    )


def as_text(results: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    table = [["", *results["models"]], *rows(results)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([legend(results), "", *lines, "", *reasons(results)]).rstrip() + "\n"


def as_markdown(results: Mapping[str, Any]) -> list[str]:
    """The table for a page; what is not good stands in bold."""
    table = [[f"**{cell}**" if cell.startswith(BAD) else cell for cell in row] for row in rows(results)]
    notes = reasons(results)
    return [
        *markdown_table(["", *results["models"]], table),
        *(["", "Reasons:", "", *(f"- {note}" for note in notes)] if notes else []),
    ]


def _draw(axes: Axes, column: float, row: int, cell: Mapping[str, Any]) -> None:
    refused = cell["text"] == "refused"
    face = PALE if cell["good"] else "white" if refused else DARK
    hatch = "////" if refused else None
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=1.2))
    if refused:
        axes.add_patch(
            Rectangle((column, row), 1, 1, fill=False, edgecolor=DARK, hatch=hatch, linewidth=0, alpha=0.35)
        )
    axes.text(
        column + 0.5,
        row + 0.52,
        f"{GOOD if cell['good'] else BAD} {cell['text']}",
        ha="center",
        va="center",
        fontsize=8,
        weight="normal" if cell["good"] else "bold",
        color="black" if cell["good"] or refused else "white",
    )


def as_figure(results: Mapping[str, Any]) -> Figure:
    """The table as a picture: pale and a check mark, dark and a cross, hatched where a model refused."""
    names, models = titles(results), results["models"]
    figure = Figure(figsize=(3.2 + 1.12 * len(models), 0.7 + 0.235 * (len(names) + 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    gap = 0.15  # between the models of others and ours
    bottom = len(names)
    for column, (name, model) in enumerate(models.items()):
        left = column + (gap if model["ours"] else 0)
        axes.text(left + 0.5, -0.25, name, ha="center", va="bottom", fontsize=8.5, weight="bold")
        for row, title in enumerate(names):
            _draw(axes, left, row, model["cells"][title])
        for row, words in enumerate((own_error(results, model), f"{model['good']} of {len(names)}")):
            axes.text(left + 0.5, bottom + row + 0.6, words, ha="center", va="center", fontsize=8)
    for row, title in enumerate([*names, own_error_title(results), "cells within their bound"]):
        axes.text(-0.1, row + 0.52, title, ha="right", va="center", fontsize=8)
    axes.set_xlim(-3.1, len(models) + gap)
    axes.set_ylim(bottom + 2, -1)
    return figure


def as_png(results: Mapping[str, Any]) -> bytes:
    """The picture as a file of few colours, a fifth of the size."""
    whole, small = io.BytesIO(), io.BytesIO()
    as_figure(results).savefig(whole, format="png", dpi=110)
    Image.open(whole).convert("RGB").quantize(24).save(small, format="png", optimize=True)
    return small.getvalue()


def write_page(results: Mapping[str, Any], folder: Path, *, command: str) -> Path:
    """Write exactness.txt, .json, .png and .md, in other dtypes than float32 exactness_DTYPE.*.

    Args:
        results: of `table.fill`.
        folder: made if it is missing.
        command: what one types to get these files again.

    Returns:
        The path of the .md page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = "exactness" if results["dtype"] == "float32" else f"exactness_{results['dtype']}"
    origin = {"command": command, "commit": commit(), "machine": machine()}
    write_whole(folder / f"{stem}.json", (json.dumps({**origin, **results}, indent=1) + "\n").encode())
    write_whole(folder / f"{stem}.txt", as_text(results).encode())
    write_whole(folder / f"{stem}.png", as_png(results))
    lines = [legend(results), "", *as_markdown(results), "", f"![the table as a picture]({stem}.png)"]
    return write_result(stem, f"Exactness, {results['dtype']}", command, lines, folder=folder)
