"""What every benchmark's page has in common: the machine, the commit, the command, tables and plots.

    write_result("recall", "Associative recall", command_line("bench_recall"), markdown_table(...), {"curve": figure})

writes benchmarks/results/recall.md and recall_curve.png, each whole or not at all.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
SMOKE_RESULTS = RESULTS.parents[1] / "runs" / "smoke"  # what `--smoke` writes is no result
PACKAGES = ("torch", "transformers")


def machine() -> str:
    """Processor, cores, memory, system, versions and present load, in one line."""
    parts = [_processor(), f"{os.cpu_count()} cores", *_memory(), f"{platform.system()} {platform.machine()}"]
    parts += [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    if hasattr(os, "getloadavg"):
        parts.append(f"load average {os.getloadavg()[0]:.1f} when this was written")
    return ", ".join(parts)


def commit() -> str:
    """The commit that ran, marked when files differ from it; results written since do not count."""
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown (no git checkout)"
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{head} with uncommitted changes" if changed else head


def command_line(module: str) -> str:
    """The command that started this benchmark, as one types it in the repository."""
    return " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; cells are written with `str`.

    Raises:
        ValueError: a row of another length than the head.
    """
    lines = [_row(columns), _row(["---"] * len(columns))]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {list(row)}")
        lines.append(_row(row))
    return lines


def write_result(
    name: str,
    title: str,
    command: str,
    lines: Iterable[str],
    figures: Mapping[str, Figure] | None = None,
    *,
    folder: Path = RESULTS,
) -> Path:
    """Write `name`.md with its plots `name`_KEY.png beside it.

    Args:
        name: file name without suffix.
        title: heading of the page.
        command: what one types to get this page again.
        lines: the page below the lines on command, commit and machine.
        figures: plots by key, shown at the end.
        folder: where to write; made if it is missing.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = [f"# {title}", "", f"`{command}`  ", f"Commit {commit()}.  ", f"{machine()}.", "", *lines]
    for key, figure in (figures or {}).items():
        plot = folder / f"{name}_{key}.png"
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        write_whole(plot, image.getvalue())
        page += ["", f"![{key}]({plot.name})"]
    path = folder / f"{name}.md"
    write_whole(path, ("\n".join(page) + "\n").encode())
    return path


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _processor() -> str:
    names = _lines(Path("/proc/cpuinfo"), "model name", lambda line: line.split(":", 1)[1].strip())
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> list[str]:
    return _lines(Path("/proc/meminfo"), "MemTotal", lambda line: f"{int(line.split()[1]) / 2**20:.0f} GiB")


def _lines(path: Path, start: str, read: Callable[[str], str]) -> list[str]:
    """Each line of the file that begins with `start`, as `read` reads it; none where there is no such file."""
    text = path.read_text() if path.exists() else ""
    return [read(line) for line in text.splitlines() if line.startswith(start)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a checkout."""
    try:
        command = ["git", "-C", str(RESULTS.parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
