# SPDX-License-Identifier: Apache-2.0
"""The stand-ins of flash_attn compute what torch and transformers compute: parity rests on them."""

import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.parity.stand_ins import RotaryEmbedding, apply_rotary, attended, rms_norm


def test_attention_with_grouped_heads_is_torch_s():
    query, key, value = (torch.randn(2, 9, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    wanted = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(attended(query, key, value), wanted.transpose(1, 2), rtol=0, atol=1e-14)


def test_rotary_embedding_is_that_of_transformers():
    x = torch.randn(2, 9, 4, 6, dtype=torch.float64)
    rotary = RotaryEmbedding(6, base=500.0)
    angles = torch.arange(9.0, dtype=torch.float64)[:, None] * rotary.get_buffer("inv_freq")
    cos, sin = torch.cat([angles, angles], -1).cos()[None], torch.cat([angles, angles], -1).sin()[None]
    wanted, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotary(x), wanted.transpose(1, 2), rtol=0, atol=1e-14)


def test_rotation_in_place_changes_the_given_heads():
    x = torch.randn(2, 9, 4, 6)
    angles = torch.randn(9, 3)
    wanted = apply_rotary(x, angles.cos(), angles.sin())
    assert torch.equal(apply_rotary(x, angles.cos(), angles.sin(), inplace=True), wanted)
    assert torch.equal(x, wanted)


def test_fused_norm_adds_epsilon_inside_the_root():
    x, weight = 1e-2 * torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3), rtol=0, atol=1e-14)
