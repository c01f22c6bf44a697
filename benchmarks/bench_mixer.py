"""What a Hyena operator costs beside the published one, without its two projections and with them.

    python -m benchmarks.bench_mixer                    (--smoke: tiny shapes, 2 rounds, page in runs/smoke)
    python -m benchmarks.bench_mixer --only allocator   (that section alone; the others stay on the page)

CPU time of one thread, in shuffled rounds; every ratio is the time of the published operator over that of this package
within one round. The published operator starts from projections (B, L, 3 D), as its linear layer leaves them; ours
from (B, 3 D, L), as the transposed product in front of it leaves them. Gradients come in from behind as the second
projection of each side delivers them: (B, L, D) in memory from the published linear layer, (B, D, L) from ours, whose
backward forms it in rows. Both are given taps; the published operator transforms them in every call, for it keeps
nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.published import PublishedOperator, published_mixer_core
from benchmarks.timing import (
    KEEPING_ALLOCATOR,
    Call,
    Comparison,
    Settings,
    free_memory,
    ratio_table,
    run_sections,
    verdict,
)
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.mixers import HyenaMixer
from hyena_hf.ops import FilterSpectrum, filter_spectrum, hyena_conv


Page = tuple[list[str], dict[str, Figure]]
Cell = tuple[int, int, int]

CELLS = [(batch, width, length) for length in (1024, 2048, 8192, 65536) for width in (256, 768) for batch in (1, 4)]
MODULES = [(1, 256, 2048), (1, 768, 2048), (4, 256, 2048), (1, 256, 8192), (1, 768, 8192), (1, 256, 65536)]
ALLOCATOR = [(1, 256, 1024), (4, 256, 2048), (1, 768, 8192), (1, 256, 65536)]
SMOKE = [(1, 8, 64), (2, 8, 64)]
KEYS = ["B", "D", "L"]
PUBLISHED, KEPT, PER_CALL, OURS = "published", "spectrum kept", "spectrum per call", "this package"
# numbers that are alive at most for each one of B D L, both layouts of the projections included
LIVE = {False: 28, True: 40}


@dataclass(frozen=True)
class Parts:
    """Inputs of both operators, the same numbers."""

    p: Tensor
    short: nn.Conv1d
    k: Tensor
    skip: Tensor

    @classmethod
    def random(cls, batch: int, width: int, length: int) -> Parts:
        """Projections (B, L, 3 D), filters (L, D) that decay."""
        k = torch.randn(length, width) * torch.exp(-torch.arange(length) * 5 / length).unsqueeze(-1)
        short = nn.Conv1d(3 * width, 3 * width, 3, groups=3 * width, padding=2)
        return cls(torch.randn(batch, length, 3 * width), short, k / math.sqrt(length), torch.randn(width))

    def published(self) -> Tensor:
        """(B, L, D)."""
        return published_mixer_core(self.p, self.short, self.k, self.skip)


def ours(p: Tensor, short: nn.Conv1d, h: Tensor | FilterSpectrum, direct: Tensor | None) -> Tensor:
    """Of p (B, 3 D, L): (B, D, L)."""
    return hyena_conv(p, short.weight.squeeze(1), short.bias, h, direct)


def no_gradients(call: Callable[[], Tensor]) -> Call:
    """Forward alone."""

    def inference() -> Tensor:
        with torch.no_grad():
            return call()

    return inference


def with_gradients(call: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Call:
    """Forward and backward."""
    return lambda: torch.autograd.grad(call(), inputs, grad)


def refuse_difference(found: Tensor, truth: Tensor) -> None:
    """No time of a wrong result."""
    error = float((found - truth).norm() / truth.norm())
    if not error < 1e-5:
        raise RuntimeError(f"this package and the published operator differ by {error:.1e} relative RMS")


def compare_cores(settings: Settings, cell: Cell, train: bool) -> Comparison:
    """Between the projections."""
    torch.manual_seed(0)
    parts = Parts.random(*cell)
    p, h = parts.p.transpose(1, 2).contiguous(), parts.k.T.contiguous()
    with torch.no_grad():
        refuse_difference(ours(p, parts.short, h, parts.skip).transpose(1, 2), parts.published())
    if not train:
        spectrum = filter_spectrum(h, cell[-1], parts.skip)
        cases = {
            PUBLISHED: no_gradients(parts.published),
            KEPT: no_gradients(lambda: ours(p, parts.short, spectrum, None)),
            PER_CALL: no_gradients(lambda: ours(p, parts.short, h, parts.skip)),
        }
        return settings.compare(cases)
    for tensor in (parts.p, parts.k, parts.skip, p, h):
        tensor.requires_grad_()
    weights = list(parts.short.parameters())
    grad = torch.randn(cell[0], cell[2], cell[1])
    theirs, own = [parts.p, parts.k, parts.skip, *weights], [p, h, parts.skip, *weights]
    cases = {
        PUBLISHED: with_gradients(parts.published, theirs, grad),
        OURS: with_gradients(lambda: ours(p, parts.short, h, parts.skip), own, grad.transpose(1, 2).contiguous()),
    }
    return settings.compare(cases)


def compare_cells(
    settings: Settings, cells: Sequence[Cell], *, train: bool
) -> tuple[dict[tuple, Comparison], list[str]]:
    """All cells that fit into memory, each in a process of its own, and a line about those that do not."""
    found, left_out = {}, []
    for cell in tqdm(cells, desc="gradients" if train else "inference"):
        need = math.prod(cell) * 4 * LIVE[train]
        if need > free_memory():
            left_out.append(f"{cell} (about {need / 2**30:.0f} GiB)")
            continue
        found[cell] = settings.in_subprocess(compare_cores, settings, cell, train)
    return found, ["", f"Left out for want of memory: {', '.join(left_out)}."] if left_out else []


def bars(found: dict[tuple, Comparison], names: Sequence[str], title: str) -> Figure:
    """Ratios of every cell."""
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        ratios = [one.ratio(name) for one in found.values()]
        middle = [ratio.median for ratio in ratios]
        reach = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        axes.bar([x + index * width for x in range(len(found))], middle, width, yerr=reach, label=name)
    places = [x + width * (len(names) - 1) / 2 for x in range(len(found))]
    axes.set_xticks(places, [", ".join(map(str, cell)) for cell in found], rotation=60, ha="right")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="batch, width, length", ylabel="published / this package, CPU time", title=title)
    axes.legend()
    return figure


def inference(settings: Settings) -> Page:
    """Without gradients."""
    found, note = compare_cells(settings, SMOKE if settings.smoke else CELLS, train=False)
    lines = ["## Inference, without the projections", *ratio_table(KEYS, found), *note]
    lines += ["", verdict(found, KEPT, "geometric mean 5, each 2.8, at 65,536 each 8")]
    if long := {cell: one for cell, one in found.items() if cell[-1] == 65536}:
        lines += ["", f"At 65,536 alone, {verdict(long, KEPT, 'each 8')}"]
    lines += ["", verdict(found, PER_CALL, "each 2.5")]
    return lines, {"inference": bars(found, (KEPT, PER_CALL), "Inference, without the projections")}


def training(settings: Settings) -> Page:
    """With the gradients of projections, short convolution, filters and skip."""
    found, note = compare_cells(settings, SMOKE if settings.smoke else CELLS, train=True)
    lines = ["## Forward and backward, without the projections", *ratio_table(KEYS, found), *note]
    lines += ["", verdict(found, OURS, "geometric mean 3.9, each 2.8")]
    return lines, {"training": bars(found, (OURS,), "Forward and backward, without the projections")}


def make_mixer(width: int, length: int) -> HyenaForCausalLM:
    """A model of one layer; its mixer is what counts."""
    config = HyenaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=16, num_hidden_layers=1, max_position_embeddings=length
    )
    return HyenaForCausalLM(config)


def compare_modules(settings: Settings, cell: Cell, train: bool) -> Comparison:
    """Projections and the filters' MLP on both sides."""
    batch, width, length = cell
    published, plain = PublishedOperator(width, length), make_mixer(width, length)
    x = torch.randn(batch, length, width)
    mixer = _mixer(plain)
    if train:
        x.requires_grad_()
        grad = torch.randn_like(x)
        both = {PUBLISHED: published, OURS: mixer}
        cases = {}
        for name, module in both.items():
            inputs = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
            cases[name] = with_gradients(lambda module=module: module(x), inputs, grad)
        return settings.compare(cases)
    frozen = copy.deepcopy(plain)
    with frozen.frozen_filters():
        cases = {
            PUBLISHED: no_gradients(lambda: published(x)),
            "frozen filters": no_gradients(lambda: _mixer(frozen)(x)),
            "filters per call": no_gradients(lambda: mixer(x)),
        }
        return settings.compare(cases)


def _mixer(model: HyenaForCausalLM) -> HyenaMixer:
    mixer = model.model.layers[0].mixer
    assert isinstance(mixer, HyenaMixer)  # noqa: S101 (narrows the type)
    return mixer


def modules(settings: Settings) -> Page:
    """Whole modules."""
    chosen = SMOKE if settings.smoke else MODULES
    lines = [
        "## Whole module",
        "Both projections and the evaluation of filters included; with frozen filters this package evaluates and "
        "transforms them once (`model.frozen_filters()`).",
    ]
    for title, train in (("Inference", False), ("Forward and backward", True)):
        found = {
            cell: settings.in_subprocess(compare_modules, settings, cell, train) for cell in tqdm(chosen, desc=title)
        }
        lines += ["", f"{title}:", "", *ratio_table(KEYS, found)]
    return lines, {}


def allocator(settings: Settings) -> Page:
    """Fresh processes, by default and with an allocator that keeps its memory."""
    environments = {"default": {}, "keeps its memory": KEEPING_ALLOCATOR}
    lines = [
        "## Allocators",
        f"Each row in a process of its own: glibc's malloc by default, and with "
        f"{KEEPING_ALLOCATOR['GLIBC_TUNABLES']}, which maps no blocks and gives nothing back. Large tensors then cost "
        f"no page faults on either side.",
    ]
    for title, train in (("Inference", False), ("Forward and backward", True)):
        found = {}
        for cell in tqdm(SMOKE[:1] if settings.smoke else ALLOCATOR, desc=title):
            for name, environment in environments.items():
                found[*cell, name] = settings.in_subprocess(
                    _compare_core, settings, cell, train, environment=environment
                )
        lines += ["", f"{title}:", "", *ratio_table([*KEYS, "malloc"], found, means=False)]
    return lines, {}


def _compare_core(settings: Settings, cell: Cell, train: bool) -> Comparison:
    return compare_cores(settings, cell, train=train)


SECTIONS = {"inference": inference, "training": training, "module": modules, "allocator": allocator}


if __name__ == "__main__":
    run_sections("mixer", "A Hyena operator beside the published one", __doc__, SECTIONS)
