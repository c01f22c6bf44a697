# SPDX-License-Identifier: Apache-2.0
"""Saturation mutagenesis: what every substitution of a stretch of DNA does to its likelihood, as numbers and a map.

Every site has the window that `score_variants` gives it, so that the two agree; sites whose windows are the same (near
the ends of a contig, or on a short one) share the score of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .batching import progress_bar
from .manifest import file_fingerprint, whole
from .reference import Reference, as_model_letters, check_letters, parse_region
from .tables import ResumableTable, check_output, in_batches, read_rows, write_in_parts
from .variants import origin_of
from .windows import WindowScorer, WindowSettings


__all__ = ["plot_mutagenesis", "saturation_mutagenesis", "write_mutagenesis"]

BASES = "ACGT"
COLUMNS: dict[str, type] = {"contig": str, "pos": int, "ref": str, **dict.fromkeys(BASES, float)}
_PART_BASES = 1 << 24  # of the windows of a part, which are in memory at once
_PART_SITES = 256  # at most
_ROW = 100  # positions in a row of a map
_ROWS = 40  # rows of a map; of a longer region, rows have more positions


def saturation_mutagenesis(
    model: Any,
    tokenizer: Any,
    sequence: str,
    *,
    start: int = 0,
    end: int | None = None,
    window: int | None = None,
    batch_size: int | str = "auto",
    reverse_complement: bool = False,
) -> np.ndarray:
    """Log-ratio of every substitution at every site of a range.

    `ln p(window with the substitution) - ln p(window)`; three or four windows are scored for a site.

    Args:
        model: A causal language model, as for `score`.
        tokenizer: Its tokenizer, with one token for each base.
        sequence: The contig, in either case; IUPAC letters are read as N.
        start: First site, 0-based.
        end: One behind the last site; None: the end of the sequence.
        window: Bases that the model sees around a site; None: its `max_position_embeddings`, at most 8,192.
        batch_size: Windows in a batch, or `"auto"`.
        reverse_complement: Mean over both strands.

    Returns:
        float64 (end - start, 4), columns A, C, G, T. 0 for the base that is there; NaN in the whole row where that is
        an N.

    Raises:
        TypeError: The model predicts no next token, or an argument is of another kind.
        ValueError: An empty sequence, letters that are no DNA, a range outside of it, or a window longer than the
            model takes.
    """
    if not isinstance(sequence, str):
        raise TypeError(f"sequence must be a str of bases, got {type(sequence).__name__}")
    end = len(sequence) if end is None else end
    if not 0 <= start < end <= len(sequence):
        raise ValueError(
            f"start {start} to end {end} is no range of a sequence of {len(sequence)} bases; both count from 0, and "
            f"end is one behind the last site"
        )
    sequence = sequence.upper()
    check_letters(sequence, "the sequence")
    scorer = WindowScorer(model, tokenizer, WindowSettings(window, batch_size, reverse_complement))
    parts = in_batches(range(start, end), _part_sites(scorer.window))
    return np.concatenate([_effects(sequence, 0, len(sequence), sites, scorer) for sites in parts])


def write_mutagenesis(
    model: Any,
    tokenizer: Any,
    fasta: str | Path,
    region: str,
    output: str | Path,
    *,
    settings: WindowSettings | None = None,
    picture: str | Path | None = None,
    progress: bool | None = False,
) -> int:
    """`saturation_mutagenesis` of a region of a FASTA file, into a table that grows in parts.

    A run that was killed goes on where it was. Only the windows are read, so contigs may be of any length.

    Args:
        model: As for `saturation_mutagenesis`.
        tokenizer: As for `saturation_mutagenesis`.
        fasta: FASTA (plain, gzip or bgzip).
        region: `contig`, or `contig:start-end`, 1-based with the end included, as samtools reads it.
        output: `.tsv` or `.parquet` with contig, pos (1-based), ref, and the log-ratios A, C, G, T (missing where the
            reference is an N). Until it is whole, parts are in a folder `OUTPUT.parts`.
        settings: The window and how it is scored.
        picture: Also draw the map, as `plot_table` does, before the table has its name: the same call goes on from a
            kill between the two.
        progress: Whether to draw a bar on stderr; None: where that is a terminal.

    Returns:
        Number of sites.

    Raises:
        ImportError: pysam, for Parquet pyarrow, or for a picture matplotlib is not installed.
        TypeError: As `saturation_mutagenesis`.
        ValueError: As `saturation_mutagenesis`; no such file or region; a table or picture that exists; parts of
            another run.
    """
    check_output(Path(output))
    if picture is not None:
        check_picture(Path(picture))
    scorer = WindowScorer(model, tokenizer, settings or WindowSettings())
    with Reference(fasta) as genome:
        contig, start, end = parse_region(region, genome.contigs)
        length = genome.length(contig)
        origin = origin_of(scorer) | {
            "reference": file_fingerprint(Path(fasta)),
            "region": f"{contig}:{start + 1}-{end}",
        }
        with progress_bar(end - start, progress, "site") as bar:

            def rows(sites: list[int]) -> list[tuple[Any, ...]]:
                first = scorer.place(sites[0], sites[0] + 1, length)[0]
                last = scorer.place(sites[-1], sites[-1] + 1, length)[1]
                bases = genome.fetch(contig, first, last)
                values = _effects(bases, first, length, sites, scorer).tolist()
                bar.update(len(sites))
                return [
                    (contig, site + 1, bases[site - first], *(None if math.isnan(value) else value for value in row))
                    for site, row in zip(sites, values, strict=True)
                ]

            parts = in_batches(range(start, end), _part_sites(scorer.window))
            companion = None if picture is None else lambda table: plot_table(table, picture)
            write_in_parts(lambda: ResumableTable(output, COLUMNS, origin), parts, rows, companion)
    return end - start


def plot_mutagenesis(
    effects: np.ndarray, sequence: str, path: str | Path, *, first: int = 1, title: str = "Saturation mutagenesis"
) -> None:
    """Draw log-ratios as a heat map: blue where a substitution lowers the likelihood, red where it raises it.

    100 positions a row, more where that would make over 40 rows. The base that is there has a dot; sites whose base is
    unknown are grey. The colours end at the 99th percentile of all sizes, so that a few strong sites hide no others.

    Args:
        effects: (n, 4), columns A, C, G, T, as `saturation_mutagenesis` gives.
        sequence: The n bases that were replaced.
        path: Of the picture; its ending says the format (`.png`, `.pdf`, `.svg`).
        first: Position of the first site, for the axis.
        title: Above the map.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Another shape, a sequence of another length, no numbers, or a picture that exists.
    """
    effects = np.asarray(effects, np.float64)
    if effects.ndim != 2 or effects.shape[1] != 4 or len(effects) == 0:
        raise ValueError(f"effects have the shape {effects.shape}; expected (n, 4), at least one site")
    if len(sequence) != len(effects):
        raise ValueError(f"sequence has {len(sequence)} bases, but there are effects of {len(effects)} sites")
    if not np.isfinite(effects).any():
        raise ValueError("effects hold no number: all sites are N; choose another region")
    check_picture(Path(path))
    from matplotlib.figure import Figure

    width = min(max(_ROW, math.ceil(len(effects) / _ROWS)), len(effects))
    num_rows = math.ceil(len(effects) / width)
    figure = Figure(figsize=(14, 1.3 + 1.1 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 1, squeeze=False)[:, 0]
    sizes = np.abs(effects[np.isfinite(effects)])
    bound = float(np.quantile(sizes, 0.99)) or float(sizes.max()) or 1.0
    images = [
        _draw_row(axis, effects[at : at + width], sequence[at : at + width].upper(), first + at, (width, bound))
        for axis, at in zip(axes, range(0, len(effects), width), strict=True)
    ]
    axes[0].set_title(title)
    axes[-1].set_xlabel("position")
    bar = figure.colorbar(images[0], ax=list(axes), fraction=0.02, pad=0.01, extend="both")
    bar.set_label("ln p(substituted) - ln p(reference)")
    with whole(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=120, format=Path(path).suffix[1:])


def check_picture(path: Path) -> None:
    """Refuse, before any work, a picture that could not be drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: It exists, or its ending is no format of a picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("a heat map needs matplotlib: pip install 'hyena-hf[genomes]'") from error
    if path.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"{path} ends in {path.suffix!r}, which is no format of a picture; use .png, .pdf or .svg")
    if path.exists():
        raise ValueError(f"{path} exists already and is not overwritten; name another file, or delete it")


def plot_table(table: str | Path, path: str | Path) -> None:
    """Draw what `write_mutagenesis` wrote.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As `plot_mutagenesis`, or a table with other columns.
    """
    rows = list(read_rows(Path(table), COLUMNS))
    effects = np.array([[math.nan if value is None else value for value in row[3:]] for row in rows])
    contig, first, last = rows[0][0], rows[0][1], rows[-1][1]
    bases = "".join(row[2] for row in rows)
    plot_mutagenesis(effects, bases, path, first=first, title=f"Saturation mutagenesis, {contig}:{first}-{last}")


def _draw_row(axis: Any, effects: np.ndarray, bases: str, first: int, scale: tuple[int, float]) -> Any:
    from matplotlib import colormaps

    width, bound = scale
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    extent = (first - 0.5, first + len(effects) - 0.5, 3.5, -0.5)
    image = axis.imshow(
        np.ma.masked_invalid(effects.T),
        cmap=colours,
        vmin=-bound,
        vmax=bound,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    there = [(first + site, BASES.index(base)) for site, base in enumerate(bases) if base in BASES]
    if there:
        axis.scatter(*zip(*there, strict=True), s=4, color="black", linewidths=0)
    axis.set_xlim(first - 0.5, first + width - 0.5)
    axis.set_yticks(range(4), list(BASES))
    axis.ticklabel_format(axis="x", useOffset=False, style="plain")
    return image


def _part_sites(window: int) -> int:
    return max(min(_PART_SITES, _PART_BASES // (4 * window)), 1)


def _effects(bases: str, offset: int, length: int, sites: Iterable[int], scorer: WindowScorer) -> np.ndarray:
    """Log-ratios (n, 4) of sites of a contig of some length, of which `bases` are those from `offset` on."""
    bases = as_model_letters(bases)
    tasks: list[tuple[str, list[str]]] = []
    for site in sites:
        first, last = scorer.place(site, site + 1, length)
        whole, at = bases[first - offset : last - offset], site - first
        known = whole[at] in BASES
        tasks.append((whole, [whole[:at] + base + whole[at + 1 :] for base in BASES] if known else []))
    scores = scorer(text for whole, changed in tasks for text in ([whole, *changed] if changed else []))
    return np.array(
        [[scores[text] - scores[whole] for text in changed] or [math.nan] * len(BASES) for whole, changed in tasks]
    )
