# SPDX-License-Identifier: Apache-2.0
"""Linear layers between the layout of a model, (B, L, D), and that of convolutions, (B, D, L), without a copy.

A matrix product can write its result in either order at the same price; a copy in the other order costs as much as the
gates of an operator. What only looks like an `nn.Linear` (adapters, quantised or sharded weights, hooks) is called.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether a linear layer does nothing to x (B, L, D) on a CPU but the product with its weight in float32."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or x.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or linear.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return False
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(linear) and not _has_any_global_hook()


def project_down(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply the layer to x (B, L, D) -> (B, E, L)."""
    weight = linear.weight.expand(x.shape[0], -1, -1)
    if linear.bias is None:
        return torch.bmm(weight, x.transpose(1, 2))
    return torch.baddbmm(linear.bias.unsqueeze(-1), weight, x.transpose(1, 2))


def project_up(linear: nn.Linear, y: Tensor) -> Tensor:
    """Apply the layer to y (B, E, L) -> (B, L, D)."""
    weight = linear.weight.t().expand(y.shape[0], -1, -1)
    if linear.bias is None:
        return torch.bmm(y.transpose(1, 2), weight)
    return torch.baddbmm(linear.bias, y.transpose(1, 2), weight)


__all__ = ["is_plain", "project_down", "project_up"]
