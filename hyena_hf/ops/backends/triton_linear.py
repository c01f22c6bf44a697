# SPDX-License-Identifier: Apache-2.0
"""Sums of causal linear attention on a GPU, and their gradients: chunks in Triton, states between them.

    y_t = sum_{i <= t - delay} w_ti [v_i, 1],    w_ti = phi(q_t) . phi(k_i)

in the two forms of `hyena_hf.ops.linear_attention`: plain features, and logarithms of positive ones, whose sums are
relative to running maxima. Normalising, and the softmax weights of a window, stay there.

Places: key i has the place j = i - shift, shift = N - n - delay, at which the first query sees it: query t sees the
keys at places j <= t. Chunks cut queries and places alike, so a delay costs nothing. A stretch of chunks takes

    fold           states before its chunks, one after the other    a program for each block of F and of P
    attend         sums of its queries                              all chunks at once

and for gradients, from the last stretch back, `fold` again and

    grad_queries   and the products of queries and keys             all chunks at once
    unfold         gradients of the states behind its chunks        as fold
    grad_keys      and grad_values                                  all chunks at once

Kept for gradients is one state a stretch. What belongs to single chunks lives in one buffer as long as a stretch. Time
is O(n F (C + P)), memory beyond inputs, outputs and their gradients that buffer and the kept states.

Everything is multiplied and summed in float32, features and values of 16 bits too; on tensor cores, in TF32, only
where `torch.set_float32_matmul_precision` allows it, as for products of torch. Inputs are read as they are: no copies
in float32, and masked keys are never read.

Sources: chunks with a state between them, Hua et al. 2022, arXiv 2202.10447; states of chunks first, then all chunks
at once, and states computed again for gradients, Yang et al. 2023, arXiv 2312.06635.

B batch, H query heads, K heads of keys and values, n queries, N keys, F features, P value width, C places a chunk.
"""

import importlib
import importlib.util
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


_KERNELS = "hyena_hf.ops.backends._triton_linear"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Places of a chunk: tl.dot takes 16 at least. Most, by whether features are logarithms: what the compiler keeps in
# registers for sm_80 and sm_90, but for some bytes a thread in gradients.
_LEAST_CHUNK, _MOST_CHUNK = 16, {False: 64, True: 32}

# Features and columns of values of a tile.
_BLOCK = 32

# A stretch has no fewer places than PyTorch keeps a state for, and enough programs for a large GPU.
_LEAST_STRETCH, _PROGRAMS = 1024, 1024

_NOTHING = -1e30  # the logarithm of nothing, as in `hyena_hf.ops.linear_attention`


class State(NamedTuple):
    """Fields of `hyena_hf.ops.linear_attention.LinearState`."""

    sums: Tensor
    log_scale: Tensor | None
    carry: Tensor | None


@dataclass(frozen=True)
class Work:
    """Sizes of one attention, and how it is cut.

    Attributes:
        batch, heads, key_heads, queries, keys, features, width: B, H, K, n, N, F, P.
        delay: Least distance of a key from its query.
        log: Whether features are logarithms.
        chunk: C, a power of two from 16 to 64; to 32 for logarithms.
        precision: Of products, by the name that Triton has for it: "ieee" or "tf32".
    """

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    features: int
    width: int
    delay: int
    log: bool
    chunk: int
    precision: str

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, delay: int, log: bool, chunk: int) -> "Work":
        """For q (B, H, n, F), k (B, K, N, F) and v (B, K, N, P), cut into chunks of `chunk` or what is next to it."""
        batch, heads, queries, features = q.shape
        chunk = min(max(_power(chunk), _LEAST_CHUNK), _MOST_CHUNK[log])
        precision = _precision()
        sizes = k.shape[1], queries, k.shape[2], features, v.shape[3]
        return cls(batch, heads, *sizes, delay=delay, log=log, chunk=chunk, precision=precision)

    @property
    def shift(self) -> int:
        """The key at place 0."""
        return self.keys - self.queries - self.delay

    @property
    def limit(self) -> int:
        """The place behind the last key of the final state: that which the next query sees is in it."""
        return self.queries + (self.delay > 0)

    def stretches(self) -> list[tuple[int, int]]:
        """First chunk and number of chunks of every stretch. Keys that the first query sees are at negative places."""
        first, last = min(0, -self.shift // self.chunk), -(-self.limit // self.chunk)
        stretch = max(_LEAST_STRETCH // self.chunk, -(-_PROGRAMS // (self.batch * self.heads)))
        return [(start, min(stretch, last - start)) for start in range(first, last, stretch)]

    def numbers(self) -> dict[str, int | bool | str]:
        """Arguments of kernels by their names."""
        names = ("key_heads", "queries", "keys", "features", "width", "shift", "limit")
        sizes = {name: getattr(self, name) for name in names} | {"groups": self.heads // self.key_heads}
        return sizes | {"LOG": self.log, "PRECISION": self.precision, "C": self.chunk, "BF": _BLOCK, "BP": _BLOCK}

    def blocks(self, name: str) -> int:
        """Blocks of features or of the width of values."""
        return -(-getattr(self, name) // _BLOCK)

    @property
    def warps(self) -> int:
        """Of 32 threads, a program."""
        return 8 if self.chunk == 64 else 4


def _power(n: int) -> int:
    """The power of two at or above n."""
    return 1 << (n - 1).bit_length()


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they were imported, or will be."""
    module = sys.modules.get(_KERNELS)
    return os.environ.get("TRITON_INTERPRET") == "1" if module is None else module.INTERPRETED


def _kernels() -> ModuleType:
    return importlib.import_module(_KERNELS)


class _Stretch:
    """Launches the kernels for one stretch of chunks."""

    def __init__(self, work: Work, device: torch.device, first: int, chunks: int) -> None:
        self.work, self.device, self.chunks = work, device, chunks
        self.numbers = work.numbers() | {"first": first, "chunks": chunks}

    def scan(self, name: str, **tensors: Tensor | None) -> None:
        """`fold` or `unfold`: from chunk to chunk, for every block of a state."""
        grid = self.work.batch * self.work.key_heads, self.work.blocks("features"), self.work.blocks("width")
        self._launch(name, grid, tensors)

    def over_chunks(self, name: str, heads: int, split: str | None, **tensors: Tensor | None) -> None:
        """A kernel whose programs each serve a chunk of one head, and a block of `split`."""
        grid = self.work.batch * heads, self.chunks, 1 if split is None else self.work.blocks(split)
        self._launch(name, grid, tensors)

    def _launch(self, name: str, grid: tuple[int, int, int], tensors: dict[str, Tensor | None]) -> None:
        """With the sizes that the kernel asks for. The first axis of a grid may be long."""
        kernel = getattr(_kernels(), name)
        sizes = {key: value for key, value in self.numbers.items() if key in kernel.arg_names}
        options = {"num_warps": self.work.warps, "num_stages": 1, "enable_fp_fusion": True}
        # Triton launches on the current device, whatever its tensors are on
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            kernel[grid](**tensors, **sizes, **options)


class _Rooms:
    """Room for what lives as long as a stretch: states, what they are relative to, and pairs for gradients."""

    def __init__(self, work: Work, device: torch.device, *, gradients: bool) -> None:
        def room(*shape: int, wanted: bool = True) -> Tensor | None:
            return torch.empty(work.batch, *shape, dtype=torch.float32, device=device) if wanted else None

        chunks = max(chunks for _, chunks in work.stretches())
        self.states = room(work.key_heads, chunks, work.features, work.width + 1)
        self.scales = room(work.key_heads, chunks + 1, work.features, wanted=work.log)
        self.pairs = room(work.heads, chunks, 3, work.chunk, work.chunk, wanted=gradients)
        self.levels = room(work.heads, chunks, 3, work.chunk, wanted=gradients and work.log)


def _fold(stretch: _Stretch, rooms: _Rooms, k: Tensor, v: Tensor, mask: Tensor | None, state: State) -> State:
    """The states before the chunks of a stretch into the rooms, and the one behind it."""
    new = State(*(None if x is None else torch.empty_like(x) for x in state))  # pyright: ignore (it counts None)
    fields = {"sums": state.sums, "scale": state.log_scale, "carry": state.carry}
    fields |= {f"new_{name}": x for name, x in zip(("sums", "scale", "carry"), new, strict=True)}
    stretch.scan("fold", k=k, v=v, mask=mask, **fields, states=rooms.states, scales=rooms.scales)
    return new


def _forward(
    work: Work, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State, *, keep: bool
) -> tuple[Tensor, Tensor | None, State, list[State]]:
    """Sums (B, H, n, P + 1), their tops (B, H, n), the last state and, to keep, those before every stretch."""
    shape = work.batch, work.heads, work.queries
    sums = torch.empty(*shape, work.width + 1, dtype=torch.float32, device=q.device)
    tops = torch.empty(shape, dtype=torch.float32, device=q.device) if work.log else None
    rooms, states = _Rooms(work, q.device, gradients=False), []
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "states": rooms.states, "scales": rooms.scales}
    for first, chunks in work.stretches():
        stretch = _Stretch(work, q.device, first, chunks)
        states += [State(state.sums, state.log_scale, None)] if keep else []
        state = _fold(stretch, rooms, k, v, mask, state)
        stretch.over_chunks("attend", work.heads, None, **inputs, sums=sums, tops=tops)
    return sums, tops, state, states


@dataclass(frozen=True)
class _Saved:
    """What gradients take from the forward pass.

    Attributes:
        q, k, v, mask, tops: As there.
        states: Before every stretch, without carries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    tops: Tensor | None
    states: list[State]


def _backward(work: Work, saved: _Saved, grad: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the sums of the first state.

    Args:
        work: Sizes.
        saved: Of the forward pass.
        grad: Of the sums (B, H, n, P + 1).
        grad_state: Of the sums of the last state (B, K, F, P + 1).
    """
    q, k, v, mask, tops = saved.q, saved.k, saved.v, saved.mask, saved.tops
    # keys that no query and no state has seen have none
    of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    rooms = _Rooms(work, grad.device, gradients=True)
    places = {"mask": mask, "states": rooms.states, "scales": rooms.scales, "pairs": rooms.pairs}
    inputs = {"q": q, "k": k, "v": v, "levels": rooms.levels, **places}
    for (first, chunks), state in zip(reversed(work.stretches()), reversed(saved.states), strict=True):
        stretch = _Stretch(work, grad.device, first, chunks)
        _fold(stretch, rooms, k, v, mask, state)
        stretch.over_chunks("grad_queries", work.heads, None, **inputs, g=grad, tops=tops, grad_q=of_q)
        earlier = torch.empty_like(grad_state)
        # nobody reads the states themselves any more: those of gradients take their room
        fields = {"sums": grad_state, "scales": rooms.scales, "states": rooms.states, "new_sums": earlier}
        stretch.scan("unfold", q=q, g=grad, tops=tops, **fields)
        grad_state = earlier
        stretch.over_chunks("grad_keys", work.key_heads, "features", **inputs, grad_k=of_k)
        stretch.over_chunks("grad_values", work.key_heads, "width", k=k, g=grad, **places, grad_v=of_v)
    return of_q, of_k, of_v, grad_state


class _LinearSums(torch.autograd.Function):
    """Sums, tops and the last state; what is relative to what has no gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        q, k, v, sums, mask, log_scale, carry, work, keep = inputs
        found, tops, last, states = _forward(work, q, k, v, mask, State(sums, log_scale, carry), keep=keep)
        ctx.work = work
        ctx.set_materialize_grads(False)
        if keep:
            ctx.save_for_backward(q, k, v, mask, tops, *(x for state in states for x in state[:2]))
        ctx.mark_non_differentiable(*(x for x in (tops, last.log_scale, last.carry) if x is not None))
        return found, tops, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear attention by triton is differentiable once; call backward or torch.autograd.grad without "
                "create_graph=True, or take backend='torch'"
            )
        q, k, v, mask, tops, *fields = ctx.saved_tensors  # may be read once: checkpointing counts
        states = [State(sums, scale, None) for sums, scale in zip(fields[::2], fields[1::2], strict=True)]
        of_sums, _, of_state, *_ = grads
        if of_sums is None:
            of_sums = q.new_zeros(*q.shape[:3], v.shape[3] + 1, dtype=torch.float32)
        of_state = torch.zeros_like(states[0].sums) if of_state is None else of_state
        saved = _Saved(q, k, v, mask, tops, states)
        found = _backward(ctx.work, saved, of_sums.contiguous(), of_state.contiguous())
        return *found, *(None,) * 5


def linear_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: State, work: Work
) -> tuple[Tensor, Tensor | None, State]:
    """Sums of [v, 1] over keys at least `work.delay` columns before each query.

    Args:
        q: Features of queries (B, H, n, F), or their logarithms; float32, float16 or bfloat16, as k and v.
        k: Features of keys (B, K, N, F).
        v: Values (B, K, N, P).
        mask: True for the keys that exist (B, N); None: all.
        state: Before the first column; float32 sums.
        work: `Work.of` these.

    Returns:
        Sums (B, H, n, P + 1) in float32, relative to exp of what comes second (B, H, n; None for plain features), and
        the state of the first N - max(0, delay - 1) columns. Differentiable once, in q, k, v and sums of the state.
    """
    tensors = [x.contiguous() for x in (q, k, v, state.sums)]
    bits = None if mask is None else mask.view(torch.uint8)
    rest = [None if x is None else x.contiguous() for x in (bits, state.log_scale, state.carry)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    sums, tops, *fields = _LinearSums.apply(*tensors, *rest, work, keep)
    return sums, tops, State(*fields)


# numerical self-check


def _by_pairs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, work: Work) -> Tensor:
    """Normalised outputs (B, H, n, P), pair by pair."""
    groups = work.heads // work.key_heads
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    column = torch.arange(work.keys)
    visible = column <= (column[work.keys - work.queries :] - work.delay).unsqueeze(1)
    visible = visible & mask[:, None, None, :]
    if work.log:
        logits = (q.unsqueeze(3) + k.unsqueeze(2)).logsumexp(-1).masked_fill(~visible, -math.inf)
        logits = logits - logits.detach().amax(-1, keepdim=True).clamp(min=_NOTHING)
        weights = logits.exp()
    else:
        weights = (q @ k.mT).masked_fill(~visible, 0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / torch.where(total == 0, 1, total)


def self_check(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device, *, log: bool) -> float:
    """Largest relative root mean square error of outputs and gradients of a small attention.

    Args:
        dtypes: Of q, k and v.
        device: Where to run it.
        log: Which form.

    Returns:
        The error relative to float64 sums over pairs, computed on the CPU from the same rounded inputs. Outputs are
        those in float32, gradients are rounded to the dtypes.
    """
    # whatever holds around the first call: no gradients, inference, another default device
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        random = torch.Generator().manual_seed(0)
        shapes = (1, 2, 70, 37), (1, 1, 74, 37), (1, 1, 74, 19)
        q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
        if not log:
            q, k = q.softmax(-1), k.softmax(-1)
        inputs = [x.to(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
        mask = torch.rand(1, 74, generator=random) > 0.1
        direction = torch.randn(1, 2, 70, 19, generator=random)
        work = Work.of(q, k, v, delay=3, log=log, chunk=_MOST_CHUNK[log])

        q, k, v = exact = [x.double().requires_grad_() for x in inputs]
        y = _by_pairs(q, k, v, mask, work)
        expected = [y, *torch.autograd.grad((y * direction).sum(), exact)]

        q, k, v = there = [x.to(device).requires_grad_() for x in inputs]
        blank = torch.zeros(1, 1, 37, 20, dtype=torch.float32, device=device)
        state = State(blank, torch.full_like(blank[..., 0], _NOTHING) if log else None, None)
        sums, _, _ = linear_sums(q, k, v, mask.to(device), state, work)
        total = sums[..., -1:]
        y = sums[..., :-1] / torch.where(total == 0, 1, total)
        found = [y, *torch.autograd.grad((y * direction.to(device)).sum(), there)]
        errors = [(a.detach().cpu().double() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
        return torch.stack(errors).max().item()  # a NaN is the maximum


_TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@lru_cache(maxsize=64)
def _unsound(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device, log: bool, precision: str
) -> str | None:
    """Why kernels cannot be trusted on a device, None where they pass."""
    allowed = max(_TOLERANCES[dtype] for dtype in dtypes)
    if precision == "tf32":
        allowed = max(allowed, _TOLERANCES[torch.float16])  # as many bits
    names = ", ".join(str(dtype) for dtype in dtypes)
    try:
        error = self_check(dtypes, device, log=log)
    except Exception as failure:  # noqa: BLE001  whatever a compiler or a driver raises, it cannot be used here
        return f"its self-check in {names} on {device} failed with {type(failure).__name__}: {failure}"
    if error <= allowed:
        return None
    return (
        f"its self-check in {names} on {device} is off by {error:.1e} (relative RMS), where {allowed:.0e} is allowed"
    )


def refusal(q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, *, log: bool) -> str | None:
    """Why these operands and the sums of a state cannot be served, as the end of a sentence; None if they can.

    The first question about a device, dtypes, a form and a precision compiles kernels and compares a small attention
    with its float64 value, gradients included.
    """
    dtypes = q.dtype, k.dtype, v.dtype
    if any(dtype not in _DTYPES for dtype in dtypes):
        return f"it computes float32, float16 and bfloat16, not {', '.join(str(dtype) for dtype in dtypes)}"
    if sums is not None and sums.dtype != torch.float32:
        return f"its states are float32, but the given one is {sums.dtype}"
    devices = {x.device for x in (q, k, v, sums) if x is not None}
    if len(devices) > 1:
        return f"its tensors must lie on one device, but lie on {', '.join(sorted(map(str, devices)))}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return f"there is nothing to compute for q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not q.is_cuda and not _interpreted():
        return f"its kernels run on CUDA devices, not on {q.device} (but for TRITON_INTERPRET=1, set at the start)"
    return _unsound(dtypes, q.device, log, _precision())


__all__ = ["State", "Work", "linear_sums", "refusal", "self_check"]
