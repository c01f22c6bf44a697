# SPDX-License-Identifier: Apache-2.0
"""What the published implementations import and a machine without their GPU kernels lacks, written out.

`install` registers modules named flash_attn, and replacements of vortex's kernel packages, in the running process:
exact causal softmax attention, rotary embedding over halves and the fused RMSNorm, after the documented behaviour of
those packages. Nothing of the references is copied. Only the process that runs a reference imports this file.
"""

import contextlib
import math
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x (B, L, H, P) turned by the angles of their positions; cos, sin (L, P / 2), halves not interleaved."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[1], None].to(x.dtype), sin[: x.shape[1], None].to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention of query (B, L, H, P) to key and value (B, L, H / groups, P): (B, L, H, P)."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    scores = torch.einsum("blhp,bshp->bhls", query, key) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhls,bshp->blhp", scores.masked_fill(later, -math.inf).softmax(dim=-1), value)


class RotaryEmbedding(nn.Module):
    """The attributes of flash_attn's class that the references read; angles in float32 at least.

    flash_attn computes the frequencies again where the buffer was cast to a lower type than float32, so here too.
    """

    def __init__(
        self, dim, base=10000.0, interleaved=False, scale_base=None, pos_idx_in_fp32=True, device=None
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base, self.scale, self.pos_idx_in_fp32 = scale_base, None, pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Any = None
        self._sin_cached: Any = None

    def _compute_inv_freq(self, device=None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponents

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype: torch.dtype = torch.float32) -> None:
        exact, stored = torch.promote_types(dtype, torch.float32), self.get_buffer("inv_freq")
        known = stored.dtype in (torch.float32, torch.float64)
        frequencies = stored if known else self._compute_inv_freq(device)
        angles = torch.outer(torch.arange(seqlen, dtype=exact), frequencies.to(exact))
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        self._update_cos_sin_cache(x.shape[1], device=x.device, dtype=x.dtype)
        return turned(x, self._cos_cached, self._sin_cached)


class MHA(nn.Module):
    """flash_attn's attention layer as the references call it: rows [queries, keys, values], heads grouped if asked."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_heads_kv,
        rotary_emb_dim,
        rotary_emb_base,
        qkv_proj_bias,
        out_proj_bias,
        causal,
        layer_idx,
        use_flash_attn,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError(f"layer {layer_idx} asks for causal={causal}; the references are causal")
        del use_flash_attn  # the same function either way
        self.num_heads, self.num_heads_kv, self.head_dim = num_heads, num_heads_kv, embed_dim // num_heads
        self.cross_attn = False
        width = (num_heads + 2 * num_heads_kv) * self.head_dim
        self.rotary_emb = RotaryEmbedding(rotary_emb_dim, base=rotary_emb_base)
        self.Wqkv = nn.Linear(embed_dim, width, bias=qkv_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)

    def forward(self, x: Tensor, inference_params=None) -> Tensor:
        if inference_params is not None:
            raise ValueError("this stand-in has no cache; run the reference without inference_params")
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        query, key, value = self.Wqkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        return self.out_proj(attended(self.rotary_emb(query), self.rotary_emb(key), value).flatten(2))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """flash_attn's fused RMSNorm: epsilon is added to the mean square, inside the root."""
    return x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight


def apply_rotary(
    x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, conjugate=False
) -> Tensor:
    """vortex's Triton kernel: turns x (B, L, H, P), in place if asked."""
    if seqlen_offsets or cu_seqlens is not None or max_seqlen is not None or interleaved or conjugate:
        raise ValueError("this stand-in turns whole rows from position 0, halves not interleaved")
    result = turned(x, cos, sin)
    return x.copy_(result) if inplace else result


def _module(name: str, **contents) -> None:
    """Register a module; it counts as a package, so that modules below it import too."""
    module = types.ModuleType(name)
    module.__dict__.update(contents, __path__=[])
    sys.modules[name] = module


def install() -> None:
    """Make the references importable here. Their own code then runs unchanged on the CPU."""
    _module("flash_attn")
    _module("flash_attn.modules")
    _module("flash_attn.modules.mha", MHA=MHA)
    _module("flash_attn.layers")
    _module("flash_attn.layers.rotary", RotaryEmbedding=RotaryEmbedding)
    _module("flash_attn.ops")
    _module("flash_attn.ops.rms_norm", rms_norm=rms_norm)
    _module("vortex.ops")  # without flash-attention's functions: use_flash_attn must be False
    _module("vortex.ops.embedding")
    _module("vortex.ops.embedding.rotary", apply_rotary=apply_rotary)
    torch.cuda.device = lambda device: contextlib.nullcontext()  # noqa: ARG005 (vortex names the device everywhere)


class InFloat64:
    """torch with its lower floating types renamed to the highest: the references' casts then change nothing."""

    float32 = bfloat16 = float16 = torch.float64
    complex64 = torch.complex128

    def __getattr__(self, name: str):
        return getattr(torch, name)
