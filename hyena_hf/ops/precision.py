# SPDX-License-Identifier: Apache-2.0
"""Choose the arithmetic of an operator: the dtype of its sums, and no half precision under autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context in which autocast does not run matrix products of this device in half precision."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def outside_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function of tensors, or a method, that runs `without_autocast` on the device of the first of them."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with without_autocast(first.device):
            return function(*args, **kwargs)

    return run


# Rows up to this length are summed exactly in models of order 2 too: there they cost little beside the projections.
_SHORT = 256


def is_short(length: int) -> bool:
    """Whether rows of a length are summed exactly, also in models of order 2; symbolic lengths are not."""
    return not isinstance(length, torch.SymInt) and length <= _SHORT


def transform_dtype(dtype: torch.dtype, device: torch.device, exact: bool) -> torch.dtype:
    """Real dtype of the transforms of inputs in `dtype`, at least float32.

    The rounding error of a float32 transform spreads over all its outputs and depends on its size, so on padding and
    batching. One convolution a layer keeps logits within 4e-6; layers of order 3 amplify it beyond 1e-5 (both in
    benchmarks/results/batching.md), so they ask for `exact` sums: float64 transforms, rounded once. Only CPUs are sure
    to have them at a bearable price, and `torch.set_float32_matmul_precision("high")`, torch's switch for faster
    float32 arithmetic, turns them off.
    """
    wide = torch.promote_types(dtype, torch.float32)
    wants = exact and device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return torch.float64 if wants else wide
