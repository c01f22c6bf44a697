# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution with a few taps, as a sum of shifted inputs.

    y[b, c, t] = bias[c] + sum_k weight[c, k] x[b, c, t - (K - 1) + k]

The last tap multiplies the current token, as in `torch.nn.Conv1d` padded on the left. A sum of K shifted products
costs less than a grouped `conv1d` of that size.
"""

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own K taps.

    Args:
        x: Input (B, C, L).
        weight: Taps (C, K).
        bias: (C,) or None.
        past: The K - 1 inputs before `x`, (B, C, K - 1); None means zeros.

    Returns:
        (B, C, L), dtype of `x` promoted with that of `weight`.

    Raises:
        ValueError: Shapes that do not fit.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"expected x (B, C, L) and weight (C, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if past is not None and past.shape != (*x.shape[:2], weight.shape[1] - 1):
        raise ValueError(
            f"past must hold the {weight.shape[1] - 1} inputs before x, {(*x.shape[:2], weight.shape[1] - 1)}, got "
            f"{tuple(past.shape)}"
        )
    taps, length = weight.shape[1], x.shape[-1]
    if past is None:
        padded = torch.nn.functional.pad(x, (taps - 1, 0))
    else:
        padded = torch.cat([past.to(x.dtype), x], dim=-1)
    y = padded[..., :length] * weight[:, :1]
    for k in range(1, taps):
        y = torch.addcmul(y, padded[..., k : k + length], weight[:, k : k + 1])
    return y if bias is None else y + bias.unsqueeze(-1)
