"""What a fine-tuned model is judged by: accuracy, macro F1 and Matthews correlation from scikit-learn, bits per token.

Labels of -100 do not count. Published figures: accuracy for GenomicBenchmarks, MCC or F1 for the tasks of the
Nucleotide Transformer (`training.tasks`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data import UNPREDICTED


CLASSIFICATION_METRICS = ("mcc", "f1", "accuracy")
LOSS, BITS = "loss", "bits"


def greater_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is a better model."""
    return metric not in (LOSS, BITS)


def metrics_of(task: str) -> tuple[str, ...]:
    """The metrics of a task, the one that chooses the best model by default first."""
    return (BITS, LOSS) if task == "lm" else (*CLASSIFICATION_METRICS, LOSS)


def classification_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """Score predicted classes.

    Args:
        predictions: classes, any integer array.
        labels: true classes of the same shape, -100 where there is none.

    Returns:
        `accuracy`; `f1`, the mean over the classes that occur (0 for one never predicted right); `mcc`, Matthews
        correlation, also for more than two classes (0 where all predictions or all labels are one class).

    Raises:
        ValueError: shapes differ, or no label counts.
    """
    sklearn_metrics = _sklearn_metrics()
    truth, guess = _counted(predictions, labels)
    return {
        "accuracy": float(sklearn_metrics.accuracy_score(truth, guess)),
        "f1": float(sklearn_metrics.f1_score(truth, guess, average="macro", zero_division=0)),
        "mcc": float(sklearn_metrics.matthews_corrcoef(truth, guess)),
    }


def confusion(predictions: Any, labels: Any, num_classes: int) -> list[list[int]]:
    """How many of each true class (rows) were given each class (columns); -100 does not count."""
    truth, guess = _counted(predictions, labels)
    return _sklearn_metrics().confusion_matrix(truth, guess, labels=list(range(num_classes))).tolist()


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums of the losses of the next tokens and their number, for every row.

    Args:
        logits: (B, L, V).
        labels: (B, L), not shifted, -100 where no loss is wanted.

    Returns:
        (B, 2) float64; whole batches of rows add up exactly, however the rows are batched.
    """
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=UNPREDICTED, reduction="none"
    )
    return torch.stack([losses.double().sum(dim=1), (targets != UNPREDICTED).double().sum(dim=1)], dim=1)


def language_metrics(sums: Any) -> dict[str, float]:
    """`bits` per predicted token from the rows (N, 2) of `row_losses`."""
    loss, count = np.asarray(sums, dtype=np.float64).sum(axis=0)
    return {BITS: float(loss / count / math.log(2))}


def _counted(predictions: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions that count, each (n,)."""
    guess, truth = np.asarray(predictions), np.asarray(labels)
    if guess.shape != truth.shape:
        raise ValueError(
            f"predictions have shape {guess.shape}, labels {truth.shape}; expected one class for each label"
        )
    counted = truth != UNPREDICTED
    if not counted.any():
        raise ValueError(f"none of the {truth.size} labels counts (all are {UNPREDICTED}); expected at least one")
    return truth[counted], guess[counted]


def _sklearn_metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError("metrics need scikit-learn; install it with: pip install 'hyena-hf[train]'") from error
    return metrics
