# SPDX-License-Identifier: Apache-2.0
"""Layers of linear attention in a Hyena model: constant memory, positions of their own, limits."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models import HEDGEHOG, model_of, new_model, tokens


LINEAR = ["hedgehog", "hedgehog window", "cosformer", "performer", "taylor"]
every_map = pytest.mark.parametrize("name", LINEAR)


def feed(model, ids, mask, sizes, past):
    outputs, end = [], 0
    for size in sizes:
        start, end = end, end + size
        given = None if mask is None else mask[:, :end]
        outputs.append(model(ids[:, start:end], attention_mask=given, past_key_values=past).logits)
    return torch.cat(outputs, dim=1)


@every_map
@pytest.mark.parametrize("sizes", [[1] * 30, [7, 1, 22], [29, 1]], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_left_padded_rows_fed_in_pieces_equal_each_alone(name, sizes, static):
    model, ids = model_of(name), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    past = StaticCache(config=model.config, max_cache_len=33) if static else DynamicCache(config=model.config)
    logits = feed(model, ids, mask, sizes, past)
    for row, start in ((0, 0), (1, 11)):
        alone = model(ids[row : row + 1, start:], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, start:], alone, rtol=0, atol=1e-10)


@every_map
def test_a_cache_does_not_grow(name):
    model = new_model(name, layer_types=[HEDGEHOG] * 3)
    sizes = []
    for length in (20, 200):
        past = DynamicCache(config=model.config)
        model(tokens(2, length), past_key_values=past)
        model(tokens(2, 1), past_key_values=past)
        sizes.append(sum(layer.nbytes() for layer in past.layers))
    assert sizes[0] == sizes[1] > 0


def test_a_copy_of_a_cache_goes_on_by_itself_without_a_copy_of_the_model():
    model, ids = model_of("hedgehog window"), tokens(1, 30)
    past = DynamicCache(config=model.config)
    feed(model, ids, None, [20], past)
    copied = copy.deepcopy(past)
    assert copied.layers[0].histories[0].held.operator is model.model.layers[0].mixer.attention
    first = feed(model, ids[:, 20:], None, [10], past)
    torch.testing.assert_close(feed(model, ids[:, 20:], None, [10], copied), first, rtol=0, atol=0)


@every_map
def test_what_was_fed_while_recording_can_be_taken_back(name):
    model, ids = new_model(name, layer_types=[HEDGEHOG] * 3), tokens(2, 40)
    past = DynamicCache(config=model.config)
    for layer in past.layers:
        layer.activate_past_recording()
    with torch.no_grad():
        feed(model, ids[:, :20], None, [13, 7], past)
        past.crop(-4)
        logits = model(ids[:, 16:], past_key_values=past).logits
        whole = model(ids, use_cache=False).logits[:, 16:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


def test_the_cosformer_refuses_distances_that_it_would_weigh_negatively():
    model = model_of("cosformer")
    with pytest.raises(ValueError, match=r"a sequence of 257 tokens exceeds.*cosformer"):
        model(tokens(1, 257))
    past = DynamicCache(config=model.config)
    model(tokens(1, 256), past_key_values=past)
    with pytest.raises(ValueError, match="cosformer"):
        model(tokens(1, 1), past_key_values=past)


@every_map
def test_gradients_through_a_cache_equal_those_of_the_whole(name):
    model, ids = copy.deepcopy(model_of(name)).requires_grad_(), tokens(2, 24)
    direction = torch.randn(2, 24, 97, dtype=torch.float64)
    gradients = []
    for past, sizes in ((None, None), (DynamicCache(config=model.config), [9, 1, 14])):
        model.zero_grad()
        logits = model(ids, use_cache=False).logits if sizes is None else feed(model, ids, None, sizes, past)
        (logits * direction).sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=1e-10 * scale, msg=key)
