"""Sequence-length warm-up: train on short rows first, then on longer ones; only the data change.

    stages = parse_stages(["2e:1024:256", "2e:2048:128", "500:4096:64"])   # DURATION:LENGTH:BATCH

A stage lasts a number of steps, or of epochs (`e`) over the data cut to its length. Its batch is counted in rows of
one optimizer step on each device, so that LENGTH x BATCH x devices is the global batch in tokens: hold that product,
as the published sample does (2 epochs each of 1k x 256, 2k x 128, 4k x 64, 8k x 32, then 4 of 16k x 16 and 32k x 8:
262,144 tokens a step throughout; `hg38_hyena_seqlen_warmup_reload.yaml` of HyenaDNA), or the rows, which makes the
later steps larger. The model is the one of the last stage from the beginning: its filters' time runs over
`max_position_embeddings` whatever the length of a row. One learning-rate schedule spans all stages.

The rows of a run are a function of the seed alone: each epoch of a stage is a permutation of its rows, cut into steps;
what is left over at its end begins the next one, so that all steps are of one size and none is lost.

Source: Nguyen et al. 2023 (HyenaDNA), arXiv:2306.15794.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset


MEGABATCH = 32  # steps whose rows are sorted by length together


class Rows(Protocol):
    """Rows that may differ in length."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """One row."""
        ...


@dataclass(frozen=True)
class Stage:
    """Part of a training run with rows of one length; either steps or epochs say how long it lasts."""

    batch: int  # rows of an optimizer step on each device
    length: int | None = None  # tokens of a row at most; None: rows as they are
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"a stage lasts steps or epochs, got steps={self.steps} and epochs={self.epochs}")
        if self.batch < 1 or (self.steps or self.epochs or 0) <= 0 or (self.length is not None and self.length < 1):
            raise ValueError(f"batch, length and duration of a stage must be positive, got {self}")

    def steps_over(self, rows: int, devices: int = 1) -> int:
        """Optimizer steps of the stage on so many rows."""
        if self.epochs is None:
            return self.steps or 0
        return math.ceil(self.epochs * rows / (self.batch * devices))


_STAGE = re.compile(r"^(?P<duration>\d+|\d+(\.\d+)?e):(?P<length>\d+):(?P<batch>\d+)$")


def parse_stages(texts: Sequence[str]) -> tuple[Stage, ...]:
    """Read stages as they stand on a command line, `STEPS:LENGTH:BATCH` or `EPOCHSe:LENGTH:BATCH`.

    Raises:
        ValueError: a stage of another form, or one whose rows are shorter than those of the stage before.
    """
    stages = []
    for text in texts:
        match = _STAGE.match(text)
        if match is None:
            raise ValueError(
                f"stage {text!r} is not DURATION:LENGTH:BATCH; write e.g. 500:1024:256 for 500 steps of 256 rows of "
                "1024 tokens, or 2e:1024:256 for two epochs of them"
            )
        duration, length, batch = match["duration"], int(match["length"]), int(match["batch"])
        if duration.endswith("e"):
            stages.append(Stage(batch, length, epochs=float(duration[:-1])))
        else:
            stages.append(Stage(batch, length, steps=int(duration)))
        if len(stages) > 1 and length < (stages[-2].length or 0):
            raise ValueError(
                f"stage {text!r} has shorter rows than the one before ({stages[-2].length}); lengths grow"
            )
    return tuple(stages)


class StagedRows(Dataset[dict[str, torch.Tensor]]):
    """The rows of every stage; an index is (stage, row)."""

    def __init__(self, rows: Sequence[Rows]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        """Rows of all stages together."""
        return sum(map(len, self.rows))

    def __getitem__(self, index: tuple[int, int]) -> dict[str, torch.Tensor]:
        """One row of one stage."""
        stage, row = index
        return self.rows[stage][row]


class StepBatches:
    """Batch sampler of a whole run over `StagedRows`: for every step, one batch of indices for each device.

    Args:
        rows: those of every stage.
        stages: how they are batched and for how long.
        seed: decides all permutations.
        devices: processes among which the batches are dealt in turn.
        lengths: of the rows of every stage; given, rows of like length share a step (within 32 steps) and less is
            padding.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        stages: Sequence[Stage],
        *,
        seed: int,
        devices: int = 1,
        lengths: Sequence[torch.Tensor] | None = None,
    ) -> None:
        if len(rows) != len(stages):
            raise ValueError(f"{len(rows)} sets of rows for {len(stages)} stages; give one for each")
        for number, part in enumerate(rows, start=1):
            if not len(part):
                raise ValueError(f"stage {number} has no rows")
        self.stages = tuple(stages)
        self.sizes = [len(part) for part in rows]
        self.steps = [stage.steps_over(size, devices) for stage, size in zip(stages, self.sizes, strict=True)]
        self.seed, self.devices, self.lengths = seed, devices, lengths

    def __len__(self) -> int:
        """Batches: steps times devices."""
        return sum(self.steps) * self.devices

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches in their order; those of one step stand together."""
        for number, stage in enumerate(self.stages):
            for step in itertools.islice(self._steps_of(number), self.steps[number]):
                for begin in range(0, len(step), stage.batch):
                    yield [(number, row) for row in step[begin : begin + stage.batch]]

    def epochs_after(self, step: int) -> float:
        """Passes over the data that so many steps of the run have made."""
        epochs = 0.0
        for stage, steps, size in zip(self.stages, self.steps, self.sizes, strict=True):
            epochs += min(step, steps) * stage.batch * self.devices / size
            step -= min(step, steps)
        return epochs

    def ends(self) -> list[int]:
        """The last step of every stage."""
        return list(itertools.accumulate(self.steps))

    def _steps_of(self, number: int) -> Iterator[list[int]]:
        """Rows of one step after another, without end."""
        size = self.stages[number].batch * self.devices
        left: list[int] = []
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(_seed_of(self.seed, number, epoch))
            order = left + torch.randperm(self.sizes[number], generator=generator).tolist()
            whole = len(order) - len(order) % size
            left = order[whole:]
            yield from self._cut(order[:whole], size, number, generator)

    def _cut(self, order: list[int], size: int, number: int, generator: torch.Generator) -> Iterator[list[int]]:
        if self.lengths is None:
            yield from (order[begin : begin + size] for begin in range(0, len(order), size))
            return
        lengths = self.lengths[number]
        for begin in range(0, len(order), size * MEGABATCH):
            together = sorted(order[begin : begin + size * MEGABATCH], key=lambda row: int(lengths[row]))
            steps = [together[first : first + size] for first in range(0, len(together), size)]
            for step in torch.randperm(len(steps), generator=generator).tolist():
                yield steps[step]


def _seed_of(*numbers: int) -> int:
    """A seed that depends on the numbers alone, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") // 2


def describe(batches: StepBatches, longest: int) -> list[dict[str, Any]]:
    """The stages of a run for its report; tokens of a step are counted over all devices, padding included.

    Args:
        batches: the run.
        longest: tokens of a row where a stage does not say.
    """
    return [
        {
            "steps": steps,
            "length": stage.length or longest,
            "batch": stage.batch,
            "tokens_a_step": (stage.length or longest) * stage.batch * batches.devices,
            "epochs": steps * stage.batch * batches.devices / size,
        }
        for stage, steps, size in zip(batches.stages, batches.steps, batches.sizes, strict=True)
    ]
