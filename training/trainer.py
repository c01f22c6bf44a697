"""HyenaTrainer: transformers' Trainer with our parameter groups, atomic checkpoints and a stop at the first non-finite
number.

A checkpoint is written into `OUTPUT/incomplete/checkpoint-N`, flushed to the disk, and renamed to
`OUTPUT/checkpoint-N` when it is whole; only then are older ones deleted. So a process killed during a save, or a full
disk, leaves the checkpoints before it as they were, and no folder named `checkpoint-*` is ever half written. The disk
must hold `save_total_limit` + 1 of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from hyena_hf.filters import ModalFilter
from training.parameter_groups import get_parameter_groups


logger = logging.getLogger(__name__)

STAGING = "incomplete"  # beside the checkpoints; its name must not begin with "checkpoint-"
STATE_FILE = "trainer_state.json"
SHARDED_FILES = ("pytorch_model_fsdp.bin", "optimizer.bin")  # of FSDP2, gathered

Penalty = Callable[[Any], torch.Tensor]  # of a model


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are intact."""


class HyenaTrainer(Trainer):
    """Trainer for causal language models on packed rows.

    Args:
        model: any Transformers model; forward is called with `use_cache=False` where the configuration knows that
            field (attention models read packed position ids only then), and the configuration is left as it was.
        args: as for Trainer.
        filter_learning_rate: of the long filters' parameters; None means `args.learning_rate`.
        penalty: what is added to the loss of every step, from the model alone (`HankelPenalty`); losses that are
            logged are without it.
        **kwargs: as for Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        filter_learning_rate: float | None = None,
        penalty: Penalty | None = None,
        **kwargs: Any,
    ) -> None:
        self.filter_learning_rate = filter_learning_rate
        self.penalty = penalty
        self.clock = StepClock()
        self._staging: Path | None = None
        configured = vars(model.config).get("use_cache")
        super().__init__(model, args, callbacks=[self.clock, StablePoles(), *kwargs.pop("callbacks", [])], **kwargs)
        self._fixed_inputs: dict[str, Any] = {} if configured is None else {"use_cache": False}
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator.state.fsdp_plugin)
        model.config.use_cache = configured  # Trainer has put its own choice there, and would save it with the model
        if configured is None:
            del vars(model.config)["use_cache"]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer named by the arguments on the model's parameter groups."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            groups = get_parameter_groups(
                target,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                filter_learning_rate=self.filter_learning_rate,
            )
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that is whole."""
        if resume_from_checkpoint is True:
            output_dir = Path(str(self.args.output_dir))
            last = last_good_checkpoint(output_dir)
            if last is None:
                raise ValueError(f"{output_dir} holds no complete checkpoint to resume from; train without resuming")
            resume_from_checkpoint = str(last)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def load_best(self) -> None:
        """Load the best checkpoint where there was no training, which shards the model."""
        if self.is_fsdp_enabled:
            self.create_optimizer()  # FSDP2 prepares no model without one
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
            self.model_wrapped = self.model
        self._load_best_model()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss without making a cache."""
        return super().compute_loss(model, {**inputs, **self._fixed_inputs}, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward; a loss that is not finite stops training before the update."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._require_finite(loss, "loss")
        if self.penalty is not None:
            # every process has the same weights, so its own gradient is that of all
            added = self.penalty(self.accelerator.unwrap_model(model)) / self.current_gradient_accumulation_steps
            self.accelerator.backward(added)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if self.accelerator.scaler is None:  # a float16 scaler skips such a step itself
            self._require_finite(torch.as_tensor(norm), "gradient norm")
        return norm

    def _require_finite(self, value: torch.Tensor, what: str) -> None:
        if not torch.isfinite(value).all():
            last = last_good_checkpoint(Path(str(self.args.output_dir)))
            raise FloatingPointError(
                f"the {what} at step {self.state.global_step + 1} is {value.item()}; training stopped before this "
                f"step's update; last good checkpoint: {last or 'none yet'}; lower the learning rate "
                f"({self.args.learning_rate:g}) or look at the data of this step"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the seconds spent in training steps so far, runs before a resume included."""
        super().log({**logs, "train_seconds": self.clock.seconds}, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there when it is whole."""
        step = self.state.global_step
        run_dir = Path(super()._get_output_dir(trial))
        self._require_finite_weights(run_dir)
        with self._staged(run_dir / STAGING):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            self._point_best_checkpoint_to(run_dir)
            if self.args.should_save:
                publish(run_dir / STAGING / f"checkpoint-{step}", run_dir / f"checkpoint-{step}")
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _staged(self, staging: Path) -> Iterator[None]:
        """Let Trainer save into the staging folder; clean it up whatever happens."""
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            yield
        except Exception as error:
            last = last_good_checkpoint(staging.parent)
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {staging.parent} ({error}); "
                f"last good checkpoint: {last or 'none yet'}; free space, then resume"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    def _require_finite_weights(self, run_dir: Path) -> None:
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"parameter {name} is not finite after step {self.state.global_step}; it was not saved; last good "
                    f"checkpoint: {last_good_checkpoint(run_dir) or 'none yet'}; lower the learning rate"
                )

    def _point_best_checkpoint_to(self, run_dir: Path) -> None:
        """Where this checkpoint is the best so far, record its final place, not the staging folder."""
        best = self.state.best_model_checkpoint
        if best is not None and self._staging is not None and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(run_dir / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / STATE_FILE))


class StepClock(TrainerCallback):
    """Seconds spent between the beginnings and the ends of optimizer steps: no evaluation, no saving, no loading."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Go on from the seconds in the history of the checkpoint."""
        self.seconds = next(
            (logs["train_seconds"] for logs in reversed(state.log_history) if "train_seconds" in logs), 0.0
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._begun


class StablePoles(TrainerCallback):
    """Poles of modal filters that an update has pushed out of the unit disc go back to its edge."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Project the filters of the model."""
        for module in kwargs["model"].modules():
            if isinstance(module, ModalFilter):
                module.project_()


def check_sharding(plugin: Any) -> None:
    """Refuse settings of accelerate's `FullyShardedDataParallelPlugin` with which a run could not be resumed or saved.

    Raises:
        ValueError: FSDP1, or checkpoints in shards.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(f"models are sharded by FSDP2, got FSDP{plugin.fsdp_version}; pass --fsdp_version 2")
    if plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"checkpoints are made of whole files, got {plugin.state_dict_type.name}; pass --fsdp_state_dict_type "
            "FULL_STATE_DICT to accelerate launch"
        )


def publish(staged: Path, target: Path) -> None:
    """Move a folder that is whole to its place, as one step for anyone who looks; its files reach the disk before its
    name.

    A folder already there is moved aside into the staging folder first, which the caller removes.
    """
    for path in staged.rglob("*"):
        if path.is_file():
            _flush(path)
    if target.exists():
        target.rename(staged.with_name(f"replaced-{target.name}"))
    staged.rename(target)
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush it
        _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until the file's or folder's content is on the disk; a disk that is full says so here at the latest."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """Find the newest checkpoint that is whole; damaged ones are passed over with a warning."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.match(path.name))]
    for step, path in sorted(found, reverse=True):
        fault = _fault(path, step)
        if fault is None:
            return path
        logger.warning("%s is passed over: %s", path, fault)
    return None


_NAME = re.compile(r"^checkpoint-(\d+)$")


def _fault(checkpoint: Path, step: int) -> str | None:
    """Say what is missing or truncated in a checkpoint of a training run; None if it can be resumed from."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"{STATE_FILE} is not that of step {step}"
    sharded = any((checkpoint / name).exists() for name in SHARDED_FILES)
    for name in (*(SHARDED_FILES if sharded else ("optimizer.pt",)), "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or truncated"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it holds no .safetensors weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is truncated or foreign ({error})"
    return None
