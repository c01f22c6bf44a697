# SPDX-License-Identifier: Apache-2.0
"""Where every long convolution is computed: the choice of a backend, and the two operators that torch knows of.

`hyena_hf::long_conv` and its backward are custom operators of real tensors: compiled and exported graphs hold them
whole, so they see no complex numbers and no choice that depends on a length. The choice is made when they run, once
for each kind of input, and written to the debug log of this module. `matrix` alone is made of plain torch operations,
so that graphs which must not hold foreign operators (ONNX) can be traced through it; it is chosen before.

| backend | what | automatic choice |
|---|---|---|
| torch | torch.fft, the reference; float64 without any operation on later inputs | float64, small inputs, GPUs |
| blocked | the same in blocks of channels that fit the cache | CPUs |
| overlap_save | transforms of the size of the filter | filters far shorter than the input |
| matrix | real matrix products (Monarch) | ONNX export, MPS |
| triton | one fused kernel | float16 and bfloat16 on CUDA |
| flashfftconv | the compiled package of Fu et al. 2023, arXiv 2311.05908 | never, only on request |

B batch, C channels, H filters, L length, K taps, n FFT length.
"""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from .backends import fft, matrix, overlap_save, reference, relaxed
from .backends.fft import Kernel, Needs, Work, block_floats, fft_length
from .backends.reference import Kept
from .precision import transform_dtype


BACKENDS = ("torch", "blocked", "overlap_save", "matrix", "triton", "flashfftconv")

# Up to this many numbers blocks save nothing, and keeping the spectra for backward costs little: some 16 MiB at most.
_SMALL = 1 << 20

_BY_FFT = ("torch", "blocked")  # one transform of the whole input: those that spectra are for

_log = logging.getLogger(__name__)
_requested: list[tuple[str]] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute the long convolutions of whole rows inside a `with` block by one backend, in all threads.

    Those that `causal_fftconv` and `bidirectional_fftconv` compute, in models too. Not asked: generated tokens and
    chunks behind a cache, and short rows of MultiHyena heads, which have ways of their own. The operator in one pass,
    `hyena_conv`, is blocks of torch.fft: both "torch" and "blocked" mean it.

    Args:
        name: One of `BACKENDS`.

    Raises:
        ValueError: There is no such backend. Inside the block every convolution that it cannot serve raises.
    """
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    entry = (name,)
    _requested.append(entry)
    try:
        yield
    finally:  # not the last one: blocks of other threads may end in another order
        del _requested[next(i for i, other in enumerate(_requested) if other is entry)]


def is_traced() -> bool:
    """Whether this call is recorded into a graph, by the compiler, an exporter or TorchScript."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore (torch forgot to export it)


def in_onnx_export() -> bool:
    """Whether the graph will be read by other runtimes, which know real numbers and standard operators only."""
    # torch's own function costs several microseconds, and eager calls ask it twice
    return is_traced() and torch.onnx.is_in_onnx_export()


def requested_backend(function: str, name: str | None, u: Tensor) -> str | None:
    """The backend that was asked for, by argument or by `use_backend`, or must be taken; None where it is free."""
    if name is None and _requested:
        name = _requested[-1][0]
    if name is None:
        # only `matrix` consists of operations that other runtimes know
        return "matrix" if in_onnx_export() or u.device.type == "mps" else None
    if name not in BACKENDS:
        raise ValueError(f"{function} has no backend {name!r}; choose one of {', '.join(BACKENDS)} or leave it out")
    return name


@dataclass(frozen=True)
class Conv:
    """One convolution: its tensors, as `causal_fftconv` takes them, with (H, K') filters over later tokens or None."""

    u: Tensor
    h: Tensor
    h_reverse: Tensor | None
    direct: Tensor | None
    pregate: Tensor | None
    postgate: Tensor | None
    exact: bool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """All of them, in the order of the fields."""
        return self.u, self.h, self.h_reverse, self.direct, self.pregate, self.postgate

    def within_reach(self) -> "Conv":
        """Without the taps that no input reaches."""
        length = self.u.shape[-1]
        if self.h.shape[1] <= length and (self.h_reverse is None or self.h_reverse.shape[1] < length):
            return self
        ahead = None if self.h_reverse is None else self.h_reverse[:, : length - 1]
        return Conv(self.u, self.h[:, :length], ahead, self.direct, self.pregate, self.postgate, self.exact)

    def causal(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The five tensors that backends with kernels of their own take."""
        return self.u, self.h, self.direct, self.pregate, self.postgate

    def kernel(self, spectrum: Tensor | None = None) -> Kernel:
        """The filters, their spectrum (H, F, 2) beside them if somebody has it."""
        return Kernel(
            self.h, self.h_reverse, self.direct, None if spectrum is None else torch.view_as_complex(spectrum)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the transforms."""
        return transform_dtype(self.u.dtype, self.u.device, self.exact)

    def work(self, n: int | None = None) -> Work:
        """Sizes for transforms of n points, by default as few as do not wrap around."""
        if n is None:
            behind = 0 if self.h_reverse is None else self.h_reverse.shape[1] + 1
            n = fft_length(self.u.shape[-1], max(self.h.shape[1], behind))
        return Work(n, self.dtype, block_floats(n))


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.backends.{name}")


def refusal(backend: str, conv: Conv) -> str | None:
    """Why a backend cannot serve a convolution, as the end of a sentence; None if it can."""
    if backend == "torch":
        return None
    if backend == "blocked":
        return (
            None
            if conv.u.device.type == "cpu"
            else f"its blocks fit the caches of CPUs, but u lies on {conv.u.device}"
        )
    if backend == "overlap_save":
        if conv.h_reverse is not None:
            return "it convolves causally, but there are filters over later tokens"
        taps, length = conv.h.shape[1], conv.u.shape[-1]
        return None if 2 * taps <= length else f"filters ({taps} taps) must be at most half as long as u ({length})"
    if conv.h_reverse is not None and backend != "matrix":
        return "it convolves causally, but there are filters over later tokens"
    return _module(backend).refusal(*conv.causal())


def choose(requested: str, conv: Conv) -> str:
    """The backend of a convolution.

    Args:
        requested: A backend, or "" for the fastest one that serves.
        conv: The tensors.

    Raises:
        ValueError: The requested backend cannot serve.
    """
    if requested:
        reason = refusal(requested, conv)
        if reason is not None:
            raise ValueError(f"the backend {requested!r} cannot serve this convolution: {reason}; leave backend out")
        return requested
    backend = _fastest(conv)
    if _log.isEnabledFor(logging.DEBUG):
        _note(backend, tuple(conv.u.shape), tuple(conv.h.shape), conv.u.dtype, conv.u.device)
    return backend


def _fastest(conv: Conv) -> str:
    if conv.u.dtype == torch.float64:
        return "torch"
    # float32 goes to the vendor's FFT: matrix products in full float32 take no tensor cores
    if conv.u.device.type == "cuda" and conv.u.dtype != torch.float32 and refusal("triton", conv) is None:
        return "triton"
    length, taps = conv.u.shape[-1], conv.h.shape[1]
    if refusal("overlap_save", conv) is None and overlap_save.serves(length, taps):
        return "overlap_save"
    if conv.u.device.type == "cpu" and conv.u.numel() > _SMALL:
        return "blocked"
    return "torch"


@lru_cache(maxsize=1024)
def _note(backend: str, u: tuple[int, ...], h: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    _log.debug("long convolution of u %s, h %s in %s on %s: backend %s", u, h, dtype, device, backend)


def takes_spectra(device: torch.device, length: int, support: int | None) -> bool:
    """Whether filters that end at `support` should be transformed once for inputs of a length: frames do without."""
    if isinstance(length, torch.SymInt) or torch.compiler.is_compiling() or in_onnx_export():
        return False
    if device.type == "mps" or (_requested and _requested[-1][0] not in _BY_FFT):
        return False
    return support is None or not overlap_save.serves(length, min(support, length))


def note_one_pass(p: Tensor, h: Tensor) -> None:
    """Write to the debug log that an operator goes through `hyena_conv`, or refuse where another way is asked for."""
    if _requested and _requested[-1][0] not in _BY_FFT:
        raise ValueError(f"hyena_conv computes by torch.fft, but use_backend asks for {_requested[-1][0]!r}")
    if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        _note("blocked, in one pass", tuple(p.shape), tuple(h.shape), p.dtype, p.device)


def one_pass_serves(dtype: torch.dtype, device: torch.device, length: int, support: int | None) -> bool:
    """Whether `hyena_conv` is the fastest way for rows of that length and a filter that ends at `support`."""
    if _requested and _requested[-1][0] not in _BY_FFT:
        return False
    if device.type != "cpu" or in_onnx_export() or torch.promote_types(dtype, torch.float32) == torch.float64:
        return False
    if support is None:
        return True
    return not isinstance(length, torch.SymInt) and not overlap_save.serves(length, min(support, length))


def convolve(conv: Conv, backend: str | None, spectrum: Tensor | None = None) -> Tensor:
    """A convolution whose tensors have been checked, differentiable.

    Args:
        conv: The tensors.
        backend: What `requested_backend` returned.
        spectrum: Of the filters (H, F, 2), for the FFT of 2 F - 2 points.
    """
    if spectrum is not None and backend not in (None, *_BY_FFT):
        raise ValueError(f"the backend {backend!r} takes taps, not a FilterSpectrum; leave backend out")
    u, h, h_reverse, direct, pregate, postgate = conv.tensors()
    if backend == "matrix":
        choose(backend, conv)
        if h_reverse is not None:
            return matrix.bidirectional(u, h, h_reverse, direct, pregate, postgate)
        return matrix.convolve(u, h, direct, pregate, postgate)
    if torch.compiler.is_compiling():
        return long_conv(*conv.tensors(), spectrum, backend or "", conv.exact)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in conv.tensors()):
        return _LongConv.apply(*conv.tensors(), spectrum, backend or "", conv.exact)
    return _compute(conv, spectrum, backend or "")[0]


def _compute(conv: Conv, spectrum: Tensor | None, backend: str) -> tuple[Tensor, Kept | None]:
    """Output (B, C, L), and where all is small the spectra of input and filters for backward."""
    conv = conv.within_reach()
    backend = choose(backend, conv) if spectrum is None else _with_spectrum(backend, conv)
    gates = conv.pregate, conv.postgate
    if backend == "torch" and conv.u.dtype == torch.float64 and conv.h_reverse is None and spectrum is None:
        return _relaxed(conv).contiguous(), None
    if backend in ("torch", "blocked"):
        work = conv.work(None if spectrum is None else 2 * spectrum.shape[1] - 2)
        if backend == "blocked":
            return fft.forward(conv.u, conv.kernel(spectrum), gates, work), None
        y, kept = reference.forward(conv.u, conv.kernel(spectrum), gates, work)
        return y.contiguous(), kept if conv.u.numel() <= _SMALL else None
    if backend == "overlap_save":
        frames = overlap_save.Frames.of(conv.u.shape[-1], conv.h.shape[1])
        return overlap_save.forward(conv.u, conv.kernel(), gates, conv.work(frames.size), frames), None
    return _module(backend).forward(*conv.causal()), None


def _with_spectrum(requested: str, conv: Conv) -> str:
    """The backend of filters that have been transformed already."""
    return requested or ("blocked" if conv.u.device.type == "cpu" and conv.u.numel() > _SMALL else "torch")


def _relaxed(conv: Conv) -> Tensor:
    """Exactly causal form, gates included."""
    w = conv.u if conv.pregate is None else conv.u * conv.pregate
    w = w.unflatten(1, (conv.h.shape[0], -1)).contiguous()
    y = relaxed.convolve(w, conv.h)
    if conv.direct is not None:
        y = torch.addcmul(y, w, conv.direct.view(-1, 1, 1))
    y = y.flatten(1, 2)
    return y if conv.postgate is None else y * conv.postgate


def _gradients(
    grad: Tensor, whole: Conv, spectrum: Tensor | None, backend: str, needs: Sequence[bool], kept: Kept | None = None
) -> list[Tensor | None]:
    """Gradients of the six tensors of a convolution where they are needed."""
    conv = whole.within_reach()
    backend = choose(backend, conv) if spectrum is None else _with_spectrum(backend, conv)
    wants = Needs(needs[0], needs[1] or needs[2], needs[3], needs[4], needs[5])
    gates = conv.pregate, conv.postgate
    if backend in ("torch", "blocked"):
        work = conv.work(None if spectrum is None else 2 * spectrum.shape[1] - 2)
        if backend == "blocked":
            found = fft.backward(grad, conv.u, conv.kernel(spectrum), gates, work, wants).tensors()
        else:
            found = reference.backward(grad, conv.u, conv.kernel(spectrum), gates, work, wants, kept)
    elif backend == "overlap_save":
        frames = overlap_save.Frames.of(conv.u.shape[-1], conv.h.shape[1])
        work = conv.work(frames.size)
        found = overlap_save.backward(grad, conv.u, conv.kernel(), gates, work, frames, wants).tensors()
    else:
        of_u, of_h, *others = _module(backend).backward(grad, *conv.causal(), [needs[0], needs[1], *needs[3:]])
        found = of_u, of_h, None, *others
    return [_like(*three) for three in zip(found, whole.tensors(), needs, strict=True)]


def _like(grad: Tensor | None, x: Tensor | None, need: bool) -> Tensor | None:
    """A gradient in the shape and dtype of its input: taps out of reach have none."""
    if grad is None or x is None or not need:
        return None
    if grad.ndim == 2 and grad.shape != x.shape:
        grad = torch.nn.functional.pad(grad, (0, x.shape[1] - grad.shape[1]))
    return grad.to(x.dtype).contiguous()


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a long convolution is differentiable once; call backward or torch.autograd.grad without create_graph=True"
        )


class _LongConv(torch.autograd.Function):
    """The operator outside compiled graphs: it may keep spectra, and costs less overhead than a custom one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        spectrum, backend, exact = inputs[6:]
        y, kept = _compute(Conv(*inputs[:6], exact=exact), spectrum, backend)
        ctx.save_for_backward(*inputs[:7], *(kept or ()))
        ctx.options = backend, exact
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        saved = ctx.saved_tensors  # may be read once: checkpointing counts
        backend, exact = ctx.options
        conv, kept = Conv(*saved[:6], exact=exact), (saved[7], saved[8]) if len(saved) > 7 else None
        found = _gradients(grad_outputs[0], conv, saved[6], backend, ctx.needs_input_grad[:6], kept)
        return *found, None, None, None


@library.custom_op("hyena_hf::long_conv", mutates_args=())
def long_conv(  # noqa: PLR0913 (an operator of torch takes tensors, no objects)
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor | None,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    spectrum: Tensor | None,
    backend: str,
    exact: bool,
) -> Tensor:
    """The operator in graphs: a convolution with its gates, (B, C, L)."""
    return _compute(Conv(u, h, h_reverse, direct, pregate, postgate, exact), spectrum, backend)[0]


@long_conv.register_fake
def _(u, h, h_reverse, direct, pregate, postgate, spectrum, backend, exact):  # noqa: ARG001, PLR0913 (one signature)
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@library.custom_op("hyena_hf::long_conv_backward", mutates_args=())
def long_conv_backward(  # noqa: PLR0913
    grad: Tensor,
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor | None,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    spectrum: Tensor | None,
    backend: str,
    exact: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the six tensors of a convolution in graphs; an empty tensor for each that is not needed."""
    conv = Conv(u, h, h_reverse, direct, pregate, postgate, exact)
    found = _gradients(grad, conv, spectrum, backend, needs)
    return [u.new_empty(0) if x is None else x for x in found]


@long_conv_backward.register_fake
def _(grad, u, h, h_reverse, direct, pregate, postgate, spectrum, backend, exact, needs):  # noqa: ARG001, PLR0913
    inputs = u, h, h_reverse, direct, pregate, postgate
    return [
        u.new_empty(0) if x is None or not need else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, need in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001 (torch's signature)
    *tensors, backend, exact = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = backend, exact


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = long_conv_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


long_conv.register_autograd(_backward, setup_context=_setup_context)


__all__ = [
    "BACKENDS",
    "Conv",
    "choose",
    "convolve",
    "in_onnx_export",
    "is_traced",
    "one_pass_serves",
    "refusal",
    "requested_backend",
    "takes_spectra",
    "use_backend",
]
