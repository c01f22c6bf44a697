"""What causal linear attention costs on a GPU: our Triton kernels beside the same sums by PyTorch.

    python -m benchmarks.bench_linear_kernel                  (--smoke: tiny shapes, 2 rounds, page in runs/smoke)
    python -m benchmarks.bench_linear_kernel --only time      (that section alone)

Time on the device in shuffled rounds; every ratio is the time of PyTorch's sums over that of another case within one
round, its median and quartiles. Features are in float32, as feature maps give them, values in bfloat16. Without a CUDA
device it says so, measures nothing and leaves the page as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from benchmarks.bench_fftconv import relative_error
from benchmarks.report import markdown_table
from benchmarks.timing import Call, Settings, device_time, ratio_table, run_sections
from hyena_hf.ops.linear_attention import BACKENDS, causal_linear_attention


Page = tuple[list[str], dict[str, Figure]]


class Shape(NamedTuple):
    """B batch, H query heads, K key heads, P head width, n tokens; F = 2 P features."""

    batch: int
    heads: int
    key_heads: int
    width: int
    tokens: int


SHAPES = [Shape(1, 32, 8, 128, n) for n in (1024, 4096, 16384)] + [Shape(8, 9, 3, 64, n) for n in (1024, 4096, 16384)]
ERROR_SHAPES = [Shape(1, 4, 2, 64, 2048)]
TINY = [Shape(1, 2, 1, 16, 100)]
FORMS = {"plain": False, "logarithms": True}
PRECISIONS = {"float32": "highest", "TF32": "high"}
SOFTMAX = "softmax (SDPA)"


def inputs(shape: Shape, device: torch.device, *, log: bool) -> list[Tensor]:
    """Features of queries and of keys, values, and a gradient of the outputs."""
    batch, heads, key_heads, width, tokens = shape
    q, k = (torch.randn(batch, n, tokens, width, device=device) for n in (heads, key_heads))
    q, k = (
        torch.cat([x, -x], dim=-1) if log else torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in (q, k)
    )
    v = torch.randn(batch, key_heads, tokens, width, device=device, dtype=torch.bfloat16)
    return [q, k, v, torch.randn(batch, heads, tokens, width, device=device, dtype=torch.bfloat16)]


def attend(backend: str, log: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs of linear attention."""
    return causal_linear_attention(q, k, v, log_features=log, backend=backend)[0]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs of softmax attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(function(*tensors), tensors, grad)


@torch.no_grad()
def outputs(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    """Forward alone."""
    return function(*tensors)


def cases(shape: Shape, device: torch.device, *, log: bool, backward: bool) -> dict[str, Call]:
    """Calls by name: the two backends, and softmax attention of as many heads in bfloat16."""
    q, k, v, grad = (x.requires_grad_(backward) for x in inputs(shape, device, log=log))
    narrow = [x[..., : shape.width].detach().bfloat16().requires_grad_(backward) for x in (q, k)]
    functions: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        name: (partial(attend, name, log), [q, k, v]) for name in BACKENDS
    }
    functions[SOFTMAX] = softmax_attention, [*narrow, v]
    if backward:
        return {name: partial(gradients, *both, grad.detach()) for name, both in functions.items()}
    return {name: partial(outputs, *both) for name, both in functions.items()}


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Products of float32 in another precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def time(settings: Settings) -> Page:
    """Forward, and forward and backward."""
    lines = ["## Time", f"{torch.cuda.get_device_name()}, time on the device. Base: the sums by PyTorch."]
    keys = ["products", *Shape._fields]
    for title, backward in (("Forward", False), ("Forward and backward", True)):
        for form, log in FORMS.items():
            found = {}
            for products, name in PRECISIONS.items():
                for shape in tqdm(TINY if settings.smoke else SHAPES, desc=f"{title}, {form}, {products}"):
                    with precision(name):
                        calls = cases(shape, torch.device("cuda"), log=log, backward=backward)
                        found[products, *shape] = settings.compare(calls, meter=device_time)
                    torch.cuda.empty_cache()
            lines += ["", f"{title}, {form}:", "", *ratio_table(keys, found)]
    return lines, {}


def peak(call: Call) -> float:
    """MiB on the device above what there was."""
    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory(settings: Settings) -> Page:
    """Peak of forward and backward."""
    rows = []
    for form, log in FORMS.items():
        for shape in tqdm(TINY if settings.smoke else SHAPES, desc=f"memory, {form}"):
            calls = cases(shape, torch.device("cuda"), log=log, backward=True)
            rows.append((form, *shape, *(f"{peak(call):.0f}" for call in calls.values())))
            del calls
            torch.cuda.empty_cache()
    note = "Forward and backward, outputs and gradients included, above the inputs, in MiB."
    return ["## Memory", note, "", *markdown_table(["form", *Shape._fields, *BACKENDS, SOFTMAX], rows)], {}


def errors(settings: Settings) -> Page:
    """Relative errors of outputs and gradients against float64."""
    rows = []
    for form, log in FORMS.items():
        for shape in TINY if settings.smoke else ERROR_SHAPES:
            *tensors, grad = inputs(shape, torch.device("cuda"), log=log)
            leaves = [x.double().requires_grad_() for x in tensors]
            truth = [attend("torch", log, *leaves), *gradients(partial(attend, "torch", log), leaves, grad.double())]
            for products, name in PRECISIONS.items():
                for backend in BACKENDS:
                    own = [x.detach().requires_grad_() for x in tensors]
                    with precision(name):
                        found = [attend(backend, log, *own), *gradients(partial(attend, backend, log), own, grad)]
                    cells = [f"{relative_error(x, y):.1e}" for x, y in zip(found, truth, strict=True)]
                    rows.append((form, *shape, products, backend, *cells))
    note = "Relative RMS error against PyTorch's sums in float64 of the same rounded inputs."
    columns = ["form", *Shape._fields, "products", "backend", "y", "gradient of q", "of k", "of v"]
    return ["## Errors", note, "", *markdown_table(columns, rows)], {}


SECTIONS = {"time": time, "memory": memory, "errors": errors}


def main() -> None:
    """Run the sections where there is a device for them."""
    if not torch.cuda.is_available():
        print("bench_linear_kernel: torch sees no CUDA device; nothing was measured")
        return
    run_sections("linear_kernel", "Linear attention by Triton", __doc__, SECTIONS)


if __name__ == "__main__":
    main()
