# SPDX-License-Identifier: Apache-2.0
"""Comparison of a loaded model with what a reference computed from the same files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hyena_hf import HyenaForCausalLM


@dataclass(frozen=True)
class Published:
    """A checkpoint in its published form, and the reference's arrays.

    Args:
        folder: The files that a user would download.
        arrays: `input_ids` (B, L), `logits` (B, L, V) and `block0`, `block1`, ... (B, L, D) in float32; the same with
            the suffix `_64` in float64, with the reference's casts lifted, `_16` as it runs in bfloat16.
    """

    folder: Path
    arrays: dict[str, np.ndarray]

    @property
    def ids(self) -> torch.Tensor:
        """The tokens (B, L)."""
        return torch.tensor(self.arrays["input_ids"])


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference, each divided by the number's size where that is above 1."""
    wanted = torch.tensor(expected)
    if found.shape != wanted.shape:
        raise AssertionError(f"our shape is {tuple(found.shape)}, the reference's {tuple(wanted.shape)}")
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1)).max())


@torch.no_grad()
def differences(model: HyenaForCausalLM, published: Published, suffix: str = "") -> dict[str, float]:
    """Difference of every layer's output and of the logits, by name, in the order of computation."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(_module, _inputs, output) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layer.register_forward_hook(keep(f"block{i}")) for i, layer in enumerate(model.model.layers)]
    logits = model(published.ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    found["logits"] = logits
    return {name: difference(value, published.arrays[name + suffix]) for name, value in found.items()}


def assert_agrees(model: HyenaForCausalLM, published: Published, tolerance: float, suffix: str = "") -> None:
    """The logits are the reference's within the tolerance; else say at which layer the two part."""
    errors = differences(model, published, suffix)
    assert errors["logits"] <= tolerance, {name: f"{error:.1e}" for name, error in errors.items()}
