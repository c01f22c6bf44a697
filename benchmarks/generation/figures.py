"""Tables and plots that several sections share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.report import markdown_table
from benchmarks.timing import CONTROL, Comparison, Ratio


Page = tuple[list[str], dict[str, Figure]]
Curves = Mapping[str, Mapping[int, float]]

GPT2_STATIC, GPT2_COMPILED = "GPT-2, static", "GPT-2, compiled"
LLAMA_STATIC, LLAMA_COMPILED = "Llama, static", "Llama, compiled"
MODAL_COMPILED = "Hyena, modal, compiled"


def fastest(found: Comparison, names: Iterable[str]) -> str:
    """Of the cases that were measured, by median."""
    return min((name for name in names if name in found.seconds), key=found.milliseconds)


def scaled(found: Comparison, counts: Mapping[str, int]) -> Comparison:
    """Seconds a token, where a case made several."""
    return Comparison({name: [x / counts.get(name, 1) for x in seconds] for name, seconds in found.seconds.items()})


def time_table(found: Comparison, base: str, rows: int, more: Mapping[str, Mapping[str, object]]) -> list[str]:
    """A line for each case: milliseconds a token, tokens a second, ratio of the base, further columns.

    Args:
        found: Seconds a step.
        base: Case whose time is divided.
        rows: Of the batch.
        more: Cells by column and case.
    """
    lines = []
    for name in found.seconds:
        shown = f"{found.base} again ({CONTROL})" if name == CONTROL else name
        time = found.milliseconds(name)
        cells = [column.get(name, "-") for column in more.values()]
        lines.append((shown, f"{time:.3g}", f"{rows / time * 1e3:.0f}", str(found.ratio(name, base)), *cells))
    return markdown_table(["model", "ms a step", "tokens/s", f"{base} / it", *more], lines)


def goal_row(found: Comparison, theirs: Sequence[str], ours: Sequence[str], goal: float) -> tuple:
    """The fastest of theirs over the fastest of ours."""
    slow, fast = fastest(found, theirs), fastest(found, ours)
    ratio = found.ratio(fast, slow)
    return slow, fast, str(ratio), goal, reached(ratio, goal)


def reached(ratio: Ratio, goal: float) -> str:
    """Whether the median is above a goal."""
    return "yes" if ratio.median >= goal else "no"


GOAL_COLUMNS = ["theirs, fastest", "ours, fastest", "ratio", "goal", "reached"]


def lines_plot(found: Curves, title: str, across: str, up: str) -> Figure:
    """A line for each name, both axes logarithmic."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name, values in found.items():
        axes.plot(list(values), list(values.values()), "o-", label=name)
    axes.set(xlabel=across, ylabel=up, title=title, yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def throughput(found: Mapping[int, Comparison]) -> dict[str, dict[int, float]]:
    """Tokens a second of every case by batch."""
    names = dict.fromkeys(name for one in found.values() for name in one.seconds if name != CONTROL)
    return {
        name: {batch: batch / one.milliseconds(name) * 1e3 for batch, one in found.items() if name in one.seconds}
        for name in names
    }
