# SPDX-License-Identifier: Apache-2.0
"""Where every long convolution is computed: the choice of a backend, and the two operators that torch knows of.

`hyena_hf::long_conv` and its backward are custom operators of real tensors: compiled and exported graphs hold them
whole, so they see no complex numbers and no choice that depends on a length. The choice is made when they run, once
for each kind of input, and written to the debug log of this module. `matrix` alone is made of plain torch operations,
so that graphs which must not hold foreign operators (ONNX) can be traced through it; it is chosen before.

| backend | what | automatic choice |
|---|---|---|
| torch | torch.fft, the reference; float64 without any operation on later inputs | float64, small or unlucky inputs |
| blocked | the same in blocks of channels that fit the cache | CPUs |
| overlap_save | transforms of the size of the filter | filters far shorter than the input |
| matrix | real matrix products (Monarch) | ONNX export, MPS |
| triton | one fused kernel | CUDA with triton |
| flashfftconv | the compiled package of Fu et al. 2023, arXiv 2311.05908 | never, only on request |

B batch, C channels, H filters, L length, K taps, n FFT length.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .backends import fft, matrix, overlap_save, relaxed
from .backends.fft import Kernel, Needs, Work, block_floats, fft_length
from .precision import transform_dtype


BACKENDS = ("torch", "blocked", "overlap_save", "matrix", "triton", "flashfftconv")

# Below this many points blocks save nothing, and keeping the spectra for backward costs little memory.
_SMALL = 1 << 18

_log = logging.getLogger(__name__)
_requested: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute all long convolutions inside a `with` block by one backend.

    Args:
        name: One of `BACKENDS`.

    Raises:
        ValueError: There is no such backend. Inside the block every convolution that it cannot serve raises.
    """
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    _requested.append(name)
    try:
        yield
    finally:
        _requested.pop()


def requested_backend(function: str, name: str | None, u: Tensor) -> str | None:
    """The backend that was asked for, by argument or by `use_backend`, or must be taken; None where it is free."""
    if name is None and _requested:
        name = _requested[-1]
    if name is None:
        # only `matrix` consists of operations that other runtimes know
        return "matrix" if torch.onnx.is_in_onnx_export() or u.device.type == "mps" else None
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

    def work(self, backend: str, n: int | None = None) -> Work:
        """Sizes for a backend of `fft` or `overlap_save`."""
        if n is None:
            behind = 0 if self.h_reverse is None else self.h_reverse.shape[1] + 1
            n = fft_length(self.u.shape[-1], max(self.h.shape[1], behind))
        return Work(n, self.dtype, 1 << 62 if backend == "torch" else block_floats(n, self.u.device))


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
    _note(backend, tuple(conv.u.shape), tuple(conv.h.shape), conv.u.dtype, conv.u.device)
    return backend


def _fastest(conv: Conv) -> str:
    if conv.u.dtype == torch.float64:
        return "torch"
    if conv.u.device.type == "cuda" and refusal("triton", conv) is None:
        return "triton"
    length, taps = conv.u.shape[-1], conv.h.shape[1]
    if refusal("overlap_save", conv) is None and overlap_save.serves(length, taps):
        return "overlap_save"
    if conv.u.device.type == "cpu" and 2 * conv.u.numel() > _SMALL:
        return "blocked"
    return "torch"


@cache
def _note(backend: str, u: tuple[int, ...], h: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    _log.debug("long convolution of u %s, h %s in %s on %s: backend %s", u, h, dtype, device, backend)


def one_pass_serves(dtype: torch.dtype, device: torch.device, length: int, support: int | None) -> bool:
    """Whether `hyena_conv` is the fastest way for rows of that length and a filter that ends at `support`."""
    if _requested and _requested[-1] not in ("torch", "blocked"):
        return False
    if (
        device.type != "cpu"
        or torch.onnx.is_in_onnx_export()
        or torch.promote_types(dtype, torch.float32) == torch.float64
    ):
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
    if spectrum is not None and backend not in (None, "torch", "blocked"):
        raise ValueError(f"the backend {backend!r} takes taps, not a FilterSpectrum; leave backend out")
    u, h, h_reverse, direct, pregate, postgate = conv.tensors()
    if backend == "matrix":
        choose(backend, conv)
        if h_reverse is not None:
            return matrix.bidirectional(u, h, h_reverse, direct, pregate, postgate)
        return matrix.convolve(u, h, direct, pregate, postgate)
    keep = spectrum is None and _keeps_spectra(conv, backend)
    return long_conv(u, h, h_reverse, direct, pregate, postgate, spectrum, backend or "", conv.exact, keep)[0]


def _keeps_spectra(conv: Conv, backend: str | None) -> bool:
    """Whether spectra are kept for backward: where the reference is chosen and all is small."""
    if torch.compiler.is_compiling() or conv.u.device.type != "cpu" or conv.u.dtype == torch.float64:
        return False
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in conv.tensors()):
        return False
    return (backend or _fastest(conv)) == "torch" and 2 * conv.u.numel() <= _SMALL


@torch.library.custom_op("hyena_hf::long_conv", mutates_args=())
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, C, L), and what backward wants again: spectra of input and filters as pairs, or empty tensors."""
    length = u.shape[-1]
    conv = Conv(u, h[:, :length], _before(h_reverse, length), direct, pregate, postgate, exact)
    backend = choose(backend, conv) if spectrum is None else _with_spectrum(backend, conv)
    gates = pregate, postgate
    kept = u.new_empty(0), u.new_empty(0)
    if backend == "torch" and u.dtype == torch.float64 and h_reverse is None and spectrum is None:
        y = _relaxed(conv)
    elif backend in ("torch", "blocked"):
        n = None if spectrum is None else 2 * spectrum.shape[1] - 2
        y, *spectra = fft.forward(u, conv.kernel(spectrum), gates, conv.work(backend, n), keep=keep)
        if spectra[0] is not None and spectra[1] is not None:
            kept = torch.view_as_real(spectra[0]), torch.view_as_real(spectra[1])
    elif backend == "overlap_save":
        frames = overlap_save.Frames.of(length, conv.h.shape[1])
        y = overlap_save.forward(u, conv.kernel(), gates, conv.work(backend, frames.size), frames)
    else:
        y = _module(backend).forward(*conv.causal())
    return y, *kept


def _with_spectrum(requested: str, conv: Conv) -> str:
    """The backend of filters that have been transformed already."""
    return requested or ("blocked" if conv.u.device.type == "cpu" and 2 * conv.u.numel() > _SMALL else "torch")


def _before(h_reverse: Tensor | None, length: int) -> Tensor | None:
    return None if h_reverse is None else h_reverse[:, : length - 1]


def _relaxed(conv: Conv) -> Tensor:
    """Exactly causal form, gates included."""
    w = conv.u if conv.pregate is None else conv.u * conv.pregate
    w = w.unflatten(1, (conv.h.shape[0], -1)).contiguous()
    y = relaxed.convolve(w, conv.h)
    if conv.direct is not None:
        y = torch.addcmul(y, w, conv.direct.view(-1, 1, 1))
    y = y.flatten(1, 2)
    return y.contiguous() if conv.postgate is None else y * conv.postgate


@long_conv.register_fake
def _(u, h, h_reverse, direct, pregate, postgate, spectrum, backend, exact, keep):  # noqa: ARG001, PLR0913 (one signature)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    if not keep:
        return y, u.new_empty(0), u.new_empty(0)
    conv = Conv(u, h[:, : u.shape[-1]], _before(h_reverse, u.shape[-1]), direct, pregate, postgate, exact)
    work = conv.work("torch")
    shape = u.shape[0], h.shape[0], u.shape[1] // h.shape[0], work.n // 2 + 1, 2
    return y, u.new_empty(shape, dtype=work.dtype), u.new_empty(shape[1], 1, *shape[3:], dtype=work.dtype)


@torch.library.custom_op("hyena_hf::long_conv_backward", mutates_args=())
def long_conv_backward(  # noqa: PLR0913
    grad: Tensor,
    u: Tensor,
    h: Tensor,
    h_reverse: Tensor | None,
    direct: Tensor | None,
    pregate: Tensor | None,
    postgate: Tensor | None,
    spectrum: Tensor | None,
    kept_input: Tensor,
    kept_kernel: Tensor,
    backend: str,
    exact: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the six tensors of a convolution; an empty tensor for each that is not needed."""
    length = u.shape[-1]
    conv = Conv(u, h[:, :length], _before(h_reverse, length), direct, pregate, postgate, exact)
    backend = choose(backend, conv) if spectrum is None else _with_spectrum(backend, conv)
    wants = Needs(needs[0], needs[1] or needs[2], needs[3], needs[4], needs[5])
    gates = pregate, postgate
    if backend in ("torch", "blocked"):
        kept = None
        if kept_input.numel():
            kept = torch.view_as_complex(kept_input), torch.view_as_complex(kept_kernel)
        n = None if spectrum is None else 2 * spectrum.shape[1] - 2
        found = fft.backward(grad, u, conv.kernel(spectrum), gates, conv.work(backend, n), wants, kept).tensors()
    elif backend == "overlap_save":
        frames = overlap_save.Frames.of(length, conv.h.shape[1])
        work = conv.work(backend, frames.size)
        found = overlap_save.backward(grad, u, conv.kernel(), gates, work, frames, wants).tensors()
    else:
        of_u, of_h, *others = _module(backend).backward(grad, *conv.causal(), [needs[0], needs[1], *needs[3:]])
        found = of_u, of_h, None, *others
    inputs = u, h, h_reverse, direct, pregate, postgate
    return [_finish(*three) for three in zip(found, inputs, needs, strict=True)]


def _finish(grad: Tensor | None, x: Tensor | None, need: bool) -> Tensor:
    """A gradient in the shape and dtype of its input: taps out of reach have none."""
    if grad is None or x is None or not need:
        return torch.empty(0)
    if grad.ndim == 2 and grad.shape != x.shape:
        grad = torch.nn.functional.pad(grad, (0, x.shape[1] - grad.shape[1]))
    return grad.to(x.dtype)


@long_conv_backward.register_fake
def _(grad, u, h, h_reverse, direct, pregate, postgate, spectrum, kept_input, kept_kernel, backend, exact, needs):  # noqa: ARG001, PLR0913 (one signature)
    inputs = u, h, h_reverse, direct, pregate, postgate
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and need else torch.empty(0)
        for x, need in zip(inputs, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, backend, exact, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = backend, exact


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a long convolution is differentiable once; call backward or torch.autograd.grad without create_graph=True"
        )
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = long_conv_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


long_conv.register_autograd(_backward, setup_context=_setup_context)
