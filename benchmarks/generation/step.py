"""Section `step`: one decode step of every model with a filled cache."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Comparison, Settings

from .caches import Decoder, compile_config, filled_cache, operations
from .figures import (
    GOAL_COLUMNS,
    GPT2_COMPILED,
    GPT2_STATIC,
    LLAMA_COMPILED,
    LLAMA_STATIC,
    MODAL_COMPILED,
    Page,
    goal_row,
    lines_plot,
    throughput,
    time_table,
)
from .models import FULL, GPT2, LFM2, LLAMA, MAMBA, MAMBA2, MODAL, TINY, make_model, size_table


CONTEXT, ROOM = 512, 32
BATCHES = (1, 16, 64)
GROWING = (GPT2, LLAMA, MAMBA, MAMBA2, LFM2, MODAL)
STATIC = {GPT2: (GPT2_STATIC, GPT2_COMPILED), LLAMA: (LLAMA_STATIC, LLAMA_COMPILED), MODAL: ("", MODAL_COMPILED)}
GPT2S, MODALS = (GPT2, GPT2_STATIC, GPT2_COMPILED), (MODAL, MODAL_COMPILED)
GPT2_GOALS = {1: 1.15, 16: 3.5, 64: 8.0}
GOALS = {GPT2S: GPT2_GOALS, (GPT2,): GPT2_GOALS, (MAMBA,): {1: 1.7, 16: 2.3, 64: 2.3}}


@dataclass
class Steps:
    """Decoders of one batch size, and what is known of them beside their time."""

    decoders: dict[str, Decoder] = field(default_factory=dict)
    operations: dict[str, object] = field(default_factory=dict)
    compiling: dict[str, object] = field(default_factory=dict)


@contextmanager
def compiled_anew() -> Iterator[None]:
    """Nothing that was compiled before, on disk neither, so that compile time is what a first user sees."""
    torch.compiler.reset()
    settings: Any = torch.compiler.config  # its methods are made when it is imported
    with warnings.catch_warnings(), settings.patch(force_disable_caches=True):
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # as we have asked for
        yield
    torch.compiler.reset()
    gc.collect()


def make_steps(batch: int, *, smoke: bool) -> Steps:
    """All cases of one batch size."""
    scale, context = (TINY, 16) if smoke else (FULL, CONTEXT)
    found = Steps()
    for name in GROWING:
        model = make_model(name, scale, context + ROOM)
        found.decoders[name] = Decoder(model, filled_cache(model, batch, context, ROOM))
        eager, compiled = STATIC.get(name, ("", ""))
        if not compiled:
            continue
        cache = filled_cache(model, batch, context, ROOM, static=True)
        if eager:
            found.decoders[eager] = Decoder(model, cache)
        decoder = Decoder(model, cache, compiled=compile_config(smoke=smoke))
        start = time.perf_counter()
        decoder.run()
        found.compiling[compiled] = f"{time.perf_counter() - start:.0f}"
        found.decoders[compiled] = decoder
    for name, decoder in found.decoders.items():
        if name not in found.compiling:
            found.operations[name] = operations(decoder.run)
    return found


def section(settings: Settings) -> Page:
    """Raw forward calls, without `generate`."""
    batches = BATCHES[:1] if settings.smoke else BATCHES
    lines = [
        "## Decode step",
        f"One forward call for one new token of every row, context {CONTEXT}, float32; the cache is put back after "
        f"each step. Contexts of GPT-2, Llama and LFM2 are random keys and values; Mamba, Mamba-2 and the "
        f"convolutions of LFM2 have read 8 tokens, because their steps do not depend on the context. A static cache "
        f"has room for {ROOM} tokens more. Compiled steps have fixed shapes and a static cache; time to compile, in "
        f"no ratio, is of the wall, nothing in a cache of the compiler. Operations are calls of ATen in one step, "
        f"nested ones included.",
        "",
        *size_table(TINY if settings.smoke else FULL, GROWING),
    ]
    found: dict[int, Comparison] = {}
    for batch in tqdm(batches, desc="step"):
        with compiled_anew():
            steps = make_steps(batch, smoke=settings.smoke)
            one = settings.compare({name: decoder.run for name, decoder in steps.decoders.items()})
        found[batch] = one
        more = {"operations": steps.operations, "compiling, s": steps.compiling}
        lines += ["", f"Batch {batch}, {one.rounds} rounds:", "", *time_table(one, GPT2, batch, more)]
        del steps
    goals = [
        (batch, *goal_row(one, theirs, MODALS, goals[batch]))
        for theirs, goals in GOALS.items()
        for batch, one in found.items()
    ]
    note = (
        "Goals. The fastest variant of GPT-2 counts; its growing cache, the default of generate(), stands beside it:"
    )
    lines += ["", note, "", *markdown_table(["batch", *GOAL_COLUMNS], goals)]
    return lines, {"step": lines_plot(throughput(found), f"Decode step, context {CONTEXT}", "batch", "tokens/s")}
