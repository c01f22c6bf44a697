# SPDX-License-Identifier: Apache-2.0
"""The page of the DNA example: tables and plots of what its stages have found so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import markdown_table, write_result
from examples.dna_tasks import summarise_variants


if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]


def write_page(results: Results, *, command: str, seed: int, folder: Path) -> Path:
    """Write dna.md and its plots; a stage that has not run is left out.

    Args:
        results: what is in OUTPUT/measured, by name.
        command: what repeats the run.
        seed: of the run.
        folder: of the page.
    """
    lines = [f"One run, seed {seed}. Nothing here is a mean over seeds.", ""]
    figures: dict[str, Figure] = {}
    for section in (_training, _bits, _species, _variants, _embedding):
        for line in section(results, figures):
            lines.append(line)
    return write_result("dna", "A small DNA model on bacterial genomes", command, lines, figures, folder=folder)


def _training(results: Results, figures: dict[str, Figure]) -> Iterator[str]:
    stages = [(name, stage) for name in ("hyena", "llama") for stage in results.get(name, [])]
    if not stages:
        return
    yield from ["## Training", ""]
    yield "Both strands of *E. coli* 536 without the end of the chromosome (the unseen part below), one base a token. "
    yield "Each stage of the Hyena goes on from the one before."
    yield ""
    yield from markdown_table(
        [
            "model",
            "parameters",
            "row",
            "steps x rows",
            "bases read",
            "peak rate",
            "seconds",
            "bases/s",
            "validation bits",
        ],
        [
            [
                name,
                f"{s['parameters']:,}",
                f"{s['length']:,}",
                f"{s['steps']:,} x {s['batch_size']}",
                f"{s['tokens']:,}",
                f"{s['learning_rate']:g}",
                f"{s['train_seconds']:,.0f}",
                f"{s['tokens_per_second']:,.0f}",
                f"{s['validation_curve'][-1][1]:.4f}",
            ]
            for name, s in stages
        ],
    )
    yield ""
    figures["training"] = _plot_training(results)


def _bits(results: Results, figures: dict[str, Figure]) -> Iterator[str]:
    rows = bits_rows(results)
    if not rows:
        return
    sets = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
    yield from ["## Bits per base", ""]
    yield "Test sequences of equal length, evenly spaced over each chromosome. Two bits a base is knowing nothing. "
    yield "MG1655 and DH1 are other strains of the species trained on and share most of their sequence with it; the "
    yield "unseen part is of the training strain, but was not read. Markov models and xz have read both strands of "
    yield "the same training sequence; Markov rows have the smoothing that serves each test set best, in their favour."
    yield ""
    yield "High orders and xz copy: what they gain on MG1655 and DH1 over the unseen part is sequence of the training "
    yield "strain found again. A model of this size cannot hold the strain's ten million bits in its parameters. "
    yield "New stretches are MG1655 where no 20 bases in a row stand in the training sequence or its other strand."
    yield ""
    yield from markdown_table(
        ["model", *sets],
        [[name, *(f"{numbers[key]:.4f}" if key in numbers else "" for key in sets)] for name, numbers in rows],
    )
    yield ""
    figures["bits"] = _plot_bits(rows, sets)


def bits_rows(results: Results) -> list[tuple[str, dict[str, float]]]:
    """(name, {test set: bits}) of everything that was measured, models first."""
    rows = []
    for key, numbers in results.items():
        if key.startswith("bits-"):
            name, _, context = key.removeprefix("bits-").rpartition("-at-")
            model, _, length = name.partition("-")
            label = f"{model.capitalize()}, trained to {int(length):,}" if length else model.capitalize()
            rows.append((int(length or 0), int(context), f"{label}, context {int(context):,}", numbers))
    rows.sort(key=lambda row: row[:2])
    table = [(label, numbers) for _, _, label, numbers in rows]
    for order, sets in (results.get("markov") or {}).items():
        table.append((f"Markov, order {order}", {name: found["bits"] for name, found in sets.items()}))
    table += list((results.get("compressors") or {}).items())
    return table


def _species(results: Results, figures: dict[str, Figure]) -> Iterator[str]:
    found = {int(key.partition("-")[2]): value for key, value in results.items() if key.startswith("species-")}
    if not found:
        return
    for length in found:
        fine_tuned = results.get(f"finetuned-{length}")
        found[length] = found[length] | ({"Hyena, fine-tuned": fine_tuned} if fine_tuned else {})
    kinds = ["Hyena, frozen", "Hyena, fine-tuned", "4-mers"]
    yield from ["## Species of a window", ""]
    yield "*E. coli*, *V. cholerae*, *S. aureus*, *H. pylori*: windows at random places and of both strands; every "
    yield "test window is from a strain that training has not seen. Frozen: logistic regression on the mean hidden "
    yield "states of all layers, both strands; 4-mers: the same on their frequencies. Fine-tuned: all weights, mean "
    yield "pooling, the checkpoint chosen on a tenth of the training windows. Equal numbers of the four species: "
    yield "chance is 25%."
    yield ""
    yield from markdown_table(
        ["window", "training / test windows", *(f"{kind}: accuracy, MCC" for kind in kinds)],
        [
            [
                f"{length:,}",
                f"{value['train_windows']:,} / {value['test_windows']:,}",
                *(
                    f"{value[kind]['accuracy']:.2%}, {value[kind]['mcc']:.4f}" if kind in value else "not run"
                    for kind in kinds
                ),
            ]
            for length, value in sorted(found.items())
        ],
    )
    yield ""
    figures["species"] = _plot_species(found, kinds)


def _variants(results: Results, figures: dict[str, Figure]) -> Iterator[str]:
    found = results.get("variants")
    if not found:
        return
    summaries = {
        name: summarise_variants(found["kinds"], found["effects"], ratios)
        for name, ratios in found["log_ratios"].items()
    }
    yield from ["## Planted substitutions", ""]
    yield f"{found['planted']:,} substitutions at random places of MG1655 (held out), as many for each codon position "
    yield "and between genes. The package has no annotation: genes are open reading frames from a scan of all six "
    yield "frames, longest first without overlap; intergenic are bases in no long stretch without stop codons. "
    yield "Log-ratio: ln p(window with the substitution) - ln p(window without), mean of both strands, in nats."
    yield ""
    names = list(summaries)
    yield from markdown_table(
        ["class", "count", *(f"{name}: median (quartiles)" for name in names)],
        [
            [group, numbers["count"], *(_quartiles(summaries[name]["groups"][group]["quartiles"]) for name in names)]
            for group, numbers in summaries[names[0]]["groups"].items()
        ],
    )
    yield ""
    yield "Area under the ROC curve when a lower log-ratio stands for the first of the two classes (0.5: chance), and "
    yield "its standard error (Hanley and McNeil 1982)."
    yield ""
    yield from markdown_table(
        ["classes", *names],
        [
            [comparison, *("{:.3f} ({:.3f})".format(*summaries[name]["auc"][comparison]) for name in names)]
            for comparison in summaries[names[0]]["auc"]
        ],
    )
    yield ""
    figures["variants"] = _plot_variants(found)


def _quartiles(values: Sequence[float]) -> str:
    low, median, high = values
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _embedding(results: Results, figures: dict[str, Figure]) -> Iterator[str]:  # noqa: ARG001 (as the other sections)
    found = {key: value for key, value in results.items() if key.startswith("embed-")}
    if not found:
        return
    yield from ["## Embedding a whole genome", ""]
    yield "*E. coli* 536, 4,938,920 bases, in a process of its own, loading the model included."
    yield ""
    yield from markdown_table(
        ["command", "seconds", "peak memory, GB"],
        [
            [f"`{value['command']}`", f"{value['seconds']:.0f}", f"{value['peak_bytes'] / 1e9:.2f}"]
            for value in found.values()
        ],
    )
    yield ""


def _axes(count: int = 1, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels in `rows` rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = -(-count // rows)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for one in axes:
        one.grid(alpha=0.3)
    for spare in axes[count:]:
        spare.remove()
    return figure, list(axes)[:count]


def _plot_training(results: Results) -> Figure:
    """Training loss against bases read; later stages go on where the one before ended."""
    figure, (axes,) = _axes()
    for name in ("hyena", "llama"):
        begun = 0
        for number, stage in enumerate(results.get(name, [])):
            per_step = stage["length"] * stage["batch_size"]
            read = [begun + step * per_step for step, _ in stage["loss_curve"]]
            bits = [bits for _, bits in stage["loss_curve"]]
            label = f"{name}, rows of {stage['length']:,}"
            axes.plot(read, bits, label=label, linestyle="-" if number == 0 else "--")
            begun += stage["tokens"]
    axes.set(xlabel="bases read", ylabel="training bits per base")
    axes.legend()
    return figure


def _plot_bits(rows: Sequence[tuple[str, Mapping[str, float]]], sets: Sequence[str]) -> Figure:
    """Markov models as a curve over their order, neural models as lines across; what is above 2.1 is not drawn."""
    figure, panels = _axes(len(sets), rows=2)
    models = [(label, numbers) for label, numbers in rows if label.startswith(("Hyena", "Llama"))]
    for axes, name in zip(panels, sets, strict=True):
        counted = [(label, numbers) for label, numbers in rows if label.startswith("Markov") and name in numbers]
        orders = {int(label.rsplit(" ", 1)[1]): numbers[name] for label, numbers in counted}
        axes.plot(list(orders), list(orders.values()), "o-", color="gray", label="Markov")
        for index, (label, numbers) in enumerate(models):
            if numbers.get(name, 9.9) < 2.1:
                axes.axhline(numbers[name], color=f"C{index}", linewidth=1, label=label)
        axes.set(title=name, xlabel="order of the Markov model", ylabel="bits per base", ylim=(None, 2.1))
    panels[0].legend(fontsize=7)
    return figure


def _plot_species(found: Mapping[int, Any], kinds: Sequence[str]) -> Figure:
    figure, (axes,) = _axes()
    lengths = sorted(found)
    for kind in kinds:
        measured = [length for length in lengths if kind in found[length]]
        axes.plot(measured, [100 * found[length][kind]["accuracy"] for length in measured], "o-", label=kind)
    axes.set(xlabel="bases of a window", ylabel="accuracy on held-out strains, %", xscale="log")
    axes.legend()
    return figure


def _plot_variants(found: Mapping[str, Any]) -> Figure:
    """Cumulative distribution of the log-ratio by class, a panel a model."""
    import numpy as np

    figure, panels = _axes(len(found["log_ratios"]))
    kinds = np.array(found["kinds"])
    for axes, (name, values) in zip(panels, found["log_ratios"].items(), strict=True):
        for kind in sorted(set(found["kinds"])):
            ordered = np.sort(np.array(values)[kinds == kind])
            axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=kind)
        axes.set(title=name, xlabel="log-ratio, nats", ylabel="share at or below")
        axes.legend(fontsize=8)
    return figure
