# SPDX-License-Identifier: Apache-2.0
"""Filters that are sums of decaying exponentials, and the recurrences that compute their convolutions.

In modal form a filter is h_0 = direct, h_t = Re sum_n R_n p_n^(t-1), with poles p_n and residues R_n (Massaroli et al.
2023, arXiv 2310.18780, section 3). One pole of a conjugate pair stands for both. The convolution y = h * w is then

    y_t = direct w_t + Re sum_n R_n s_{n,t},      s_{n,t+1} = p_n s_{n,t} + w_t

All arithmetic is real, and there is one pole for everything: the canonical one, exp(log_radius) e^(i angle) with real
and imaginary part rounded to float32. A step multiplies by exactly that number and all that looks further takes its
float64 powers, so the parallel form and the steps are the same filter. (Powers of the unrounded pole differ from
float32 steps by 7e-4 after 131,072 steps, those of the canonical pole by 8e-6: they share no rounding of the pole.)

A state is d real numbers a channel, in two halves of equal length. Numbers f and f + d/2 hold either one complex mode,
as the real and imaginary part of (1 + i) s_n, or two real modes. Scaled like that, every number takes the input with
weight 1, and with P_f the pole behind number f, sigma_f = -1 in the first half and +1 in the second, x~ = x with its
halves exchanged, and powers P^m:

    m steps without input     x <- Re P^m x + sigma Im P^m x~
    an input m steps ago      Re P^m + sigma Im P^m
    an output                 c x, c = Re and -Im of R (1 - i) / 2 for a complex mode, R for a real one

H filters, N poles of each, d state numbers, B batch, C = H P channels, n new tokens, L length. A state is (B, d, C).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


# Log-radius of a slot without a pole, whatever its residue. Unlike -inf it can be averaged.
NO_POLE = -1e4

# A pole of this modulus takes a million steps to fall to 1 / e, and rounding cannot take it out of the unit disc.
MAX_LOG_RADIUS = -1e-6

# The float32 nearest to pi: the angle of a negative real pole.
PI = 3.1415927410125732

# Lags in a row of the matrix product that makes taps at most, and taps evaluated at once.
_BLOCK = 256
_NUMBERS = 2**22

# Inputs or outputs of a matrix product with powers of the poles, and of the powers that join such products: tables of
# powers stay small, because their exponentials and sines in float64 cost more than all that is done with them.
_FINE, _COARSE = 16, 16

# Inputs that are taken into states at once: beyond, their sums would take as much memory as the inputs themselves.
_AT_ONCE = 2**20


def _exact(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def pole_parts(log_radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the canonical poles, in float64 but with float32 values.

    Rounding is straight-through: gradients are those of the pole before it.

    Args:
        log_radius: Logarithm of the modulus, any shape; `NO_POLE` gives pole 0.
        angle: In radians, same shape. Exactly 0 and exactly +-`PI` mean a real pole.
    """
    dtype = _exact(log_radius.device)
    radius, turn = torch.exp(log_radius.to(dtype)), angle.to(dtype)
    real = turn.abs() == PI
    exact = radius * torch.where(real, -1.0, torch.cos(turn)), radius * torch.where(real, 0.0, torch.sin(turn))
    re, im = (part + (part.to(torch.float32).to(dtype) - part).detach() for part in exact)
    return re, im


def canonical_poles(log_radius: Tensor, angle: Tensor) -> Tensor:
    """The poles of `pole_parts` as complex numbers."""
    return torch.complex(*pole_parts(log_radius, angle))


def _powers(re: Tensor, im: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of p^m for poles (...) and exponents (..., m >= 0) that broadcast."""
    nothing = (re == 0) & (im == 0)  # has no logarithm; behind its first power this is as good as 0
    re = torch.where(nothing, 1e-30, re)
    logarithm, angle = torch.log(torch.hypot(re, im)), torch.atan2(im, re)
    size = torch.exp(logarithm * exponents)
    return size * torch.cos(angle * exponents), size * torch.sin(angle * exponents)


def _residues(residue: Tensor, log_radius: Tensor) -> Tensor:
    """In float64, 0 for unused slots: pole 0 would be a tap at lag 1."""
    return torch.where(log_radius > NO_POLE, residue, 0).to(_exact(residue.device))


def impulse_response(
    log_radius: Tensor, angle: Tensor, residue_re: Tensor, residue_im: Tensor, direct: Tensor, length: int
) -> Tensor:
    """Taps of filters in modal form.

    Lag 1 + M i + j is a product of R p^(M i) and p^j: a matrix product with inner dimension 2 N, and no tensor of N L
    numbers. M is 256, or about the root of a shorter length.

    Args:
        log_radius, angle, residue_re, residue_im: (H, N).
        direct: Tap at lag 0, (H,).
        length: L.

    Returns:
        (H, L), dtype of `direct`, computed in float64.
    """
    re, im = (part.unsqueeze(-1) for part in pole_parts(log_radius, angle))
    dtype, device = re.dtype, re.device
    r, i = (_residues(x, log_radius).unsqueeze(-1) for x in (residue_re, residue_im))
    fixed = isinstance(length, int) and not torch.compiler.is_compiling()
    width = min(_BLOCK, 1 << (max(length, 2).bit_length() // 2)) if fixed else _BLOCK
    fine = torch.cat(_powers(re, im, torch.arange(width, device=device, dtype=dtype)), dim=1)  # (H, 2 N, M)
    rows = (length + width - 1) // width
    at_once = max(1, _NUMBERS // (width * max(len(direct), 1))) if fixed else rows
    blocks = []
    for start in range(0, rows, at_once) if isinstance(length, int) else (0,):
        stop = min(start + at_once, rows) if isinstance(length, int) else rows
        coarse = torch.arange(start, stop, device=device, dtype=dtype) * width
        a, b = _powers(re, im, coarse)
        coarse = torch.cat([r * a - i * b, -(r * b + i * a)], dim=1)  # (H, 2 N, rows)
        blocks.append((coarse.mT @ fine).to(direct.dtype).flatten(1))
    tail = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    # one lag later; a slice of length - 1 would make an exported graph refuse lengths below 3
    shifted = torch.nn.functional.pad(tail, (1, 0))[:, :length]
    return torch.where(torch.arange(length, device=device) == 0, direct.unsqueeze(-1), shifted)


@dataclass
class ModalSystem:
    """Filters packed for states of d real numbers, see the top of this file.

    Attributes:
        re, im: Real and imaginary part of the pole behind each number, (d, H), float64.
        readout: Weight of each number in the output, (d, H), float64.
        sign: -1 in the first half, 1 in the second, (d, 1), float64.
        tables: Powers that were asked for before, without gradients.
    """

    re: Tensor
    im: Tensor
    readout: Tensor
    sign: Tensor
    tables: dict[Any, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Real numbers of a state."""
        return self.re.shape[0]

    def powers(self, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Re P^m and sigma Im P^m for exponents (M,): (d, H, M)."""
        re, im = _powers(self.re.unsqueeze(-1), self.im.unsqueeze(-1), exponents.to(self.re.dtype))
        return re, self.sign.unsqueeze(-1) * im

    def inputs(self, length: int) -> Tensor:
        """What an input contributes length - 1, ..., 0 steps later, (d, H, length)."""
        re, im = self.powers(torch.arange(length, device=self.re.device).flip(0))
        return re + im

    def outputs(self, length: int) -> Tensor:
        """Weights of a state in the outputs 0, ..., length - 1 steps later, (d, H, length)."""
        re, im = self.powers(torch.arange(length, device=self.re.device))
        c = self.readout.unsqueeze(-1)
        return c * re - _exchanged(c) * im

    def fine_inputs(self, dtype: torch.dtype) -> Tensor:
        """`inputs` of 16, (H, 16, d)."""
        return self._kept(("inputs", dtype), lambda: self.inputs(_FINE).to(dtype).permute(1, 2, 0).contiguous())

    def fine_outputs(self, dtype: torch.dtype) -> Tensor:
        """`outputs` of 16, (H, d, 16)."""
        return self._kept(("outputs", dtype), lambda: self.outputs(_FINE).to(dtype).transpose(0, 1).contiguous())

    def strides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Powers of 0, 16, ..., 240 steps, (H, 1, 16, d) as `_turned_rows` takes them."""

        def make() -> tuple[Tensor, ...]:
            powers = self.powers(_FINE * torch.arange(_COARSE, device=self.re.device))
            return tuple(x.permute(1, 2, 0).unsqueeze(1).to(dtype).contiguous() for x in powers)

        return self._kept(("strides", dtype), make)

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]


def _exchanged(x: Tensor, dim: int = 0) -> Tensor:
    """The halves of a dimension in the other order."""
    first, second = x.chunk(2, dim)
    return torch.cat([second, first], dim)


def modal_system(log_radius: Tensor, angle: Tensor, residue_re: Tensor, residue_im: Tensor) -> ModalSystem:
    """Pack filters (H, N) for a recurrence: complex modes first, then real ones in pairs; unused slots take no room.

    The state has as many numbers as the filter with most states needs, rounded up to an even count.
    """
    re, im = pole_parts(log_radius, angle)
    r, i = _residues(residue_re, log_radius), _residues(residue_im, log_radius)
    used = (r != 0) | (i != 0)
    is_complex, is_real = used & (im != 0), used & (im == 0)
    pairs = is_complex.sum(dim=1, keepdim=True)
    half = max(1, -(-int((2 * pairs + is_real.sum(dim=1, keepdim=True)).max()) // 2))

    packed = re.new_zeros(3, len(re), 2 * half)
    place = is_complex.cumsum(dim=1) - 1
    rank = is_real.cumsum(dim=1) - 1
    seat = pairs + rank // 2 + half * (rank % 2)
    for chosen, where, values in (
        (is_complex, place, (re, im, (r + i) / 2)),
        (is_complex, place + half, (re, im, (r - i) / 2)),
        (is_real, seat, (re, im, r)),
    ):
        rows = torch.nonzero(chosen)[:, 0]
        packed[:, rows, where[chosen]] = torch.stack(values)[:, chosen]
    sign = re.new_ones(2 * half, 1)
    sign[:half] = -1
    re, im, readout = packed.mT.contiguous()
    return ModalSystem(re, im, readout, sign)


class ModalStep(NamedTuple):
    """What one step of a recurrence multiplies by, in the dtype of the state.

    Attributes:
        decay: Of each number by itself, (d, C).
        cross: Of each half by the other one, two of (d/2, C); None where all modes are real.
        readout: (d, C).
    """

    decay: Tensor
    cross: tuple[Tensor, Tensor] | None
    readout: Tensor


def modal_step(system: ModalSystem, channels: int, dtype: torch.dtype) -> ModalStep:
    """The coefficients of a step for C channels, C / H of them in a row with each filter."""

    def spread(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(channels // x.shape[1], dim=1).contiguous()

    cross = None
    if bool((system.im != 0).any()):
        first, second = spread(system.sign * system.im).chunk(2)
        cross = first, second
    return ModalStep(spread(system.re), cross, spread(system.readout))


def read_out(state: Tensor, step: ModalStep) -> Tensor:
    """What a state (B, d, C) adds to the next output, (B, C)."""
    return (state * step.readout).sum(dim=1)


def advance_one(state: Tensor, w: Tensor, step: ModalStep) -> Tensor:
    """The state after one input w (B, C)."""
    w = w.unsqueeze(1)
    if step.cross is None:
        return torch.addcmul(w, state, step.decay)
    old, (to_first, to_second) = state.chunk(2, dim=1), step.cross
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        # compilers make copies of the whole of writes into halves, and autograd refuses them
        decay = step.decay.chunk(2)
        first = torch.addcmul(w, old[0], decay[0]) + old[1] * to_first
        second = torch.addcmul(w, old[1], decay[1]) + old[0] * to_second
        return torch.cat([first, second], dim=1)
    following = torch.addcmul(w, state, step.decay)
    new = following.chunk(2, dim=1)
    new[0].addcmul_(old[1], to_first)
    new[1].addcmul_(old[0], to_second)
    return following


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, d, C) -> (H, B C / H, d)."""
    batch, size, channels = x.shape
    return x.view(batch, size, heads, channels // heads).permute(2, 0, 3, 1).reshape(heads, -1, size)


def _turned_rows(x: Tensor, powers: tuple[Tensor, Tensor]) -> Tensor:
    """States in rows (..., d) times powers that broadcast."""
    re, im = powers
    return (x * re).addcmul_(_exchanged(x, -1), im)


def modal_response(state: Tensor, length: int, system: ModalSystem) -> Tensor:
    """What a state (B, d, C) adds to the next outputs, (B, C, length).

    The state is moved on by every multiple of 16 steps, and one matrix product gives the 16 outputs behind each.
    """
    batch, _, channels = state.shape
    heads, block = system.re.shape[1], _FINE * _COARSE
    weights, powers = system.fine_outputs(state.dtype), system.strides(state.dtype)
    blocks = []
    for start in range(0, length, block):
        width = min(block, length - start)
        count = -(-width // _FINE)
        rows = _grouped(state, heads).unsqueeze(2)  # (H, B C / H, 1, d)
        ahead = _turned_rows(rows, (powers[0][:, :, :count], powers[1][:, :, :count])) if count > 1 else rows
        y = (ahead.flatten(1, 2) @ weights).view(heads, batch, -1, count * _FINE)[..., :width]
        blocks.append(y.transpose(0, 1).reshape(batch, channels, width))
        if start + width < length:
            state = decayed(state, torch.tensor([width], device=state.device), system)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


def _turned(state: Tensor, re: Tensor, im: Tensor) -> Tensor:
    """State (B, d, C) times powers (B or 1, d, H)."""
    share = state.shape[2] // re.shape[2]
    if share > 1:
        re, im = re.repeat_interleave(share, dim=2), im.repeat_interleave(share, dim=2)
    return (state * re).addcmul_(_exchanged(state, 1), im)


def decayed(state: Tensor, steps: Tensor, system: ModalSystem) -> Tensor:
    """The state (B, d, C) after steps (B,) or (1,) without input."""
    re, im = (x.permute(2, 0, 1).to(state.dtype) for x in system.powers(steps))
    return _turned(state, re, im)


def advance(state: Tensor | None, w: Tensor, system: ModalSystem) -> Tensor:
    """The state (B, d, C) after inputs w (B, C, n); None for one that has seen nothing.

    In three levels: a matrix product with powers of the poles takes 16 inputs each, products with powers join 16 of
    these, and Horner's scheme the blocks of 256. O(B C d) memory beyond w for each block, O(B C n d) time.
    """
    length, block = w.shape[-1], _FINE * _COARSE
    first = length % block or min(length, block)
    weights, powers = system.fine_inputs(w.dtype), system.strides(w.dtype)
    added = _states_of_blocks(w[..., :first], weights, powers, 1)[0]
    state = added if state is None else decayed(state, torch.tensor([first], device=w.device), system) + added
    if length == first:
        return state
    at_once = max(1, _AT_ONCE // (w.shape[0] * w.shape[1] * block))
    power = system.powers(torch.tensor([block], device=w.device))
    re, im = (x.permute(2, 0, 1).to(w.dtype) for x in power)
    for part in w[..., first:].split(at_once * block, dim=-1):
        for added in _states_of_blocks(part, weights, powers, part.shape[-1] // block):
            state = _turned(state, re, im).add_(added)
    return state


def _states_of_blocks(w: Tensor, weights: Tensor, powers: tuple[Tensor, ...], blocks: int) -> Tensor:
    """What each of some blocks of inputs w (B, C, n) leaves behind its last one, (blocks, B, d, C).

    Args:
        w: Inputs.
        weights: Contributions of 16 inputs to a state, (H, 16, d).
        powers: Those of `ModalSystem.strides`.
        blocks: How many equal parts of w are blocks.
    """
    batch, channels, length = w.shape
    heads, _, size = weights.shape
    width = length // blocks
    w = torch.nn.functional.pad(w, (-width % _FINE, 0)) if width % _FINE else w  # one block only: nothing came before
    rows = w.reshape(batch, heads, -1, _FINE).transpose(0, 1).reshape(heads, -1, _FINE)
    count = -(-width // _FINE)
    states = (rows @ weights).view(heads, -1, count, size)  # (H, B P blocks, count, d)
    if count > 1:
        re, im = (x[:, :, :count].flip(2) for x in powers)  # the last 16 inputs are where they belong
        states = _turned_rows(states, (re, im))
    states = states.sum(dim=2).view(heads, batch, -1, blocks, size)
    return states.permute(3, 1, 4, 0, 2).reshape(blocks, batch, size, channels)


__all__ = [
    "MAX_LOG_RADIUS",
    "NO_POLE",
    "PI",
    "ModalStep",
    "ModalSystem",
    "advance",
    "advance_one",
    "canonical_poles",
    "decayed",
    "impulse_response",
    "modal_response",
    "modal_step",
    "modal_system",
    "pole_parts",
    "read_out",
]
