"""One training recipe for any causal language model: `train(model, rows, validation_rows, output_dir=...,
recipe=...)`.

AdamW, cosine schedule with linear warm-up, gradients clipped to norm 1, no dropout beyond the model's own. The same
call goes on where an earlier one with the same recipe stopped, however it stopped, and returns at once if that one had
finished.

    OUTPUT/checkpoint-N/    what training resumes from          OUTPUT/model/        the trained model, for
    from_pretrained OUTPUT/metrics.jsonl    one line for each logged step       OUTPUT/loss.png      the loss curves
    OUTPUT/recipe.json      what a resumed run must agree with  OUTPUT/result.json   written last: the run is complete
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from training.data import PackedRows, collate_rows
from training.trainer import STAGING, STATE_FILE, HyenaTrainer, Penalty, last_good_checkpoint, publish


RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Recipe:
    """How to train. Published Hyena language models: AdamW, weight decay 0.1, cosine to a tenth, warm-up 1%, clip 1.0.

    The betas are those of the paper's tables A.1 and A.3 (Poli et al. 2023, arXiv 2302.10866); its code has (0.9,
    0.999).
    """

    steps: int
    batch_size: int = 8  # rows in an optimizer step on each device
    learning_rate: float = 1e-3  # the peak
    filter_learning_rate: float | None = None  # of the long filters; None: as the others
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: float = 0.05  # fraction of the steps
    final_rate: float = 0.1  # fraction of the peak
    clip: float = 1.0
    seed: int = 0  # of the order of the rows and of dropout
    log_every: int = 10  # steps between points of the loss curve
    save_every: int = 100  # steps between checkpoints, a multiple of log_every
    evaluate_every: int = 100  # steps between validation losses

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        fields = asdict(self)
        for name in ("steps", "batch_size", "log_every", "save_every", "evaluate_every"):
            if fields[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {fields[name]}")
        if self.save_every % self.log_every:
            raise ValueError(
                f"save_every ({self.save_every}) must be a multiple of log_every ({self.log_every}), "
                "so that a resumed run has the same loss curve"
            )
        if not (0 <= self.warmup < 1 and 0 <= self.final_rate <= 1):
            raise ValueError(f"warmup ({self.warmup}) must be in [0, 1) and final_rate ({self.final_rate}) in [0, 1]")


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave; losses in bits for each predicted token (for byte tokens: bits per byte)."""

    steps: int
    train_seconds: float  # in optimizer steps only, over all parts of a resumed run
    tokens_per_second: float
    loss_curve: list[tuple[int, float]]  # (step, mean since the last point)
    validation_curve: list[tuple[int, float]]
    model_dir: str


def train(
    model: PreTrainedModel,
    train_rows: PackedRows,
    validation_rows: PackedRows,
    *,
    output_dir: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    penalty: Penalty | None = None,
) -> TrainingResult:
    """Train a causal language model in place, or go on with a run that was interrupted; works under torchrun.

    Args:
        model: any Transformers causal language model whose forward reads packed position ids.
        train_rows, validation_rows: from `pack_documents`.
        output_dir: holds everything about this run; another run needs another folder.
        recipe: see `Recipe`.
        tokenizer: saved with the model.
        penalty: added to the training loss, as `hyena_hf.distillation.HankelPenalty(0.1)` for filters that few states
            hold; a resumed run must have one of the same `repr`.

    Raises:
        ValueError: the folder belongs to a run with another recipe, model or data.
        FloatingPointError: a loss, gradient or weight that is not finite; names the step.
        CheckpointError: a checkpoint could not be written (full disk).
    """
    output_dir = Path(output_dir)
    trainer = _make_trainer(model, train_rows, validation_rows, output_dir, recipe, tokenizer, penalty)
    if trainer.is_world_process_zero():
        _claim(output_dir, model, train_rows, recipe, penalty)
    trainer.accelerator.wait_for_everyone()
    if (output_dir / RESULT_FILE).exists():
        model.load_state_dict(type(model).from_pretrained(output_dir / "model").state_dict())
        return _read_result(output_dir)
    last = last_good_checkpoint(output_dir)
    if last is not None and _step(last) >= recipe.steps:  # killed between the last checkpoint and the result
        trainer.state = TrainerState.load_from_json(str(last / STATE_FILE))
        model.load_state_dict(type(model).from_pretrained(last).state_dict())
    else:
        trainer.train(resume_from_checkpoint=last is not None)
    tokens = recipe.steps * recipe.batch_size * trainer.args.world_size * train_rows.length
    result = _summarise(trainer.state, tokens, output_dir)
    _save_final(trainer, output_dir, result)
    return result


def _make_trainer(
    model: PreTrainedModel,
    train_rows: PackedRows,
    validation_rows: PackedRows,
    output_dir: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    penalty: Penalty | None,
) -> HyenaTrainer:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_rate},
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        max_grad_norm=recipe.clip,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=recipe.log_every,
        save_steps=recipe.save_every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        prediction_loss_only=True,
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or torchrun's processes would not find each other
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = HyenaTrainer(
        model,
        arguments,
        filter_learning_rate=recipe.filter_learning_rate,
        penalty=penalty,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=collate_rows,
        processing_class=tokenizer,
        callbacks=[TrainingBar(), MetricsFile(output_dir / "metrics.jsonl")],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _claim(
    output_dir: Path, model: PreTrainedModel, train_rows: PackedRows, recipe: Recipe, penalty: Penalty | None
) -> None:
    """Write down what this run is; refuse a folder in which another run was begun."""
    this = {
        **asdict(recipe),
        "betas": list(recipe.betas),
        "model": type(model).__name__,
        "model_digest": model_digest(model),
        "length": train_rows.length,
        "tokens": train_rows.num_tokens,
        "data_digest": train_rows.digest(),
        "penalty": None if penalty is None else repr(penalty),
    }
    claim(output_dir, this)


def claim(output_dir: Path, this: dict[str, Any], name: str = "recipe.json") -> None:
    """Write down in OUTPUT/NAME what a run is; refuse a folder in which another run was begun.

    Args:
        output_dir: folder of the run.
        this: what a resumed run must agree with, as JSON gives it back (lists, not tuples).
        name: of the file.

    Raises:
        ValueError: the folder holds another run, with the differences, or checkpoints of unknown origin.
    """
    path = output_dir / name
    if path.exists():
        before = json.loads(path.read_text())
        differing = [
            f"{key} ({before.get(key)} there, {value} now)" for key, value in this.items() if before.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"{output_dir} holds another run: {', '.join(differing)}; choose another output folder, or repeat the "
                "command with which that run was begun"
            )
    elif last_good_checkpoint(output_dir) is not None:
        raise ValueError(
            f"{output_dir} holds checkpoints of a run that was not begun here; choose another output folder"
        )
    write_json(path, this)


def model_digest(model: torch.nn.Module) -> str:
    """A short hash of the names and shapes of all parameters."""
    shapes = "".join(f"{name}{tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return hashlib.sha256(shapes.encode()).hexdigest()[:16]


def _summarise(state: TrainerState, tokens: int, output_dir: Path) -> TrainingResult:
    history = state.log_history
    seconds = max((logs["train_seconds"] for logs in history), default=0.0)
    return TrainingResult(
        steps=state.global_step,
        train_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        loss_curve=_curve(history, "loss"),
        validation_curve=_curve(history, "eval_loss"),
        model_dir=str(output_dir / "model"),
    )


def _curve(history: list[dict[str, float]], key: str) -> list[tuple[int, float]]:
    return [(int(logs["step"]), logs[key] / math.log(2)) for logs in history if key in logs]


def _save_final(trainer: HyenaTrainer, output_dir: Path, result: TrainingResult) -> None:
    """Save the model, the plot and last the result, each whole or not at all."""
    staged = output_dir / STAGING / "model"
    trainer.save_model(str(staged))
    if trainer.is_world_process_zero():
        publish(staged, output_dir / "model")
        shutil.rmtree(output_dir / STAGING)
        plot_losses(result, output_dir / "loss.png")
        write_json(output_dir / RESULT_FILE, asdict(result))
    trainer.accelerator.wait_for_everyone()


def _read_result(output_dir: Path) -> TrainingResult:
    fields = json.loads((output_dir / RESULT_FILE).read_text())
    for name in ("loss_curve", "validation_curve"):
        fields[name] = [(step, bits) for step, bits in fields[name]]
    return TrainingResult(**fields)


def plot_losses(result: TrainingResult, path: Path) -> None:
    """Draw training and validation loss against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per predicted token")
    for label, curve in {"training": result.loss_curve, "validation": result.validation_curve}.items():
        axes.plot([step for step, _ in curve], [bits for _, bits in curve], label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=1))
    unfinished.replace(path)


class TrainingBar(TrainerCallback):
    """A progress bar over the steps with the last training loss in bits for each token."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the bar where the run goes on."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, unit="step", disable=not state.is_world_process_zero
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Advance."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the loss."""
        if self._bar is not None and "loss" in kwargs["logs"]:
            self._bar.set_postfix(bits=f"{kwargs['logs']['loss'] / math.log(2):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class MetricsFile(TrainerCallback):
    """Append each log to a .jsonl file; a resumed run first drops what the interrupted one logged after its last
    checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the history so far."""
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(logs) + "\n" for logs in state.log_history))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Append the newest entry."""
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
