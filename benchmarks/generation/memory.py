"""Section `memory`: peak memory of a generation and bytes of a cache over batch."""

from __future__ import annotations

from functools import partial

import transformers
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Call, Settings, free_memory

from .caches import bytes_per_sequence, feed, filled_cache, tokens_for
from .figures import Curves, Page, lines_plot
from .models import (
    FULL,
    GPT2,
    HEADS,
    HISTORY,
    LFM2,
    LLAMA,
    MAMBA,
    MAMBA2,
    MODAL,
    ONLINE,
    TINY,
    make_model,
    random_tokens,
)
from .runs import greedy, stamped


BATCHES = (1, 16, 64)
PROMPT, NEW = 512, 16
NAMES = (GPT2, LLAMA, MAMBA, MAMBA2, LFM2, HISTORY, ONLINE, MODAL)
CONTEXTS, SMOKE_CONTEXTS = (512, 4096), (160, 300)
GOALS = {MODAL: 175_000, HEADS: 1_050_000}
DECODE_CACHES = {HISTORY: "history", ONLINE: "online"}


def prepare(name: str, batch: int, prompt: int, new: int, smoke: bool) -> Call:
    """A generation, after a small one that loads what a first call loads; for `peak_memory`."""
    transformers.logging.set_verbosity_error()
    scale = TINY if smoke else FULL
    model = make_model(name, scale, prompt + new)
    stamped(model, random_tokens(scale, 1, 8), greedy(2))
    config = greedy(new, decode_cache=DECODE_CACHES.get(name))
    return partial(stamped, model, random_tokens(scale, batch, prompt), config)


def peaks(settings: Settings, batches: tuple[int, ...], prompt: int, new: int) -> dict[str, dict[int, float]]:
    """MiB by model and batch; a batch is left out where it would not fit."""
    found: dict[str, dict[int, float]] = {}
    for name in tqdm(NAMES, desc="memory"):
        known: dict[int, float] = {}
        for batch in batches:
            smaller = max(known, default=0)
            expected = known[smaller] * batch / smaller if smaller else 0.0
            if expected * 2**20 > 0.8 * free_memory():
                continue
            peak = settings.peak_memory(prepare, name, batch, prompt, new, settings.smoke)
            if peak is not None:
                known[batch] = max(peak.mebibytes, 1e-3)
        found[name] = known
    return found


def cache_bytes(name: str, batch: int, context: int, *, smoke: bool) -> int:
    """Of a sequence, behind a context and one token more."""
    model = make_model(name, TINY if smoke else FULL, context + NEW)
    cache = filled_cache(model, batch, context, NEW, decode_cache=DECODE_CACHES.get(name, "history"))
    feed(model, cache, tokens_for(model, batch, 1))
    return bytes_per_sequence(cache)


def goal_lines(contexts: tuple[int, ...], batches: tuple[int, ...], *, smoke: bool) -> list[str]:
    """Bytes of modal caches at two lengths and all batches."""
    rows = []
    for name, goal in GOALS.items():
        found = {
            *(cache_bytes(name, 1, context, smoke=smoke) for context in contexts),
            *(cache_bytes(name, batch, contexts[0], smoke=smoke) for batch in batches),
        }
        rows.append((name, ", ".join(map(str, sorted(found))), goal, "yes" if max(found) <= goal else "no"))
    where = f"contexts of {' and '.join(map(str, contexts))}, batches of {', '.join(map(str, batches))}"
    return [f"All values at {where}:", "", *markdown_table(["model", "bytes of a sequence", "goal", "reached"], rows)]


def section(settings: Settings) -> Page:
    """Each peak in a fresh process."""
    batches, contexts = (BATCHES[:1], SMOKE_CONTEXTS) if settings.smoke else (BATCHES, CONTEXTS)
    prompt, new = (32, 4) if settings.smoke else (PROMPT, NEW)
    found: Curves = peaks(settings, batches, prompt, new)
    if not found[GPT2]:
        return ["## Memory", "Resident memory is read on Linux only."], {}
    cells = [(name, *(f"{one[b]:.0f}" if b in one else "-" for b in batches)) for name, one in found.items()]
    held = [
        (name, *(cache_bytes(name, b, contexts[0], smoke=settings.smoke) for b in batches)) for name in (*NAMES, HEADS)
    ]
    lines = [
        "## Memory",
        f"Peak of resident memory above weights and prompt, MiB, of a generation through generate() in a fresh "
        f"process: {prompt} tokens of prompt, {new} new ones; by batch. A dash stands where "
        f"the batch would not have fitted this machine.",
        "",
        *markdown_table(["model", *map(str, batches)], cells),
        "",
        f"Bytes of the cache of one sequence behind {contexts[0] + 1} tokens, by batch. Tiles hold accumulators for "
        f"the tokens to come in the place of the prompt:",
        "",
        *markdown_table(["model", *map(str, batches)], held),
        "",
        *goal_lines(contexts, batches, smoke=settings.smoke),
    ]
    return lines, {"memory": lines_plot(found, f"Prompt of {prompt}, {new} tokens more", "batch", "peak, MiB")}
