"""Can attention become long convolutions? Hyena operators in the place of a trained model's softmax attention.

    python -m benchmarks.bench_linear_hyena --model SmolLM2-135M --data docs/ books/ --held-out jargon.txt
    python -m benchmarks.bench_linear_hyena --smoke        # a tiny random model, page in runs/smoke

An experiment. In every layer and on the same batches, students learn to give the outputs of softmax attention from the
queries, keys and values that the teacher has there; one pass of the teacher serves all layers. All are causal. Filters
start from the mean weight that softmax attention gives to each lag on the first row, times what least squares give;
maps W of queries and keys start at zero with biases of one, those of values at the identity.

lag         y = weights of the lag alone that sum to one, times a gain; one list of weights and one gain a head
hyena       y = q' * (h conv (k' * v')), order 2, a filter a channel, q' = W q + b and so on, a short convolution first
multihyena  y_t = sum_s h_{t-s} (q'_t . k'_s) v'_s, one filter a head (MultiHyena)
linear      linear attention, hedgehog_softmax
share       softmax over the 64 nearest tokens times a share that they get: no other tokens are seen
hybrid      the same plus hyena over older tokens
mean, window   nothing to learn: the mean of all values; softmax over the 64 nearest tokens

Queries and keys of a Hyena operator are those before the rotary turn, as its projections would see them; the others
have turned ones. Model: any Llama. Runs are kept in runs/linear_hyena, and training goes on there after a kill.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bench_linear_smollm2 import Text, tiny_model
from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, commit, markdown_table, write_result
from benchmarks.training_runs import MODEL_CODE, ROOT, code_digest, kept
from hyena_hf import HyenaConfig
from hyena_hf.distillation import fit_modal
from hyena_hf.feature_maps import make_feature_map
from hyena_hf.filters import ExplicitFilter
from hyena_hf.linear_attention import convert_attention
from hyena_hf.linear_attention.modes import MODES, linear_attentions, replaced_attention, softmax_log_weights
from hyena_hf.mixers.linear_attention import LinearAttention
from hyena_hf.ops import causal_fftconv, hyena_conv, short_conv
from hyena_hf.ops.linear_attention import causal_linear_attention
from training.linearize import DTYPES


RUNS = ROOT / "runs" / "linear_hyena"
WINDOW = 64
SHORT_TAPS = 3
STATES = 16
MOMENTS = ("exp_avg", "exp_avg_sq")
SAVE_EVERY = 5
GOAL = 1.05  # perplexity over that of softmax with one layer replaced, as for linear attention
CODE = (*MODEL_CODE, "hyena_hf/linear_attention/*.py")
# tried on two layers and other rows of text; scores of heads are sums of P products, which move faster
RATES = {"maps": 3e-3, "head maps": 1e-3, "taps": 5e-4, "logits": 3e-2, "features": 1e-2}
UNTRAINED = ("mean", "window")


@dataclass(frozen=True)
class Inputs:
    """What attention of a layer has, in float32: of R rows, H query heads, n tokens, P channels a head.

    Attributes:
        q, k: Queries (R, H, n, P) and keys (R, K, n, P) after the rotary turn.
        plain_q, plain_k: Both (R, H, n, P), before it; keys of a group repeated for its heads.
        v, values: (R, K, n, P), and repeated (R, H, n, P).
        near: Outputs of softmax over the window (R, H, n, P).
        near_mass: Logarithm of the sum of exponentials there (R, H, n).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plain_q: Tensor
    plain_k: Tensor
    values: Tensor
    near: Tensor
    near_mass: Tensor


@torch.no_grad()
def inputs_of(layer: LinearAttention, turns: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """Inputs from what a replaced attention gets, with cosines and sines of the rotary embedding (1, n, P)."""
    q, k, v = q.float(), k.float(), v.float()
    groups = layer.num_heads // layer.num_key_value_heads
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    position = torch.arange(q.shape[2], device=q.device)
    lag = position[:, None] - position
    scores = (q @ keys.mT * layer.scaling).masked_fill((lag < 0) | (lag >= WINDOW), -torch.inf)
    return Inputs(
        *(q, k, v),
        turned_back(q, turns),
        turned_back(keys, turns),
        values,
        scores.softmax(dim=-1) @ values,
        scores.logsumexp(dim=-1),
    )


def turned_back(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the rotary embedding of x (R, H, n, P)."""
    cosine, sine = (turn.float().unsqueeze(1) for turn in turns)
    first, second = x.chunk(2, dim=-1)
    return x * cosine - torch.cat([-second, first], dim=-1) * sine


def lag_profile(log_weights: Tensor) -> Tensor:
    """Mean weight (H, n) of every lag over queries that have it, from logarithms of weights (R, H, n, n)."""
    length = log_weights.shape[-1]
    position = torch.arange(length, device=log_weights.device)
    key = position[:, None] - position  # of a query and a lag
    weights = log_weights.exp().mean(dim=0)
    of_lag = weights.gather(-1, key.clamp(min=0).expand_as(weights)).masked_fill(key < 0, 0.0)
    return of_lag.sum(dim=1) / (length - position)


def gain(y: Tensor, x: Tensor) -> Tensor:
    """Least squares of x (R, H, n, P) times a number a head to y, (H, 1)."""
    product, square = (part.sum(dim=(0, 2, 3)) for part in (x * y, x.square()))
    return (product / square.clamp(min=torch.finfo(square.dtype).tiny)).unsqueeze(-1)


def convolved(values: Tensor, h: Tensor) -> Tensor:
    """Values (R, H, n, P) convolved with the filters of their heads (H, n)."""
    y = causal_fftconv(values.transpose(2, 3).flatten(1, 2), h)
    return y.unflatten(1, values.shape[1::2]).transpose(2, 3)


@dataclass(frozen=True)
class Start:
    """Where students of a layer start, from what softmax attention does on one row.

    Attributes:
        width: P.
        profile: Mean weight of every lag (H, n).
        lag_gain: On their normalised convolution with values, (H, 1).
        taps: `profile` times the gain of its convolution (H, n).
        older_taps: The same for lags beyond the window and what the window leaves over.
        older_mass: Mean logarithm of the sum of exponentials beyond the window (H, 1).
    """

    width: int
    profile: Tensor
    lag_gain: Tensor
    taps: Tensor
    older_taps: Tensor
    older_mass: Tensor


@torch.no_grad()
def start_of(layer: LinearAttention, x: Inputs, y: Tensor) -> Start:
    """The start from inputs and outputs (R, H, n, P) of softmax attention, n beyond the window."""
    log_weights = softmax_log_weights(layer, x.q, x.k, None)
    profile = lag_profile(log_weights)
    older = profile * (torch.arange(profile.shape[1]) >= WINDOW)
    share = log_weights.exp().triu(1 - WINDOW).sum(dim=-1)
    mass = (x.near_mass - torch.logit(share, eps=1e-4))[..., WINDOW:].mean(dim=(0, 2)).unsqueeze(-1)
    plain, far = convolved(x.values, profile), convolved(x.values, older)
    normalised = plain / profile.cumsum(dim=1).unsqueeze(-1)
    left = y - share.unsqueeze(-1) * x.near
    return Start(layer.head_dim, profile, gain(y, normalised), profile * gain(y, plain), older * gain(left, far), mass)


class HeadMap(nn.Module):
    """x W + b in every head, (R, H, n, P) -> channels (R, H P, n)."""

    def __init__(self, heads: int, width: int, *, gate: float | None = None) -> None:
        """A map that starts as the identity, or as a constant gate."""
        super().__init__()
        eye = torch.eye(width).repeat(heads, 1, 1)
        self.weight = nn.Parameter(eye if gate is None else torch.zeros_like(eye))
        self.bias = nn.Parameter(torch.full((heads, 1, width), gate or 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Of all heads at once."""
        return (x @ self.weight + self.bias).transpose(2, 3).flatten(1, 2)


class Hyena(nn.Module):
    """An order-2 operator between maps of queries, keys and values of a head, with the package's explicit filters.

    Args:
        start: First taps (H, n).
        width: P.
        by_head: MultiHyena: one filter a head, keys and queries multiplied as vectors.
        first_lag: Lags before it have no weight, and there is no direct term then.
    """

    def __init__(self, start: Tensor, width: int, *, by_head: bool = False, first_lag: int = 0) -> None:
        super().__init__()
        heads, length = start.shape
        self.by_head, self.first_lag = by_head, first_lag
        gate = width**-0.5 if by_head else 1.0
        self.q_map, self.k_map = HeadMap(heads, width, gate=gate), HeadMap(heads, width, gate=gate)
        self.v_map = HeadMap(heads, width)
        self.short = nn.Parameter(torch.eye(SHORT_TAPS)[-1].repeat(3 * heads * width, 1))
        config = HyenaConfig(
            vocab_size=2,
            hidden_size=heads * width,
            num_hidden_layers=1,
            num_heads=heads if by_head else None,
            filter_types=["explicit"],
            filter_length=length,
            max_position_embeddings=length,
        )
        self.filter = ExplicitFilter(config, 0)
        self.filter.weight.data.copy_(start.repeat_interleave(config.num_filters // heads, dim=0))
        self.skip = None if first_lag else nn.Parameter(torch.zeros(config.num_filters))

    def taps(self, length: int) -> Tensor:
        """Filters (H or H P, n), without the direct term."""
        return self.filter(length)[0] * (torch.arange(length, device=self.short.device) >= self.first_lag)

    def forward(self, x: Inputs) -> Tensor:
        """Outputs (R, H, n, P)."""
        p = torch.cat([self.q_map(x.plain_q), self.k_map(x.plain_k), self.v_map(x.values)], dim=1)
        h = self.taps(p.shape[-1])
        direct = h.new_zeros(len(h)) if self.skip is None else self.skip
        if self.by_head:
            parts = short_conv(p, self.short).chunk(3, dim=1)
            q, k, v = (part.unflatten(1, (len(h), -1)).transpose(2, 3) for part in parts)
            return by_products(q, k, v, torch.cat([h[:, :1] + direct.unsqueeze(1), h[:, 1:]], dim=1))
        return hyena_conv(p.contiguous(), self.short, None, h, direct).unflatten(1, x.q.shape[1::2]).transpose(2, 3)


def by_products(q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """`multihead_conv` of heads (R, H, n, P) with taps (H, n), by O(n^2) products: cheaper to train at 512 tokens."""
    length = q.shape[2]
    lags = nn.functional.pad(h, (length - 1, 0)).flip(-1)
    return (q @ k.mT * lags.unfold(-1, length, 1).flip(-2)) @ v


class Lag(nn.Module):
    """Weights of the lag alone that sum to one, as a convolution over the sums of its taps, times a gain."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.logits = nn.Parameter(start.profile.clamp(min=1e-6).log())
        self.gain = nn.Parameter(start.lag_gain.clone())

    def forward(self, x: Inputs) -> Tensor:
        """Outputs (R, H, n, P)."""
        h = (self.logits - self.logits.amax(dim=1, keepdim=True)).exp()
        return convolved(x.values, h) * (self.gain / h.cumsum(dim=1)).unsqueeze(-1)


class Linear(nn.Module):
    """Linear attention with hedgehog_softmax."""

    def __init__(self, layer: LinearAttention) -> None:
        super().__init__()
        self.q_map = make_feature_map("hedgehog_softmax", layer.num_heads, layer.head_dim)
        self.k_map = make_feature_map("hedgehog_softmax", layer.num_key_value_heads, layer.head_dim)

    def forward(self, x: Inputs) -> Tensor:
        """Outputs (R, H, n, P)."""
        return causal_linear_attention(self.q_map(x.q), self.k_map(x.k), x.v)[0]


class Share(nn.Module):
    """Softmax over the window times its share of all weight, sigmoid(its log mass - what older tokens have).

    Args:
        start: Of the layer.
        older: Whether a Hyena operator over older tokens is added.
    """

    def __init__(self, start: Start, *, older: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(len(start.profile), start.width, 1))
        self.mass = nn.Parameter(start.older_mass.clone())
        self.older = Hyena(start.older_taps, start.width, first_lag=WINDOW) if older else None

    def forward(self, x: Inputs) -> Tensor:
        """Outputs (R, H, n, P)."""
        share = torch.sigmoid(x.near_mass - (x.q @ self.query).squeeze(-1) - self.mass)
        has_older = torch.arange(x.q.shape[2], device=x.q.device) >= WINDOW
        y = x.near * torch.where(has_older, share, 1.0).unsqueeze(-1)
        return y if self.older is None else y + self.older(x)


def mean_of_values(x: Inputs) -> Tensor:
    """Outputs (R, H, n, P)."""
    return x.values.cumsum(dim=2) / torch.arange(1, x.q.shape[2] + 1, device=x.q.device).unsqueeze(-1)


def window_alone(x: Inputs) -> Tensor:
    """Outputs (R, H, n, P)."""
    return x.near


def students_of(layer: LinearAttention, start: Start) -> nn.ModuleDict:
    """What learns in a layer."""
    return nn.ModuleDict(
        {
            "lag": Lag(start),
            "hyena": Hyena(start.taps, start.width),
            "multihyena": Hyena(start.taps, start.width, by_head=True),
            "linear": Linear(layer),
            "share": Share(start, older=False),
            "hybrid": Share(start, older=True),
        }
    )


def kind_of(name: str) -> str:
    """Which learning rate a parameter has, by its name."""
    if name.startswith("linear."):
        return "features"
    maps = "head maps" if name.startswith("multihyena.") else "maps"
    return next((kind for part, kind in (("logits", "logits"), ("filter", "taps")) if part in name), maps)


def modal_taps(taps: Tensor) -> tuple[Tensor, Tensor]:
    """Taps (C, n) of few states in the place of others, and their relative errors (C,) as `fit_modal` has them."""
    poles, residues, _, report = fit_modal(taps, state_size=STATES)
    powers = poles.unsqueeze(-1).repeat(1, 1, taps.shape[1] - 1)
    powers[..., 0] = 1
    fitted = taps.to(torch.float64, copy=True)
    fitted[:, 1:] = (residues.unsqueeze(-1) * powers.cumprod(dim=-1)).sum(dim=1).real
    return fitted, report.relative_l2


def save_state(path: Path, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Keep parameters, AdamW's moments and the steps taken, whole or not at all."""
    tensors = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        tensors[f"{index}.value"] = parameter.detach()
        tensors |= {f"{index}.{name}": optimizer.state[parameter][name] for name in MOMENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    save_file(tensors, unfinished, metadata={"step": str(step)})
    unfinished.replace(path)


def load_state(path: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put a state into the parameters of an optimizer and into it; the steps taken."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            parameter.data.copy_(file.get_tensor(f"{index}.value"))
            moments = {name: file.get_tensor(f"{index}.{name}") for name in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step


class Experiment:
    """The model with what learns in its layers, and the rows that it learns from and is measured on."""

    def __init__(self, text: Text, options: argparse.Namespace) -> None:
        self.options = options
        self.model = convert_attention(text.model, feature_map="elu").eval().requires_grad_(False)
        self.layers = linear_attentions(self.model)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(text.train), generator=generator)[: options.steps]
        self.train = [text.train[index]["input_ids"] for index in order.tolist()]
        held_out = text.held_out["held-out"]
        self.held_out = [held_out[index]["input_ids"] for index in range(min(options.rows, len(held_out)))]
        at = torch.arange(options.length).unsqueeze(0)
        rotary: Any = self.model.base_model
        self.turns = rotary.rotary_emb(torch.zeros(1), at)
        self.students: dict[int, nn.ModuleDict] = {}

    def read(self, row: Tensor, see: Callable[[int, Inputs, Tensor], None]) -> None:
        """A pass of the teacher over a row, each layer's inputs and outputs (R, H, n, P) shown to a function."""

        def show(index: int, layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
            y = MODES["softmax"](layer, q, k, v, filled)
            see(index, inputs_of(layer, self.turns, q, k, v), y.float())
            return y

        with torch.no_grad(), replaced_attention(self.model, {i: partial(show, i) for i in self.layers}):
            self.model.base_model(input_ids=row.unsqueeze(0), use_cache=False)

    def begin(self) -> None:
        """Students, started by the first row."""

        def see(index: int, x: Inputs, y: Tensor) -> None:
            layer = self.layers[index]
            self.students[index] = students_of(layer, start_of(layer, x, y))

        self.read(self.train[0], see)

    def learn(self, path: Path) -> None:
        """Train all students, or go on with it."""
        self.begin()
        groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in RATES}
        for students in self.students.values():
            for name, parameter in students.named_parameters():
                groups[kind_of(name)].append(parameter)
        optimizer = torch.optim.AdamW([{"params": groups[kind]} for kind in RATES], lr=0.0, weight_decay=0.0)
        taken = load_state(path, optimizer) if path.exists() else 0
        for step in range(taken + 1, self.options.steps + 1):
            optimizer.zero_grad()
            losses = self.teach(self.train[step - 1])
            cosine = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / self.options.steps)
            for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
                group["lr"] = rate * cosine
            optimizer.step()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"step {step}: {shown}", file=sys.stderr, flush=True)
            if step % SAVE_EVERY == 0 or step == self.options.steps:
                save_state(path, step, optimizer)

    def teach(self, row: Tensor) -> dict[str, float]:
        """Gradients of every student on a row, clipped to 1 for each; mean losses over layers."""
        losses: dict[str, float] = {}

        def see(index: int, x: Inputs, y: Tensor) -> None:
            for name, student in self.students[index].items():
                with torch.enable_grad():
                    loss = (student(x) - y).square().sum() / y.square().sum()
                    loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                losses[name] = losses.get(name, 0.0) + float(loss.detach()) / len(self.layers)

        self.read(row, see)
        return losses

    def attention(self, index: int, name: str) -> Callable[[Inputs], Tensor]:
        """What replaces a layer."""
        untrained = {"mean": mean_of_values, "window": window_alone}
        return untrained[name] if name in untrained else self.students[index][name]

    def errors(self) -> dict[str, Any]:
        """Squared errors over squares on the held-out rows, of every head of every layer."""
        names = [*UNTRAINED, *next(iter(self.students.values()))]
        sums: dict[int, dict[str, Any]] = {i: dict.fromkeys((*names, "square"), 0.0) for i in self.layers}

        def see(index: int, x: Inputs, y: Tensor) -> None:
            for name in names:
                sums[index][name] += (self.attention(index, name)(x) - y).square().sum(dim=(0, 2, 3)).double()
            sums[index]["square"] += y.square().sum(dim=(0, 2, 3)).double()

        for row in self.held_out:
            self.read(row, see)
        return {"layers": {str(i): {name: of[name].tolist() for name in of} for i, of in sums.items()}}

    @torch.no_grad()
    def perplexity(self, name: str, layers: list[int]) -> dict[str, float]:
        """On the held-out rows, with some layers replaced."""

        def replaced(index: int, layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
            return self.attention(index, name)(inputs_of(layer, self.turns, q, k, v)).to(v.dtype)

        def softmax(layer: LinearAttention, *tensors: Any) -> Tensor:
            return MODES["softmax"](layer, *tensors)

        by_layer = dict.fromkeys(self.layers, softmax) | {i: partial(replaced, i) for i in layers}
        nats, tokens = 0.0, 0
        with replaced_attention(self.model, by_layer):
            for row in self.held_out:
                logits = self.model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1].float()
                nats += float(nn.functional.cross_entropy(logits, row[1:], reduction="sum").double())
                tokens += len(row) - 1
        return {"perplexity": math.exp(nats / tokens)}

    @torch.no_grad()
    def distilled(self, name: str, index: int) -> dict[str, Any]:
        """Modal filters of few states in the place of a trained student's: errors of taps, and of the layer."""
        student: Any = self.students[index][name]
        taps = student.taps(self.options.length)
        fitted, errors = modal_taps(taps)
        learned = student.filter.weight.clone()
        sums = torch.zeros(3, dtype=torch.float64)

        def see(at: int, x: Inputs, y: Tensor) -> None:
            if at != index:
                return
            for place, weight in enumerate((learned, fitted.view_as(learned).to(learned))):
                student.filter.weight.copy_(weight)
                sums[place] += (student(x) - y).square().sum()
            sums[2] += y.square().sum()

        for row in self.held_out:
            self.read(row, see)
        student.filter.weight.copy_(learned)
        error, error_fitted, square = sums.tolist()
        quantiles = torch.quantile(errors, torch.tensor([0.5, 1.0]).double()).tolist()
        return {"taps": quantiles, "error": (error / square) ** 0.5, "distilled": (error_fitted / square) ** 0.5}


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or GGUF file of the model of softmax attention")
    add("--data", nargs="+", help="text to train on")
    add("--held-out", nargs="+", help="text of another source")
    add("--steps", type=int, default=20, help="rows that are learned from (default %(default)s)")
    add("--layers", type=int, nargs="+", default=[0, 15, 29], help="replaced alone")
    add("--lowest", type=int, nargs="+", default=[4], help="layers of lowest error that are replaced together")
    add("--length", type=int, default=512)
    add("--rows", type=int, default=3, help="held-out rows (default %(default)s)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the model; students are in float32")
    add("--smoke", action="store_true")
    options = parser.parse_args()
    folder, runs = RESULTS, RUNS
    if options.smoke:
        folder, runs = SMOKE_RESULTS, SMOKE_RESULTS / "linear_hyena"
        shutil.rmtree(runs, ignore_errors=True)
        options.model = str(tiny_model(runs / "model"))
        options.steps, options.layers, options.lowest, options.length, options.rows = 2, [0], [1], 96, 1
    elif not (options.model and options.data and options.held_out):
        parser.error("--model, --data and --held-out are needed without --smoke")
    publish = partial(write_result, "linear_hyena", "Softmax attention into Hyena", command_line("bench_linear_hyena"))
    for results in run(Experiment(Text(options), options), options, runs):  # a page of what is there
        print(publish(page(results), {"layers": layers_plot(results)}, folder=folder))


def run(experiment: Experiment, options: argparse.Namespace, runs: Path) -> Iterator[dict[str, Any]]:
    """Train, measure and keep each result; all there are after each part."""
    # not the sources, whose paths are of this machine
    this = {k: v for k, v in vars(options).items() if k not in ("model", "data", "held_out", "lowest", "layers")}
    made_from = {"options": this, "code": code_digest(*CODE)}
    made_from["commit"] = kept(runs / "commit.json", made_from, lambda: {"commit": commit()})["commit"]
    experiment.learn(runs / f"students-{made_from['code'][:12]}-{options.steps}-{options.length}.safetensors")
    errors = kept(runs / "errors.json", made_from, experiment.errors)["layers"]
    results: dict[str, Any] = {"options": this, "commit": made_from["commit"], "errors": errors}
    results |= {"perplexity": [], "distilled": [], "softmax": None}
    yield results
    path = runs / "perplexity" / "softmax.json"
    results["softmax"] = kept(path, made_from, partial(experiment.perplexity, "mean", []))["perplexity"]
    for which, choices in replacements(errors, options).items():
        for name, layers in choices.items():
            path = runs / "perplexity" / f"{name}-{'-'.join(map(str, layers))}.json"
            value = kept(path, made_from, partial(experiment.perplexity, name, layers))["perplexity"]
            results["perplexity"].append({"name": name, "which": which, "layers": layers, "value": value})
            print(f"{name}, {which}: {value / results['softmax']:.3f}", file=sys.stderr, flush=True)
        yield results
    for name in ("multihyena", "hyena"):
        index = by_error(errors, name)[0]
        path = runs / f"distilled-{name}-{index}.json"
        found = kept(path, made_from, partial(experiment.distilled, name, index))
        results["distilled"].append({**found, "name": name, "layer": index})
        yield results


def relative(errors: dict[str, Any], name: str) -> dict[int, float]:
    """Root of the squared error over squares, by layer."""
    return {int(index): math.sqrt(sum(of[name]) / sum(of["square"])) for index, of in errors.items()}


def by_error(errors: dict[str, Any], name: str) -> list[int]:
    """Layers, that of lowest error first."""
    of = relative(errors, name)
    return sorted(of, key=lambda index: of[index])


def names_of(errors: dict[str, Any]) -> list[str]:
    """What was measured, the untrained first."""
    return [name for name in next(iter(errors.values())) if name != "square"]


def replacements(errors: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, list[int]]]:
    """Layers to replace, in words, and of each attention which they are."""
    names = names_of(errors)
    lowest = {
        f"{count} lowest": {name: sorted(by_error(errors, name)[:count]) for name in names} for count in options.lowest
    }
    return lowest | {f"layer {index}": {name: [index] for name in names} for index in options.layers}


def page(results: dict[str, Any]) -> list[str]:
    """Tables of errors, perplexities and distilled filters, and what follows from them."""
    errors, options = results["errors"], results["options"]
    names = names_of(errors)
    of = {name: relative(errors, name) for name in names}
    means = [f"{mean(of[name].values()):.3f}" for name in names]
    rows = [[index, *(f"{of[name][int(index)]:.3f}" for name in names)] for index in errors]
    lines = [
        f"{options['steps']} steps of one row of {options['length']} tokens, weights in {options['dtype']}; students "
        f"made by commit {results['commit']}: they have seen {options['steps'] * options['length']:,} tokens. Errors "
        f"and perplexities are of {options['rows']} rows of other text. "
        "What the names mean stands at the top of the benchmark's file.",
        "",
        *verdict(results),
        "",
        "## Relative error of a layer's outputs, root of squared errors over squares",
        "",
        *markdown_table(["layer", *names], [*rows, ["mean", *means]]),
        "",
        "## Heads that are nearly convolutions",
        "",
        *heads(errors),
        "",
    ]
    if results["perplexity"]:
        lines += [
            f"## Perplexity over that of softmax ({results['softmax']:.2f})",
            "",
            *perplexities(results, names),
            "",
        ]
    if results["distilled"]:
        lines += [f"## Learned filters with {STATES} states", "", *distilled(results["distilled"])]
    return lines


def distilled(found: list[dict[str, Any]]) -> list[str]:
    """What fitted filters do."""
    rows = [[o["name"], o["layer"], *(f"{x:.3f}" for x in (*o["taps"], o["error"], o["distilled"]))] for o in found]
    columns = ["operator", "layer", "error of taps, median", "worst", "error of outputs", "with fitted filters"]
    return [
        "The layer of lowest error of each operator; what its outputs lose when `fit_modal` gives its filters.",
        "",
        *markdown_table(columns, rows),
    ]


def heads(errors: dict[str, Any]) -> list[str]:
    """How many heads stay below some errors, and which are best."""
    names = names_of(errors)
    of = {
        name: {
            (int(i), head): math.sqrt(error / square)
            for i, e in errors.items()
            for head, (error, square) in enumerate(zip(e[name], e["square"], strict=True))
        }
        for name in names
    }
    bounds = (0.1, 0.2, 0.3, 0.5)
    rows = []
    for name in names:
        best = sorted(of[name], key=lambda head, of_name=of[name]: of_name[head])[:4]
        shown = ", ".join(f"{layer}.{head} {of[name][layer, head]:.2f}" for layer, head in best)
        rows.append([name, *(sum(value < bound for value in of[name].values()) for bound in bounds), shown])
    count = len(of[names[0]])
    columns = ["", *(f"below {bound}" for bound in bounds), "lowest (layer.head error)"]
    return [f"Of {count} heads:", "", *markdown_table(columns, rows)]


def perplexities(results: dict[str, Any], names: list[str]) -> list[str]:
    """A line for each choice of layers."""
    cells = {(o["which"], o["name"]): o for o in results["perplexity"]}
    choices = list(dict.fromkeys(o["which"] for o in results["perplexity"]))
    rows = [
        [which, *(f"{cells[which, name]['value'] / results['softmax']:.3f}" for name in names)] for which in choices
    ]
    count = max((len(o["layers"]) for o in results["perplexity"]), default=1)
    chosen = [f"{name}: {', '.join(map(str, by_error(results['errors'], name)[:count]))}" for name in names]
    return [*markdown_table(["layers", *names], rows), "", f"Layers of lowest error: {'; '.join(chosen)}."]


def verdict(results: dict[str, Any]) -> list[str]:
    """What the numbers say."""
    errors = results["errors"]
    of = {name: relative(errors, name) for name in names_of(errors)}

    def wins(one: str, other: str) -> str:
        return f"{sum(of[one][i] < of[other][i] for i in of[one])} of {len(of[one])} layers"

    lines = [answer(results, name) for name in ("hyena", "multihyena", "hybrid") if results["perplexity"]]
    return [
        *lines,
        f"- hyena is closer to softmax attention than linear attention in {wins('hyena', 'linear')}, multihyena in "
        f"{wins('multihyena', 'linear')}.",
        f"- What content adds to weights of the lag alone: hyena is closer in {wins('hyena', 'lag')}, mean error "
        f"{mean(of['lag'].values()):.3f} for the lag alone, {mean(of['hyena'].values()):.3f} for hyena.",
        f"- What the convolution adds to a window and its share: hybrid is closer in {wins('hybrid', 'share')}, mean "
        f"error {mean(of['share'].values()):.3f} without it, {mean(of['hybrid'].values()):.3f} with it.",
        "",
        "What stands in the way where it fails: the weight of a key in hyena is q'_t h_(t-s) k'_s in every channel, a "
        "product of what the query says, what the key says and the lag, so it cannot say which key fits which query. "
        "Nor are weights divided by their sum, as those of softmax are where one token takes most of it. Outputs of "
        "zero have an error of 1.",
    ]


def answer(results: dict[str, Any], name: str) -> str:
    """Whether an operator can stand in for softmax attention, by the replacements that were measured.

    Where a window that nobody trained is as good, the operator has shown nothing.
    """
    by_name: dict[str, dict[str, float]] = {}
    for one in results["perplexity"]:
        by_name.setdefault(one["name"], {})[one["which"]] = one["value"] / results["softmax"]
    ratios, window = by_name.get(name, {}), by_name.get("window", {})
    close = [which for which, value in ratios.items() if value <= GOAL]
    good = [which for which in close if ratios[which] < window.get(which, math.inf)]
    worst = max(ratios, key=lambda which: ratios[which], default=None)
    ending = "" if worst is None else f"; the worst is {worst}, {ratios[worst]:.2f} times"
    return (
        f"- Can {name} stand in for softmax attention at {GOAL - 1:.0%} of perplexity? Within that: "
        f"{', '.join(close) or 'nowhere'} of {', '.join(ratios) or 'nothing yet'}; and better than a window that "
        f"nobody trained: **{', '.join(good) or 'nowhere'}**{ending}."
    )


def layers_plot(results: dict[str, Any]) -> Figure:
    """Errors over layers."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="layer", ylabel="relative error of outputs")
    for number, name in enumerate(names_of(results["errors"])):
        of = relative(results["errors"], name)
        axes.plot(
            list(of), list(of.values()), label=name, color=f"C{number}", linestyle=":" if name in UNTRAINED else "-"
        )
    axes.set_ylim(0, 1.2)
    axes.legend(frameon=False, fontsize="small", ncols=4)
    return figure


if __name__ == "__main__":
    main()
