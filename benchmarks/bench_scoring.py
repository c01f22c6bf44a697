"""Scores and embeddings: the same in any batch, what sorting by length saves, a million tokens, a whole genome.

    python -m benchmarks.bench_scoring                   (--smoke: short inputs, page in runs/smoke)
    python -m benchmarks.bench_scoring --only batching   (that section alone; the others stay on the page)

The model has the sizes of hyenadna-tiny (Nguyen et al. 2023, arXiv 2306.15794: 2 layers, width 128) and random
weights; sequences are random bases. One thread of a CPU.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Call, Peak, Settings, memory_plot, ratio_table, run_sections
from hyena_hf import HyenaConfig, HyenaForCausalLM, HyenaNucleotideTokenizer
from hyena_hf.scoring import embed, score
from hyena_hf.scoring.batching import BUDGETS, plan
from training.processes import run_measured


Page = tuple[list[str], dict[str, Figure]]

MILLION, GENOME, WINDOW = 1 << 20, 4_900_000, 16_384
SCORED = (65_536, 262_144, MILLION)
LIMIT = 6 * 1024  # MiB, of a genome in one command
TOKENIZER = HyenaNucleotideTokenizer()


def make_model(max_length: int, layers: Sequence[str] = ("hyena", "hyena")) -> HyenaForCausalLM:
    """Random weights, the same in every process, large enough that no token is as likely as another."""
    torch.manual_seed(0)
    config = HyenaConfig(
        vocab_size=12,
        pad_token_id=4,
        hidden_size=128,
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=max_length,
        filter_num_bands=2,
        sine_frequency=10.0,
        initializer_range=0.2,
    )
    return HyenaForCausalLM(config).eval()


def bases(*lengths: int) -> list[str]:
    """Random sequences, the same in every process."""
    draw = random.Random(0)
    return ["".join(draw.choices("ACGT", k=length)) for length in lengths]


def mixed_lengths(count: int, longest: int) -> list[int]:
    """Log-uniform from 32."""
    draw = random.Random(1)
    return [int(32 * (longest / 32) ** draw.random()) for _ in range(count)]


# the same in any batch


def sliced_mean(model: HyenaForCausalLM, sequences: Sequence[str]) -> np.ndarray:
    """Means as evo2's released scorer takes them, by its formula.

    The batch is padded on the right without a mask, and of every row the first n of its next-token log-probabilities
    are averaged, n being the tokens of the sequence. A row has n - 1 of its own: behind them follows that of padding,
    wherever a longer sequence leaves room for one.
    """
    rows = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in sequences]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=4)
    with torch.no_grad():
        logs = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    return np.array([log[: len(row)].mean().item() for log, row in zip(logs.squeeze(-1), rows, strict=True)])


def invariance(settings: Settings) -> Page:
    """Scores alone against scores in batches."""
    sequences = bases(*mixed_lengths(6, 64) if settings.smoke else mixed_lengths(32, 2048))
    lines = ["## The same alone and in any batch"]
    lines += [f"{len(sequences)} sequences of {min(map(len, sequences))} to {max(map(len, sequences))} bases. Mean "]
    lines[-1] += "log-likelihood of each alone, and in one batch of all; largest difference. Goal: 1e-5."
    rows = []
    for name, layers in {"Hyena": ("hyena", "hyena"), "hybrid": ("hyena", "full_attention")}.items():
        model = make_model(2048, layers)
        methods = {
            "score, one batch of all": lambda group, m=model: score(
                m, TOKENIZER, group, reduction="mean", batch_size=len(group)
            ),
            "score, automatic batches": lambda group, m=model: score(m, TOKENIZER, group, reduction="mean"),
            "score, chunks of 100 tokens": lambda group, m=model: score(
                m, TOKENIZER, group, reduction="mean", chunk_length=100 if len(group) > 1 else 1 << 16
            ),
            "slice that counts log p(pad), as evo2's released scorer": lambda group, m=model: sliced_mean(m, group),
        }
        for method, call in methods.items():
            alone = np.concatenate([call([text]) for text in sequences])
            off = np.abs(call(sequences) - alone)
            worst = int(off.argmax())
            together = call(sequences)[worst]
            cells = f"{alone[worst]:.4f}", f"{together:.4f}", f"{off.max():.1e}"
            rows.append((name, method, len(sequences[worst]), *cells))
    columns = ["model", "scorer", "bases of the worst", "alone", "in the batch", "largest difference"]
    return [*lines, "", *markdown_table(columns, rows)], {}


# batches


def cells(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Tokens of batches, padding included."""
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def batching(settings: Settings) -> Page:
    """Time and padding of batches in the order of the file, sorted, and by budget."""
    count, longest, size = (12, 128, 4) if settings.smoke else (128, 4096, 16)
    lengths = mixed_lengths(count, longest)
    sequences, model = bases(*lengths), make_model(longest)
    tokens = [length + 1 for length in lengths]
    ordered = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    batches = {
        f"{size} in the order of the file": ordered,
        f"{size} sorted by length": plan(tokens, rows=size, tokens=None),
        "automatic": plan(tokens, rows=None, tokens=BUDGETS["cpu"]),
        "one by one": [[index] for index in range(count)],
    }
    in_order, by_size, automatic, alone = batches
    cases: dict[str, Call] = {
        in_order: lambda: [
            score(model, TOKENIZER, sequences[start : start + size], batch_size=size)
            for start in range(0, count, size)
        ],
        by_size: lambda: score(model, TOKENIZER, sequences, batch_size=size),
        automatic: lambda: score(model, TOKENIZER, sequences),
        alone: lambda: score(model, TOKENIZER, sequences, batch_size=1),
    }
    found = settings.compare(cases)
    rows = [
        (
            name,
            len(parts),
            f"{1 - sum(tokens) / cells(tokens, parts):.0%}",
            f"{sum(tokens) / found.milliseconds(name):,.0f}",
        )
        for name, parts in batches.items()
    ]
    lines = ["## Batches"]
    lines += [f"{count} sequences, log-uniform from 32 to {longest} bases, {sum(tokens):,} tokens with [CLS].", ""]
    lines += markdown_table(["batches", "how many", "padding", "thousand tokens a second"], rows)
    lines += ["", f"Time of '{in_order}' over that of others, quartiles; the control is that case again.", ""]
    return lines + ratio_table(["tokens"], {(f"{sum(tokens):,}",): found}, means=False), {}


# memory


def prepare(what: str, length: int) -> Call:
    """One sequence scored or embedded, for `peak_memory`."""
    call = score if what == "score" else embed
    call(make_model(256), TOKENIZER, bases(300), chunk_length=128)  # what a first call loads
    model, text = make_model(max(length, 256)), bases(length)
    return lambda: call(model, TOKENIZER, text)


def memory(settings: Settings) -> Page:
    """Peak of one long sequence."""
    lengths, longest = ((2048,), 2048) if settings.smoke else (SCORED, MILLION)
    rows, peaks = [], {"score": {}, "embed": {}}
    for what, length in tqdm([*(("score", length) for length in lengths), ("embed", longest)], desc="memory"):
        peak: Peak | None = settings.peak_memory(prepare, what, length)
        if peak is not None:
            peaks[what][length] = peak.mebibytes
            rows.append((what, f"{length:,}", f"{peak.mebibytes:.0f}", f"{peak.seconds:.1f}"))
    lines = ["## One long sequence", "In chunks of 65,536 tokens; peak above weights and text, CPU seconds.", ""]
    return [*lines, *markdown_table(["call", "bases", "peak, MiB", "seconds"], rows)], {
        "memory": memory_plot(peaks, "One sequence, 2 layers of width 128")
    }


# a genome


def genome(settings: Settings) -> Page:
    """One command over a contig of the size of E. coli's."""
    length, window = (20_000, 1000) if settings.smoke else (GENOME, WINDOW)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        make_model(window + 1).save_pretrained(here / "model")
        TOKENIZER.save_pretrained(here / "model")
        (here / "genome.fa").write_text(f">chromosome\n{bases(length)[0]}\n")
        words = ["embed", here / "model", here / "genome.fa", here / "out", "--windows", window]
        program = (
            "import sys, torch; torch.set_num_threads(1); from hyena_hf.cli import embed; import argparse\n"
            "p = argparse.ArgumentParser(); embed.add_parser(p.add_subparsers()); a = p.parse_args(); a.run(a)"
        )
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        code, peak = run_measured([sys.executable, "-c", program, *map(str, words)], here / "log")
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if code:
            raise RuntimeError((here / "log").read_text()[-2_000:])
        parts = len(list((here / "out").glob("part-*")))
    row = (
        f"{length:,}",
        f"{window:,}",
        parts,
        f"{peak / 2**20:,.0f}",
        f"{after.ru_utime - before.ru_utime:.0f}",
        f"{wall:.0f}",
    )
    lines = [
        "## A genome in one command",
        "`hyena embed MODEL genome.fa OUT --windows N`. Peak of resident memory of ",
    ]
    lines[-1] += f"the whole process, CPU seconds, wall seconds with whatever else ran. Goal: below {LIMIT:,} MiB."
    return [*lines, "", *markdown_table(["bases", "window", "parts", "peak, MiB", "CPU, s", "wall, s"], [row])], {}


SECTIONS = {"invariance": invariance, "batching": batching, "memory": memory, "genome": genome}


if __name__ == "__main__":
    run_sections("scoring", "Scores and embeddings", __doc__, SECTIONS)
