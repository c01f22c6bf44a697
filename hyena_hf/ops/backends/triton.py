# SPDX-License-Identifier: Apache-2.0
"""Long convolutions on a GPU in one fused pass: right-angle Monarch transforms in Triton.

A causal convolution of L points is the circular one of 2 L. Here it is one of N >= L points instead, with
right-angle wrap-around: in z = x(X) h(X) mod (X^N - i) what wraps is multiplied by i, so for real inputs Re z is the
linear convolution. X^N = i has the roots exp(-2 pi i (k - 1/4) / N): the transform is a discrete Fourier transform at
frequencies shifted by a quarter, which costs nothing extra, since the shift goes into the constants:

    n = n1 M + m,  k = k1 + N1 k2:   exp(-2 pi i n (k - 1/4) / N)
        = exp(-2 pi i n1 (k1 - 1/4) / N1)  exp(-2 pi i m (k1 - 1/4) / N)  exp(-2 pi i m k2 / M)
          matrix of stage 1                twiddle                        plain transform of M points, split again

Every stage is a product with a 16, 32 or 64 wide matrix, on tensor cores, in real arithmetic; real inputs and outputs
halve the first and the last. Forward: Y = W^-1 (K . W w). Backward: dw = Re W^-1 (conj(K) . W g) and
dh = Re W^-1 sum_rows conj(W w) . W g, with g = postgate * grad.

A row of up to 16384 points is transformed on chip. Longer ones take an outer stage of any size P through memory:
P transforms on chip of N / P points between two matrix products.

Precision: float32 inputs are multiplied in float32 (no TF32). Float16 and bfloat16 inputs are multiplied in float16
and summed in float32; every row and every spectrum is divided by a power of two first and stages preserve magnitudes,
so nothing overflows, and bfloat16 inputs lose no more than float16 ones. Gates, direct tap, products of spectra and
sums over rows are float32. Filter spectra come from torch's float32 FFT: one per filter, not per row, of any size.

Sources: Fu et al. 2023, arXiv 2311.05908 (FlashFFTConv: Monarch transforms on tensor cores, fused gates); right-angle
convolution is Crandall and Fagin 1994, "Discrete weighted transforms and large-integer arithmetic".

B batch, C channels, H filters, G = C / H, L length, K taps; rows of a filter: B G. N points, P outer points.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor


_KERNELS = "hyena_hf.ops.backends._triton_kernels"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Points on chip: factors of the transform, warps. Chosen by what the compiler reports for sm_80 and sm_90: nothing
# spills out of registers but a few hundred bytes a thread at 16384 points and in gradients.
_ON_CHIP = {
    256: ((16, 16), 1),
    512: ((32, 16), 2),
    1024: ((32, 32), 4),
    2048: ((64, 32), 8),
    4096: ((16, 16, 16), 8),
    8192: ((32, 16, 16), 8),
    16384: ((32, 32, 16), 16),
}
# Most points on chip of whole rows, and of rows below an outer stage, by whether products are float32 and whether they
# are for gradients. Gradients hold several tiles; float32 products take no tensor cores and hold both operands, too.
_MOST_POINTS = {
    (False, False): (16384, 4096),
    (False, True): (4096, 4096),
    (True, False): (1024, 1024),
    (True, True): (512, 512),
}
# An outer stage of P points takes a P x P matrix, and P products a number.
_MOST_OUTER_POINTS = 4096


@dataclass(frozen=True)
class Plan:
    """How a convolution is cut.

    Attributes:
        factors: Two or three factors of the transform on chip, powers of two from 16 to 64.
        outer: Points of the stage through memory; 1: none.
        warps: Of 32 threads, a program.
        programs: How many programs the device should get, where rows suffice; more cost partial sums of spectra.
    """

    factors: tuple[int, ...]
    outer: int = 1
    warps: int = 4
    programs: int = 1

    @property
    def chip(self) -> int:
        """Points of the transform on chip."""
        return math.prod(self.factors)

    @property
    def points(self) -> int:
        """Points of the whole transform: the length that inputs are padded to."""
        return self.outer * self.chip

    @property
    def sizes(self) -> dict[str, int]:
        """Factors by the name that kernels give them."""
        return dict(zip(("N1", "N2", "N3"), (*self.factors, 1), strict=False))

    def shares(self, rows: int, filters: int) -> tuple[int, int]:
        """Programs a filter, rows a program."""
        wanted = min(rows, -(-self.programs // (filters * self.outer)))
        share = -(-rows // wanted)
        return -(-rows // share), share


def shared_bytes(factors: Sequence[int], dtype: torch.dtype) -> int:
    """Upper bound for the shared memory of a program.

    One complex tile that is transposed, with the largest matrix, in the dtype of the products; float32 products take
    half as much again for their operands. The rest is slack for reductions and padding against bank conflicts.
    A slow test compiles every plan for sm_80, sm_86 and sm_90, and compares.
    """
    numbers = math.prod(factors) + max(factors) ** 2
    return numbers * (12 if dtype == torch.float32 else 4) + 8192


def plan_for(
    length: int, dtype: torch.dtype, shared_memory: int, processors: int = 1, *, gradients: bool = False
) -> Plan:
    """Plan for rows of `length` in `dtype` on a device with so many bytes of shared memory a program.

    The smallest transform on chip that holds the row, else an outer stage over a large one. Registers bound the size
    on chip more often than shared memory does.

    Raises:
        ValueError: The shared memory holds no plan.
    """
    wide = dtype == torch.float32
    fitting = [n for n, (factors, _) in _ON_CHIP.items() if shared_bytes(factors, dtype) <= shared_memory]
    if not fitting:
        raise ValueError(f"{shared_memory} bytes of shared memory hold no transform of 256 points")
    alone, below = _MOST_POINTS[wide, gradients]
    chip = next((n for n in fitting if length <= n <= alone), None)
    if chip is None:
        chip = max(n for n in fitting if n <= below)
    factors, warps = _ON_CHIP[chip]
    warps = min(4 * warps, 8) if wide else warps
    return Plan(factors, outer=-(-length // chip), warps=warps, programs=8 * processors)


def outer_tile(outer: int, chip: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of the kernels of the outer stage: points of the transforms on chip, lines and columns of a tile."""
    lines = min(max(1 << (outer - 1).bit_length(), 16), 32 if dtype == torch.float32 else 64)
    return {"CHIP": chip, "LINES": lines, "POINTS": min(4096 // lines, chip)}


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they were imported, or will be."""
    module = sys.modules.get(_KERNELS)
    return os.environ.get("TRITON_INTERPRET") == "1" if module is None else module.INTERPRETED


def _kernels() -> ModuleType:
    return importlib.import_module(_KERNELS)


@lru_cache(maxsize=256)
def _default_plan(length: int, dtype: torch.dtype, device: torch.device, *, gradients: bool) -> Plan:
    if device.type != "cuda":  # the interpreter has no such limits: those of a consumer card
        return plan_for(length, dtype, 101_376, gradients=gradients)
    limits = torch.cuda.get_device_properties(device)
    shared, processors = limits.shared_memory_per_block_optin, limits.multi_processor_count
    return plan_for(length, dtype, shared, processors, gradients=gradients)


# constants and spectra


def _unit(n: int) -> float:
    """What the matrix of a stage of n points is multiplied by: a power of two, close to orthonormal from below.

    Rounded to half precision, 1 / sqrt(n) would be wrong by the same factor everywhere, in both directions.
    """
    return 2.0 ** -math.ceil(math.log2(n) / 2)


def _shrinkage(plan: Plan) -> float:
    """What a transform and its inverse multiply a row by."""
    return math.prod(n * _unit(n) ** 2 for n in (plan.outer, *plan.factors))


def _roots(rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """exp(-2 pi i rows columns / n), in complex128."""
    return torch.polar(torch.ones((), dtype=torch.float64), -2 * math.pi / n * (rows[:, None] * columns))


def _parts(tables: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Real and imaginary parts of all tables in one row, as kernels read them."""
    return torch.cat([part.flatten() for table in tables for part in (table.real, table.imag)]).to(device, dtype)


@lru_cache(maxsize=64)
def _tables(factors: tuple[int, ...], shift: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices in `dtype`, and twiddles in float32, of the transform at frequencies k - shift; each in one row.

    Matrices: stage 1 (n1, k1), then the others, all in units. Twiddles: (n2, k1), (n3, k1), (n3, k2).
    """
    first, *others = (torch.arange(n, dtype=torch.float64) for n in factors)
    n1 = len(first)
    matrices = [_roots(first, first - shift, n1)] + [_roots(f, f, len(f)) for f in others]
    matrices = [matrix * _unit(len(matrix)) for matrix in matrices]
    n2 = factors[1]
    twiddles = [_roots(others[0], first - shift, n1 * n2)]
    if len(factors) == 3:
        twiddles += [
            _roots(others[1], first - shift, math.prod(factors)),
            _roots(others[1], others[0], n2 * factors[2]),
        ]

    return _parts(matrices, dtype, device), _parts(twiddles, torch.float32, device)


@lru_cache(maxsize=16)
def _outer_matrix(outer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """First stage of a transform of P times as many points as fit the chip: (2, P, P)."""
    n1 = torch.arange(outer, dtype=torch.float64)
    return _parts([_roots(n1, n1 - 0.25, outer) * _unit(outer)], dtype, device)


@lru_cache(maxsize=16)
def _twists(plan: Plan, device: torch.device) -> Tensor:
    """Its twiddle exp(-2 pi i n2 (k1 - 1/4) / N), n2 = n1 M + m, as a product of (P, N1) and (P, M)."""
    first = plan.factors[0]
    k1 = torch.arange(plan.outer, dtype=torch.float64) - 0.25
    coarse = torch.arange(first, dtype=torch.float64)
    fine = torch.arange(plan.chip // first, dtype=torch.float64)
    tables = [_roots(k1, coarse, plan.outer * first), _roots(k1, fine, plan.points)]
    return _parts(tables, torch.float32, device)


@lru_cache(maxsize=16)
def _twist(points: int, device: torch.device) -> Tensor:
    """exp(i pi n / (2 N)), (N,): the quarter shift, in complex64."""
    angle = torch.arange(points, dtype=torch.float64) * (math.pi / 2 / points)
    return torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64)


def _reverse_axes(spectrum: Tensor) -> Tensor:
    """Between the natural order (H, .., k2, k1) of a frequency's digits and that of the kernels (H, k1, k2, ..)."""
    return spectrum.permute(0, *range(spectrum.ndim - 1, 0, -1))


def _filter_spectrum(h: Tensor, plan: Plan, *, half: bool) -> tuple[Tensor, Tensor | None]:
    """Spectra of filters (H, K) as kernels read them (H, P, 2, N / P), and the powers of two they were divided by."""
    twisted = h * _twist(plan.points, h.device)[: h.shape[1]]
    natural = (torch.fft.fft(twisted, n=plan.points) / _shrinkage(plan)).view(-1, *reversed(plan.factors), plan.outer)
    spectrum = torch.view_as_real(_reverse_axes(natural).flatten(2)).movedim(-1, 2)
    if not half:
        return spectrum.contiguous(), None
    exponent = torch.frexp(spectrum.abs().amax(dim=(1, 2, 3)))[1] - 1
    gain = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(min=-100))
    return (spectrum / gain.view(-1, 1, 1, 1)).contiguous(), gain


def _filter_gradient(partial: Tensor, taps: int, plan: Plan) -> Tensor:
    """Gradient of filters (H, K) from partial sums of their spectra (shares, H, P, 2, N / P)."""
    total = partial.sum(dim=0)
    spectrum = torch.complex(total[:, :, 0], total[:, :, 1]).view(-1, plan.outer, *plan.factors)
    natural = _reverse_axes(spectrum).flatten(1)
    # unscaled: sums of two spectra in orthonormal units lack exactly the N that an inverse transform divides by
    lags = torch.fft.ifft(natural, norm="forward") / _shrinkage(plan)
    return (lags * torch.conj_physical(_twist(plan.points, total.device))).real[:, :taps].contiguous()


# one convolution


def _launch(
    name: str, grid: tuple[int, ...], device: torch.device, *arguments: Tensor | int | None, **options: int
) -> None:
    kernel = getattr(_kernels(), name)[grid]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # one stage: no software pipelining, which would take shared memory for a second row
        kernel(*arguments, **options, num_stages=1, enable_fp_fusion=True)


@dataclass(frozen=True)
class _Work:
    """One convolution: its plan, its sizes, and its constants."""

    plan: Plan
    product: torch.dtype
    device: torch.device
    batch: int
    filters: int
    group: int
    length: int

    @classmethod
    def of(cls, u: Tensor, h: Tensor, plan: Plan) -> "_Work":
        product = torch.float32 if u.dtype == torch.float32 else torch.float16
        batch, channels, length = u.shape
        return cls(plan, product, u.device, batch, h.shape[0], channels // h.shape[0], length)

    @property
    def rows(self) -> int:
        """Of one filter."""
        return self.batch * self.group

    @property
    def channels(self) -> int:
        return self.filters * self.group

    @property
    def half(self) -> bool:
        return self.product == torch.float16

    def on_chip(self, name: str, tensors: Sequence[Tensor | None]) -> None:
        """Launch a kernel that holds whole rows."""
        shares, share = self.plan.shares(self.rows, self.filters)
        tables = _tables(self.plan.factors, 0.25, self.product, self.device)
        sizes = self.rows, share, self.group, self.channels, self.length
        options = self.plan.sizes | {"num_warps": self.plan.warps}
        _launch(name, (shares, self.filters), self.device, *tensors, *tables, *sizes, **options)

    def measure(self, w: Sequence[Tensor | None], g: Sequence[Tensor | None], *, dot: bool) -> list[Tensor | None]:
        """Scales (B C,) of w and of g, each tensor and gate, and the sums of w g where `dot` asks for them."""
        count = self.batch * self.channels

        def room(wanted: bool) -> Tensor | None:
            return torch.empty(count, dtype=torch.float32, device=self.device) if wanted else None

        results = [room(self.half), room(self.half and g[0] is not None), room(dot)]
        if any(result is not None for result in results):
            _launch("measure", (count,), self.device, *w, *g, *results, self.length, BLOCK=4096, num_warps=8)
        return results

    def outer_transform(self, u: Tensor | None, gate: Tensor | None, scale: Tensor | None) -> Tensor:
        """First stage of all rows: (B C, P, 2, N / P)."""
        outer, chip = self.plan.outer, self.plan.chip
        values = torch.empty(self.batch * self.channels, outer, 2, chip, dtype=self.product, device=self.device)
        matrix = _outer_matrix(outer, self.product, self.device)
        grid, tile = self._outer_tiles()
        _launch("outer_transform", grid, self.device, u, gate, scale, values, matrix, self.length, outer, **tile)
        return values

    def outer_inverse(self, values: Tensor, scales: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
        """Last stage of all rows; tensors: u, its gate, direct, then two gates, each with its output."""
        matrix = _outer_matrix(self.plan.outer, self.product, self.device)
        grid, tile = self._outer_tiles()
        sizes = self.group, self.channels, self.length, self.plan.outer
        _launch("outer_inverse", grid, self.device, values, *scales, *tensors, matrix, *sizes, **tile)

    def _outer_tiles(self) -> tuple[tuple[int, int, int], dict[str, int]]:
        tile = outer_tile(self.plan.outer, self.plan.chip, self.product)
        grid = self.batch * self.channels, -(-self.plan.outer // tile["LINES"]), tile["CHIP"] // tile["POINTS"]
        return grid, tile | {"num_warps": 4}

    def inner(
        self,
        values: Sequence[Tensor | None],
        scales: Sequence[Tensor | None],
        spectra: Sequence[Tensor | None],
        *,
        convolve: bool,
        correlate: bool,
    ) -> None:
        """Middle stages of all rows, in place; values and scales of w and of g, spectra of filters and gradients."""
        plan = self.plan
        shares, share = plan.shares(self.rows, self.filters)
        tables = _twists(plan, self.device), *_tables(plan.factors, 0.0, self.product, self.device)
        sizes = self.rows, share, self.group, self.channels
        grid = shares, plan.outer, self.filters
        options = plan.sizes | {"CONVOLVE": convolve, "CORRELATE": correlate, "num_warps": plan.warps}
        _launch("inner", grid, self.device, *values, *scales, *spectra, *tables, *sizes, **options)


@dataclass(frozen=True)
class _Operands:
    """Contiguous inputs of a convolution, its filters as spectra with their gain."""

    u: Tensor
    direct: Tensor | None
    pregate: Tensor | None
    postgate: Tensor | None
    spectrum: Tensor
    gain: Tensor | None

    @classmethod
    def of(
        cls,
        work: _Work,
        u: Tensor,
        h: Tensor,
        direct: Tensor | None,
        pregate: Tensor | None,
        postgate: Tensor | None,
    ) -> "_Operands":
        direct, pregate, postgate = (None if t is None else t.contiguous() for t in (direct, pregate, postgate))
        spectrum, gain = _filter_spectrum(h, work.plan, half=work.half)
        return cls(u.contiguous(), direct, pregate, postgate, spectrum, gain)


def _convolve(
    u: Tensor, h: Tensor, direct: Tensor | None, pregate: Tensor | None, postgate: Tensor | None, plan: Plan
) -> Tensor:
    work = _Work.of(u, h, plan)
    x = _Operands.of(work, u, h, direct, pregate, postgate)
    y = torch.empty_like(x.u)
    if plan.outer == 1:
        work.on_chip("convolve", (x.u, x.pregate, x.postgate, x.direct, x.spectrum, x.gain, y))
        return y
    scale, *_ = work.measure((x.u, x.pregate), (None, None), dot=False)
    values = work.outer_transform(x.u, x.pregate, scale)
    work.inner((values, None), (scale, None), (x.spectrum, None), convolve=True, correlate=False)
    work.outer_inverse(values, (scale, x.gain), x.u, x.pregate, x.direct, x.postgate, y, None, None)
    return y


def _gradients(
    grad: Tensor,
    u: Tensor,
    h: Tensor,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    needs: Sequence[bool],
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    work = _Work.of(u, h, plan)
    x = _Operands.of(work, u, h, direct, pregate, postgate)
    run = _gradients_on_chip if plan.outer == 1 else _gradients_through_memory
    of_u, of_spectrum, of_direct, of_pregate, of_postgate = run(work, x, grad.contiguous(), needs)
    of_h = None if of_spectrum is None else _filter_gradient(of_spectrum, h.shape[1], plan)
    return of_u, of_h, None if of_direct is None else of_direct.sum(dim=0), of_pregate, of_postgate


def _outputs(work: _Work, x: _Operands, needs: Sequence[bool]) -> list[Tensor | None]:
    """Room for gradients of u, spectra, direct, pregate and postgate; of the second and third for partial sums."""
    shares, _ = work.plan.shares(work.rows, work.filters)
    shapes = [x.u.shape, (shares, *x.spectrum.shape), (shares, work.filters), x.u.shape, x.u.shape]
    dtypes = [x.u.dtype, torch.float32, torch.float32, x.u.dtype, x.u.dtype]
    return [
        torch.empty(shape, dtype=dtype, device=work.device) if need else None
        for need, shape, dtype in zip(needs, shapes, dtypes, strict=True)
    ]


def _gradients_on_chip(work: _Work, x: _Operands, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    outputs = of_u, of_spectrum, of_direct, of_pregate, of_postgate = _outputs(work, x, needs)
    inputs = grad, x.u, x.pregate, x.postgate, x.direct, x.spectrum, x.gain
    work.on_chip("gradients", (*inputs, of_u, of_pregate, of_postgate, of_spectrum, of_direct))
    return outputs


def _gradients_through_memory(work: _Work, x: _Operands, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    needs_u, needs_h, needs_direct, needs_pregate, needs_postgate = needs
    of_u, of_spectrum, _, of_pregate, of_postgate = _outputs(work, x, (needs_u, needs_h, False, *needs[3:]))
    w_scale, g_scale, of_direct = work.measure((x.u, x.pregate), (grad, x.postgate), dot=needs_direct)
    correlate = needs_u or needs_pregate
    w_values = work.outer_transform(x.u, x.pregate, w_scale) if needs_postgate or needs_h else None
    g_values = work.outer_transform(grad, x.postgate, g_scale) if correlate or needs_h else None
    if w_values is not None or g_values is not None:
        values, scales, spectra = (w_values, g_values), (w_scale, g_scale), (x.spectrum, of_spectrum)
        work.inner(values, scales, spectra, convolve=needs_postgate, correlate=correlate)
    if g_values is not None and correlate:
        # the gradient of w: the convolution's own form, the other way round
        tensors = grad, x.postgate, x.direct, x.pregate, of_u, x.u, of_pregate
        work.outer_inverse(g_values, (g_scale, x.gain), *tensors)
    if w_values is not None and needs_postgate:
        tensors = x.u, x.pregate, x.direct, grad, of_postgate, None, None
        work.outer_inverse(w_values, (w_scale, x.gain), *tensors)
    if of_direct is not None:
        of_direct = of_direct.view(work.batch, work.filters, work.group).sum(dim=2)
    return [of_u, of_spectrum, of_direct, of_pregate, of_postgate]


# numerical self-check


def _exact(
    grad: Tensor, u: Tensor, h: Tensor, direct: Tensor, pregate: Tensor, postgate: Tensor
) -> tuple[Tensor, ...]:
    """Output and the five gradients, lag by lag."""
    group = u.shape[1] // h.shape[0]
    taps = h.repeat_interleave(group, dim=0)
    tap = direct.repeat_interleave(group)[:, None]
    w, g = pregate * u, postgate * grad
    y, dw, of_taps = tap * w, tap * g, torch.zeros_like(taps)
    for lag in range(h.shape[1]):
        early, late = w[..., : w.shape[-1] - lag], g[..., lag:]
        y[..., lag:] += taps[:, lag, None] * early
        dw[..., : early.shape[-1]] += taps[:, lag, None] * late
        of_taps[:, lag] = (early * late).sum(dim=(0, 2))
    of_h = of_taps.unflatten(0, (-1, group)).sum(dim=1)
    of_direct = (g * w).sum(dim=(0, 2)).view(-1, group).sum(dim=1)
    return postgate * y, pregate * dw, of_h, of_direct, u * dw, grad * y


def self_check(dtype: torch.dtype, device: torch.device, plan: Plan) -> float:
    """Largest relative root mean square error of the output and the gradients of a small convolution.

    Args:
        dtype: Of input and gates.
        device: Where to run it.
        plan: How to cut it; rows are a little shorter than its points.

    Returns:
        The error relative to float64 sums over lags, computed on the CPU from the same rounded inputs.
    """
    random = torch.Generator().manual_seed(0)
    length = plan.points - 7
    shape = (2, 2, length)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    grad, u, pregate, postgate = (draw(*shape).to(dtype) for _ in range(4))
    h, direct = draw(1, min(length, 300)), draw(1)
    inputs = grad, u, h, direct, pregate, postgate
    expected = _exact(*(tensor.double() for tensor in inputs))
    there = [tensor.to(device) for tensor in inputs]
    results = [_convolve(*there[1:], plan=plan), *_gradients(*there, needs=(True,) * 5, plan=plan)]
    errors = [
        (result.cpu().double() - exact).norm() / exact.norm() if result is not None else torch.tensor(math.inf)
        for result, exact in zip(results, expected, strict=True)
    ]
    return torch.stack(errors).max().item()  # a NaN is the maximum


_TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@lru_cache(maxsize=64)
def _unsound(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels cannot be trusted on a device, None where they pass: two levels, three, and an outer stage."""
    plans = [Plan((16, 16), warps=1), Plan((16, 16), outer=3, warps=1)]
    if dtype != torch.float32:  # float32 rows of more than two levels take the outer stage
        plans.append(Plan((16, 16, 16), warps=8))
    for plan in plans:
        try:
            error = self_check(dtype, device, plan)
        except Exception as failure:  # noqa: BLE001  whatever a compiler or a driver raises, it cannot be used here
            return f"its self-check in {dtype} on {device} failed with {type(failure).__name__}: {failure}"
        if not error <= _TOLERANCES[dtype]:
            return (
                f"its self-check in {dtype} on {device} is off by {error:.1e} (relative RMS, {plan.points} points), "
                f"where {_TOLERANCES[dtype]:.0e} is allowed"
            )
    return None


# the backend


def refusal(u: Tensor, *_others: Tensor | None) -> str | None:
    """Why these tensors cannot be convolved here, as the end of a sentence; None if they can.

    The first question about a device and a dtype compiles kernels and compares a small convolution with its float64
    value, gradients included.
    """
    if u.dtype not in _DTYPES:
        return f"it computes float32, float16 and bfloat16, not {u.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not u.is_cuda and not _interpreted():
        return f"its kernels run on CUDA devices, not on {u.device} (but for TRITON_INTERPRET=1, set at the start)"
    outer = max(_default_plan(u.shape[-1], u.dtype, u.device, gradients=g).outer for g in (False, True))
    if outer > _MOST_OUTER_POINTS:
        return f"its outer stage takes at most {_MOST_OUTER_POINTS} points, but {u.shape[-1]} tokens need {outer}"
    return _unsound(u.dtype, u.device)


def _require_sound(u: Tensor) -> None:
    reason = _unsound(u.dtype, u.device)
    if reason is not None:
        raise RuntimeError(f"the triton backend cannot be used: {reason}; choose another backend")


def forward(
    u: Tensor,
    h: Tensor,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    plan: Plan | None = None,
) -> Tensor:
    """Y = postgate * (h conv w + direct * w), w = pregate * u.

    Args:
        u: Input (B, C, L), float32, float16 or bfloat16.
        h: Filters (H, K), float32; K <= L, channel c uses filter c // (C // H).
        direct: Tap at lag 0 (H,), float32, or None.
        pregate, postgate: Like u, or None.
        plan: How to cut rows, by default what suits their length, dtype and device.

    Returns:
        (B, C, L), contiguous, dtype of u.

    Raises:
        RuntimeError: The self-check of the device fails.
    """
    _require_sound(u)
    plan = _default_plan(u.shape[-1], u.dtype, u.device, gradients=False) if plan is None else plan
    return _convolve(u, h, direct, pregate, postgate, plan)


def backward(
    grad: Tensor,
    u: Tensor,
    h: Tensor,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    needs: Sequence[bool],
    plan: Plan | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`.

    Args:
        grad: Of its output (B, C, L).
        u, h, direct, pregate, postgate, plan: As there.
        needs: Which of the gradients of u, h, direct, pregate and postgate to compute.

    Returns:
        Those gradients, like their inputs, else None. Bits do not change from run to run.

    Raises:
        RuntimeError: The self-check of the device fails.
    """
    _require_sound(u)
    given = (u, h, direct, pregate, postgate)
    needs = [need and tensor is not None for need, tensor in zip(needs, given, strict=True)]
    plan = _default_plan(u.shape[-1], u.dtype, u.device, gradients=True) if plan is None else plan
    return _gradients(grad, u, h, direct, pregate, postgate, needs, plan)
