"""Fine-tune a model on classes of sequences, classes of tokens, or the next token: `fine_tune(model, data, ...)`.

What published Hyena results needed: AdamW whose filters do not decay (the groups of `training.parameter_groups`),
cosine schedule with linear warm-up, gradients clipped to norm 1, mixed precision; and besides: class weights, the best
checkpoint by a chosen metric, early stopping, stages of growing length (`training.warmup`). The same call goes on
where an earlier one stopped, however it stopped.

    OUTPUT/model/           the best model with its tokenizer, LoRA merged into it, for from_pretrained
    OUTPUT/adapter/         the LoRA adapter alone, where there is one
    OUTPUT/checkpoint-N/    what training resumes from         OUTPUT/metrics.jsonl   one line for each logged step
    OUTPUT/finetune.json    what a resumed run must agree with OUTPUT/curves.png      loss and metrics against steps
    OUTPUT/result.json      written last: the run is complete

Loss. Of a step: sum of w[y] * -log p[y] over all labels y of the step, of all devices and passes, divided by the sum
of their w[y]; so it depends neither on how a step is divided nor on where its padding is. Where there is a teacher, it
is the divergence from its predictions instead (`training.imitation`). Evaluation leaves weights and teacher out, so
that runs with different ones can be compared; its `loss` is the mean over labels of each batch, averaged over batches
by their rows. So where rows have different numbers of labels (tasks token and lm) it depends on the batch size; the
other metrics do not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from training.data import UNPREDICTED, PackedRows, collate_rows
from training.imitation import Teacher, imitation_loss
from training.metrics import (
    classification_metrics,
    confusion,
    greater_is_better,
    language_metrics,
    metrics_of,
    row_losses,
)
from training.parameter_groups import unwrap
from training.recipe import RESULT_FILE, MetricsFile, TrainingBar, claim, model_digest, write_json
from training.sequences import EncodedSequences, PaddingCollator
from training.trainer import STAGING, STATE_FILE, HyenaTrainer, last_good_checkpoint, publish
from training.warmup import Stage, StagedRows, StepBatches, describe


TASK_KINDS = ("sequence", "token", "lm")
COMMAND_FILE = "finetune.json"
PROVENANCE = frozenset(
    ["_name_or_path", "_commit_hash", "transformers_version"]
)  # of a configuration, not its content
EVALUATIONS = 20  # in a run, where nothing else is asked for


@dataclass(frozen=True)
class FineTuneRecipe:
    """How to fine-tune; the defaults are those of HyenaDNA's configurations (AdamW's betas and epsilon too)."""

    task: str  # sequence, token or lm
    stages: tuple[Stage, ...]  # one, unless lengths grow
    learning_rate: float = 6e-4  # the peak
    filter_learning_rate: float | None = None  # of the long filters; None: as the others
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.01  # of the learning rate, fraction of the steps
    final_rate: float = 0.1  # fraction of the peak
    clip: float = 1.0
    class_weights: tuple[float, ...] | None = None  # of the losses of each class
    metric: str | None = None  # that chooses the best checkpoint; None: the first of `metrics_of`
    patience: int | None = None  # evaluations without a better metric before training stops
    evaluate_every: int | None = None  # steps; None: 20 times in the run
    tokens_per_pass: int | None = None  # at most, padding included, on each device; a step takes several passes
    bf16: bool = False  # mixed precision
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        if self.task not in TASK_KINDS:
            raise ValueError(f"task must be one of {', '.join(TASK_KINDS)}, got {self.task!r}")
        if not self.stages:
            raise ValueError("a run needs at least one stage, got none")
        if self.metric is not None and self.metric not in metrics_of(self.task):
            raise ValueError(
                f"metric must be one of {', '.join(metrics_of(self.task))} for task {self.task}, got {self.metric!r}"
            )
        for name in ("patience", "evaluate_every", "tokens_per_pass"):
            value = vars(self)[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (0 <= self.warmup < 1 and 0 <= self.final_rate <= 1):
            raise ValueError(f"warmup ({self.warmup}) must be in [0, 1) and final_rate ({self.final_rate}) in [0, 1]")
        if self.class_weights is not None:
            self._check_weights(self.class_weights)

    def _check_weights(self, weights: Sequence[float]) -> None:
        if self.task == "lm":
            raise ValueError("class weights are for classes of sequences or tokens, not for task lm")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"class weights must be positive and finite, got {list(weights)}")

    @property
    def chosen_metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return self.metric or metrics_of(self.task)[0]


@dataclass(frozen=True)
class FineTuneData:
    """Rows to learn from, to choose by and to report on; all of one kind."""

    train: EncodedSequences | PackedRows
    validation: EncodedSequences | PackedRows
    test: EncodedSequences | PackedRows | None = None
    report: dict[str, Any] = field(default_factory=dict)  # what else result.json should say of the data

    def longest(self) -> int:
        """Tokens of the longest training row."""
        return self.train.length if isinstance(self.train, PackedRows) else int(self.train.lengths.max())


@dataclass(frozen=True)
class FineTuneResult:
    """What a run gave; losses in nats for each label, without class weights except those of training.

    Losses of evaluation are averaged as the module says.
    """

    task: str
    metric: str
    steps: int  # made, also where training stopped early
    stopped_early: bool
    best_step: int
    validation: dict[str, float]  # of the best checkpoint
    test: dict[str, Any] | None  # of the best checkpoint; with its confusion matrix
    train_seconds: float
    loss_curve: list[list[float]]  # [step, mean since the last point]
    validation_curves: dict[str, list[list[float]]]
    stages: list[dict[str, Any]]
    data: dict[str, Any]
    model_dir: str


def balanced_weights(counts: Tensor) -> tuple[float, ...]:
    """Weights that give every class the same total: labels / (classes * labels of the class).

    Raises:
        ValueError: a class without labels.
    """
    if not bool((counts > 0).all()):
        raise ValueError(f"classes without training labels have no balanced weight; labels of each: {counts.tolist()}")
    return tuple((counts.sum() / (len(counts) * counts.double())).tolist())


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, total: Tensor | None) -> Tensor:
    """Cross-entropy in float32 at least, () : sum of w[y] * -log p[y], divided by `total`, or else by the sum of w[y].

    It is 0 where no label bears a loss.

    Args:
        logits: (..., C).
        labels: (...), int64, -100 where no loss is wanted.
        weights: (C,), or None for ones.
        total: what to divide by.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    weights = None if weights is None else weights.to(exact)
    flat = labels.flatten()
    if total is None:
        counted = flat[flat != UNPREDICTED]
        total = torch.tensor(len(counted), device=exact.device) if weights is None else weights[counted].sum()
    loss = nn.functional.cross_entropy(exact, flat, weight=weights, ignore_index=UNPREDICTED, reduction="sum")
    divisor = total.to(exact)
    return loss / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


class FineTuner(HyenaTrainer):
    """HyenaTrainer on the batches of a plan, with a loss that is weighted and divided over whole steps.

    Args:
        model, args: as for HyenaTrainer.
        recipe: the task, class weights and size of a pass are read from it.
        batches: the whole run.
        teacher: whose predictions are the targets of training; None: the labels are.
        **kwargs: as for HyenaTrainer.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        recipe: FineTuneRecipe,
        batches: StepBatches,
        teacher: Teacher | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.batches, self._evaluates = recipe, batches, False
        self.teacher = teacher
        weights = recipe.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        kwargs.setdefault("callbacks", []).append(DataEpochs(batches))
        super().__init__(model, args, compute_loss_func=self._loss_of, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is ours; the model need not hear what it is divided by

    def get_train_dataloader(self) -> DataLoader:
        """The batches of the plan, dealt to the devices in turn."""
        loader = DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=self.batches,  # pyright: ignore[reportArgumentType]
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward in as many passes as `tokens_per_pass` asks for; their losses add up."""
        passes = split_rows(inputs, self.recipe.tokens_per_pass)
        losses = []
        for number, part in enumerate(passes, start=1):
            with nullcontext() if number == len(passes) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, *args, **kwargs))
        return torch.stack(losses).sum()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a pass; evaluation compares with labels, whatever training does."""
        if self.teacher is None or self._evaluates:
            return super().compute_loss(model, inputs, *args, **kwargs)
        inner = self.accelerator.unwrap_model(model)
        loss = imitation_loss(model, inner, inputs, self.teacher, kwargs.get("num_items_in_batch"))
        return loss * self.accelerator.num_processes  # which divide by their number the sum over all of them

    def _targets(self, labels: Tensor) -> Tensor:
        """The labels that bear a loss."""
        return labels[:, 1:] if self.recipe.task == "lm" else labels

    def _loss_of(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Loss of a pass; Trainer calls it with what `_get_num_items_in_batch` gave."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        logits = logits[:, :-1] if self.recipe.task == "lm" else logits
        return weighted_loss(logits, self._targets(labels), self._weights_now(), num_items_in_batch)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch without class weights."""
        self._evaluates = True
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluates = False

    def _weights_now(self) -> Tensor | None:
        # not by `model.training`: Trainer divides a step before its first pass turns the model to training
        return None if self._evaluates else self.class_weights

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Sum of the weights of all labels of a step, on all devices; Trainer's own counts labels."""
        weights = self._weights_now()
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            labels = self._targets(batch["labels"]).cpu()
            counted = labels[labels != UNPREDICTED]
            total += len(counted) if weights is None else weights[counted].sum()
        total = total.to(device, torch.float32)
        everywhere: Any = self.accelerator.gather(total.reshape(1)) if self.args.world_size > 1 else total
        return everywhere.sum()


def split_rows(inputs: dict[str, Tensor], tokens: int | None) -> list[dict[str, Tensor]]:
    """Divide a batch into passes of at most `tokens` tokens, padding included, and at least one row."""
    rows, length = inputs["input_ids"].shape
    if tokens is None or rows * length <= tokens:
        return [inputs]
    size = max(1, tokens // length)
    return [{name: value[begin : begin + size] for name, value in inputs.items()} for begin in range(0, rows, size)]


class DataEpochs(TrainerCallback):
    """Let logs count epochs of the data; to Trainer the whole plan is one."""

    def __init__(self, batches: StepBatches) -> None:
        self.batches = batches

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Correct the epoch; evaluate after the last step, whatever the interval."""
        state.epoch = self.batches.epochs_after(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class EarlyStopping(TrainerCallback):
    """Stop when the metric has not been better for `patience` evaluations; known from the history alone, so that a
    resumed run stops where the other would have."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at the last evaluations."""
        if self.is_over(state.log_history):
            control.should_training_stop = True

    def is_over(self, history: Sequence[dict[str, float]]) -> bool:
        """Whether training should have stopped by the end of a history."""
        values = [value for _, value in curve(history, f"eval_{self.metric}")]
        sign = 1 if greater_is_better(self.metric) else -1
        best = max(range(len(values)), key=lambda index: (sign * values[index], -index), default=0)
        return len(values) - 1 - best >= self.patience


def fine_tune(
    model: Any,
    data: FineTuneData,
    *,
    output_dir: Path,
    recipe: FineTuneRecipe,
    tokenizer: PreTrainedTokenizerBase,
    keep_merged: bool = True,
    teacher: Teacher | None = None,
) -> FineTuneResult:
    """Fine-tune a model, or go on with a run that was interrupted.

    Works under torchrun, and under `accelerate launch` with FSDP2.

    Args:
        model: with the head that the task needs, also inside a `PeftModel` or with frozen parameters. It is trained in
            place; the best state is in OUTPUT/model, and loaded from there only. To go on with a run, give the model
            as it was when the run was begun: weights and configuration are compared.
        data: rows of the task.
        output_dir: holds everything about this run; another run needs another folder.
        recipe: see `FineTuneRecipe`.
        tokenizer: names the padding token, and is saved with the model.
        keep_merged: whether a LoRA adapter is also saved merged into the model. Otherwise OUTPUT/adapter is all.
        teacher: for task lm, of `training.imitation`: learn its predictions of the next token instead of the text's. A
            resumed run has to be given the same.

    Raises:
        ValueError: the folder belongs to another run; class weights or stages that do not fit; no padding token.
        FloatingPointError: a loss, gradient or weight that is not finite; names the step.
        CheckpointError: a checkpoint could not be written (full disk).
        FileNotFoundError: the folder lacks the best checkpoint that its last one names.
    """
    output_dir = Path(output_dir)
    _check(model, data, recipe)
    if teacher is not None and recipe.task != "lm":
        raise ValueError(f"a teacher is for task lm, not {recipe.task}; leave it out")
    trainer = _make_trainer(model, data, output_dir, recipe, tokenizer, teacher)
    if trainer.is_world_process_zero():
        this = _description(model, data, recipe, keep_merged=keep_merged)
        this |= {} if teacher is None else {"teacher": type(teacher).__name__}
        this |= {"sharded": True} if trainer.is_fsdp_enabled else {}  # checkpoints of others hold other files
        claim(output_dir, this, COMMAND_FILE)
        if not (output_dir / RESULT_FILE).exists():
            _find_best_again(output_dir)
    trainer.accelerator.wait_for_everyone()
    if (output_dir / RESULT_FILE).exists():
        found = FineTuneResult(**json.loads((output_dir / RESULT_FILE).read_text()))
        return replace(found, model_dir=str(output_dir / Path(found.model_dir).name))
    last = last_good_checkpoint(output_dir)
    if last is not None and _is_over(last, trainer.args.max_steps, recipe):  # killed before the result was written
        trainer.state = TrainerState.load_from_json(str(last / STATE_FILE))
        trainer.state.best_model_checkpoint = trainer.state.best_model_checkpoint or str(last)
        trainer.load_best()
    else:
        trainer.train(resume_from_checkpoint=last is not None)
    adapter_alone = unwrap(model) is not model and not keep_merged
    result = _summarise(trainer, data, output_dir / ("adapter" if adapter_alone else "model"))
    _save_final(trainer, output_dir, result, tokenizer, keep_merged=keep_merged)
    return result


def _check(model: Any, data: FineTuneData, recipe: FineTuneRecipe) -> None:
    """Refuse data and recipes that contradict each other or the model."""
    if isinstance(data.train, PackedRows) != (recipe.task == "lm"):
        raise ValueError(f"task {recipe.task} does not take {type(data.train).__name__}; PackedRows are for lm")
    inner: Any = unwrap(model)
    weights, classes = recipe.class_weights, inner.config.num_labels
    if weights is not None and len(weights) != classes:
        raise ValueError(f"{len(weights)} class weights for {classes} classes; give one for each")
    for stage in recipe.stages:
        if stage.length is not None and stage.length > data.longest():
            raise ValueError(
                f"a stage of length {stage.length} is longer than the longest training row ({data.longest()} tokens); "
                "lower its length"
            )


def _make_trainer(
    model: Any,
    data: FineTuneData,
    output_dir: Path,
    recipe: FineTuneRecipe,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher | None,
) -> FineTuner:
    arguments = TrainingArguments(output_dir=str(output_dir), **_settings(recipe))
    rows = [_cut(data.train, stage.length) for stage in recipe.stages]
    lengths = None if recipe.task == "lm" else [part.lengths for part in rows if isinstance(part, EncodedSequences)]
    batches = StepBatches(rows, recipe.stages, seed=recipe.seed, devices=arguments.world_size, lengths=lengths)
    steps = len(batches) // arguments.world_size
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(recipe.warmup * steps)
    every = recipe.evaluate_every or _interval(steps)
    arguments.eval_steps = arguments.save_steps = every
    arguments.logging_steps = max(divisor for divisor in range(1, 11) if every % divisor == 0)
    arguments.per_device_eval_batch_size = _rows_in_evaluation(recipe, data.longest())
    metric = recipe.chosen_metric
    callbacks: list[TrainerCallback] = [TrainingBar(), MetricsFile(output_dir / "metrics.jsonl")]
    if recipe.patience is not None:
        callbacks.append(EarlyStopping(metric, recipe.patience))
    trainer = FineTuner(
        model,
        arguments,
        recipe=recipe,
        batches=batches,
        teacher=teacher,
        filter_learning_rate=recipe.filter_learning_rate,
        train_dataset=StagedRows(rows),
        eval_dataset=data.validation,
        data_collator=collate_rows if recipe.task == "lm" else _collator(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
        preprocess_logits_for_metrics=_summed if recipe.task == "lm" else _classes,
        compute_metrics=_language if recipe.task == "lm" else _classified,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _settings(recipe: FineTuneRecipe) -> dict[str, Any]:
    """Training arguments that follow from the recipe alone."""
    return dict(
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_rate},
        max_grad_norm=recipe.clip,
        bf16=recipe.bf16,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_total_limit=2,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model=recipe.chosen_metric,
        greater_is_better=greater_is_better(recipe.chosen_metric),
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or torchrun's processes would not find each other
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )


def _interval(steps: int) -> int:
    """Steps between evaluations, so that there are about 20; a multiple of 10 where it is more than 10."""
    every = math.ceil(steps / EVALUATIONS)
    return every if every <= 10 else math.ceil(every / 10) * 10


def _rows_in_evaluation(recipe: FineTuneRecipe, longest: int) -> int:
    """Rows of a batch that is only looked at: as in the last stage, in one pass."""
    batch = recipe.stages[-1].batch
    return batch if recipe.tokens_per_pass is None else max(1, min(batch, recipe.tokens_per_pass // longest))


def _cut(rows: EncodedSequences | PackedRows, length: int | None) -> EncodedSequences | PackedRows:
    if length is None:
        return rows
    return rows.with_length(length) if isinstance(rows, PackedRows) else rows.cut(length)


def _collator(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no padding token, which rows of different length need; set "
            "tokenizer.pad_token, e.g. to its eos_token"
        )
    pad: Any = tokenizer.pad_token_id
    return PaddingCollator(pad, tokenizer.padding_side)


def _classes(logits: Any, labels: Tensor) -> Tensor:  # noqa: ARG001 (Trainer's signature)
    """Predicted classes, all that is kept of an evaluation."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _summed(logits: Any, labels: Tensor) -> Tensor:
    """Losses of rows, all that is kept of an evaluation."""
    return row_losses(logits[0] if isinstance(logits, tuple) else logits, labels)


def _classified(prediction: Any) -> dict[str, float]:
    return classification_metrics(prediction.predictions, prediction.label_ids)


def _language(prediction: Any) -> dict[str, float]:
    return language_metrics(prediction.predictions)


def _description(model: Any, data: FineTuneData, recipe: FineTuneRecipe, *, keep_merged: bool) -> dict[str, Any]:
    """What a resumed run must agree with, as JSON."""
    inner: Any = unwrap(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    this = {
        **asdict(recipe),
        "model": type(inner).__name__,
        "model_digest": model_digest(model),
        "weights_digest": _weights_digest(model),
        "config_digest": _config_digest(inner),
        "trained_parameters": trained,
        "train_digest": data.train.digest(),
        "validation_digest": data.validation.digest(),
        "test_digest": None if data.test is None else data.test.digest(),
        "id2label": inner.config.id2label,
        "keep_merged": keep_merged,
    }
    return json.loads(json.dumps(this))


def _weights_digest(model: nn.Module) -> str:
    """A short hash of names, types and all bytes of what a model starts from."""
    content = hashlib.sha256()
    for name, value in model.state_dict().items():
        content.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]


def _config_digest(model: Any) -> str:
    """A short hash of a model's configuration, but for where it was loaded from and which version wrote it."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in PROVENANCE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _find_best_again(output_dir: Path) -> None:
    """Name the best checkpoint where it is now: Trainer writes down its whole path, and where that leads nowhere, as
    after a move of the run's folder, silently does without."""
    last = last_good_checkpoint(output_dir)
    if last is None:
        return
    state = json.loads((last / STATE_FILE).read_text())
    if state.get("best_model_checkpoint") is None:
        return
    best = output_dir / Path(state["best_model_checkpoint"]).name
    if not any(best.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{output_dir} holds no weights in {best.name}, the best checkpoint by step {state['global_step']}; put "
            "that folder back, or choose another output folder"
        )
    if state["best_model_checkpoint"] != str(best):
        write_json(last / STATE_FILE, {**state, "best_model_checkpoint": str(best)})


def _is_over(checkpoint: Path, steps: int, recipe: FineTuneRecipe) -> bool:
    """Whether a checkpoint is where training ended or stopped early."""
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    return state.global_step >= steps or _stopped_early(state, recipe)


def _stopped_early(state: TrainerState, recipe: FineTuneRecipe) -> bool:
    if recipe.patience is None:
        return False
    return EarlyStopping(recipe.chosen_metric, recipe.patience).is_over(state.log_history)


def curve(history: Sequence[dict[str, float]], key: str) -> list[list[float]]:
    """[step, value] of every log with a key; the last one of a step."""
    points = {int(logs["step"]): float(logs[key]) for logs in history if key in logs}
    return [[step, points[step]] for step in sorted(points)]


def _summarise(trainer: FineTuner, data: FineTuneData, model_dir: Path) -> FineTuneResult:
    recipe, history, steps = trainer.recipe, trainer.state.log_history, trainer.state.global_step
    curves = {name: curve(history, f"eval_{name}") for name in metrics_of(recipe.task)}
    best_step = trainer.state.best_global_step or steps
    return FineTuneResult(
        task=recipe.task,
        metric=recipe.chosen_metric,
        steps=steps,
        stopped_early=steps < trainer.args.max_steps,
        best_step=best_step,
        validation={name: value for name, points in curves.items() for step, value in points if step == best_step},
        test=None if data.test is None else _tested(trainer, data.test),
        train_seconds=max((logs["train_seconds"] for logs in history if "train_seconds" in logs), default=0.0),
        loss_curve=curve(history, "loss"),
        validation_curves=curves,
        stages=describe(trainer.batches, data.longest()),
        data=data.report,
        model_dir=str(model_dir),
    )


def _tested(trainer: FineTuner, rows: Dataset[Any]) -> dict[str, Any]:
    """Metrics of the model as it is on rows that chose nothing."""
    output = trainer.predict(rows)
    named = {name.removeprefix("test_"): value for name, value in (output.metrics or {}).items()}
    scores: dict[str, Any] = {name: named[name] for name in metrics_of(trainer.recipe.task)}
    if trainer.recipe.task != "lm":
        inner: Any = unwrap(trainer.accelerator.unwrap_model(trainer.model))
        scores["confusion"] = confusion(output.predictions, output.label_ids, inner.config.num_labels)
    return scores


def _save_final(
    trainer: FineTuner,
    output_dir: Path,
    result: FineTuneResult,
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_merged: bool,
) -> None:
    """Save adapter, model, plot and last the result, each whole or not at all."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    # all processes take part where the weights lie in shards; the first one gets them
    state: Any = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        model = model if state is None else _gathered(model, state)
        inner = unwrap(model)
        adapted = model is not inner
        if adapted:
            _publish(model, tokenizer, output_dir, "adapter")
            inner = model.merge_and_unload()
        if keep_merged or not adapted:
            _publish(inner, tokenizer, output_dir, "model")
        plot_curves(result, output_dir / "curves.png")
        write_json(output_dir / RESULT_FILE, asdict(result))
    trainer.accelerator.wait_for_everyone()


def _gathered(model: Any, state: dict[str, Tensor]) -> Any:
    """A copy on the CPU of a model that lies in shards, which can neither be merged nor saved."""
    inner: Any = unwrap(model)
    kind: Any = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        whole = plain = kind(copy.deepcopy(inner.config))
        if model is not inner:
            from peft import get_peft_model

            whole = get_peft_model(plain, model.active_peft_config)
    whole.load_state_dict(state, assign=True)
    plain.tie_weights()
    if inner.can_generate():
        plain.generation_config = inner.generation_config
    return whole


def _publish(model: Any, tokenizer: PreTrainedTokenizerBase, output_dir: Path, name: str) -> None:
    staged = output_dir / STAGING / name
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    publish(staged, output_dir / name)
    shutil.rmtree(output_dir / STAGING)


def plot_curves(result: FineTuneResult, path: Path) -> None:
    """Draw losses and metrics against the step; dotted lines where stages end, a dashed one at the best checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(1, 2)
    losses.plot(*zip(*result.loss_curve, strict=True), label="training")
    for name, points in result.validation_curves.items():
        axes = losses if name == "loss" else metrics
        axes.plot(*zip(*points, strict=True), label="validation" if name == "loss" else name, marker=".")
    losses.set(xlabel="step", ylabel="loss (nats per label)")
    metrics.set(xlabel="step", ylabel=f"validation, best by {result.metric}")
    ends = np.cumsum([stage["steps"] for stage in result.stages])[:-1]
    for axes in (losses, metrics):
        axes.axvline(result.best_step, color="grey", linestyle="--", linewidth=1)
        for end in ends:
            axes.axvline(end, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
