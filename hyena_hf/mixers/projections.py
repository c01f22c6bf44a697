# SPDX-License-Identifier: Apache-2.0
"""Linear layers between the layout of a model, (B, L, D), and that of convolutions, (B, D, L), without a copy.

A matrix product can write its result in either order at the same price; a copy in the other order costs as much as the
gates of an operator. That holds for gradients too, but autograd would hand on those of a transposed input transposed,
which the operator behind would read with a stride; so they are formed here. What only looks like an `nn.Linear`
(adapters, quantised or sharded weights, hooks) is called.

B batch, L length, I features before the layer, O after it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hyena_hf.ops.engine import is_traced


def is_plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether a linear layer does nothing to x (B, L, D) on a CPU but the product with its weight in float32."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or x.device.type != "cpu":
        return False
    if x.dtype != torch.float32 or linear.weight.dtype != x.dtype or torch.is_autocast_enabled("cpu"):
        return False
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(linear) and not _has_any_global_hook()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, in_rows: bool) -> Tensor:
    """A linear layer of x (B, L, I) -> (B, L, O), with time contiguous in memory or features."""
    weights = weight.expand(x.shape[0], -1, -1)
    left, right = (weights, x.mT) if in_rows else (x, weights.mT)
    if bias is None:
        y = torch.bmm(left, right)
    else:
        y = torch.baddbmm(bias.unsqueeze(-1) if in_rows else bias, left, right)
    return y.mT if in_rows else y


class _Product(torch.autograd.Function):
    """`_product` from the other layout, in which the gradient of x goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, in_rows: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.in_rows = in_rows
        return _product(x, weight, bias, in_rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), needs = grad_outputs, ctx.saved_tensors, ctx.needs_input_grad
        of_x = _product(grad, weight.mT, None, not ctx.in_rows) if needs[0] else None
        of_weight = None
        if needs[1]:
            of_weight = grad[0].mT @ x[0]
            for row, inputs in zip(grad[1:], x[1:], strict=True):  # one product for all would make a matrix a row
                of_weight.addmm_(row.mT, inputs)
        return of_x, of_weight, grad.sum((0, 1)) if needs[2] else None, None


def _linear(linear: nn.Linear, x: Tensor, in_rows: bool) -> Tensor:
    # compilers choose layouts themselves, and TorchScript saves no functions
    product = _product if is_traced() else _Product.apply
    return product(x, linear.weight, linear.bias, in_rows)


def project_down(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply the layer to x (B, L, D) -> (B, E, L)."""
    return _linear(linear, x, in_rows=True).mT


def project_up(linear: nn.Linear, y: Tensor) -> Tensor:
    """Apply the layer to y (B, E, L) -> (B, L, D)."""
    return _linear(linear, y.mT, in_rows=False)


__all__ = ["is_plain", "project_down", "project_up"]
