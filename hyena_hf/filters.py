# SPDX-License-Identifier: Apache-2.0
"""The long filters of Hyena layers: modules whose `forward(length)` returns taps (order - 1, num_heads, length).

An implicit filter (Poli et al. 2023, arXiv 2302.10866, section 3.3) is a function of time. With t_n = n / (M - 1) for
lag n and trained length M, theta_{n,b} = 2 pi n f_b / M and f_b = linspace(1e-4, K - 1, K):

    z_n = [t_n, cos theta_{n,1..K}, -sin theta_{n,1..K}]                positional features
    h_n = MLP(z_n) * (exp(-t_n |decay|) + shift)                       sine MLP and exponential modulation

so it does not depend on the length of the input: a shorter input uses a prefix. An explicit filter is its own taps.
Either may have its high frequencies removed, see `without_high_frequencies`. A modal filter is a sum of decaying
exponentials, see `hyena_hf.ops.modal`: the form of distilled models, which generate in constant memory.
A bidirectional model has as many filters again over later tokens, `forward(length, reverse=True)`.

Filters stay in float32 when a model is moved to a half-precision dtype (float64 follows `double()`): rounding a tap to
bfloat16 costs more than rounding a weight, since its error is summed over the whole sequence.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration_hyena import HyenaConfig
from .ops import bidirectional_fftconv
from .ops.engine import in_onnx_export
from .ops.modal import MAX_LOG_RADIUS, PI, ModalSystem, impulse_response, modal_system
from .ops.precision import without_autocast


# Lags whose features and hidden units are evaluated at once, and those whose taps are: a tile stays in a processor's
# cache. On other devices starting a kernel costs more than memory does.
_TILE, _BLOCK, _DEVICE_TILE = 2048, 256, 16384
# Matrix products of a width that this does not divide sum their last columns in another order: filters are evaluated
# up to the next multiple, so that a prefix has the same bits.
_STEP = 16

# Numbers in the rows that are low-passed at once.
_FFT_BLOCK = 2**22

# sin x = x (s_0 + s_1 x^2 + ...), cos x = c_0 + c_1 x^2 + ... for |x| <= pi / 4, see `_cosine_and_sine`
_SINE = (1.0, *map(float.fromhex, ("-0x1.555545995a603p-3", "0x1.1107605230bc4p-7", "-0x1.994eb3774cf24p-13")))
_COSINE = (
    1.0,
    *map(float.fromhex, ("-0x1.ffffffd0c621cp-2", "0x1.55553e1068f19p-5")),
    *map(float.fromhex, ("-0x1.6c087e89a359dp-10", "0x1.99343027bf8c3p-16")),
)


def _tiles(length: int, device: torch.device) -> list[slice]:
    """Consecutive lags 0 to length - 1, at least one slice."""
    size = _TILE if device.type == "cpu" else _DEVICE_TILE
    return [slice(start, min(start + size, length)) for start in range(0, max(length, 1), size)]


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


def filter_turns(length: int, trained_length: int, device: torch.device | None = None) -> Tensor:
    """2 pi n / M of every lag in float32 (length,)."""
    return 2 * math.pi * torch.arange(length, device=device).to(torch.float32) / trained_length


def band_frequencies(num_bands: int, device: torch.device | None = None) -> Tensor:
    """f_b in float32 (num_bands,)."""
    return float32_linspace(1e-4, num_bands - 1, num_bands, torch.arange(num_bands, device=device))


def _cosine_and_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of float32 angles, to the bit as the published tables have them, without complex numbers.

    Those were made by the C library's `sincosf` (glibc 2.28 and later, x86), which is not correctly rounded: library
    functions give other last bits in 1 to 5 of 100 places. So its steps are taken here: the angle less a multiple of
    pi / 2 in float64, two polynomials, one rounding.
    """
    if angles.device.type == "mps":  # has no float64
        return torch.cos(angles), torch.sin(angles)
    exact = angles.to(torch.float64)
    quarter = torch.round(exact * (2 / math.pi))
    x = torch.sub(exact, quarter, alpha=math.pi / 2)
    square = x * x
    sine = ((_SINE[3] * square).add_(_SINE[2]).mul_(square).add_(_SINE[1])).mul_(square).mul_(x).add_(x)
    cosine = (_COSINE[4] * square).add_(_COSINE[3]).mul_(square).add_(_COSINE[2])
    cosine = cosine.mul_(square).add_(_COSINE[1]).mul_(square).add_(_COSINE[0])
    # cos and sin of the quarter turns: 1, 0, -1, 0 and 0, 1, 0, -1; products with them are exact
    quarter = torch.sub(quarter, torch.floor(quarter * 0.25), alpha=4)
    across = 1 - (quarter - 1).abs()
    along = (quarter - 2).abs() - 1
    return (
        (cosine * along).addcmul_(sine, across, value=-1).to(torch.float32),
        (sine * along).addcmul_(cosine, across).to(torch.float32),
    )


def _features_over_time(times: Tensor, turns: Tensor, frequencies: Tensor) -> Tensor:
    """The positional features with time last, (2K + 1, length)."""
    cosine, sine = _cosine_and_sine(frequencies.unsqueeze(-1) * turns)
    return torch.cat([times.unsqueeze(0), cosine, -sine])


def positional_features(
    length: int, trained_length: int, num_bands: int, device: torch.device | None = None, *, start: int = 0
) -> Tensor:
    """Features of lags start to length - 1 in float32, (length - start, 2 * num_bands + 1).

    Published weights were trained on float32 angles, so they are formed in float32 here too: in float64 from the start
    the features of a trained model would differ by 1e-6.
    """
    times, turns = filter_times(length, trained_length, device), filter_turns(length, trained_length, device)
    return _features_over_time(times[start:], turns[start:], band_frequencies(num_bands, device)).mT.contiguous()


def decay_rates(config: HyenaConfig) -> Tensor:
    """Rates of the exponential windows in float32, (order - 1, num_heads), from slow to fast over the packed axis."""
    logarithm = math.log(config.modulation_target)
    count = (config.order - 1) * config.num_filters
    rates = float32_linspace(logarithm / config.slow_decay, logarithm / config.fast_decay, count, torch.arange(count))
    return rates.view(config.order - 1, config.num_filters)


def without_high_frequencies(h: Tensor, sparsity: float) -> Tensor:
    """The first K taps of irfft(mask * rfft(h, 2K)) for filters of K taps, a low-pass that leaves them causal.

    FlashFFTConv (Fu et al. 2023, arXiv 2311.05908) zeroes such a share of the spectrum in the convolution
    itself. No causal filter vanishes on a band (Paley and Wiener 1934, theorem XII), so there outputs see later
    tokens; here the taps that the mask puts before lag 0 are cut off again. Done with `torch.fft`, also when traced;
    graphs for other runtimes convolve with the low-pass in real numbers.

    Args:
        h: All taps (..., K), float32 or float64.
        sparsity: Share of the K + 1 frequencies from 0 to Nyquist that the mask zeroes, the highest ones; rounded to
            whole frequencies. Frequency 0 always stays.

    Returns:
        Taps (..., K).
    """
    length = h.shape[-1]
    kept = length + 1 - min(round(sparsity * (length + 1)), length)
    rows = h.flatten(0, -2)
    if in_onnx_export():
        h_low, h_reverse = _low_pass(length, kept, rows)
        return bidirectional_fftconv(rows.unsqueeze(0), h_low, h_reverse).view(h.shape)
    # blocks bound the memory of spectra; `irfft` reads the missing frequencies as zero
    blocks = rows.split(max(1, _FFT_BLOCK // length)) if kept <= length else ()
    filtered = [torch.fft.irfft(torch.fft.rfft(b, 2 * length)[:, :kept], 2 * length)[:, :length] for b in blocks]
    return torch.cat(filtered).view(h.shape) if filtered else h


def _low_pass(length: int, kept: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Irfft of a mask that keeps the first frequencies of 2 K points, as filters over lags of both signs, (1, K) each.

    A Dirichlet kernel: sin((2 m - 1) x) / (2 K sin x) with x = pi t / 2 K and m frequencies.
    """
    x = torch.arange(1, length + 1, dtype=torch.float64, device=like.device) * (math.pi / (2 * length))
    later = torch.sin((2 * kept - 1) * x) / (2 * length * torch.sin(x))
    now = later.new_full((1,), (2 * kept - 1) / (2 * length))
    return torch.cat([now, later[:-1]]).to(like.dtype)[None], later.to(like.dtype)[None]


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
        frequency_sparsity: Share of the highest frequencies that is removed; above 0 only with a support.
        max_length: Longest filter that can be evaluated; None for no bound.
    """

    is_causal: bool = True
    support: int | None = None
    frequency_sparsity: float = 0.0
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
        """Taps within the support in the filter's own dtype, also where autocast would run in half precision."""
        with without_autocast(next(self.parameters()).device):
            if self.support is None or not self.frequency_sparsity:
                return self.taps(length, reverse)
            return without_high_frequencies(self.taps(self.support, reverse), self.frequency_sparsity)[..., :length]

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The first taps within the support, with all their frequencies."""
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

    def forward(self, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a dtype, times a factor for each output (outputs,).

        A call, so that hooks which fetch a sharded or offloaded weight see it; copies, because they take it away
        again.
        """
        weight = self.weight.to(dtype, copy=True)
        bias = None if self.bias is None else self.bias.to(dtype, copy=True)
        if scale is None:
            return weight, bias
        scale = scale.to(dtype)
        return weight * scale.unsqueeze(-1), None if bias is None else bias * scale


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
        self.support, self.frequency_sparsity = config.filter_support(layer_idx), config.frequency_sparsity
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
        self.output = FilterLinear(width, outputs, dtype, bias=False)
        # later tokens have an MLP of their own; all else is shared, as in Monarch Mixer
        self.reverse_layers = self.reverse_output = None
        if not config.is_causal:
            self.reverse_layers = nn.ModuleList(FilterLinear(a, b, dtype) for a, b in itertools.pairwise(sizes))
            self.reverse_output = FilterLinear(width, outputs, dtype, bias=False)
        # one frequency per hidden unit, shared by all layers as in the published models
        self.frequency = nn.Parameter(torch.full((width,), float(config.sine_frequency), dtype=dtype))
        # a buffer although computable: a published file may hold other rates
        self.register_buffer("decay_rates", decay_rates(config).to(dtype) if config.modulation else None)

    def initial_features(self) -> Tensor:
        """The positional features that a trainable table starts from."""
        return positional_features(self.trained_length, self.trained_length, self.num_bands)

    @property
    def _dtype(self) -> torch.dtype:
        # sharded training may hand over parameters in bfloat16
        return torch.promote_types(self.frequency.dtype, torch.float32)

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The formulas at the top of this file."""
        layers, output = (self.reverse_layers, self.reverse_output) if reverse else (self.layers, self.output)
        assert layers is not None and output is not None  # noqa: S101, PT018 (`forward` has refused; narrows types)
        if torch.compiler.is_compiling() or not isinstance(length, int):
            h = self._taps_at_once(layers, output, length, [slice(0, length)])
        elif torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            # packed documents share the filter of the longest one: gradients must see the same bits
            whole = -(-length // _STEP) * _STEP
            h = self._taps_at_once(layers, output, length, _tiles(whole, self.frequency.device))
        else:
            h = self._taps_in_tiles(layers, output, length)
        return h.view(self.order - 1, self.num_heads, length)

    def _inputs(self, lags: slice, times: Tensor, turns: Tensor, frequencies: Tensor) -> Tensor:
        """Positional features with time last, (2K + 1, lags); a trained table may end before."""
        if self.features is not None:
            return self.features[lags].to(self._dtype).mT
        return _features_over_time(times[lags], turns[lags], frequencies).to(self._dtype)

    def _time(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of what `_inputs` makes features: times (length,), 2 pi n / M (length,), frequencies (K,), in float32."""
        device = self.frequency.device
        times = filter_times(length, self.trained_length, device)
        return times, filter_turns(length, self.trained_length, device), band_frequencies(self.num_bands, device)

    def _windows(self, times: Tensor) -> Tensor:
        """Exponential windows at some times, (filters, times)."""
        rates = cast(Tensor, self.decay_rates).to(self._dtype).abs().view(-1, 1)
        return torch.exp(-rates * times.to(self._dtype)).add_(self.shift)

    def _taps_at_once(self, layers: Iterable[nn.Module], output: nn.Module, length: int, tiles: list[slice]) -> Tensor:
        """Taps (filters, length) that one can differentiate and trace; only the features are made in tiles."""
        time, dtype = self._time(tiles[-1].stop), self._dtype
        frequency = self.frequency.to(dtype).unsqueeze(-1)
        x = torch.cat([self._inputs(lags, *time) for lags in tiles], dim=-1)
        for layer in layers:
            weight, bias = layer(dtype)
            x = torch.sin(frequency * torch.addmm(bias.unsqueeze(-1), weight, x))
        weight, _ = output(dtype)
        h = (weight @ x)[:, :length]
        return h if self.decay_rates is None else h * self._windows(time[0][:length])

    def _taps_in_tiles(self, layers: Iterable[nn.Module], output: nn.Module, length: int) -> Tensor:
        """The same without gradients: memory for the taps and one tile, and less to compute.

        The frequency goes into weights and biases. Where float32 rounds time anyway, windows are products over start
        and offset of a block, exp(-d t) = exp(-d t_start) exp(-d t_offset), and the first factor goes into the weight.
        """
        dtype, device = self._dtype, self.frequency.device
        hidden = [layer(dtype, self.frequency) for layer in layers]
        weight, _ = output(dtype)
        h = weight.new_empty(len(weight), length)
        whole = -(-length // _STEP) * _STEP
        time = self._time(whole)
        size = _BLOCK if device.type == "cpu" else _DEVICE_TILE
        separable = self.shift == 0 and self.trained_length > 1 and dtype == torch.float32
        offsets = None
        if self.decay_rates is not None and separable:
            # products again: a block has many lags, and exponentials cost more than products
            coarse, fine = self._windows(time[0][:size:_STEP]), self._windows(time[0][:_STEP])
            offsets = (coarse.unsqueeze(-1) * fine.unsqueeze(-2)).flatten(-2)
        for lags in _tiles(whole, device):
            x = self._inputs(lags, *time)
            for matrix, bias in hidden:
                x = torch.addmm(bias.unsqueeze(-1), matrix, x).sin_()
            for start, block in zip(range(lags.start, length, size), x.split(size, dim=-1), strict=False):
                out = h[:, start : start + block.shape[-1]]
                times = time[0][start : start + out.shape[-1]]
                if self.decay_rates is None:
                    out.copy_((weight @ block)[:, : out.shape[-1]])
                elif offsets is None:
                    torch.mul((weight @ block)[:, : out.shape[-1]], self._windows(times), out=out)
                else:
                    scaled = weight * self._windows(times[:1])
                    torch.mul((scaled @ block)[:, : out.shape[-1]], offsets[:, : out.shape[-1]], out=out)
        return h


class ExplicitFilter(LongFilter):
    """Filters whose taps are parameters, one for each group of neighbouring heads.

    Args:
        config: The model's config; `filter_length` gives the number of taps.
        layer_idx: Layer that the filter belongs to.
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        support = config.filter_support(layer_idx)
        assert support is not None  # noqa: S101 (the config gives explicit filters a length)
        self.support, self.frequency_sparsity = support, config.frequency_sparsity
        self.max_length = config.max_position_embeddings if config.beyond_trained_length == "refuse" else None
        groups = config.group_count(layer_idx)
        self.heads_in_group = config.num_filters // groups
        shape = config.order - 1, groups, support
        self.is_causal = config.is_causal
        self.weight = nn.Parameter(torch.zeros(shape, dtype=_filter_dtype()))
        self.reverse_weight = None if self.is_causal else nn.Parameter(torch.zeros_like(self.weight))

    def taps(self, length: int, reverse: bool) -> Tensor:
        """The first taps of the parameter."""
        weight = self.reverse_weight if reverse else self.weight
        assert weight is not None  # noqa: S101 (`forward` has refused; narrows the type)
        return weight[..., :length].repeat_interleave(self.heads_in_group, dim=1)


class ModalFilter(LongFilter):
    """Filters that are sums of decaying exponentials: poles and residues are parameters, see `hyena_hf.ops.modal`.

    Such a filter never ends, whatever `filter_length` and `frequency_sparsity` say of the others.

    Args:
        config: The model's config; `state_size` and `num_poles` give the number of poles.
        layer_idx: Layer that the filter belongs to.

    Attributes:
        log_radius, angle: Of the poles, (order - 1, num_heads, N); `hyena_hf.ops.modal.NO_POLE` marks unused slots.
        residue_re, residue_im: (order - 1, num_heads, N).
        direct: Tap at lag 0, (order - 1, num_heads).
    """

    def __init__(self, config: HyenaConfig, layer_idx: int) -> None:
        super().__init__()
        self.max_length = config.max_position_embeddings if config.beyond_trained_length == "refuse" else None
        self.trained_length = config.max_position_embeddings
        shape = config.order - 1, config.num_filters, config.pole_count(layer_idx)
        dtype = _filter_dtype()
        log_radius, angle = self.initial_poles(shape)
        self.log_radius, self.angle = nn.Parameter(log_radius.to(dtype)), nn.Parameter(angle.to(dtype))
        self.residue_re = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.residue_im = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.direct = nn.Parameter(torch.zeros(shape[:2], dtype=dtype))

    def initial_poles(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Log-radii and angles of a filter that is trained from scratch, float64.

        Time constants run from 4 to the trained length over the heads, in equal ratios; angles of a head from half a
        step above 0 to half a step below pi, in equal steps (as S4D-Lin, Gu et al. 2022, arXiv 2206.11893).
        """
        heads, poles = shape[1:]
        exponent = torch.linspace(0, 1, heads, dtype=torch.float64).unsqueeze(-1)
        constants = 4 * (max(self.trained_length, 8) / 4) ** exponent
        angles = math.pi * (torch.arange(poles, dtype=torch.float64) + 0.5) / max(poles, 1)
        return (-1 / constants).expand(shape).contiguous(), angles.expand(shape).contiguous()

    def taps(self, length: int, reverse: bool) -> Tensor:  # noqa: ARG002 (`forward` has refused)
        """The impulse response."""
        log_radius, angle, re, im = (x.flatten(0, 1) for x in self._parts())
        h = impulse_response(log_radius, angle, re, im, self.direct.flatten(), length)
        return h.view(*self.direct.shape, length)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.log_radius, self.angle, self.residue_re, self.residue_im

    def forward(self, length: int, *, reverse: bool = False, system_of: int | None = None) -> Any:
        """Taps as any filter's, or what `system` returns of a convolution."""
        if system_of is None:
            return super().forward(length, reverse=reverse)
        parts = (x[system_of] for x in self._parts())
        return modal_system(*parts), self.direct[system_of].clone()

    def system(self, index: int) -> tuple[ModalSystem, Tensor]:
        """The recurrence of convolution `index`, and its tap at lag 0 (H,).

        By a call, so that hooks which fetch offloaded or sharded parameters see it; copies, because they take them
        away again. A pole that is exactly real stays so: its angle gets no gradient, and imaginary parts of its
        residue no meaning.
        """
        return self(0, system_of=index)

    @torch.no_grad()
    def project_(self) -> None:
        """Move poles that training has pushed out of the open unit disc back to its edge; angles into [0, pi].

        The residue turns with its pole, so that the taps stay.
        """
        self.log_radius.clamp_(max=MAX_LOG_RADIUS)
        turn = torch.remainder(self.angle, 2 * math.pi)
        below = turn > PI
        inside = (self.angle >= 0) & (self.angle <= PI)
        self.residue_im.mul_(torch.where(below & ~inside, -1.0, 1.0))
        self.angle.copy_(torch.where(inside, self.angle, torch.where(below, 2 * math.pi - turn, turn)))


FILTERS: dict[str, type[LongFilter]] = {"implicit": ImplicitFilter, "explicit": ExplicitFilter, "modal": ModalFilter}

__all__ = ["AtLeastFloat32", "ExplicitFilter", "ImplicitFilter", "LongFilter", "ModalFilter"]
