# SPDX-License-Identifier: Apache-2.0
"""Attention transfer: teach the linear attention of a converted model to weigh keys as its softmax attention did.

One pass of the teacher (the model's own weights with softmax attention) trains all layers: each sees what the teacher
sees, so layers are independent, and each goes backward as soon as it has been computed. Nothing but the feature maps
and the window's factor is trained, and no graph reaches beyond a layer.

Losses compare with **full** softmax attention, also where there is a window: a linear branch that is trained only as
what a window leaves over learns nothing (arXiv 2510.05901). With a window each loss is the mean of that of the linear
branch alone, over all keys, and that of both branches together.

| loss | of a layer |
|---|---|
| weights | KL(softmax weights, weights), mean of queries and heads (Hedgehog, Zhang et al. 2024) |
| outputs | squared error of outputs over their squares (LoLCATs, Zhang et al. 2024) |
| both | the sum |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyena_hf.mixers.linear_attention import LinearAttention
from hyena_hf.ops.attention_divergence import attention_divergence
from hyena_hf.ops.linear_attention import (
    SoftmaxWindow,
    bidirectional_linear_attention,
    causal_linear_attention,
    linear_attention_log_weights,
)
from hyena_hf.ops.precision import outside_autocast

from .modes import MODES, attention_mode, linear_attentions, replaced_attention, softmax_log_weights, visible_keys


Loss = Literal["weights", "outputs", "both"]
STATE_FILE, SAVE_EVERY = "attention_transfer.safetensors", 25  # in `work_dir`; steps between two states
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LayerFit:
    """How close a layer of linear attention is to full softmax attention, with the teacher's inputs.

    Attributes:
        layer: Its index in the model.
        kl: KL divergence of its weights from those of softmax attention, in nats; mean of queries and heads.
        linear_kl: The same of the linear branch alone, over all keys.
        output_error: Root of the squared error of outputs over their squares.
        entropy, teacher_entropy: Mean entropy of weights, in nats.
    """

    layer: int
    kl: float
    linear_kl: float
    output_error: float
    entropy: float
    teacher_entropy: float


@dataclass(frozen=True)
class TransferReport:
    """What attention transfer did.

    Attributes:
        steps: Steps taken.
        losses: Loss of every layer at every step, by the layer's index.
        layers: Fits on the held-out batches; empty without them.
        perplexity: On the held-out batches, of next tokens (causal language models only): `"softmax"`, the teacher;
            `"converted"`; and its two branches alone, `"window"` (where there is one) and `"linear"`. A `"converted"`
            no better than `"window"` has a dead linear branch.
    """

    steps: int
    losses: dict[int, list[float]]
    layers: list[LayerFit] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"attention transfer: {self.steps} steps, {len(self.losses)} layers"]
        if self.layers:
            lines.append("layer      KL  linear KL  output error  entropy  softmax")
            lines += [
                f"{fit.layer:5d}  {fit.kl:6.3f}     {fit.linear_kl:6.3f}        {fit.output_error:6.3f}   "
                f"{fit.entropy:6.3f}   {fit.teacher_entropy:6.3f}"
                for fit in self.layers
            ]
        lines += [f"perplexity, {name}: {value:.2f}" for name, value in self.perplexity.items()]
        return "\n".join(lines)


def attention_transfer(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    steps: int,
    loss: Loss = "weights",
    learning_rate: float = 1e-2,
    held_out: Iterable[Any] | None = None,
    progress: Callable[[int, float], None] | None = None,
    work_dir: str | Path | None = None,
) -> TransferReport:
    """Train the feature maps of a converted model in place; everything else stays as it is.

    AdamW without weight decay on the maps in float32, a cosine to zero, gradients clipped to 1 in every layer. Under
    torchrun every process trains on batches of its own, and gradients are averaged.

    Args:
        model: From `convert_attention`, its other weights still those of the teacher.
        batches: Inputs of the model, one a step: dicts with `input_ids` and perhaps `attention_mask` (B, L), or
            tensors of ids. A list shorter than `steps` is begun again.
        steps: Optimizer steps.
        loss: `"weights"`, `"outputs"` or `"both"`, see the table.
        learning_rate: At the start.
        held_out: Batches for the report.
        progress: Called after each step with its number, from 1, and the mean loss of the layers.
        work_dir: Folder for the state of the training: a call that was killed goes on there, if it is repeated with
            the same model, steps, loss and learning rate, and the same batches in the same order.

    Returns:
        The report.

    Raises:
        ValueError: The model is not converted, its maps have nothing to train, the batches end before the steps or
            hold no token, a loss is no finite number, an option does not exist, or `work_dir` holds another training.
    """
    if loss not in ("weights", "outputs", "both"):
        raise ValueError(f"loss is {loss!r}; choose 'weights', 'outputs' or 'both'")
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps ({steps}) must be at least 1 and learning_rate ({learning_rate}) above 0")
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be trained inside torch.inference_mode(); call attention_transfer outside of it")
    layers = linear_attentions(model)
    held_out = None if held_out is None else list(held_out)
    if held_out is not None:
        sizes = [_inputs(batch, model)["input_ids"].shape[1] for batch in held_out]
        if not sizes or (model.can_generate() and max(sizes) < 2):
            raise ValueError(f"held_out needs batches with a token to predict, got lengths {sizes}")
    if not any(list(layer.parameters()) for layer in layers.values()):
        raise ValueError("these feature maps have nothing to train; convert to a learned one, such as 'hedgehog'")
    kept = None
    if work_dir is not None:
        setting = {"steps": steps, "loss": loss, "learning_rate": learning_rate, "model": _sums_of_weights(model)}
        kept = _Kept(Path(work_dir) / STATE_FILE, setting)
    with _trainable(model, layers):
        losses = _train(model, layers, batches, steps, loss, learning_rate, progress, kept)
    if held_out is None:
        return TransferReport(steps, losses)
    return TransferReport(steps, losses, measure_layers(model, held_out), measure_branches(model, held_out))


@contextmanager
def _trainable(model: PreTrainedModel, layers: dict[int, LinearAttention]) -> Iterator[None]:
    """The maps in float32, because steps of 1e-2 and less vanish in bfloat16, and the model without dropout."""
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    before = [(p.dtype, p.requires_grad) for p in parameters]
    was_training = model.training
    model.eval()
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, (dtype, wanted) in zip(parameters, before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)
        model.train(was_training)


class _Kept:
    """The state of a training in a file, whole or not there: maps, AdamW's moments, steps taken and losses."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, setting

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, dict[int, list[float]]]:
        """Put the state into an optimizer and its parameters; steps taken and losses, 0 and none without a file."""
        if not self.path.exists():
            return 0, {}
        with safe_open(self.path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            differing = [key for key, value in self.setting.items() if state["setting"].get(key) != value]
            if differing:
                raise ValueError(
                    f"{self.path} is the state of another training (differing: {', '.join(differing)}); choose "
                    f"another work_dir, or repeat the call with which that one was begun"
                )
            for index, parameter in enumerate(_parameters(optimizer)):
                parameter.data.copy_(file.get_tensor(f"{index}.value"))
                moments = {name: file.get_tensor(f"{index}.{name}").to(parameter.device) for name in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
        return state["step"], {int(index): values for index, values in state["losses"].items()}

    def save(self, step: int, optimizer: torch.optim.Optimizer, losses: dict[int, list[float]]) -> None:
        """Keep the state after some steps; the first process does."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            return
        tensors = {}
        for index, parameter in enumerate(_parameters(optimizer)):
            tensors[f"{index}.value"] = parameter.detach()
            of_parameter = optimizer.state[parameter]
            tensors |= {f"{index}.{name}": of_parameter.get(name, torch.zeros_like(parameter)) for name in _MOMENTS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        state = {"setting": self.setting, "step": step, "losses": losses}
        save_file(tensors, unfinished, metadata={"state": json.dumps(state)})
        unfinished.replace(self.path)


def _average(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes of torch.distributed, where there are several."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _sums_of_weights(model: nn.Module) -> list[float]:
    """What tells a model from others of its shapes."""
    return [float(p.sum(dtype=torch.float32)) for p in model.parameters()]


def _train(
    model: PreTrainedModel,
    layers: dict[int, LinearAttention],
    batches: Iterable[Any],
    steps: int,
    loss: Loss,
    learning_rate: float,
    progress: Callable[[int, float], None] | None,
    kept: _Kept | None,
) -> dict[int, list[float]]:
    """The steps of `attention_transfer`; losses of every layer."""
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    taken, losses = (0, {}) if kept is None else kept.load(optimizer)
    losses = losses or {index: [] for index in layers}
    of_step: dict[LinearAttention, float] = {}
    tokens = 0

    def teach(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
        y = MODES["softmax"](layer, q, k, v, filled)
        with torch.enable_grad():
            # sequences of other lengths come as further groups of rows: each counts by its tokens
            value = _loss(layer, q, k, v, filled, y, loss) * (_tokens(q, filled) / tokens)
            value.backward()
        of_step[layer] = of_step.get(layer, 0.0) + float(value)
        return y

    with replaced_attention(model, dict.fromkeys(layers, teach)):
        for step, batch in enumerate(_repeated(batches, steps), start=1):
            if step <= taken:
                continue
            of_step.clear()
            inputs = _inputs(batch, model)
            tokens = _tokens(inputs["input_ids"], inputs.get("attention_mask"))
            if not tokens:
                raise ValueError(f"the batch of step {step} has no token that is not masked; leave it out")
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.base_model(**inputs, use_cache=False)
            _check_finite({index: of_step[layer] for index, layer in layers.items()}, step)
            _average(parameters)
            for index, layer in layers.items():
                losses[index].append(of_step[layer])
                nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
            optimizer.step()
            if kept is not None and (step % SAVE_EVERY == 0 or step == steps):
                kept.save(step, optimizer, losses)
            if progress is not None:
                progress(step, sum(of_step.values()) / len(of_step))
    return losses


@outside_autocast
def _weighted(layer: LinearAttention, weights: Tensor, v: Tensor) -> Tensor:
    """Weights (R, H, n, n) times values (R, K, n, P)."""
    return weights @ v.repeat_interleave(layer.num_heads // layer.num_key_value_heads, dim=1)


def _loss(
    layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None, y: Tensor, kind: Loss
) -> Tensor:
    """The loss of a layer, as the table says; y are the outputs of softmax attention."""
    window = layer.softmax_window(q, k)
    features = layer.features(q, k)
    total = features[0].new_zeros(())
    if kind in ("weights", "both"):
        exact = torch.promote_types(q.dtype, torch.float32)
        teacher = SoftmaxWindow(q.to(exact) * layer.scaling, k, size=1) if window is None else window
        options = {"log_features": layer.is_log, "mask": filled, "causal": layer.is_causal}
        total = total + attention_divergence(*features, teacher, hybrid=window is not None, **options)
    if kind in ("outputs", "both"):
        branches = [None] if window is None else [None, window]
        for branch in branches:
            total = total + _output_error(layer, features, branch, v, filled, y) / len(branches)
    return total


def _divergence(
    layer: LinearAttention,
    features: tuple[Tensor, Tensor],
    window: SoftmaxWindow | None,
    filled: Tensor | None,
    teacher: Tensor,
) -> Tensor:
    """Mean KL divergence over queries and heads, in nats."""
    student = linear_attention_log_weights(
        *features, log_features=layer.is_log, window=window, mask=filled, causal=layer.is_causal
    )
    visible = visible_keys(layer, teacher.shape[-1], filled, teacher.device)
    terms = torch.where(visible, teacher.exp() * (teacher - student), 0.0).sum(dim=-1)
    return _mean_of_queries(terms, filled)


def _output_error(
    layer: LinearAttention,
    features: tuple[Tensor, Tensor],
    window: SoftmaxWindow | None,
    v: Tensor,
    filled: Tensor | None,
    y: Tensor,
) -> Tensor:
    """Squared error of outputs over their mean square, mean over queries and heads."""
    exact = v.to(torch.promote_types(v.dtype, torch.float32))
    options = {"log_features": layer.is_log, "window": window, "mask": filled}
    if layer.is_causal:
        ours = causal_linear_attention(*features, exact, **options)[0]
    else:
        ours = bidirectional_linear_attention(*features, exact, **options)
    theirs = y.to(exact.dtype)
    scale = _mean_of_queries(theirs.square().sum(dim=-1), filled).clamp(min=torch.finfo(exact.dtype).tiny)
    return _mean_of_queries((ours - theirs).square().sum(dim=-1), filled) / scale


def _tokens(x: Tensor, filled: Tensor | None) -> int:
    """Tokens of ids (B, n) or heads (R, H, n, P), those of a mask (B, n) where there is one."""
    return x.shape[0] * x.shape[1 if x.ndim == 2 else 2] if filled is None else int((filled != 0).sum())


def _mean_of_queries(x: Tensor, filled: Tensor | None) -> Tensor:
    """Mean of x (R, H, n) over heads and the queries that exist."""
    if filled is None:
        return x.mean()
    exists = filled.unsqueeze(1)
    return torch.where(exists, x, 0.0).sum() / (exists.sum() * x.shape[1]).clamp(min=1)


def _inputs(batch: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of the base model on its device, labels left out."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not hasattr(batch, "items") or "input_ids" not in batch:
        raise TypeError(
            f"a batch is a dict with input_ids (B, L), or such a tensor, got {type(batch).__name__}; tokenize with "
            f"return_tensors='pt'"
        )
    inputs = {
        key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"
    }
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 2:
        got = type(batch["input_ids"]).__name__ if ids is None else f"shape {tuple(ids.shape)}"
        raise ValueError(f"input_ids must be a tensor of shape (B, L), got {got}; tokenize with return_tensors='pt'")
    return inputs


def _repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """As many batches as there are steps; what can be begun again is."""
    given = 0
    while given < steps:
        before = given
        for batch in islice(iter(batches), steps - given):
            given += 1
            yield batch
        if given == before:
            raise ValueError(f"the batches ended after {given} of {steps} steps; give more, or a list to begin again")


def _check_finite(values: dict[int, float], step: int) -> None:
    wrong = [index for index, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"the loss of layers {wrong[:5]} is no finite number at step {step}; lower learning_rate, or look for "
            f"values that are not finite in the model"
        )


@torch.no_grad()
def measure_layers(model: PreTrainedModel, batches: Iterable[Any]) -> list[LayerFit]:
    """How close every converted layer is to full softmax attention, fed with what the teacher feeds it.

    Args:
        model: A converted model.
        batches: As in `attention_transfer`.

    Returns:
        One fit a layer, means over all tokens.

    Raises:
        ValueError: There are no batches.
    """
    layers = linear_attentions(model)
    # KL, that of the linear branch, squared errors, squares, two entropies, each summed over tokens; then the tokens
    sums = {layer: torch.zeros(7, dtype=torch.float64, device=model.device) for layer in layers.values()}

    def observe(layer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, filled: Tensor | None) -> Tensor:
        teacher = softmax_log_weights(layer, q, k, filled)
        y = _weighted(layer, teacher.exp().to(v.dtype), v)
        window, features = layer.softmax_window(q, k), layer.features(q, k)
        visible = visible_keys(layer, q.shape[2], filled, q.device)
        student = linear_attention_log_weights(
            *features, log_features=layer.is_log, window=window, mask=filled, causal=layer.is_causal
        )
        entropies = [
            _mean_of_queries(torch.where(visible, -logs.exp() * logs, 0.0).sum(dim=-1), filled)
            for logs in (student, teacher)
        ]
        divergences = [_divergence(layer, features, branch, filled, teacher) for branch in (window, None)]
        square = _mean_of_queries(y.to(teacher.dtype).square().sum(dim=-1), filled)
        error = _output_error(layer, features, window, v, filled, y) * square
        means = torch.stack([*divergences, error, square, *entropies, torch.ones_like(square)])
        sums[layer] += means.double() * _tokens(q, filled)
        return y

    was_training = model.training
    model.eval()
    try:
        with replaced_attention(model, dict.fromkeys(layers, observe)):
            for batch in batches:
                model.base_model(**_inputs(batch, model), use_cache=False)
    finally:
        model.train(was_training)
    fits = []
    for index, layer in layers.items():
        kl, linear_kl, error, square, entropy, teacher_entropy, tokens = sums[layer].tolist()
        if not tokens:
            raise ValueError("there are no batches to measure on; give some")
        ratio = math.sqrt(error / square) if square else 0.0
        fits.append(
            LayerFit(index, kl / tokens, linear_kl / tokens, ratio, entropy / tokens, teacher_entropy / tokens)
        )
    return fits


@torch.no_grad()
def measure_branches(
    model: PreTrainedModel, batches: Sequence[Any], attentions: Sequence[str] | None = None
) -> dict[str, float]:
    """Perplexity of next tokens with each attention: softmax, converted, and its branches alone.

    Args:
        model: A converted causal language model; of another the result is empty.
        batches: As in `attention_transfer`; masked tokens are neither read nor predicted.
        attentions: Some of `"softmax"`, `"converted"`, `"window"`, `"linear"`; None: all. One that the model does not
            have (`"window"` without a window) is left out.

    Returns:
        Perplexities by name.

    Raises:
        ValueError: There is no such attention, or the batches hold no token to predict.
    """
    unknown = set(attentions or ()) - {"converted", *MODES}
    if unknown:
        raise ValueError(f"no attention is called {sorted(unknown)}; choose among converted, {', '.join(MODES)}")
    if not model.can_generate():
        return {}
    sizes = [layer.window for layer in linear_attentions(model).values()]
    windows = all(sizes)
    known = ["softmax", "converted", *(["window"] if windows else []), "linear"]
    was_training = model.training
    model.eval()
    found = {}
    try:
        for name in known if attentions is None else [name for name in known if name in attentions]:
            if name == "linear" and not any(sizes) and "converted" in found:  # there is nothing else in it
                found[name] = found["converted"]
                continue
            with nullcontext() if name == "converted" else attention_mode(model, name):  # pyright: ignore (one of MODES)
                found[name] = _perplexity(model, batches)
    finally:
        model.train(was_training)
    return found


def _perplexity(model: PreTrainedModel, batches: Sequence[Any]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        inputs = _inputs(batch, model)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        real = torch.ones_like(nll) if mask is None else (mask[:, 1:] * mask[:, :-1]).flatten().to(nll.dtype)
        if "position_ids" in inputs:  # packed: a document's first token follows nothing
            real = real * (inputs["position_ids"].expand_as(ids).diff(dim=1) == 1).flatten()
        total += float((nll.double() * real).sum())
        count += int(real.sum())
    if not count:
        raise ValueError("the held-out batches hold no token to predict; give sequences of two tokens at least")
    return math.exp(total / count)


__all__ = ["LayerFit", "TransferReport", "attention_transfer", "measure_branches", "measure_layers"]
