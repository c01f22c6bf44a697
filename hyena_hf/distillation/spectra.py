# SPDX-License-Identifier: Apache-2.0
"""Which frequencies the long convolutions of a model are fed with: `input_spectra`.

A filter sees products of projections, not text. Their power is averaged over overlapping segments under a Hann window
(Welch 1967), without taking means away: a convolution hears them too. B batch, D channels, H heads of width P, F = 257
frequencies.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hyena_hf.cache import NoMemory
from hyena_hf.mixers import HyenaMixer
from hyena_hf.modeling_hyena import HyenaPreTrainedModel


_SEGMENT = 512  # tokens; as far as correlations of inputs are looked at


class _Listener(NoMemory):
    """Takes down the power of what is pushed into the long convolutions of one layer, summed over segments.

    Args:
        mixer: Of the layer.
        power: (convolutions, H, F), added to.
    """

    def __init__(self, mixer: HyenaMixer, power: Tensor) -> None:
        super().__init__(mixer.make_histories(None, None))
        self.power, self.heads = power, None if mixer.num_heads == mixer.width else mixer.num_heads

    def push(self, index: int, w: Tensor, counts: Tensor | None, *operator: Any) -> Tensor:
        """As without a listener; index 0 is the short convolution."""
        if index > 0:
            found = segment_power(w) if self.heads is None else head_power(w, self.heads)
            self.power[index - 1] += found.to(self.power)
        return super().push(index, w, counts, *operator)


def segment_power(w: Tensor) -> Tensor:
    """Power of rows w (B, C, n), summed over rows and segments: (C, F) float64."""
    size = min(w.shape[-1], _SEGMENT)
    segments = w.double().unfold(-1, size, max(1, size // 2))  # (B, C, segments, size)
    window = torch.hann_window(size + 2, periodic=False, dtype=torch.float64, device=w.device)[1:-1]
    window = window / window.norm()
    return torch.fft.rfft(segments * window, n=_SEGMENT).abs().square().sum(dim=(0, 2))


def head_power(qkv: Tensor, heads: int) -> Tensor:
    """Mean power of the products k_i v_j of each head, for rows of projections qkv (B, 3 D, n): (H, F)."""
    _, k, v = (x.unflatten(1, (heads, -1)) for x in qkv.chunk(3, dim=1))  # (B, H, P, n)
    width = k.shape[2]
    found = [segment_power((k[:, :, i : i + 1] * v).flatten(1, 2)).unflatten(0, (heads, width)) for i in range(width)]
    return torch.stack(found).mean(dim=(0, 2))


@torch.no_grad()
def input_spectra(model: HyenaPreTrainedModel, batches: Iterable[Tensor]) -> dict[int, Tensor]:
    """Power of the input of every long convolution, on an even grid of frequencies from 0 to Nyquist.

    The model runs as it is; each mixer computes its convolutions once more beside it, with a listener.

    Args:
        model: A causal Hyena model.
        batches: Token ids (B, L), no padding.

    Returns:
        By layer, (C, F) float64 on the CPU, C = (order - 1) num_heads filters in the order of `filter(length)`. Heads
        of MultiHyena have the mean over their products k_i v_j. The unit differs between sets of other lengths.
    """
    body: Any = model.base_model
    mixers = {i: layer.mixer for i, layer in enumerate(body.layers) if isinstance(layer.mixer, HyenaMixer)}
    shape = _SEGMENT // 2 + 1
    power = {
        i: torch.zeros(one.order - 1, one.num_heads, shape, dtype=torch.float64, device=one.skip.device)
        for i, one in mixers.items()
    }
    hooks = [one.register_forward_pre_hook(partial(_listen, power[i])) for i, one in mixers.items()]
    training = model.training
    try:
        model.eval()
        for ids in batches:
            body(ids.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {i: one.flatten(0, 1).cpu() for i, one in power.items()}


def _listen(power: Tensor, mixer: HyenaMixer, inputs: tuple[Tensor, ...]) -> None:
    """Run the convolutions of a mixer on its input (B, L, D), for the listener alone."""
    p = mixer.in_proj(inputs[0]).transpose(1, 2)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    mix = mixer.gated_convolutions if mixer.num_heads == mixer.width else mixer.head_convolution
    mix(p, None, _Listener(mixer, power))


__all__ = ["input_spectra"]
