"""Section `long_prompt`: a batch of long prompts and many new tokens, prefill included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.report import markdown_table
from benchmarks.timing import Comparison, Settings, cpu_time

from .caches import Decoder, compile_config, filled_cache
from .figures import GPT2_COMPILED, GPT2_STATIC, Page, fastest, reached
from .models import EXACT, FULL, GPT2, MODAL, TINY, Scale, make_model, random_tokens
from .runs import compare_runs, greedy, stamped
from .step import GPT2S, compiled_anew


class Shape(NamedTuple):
    """Of the generation.

    Attributes:
        points: Places at which a step of GPT-2 is measured, first and last token among them.
        steps: Tokens at each of them.
    """

    batch: int
    prompt: int
    new: int
    points: int
    steps: int


SHAPE, SMOKE_SHAPE = Shape(64, 2048, 256, 5, 4), Shape(2, 16, 8, 3, 1)
PREFILL = "GPT-2, prefill"
GOAL_GPT2, GOAL_EXACT = 10.0, 1.5


def whole(name: str, scale: Scale, shape: Shape) -> Callable[[], float]:
    """A generation of ours from beginning to end."""
    model = make_model(name, scale, shape.prompt + shape.new)
    ids = random_tokens(scale, shape.batch, shape.prompt)
    return lambda: stamped(model, ids, greedy(shape.new)).total


def gpt2_prefill(model: Any, scale: Scale, shape: Shape) -> float:
    """Seconds up to the first token."""
    return stamped(model, random_tokens(scale, shape.batch, shape.prompt), greedy(1)).prefill


def gpt2_decode(model: Any, shape: Shape, *, static: bool, compiled: bool, smoke: bool) -> float:
    """Seconds for all tokens behind the first: steps at some places, and the trapezoidal rule between them."""
    places = [round(index * shape.new / (shape.points - 1)) for index in range(shape.points)]
    room, found = shape.new + shape.steps, []
    config = compile_config(smoke=smoke) if compiled else None
    for place in places:
        # a static cache has one size for all places, so that nothing is compiled anew
        left = room - place if static else shape.steps
        cache = filled_cache(model, shape.batch, shape.prompt + place, left, static=static)
        decoder = Decoder(model, cache, compiled=config)
        decoder.run()
        found.append(cpu_time(decoder.run, shape.steps) / shape.steps)
    spans = zip(pairwise(places), pairwise(found), strict=True)
    mean = sum((b - a) * (x + y) / 2 for (a, b), (x, y) in spans) / shape.new
    return mean * (shape.new - 1)


def cases(scale: Scale, shape: Shape, *, smoke: bool) -> dict[str, Callable[[], float]]:
    """The parts of a generation by GPT-2, and whole ones of ours."""
    model = make_model(GPT2, scale, shape.prompt + shape.new + shape.steps)
    found: dict[str, Callable[[], float]] = {PREFILL: partial(gpt2_prefill, model, scale, shape)}
    for name, static, compiled in ((GPT2, False, False), (GPT2_STATIC, True, False), (GPT2_COMPILED, True, True)):
        found[name] = partial(gpt2_decode, model, shape, static=static, compiled=compiled, smoke=smoke)
    return found | {EXACT: whole(EXACT, scale, shape), MODAL: whole(MODAL, scale, shape)}


def totals(found: Comparison) -> Comparison:
    """Whole generations: the prefill of GPT-2 added to its steps."""
    seconds = found.seconds
    prefill = seconds[PREFILL]
    added = {name: [a + b for a, b in zip(prefill, seconds[name], strict=True)] for name in GPT2S}
    return Comparison(added | {name: seconds[name] for name in (EXACT, MODAL)})


def section(settings: Settings) -> Page:
    """Three rounds or more."""
    scale, shape = (TINY, SMOKE_SHAPE) if settings.smoke else (FULL, SHAPE)
    with compiled_anew():
        parts = compare_runs(settings, cases(scale, shape, smoke=settings.smoke), warm=False)
    found = totals(parts)
    base, tokens = fastest(found, GPT2S), shape.batch * shape.new
    rows = [
        (name, f"{found.milliseconds(name) / 1e3:.1f}", f"{tokens / found.milliseconds(name) * 1e3:.0f}")
        for name in (*GPT2S, EXACT, MODAL)
    ]
    goals = [
        (one, str(ratio := found.ratio(MODAL, one)), goal, reached(ratio, goal))
        for one, goal in ((base, GOAL_GPT2), (EXACT, GOAL_EXACT))
    ]
    return [
        "## Long prompts",
        f"Batch {shape.batch}, prompt {shape.prompt}, {shape.new} new tokens, prefill included, {found.rounds} "
        f"rounds. Ours run through generate() from beginning to end; the exact model takes tiles by itself. GPT-2's "
        f"prefill through generate() is whole. Its steps are raw forward calls with random keys and values, "
        f"{shape.steps} of them at each of {shape.points} places, and the trapezoidal rule gives those between: all "
        f"would take minutes a run, and the sampling loop, which is not in them, would only add to its time.",
        "",
        *markdown_table(["model", "CPU seconds", "new tokens/s"], rows),
        "",
        f"Prefill of GPT-2: {parts.milliseconds(PREFILL) / 1e3:.1f} s, over itself (control) {parts.control}.",
        "",
        *markdown_table(["theirs", f"theirs / {MODAL}", "goal", "reached"], goals),
    ], {}
