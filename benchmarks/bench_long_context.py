"""A million tokens in bounded memory: scoring in chunks and training with checkpoints, of a HyenaDNA-tiny-sized model.

    python -m benchmarks.bench_long_context                  (--smoke: short inputs, page in runs/smoke)
    python -m benchmarks.bench_long_context --only scoring   (that section alone; the others stay on the page)

The model has the sizes of hyenadna-tiny (Nguyen et al. 2023, arXiv 2306.15794: 2 layers, width 128, vocabulary 16)
with filters of 1,048,576 taps and random weights. Every measurement has a process of its own with one thread; memory
is the peak of resident memory above weights and input, seconds are CPU time of the one call that is measured.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import markdown_table
from benchmarks.timing import Call, Peak, Settings, memory_plot, run_sections
from hyena_hf import HyenaConfig, HyenaForCausalLM


Page = tuple[list[str], dict[str, Figure]]

VOCABULARY, MILLION = 16, 1 << 20
CHUNK, ONE_SHOT, TRAINED = 65_536, 65_536, 131_072
SCORED = (65_536, 262_144, MILLION)
CHUNKS = (16_384, 262_144)
ONE_SHOT_LENGTHS = (65_536, 262_144)
LIMIT, TRAINING_LIMIT = 4096, 16384  # MiB


def make_model(max_length: int) -> HyenaForCausalLM:
    """Random weights, the same in every process."""
    torch.manual_seed(0)
    config = HyenaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=512,
        max_position_embeddings=max_length,
        filter_num_bands=2,
        sine_frequency=10.0,
    )
    return HyenaForCausalLM(config)


def random_tokens(length: int) -> Tensor:
    """One row."""
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def log_likelihood(model: HyenaForCausalLM, ids: Tensor, chunk_length: int) -> float:
    """Of every token but the first, given all before it."""
    total, start = 0.0, 0
    for output in model.stream(ids, chunk_length=chunk_length):
        assert output.logits is not None  # noqa: S101 (narrows the type)
        following = ids[:, start + 1 : start + 1 + output.logits.shape[1]]
        chosen = output.logits[:, : following.shape[1]].log_softmax(-1).gather(-1, following.unsqueeze(-1))
        total += chosen.double().sum().item()
        start += output.logits.shape[1]
    return total


def prepare_scoring(max_length: int, length: int, chunk_length: int) -> Call:
    """The likelihood of a sequence in chunks, for `peak_memory`."""
    log_likelihood(make_model(256), random_tokens(256), 128)  # what a first call loads
    model, ids = make_model(max_length).eval(), random_tokens(length)
    return lambda: log_likelihood(model, ids, chunk_length)


def prepare_one_shot(max_length: int, length: int) -> Call:
    """The logits of a whole sequence at once, for `peak_memory`."""
    prepare_scoring(256, 256, 256)()
    model, ids = make_model(max_length).eval(), random_tokens(length)

    def call() -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    return call


def prepare_training(max_length: int, length: int) -> Call:
    """Gradients of the loss with gradient checkpointing, for `peak_memory`."""

    def step(model: HyenaForCausalLM, ids: Tensor) -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    small = make_model(256)
    step(small, random_tokens(256))
    model, ids = make_model(max_length).train(), random_tokens(length)
    model.gradient_checkpointing_enable()
    return lambda: step(model, ids)


def difference(max_length: int, length: int, chunk_length: int) -> tuple[float, float]:
    """Logits in chunks against the forward of the whole: relative RMS, and largest difference over largest logit."""
    model, ids = make_model(max_length).eval(), random_tokens(length)
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits
    parts = [output.logits for output in model.stream(ids, chunk_length=chunk_length)]
    found = torch.cat([part for part in parts if part is not None], dim=1)
    off = found - truth
    return float(off.norm() / truth.norm()), float(off.abs().max() / truth.abs().max())


def cells(peak: Peak | None) -> tuple[str, str]:
    """Of a table."""
    return ("-", "-") if peak is None else (f"{peak.mebibytes:.0f}", f"{peak.seconds:.1f}")


def scoring(settings: Settings) -> Page:
    """Memory and time over length and chunk."""
    longest, chunk = (2048, 512) if settings.smoke else (MILLION, CHUNK)
    lengths, chunks, whole = ((2048,), (256,), (1024,)) if settings.smoke else (SCORED, CHUNKS, ONE_SHOT_LENGTHS)
    runs = [(length, chunk) for length in lengths] + [(longest, other) for other in chunks]
    rows, peaks = [], {f"chunks of {chunk:,}": {}, "at once": {}}
    for length, own in tqdm(runs, desc="chunks"):
        peak = settings.peak_memory(prepare_scoring, longest, length, own)
        rows.append((f"{length:,}", f"{own:,}", *cells(peak)))
        if own == chunk and peak is not None:
            peaks[f"chunks of {chunk:,}"][length] = peak.mebibytes
    for length in tqdm(whole, desc="at once"):
        peak = settings.peak_memory(prepare_one_shot, longest, length)
        rows.append((f"{length:,}", "all at once", *cells(peak)))
        if peak is not None:
            peaks["at once"][length] = peak.mebibytes
    lines = ["## Scoring in chunks", f"`model.stream`. Goal at {MILLION:,} tokens: below {LIMIT} MiB.", ""]
    lines += markdown_table(["tokens", "chunk", "peak, MiB", "seconds"], rows)
    return lines, {"memory": memory_plot(peaks, "Scoring a sequence, 2 layers of width 128")}


def exactness(settings: Settings) -> Page:
    """Chunks against the whole."""
    longest, length = (2048, 1024) if settings.smoke else (MILLION, ONE_SHOT)
    rows = []
    for chunk in tqdm((length // 8, length // 4 + 1, length // 2), desc="exactness"):
        rms, largest = settings.in_subprocess(difference, longest, length, chunk)
        rows.append((f"{length:,}", f"{chunk:,}", f"{rms:.1e}", f"{largest:.1e}"))
    lines = ["## Chunks against the whole", "Differences of logits. Goal: 1e-5.", ""]
    columns = ["tokens", "chunk", "relative RMS", "largest, over the largest logit"]
    return [*lines, *markdown_table(columns, rows)], {}


def training(settings: Settings) -> Page:
    """A step with checkpoints."""
    longest, lengths = (2048, (1024,)) if settings.smoke else (MILLION, (32_768, TRAINED))
    rows = [
        (f"{length:,}", *cells(settings.peak_memory(prepare_training, longest, length)))
        for length in tqdm(lengths, desc="training")
    ]
    note = f"Gradients of the loss, gradient checkpointing. Goal at {TRAINED:,} tokens: below {TRAINING_LIMIT} MiB."
    return ["## Training", note, "", *markdown_table(["tokens", "peak, MiB", "seconds"], rows)], {}


SECTIONS = {"scoring": scoring, "exactness": exactness, "training": training}


if __name__ == "__main__":
    run_sections("long_context", "A million tokens in bounded memory", __doc__, SECTIONS)
