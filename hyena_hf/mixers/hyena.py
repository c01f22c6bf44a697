# SPDX-License-Identifier: Apache-2.0
"""The Hyena operator: projections, short convolution, gates and long convolutions.

Poli et al. 2023, arXiv 2302.10866, definition 3.1, in the order of the published code, which has one long convolution
less than the definition. With projections x_0 .. x_{N-1}, v of the input, all passed through the short convolution:

    v <- h_o conv (x_i v) + skip_o (x_i v)    for i = N-1 .. 1, o = 0 .. N-2;     y = x_0 v

MultiHyena (Massaroli et al. 2023, arXiv 2310.18780) at order 2 replaces the products of channels by outer products
inside heads, see `hyena_hf.ops.multihead`.

A bidirectional operator has a second filter over later tokens, as in Monarch Mixer (Fu et al. 2023, arXiv 2310.12109);
the short convolution stays causal there too.
"""

from functools import partial

import torch
from torch import Tensor, nn

from hyena_hf.cache import (
    ExactHistory,
    FrozenTaps,
    HeadHistory,
    HeadModalState,
    History,
    HyenaCacheLayer,
    ModalState,
    NoMemory,
    OnlineTiles,
    Plan,
    Window,
)
from hyena_hf.configuration_hyena import HyenaConfig
from hyena_hf.filters import FILTERS, LongFilter, ModalFilter, ReverseFilter
from hyena_hf.ops import Segments, bidirectional_fftconv, hyena_conv, over_rows
from hyena_hf.ops.engine import one_pass_serves
from hyena_hf.ops.precision import is_short, transform_dtype, without_autocast
from hyena_hf.ops.segments import zero_behind

from .projections import is_plain, project_down, project_up


Memory = HyenaCacheLayer | NoMemory


def _convolve_causally(
    memory: Memory, index: int, w: Tensor, counts: Tensor | None, long_filter: LongFilter, direct: Tensor
) -> Tensor:
    """Long convolution number `index` of new inputs w (B, C, n) and the remembered ones."""
    return memory.push(index + 1, w, counts, memory.taps, long_filter, index, direct)


def _convolve_both_sides(
    memory: Memory,
    index: int,
    w: Tensor,
    counts: Tensor | None,
    long_filter: LongFilter,
    direct: Tensor,
    *,
    exact: bool,
) -> Tensor:
    """Long convolution number `index` of whole rows w (R, C, n); a bidirectional model remembers only its taps."""
    assert isinstance(memory, NoMemory)  # noqa: S101 (the model refuses caches; narrows the type)
    length = w.shape[-1]
    h = memory.taps.rising(long_filter, index, length)
    h_reverse = memory.reverse_taps.rising(ReverseFilter(long_filter), index, length)
    exact = exact or is_short(length)
    w = zero_behind(w, counts)
    return bidirectional_fftconv(w, h, h_reverse, direct, exact=exact, check_finite=False)


class ShortConv(nn.Module):
    """Parameters of the depthwise convolution before the gates: weight (C, K), the last tap for the current token.

    The weight stays in the model's dtype; products are formed in float32 at least.
    """

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a dtype; a call, so that hooks which fetch offloaded parameters see it."""
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)


class ResidualConv(nn.Module):
    """A long convolution of a mixer's input that bypasses its projections and gates (Monarch Mixer, bidirectional).

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.frozen: FrozenTaps | None = None  # see `HyenaPreTrainedModel.frozen_filters`
        self.filter = FILTERS[config.filter_types[layer_idx]](config, layer_idx)
        self.skip = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, hidden_states: Tensor, segments: Segments | None = None) -> Tensor:
        """Convolve (B, L, D) -> (B, L, D)."""
        memory = NoMemory([], None if segments is None else segments.max_length, self.frozen)
        skip = self.skip[0] if self.frozen is None else self.skip[0].detach()

        def convolve(rows: Tensor, counts: Tensor | None) -> Tensor:
            x = rows.transpose(1, 2).to(torch.promote_types(rows.dtype, torch.float32))
            with without_autocast(x.device):
                y = _convolve_both_sides(memory, 0, x, counts, self.filter, skip, exact=False)
            return y.transpose(1, 2).to(rows.dtype)

        return over_rows(segments, convolve, hidden_states)


class HyenaMixer(nn.Module):
    """A Hyena operator of any order, or MultiHyena heads.

    Args:
        config: The model's config.
        layer_idx: Layer that the mixer belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.order, self.width = config.order, config.hidden_size
        self.num_heads = config.num_filters
        self.dropout = config.hyena_dropout
        # one convolution a layer keeps float32 logits exact enough; chains of them amplify what transforms leave
        self.exact = config.order > 2
        self.decode_cache = config.decode_cache
        self.convolve = _convolve_causally if config.is_causal else partial(_convolve_both_sides, exact=self.exact)
        self.has_one_pass = config.order == 2 and config.num_filters == config.hidden_size and config.is_causal
        self.frozen: FrozenTaps | None = None  # see `HyenaPreTrainedModel.frozen_filters`
        channels = (config.order + 1) * config.hidden_size
        self.in_proj = nn.Linear(config.hidden_size, channels, bias=config.has_bias("in_proj"))
        self.short_conv = ShortConv(channels, config.short_conv_kernel, config.has_bias("short_conv"))
        self.filter = FILTERS[config.filter_types[layer_idx]](config, layer_idx)
        self.skip = nn.Parameter(torch.empty(config.order - 1, self.num_heads))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.has_bias("out_proj"))
        self.residual = ResidualConv(config, layer_idx) if config.residual_conv else None

    def make_histories(self, length: int | None, expected: int | None, plan: Plan | None = None) -> list[History]:
        """Empty histories for the short and each long convolution.

        Modal filters have their state. Tiles serve filters that never end, one a channel, in caches that grow: filters
        that end need but few inputs, heads have no accumulators, and a compiled step must not depend on its position.

        Args:
            length: Capacity of a static cache, None for one that grows.
            expected: Length to make room for at once.
            plan: What is known of the generation to come; None: no cache, nothing is remembered.
        """
        fixed = length is not None
        window = Window(self.short_conv.weight.shape[1] - 1, fixed=fixed)
        if isinstance(self.filter, ModalFilter):
            return [window, *self._modal_states(fixed)]
        if self.num_heads < self.width:
            return [window, HeadHistory(length, fixed=fixed, capacity=expected, queries=self.width)]
        support = None if fixed else self.filter.support
        if not fixed and support is None and plan is not None and plan.takes_tiles(self.decode_cache, expected):
            tiles = (OnlineTiles(capacity=expected, exact=self.exact, ends=plan.ends) for _ in range(self.order - 1))
            return [window, *tiles]
        limit = length if support is None else support - 1
        long = [ExactHistory(limit, fixed=fixed, capacity=expected, exact=self.exact) for _ in range(self.order - 1)]
        return [window, *long]

    def _modal_states(self, fixed: bool) -> list[History]:
        if self.num_heads < self.width:
            return [HeadModalState(self.num_heads, fixed=fixed, queries=self.width)]
        return [ModalState(fixed=fixed, exact=self.exact) for _ in range(self.order - 1)]

    def forward(
        self, hidden_states: Tensor, segments: Segments | None = None, cache_layer: HyenaCacheLayer | None = None, **_
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            hidden_states: (B, L, D).
            segments: How the batch divides into sequences; None for a dense batch.
            cache_layer: What this layer remembers of earlier calls, or None.

        Returns:
            (B, L, D).
        """
        if cache_layer is None:
            longest = None if segments is None else segments.max_length
            memory = NoMemory(self.make_histories(None, None), longest, self.frozen)
        else:
            memory = cache_layer
            make = partial(self.make_histories, plan=memory.plan)
            memory.attach(make, hidden_states.shape[0], hidden_states.device, self.frozen)
        if cache_layer is not None and segments is None and self._takes_step(hidden_states, cache_layer):
            y = self.step(self.in_proj(hidden_states).squeeze(1), cache_layer)
            return self.out_proj(y.to(hidden_states.dtype).unsqueeze(1))
        in_layout = is_plain(self.in_proj, hidden_states) and is_plain(self.out_proj, hidden_states)
        if segments is None and in_layout and self._takes_one_pass(hidden_states, memory):
            # projections that write and read rows of time: no transposition
            return project_up(self.out_proj, self.one_pass(project_down(self.in_proj, hidden_states), memory))

        def mix(rows: Tensor, counts: Tensor | None) -> Tensor:
            # gates, filters and FFTs in float32 at least, under autocast too
            x = rows.transpose(1, 2).to(torch.promote_types(rows.dtype, torch.float32))
            with without_autocast(x.device):
                if self._takes_one_pass(rows, memory):
                    y = self.one_pass(x.contiguous(), memory)
                elif self.num_heads == self.width:
                    y = self.gated_convolutions(x, counts, memory)
                else:
                    y = self.head_convolution(x, counts, memory)
            # as gathered rows are: a linear layer rounds twice where its input has another layout
            return y.transpose(1, 2).to(rows.dtype).contiguous()

        mixed = over_rows(segments, mix, self.in_proj(hidden_states))
        if self.residual is not None:
            mixed = mixed + self.residual(hidden_states, segments)
        return self.out_proj(mixed)

    def _takes_step(self, hidden_states: Tensor, cache_layer: HyenaCacheLayer) -> bool:
        """Whether `step` serves: one token a row, and no dropout between the gates."""
        return cache_layer.steps(hidden_states.shape[1]) and not (self.training and self.dropout)

    def step(self, p: Tensor, memory: HyenaCacheLayer) -> Tensor:
        """Mix one token a row, of which a cache knows the past: projections p (B, (N + 1) D) -> (B, D)."""
        x = p.to(torch.promote_types(p.dtype, torch.float32))
        with without_autocast(x.device):
            short, (window, *long) = self.short_conv(x.dtype), memory.histories
            if self.has_one_pass and isinstance(window, Window) and isinstance(long[0], ModalState):
                y = long[0].step_operator(window, x, short, self.filter, self.direct(0))
                if y is not None:
                    return y
            x = window.step(x, *short)
            if self.num_heads < self.width:
                return long[0].step(x, memory.taps, self.filter, 0, self.direct(0))
            *gates, v = x.chunk(self.order + 1, dim=1)
            for index, gate in enumerate(reversed(gates[1:])):
                v = long[index].step(v * gate, memory.taps, self.filter, index, self.direct(index))
            return gates[0] * v

    def _takes_one_pass(self, rows: Tensor, memory: Memory) -> bool:
        """Whether rows (B, n, C) without a past can go through `hyena_conv`."""
        free = self.has_one_pass and isinstance(memory, NoMemory) and not (self.training and self.dropout)
        if not free or not one_pass_serves(rows.dtype, rows.device, rows.shape[1], self.filter.support):
            return False
        if not is_short(rows.shape[1]):
            return True
        # the fused operator has no exact sums; graphs decide about them when they run
        return not torch.compiler.is_compiling() and not transform_dtype(torch.float32, rows.device, True).itemsize > 4

    def one_pass(self, p: Tensor, memory: Memory) -> Tensor:
        """An order-2 operator on p (B, 3 D, n) -> (B, D, n)."""
        weight, bias = self.short_conv(p.dtype)
        length, taps = p.shape[-1], memory.taps
        if taps.keeps_spectra(self.filter, length):
            spectrum = taps.spectrum(self.filter, 0, length, self.skip[0])
            return hyena_conv(p, weight, bias, spectrum, check_finite=False)
        h = taps.rising(self.filter, 0, length).to(p.dtype)
        return hyena_conv(p, weight, bias, h, self.direct(0).to(p.dtype), check_finite=False)

    def direct(self, index: int) -> Tensor:
        """The skip of convolution `index` (H,); frozen with the filter, whose spectrum may hold it."""
        return self.skip[index] if self.frozen is None else self.skip[index].detach()

    def projections(self, x: Tensor, counts: Tensor | None, memory: Memory) -> Tensor:
        """Short convolution of the projections, (B, (N + 1) D, n)."""
        return memory.push(0, x, counts, *self.short_conv(x.dtype))

    def gated_convolutions(self, x: Tensor, counts: Tensor | None, memory: Memory) -> Tensor:
        """Order-N recurrence on rows x (B, (N + 1) D, n) -> (B, D, n)."""
        *gates, v = self.projections(x, counts, memory).chunk(self.order + 1, dim=1)
        for index, gate in enumerate(reversed(gates[1:])):
            w = nn.functional.dropout(v * gate, self.dropout, self.training)
            v = self.convolve(memory, index, w, counts, self.filter, self.direct(index))
        return gates[0] * v

    def head_convolution(self, x: Tensor, counts: Tensor | None, memory: Memory) -> Tensor:
        """MultiHyena on rows x (B, 3 D, n) -> (B, D, n)."""
        qkv = self.projections(x, counts, memory)
        if self.training and self.dropout:
            q, k, v = qkv.chunk(3, dim=1)
            qkv = torch.cat([q, k, nn.functional.dropout(v, self.dropout)], dim=1)
        return memory.push(1, qkv, counts, memory.taps, self.filter, 0, self.direct(0))


__all__ = ["HyenaMixer", "ResidualConv", "ShortConv"]
