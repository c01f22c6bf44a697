"""Section `context`: a decode step and the bytes of a cache against the length of the context."""

from __future__ import annotations

import gc
from typing import Any

from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Comparison, Settings, ratio_table

from .caches import Decoder, bytes_per_sequence, filled_cache, filter_bytes, operations
from .figures import Page, lines_plot, scaled
from .models import FULL, GPT2, HISTORY, LFM2, LLAMA, MAMBA, MAMBA2, MODAL, ONLINE, TINY, make_model


CONTEXTS, SMOKE_CONTEXTS = (256, 1024, 4096, 16384, 65536), (160, 256)
NAMES = (GPT2, LLAMA, MAMBA, MAMBA2, LFM2, HISTORY, ONLINE, MODAL)
TILED = 256  # tokens of a run with tiles: what a token costs depends on its place among them
OURS = (HISTORY, ONLINE, MODAL)
ROOM = 32
GOAL = 1.15


def decoder(name: str, context: int, *, smoke: bool) -> Decoder:
    """One row; tiles make many tokens a run, all others one."""
    steps = (32 if smoke else TILED) if name == ONLINE else 1
    room = ROOM + steps
    model = make_model(name, TINY if smoke else FULL, context + room)
    decode_cache = "online" if name == ONLINE else "history"
    return Decoder(model, filled_cache(model, 1, context, room, decode_cache=decode_cache), steps=steps)


def compare_contexts(settings: Settings, name: str, contexts: tuple[int, ...]) -> Comparison:
    """One model at several contexts, in turn."""
    decoders = {str(context): decoder(name, context, smoke=settings.smoke) for context in contexts}
    return settings.compare({context: one.run for context, one in decoders.items()})


def constancy_lines(settings: Settings, contexts: tuple[int, ...]) -> list[str]:
    """Whether a modal step knows how long its context is, beside one of GPT-2."""
    rows: list[tuple[object, ...]] = []
    for name in (MODAL, GPT2):
        found = compare_contexts(settings, name, contexts)
        control = found.control
        rows.append((name, f"{contexts[0]} again (control)", str(control), "-", "-"))
        for context in contexts:
            one = decoder(name, context, smoke=settings.smoke)
            ratio = found.ratio(str(contexts[0]), str(context))
            rows.append((name, context, str(ratio), operations(one.run), bytes_per_sequence(one.cache)))
    head = ["model", "context", f"time over that at {contexts[0]}", "operations", "cache, bytes"]
    return [
        f"The same model at several contexts, in turn. Goal for a modal step at {contexts[-1]}: {GOAL} times that at "
        f"{contexts[0]} at most, as many operations, as many bytes.",
        "",
        *markdown_table(head, rows),
    ]


def measure(settings: Settings, context: int) -> tuple[Comparison, dict[str, Any]]:
    """Seconds a token and cells on the cache of every model."""
    decoders = {name: decoder(name, context, smoke=settings.smoke) for name in NAMES}
    found = settings.compare({name: one.run for name, one in decoders.items()})
    held = {name: bytes_per_sequence(one.cache) for name, one in decoders.items()}
    held |= {f"taps, {name}": filter_bytes(decoders[name].cache) for name in OURS}
    return scaled(found, {name: one.steps for name, one in decoders.items()}), held


def section(settings: Settings) -> Page:
    """Batch 1, eager, growing caches."""
    contexts = SMOKE_CONTEXTS if settings.smoke else CONTEXTS
    found, held = {}, {}
    for context in tqdm(contexts, desc="context"):
        found[context], held[context] = measure(settings, context)
        gc.collect()
    times = {name: {context: one.milliseconds(name) for context, one in found.items()} for name in NAMES}
    sizes = {name: {context: held[context][name] for context in contexts} for name in NAMES}
    few = contexts if settings.smoke else CONTEXTS[:4:3]
    lines = [
        "## Context",
        f"Batch 1, eager, growing caches. Contexts are random keys, values and gated inputs, but for modal filters, "
        f"which have read a whole prompt, and Mamba, Mamba-2 and the convolutions of LFM2, which have read 8 tokens. "
        f"Tiles have folded the context; their time is the mean over {TILED} tokens, the fold not in it.",
        "",
        "Milliseconds a step:",
        "",
        *markdown_table(["context", *NAMES], [(c, *(f"{times[name][c]:.3g}" for name in NAMES)) for c in contexts]),
        "",
        f"Time of {GPT2} over that of another model:",
        "",
        *ratio_table(["context"], {(context,): one for context, one in found.items()}, means=False),
        "",
        "Bytes of a cache; the last columns are evaluated filters, which a cache holds once for all rows:",
        "",
        *markdown_table(
            ["context", *held[contexts[0]]],
            [(c, *held[c].values()) for c in contexts],
        ),
        "",
        *constancy_lines(settings, few),
    ]
    return lines, {
        "context_latency": lines_plot(times, "Decode step, batch 1", "tokens of context", "ms"),
        "context_cache": lines_plot(sizes, "Cache of a sequence", "tokens of context", "bytes"),
    }
