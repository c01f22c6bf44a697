"""Compare the cost of calls so that a busy machine misleads as little as it can, and write the pages about it.

    found = compare({"naive": naive, "ours": ours})
    found.ratio("ours")     # of naive over ours, round by round: 2.61 [2.40-2.80]
    found.control           # of naive over itself under a second name: what chance alone does
    peak_memory(prepare, 4, 256, 8192)   # MiB, in a fresh process

Times are CPU seconds of the process unless another meter is given: they count page faults, but not other processes.
Every round runs all cases in an order of its own. A case is called once to warm up and then as often as makes a burst
of 20 ms, with the garbage collector off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import math
import multiprocessing
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from benchmarks.report import RESULTS, SMOKE_RESULTS, commit, markdown_table, write_result, write_whole


Call = Callable[[], object]
Meter = Callable[[Call, int], float]

CONTROL = "control"
LEAST_ROUNDS = 3  # below that there are no quartiles
_LONG = 1.0  # seconds; a call of that length leaves nothing to warm up

# An allocator that keeps what it has: no block of its own for large tensors, nothing given back to the system.
KEEPING_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"}


def cpu_time(call: Call, count: int) -> float:
    """CPU seconds of this process for so many calls."""
    start = time.process_time()
    for _ in range(count):
        call()
    return time.process_time() - start


def wall_time(call: Call, count: int) -> float:
    """Seconds that pass meanwhile: what several threads can shorten."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def device_time(call: Call, count: int) -> float:
    """Seconds on the current CUDA device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


class Ratio(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


@dataclass(frozen=True)
class Comparison:
    """Seconds of a call by case, one value a round; the first case is the base of all ratios."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def base(self) -> str:
        """Name of the first case."""
        return next(iter(self.seconds))

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(self.seconds[self.base])

    def milliseconds(self, name: str) -> float:
        """Median."""
        return statistics.median(self.seconds[name]) * 1e3

    def ratio(self, name: str, base: str | None = None) -> Ratio:
        """Time of the base over that of a case, round by round."""
        pairs = zip(self.seconds[base or self.base], self.seconds[name], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
        return Ratio(low, middle, high)

    @property
    def control(self) -> Ratio | None:
        """The base over itself; None where it was measured once."""
        return self.ratio(CONTROL) if CONTROL in self.seconds else None


def compare(
    cases: Mapping[str, Call],
    rounds: int = 15,
    *,
    control: bool = True,
    meter: Meter = cpu_time,
    threads: int | Mapping[str, int] = 1,
    burst: float = 0.02,
    budget: float = math.inf,
) -> Comparison:
    """Time calls against the first of them.

    Args:
        cases: What to call, by name; it must not depend on earlier calls.
        rounds: Measurements of each case.
        control: Measure the first case a second time under the name `CONTROL`.
        meter: Seconds of so many calls.
        threads: Of torch, for all cases or each by name.
        burst: Seconds that a measurement lasts at least.
        budget: Seconds for all; where they do not suffice there are fewer rounds, at least three.
    """
    calls = dict(cases)
    if control:
        calls[CONTROL] = next(iter(cases.values()))
    own = dict.fromkeys(calls, threads) if isinstance(threads, int) else {**threads}
    if control:
        own[CONTROL] = own[next(iter(cases))]

    once = {}
    for name, call in cases.items():
        torch.set_num_threads(own[name])
        once[name] = meter(call, 1)  # with all that a first call loads
        if once[name] < _LONG:
            once[name] = meter(call, 1)
    if control:
        once[CONTROL] = once[next(iter(cases))]
    counts = {name: max(1, math.ceil(burst / max(seconds, 1e-7))) for name, seconds in once.items()}
    price = sum(seconds * (counts[name] + (seconds < _LONG)) for name, seconds in once.items())
    rounds = int(min(rounds, max(LEAST_ROUNDS, budget / price)))

    order, found = random.Random(0), {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            torch.set_num_threads(own[name])
            with _no_garbage_collection():
                if once[name] < _LONG:
                    calls[name]()
                found[name].append(meter(calls[name], counts[name]) / counts[name])
    torch.set_num_threads(1)
    return Comparison(found)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def geometric_mean(ratios: Iterable[Ratio]) -> float:
    """Of medians."""
    return statistics.geometric_mean(ratio.median for ratio in ratios)


def ratio_table(keys: Sequence[str], found: Mapping[tuple, Comparison], *, means: bool = True) -> list[str]:
    """A row for each comparison: rounds, milliseconds of the base, ratios of all other cases.

    Args:
        keys: Columns that tell the comparisons apart.
        found: By values of these columns; a case may be missing from some.
        means: Whether geometric means of the columns follow.
    """
    base = next(iter(found.values())).base
    names = list(dict.fromkeys(name for one in found.values() for name in one.seconds if name not in (base, CONTROL)))
    rows = []
    for key, one in found.items():
        cells = [str(one.ratio(name)) if name in one.seconds else "-" for name in names]
        rows.append((*key, one.rounds, f"{one.milliseconds(base):.3g}", one.control or "-", *cells))
    if means:
        each = [geometric_mean(one.ratio(name) for one in found.values() if name in one.seconds) for name in names]
        rows.append(("geometric mean", *[""] * (len(keys) + 2), *(f"{mean:.2f}" for mean in each)))
    return markdown_table([*keys, "rounds", f"{base}, ms", f"{base} again ({CONTROL})", *names], rows)


def verdict(found: Mapping[tuple, Comparison], name: str, goal: str) -> str:
    """What a case reached over several comparisons, beside its goal."""
    ratios = {key: one.ratio(name) for key, one in found.items()}
    slowest, widest = min(ratios, key=lambda key: ratios[key].median), min(ratios, key=lambda key: ratios[key].low)
    return (
        f"{name}: geometric mean {geometric_mean(ratios.values()):.2f}, lowest median {ratios[slowest].median:.2f} at "
        f"{_written(slowest)}, lowest lower quartile {ratios[widest].low:.2f} at {_written(widest)}. Goal: {goal}."
    )


def _written(key: tuple) -> str:
    return f"({', '.join(map(str, key))})"


def in_subprocess(function: Callable, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What a function returns in a fresh process with one thread of torch.

    Args:
        function: One that can be imported.
        arguments: Of it.
        environment: Variables that the process has beside those of this one.

    Raises:
        BrokenProcessPool: The process died, for example for want of memory.
    """
    environment = environment or {}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Peak(NamedTuple):
    """Cost of one call in a process of its own."""

    mebibytes: float
    seconds: float


def peak_memory(prepare: Callable[..., Call], *arguments: Any) -> Peak | None:
    """Resident memory that a call takes at most, above what there was when its inputs had been made; None off Linux.

    Args:
        prepare: Importable function that makes the inputs and returns the call.
        arguments: Of `prepare`.
    """
    return in_subprocess(peak_here, prepare, *arguments)


def peak_here(prepare: Callable[..., Call], *arguments: Any) -> Peak | None:
    """`peak_memory` in this process."""
    call = prepare(*arguments)
    gc.collect()
    if not Path("/proc/self/status").exists():
        return None
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except OSError:
        return _sampled_peak(call)
    before, start = _resident("VmRSS"), time.process_time()
    result = call()
    seconds = time.process_time() - start
    peak = _resident("VmHWM") - before
    del result
    return Peak(peak, seconds)


def _sampled_peak(call: Call) -> Peak:
    """By a thread that looks every millisecond."""
    before, peak, done = _resident("VmRSS"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, _resident("VmRSS") - before)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.process_time()
    result = call()
    seconds = time.process_time() - start
    peak = max(peak, _resident("VmRSS") - before)
    done.set()
    thread.join()
    del result
    return Peak(peak, seconds)


def _return_free_memory() -> None:
    """Memory that the allocator holds without use would hide what a call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def free_memory() -> float:
    """Bytes that this machine could still give; infinite where Linux does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), math.inf)


@dataclass(frozen=True)
class Settings:
    """How long a section may take.

    Attributes:
        rounds: Measurements of each case.
        budget: Seconds for each row of a table.
        smoke: Tiny shapes, to see that it runs.
    """

    rounds: int = 15
    budget: float = 120.0
    smoke: bool = False

    def compare(self, cases: Mapping[str, Call], **options: Any) -> Comparison:
        """`compare` with these settings."""
        return compare(cases, self.rounds, budget=self.budget, burst=1e-3 if self.smoke else 0.02, **options)

    def in_subprocess(self, function: Callable, *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
        """`in_subprocess`, but at once in this process where all is tiny: a fresh one takes seconds to start."""
        return function(*arguments) if self.smoke else in_subprocess(function, *arguments, environment=environment)

    def peak_memory(self, prepare: Callable[..., Call], *arguments: Any) -> Peak | None:
        """`peak_memory`, likewise."""
        return self.in_subprocess(peak_here, prepare, *arguments)


Section = Callable[[Settings], tuple[list[str], dict[str, Figure]]]


def run_sections(
    name: str, title: str, description: str | None, sections: Mapping[str, Section], *, budget: float = 120
) -> None:
    """Parse the command line, run the sections that it asks for, and write them into the page.

    Args:
        name: Of the page; the script is bench_NAME.
        title: Heading of the page.
        description: Docstring of the script.
        sections: By the name that `--only` takes; each returns its lines, heading first, and plots by key. Sections
            that do not run stay as they are on the page.
        budget: Seconds a row of a table may take by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each case (default 15)")
    parser.add_argument(
        "--budget", type=float, default=budget, help=f"seconds a row of a table may take, above 3 rounds ({budget})"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, 2 rounds, page in runs/smoke")
    parser.add_argument("--only", default=",".join(sections), help=f"of {','.join(sections)} (default: all)")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if arguments.rounds < 2:
        parser.error(f"--rounds ({arguments.rounds}) must be at least 2")
    if unknown := sorted(set(chosen) - set(sections)):
        parser.error(f"--only names {', '.join(unknown)}; the sections are {', '.join(sections)}")
    torch.set_num_threads(1)
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    settings = Settings(2 if arguments.smoke else arguments.rounds, arguments.budget, arguments.smoke)
    for key in chosen:
        torch.manual_seed(0)
        start, load = time.perf_counter(), os.getloadavg()[0]
        (heading, *lines), figures = sections[key](settings)
        note = f"Section `{key}`: {settings.rounds} rounds or fewer where it says so, commit {commit()}, load average "
        note += f"{load:.1f} before, took {time.perf_counter() - start:.0f} s."
        body = [heading, "", note, "", *lines, *_saved(figures, folder, name)]
        path = _write_section(folder, name, title, key, body, list(sections))
        print(path.read_text() if key == chosen[-1] else f"{path.name}: {key} written")


def _saved(figures: Mapping[str, Figure], folder: Path, name: str) -> list[str]:
    """Write plots; the lines that show them."""
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for key, figure in figures.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
        write_whole(folder / f"{name}_{key}.png", image.getvalue())
        lines += ["", f"![{key}]({name}_{key}.png)"]
    return lines


def _write_section(folder: Path, name: str, title: str, key: str, body: list[str], order: list[str]) -> Path:
    """Put a section in its place on the page, whose other sections stay."""
    path = folder / f"{name}.md"
    parts = dict.fromkeys(order, "")
    for block in path.read_text().split("<!-- section ")[1:] if path.exists() else []:
        old, text = block.split(" -->\n", 1)
        parts[old] = text.strip("\n")
    parts[key] = "\n".join(body)
    lines = []
    for present in order:
        if parts[present]:
            lines += [f"<!-- section {present} -->", *parts[present].split("\n"), ""]
    return write_result(name, title, f"python -m benchmarks.bench_{name}", lines, folder=folder)


def ratio_plot(
    found: Mapping[str, Mapping[int, Ratio]], title: str, label: str, bound: Mapping[str, float] | None = None
) -> Figure:
    """Ratio over length, a line for each name, quartiles shaded.

    Args:
        found: Ratios by line and length.
        title: Of the plot.
        label: Of the ratio.
        bound: Values to mark by a horizontal line, by name.
    """
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, ratios in found.items():
        low, middle, high = zip(*ratios.values(), strict=True)
        axes.plot(list(ratios), middle, "o-", label=name)
        axes.fill_between(list(ratios), low, high, alpha=0.2)
    for value in {1.0, *(bound or {}).values()}:
        axes.axhline(value, color="grey", linewidth=0.8)
    axes.set(xlabel="length", ylabel=label, title=title, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend()
    return figure


def memory_plot(found: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Peak of resident memory over length, a line for each name."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, peaks in found.items():
        # nothing below a page shows, and zero has no logarithm
        axes.plot(list(peaks), [max(peak, 4 / 1024) for peak in peaks.values()], "o-", label=name)
    axes.set(xlabel="length", ylabel="peak above the inputs, MiB", title=title, yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend()
    return figure
