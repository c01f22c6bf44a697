"""Section `generate`: what a token costs through `generate()`, sampling loop and all."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from benchmarks.report import markdown_table
from benchmarks.timing import Comparison, Settings

from .figures import (
    GOAL_COLUMNS,
    GPT2_COMPILED,
    GPT2_STATIC,
    LLAMA_COMPILED,
    MODAL_COMPILED,
    Page,
    goal_row,
    lines_plot,
    throughput,
    time_table,
)
from .models import FULL, GPT2, LFM2, LLAMA, MAMBA, MAMBA2, MODAL, TINY, make_model, random_tokens
from .runs import compare_runs, greedy, stamped
from .step import GPT2S, MODALS, compiled_anew


PROMPT, SHORT_PROMPT = 512, 16
NEW = {1: 64, 16: 32, 64: 16}  # tokens by batch
# what transformers calls each cache; the second says whether to compile
VARIANTS = {
    GPT2: (GPT2, "dynamic", False),
    GPT2_STATIC: (GPT2, "static", False),
    GPT2_COMPILED: (GPT2, "static", True),
    LLAMA: (LLAMA, "dynamic", False),
    LLAMA_COMPILED: (LLAMA, "static", True),
    MAMBA: (MAMBA, None, False),
    MAMBA2: (MAMBA2, None, False),
    LFM2: (LFM2, None, False),
    MODAL: (MODAL, None, False),
    MODAL_COMPILED: (MODAL, "static", True),
}
GOALS = {1: 1.1, 16: 3.0, 64: 7.0}


def _seconds(model: Any, ids: Tensor, config: GenerationConfig) -> float:
    return stamped(model, ids, config).per_token


def compare_generations(settings: Settings, batch: int) -> Comparison:
    """Seconds a token behind the first."""
    scale = TINY if settings.smoke else FULL
    prompt, new = (16, 6) if settings.smoke else (PROMPT, NEW[batch])
    models: dict[str, Any] = {}
    cases = {}
    for name, (kind, cache, compiled) in VARIANTS.items():
        if kind not in models:
            models[kind] = make_model(kind, scale, prompt + new)
        short = batch > 1 and kind in (MAMBA, MAMBA2)
        ids = random_tokens(scale, batch, min(prompt, SHORT_PROMPT) if short else prompt)
        config = greedy(new, cache=cache, compiled=compiled, smoke=settings.smoke)
        cases[name] = partial(_seconds, models[kind], ids, config)
    return compare_runs(settings, cases)


def section(settings: Settings) -> Page:
    """Decode time by stamps at every token."""
    batches = (1,) if settings.smoke else tuple(NEW)
    lines = [
        "## Through generate()",
        f"Greedy, prompt {PROMPT}, time of a token behind the first by stamps at every token; new tokens by batch: "
        f"{', '.join(f'{batch}: {new}' for batch, new in NEW.items())}. Compiled steps are warm. For batches Mamba "
        f"and Mamba-2 have a prompt of {SHORT_PROMPT}, because their path without kernels of their own takes minutes "
        f"for longer ones; their steps do not depend on it.",
    ]
    found: dict[int, Comparison] = {}
    for batch in tqdm(batches, desc="generate"):
        with compiled_anew():
            found[batch] = one = compare_generations(settings, batch)
        lines += ["", f"Batch {batch}, {one.rounds} rounds:", "", *time_table(one, GPT2, batch, {})]
    goals = [
        (batch, *goal_row(one, theirs, MODALS, GOALS[batch]))
        for theirs in (GPT2S, (GPT2,))
        for batch, one in found.items()
    ]
    note = (
        "Goals. The fastest variant of GPT-2 counts; its growing cache, the default of generate(), stands beside it:"
    )
    lines += ["", note, "", *markdown_table(["batch", *GOAL_COLUMNS], goals)]
    return lines, {"generate": lines_plot(throughput(found), f"generate(), prompt {PROMPT}", "batch", "tokens/s")}
