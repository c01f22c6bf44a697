"""Trained models, distilled: what held-out data say of it, beside other filters that cost or err as much.

    python -m benchmarks.bench_distilled           (40 minutes on one core, most of it training; --smoke: seconds)
    python -m benchmarks.bench_distilled --only plain recall

Language models: the demo's Hyena, plain and with MultiHyena heads, on its text and with its recipe. Recall: as in
bench_recall, but longer, and tested on those sequences whose question is about a key last shown more than 32 tokens
before. Long filters are replaced by:

- distilled: `hyena_hf.distillation.distill`, d states.
- first taps: the model's own taps as far back as inputs that take the memory of these states. A recurrence keeps d
  numbers a channel, and d P in heads of P channels (one state for each product of a key and a value); a filter that
  ends keeps K - 1 inputs of one number a channel, and of two (key and value) in heads.
- white error: the taps plus Gaussian noise of the same l2 norm as the error of the fit, filter by filter.
- no taps: lag 0 and the operator's own skip alone.

Trainings go on where they were stopped and are not repeated, nor are fits; a score is not counted twice for the same
weights. All are kept in runs/distilled: delete its fits-* folders after changing how filters are fitted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks import recall
from benchmarks.bench_recall import MODELS
from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from benchmarks.training_runs import rate_factor
from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.distillation import distill
from training import demo
from training.demo_models import hyena_config
from training.parameter_groups import get_parameter_groups
from training.recipe import write_json
from training.synthetic import recall_sequences


Score = Callable[[HyenaForCausalLM, Tensor], float]
Change = Callable[[int, Tensor], Tensor]  # of a layer's taps (1, H, L)

SEEDS = (0, 1, 2)
HEADS = 32  # of the MultiHyena: 4 channels each
STATES = (8, 16, 32)
RECALL_STATES = (2, 4, 8, 16, 32)
SHORT = 32  # taps that must not be enough for recall
LEAST_CHANGE, LEAST_SHARE, MOST_SHORT = 0.005, 0.995, 0.6  # the goals
DATA_SEED = 2000
PLAN = demo.Plan()
DISTILLED, FIRST_TAPS, WHITE = "distilled", "first taps", "white error"


@dataclass(frozen=True)
class Amounts:
    """How much of everything."""

    folder: Path = Path("runs/distilled")
    plan: demo.Plan = PLAN
    heads: int = HEADS
    states: tuple[int, ...] = STATES
    recall_states: tuple[int, ...] = RECALL_STATES
    rows: int = 200  # of held-out text
    vocab_size: int = 20  # 9 keys
    length: int = 96
    recall_steps: int = 1500
    sequences: int = 2000
    draws: int = 2  # of white error


SMOKE = Amounts(SMOKE_RESULTS / "distilled", demo.SMOKE, 8, (2, 4), (2, 4), 20, 10, 40, 4, 20, 1)


@dataclass(frozen=True)
class Trained:
    """A trained model, where it is kept, and how it is scored on which rows of tokens."""

    model: HyenaForCausalLM
    folder: Path
    rows: Tensor
    score: Score


class Row(NamedTuple):
    """One way to filter: numbers that a layer remembers of each sequence, median relative l2 error, score."""

    numbers: int
    error: float
    score: float


Rows = dict[tuple[str, int], Row]  # by name and states (0: whatever the states)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, score, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps, page in runs/smoke")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    amounts = SMOKE if options.smoke else Amounts()
    results = {
        name: [compare(FAMILIES[name](seed, amounts), states_of(name, amounts), amounts.draws) for seed in SEEDS]
        for name in options.only
    }
    folder = SMOKE_RESULTS if options.smoke else RESULTS
    figures = {"scores": plot(results)}
    lines = page(results, amounts)
    path = write_result(
        "distilled", "Trained models, distilled", command_line("bench_distilled"), lines, figures, folder=folder
    )
    print(path.read_text())


def states_of(family: str, amounts: Amounts) -> tuple[int, ...]:
    """Sizes that are tried."""
    return amounts.recall_states if family == "recall" else amounts.states


def language_model(seed: int, amounts: Amounts, heads: int | None = None) -> Trained:
    """The demo's Hyena, or one with heads; its score is the perplexity of held-out text."""
    plan, corpus = amounts.plan, demo.make_corpus(None, amounts.plan)
    described = hyena_config(demo.model_size(plan)).to_diff_dict()
    folder = amounts.folder / f"{f'heads{heads}' if heads else 'plain'}-seed{seed}"
    config = HyenaConfig(**{**described, "num_heads": heads})
    model, _ = demo.train_model(
        folder.name, config, plan, corpus, folder, seed=seed, rate=demo.LEARNING_RATES["hyena"]
    )
    rows = whole_rows(corpus.heldout, plan.length)[: amounts.rows]
    return Trained(cast("HyenaForCausalLM", model), folder, rows, perplexity)


def multi_head_language_model(seed: int, amounts: Amounts) -> Trained:
    """The demo's Hyena with heads."""
    return language_model(seed, amounts, amounts.heads)


def whole_rows(documents: Sequence[bytes], length: int) -> Tensor:
    """Documents cut into rows (R, length) of bytes, without what is left over of each."""
    rows = [
        torch.tensor(list(document)).unfold(0, length, length) for document in documents if len(document) >= length
    ]
    return torch.cat(rows)


@torch.inference_mode()
def perplexity(model: HyenaForCausalLM, rows: Tensor) -> float:
    """Of every token of rows (R, L) but the first, each predicted from its own row."""
    model.eval()
    nats = 0.0
    with model.frozen_filters():
        for ids in rows.split(16):
            logits = model(ids[:, :-1], use_cache=False).logits
            nats += cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nats / rows[:, 1:].numel())


def recall_model(seed: int, amounts: Amounts) -> Trained:
    """The small Hyena of bench_recall on a longer task with more keys; its score is the share of answers right."""
    task = {"vocab_size": amounts.vocab_size, "length": amounts.length}
    fields = {**recall.SIZES, **MODELS["Hyena"], "vocab_size": amounts.vocab_size}
    config = HyenaConfig(**{**fields, "max_position_embeddings": amounts.length + 2})
    settings = recall.Settings("Hyena", 2e-3, seed, amounts.recall_steps)
    folder = amounts.folder / f"recall-seed{seed}"
    made_from = {"task": task, "config": config.to_diff_dict(), "settings": asdict(settings)}
    record = folder / "made_from.json"
    if not (record.exists() and json.loads(record.read_text()) == json.loads(json.dumps(made_from))):
        train_recall(config, settings, task).save_pretrained(folder / "model")
        write_json(record, made_from)
    sequences = far_sequences(np.random.default_rng(DATA_SEED), task, amounts.sequences)
    model = HyenaForCausalLM.from_pretrained(folder / "model")
    return Trained(model, folder, sequences, recall.answer_accuracy)


def far_sequences(rng: np.random.Generator, task: dict[str, int], count: int) -> Tensor:
    """Sequences of recall (count, L + 3) that ask for none of the keys among the last SHORT tokens of the pairs."""
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        drawn = recall_sequences(rng, examples=count, **task)
        late_keys = drawn[:, :-3][:, -SHORT::2]
        found.append(drawn[(late_keys != drawn[:, -2:-1]).all(dim=1)])
    return torch.cat(found)[:count]


def train_recall(config: HyenaConfig, settings: recall.Settings, task: dict[str, int]) -> HyenaForCausalLM:
    """Train on fresh sequences."""
    torch.manual_seed(settings.seed)
    model = HyenaForCausalLM(config)
    groups = get_parameter_groups(model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    rates = {name: getattr(settings, name) for name in ("steps", "warmup", "final_rate")}
    schedule = LambdaLR(optimizer, lambda step: rate_factor(step, **rates))
    data = np.random.default_rng([DATA_SEED, settings.seed])
    for _ in tqdm(range(settings.steps), desc=f"recall, seed {settings.seed}", mininterval=5):
        sequences = recall_sequences(data, examples=settings.batch_size, **task)
        recall.training_step(model, optimizer, sequences)
        schedule.step()
    return model


FAMILIES: dict[str, Callable[[int, Amounts], Trained]] = {
    "plain": language_model,
    "MultiHyena": multi_head_language_model,
    "recall": recall_model,
}


def compare(trained: Trained, sizes: Sequence[int], draws: int) -> Rows:
    """Score a model with its own filters and with all others."""
    model = trained.model
    length, width = model.config.max_position_embeddings, model.config.hidden_size
    channels = width // model.config.num_filters  # P
    kept = 1 if channels == 1 else 2  # numbers of an input
    rows: Rows = {
        ("original", 0): Row(kept * width * (length - 1), 0.0, scored(trained, model)),
        ("no taps", 0): shortened(trained, 1),
        (f"first {SHORT} taps", 0): shortened(trained, SHORT),
    }
    for states in tqdm(sizes, desc=f"{trained.folder.name}, states"):
        student, report = distill(model, state_size=states, work_dir=trained.folder / f"fits-{states}")
        errors = [layer.filters.relative_l2 for layer in report.layers]
        error, numbers = float(torch.cat(errors).median()), states * channels * width
        noisy = [scored(trained, with_taps(model, white_error(errors, seed))) for seed in range(draws)]
        rows[DISTILLED, states] = Row(numbers, error, scored(trained, student))
        rows[FIRST_TAPS, states] = shortened(trained, min(length, 1 + states * channels // kept))
        rows[WHITE, states] = Row(kept * width * (length - 1), error, mean(noisy))
    return rows


def shortened(trained: Trained, taps: int) -> Row:
    """The row of a model with its first taps only."""
    model = trained.model
    errors: list[Tensor] = []

    def first(_: int, h: Tensor) -> Tensor:
        errors.append(h[0, :, max(taps, 1) :].norm(dim=-1) / h[0, :, 1:].norm(dim=-1))
        return torch.cat([h[..., :taps], torch.zeros_like(h[..., taps:])], dim=-1)

    shorter = with_taps(model, first)
    kept = 1 if model.config.num_filters == model.config.hidden_size else 2
    numbers = kept * model.config.hidden_size * (taps - 1)
    return Row(numbers, float(torch.cat(errors).median()), scored(trained, shorter))


def white_error(errors: Sequence[Tensor], seed: int) -> Change:
    """Add noise of these relative l2 norms, one tensor (H,) a layer, to the taps from lag 1 on."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(layer: int, h: Tensor) -> Tensor:
        noise = torch.randn(h.shape, generator=generator)
        noise[..., 0] = 0
        size = errors[layer].to(h.dtype) * h[0, :, 1:].norm(dim=-1) / noise[0].norm(dim=-1)
        return h + size.unsqueeze(-1) * noise

    return noisy


@torch.no_grad()
def with_taps(model: HyenaForCausalLM, change: Change) -> HyenaForCausalLM:
    """A copy whose filters are changed taps of the model's own."""
    length, layers = model.config.max_position_embeddings, model.config.num_hidden_layers
    explicit = {"filter_types": ["explicit"] * layers, "filter_length": length}
    other = HyenaForCausalLM(HyenaConfig(**{**model.config.to_diff_dict(), **explicit}))
    parts: dict[str, Any] = {k: v for k, v in model.state_dict().items() if ".mixer.filter." not in k}
    other.load_state_dict(parts, strict=False)
    for layer in range(layers):
        old, new = (cast("Any", one.model.layers[layer]) for one in (model, other))
        new.mixer.filter.weight.copy_(change(layer, old.mixer.filter(length)))
    return other


def scored(trained: Trained, model: HyenaForCausalLM) -> float:
    """The score of a model, from a file where these weights have been scored on these rows before."""
    path = trained.folder / "scores.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    tensors = [trained.rows, *model.state_dict().values()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    if digest not in known:
        known[digest] = trained.score(model, trained.rows)
        write_json(path, known)
    return known[digest]


def page(results: dict[str, list[Rows]], amounts: Amounts) -> list[str]:
    """The goals, then a table for each family of models."""
    lines = [
        f"Seeds {', '.join(map(str, SEEDS))}: mean (lowest to highest), the change of each seed against its own "
        f"original. Errors: median over filters of the relative l2 error without lag 0. Numbers: what one layer "
        f"remembers of a sequence for its long convolution. White error: mean of {amounts.draws} draws.",
        "",
        "Goals, with the number of seeds that meet them:",
        "",
    ]
    for name, runs in results.items():
        lines += goals(name, runs)
    for name, runs in results.items():
        table = recall_table(runs) if name == "recall" else perplexity_table(runs)
        lines += ["", f"## {name}", "", introduction(name, amounts), "", *table]
    return lines


def introduction(family: str, amounts: Amounts) -> str:
    """What was trained and on what it is scored."""
    plan = amounts.plan
    if family == "recall":
        return (
            f"Associative recall, vocabulary {amounts.vocab_size}, length {amounts.length}, else the small Hyena of "
            f"bench_recall, {amounts.recall_steps:,} steps, rate 2e-3; accuracy over {amounts.sequences:,} fresh "
            f"sequences in which the key of the question was last shown more than {SHORT} tokens before it."
        )
    heads = f" as MultiHyena of {amounts.heads} heads" if family == "MultiHyena" else ""
    return (
        f"The demo's Hyena{heads}: {plan.num_hidden_layers} layers, width {plan.hidden_size}, trained on "
        f"{plan.train_bytes:,} bytes in rows of {plan.length}. Perplexity of bytes of held-out text, "
        f"{amounts.rows:,} rows of {plan.length}."
    )


def goals(family: str, runs: list[Rows]) -> list[str]:
    """Each goal of a family and whether it is met, by states."""
    states = [d for name, d in runs[0] if name == DISTILLED]
    if family == "recall":
        shares = [(d, [share(rows, (DISTILLED, d)) for rows in runs]) for d in states]
        cells = [f"{d} states {spread(values, '{:.2%}')} {met(values, _whole)}" for d, values in shares]
        short = [rows[f"first {SHORT} taps", 0].score for rows in runs]
        lines = [
            f"- {family}: at least {LEAST_SHARE:.1%} of the accuracy is left: {'; '.join(cells)}.",
            f"- {family}: below {MOST_SHORT:.0%} with only the first {SHORT} taps: {spread(short, '{:.1%}')} "
            f"{met(short, lambda value: value < MOST_SHORT)}.",
        ]
    else:
        changes = [(d, [change(rows, (DISTILLED, d)) for rows in runs]) for d in states]
        cells = [f"{d} states {spread(values, '{:+.3%}')} {met(values, _small)}" for d, values in changes]
        lines = [f"- {family}: perplexity rises by at most {LEAST_CHANGE:.1%}: {'; '.join(cells)}."]
    sign, word = (1, "higher accuracy") if family == "recall" else (-1, "lower perplexity")
    better = [f"{d} states {met([sign * gain(rows, d) for rows in runs], lambda x: x > 0)}" for d in states]
    return [*lines, f"- {family}: {word} than with the first taps of equal memory: {'; '.join(better)}."]


def _small(value: float) -> bool:
    return value <= LEAST_CHANGE


def _whole(value: float) -> bool:
    return value >= LEAST_SHARE


def met(values: Sequence[float], holds: Callable[[float], bool]) -> str:
    """How many hold."""
    return f"({sum(map(holds, values))} of {len(values)})"


def change(rows: Rows, key: tuple[str, int]) -> float:
    """Relative change of the perplexity."""
    return rows[key].score / rows["original", 0].score - 1


def share(rows: Rows, key: tuple[str, int]) -> float:
    """Accuracy over that of the original."""
    return rows[key].score / rows["original", 0].score


def gain(rows: Rows, states: int) -> float:
    """By how much the distilled model scores higher than the one with the first taps."""
    return rows[DISTILLED, states].score - rows[FIRST_TAPS, states].score


def perplexity_table(runs: list[Rows]) -> list[str]:
    """A row for each way to filter."""
    cells = [
        (*_first_cells(runs, key), spread([rows[key].score for rows in runs], "{:.3f}"), spread(values, "{:+.3%}"))
        for key in runs[0]
        if (values := [change(rows, key) for rows in runs])
    ]
    return markdown_table(["states", "filters", "numbers", "error", "perplexity", "change"], cells)


def recall_table(runs: list[Rows]) -> list[str]:
    """A row for each way to filter."""
    cells = [
        (*_first_cells(runs, key), spread([rows[key].score for rows in runs], "{:.2%}"), spread(values, "{:.2%}"))
        for key in runs[0]
        if (values := [share(rows, key) for rows in runs])
    ]
    return markdown_table(["states", "filters", "numbers", "error", "accuracy", "of the original's"], cells)


def _first_cells(runs: list[Rows], key: tuple[str, int]) -> tuple[str, str, str, str]:
    name, states = key
    return str(states or ""), name, f"{runs[0][key].numbers:,}", f"{mean(rows[key].error for rows in runs):.2g}"


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and lowest to highest, of one number over the seeds."""
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def plot(results: dict[str, list[Rows]]) -> Figure:
    """Scores against states, a line for each way to filter."""
    figure = Figure(figsize=(3.7 * len(results), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (family, runs) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        states = [d for name, d in runs[0] if name == DISTILLED]
        for name, marker in ((DISTILLED, "o"), (FIRST_TAPS, "s"), (WHITE, "x")):
            axes.plot(states, [mean(rows[name, d].score for rows in runs) for d in states], marker=marker, label=name)
        axes.axhline(mean(rows["original", 0].score for rows in runs), color="grey", linewidth=0.8, label="original")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="states", title=family, ylabel="accuracy" if family == "recall" else "held-out perplexity")
        axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
