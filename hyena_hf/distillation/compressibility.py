# SPDX-License-Identifier: Apache-2.0
"""Train filters that few states hold: penalties that a training loss can carry.

`hankel_tail` is what a filter of d states must leave of the Hankel matrix. With sigma its singular values,

    tail = sum_{i>d} sigma_i^2 / sum_i sigma_i^2 = min_V ||H - H V V^T||^2 / ||H||^2,    V (n, d) orthonormal

(Eckart and Young 1936), the quantity of the lower bound in `certificates.py`. At the best V the gradient is that of
the quotient with V held fixed, so that V comes from a few products with H and no decomposition is differentiated.
Hankel singular values in a training loss make layers compressible that are recurrences already (arXiv 2510.22951);
here they are those of long filters.

`roughness` is a cheaper one: the energy of differences of neighbouring taps. `benchmarks/results/compressibility.md`
compares them: at weight 1 `hankel_tail` gave the lower loss and `roughness` the closer fits of 8 states.

C filters, L taps, n rows of H, d states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyena_hf.filters import ModalFilter
from hyena_hf.mixers import HyenaMixer
from hyena_hf.modeling_hyena import HyenaPreTrainedModel

from .hankel import hankel_columns, orthonormal_rows, window_size


_ROUNDS = 2  # of subspace iteration


def hankel_tail(h: Tensor, states: int) -> Tensor:
    """Share of the squared Hankel singular values beyond the `states` largest, (C,) between 0 and 1; differentiable.

    An upper bound of that share, at most 0.15 above it from 4 states on: subspace iteration from a fixed start ends
    before flat spectra are told apart. O(d L log L + d^2 L) time.

    Args:
        h: Taps (C, L), at least 2; the one at lag 0 does not count.
        states: d, below L // 2.

    Raises:
        ValueError: `states` is not between 1 and L // 2 - 1: nothing would be left.
    """
    size = window_size(h.shape[1])
    if not 1 <= states < size:
        raise ValueError(
            f"states ({states}) must be from 1 to {size - 1}: a Hankel matrix of {h.shape[1]} taps has {size} rows"
        )
    taps = h[:, 1 : 2 * size]
    with torch.no_grad():
        block = torch.randn(states, size, generator=torch.Generator().manual_seed(0)).to(taps)
        block = block.expand(len(taps), -1, -1)
        for _ in range(_ROUNDS):
            block = orthonormal_rows(hankel_columns(taps, block))
    times = torch.arange(1, 2 * size, dtype=taps.dtype, device=taps.device)
    total = (torch.minimum(times, 2 * size - times) * taps.square()).sum(dim=1)
    held = hankel_columns(taps, block).square().sum(dim=(1, 2))
    return 1 - held / total.clamp(min=torch.finfo(taps.dtype).tiny)


def roughness(h: Tensor) -> Tensor:
    """Energy of the differences of neighbouring taps over four times that of the taps, (C,) from 0 to 1.

    Args:
        h: Taps (C, L), at least 3; the one at lag 0 does not count.
    """
    taps = h[:, 1:]
    energy = taps.square().sum(dim=1).clamp(min=torch.finfo(taps.dtype).tiny)
    return taps.diff(dim=1).square().sum(dim=1) / (4 * energy)


@dataclass(frozen=True)
class HankelPenalty:
    """Mean `hankel_tail` of all long filters of a model, times a weight, to add to a training loss.

    Attributes:
        weight: Of the mean share, in the unit of the loss.
        states: State size that the filters are to be distilled to.
    """

    weight: float
    states: int = 16

    def __call__(self, model: HyenaPreTrainedModel) -> Tensor:
        """A scalar with gradients."""
        return self.weight * torch.cat([hankel_tail(h, self.states) for h in long_filters(model)]).mean()


@dataclass(frozen=True)
class RoughnessPenalty:
    """Mean `roughness` of all long filters of a model, times a weight, to add to a training loss."""

    weight: float

    def __call__(self, model: HyenaPreTrainedModel) -> Tensor:
        """A scalar with gradients."""
        return self.weight * torch.cat([roughness(h) for h in long_filters(model)]).mean()


def long_filters(model: HyenaPreTrainedModel) -> list[Tensor]:
    """Taps (C, max_position_embeddings) of every layer that `distill` would fit, with gradients.

    Raises:
        ValueError: There is none.
    """
    length = model.config.max_position_embeddings
    mixers = [one for one in model.modules() if isinstance(one, HyenaMixer)]
    found = [one.filter(length).flatten(0, 1) for one in mixers if not isinstance(one.filter, ModalFilter)]
    if not found:
        raise ValueError("a penalty on long filters needs a model that has some; train this one without it")
    return found


__all__ = ["HankelPenalty", "RoughnessPenalty", "hankel_tail", "roughness"]
