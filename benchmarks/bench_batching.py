"""What exactness costs: masks, packing, and float64 sums on a CPU, on a model of width 256 with 4 layers.

    python -m benchmarks.bench_batching            (about 6 minutes; --smoke: seconds, page in runs/smoke)

CPU seconds of forward and of forward and backward, one thread, medians of shuffled rounds, relative to a reference
that is measured twice under two names: where these two differ, so do all others by chance. A dense batch is compared
with itself under a mask of ones; 32 documents packed in one row with the same documents padded in 32 rows, and with
the same row as if it were one document; float64 sums with float32 ones (`torch.set_float32_matmul_precision("high")`).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from evaluation.exactness.models import Subject, relative_error
from hyena_hf import HyenaConfig, HyenaForCausalLM


MODELS = {"Hyena": ["hyena"] * 4, "hybrid": ["hyena", "full_attention", "hyena", "hyena"]}


@dataclass(frozen=True)
class Call:
    """One way to run a batch."""

    inputs: Mapping[str, Tensor]
    precision: str = "highest"


def documents(smoke: bool) -> list[Tensor]:
    """32 documents of 16 to 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    count, longest = (4, 24) if smoke else (32, 256)
    lengths = torch.randint(16, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, 260, (length,), generator=generator) for length in lengths]


def calls(smoke: bool) -> dict[str, dict[str, Call]]:
    """The cases of each table; the first one is the reference."""
    parts = documents(smoke)
    dense = torch.randint(0, 260, (2, 32) if smoke else (8, 512), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    packed = torch.cat(parts)[None]
    ones = torch.ones_like(dense)
    return {
        f"dense batch, {dense.shape[0]} rows of {dense.shape[1]} tokens": {
            "no mask": Call({"input_ids": dense}),
            "no mask again (control)": Call({"input_ids": dense}),
            "mask of ones": Call({"input_ids": dense, "attention_mask": ones}),
            "float32 sums": Call({"input_ids": dense}, "high"),
        },
        f"{len(parts)} documents, {packed.shape[1]} tokens": {
            f"padded, {padded.numel()} cells": Call({"input_ids": padded, "attention_mask": mask}),
            "padded again (control)": Call({"input_ids": padded, "attention_mask": mask}),
            "padded, taken as dense (wrong)": Call({"input_ids": padded}),
            "packed": Call({"input_ids": packed, "position_ids": positions}),
            "packed, taken as one document (wrong)": Call({"input_ids": packed}),
        },
    }


def cpu_seconds(model: HyenaForCausalLM, call: Call, train: bool) -> float:
    """CPU time of one call."""
    torch.set_float32_matmul_precision(call.precision)
    model.zero_grad()
    start = time.process_time()
    with torch.set_grad_enabled(train):
        logits = model(**call.inputs, use_cache=False).logits
        if train:
            logits.logsumexp(-1).mean().backward()
    return time.process_time() - start


def measure(run: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Times of every case in every round; each round has its own order, and the first one is not counted."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in run}
    for number in tqdm(range(rounds + 1), leave=False):
        for name in order.sample(list(run), len(run)):
            seconds = run[name]()
            if number:
                times[name].append(seconds)
    return times


def errors(seeds: int) -> list[str]:
    """What float64 sums buy: largest relative differences of float32 logits of small models with strong weights."""
    rows = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for name in ("Hyena order 2", "Hyena order 3", "MultiHyena", "Hyena hybrid"):
            own, prefix, causal = [], [], []
            for seed in range(seeds):
                subject = Subject(name, seed=seed)
                for length in (45, 131, 251):
                    ids = torch.randint(0, 97, (length + 7,), generator=torch.Generator().manual_seed(length))
                    truth, error = subject.alone(ids[:length])
                    own.append(error)
                    prefix.append(relative_error(subject.alone(ids)[0][:length], truth))
                    changed = ids[:length].clone()
                    changed[length // 2] = (changed[length // 2] + 1) % 97
                    before = slice(length // 2)
                    causal.append(relative_error(subject.alone(changed)[0][before], truth[before]))
            rows.append((precision, name, *(f"{max(values):.1e}" for values in (own, prefix, causal))))
    columns = ["precision", "model", "own error, against float64", "seven more tokens behind", "a later token changed"]
    return ["", f"## Float64 sums, float32 logits, worst of {seeds} seeds", "", *markdown_table(columns, rows)]


def page(rounds: int, smoke: bool) -> list[str]:
    """All tables."""
    lines = [f"Medians of {rounds} rounds, one thread, CPU seconds; ratio to the first row of the same columns."]
    for title, cases in calls(smoke).items():
        columns, rows = ["case"], {name: [name] for name in cases}
        for label, layer_types in MODELS.items():
            torch.manual_seed(0)
            config = HyenaConfig(
                vocab_size=260,
                hidden_size=32 if smoke else 256,
                num_hidden_layers=4,
                intermediate_size=1024,
                max_position_embeddings=2048,
                layer_types=layer_types,
            )
            model = HyenaForCausalLM(config)
            for train in (False, True):
                run = {
                    name: lambda m=model, call=call, train=train: cpu_seconds(m, call, train)
                    for name, call in cases.items()
                }
                times = measure(run, rounds)
                base = median(times[next(iter(cases))])
                columns.append(f"{label}, {'forward and backward' if train else 'forward'}")
                for name, values in times.items():
                    rows[name].append(f"{median(values):.3f} s, {median(values) / base:.2f}")
        lines += ["", f"## {title}", "", *markdown_table(columns, rows.values())]
    return lines + errors(1 if smoke else 3)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case (default 3)")
    parser.add_argument("--smoke", action="store_true", help="tiny model, 2 rounds, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds ({arguments.rounds}) must be at least 1")
    torch.set_num_threads(1)
    lines = page(2 if arguments.smoke else arguments.rounds, arguments.smoke)
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    path = write_result("batching", "What exact batching costs", command_line("bench_batching"), lines, folder=folder)
    print(path.read_text())


if __name__ == "__main__":
    main()
