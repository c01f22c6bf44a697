# SPDX-License-Identifier: Apache-2.0
"""The long filters of Hyena layers: modules whose `forward(length)` returns taps (order - 1, num_heads, length).

An implicit filter (Poli et al. 2023, arXiv 2302.10866, section 3.3) is a function of time. With t_n = n / (M - 1) for
lag n and trained length M, theta_{n,b} = 2 pi n f_b / M and f_b = linspace(1e-4, K - 1, K):

    z_n = [t_n, cos theta_{n,1..K}, -sin theta_{n,1..K}]                positional features
    h_n = MLP(z_n) * (exp(-t_n |decay|) + shift)                       sine MLP and exponential modulation

so it does not depend on the length of the input: a shorter input uses a prefix. An explicit filter is its own taps.
A bidirectional model has as many filters again over later tokens, `forward(length, reverse=True)`.

Filters stay in float32 when a model is moved to a half-precision dtype (float64 follows `double()`): rounding a tap to
bfloat16 costs more than rounding a weight, since its error is summed over the whole sequence.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_hyena import HyenaConfig
from .ops.precision import without_autocast


def _filter_dtype() -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _round_to_float32(x: float) -> float:
    """The nearest float32, without a tensor: traced code may not read one."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def float32_linspace(start: float, end: float, count: int, index: Tensor) -> Tensor:
    """`torch.linspace(start, end, count)` in float32 at the given indices, which may lie behind its end.

    The published tables were made by it, and it gives other last bits on other processors. Like it, values are counted
    from the nearer end with a float32 step; sums are formed in float64 (where the device has it) and rounded once,
    which reproduces the published tables everywhere.
    """
    exact = torch.float32 if index.device.type == "mps" else torch.float64
    first, last = _round_to_float32(start), _round_to_float32(end)
    step = _round_to_float32(_round_to_float32(last - first) / max(count - 1, 1))
    index = index.to(exact)
    rising = first + step * index
    falling = last - step * (count - 1 - index)
    return torch.where(index < max(count // 2, 1), rising, falling).to(torch.float32)


def filter_times(length: int, trained_length: int, device: torch.device | None = None) -> Tensor:
    """Time of every lag in float32 (length,): 0 to 1 over the trained length, going on at the same pace behind it."""
    return float32_linspace(0.0, 1.0, trained_length, torch.arange(length, device=device))


def positional_features(
    length: int, trained_length: int, num_bands: int, device: torch.device | None = None
) -> Tensor:
    """Features of every lag in float32, (length, 2 * num_bands + 1).

    Published weights were trained on float32 angles, so they are formed in float32 here too: in float64 from the start
    the features of a trained model would differ by 1e-6.
    """
    lags = torch.arange(length, device=device)
    frequencies = float32_linspace(1e-4, num_bands - 1, num_bands, torch.arange(num_bands, device=lags.device))
    angles = frequencies * (2 * math.pi * lags.to(torch.float32) / trained_length).unsqueeze(-1)  # (length, K)
    # the complex exponential of the published code: cosines of the same angles differ from it in the last bit
    waves = torch.exp(-1j * angles)
    times = filter_times(length, trained_length, lags.device).unsqueeze(-1)
    return torch.cat([times, waves.real, waves.imag], dim=-1)


def decay_rates(config: HyenaConfig) -> Tensor:
    """Rates of the exponential windows in float32, (order - 1, num_heads), from slow to fast over the packed axis."""
    logarithm = math.log(config.modulation_target)
    count = (config.order - 1) * config.num_filters
    rates = float32_linspace(logarithm / config.slow_decay, logarithm / config.fast_decay, count, torch.arange(count))
    return rates.view(config.order - 1, config.num_filters)


class AtLeastFloat32(nn.Module):
    """A module that ignores conversions to half precision; `double()` raises it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype.itemsize >= 4:
                return moved
            return tensor.to(device=moved.device, dtype=torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(at_least_float32, recurse)


class LongFilter(AtLeastFloat32):
    """What all filters share: shape, support, and a dtype of at least float32.

    Attributes:
        is_causal: Whether there are no taps for later tokens.
        support: Lag from which all taps are zero; None for a filter that never ends.
        max_length: Longest filter that can be evaluated; None for no bound.
    """

    is_causal: bool = True
    support: int | None = None
    max_length: int | None = None

    def forward(self, length: int, *, reverse: bool = False) -> Tensor:
        """Taps (order - 1, num_heads, length), float32 or float64.

        Args:
            length: Number of lags.
            reverse: False: lags 0 to length - 1 into the past. True: lags 1 to length into the future.
        """
        if reverse and self.is_causal:
            raise ValueError("a causal filter has no taps for later tokens; build the model with is_causal=False")
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a filter of {length} taps was asked for, but it was trained for {self.max_length} "
                f"(max_position_embeddings); shorten the input, or set beyond_trained_length='extrapolate' where the "
                f"positional features are not trained"
            )
        inside = length if self.support is None else min(length, self.support)
        taps = self.exact_taps(inside, reverse=reverse)
        return taps if inside == length else nn.functional.pad(taps, (0, length - inside))

    def exact_taps(self, length: int, *, reverse: bool = False) -> Tensor:
        """`taps` in the filter's own dtype, also where autocast would run its layers in half precision."""
        with without_autocast(next(self.parameters()).device):
            return self.taps(length, reverse)

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The first taps within the support, as in `forward`."""
        raise NotImplementedError


class ReverseFilter:
    """The taps of a bidirectional filter over later tokens, in the shape of a filter."""

    def __init__(self, long_filter: LongFilter) -> None:
        self.filter = long_filter
        self.support, self.max_length = long_filter.support, long_filter.max_length

    def __call__(self, length: int) -> Tensor:
        """Taps for lags 1 to length into the future, (order - 1, num_heads, length)."""
        return self.filter(length, reverse=True)

    def exact_taps(self, length: int) -> Tensor:
        """Taps within the support, not padded."""
        return self.filter.exact_taps(length, reverse=True)


class FilterLinear(nn.Module):
    """x -> x weight^T + bias inside a filter.

    Not an `nn.Linear`, so that whatever looks for those in a model (quantisers, adapters on "all-linear") leaves the
    filters alone.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # until `_init_weights`, as in `nn.Linear`
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs) in the dtype of x: sharded training may hand over weights in bfloat16."""
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class FilterOutput(FilterLinear):
    """The last layer of a filter, whose output has time last: (length, inputs) -> (outputs, length)."""

    def forward(self, x: Tensor) -> Tensor:
        """The taps before modulation."""
        return self.weight.to(x.dtype) @ x.mT


class ImplicitFilter(LongFilter):
    """Filters given by a sine MLP of time; formulas and source at the top of this file.

    Args:
        config: The model's config.
        layer_idx: Layer that the filter belongs to.
    """

    decay_rates: Tensor | None

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_causal, self.order, self.num_heads = config.is_causal, config.order, config.num_filters
        self.trained_length = config.max_position_embeddings
        self.num_bands = config.filter_num_bands
        self.shift = config.modulation_shift
        self.support = config.filter_support(layer_idx)
        dtype = _filter_dtype()
        if config.beyond_trained_length == "refuse" or config.trainable_positional_features:
            self.max_length = self.trained_length
        if config.trainable_positional_features:
            self.features = nn.Parameter(self.initial_features().to(dtype))
        else:
            self.features = None

        width = config.filter_hidden_size
        sizes = [2 * self.num_bands + 1, *[width] * (config.filter_num_layers - 1)]
        outputs = (self.order - 1) * self.num_heads
        self.layers = nn.ModuleList(FilterLinear(a, b, dtype) for a, b in itertools.pairwise(sizes))
        self.output = FilterOutput(width, outputs, dtype, bias=False)
        # later tokens have an MLP of their own; all else is shared, as in Monarch Mixer
        self.reverse_layers = self.reverse_output = None
        if not config.is_causal:
            self.reverse_layers = nn.ModuleList(FilterLinear(a, b, dtype) for a, b in itertools.pairwise(sizes))
            self.reverse_output = FilterOutput(width, outputs, dtype, bias=False)
        # one frequency per hidden unit, shared by all layers as in the published models
        self.frequency = nn.Parameter(torch.full((width,), float(config.sine_frequency), dtype=dtype))
        # a buffer although computable: a published file may hold other rates
        self.register_buffer("decay_rates", decay_rates(config).to(dtype) if config.modulation else None)

    def initial_features(self) -> Tensor:
        """The positional features that a trainable table starts from."""
        return positional_features(self.trained_length, self.trained_length, self.num_bands)

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The formulas at the top of this file."""
        layers, output = (self.reverse_layers, self.reverse_output) if reverse else (self.layers, self.output)
        assert layers is not None and output is not None  # noqa: S101, PT018 (`forward` has refused; narrows types)
        device, dtype = self.frequency.device, torch.promote_types(self.frequency.dtype, torch.float32)
        if self.features is None:
            x = positional_features(length, self.trained_length, self.num_bands, device).to(dtype)
        else:
            x = self.features[:length].to(dtype)
        for layer in layers:
            x = torch.sin(self.frequency.to(dtype) * layer(x))
        h = output(x).view(self.order - 1, self.num_heads, length)
        if self.decay_rates is not None:
            times = filter_times(length, self.trained_length, device).to(dtype)
            h = h * (torch.exp(-self.decay_rates.abs().unsqueeze(-1) * times) + self.shift)
        return h


class ExplicitFilter(LongFilter):
    """Filters whose taps are parameters.

    Args:
        config: The model's config; `filter_length` gives the number of taps.
        layer_idx: Layer that the filter belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        support = config.filter_support(layer_idx)
        assert support is not None  # noqa: S101 (the config gives explicit filters a length)
        self.support = support
        self.max_length = config.max_position_embeddings if config.beyond_trained_length == "refuse" else None
        shape = config.order - 1, config.num_filters, support
        self.is_causal = config.is_causal
        self.weight = nn.Parameter(torch.zeros(shape, dtype=_filter_dtype()))
        self.reverse_weight = None if self.is_causal else nn.Parameter(torch.zeros_like(self.weight))

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The first taps of the parameter."""
        weight = self.reverse_weight if reverse else self.weight
        assert weight is not None  # noqa: S101 (`forward` has refused; narrows the type)
        return weight[..., :length]


FILTERS: dict[str, type[LongFilter]] = {"implicit": ImplicitFilter, "explicit": ExplicitFilter}

__all__ = ["AtLeastFloat32", "ExplicitFilter", "ImplicitFilter", "LongFilter"]
