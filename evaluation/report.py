"""One page that shows a comparison of language models: curves, bars with baselines, a table, samples.

    from evaluation.report import write_report
    write_report(results, Path("runs/demo"))      # results.json, loss_curves.svg, bits_per_byte.svg, report.html

The page is one file with its plots inside; it fits a phone and a wide screen and follows the reader's light or dark
setting. `results` may lack any key; what is missing is left out of the page. Keys that the page does not know stay in
results.json.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


INK = "#123456"  # stands for the page's text colour, so that the plots follow light and dark
COLORS = ("#0a84c6", "#e07b00", "#1c9e6b", "#c8508f", "#8a6fd1", "#a08a00")
BASELINE_COLOR = "#8c8c8c"

COLUMNS = (  # key of a model's results, heading, format
    ("parameters", "parameters", "{:,.0f}"),
    ("heldout_bits_per_byte", "held-out bits/byte", "{:.3f}"),
    ("validation_bits_per_byte", "validation bits/byte", "{:.3f}"),
    ("learning_rate", "learning rate", "{:.1e}"),
    ("train_seconds", "training seconds", "{:,.0f}"),
    ("tokens_per_second_training", "training tokens/s", "{:,.0f}"),
    ("decode_tokens_per_second", "decoding tokens/s", "{:,.0f}"),
    ("cache_bytes", "cache bytes", "{:,.0f}"),
)


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write results.json, the plots and report.html into `folder`; each file appears whole or not at all.

    Args:
        results: `machine`, `command`, `commit`, `corpus` {name, train_bytes, validation_bytes, heldout_bytes},
            `baselines` {name: bits} and `models` {name: {the keys of COLUMNS, loss_curve: [[step, bits], ...],
            samples: [{prompt, text}], distillation: text}}; all optional. Numbers that are not finite become null in
            the JSON.
        folder: made if it is missing.

    Returns:
        The path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = _plain(results)
    _write_whole(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    models = _mapping(results.get("models"))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(models)}
    bits = {name: _mapping(model).get("heldout_bits_per_byte") for name, model in models.items()}
    bars = {name: value for name, value in {**bits, **_mapping(results.get("baselines"))}.items() if _is_number(value)}
    curves = {name: _points(_mapping(model).get("loss_curve")) for name, model in models.items()}
    figures = {}
    if any(curves.values()):
        figures["loss_curves"] = _svg("loss_curves", _loss_curves(curves, colors))
    if bars:
        figures["bits_per_byte"] = _svg("bits_per_byte", _bits_per_byte(bars, colors))
    for name, svg in figures.items():
        _write_whole(folder / f"{name}.svg", svg.replace(INK, "#808080"))
    page = folder / "report.html"
    _write_whole(page, _page(results, models, bars, figures))
    return page


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: any library's numbers as int or float, what is not finite as None, else text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file, then rename: a full disk or a kill leaves the file that was there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _points(curve: Any) -> list[tuple[float, float]]:
    return [(step, bits) for step, bits in curve or [] if _is_number(step) and _is_number(bits)]


def _label(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib reads $...$ as mathematics


def _loss_curves(curves: Mapping[str, Sequence[tuple[float, float]]], colors: Mapping[str, str]) -> Figure:
    figure, axes = _figure(height=3.2)
    for name, points in curves.items():
        if points:
            steps, bits = zip(*points, strict=True)
            axes.plot(steps, bits, color=colors[name], linewidth=1.6, label=_label(name))
    late = [bits for points in curves.values() for _, bits in points[len(points) // 20 :]]
    axes.set_ylim(top=min(8.2, max(late) * 1.05))  # the first steps, near 8 bits, would flatten the rest
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte")
    axes.grid(axis="y", color=BASELINE_COLOR, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    return figure


def _bits_per_byte(bars: Mapping[str, float], colors: Mapping[str, str]) -> Figure:
    """Best on top; models in their own colours, baselines grey."""
    names = sorted(bars, key=lambda name: bars[name], reverse=True)
    figure, axes = _figure(height=0.9 + 0.42 * len(names))
    rectangles = axes.barh(
        [_label(name) for name in names],
        [bars[name] for name in names],
        color=[colors.get(name, BASELINE_COLOR) for name in names],
        height=0.68,
    )
    axes.bar_label(rectangles, fmt="%.3f", padding=4, color=INK, fontsize=10)
    axes.set_xlim(0, max(bars.values()) * 1.16)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, height), layout="constrained")
    figure.patch.set_visible(False)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)
    return figure, axes


def _svg(name: str, figure: Figure) -> str:
    """The figure as an SVG element whose ids begin with `name`, so that two of them fit on one page."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg)


def _page(
    results: Mapping[str, Any], models: Mapping[str, Any], bars: Mapping[str, float], figures: Mapping[str, str]
) -> str:
    captions = {
        "loss_curves": "Loss while training",
        "bits_per_byte": "Bits per byte on held-out text, less is better",
    }
    plots = "".join(
        f'<figure role="img" aria-label="{captions[name]}">'
        f"<figcaption>{captions[name]}</figcaption>{svg.replace(INK, 'currentColor')}</figure>"
        for name, svg in figures.items()
    )
    distillations = "".join(_distillation(name, _mapping(model)) for name, model in models.items())
    samples = "".join(_samples(name, _mapping(model).get("samples")) for name, model in models.items())
    return PAGE.format(
        headline=_escaped(_headline(models, bars)),
        corpus=_corpus(_mapping(results.get("corpus"))),
        plots=plots and f'<section class="plots">{plots}</section>',
        table=_table(models) if models else "",
        distillations=distillations and f"<h2>Distillation</h2>{distillations}",
        samples=samples and f"<h2>Samples</h2><p>The prompt is bold.</p>{samples}",
        provenance=_provenance(results),
    )


def _headline(models: Mapping[str, Any], bars: Mapping[str, float]) -> str:
    """The best model's result, and what is still better than it."""
    order = sorted(bars, key=lambda name: bars[name])
    best = next((name for name in order if name in models), None)
    if best is None:
        return "No held-out results"
    ahead = ", ".join(f"{name} ({bars[name]:.3f})" for name in order[: order.index(best)])
    return f"{best} reaches {bars[best]:.3f} bits per byte on held-out text" + (f", behind {ahead}" if ahead else "")


def _corpus(corpus: Mapping[str, Any]) -> str:
    parts = [str(corpus["name"])] if corpus.get("name") else []
    for key, words in (("train_bytes", "training"), ("validation_bytes", "validation"), ("heldout_bytes", "held-out")):
        if _is_number(corpus.get(key)):
            parts.append(f"{corpus[key]:,} {words} bytes")
    return f"<p>{_escaped(' · '.join(parts))}</p>" if parts else ""


def _table(models: Mapping[str, Any]) -> str:
    """One row for each model, only the columns that some model has."""
    columns = [column for column in COLUMNS if any(_is_number(_mapping(m).get(column[0])) for m in models.values())]
    head = "".join(f"<th>{heading}</th>" for _, heading, _ in columns)
    rows = "".join(
        f'<tr><th scope="row">{_escaped(name)}</th>'
        + "".join(f"<td>{_cell(_mapping(model).get(key), layout)}</td>" for key, _, layout in columns)
        + "</tr>"
        for name, model in models.items()
    )
    return f'<h2>Models</h2><div class="wide"><table><tr><th>model</th>{head}</tr>{rows}</table></div>'


def _cell(value: Any, layout: str) -> str:
    return layout.format(value) if _is_number(value) else "-"


def _distillation(name: str, model: Mapping[str, Any]) -> str:
    """What became of the filters, in lines whose columns stand below each other."""
    lines = model.get("distillation")
    return f'<h3>{_escaped(name)}</h3><pre class="lines">{_escaped(lines)}</pre>' if lines else ""


def _samples(name: str, samples: Any) -> str:
    blocks = "".join(
        f"<pre><b>{_escaped(sample.get('prompt', ''))}</b>{_escaped(sample.get('text', ''))}</pre>"
        for sample in samples or []
    )
    return f"<h3>{_escaped(name)}</h3>{blocks}" if blocks else ""


def _provenance(results: Mapping[str, Any]) -> str:
    rows = ""
    for key in ("machine", "command", "commit"):
        value = results.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value:
            rows += f"<dt>{key}</dt><dd>{_escaped(value)}</dd>"
    return rows and f"<h2>How it was made</h2><dl>{rows}</dl>"


def _escaped(text: object) -> str:
    """Text for HTML; control characters, which byte models do produce, as their Python escapes."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: f"\\x{ord(match.group()):02x}", str(text)))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Language models compared</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.4rem; line-height: 1.3; max-width: 44rem; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .3rem; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }}
figcaption {{ font-weight: 600; margin-bottom: .3rem; }}
svg {{ width: 100%; height: auto; max-width: 32rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #8886; }}
th {{ font-weight: 600; vertical-align: bottom; }}
th:first-child {{ text-align: left; padding-left: 0; }}
pre {{ font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
       border-left: 3px solid #8886; margin: .5rem 0; padding: .2rem .8rem; max-width: 52rem; }}
.lines {{ white-space: pre; overflow-x: auto; max-width: none; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }}
dd {{ margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{headline}</h1>
{corpus}
{plots}
{table}
{distillations}
{samples}
{provenance}
</body>
</html>
"""
