"""Compare whole generations: greedy ones, stamped at every token, and rounds of runs that last minutes."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.timing import CONTROL, LEAST_ROUNDS, Comparison, Settings

from .caches import compile_config


class Stamps(StoppingCriteria):
    """CPU seconds of this process at the start and at every token; it stops nothing."""

    def __init__(self) -> None:
        self.seconds = [time.process_time()]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # noqa: ARG002 (its signature)
        self.seconds.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    @property
    def prefill(self) -> float:
        """Seconds up to the first token."""
        return self.seconds[1] - self.seconds[0]

    @property
    def per_token(self) -> float:
        """Seconds for a token behind the first."""
        return (self.seconds[-1] - self.seconds[1]) / (len(self.seconds) - 2)

    @property
    def total(self) -> float:
        """Seconds of it all."""
        return self.seconds[-1] - self.seconds[0]


def greedy(
    new: int, *, cache: str | None = None, compiled: bool = False, smoke: bool = False, decode_cache: str | None = None
) -> GenerationConfig:
    """So many tokens.

    Args:
        new: Their number.
        cache: What transformers calls a kind of cache; None: as the model likes.
        compiled: Compile steps, which needs a static cache.
        smoke: As in `compile_config`.
        decode_cache: What an exact Hyena keeps; None: as its config says.
    """
    settings: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "disable_compile": not compiled}
    if cache is not None:
        settings["cache_implementation"] = cache
    if compiled:
        settings["compile_config"] = compile_config(smoke=smoke)
    if decode_cache is not None:
        settings["decode_cache"] = decode_cache
    return GenerationConfig(**settings)


def stamped(model: Any, ids: Tensor, config: GenerationConfig, **options: Any) -> Stamps:
    """The times of one generation."""
    stamps = Stamps()
    model.generate(ids, generation_config=config, stopping_criteria=StoppingCriteriaList([stamps]), **options)
    return stamps


def compare_runs(
    settings: Settings, cases: Mapping[str, Callable[[], float]], *, warm: bool = True, control: bool = True
) -> Comparison:
    """Runs that tell the seconds that count; each lasts so long that bursts gain nothing.

    Args:
        settings: Rounds, and seconds for all of them; at least three rounds but for smoke.
        cases: What to run, by name; the first is the base.
        warm: One round before, which does not count.
        control: Measure the first case a second time.
    """
    calls = dict(cases)
    if warm:
        for call in cases.values():
            call()
    if control:
        calls[CONTROL] = next(iter(cases.values()))
    order, found, start = random.Random(0), {name: [] for name in calls}, time.perf_counter()
    least = min(settings.rounds, LEAST_ROUNDS)
    for done in range(settings.rounds):
        if done >= least and time.perf_counter() - start > settings.budget:
            break
        for name in order.sample(list(calls), len(calls)):
            gc.collect()
            found[name].append(calls[name]())
    return Comparison(found)
