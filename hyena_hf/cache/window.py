# SPDX-License-Identifier: Apache-2.0
"""The past of the short convolution."""

import torch
from torch import Tensor

from hyena_hf.ops import short_conv
from hyena_hf.ops.short_conv import short_conv_step

from .history import History, check_same, shift_right


class Window(History):
    """The last K - 1 inputs of the short convolution, zeros where a row has not seen so many.

    Kept with channels contiguous, (B, K - 1, C): a step reads and writes whole rows.
    """

    limit: int
    needs_taps = False

    def past(self, w: Tensor) -> Tensor:
        """The last K - 1 inputs before w (B, C, n), oldest first: (B, C, K - 1)."""
        if self.buffer is None:
            return w.new_zeros(*w.shape[:2], self.limit)
        past = self.buffer.mT
        check_same(past.shape[:2], past.dtype, w.shape[:2], w.dtype)
        return past

    def respond(self, w: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Short convolution with taps weight (C, K) and bias (C,)."""
        return short_conv(w, weight, bias, None if self.buffer is None else self.past(w))

    def commit(self, w: Tensor, counts: Tensor | None) -> None:
        """Remember the last of inputs w (B, C, n); of row b only the first counts[b] (None: all) are any."""
        full = torch.cat([self.past(w), w], dim=-1)
        if counts is not None:
            full = shift_right(full, w.shape[-1] - counts)
        self.replace(full[..., full.shape[-1] - self.limit :].mT)

    def follow(self, w: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Short convolution behind committed and pending inputs."""
        if self.pending is None:
            return None
        past = torch.cat([self.past(w), self.pending], dim=-1)
        return short_conv(w, weight, bias, past[..., past.shape[-1] - self.limit :])

    def step(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Answer one input x (B, C) a row and remember it: (B, C)."""
        past = self.buffer
        if past is None:
            return super().step(x, weight, bias)
        check_same((len(past), past.shape[2]), past.dtype, x.shape, x.dtype)
        y, following = short_conv_step(x, past, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        self.replace(following)
        return y


__all__ = ["Window"]
