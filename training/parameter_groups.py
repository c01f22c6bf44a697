"""Optimizer groups as a function of the model: who decays, who has the filters' learning rate.

Our models name every parameter in the table of their `_init_weights` and give it out as `parameter_policy()`. Any
other model gets the common rule: matrices and embeddings (2 and more dimensions) decay, vectors and scalars (biases,
norm scales) do not, all have one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils.import_utils import is_peft_available


BASE, FILTER = "base", "filter"
_WRAPPER_INFIXES = (".base_layer", ".modules_to_save.default", ".original_module")  # what PEFT puts into names


@runtime_checkable
class HasParameterPolicy(Protocol):
    """A model that knows for each parameter name whether it decays and whether it belongs to `base` or `filter`."""

    def parameter_policy(self) -> dict[str, tuple[bool, str]]:
        """Return {name: (decays, group)}; of tied parameters the first name is enough."""
        ...


def get_parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    filter_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model for an optimizer; each is in exactly one group, tied ones once.

    Args:
        model: any model, also inside DistributedDataParallel, torch.compile or PEFT. Adapter weights, which no policy
            table knows, follow the common rule.
        learning_rate: of the base parameters, positive.
        weight_decay: of the parameters that decay, not negative.
        filter_learning_rate: of the filter parameters; None means `learning_rate`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name` (`base/decay`, `base/no_decay`, `filter/decay`,
        `filter/no_decay`), without the empty ones.

    Raises:
        ValueError: a rate out of range, nothing to train, a policy that leaves out a parameter of the model, or a
            filter learning rate for a model without filter parameters.
    """
    filter_learning_rate = learning_rate if filter_learning_rate is None else filter_learning_rate
    _check_rates(learning_rate, filter_learning_rate, weight_decay)
    rates = {BASE: learning_rate, FILTER: filter_learning_rate}
    groups: dict[str, dict[str, Any]] = {}
    inner, adapted = _unwrap(model)
    for parameter, decays, group in _policies(inner, adapted=adapted):
        name = f"{group}/{'decay' if decays else 'no_decay'}"
        settings = {"name": name, "lr": rates[group], "weight_decay": weight_decay if decays else 0.0, "params": []}
        groups.setdefault(name, settings)["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter; expected at least one with requires_grad=True")
    if filter_learning_rate != learning_rate and not any(name.startswith(FILTER) for name in groups):
        raise ValueError(
            f"filter_learning_rate ({filter_learning_rate}) differs from learning_rate ({learning_rate}), but "
            f"{type(inner).__name__} has no trainable filter parameters; leave filter_learning_rate out"
        )
    return list(groups.values())


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, torch.compile and PEFT wrappers."""
    return _unwrap(model)[0]


def _unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """The innermost model, and whether PEFT has put adapters into it."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model(), True
    return model, False


def _policies(model: nn.Module, *, adapted: bool) -> Iterator[tuple[nn.Parameter, bool, str]]:
    """Yield each trainable parameter once, with its decay and group."""
    policy = model.parameter_policy() if isinstance(model, HasParameterPolicy) else None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = name
        for infix in _WRAPPER_INFIXES:
            plain = plain.replace(infix, "")
        if policy is not None and plain in policy:
            decays, group = policy[plain]
            yield parameter, decays, group
        elif policy is None or adapted:
            yield parameter, parameter.ndim >= 2, BASE
        else:
            raise ValueError(
                f"parameter {name!r} is missing from {type(model).__name__}.parameter_policy(); "
                "add it to the table of _init_weights"
            )


def _check_rates(learning_rate: float, filter_learning_rate: float, weight_decay: float) -> None:
    for name, rate in {"learning_rate": learning_rate, "filter_learning_rate": filter_learning_rate}.items():
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {rate}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
