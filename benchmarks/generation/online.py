"""Section `online`: the exact sum over all inputs beside tiles, one convolution alone, then a whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.report import markdown_table
from benchmarks.timing import Call, Comparison, Settings, ratio_plot, ratio_table
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.cache import ExactHistory, History, OnlineTiles, Taps

from .figures import Page


HISTORY, ONLINE = "history", "online"
WIDTH, LONGEST = 320, 16384
LENGTHS = (64, 128, 192, 256, 384, 512, 1024, 2048, 4096, LONGEST)
SMOKE_WIDTH, SMOKE_LENGTHS = 8, (64, 200)
MODEL = {"vocab_size": 4096, "hidden_size": WIDTH, "num_hidden_layers": 6, "intermediate_size": 4 * WIDTH}
SMOKE_MODEL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
PROMPT = 32


class StoredFilter:
    """Taps (1, D, K) as a cache asks a filter for them."""

    support = max_length = None

    def __init__(self, h: Tensor) -> None:
        self.h = h

    def __call__(self, length: int) -> Tensor:
        return self.h[..., :length]

    exact_taps = __call__


@dataclass(frozen=True)
class Operator:
    """One long convolution that is fed token by token."""

    long_filter: StoredFilter
    direct: Tensor
    w: Tensor  # (1, D, L)

    @classmethod
    def random(cls, width: int, length: int) -> Operator:
        """A filter that reaches over the whole length."""
        h = torch.randn(1, width, length) * torch.exp(-torch.arange(length) * 3 / length)
        return cls(StoredFilter(h), torch.randn(width), torch.randn(1, width, length))

    @torch.no_grad()
    def outputs(self, memory: History) -> Tensor:
        """All of them (1, D, L)."""
        taps = Taps(self.w.shape[-1])
        steps = [memory.push(x, None, 0, taps, self.long_filter, 0, self.direct) for x in self.w.split(1, dim=-1)]
        return torch.cat(steps, dim=-1)

    def cases(self) -> dict[str, Callable[[], History]]:
        """What may remember the inputs."""
        length = self.w.shape[-1]
        return {
            HISTORY: lambda: ExactHistory(None, capacity=length),
            ONLINE: lambda: OnlineTiles(capacity=length, ends=True),
        }

    def refuse_difference(self) -> None:
        """No time of a wrong result."""
        truth, found = (self.outputs(make()) for make in self.cases().values())
        error = float((found - truth).norm() / truth.norm())
        if not error < 1e-6:
            raise RuntimeError(f"tiles and the history differ by {error:.1e} relative RMS")

    def calls(self) -> dict[str, Call]:
        """A whole generation by each."""
        return {name: lambda make=make: self.outputs(make()) for name, make in self.cases().items()}


def compare_operators(settings: Settings, width: int, lengths: Sequence[int]) -> dict[tuple, Comparison]:
    """Generations of every length from nothing."""
    found = {}
    for length in tqdm(lengths, desc="one convolution"):
        torch.manual_seed(0)
        operator = Operator.random(width, length)
        if length < LONGEST:
            operator.refuse_difference()
            found[(length,)] = settings.compare(operator.calls())
        else:  # minutes a call
            found[(length,)] = replace(settings, rounds=2).compare(operator.calls(), control=False)
    return found


def bytes_held(width: int, length: int) -> dict[str, int]:
    """Of the inputs and accumulators of one convolution at the end."""
    operator, held = Operator.random(width, length), {}
    for name, make in operator.cases().items():
        operator.outputs(memory := make())
        held[name] = memory.nbytes()
    return held


class Streamed(BaseStreamer):
    """CPU seconds of this process at every token, the prompt first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002 (one interface)
        """A token, or the prompt."""
        self.seconds.append(time.process_time())

    def end(self) -> None:
        """Nothing to do."""

    def milliseconds(self, first: int, last: int) -> float:
        """A token between two of them, mean."""
        return (self.seconds[last] - self.seconds[first]) / (last - first) * 1e3


def random_model(shape: dict[str, int], length: int) -> HyenaForCausalLM:
    """Weights so large that tokens do not repeat soon."""
    torch.manual_seed(0)
    settings = {"max_position_embeddings": length, "initializer_range": 0.1, "tie_word_embeddings": False}
    model = HyenaForCausalLM(HyenaConfig(**shape, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "filter.output" in name:
                parameter.normal_(0, 0.1)
    return model


def generate(model: HyenaForCausalLM, choice: str, prompt: Tensor, new: int) -> tuple[Tensor, Streamed]:
    """The prompt with greedy tokens behind it, and their times."""
    stamps = Streamed()
    config = GenerationConfig(max_new_tokens=new, do_sample=False, decode_cache=choice)
    ids: Any = model.generate(prompt, generation_config=config, streamer=stamps)  # pyright: ignore
    return ids, stamps


@torch.no_grad()
def tokens_of_the_forward_pass(model: HyenaForCausalLM, ids: Tensor) -> int:
    """How many tokens behind the prompt, from the first on, are those that the whole input at once would choose."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[:, PROMPT - 1 :]
    chosen = torch.cat([model.lm_head(part).argmax(-1) for part in hidden.split(1024, dim=1)], dim=1)
    return int((chosen == ids[:, PROMPT:]).long().cumprod(1).sum())


def model_lines(shape: dict[str, int], new: int, steps: int) -> list[str]:
    """One generation by tiles, and by a history at some places of it."""
    model = random_model(shape, new + PROMPT)
    prompt = torch.randint(model.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    generate(model, HISTORY, prompt, 4)
    ids, ours = generate(model, ONLINE, prompt, new)
    rows, same, found = [], 0, []
    for place in tqdm(range(0, new + 1, new // 8), desc="history"):
        first = min(place, new - steps)
        again, theirs = generate(model, HISTORY, ids[:, : PROMPT + first], steps)
        same += int((again == ids[:, : PROMPT + first + steps]).all())
        # the first two stamps are those of the prompt and of the token that it gives
        found.append(theirs.milliseconds(1, steps))
        old, tiles = found[-1], ours.milliseconds(max(first - new // 16, 1), min(first + new // 16, new))
        rows.append((first, f"{old:.2f}", f"{tiles:.2f}", f"{old / tiles:.2f}"))
    mean = sum((a + b) / 2 for a, b in pairwise(found)) / (len(found) - 1)
    tiles = ours.milliseconds(0, new)
    size = ", ".join(f"{key} {value}" for key, value in shape.items())
    return [
        f"A whole model ({model.num_parameters() / 1e6:.1f}M parameters: {size}), greedy generation of {new} tokens "
        f"after {PROMPT} by tiles, one run; the history goes on for {steps} tokens from places of it, and tiles are "
        f"averaged over the {new // 8} tokens around.",
        "",
        *markdown_table(["tokens before", f"{HISTORY}, ms", f"{ONLINE}, ms", "ratio"], rows),
        "",
        f"Of {new} tokens, {len(ids.unique())} of them distinct, the first {tokens_of_the_forward_pass(model, ids)} "
        f"are those that one forward pass over all of them chooses; the history goes on with the same tokens at "
        f"{same} of {len(rows)} places.",
        "",
        f"Whole decode step, mean over the generation (of the history by the trapezoidal rule, filter and fold "
        f"included for tiles): {mean:.2f} ms over {tiles:.2f} ms, {mean / tiles:.2f}. Goal: 2, tokens identical.",
    ]


def section(settings: Settings) -> Page:
    """Tiles beside the sum over all inputs."""
    width, lengths = (SMOKE_WIDTH, SMOKE_LENGTHS) if settings.smoke else (WIDTH, LENGTHS)
    found = compare_operators(settings, width, lengths)
    ratios = {length: one.ratio(ONLINE) for (length,), one in found.items()}
    crossover = next((length for length in lengths if all(ratios[n].low > 1 for n in lengths if n >= length)), None)
    held = bytes_held(width, lengths[-2])
    lines = [
        "## Tiles: generated tokens without a sum over all inputs",
        f"One long convolution of {width} channels, float32, so many tokens generated one by one from nothing; ratio "
        f"of whole generations. Time of the filter is not in it.",
        "",
        *ratio_table(["tokens"], found, means=False),
        "",
        f"At {lengths[-1]} tokens: {ratios[lengths[-1]]}. Goal: 8. Crossover: tiles are faster from {crossover} "
        f"tokens on. After {lengths[-2]} tokens the history holds {held[HISTORY]} bytes, tiles {held[ONLINE]}.",
        "",
        *(model_lines(SMOKE_MODEL, 320, 8) if settings.smoke else model_lines(MODEL, LONGEST, 32)),
    ]
    return lines, {ONLINE: ratio_plot({f"{width} channels": ratios}, "One convolution", "history / tiles, CPU time")}
