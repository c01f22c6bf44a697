"""Two properties of softmax attention that its linear replacements have or lack: low entropy and monotone weights.

    python -m benchmarks.bench_linear_properties               (--smoke: tiny, page in runs/smoke)
    python -m benchmarks.bench_linear_properties --model all-MiniLM-L6-v2 --data jargon.txt.gz

Queries and keys are those of a trained model on text that no map was trained on: a small Llama trained here on bytes
of Python's standard library (the recipe of bench_linear_lm), or any model of a family that `convert_attention` knows.
For each feature map the weights that linear attention gives to these keys are measured against softmax's: their
entropy, their KL divergence, and Spearman's correlation of weight and score q . k over the keys of a query. Learned
maps are measured as they start, as the identity, and after attention transfer, which sees other text. Properties and
their names: Zhang et al. 2024, arXiv 2402.04347.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks import bench_linear_lm as lm
from benchmarks.report import RESULTS, SMOKE_RESULTS, markdown_table, write_result
from benchmarks.training_runs import ROOT
from hyena_hf.feature_maps import FEATURE_MAPS
from hyena_hf.linear_attention import attention_transfer, convert_attention
from hyena_hf.linear_attention.modes import MODES, linear_attentions, replaced_attention, softmax_log_weights
from hyena_hf.mixers.linear_attention import LinearAttention
from hyena_hf.ops.linear_attention import linear_attention_log_weights
from training.data import Document, read_documents, shuffle_documents, stdlib_documents


RUNS = ROOT / "runs" / "linear_properties"
SOFTMAX = "softmax (control)"
MAPS = ("hedgehog", "hedgehog_softmax", "relu", "elu", "exp_1", "exp_2", "cosformer", "performer", "taylor")
START, AFTER, FIXED = "identity", "after transfer", "fixed"
CHARACTERS = 12  # of text for a token that is wanted: more than any tokenizer here takes
FEWEST_KEYS = 16  # below that a rank correlation says little
QUERIES = 12  # of a sequence whose correlations are taken


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    length: int = 128
    batch_size: int = 4
    steps: int = 80  # of attention transfer
    train_batches: int = 40
    held_out_batches: int = 2
    teacher_steps: int = 400  # of the model that is trained here


SMOKE = Plan(length=32, batch_size=2, steps=2, train_batches=2, held_out_batches=1, teacher_steps=4)


class Subject(NamedTuple):
    """A trained model with batches of ids (B, L) for attention transfer, and others to measure on."""

    name: str
    model: PreTrainedModel
    train: list[Tensor]
    held_out: list[Tensor]


@dataclass
class Properties:
    """Of the weights of one layer, means over queries of every head (H,); and some queries of the first head to draw.

    Attributes:
        entropy, softmax_entropy: In nats, over all queries.
        kl: KL divergence from softmax's weights, in nats, over all queries.
        correlation: Spearman's, of weights and scores over the keys that a query sees.
        drawn: Scores and logarithms of weights of all keys of a query.
    """

    entropy: Tensor
    softmax_entropy: Tensor
    kl: Tensor
    correlation: Tensor
    drawn: list[tuple[Tensor, Tensor]] = field(default_factory=list)


Found = dict[tuple[str, str], list[Properties]]  # by map and stage, a list of layers


def main() -> None:
    """Measure every map, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a trained model; default: a small Llama, trained here")
    parser.add_argument("--data", nargs="+", help="text for --model, files or folders; default: the standard library")
    parser.add_argument("--layers", nargs="+", type=int, help="indices of the layers to look at; default: all")
    parser.add_argument("--steps", type=int, default=Plan.steps, help=f"of transfer (default {Plan.steps})")
    parser.add_argument("--maps", nargs="+", choices=FEATURE_MAPS, default=MAPS, help="default: nine of them")
    parser.add_argument("--smoke", action="store_true", help="tiny, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.data and not arguments.model:
        parser.error("--data goes with --model; the model that is trained here reads the standard library")
    if arguments.steps < 1:
        parser.error(f"--steps ({arguments.steps}) must be at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan = SMOKE if arguments.smoke else Plan(steps=arguments.steps)
    subject = load(arguments.model, arguments.data, plan) if arguments.model else train_here(plan)
    layers = arguments.layers or list(range(subject.model.config.num_hidden_layers))
    found = measure_maps(subject, arguments.maps, layers, plan)
    suffix = f"_{Path(arguments.model).name}" if arguments.model else ""
    # paths of this machine are no part of the command
    command = " ".join(Path(word).name if Path(word).exists() else word for word in sys.argv[1:])
    path = write_result(
        f"linear_properties{suffix}",
        f"Entropy and monotonicity of linear attention: {subject.name}",
        f"python -m benchmarks.bench_linear_properties {command}".rstrip(),
        page(subject, found, layers, plan),
        {"entropy": entropy_plot(found), "weights": weights_plot(found)},
        folder=SMOKE_RESULTS if arguments.smoke else RESULTS,
    )
    print(path.read_text())


def train_here(plan: Plan) -> Subject:
    """A small Llama trained on bytes of the standard library; kept in runs/linear_properties."""
    text = lm.read_text()
    settings = lm.Settings("llama", 8e-3, 0, plan.teacher_steps, looks=1)
    digest = hashlib.sha256(f"{lm.CODE} {text.digest()} {settings} {lm.SIZES}".encode()).hexdigest()[:16]
    folder = RUNS / digest
    if not (folder / "config.json").exists():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(LlamaConfig(**lm.SIZES, tie_word_embeddings=True))
        lm.fit(model, text, settings)
        model.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    bits = lm.bits_per_byte(model, text.heldout)
    name = (
        f"a Llama of {lm.SIZES['num_hidden_layers']} layers of width {lm.SIZES['hidden_size']}, {bits:.2f} bits a byte"
    )
    train, held_out = (rows[:, : plan.length].split(plan.batch_size) for rows in (text.train, text.heldout))
    return Subject(name, model, list(train[: plan.train_batches]), list(held_out[: plan.held_out_batches]))


def load(source: str, data: Sequence[str] | None, plan: Plan) -> Subject:
    """A trained model, and text as its own tokenizer divides it."""
    architectures = AutoConfig.from_pretrained(source).architectures or []
    generates = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    kind = AutoModelForCausalLM if generates else AutoModel
    model = kind.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    documents = read_documents(data) if data else shuffle_documents(stdlib_documents())
    batches = tokenize(documents, tokenizer, plan)
    train, held_out = batches[: plan.train_batches], batches[plan.train_batches :]
    return Subject(Path(source).name, model, train, held_out)


def tokenize(documents: Sequence[Document], tokenizer: Any, plan: Plan) -> list[Tensor]:
    """Full rows of tokens, special ones included, spread over the documents: batches to train on, then the others.

    Raises:
        ValueError: The text is too short.
    """
    size = plan.length * CHARACTERS
    pieces = [
        document.text[start : start + size]
        for document in documents
        for start in range(0, len(document.text) - size + 1, size)
    ]
    batches = plan.train_batches + plan.held_out_batches
    wanted = batches * plan.batch_size
    if len(pieces) < wanted:
        raise ValueError(
            f"the text has {len(pieces)} pieces of {size} characters, {wanted} are needed; give more text"
        )
    chosen = [pieces[index * len(pieces) // wanted] for index in range(wanted)]
    rows = [tokenizer(piece, truncation=True, max_length=plan.length).input_ids for piece in chosen]
    if min(map(len, rows)) < plan.length:
        raise ValueError(f"a piece of {size} characters has fewer than {plan.length} tokens; give other text")
    return list(torch.tensor(rows).split(plan.batch_size))


def measure_maps(subject: Subject, maps: Sequence[str], layers: Sequence[int], plan: Plan) -> Found:
    """Properties of softmax itself, of every map, and of learned ones before and after transfer."""
    found: Found = {}
    for name in maps:
        model = convert_attention(subject.model, layers=layers, feature_map=name)
        learned = any(list(layer.parameters()) for layer in linear_attentions(model).values())
        if not found:
            found[SOFTMAX, FIXED] = measure(model, subject.held_out, control=True)
        found[name, START if learned else FIXED] = measure(model, subject.held_out)
        if learned:
            attention_transfer(model, subject.train, steps=plan.steps)
            found[name, AFTER] = measure(model, subject.held_out)
        print(name, "done", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Sequence[Tensor], *, control: bool = False) -> list[Properties]:
    """Properties of every converted layer, fed with what softmax attention feeds it.

    Args:
        model: From `convert_attention`.
        batches: Of ids (B, L), all of one shape.
        control: Measure softmax attention against itself.
    """
    layers = linear_attentions(model)
    parts: dict[LinearAttention, list[Properties]] = {layer: [] for layer in layers.values()}

    def observe(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
        softmax = softmax_log_weights(layer, q, k, None)
        ours = softmax
        if not control:
            features, is_log = layer.features(q, k), layer.q_map.is_log
            ours = linear_attention_log_weights(*features, log_features=is_log, causal=layer.is_causal)
        k = k.repeat_interleave(layer.num_heads // layer.num_key_value_heads, dim=1)
        parts[layer].append(properties(q @ k.mT * layer.scaling, ours, softmax, causal=layer.is_causal))
        return MODES["softmax"](layer, q, k, v, filled)

    with replaced_attention(model, dict.fromkeys(layers, observe)):
        for batch in batches:
            model.base_model(input_ids=batch, use_cache=False)
    return [_mean_properties(each) for each in parts.values()]


def properties(scores: Tensor, ours: Tensor, softmax: Tensor, *, causal: bool) -> Properties:
    """Of the weights of one layer.

    Args:
        scores: q . k / sqrt(P) (R, H, n, n).
        ours, softmax: Logarithms of weights (R, H, n, n), -inf for keys that a query does not see.
        causal: Whether a query sees only keys that are not later.
    """
    length = scores.shape[-1]
    first = min(FEWEST_KEYS, length) - 1 if causal else 0
    queries = torch.linspace(first, length - 1, min(QUERIES, length - first)).long().tolist()
    correlations, drawn = [], []
    for query in queries:
        seen = query + 1 if causal else length
        pair = scores[:, :, query, :seen], ours[:, :, query, :seen]
        correlations.append(rank_correlation(*pair).mean(dim=0))
        drawn.append((pair[0][0, 0], pair[1][0, 0]))
    return Properties(
        entropy=_expectation(ours, -ours),
        softmax_entropy=_expectation(softmax, -softmax),
        kl=_expectation(softmax, softmax - ours),
        correlation=torch.stack(correlations).mean(dim=0),
        drawn=drawn[len(drawn) // 2 :: 2],
    )


def _expectation(logs: Tensor, values: Tensor) -> Tensor:
    """Mean of values under weights exp(logs) (R, H, n, n), and over rows and queries: (H,)."""
    return torch.where(logs > -torch.inf, logs.exp() * values, 0.0).sum(dim=-1).mean(dim=(0, 2))


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's correlation over the last dimension, equal values sharing a mean rank; 0 where one is constant."""
    a, b = (rank - rank.mean(dim=-1, keepdim=True) for rank in (_ranks(x), _ranks(y)))
    scale = (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(dim=-1) / scale.clamp(min=1e-9), 0.0)


def _ranks(x: Tensor) -> Tensor:
    below, equal = (compare(x.unsqueeze(-2), x.unsqueeze(-1)).sum(dim=-1) for compare in (torch.lt, torch.eq))
    return below + equal.double() / 2


def _mean_properties(parts: Sequence[Properties]) -> Properties:
    means = (
        torch.stack([getattr(part, name) for part in parts]).mean(dim=0)
        for name in ("entropy", "softmax_entropy", "kl", "correlation")
    )
    return Properties(*means, drawn=parts[0].drawn)


def page(subject: Subject, found: Found, layers: Sequence[int], plan: Plan) -> list[str]:
    """A row for each map and stage, means over layers and heads."""
    rows = []
    for (name, stage), each in found.items():
        entropy, softmax, kl, correlation = (
            torch.cat([getattr(one, key) for one in each])
            for key in ("entropy", "softmax_entropy", "kl", "correlation")
        )
        rows.append(
            (
                name,
                stage,
                f"{entropy.mean():.3f}",
                f"{(entropy - softmax).mean():+.3f}",
                f"{(entropy - softmax).abs().max():.3f}",
                f"{kl.mean():.3f}",
                f"{correlation.mean():.3f}",
                f"{correlation.min():.3f}",
            )
        )
    batch = subject.held_out[0]
    softmax_entropy = mean(float(one.softmax_entropy.mean()) for one in found[SOFTMAX, FIXED])
    columns = [
        *("map", "stage", "entropy", "above softmax", "farthest head", "KL"),
        *("rank correlation", "lowest head"),
    ]
    return [
        f"Layers {', '.join(map(str, layers))} of {subject.model.config.num_hidden_layers}, "
        f"{len(layers) * batch_heads(found)} heads; {len(subject.held_out) * batch.shape[0]} sequences of "
        f"{batch.shape[1]} tokens. Entropy of the weights of a query in nats (softmax: {softmax_entropy:.3f}), the "
        f"difference from softmax's in the mean and, as a size, of the head where it is largest; KL divergence from "
        f"softmax's weights in nats; Spearman's correlation of weights and scores over the keys that a query sees, "
        f"mean and lowest head ({QUERIES} queries a sequence with at least {FEWEST_KEYS} keys). Means over queries, "
        f"heads and layers. Transfer: {plan.steps} steps of {plan.batch_size} sequences, other text, loss on weights.",
        "",
        *markdown_table(columns, rows),
    ]


def batch_heads(found: Found) -> int:
    """Heads of a layer."""
    return len(found[SOFTMAX, FIXED][0].entropy)


def entropy_plot(found: Found) -> Figure:
    """A dot for each head: the entropy of its weights over that of softmax's; grey: before transfer."""
    names = _names(found)
    figure, grid = _panels(len(names))
    for axes, name in zip(grid, names, strict=False):
        for stage in (START, FIXED, AFTER):
            for one in found.get((name, stage), []):
                color = "0.7" if stage == START else "C0"
                axes.plot(one.softmax_entropy, one.entropy, ".", color=color, markersize=4)
        middle = float(found[SOFTMAX, FIXED][0].softmax_entropy.mean())
        axes.axline((middle, middle), slope=1, color="grey", linewidth=0.8)
        axes.set_title(name, fontsize="small")
    figure.supxlabel("entropy of softmax's weights, nats", fontsize="small")
    figure.supylabel("entropy of the map's weights, nats", fontsize="small")
    return figure


def weights_plot(found: Found) -> Figure:
    """Weights over scores, a colour for each of a few queries of one head of the middle layer.

    Softmax's lie on straight lines of slope 1.
    """
    figure, grid = _panels(len(found))
    for axes, ((name, stage), layers) in zip(grid, found.items(), strict=False):
        for scores, logs in layers[len(layers) // 2].drawn:
            axes.plot(scores, logs.clamp(min=-20), ".", markersize=2.5)
        axes.set_title(name if stage == FIXED else f"{name}, {stage}", fontsize="small")
    figure.supxlabel("score, q . k / sqrt(P)", fontsize="small")
    figure.supylabel("logarithm of the weight (-20: less)", fontsize="small")
    return figure


def _names(found: Found) -> list[str]:
    return list(dict.fromkeys(name for name, _ in found if name != SOFTMAX))


def _panels(count: int) -> tuple[Figure, list]:
    columns = min(5, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(2.1 * columns + 0.4, 2.0 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid


if __name__ == "__main__":
    main()
