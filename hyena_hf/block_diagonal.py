# SPDX-License-Identifier: Apache-2.0
"""Linear layers with block-diagonal weights: the dense layers of M2-BERT.

Monarch Mixer (Fu et al. 2023, arXiv 2310.12109) replaces dense weights by Monarch matrices, products of block-diagonal
matrices and permutations; its published language models use a single block-diagonal factor.
"""

import torch
from torch import Tensor, nn


class BlockDiagonalLinear(nn.Module):
    """y = diag(W_1, ..., W_N) x + bias: block n maps the n-th part of the inputs to the n-th of the outputs.

    Args:
        inputs, outputs: Features, multiples of `blocks`.
        blocks: Number N of blocks.
        bias: Whether there is a bias.

    Attributes:
        weight: The blocks (N, outputs / N, inputs / N).
        bias: (outputs,) or None.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, bias: bool = True) -> None:
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(f"inputs ({inputs}) and outputs ({outputs}) must be multiples of blocks ({blocks})")
        self.weight = nn.Parameter(torch.empty(blocks, outputs // blocks, inputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., outputs) of inputs (..., inputs)."""
        blocks, outputs, inputs = self.weight.shape
        parts = x.reshape(-1, blocks, inputs).transpose(0, 1)
        y = torch.bmm(parts, self.weight.mT).transpose(0, 1).reshape(*x.shape[:-1], blocks * outputs)
        return y if self.bias is None else y + self.bias.to(y.dtype)


__all__ = ["BlockDiagonalLinear"]
