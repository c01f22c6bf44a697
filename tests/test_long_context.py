"""Long inputs: streaming in chunks, frozen filters, caches of partial filters, projections without transposition.

Run: python -m pytest tests/test_long_context.py -q
"""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hyena_hf.mixers import HyenaMixer
from hyena_hf.mixers.projections import is_plain, project_down, project_up
from hyena_hf.ops import BACKENDS, use_backend
from tests.models import FULL, HYENA, model_of, new_model, tokens


every_model = pytest.mark.parametrize("name", ["order 2", "order 3", "heads", "hybrid", "sliding", "partial"])


def assert_close(a, b, dtype):
    """Within the bounds of tests/test_cache.py."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())))


# streaming


@every_model
@pytest.mark.parametrize("chunk_length", [1, 37, 64, 1000])
def test_chunks_of_a_stream_give_the_logits_of_the_whole_input(name, chunk_length):
    model, ids = model_of(name), tokens(2, 130)
    ids = ids if chunk_length > 1 else ids[:, :20]
    whole = model(ids, use_cache=False).logits
    outputs = list(model.stream(ids, chunk_length=chunk_length))
    assert [output.logits.shape[1] for output in outputs[:-1]] == [chunk_length] * (len(outputs) - 1)
    assert_close(torch.cat([output.logits for output in outputs], dim=1), whole, torch.float64)


def test_a_stream_in_float32_stays_within_1e_5_of_the_whole_input():
    model, ids = model_of("order 2", torch.float32), tokens(1, 1500)
    whole = model(ids, use_cache=False).logits
    streamed = torch.cat([output.logits for output in model.stream(ids, chunk_length=256)], dim=1)
    assert_close(streamed, whole, torch.float32)


def test_a_stream_takes_masks_and_positions_to_keep():
    model, ids = model_of("hybrid"), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    outputs = list(model.stream(ids, chunk_length=20, attention_mask=mask, logits_to_keep=1))
    assert all(output.logits.shape[1] == 1 for output in outputs)
    alone = model(ids[:1, 25:], use_cache=False).logits
    assert_close(outputs[2].logits[0], alone[0, -1:], torch.float64)


def test_a_stream_has_no_gradients_and_refuses_chunks_of_no_token():
    model = new_model()
    assert not next(model.stream(tokens(1, 9), chunk_length=4)).logits.requires_grad
    with pytest.raises(ValueError, match=r"chunk_length \(0\) must be a whole number, at least 1"):
        model.stream(tokens(1, 9), chunk_length=0)
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of input_ids, \(1, 9\), got \(1, 12\)"):
        model.stream(tokens(1, 9), attention_mask=torch.ones(1, 12))


# frozen filters


class Counter:
    """Counts evaluations of the filters of a model."""

    def __init__(self, model):
        self.count = 0
        for mixer in model.modules():
            if isinstance(mixer, HyenaMixer):
                mixer.filter.exact_taps = self.counting(mixer.filter.exact_taps)

    def counting(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frozen_filters_change_no_output_and_are_evaluated_once(name, dtype):
    model, ids = new_model(name, dtype), tokens(2, 300)
    batches = [ids, ids[:, :50], ids]
    expected = [model(batch, use_cache=False).logits for batch in batches]
    counter = Counter(model)
    with torch.no_grad(), model.frozen_filters():
        for batch, logits in zip(batches, expected, strict=True):
            assert_close(model(batch, use_cache=False).logits, logits, dtype)
        layers = sum(layer == HYENA for layer in model.config.layer_types)
        assert counter.count == layers
    model(ids, use_cache=False)
    assert counter.count == 2 * layers


def test_frozen_filters_serve_generation_after_inference_mode_and_end_with_the_block():
    model, ids = new_model(), tokens(1, 20)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    counter = Counter(model)
    with model.frozen_filters():
        with torch.inference_mode():
            model(ids, use_cache=False)
        for _ in range(2):
            assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert counter.count <= 2 * model.config.num_hidden_layers  # once, and once more when the generation got longer
    mixer = model.model.layers[0].mixer
    assert mixer.in_proj.weight.grad is not None
    assert mixer.skip.grad is None
    assert mixer.frozen is None


def test_changed_filters_count_again_once_they_are_no_longer_frozen():
    model, ids = new_model(), tokens(1, 20)
    with torch.no_grad(), model.frozen_filters():
        before = model(ids, use_cache=False).logits
        for layer in model.model.layers:
            layer.mixer.filter.output.weight.data.mul_(2)
        assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not torch.allclose(model(ids, use_cache=False).logits, before)


def test_frozen_filters_are_the_same_in_every_training_step():
    model, ids = new_model(), tokens(2, 300)
    losses = []
    with model.frozen_filters():
        for _ in range(3):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        (model(ids, labels=ids, use_cache=False).loss + model(ids, labels=ids, use_cache=False).loss).backward()
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("copy", ["deepcopy", "pickle"])
def test_copies_of_a_frozen_model_are_not_frozen(copy):
    model, ids = new_model(), tokens(1, 300)
    with model.frozen_filters():
        expected = model(ids, use_cache=False).logits
        other = deepcopy(model) if copy == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        other.model.layers[0].mixer.skip.mul_(3)
    assert not torch.allclose(other(ids, use_cache=False).logits, expected)
    other(ids, labels=ids, use_cache=False).loss.backward()
    assert other.model.layers[0].mixer.filter.output.weight.grad is not None


def test_an_evaluation_that_fails_leaves_the_taps_as_they_were(monkeypatch):
    model, ids = new_model(), tokens(1, 300)
    expected = model(ids, use_cache=False).logits
    long_filter = model.model.layers[0].mixer.filter
    with torch.no_grad(), model.frozen_filters():
        model(ids[:, :10], use_cache=False)
        with monkeypatch.context() as patch:
            patch.setattr(long_filter, "taps", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, use_cache=False)
        assert_close(model(ids, use_cache=False).logits, expected, torch.float32)


def test_frozen_filters_go_with_any_backend():
    model, ids = new_model(), tokens(1, 300)
    expected = model(ids, use_cache=False).logits
    for backend in ("matrix", "torch", "blocked"):
        with torch.no_grad(), model.frozen_filters(), use_backend(backend):
            assert_close(model(ids, use_cache=False).logits, expected, torch.float32)


def test_gradients_reach_the_past_and_the_skip_through_a_cache():
    model, ids = new_model(num_hidden_layers=1).requires_grad_(False), tokens(1, 30)
    model.model.layers[0].mixer.skip.requires_grad_()
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    assert model(ids[:, 12:], past_key_values=cache).logits.requires_grad


def test_rows_without_a_token_may_hold_what_is_no_number():
    model, mask = new_model(), torch.ones(3, 12, dtype=torch.long)
    embeddings = torch.randn(3, 12, 32)
    expected = model(inputs_embeds=embeddings, use_cache=False).logits
    mask[1], embeddings[1] = 0, float("nan")
    for use_cache in (True, False):
        logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=use_cache).logits
        assert_close(logits[[0, 2]], expected[[0, 2]], torch.float32)


def test_the_memory_of_spectra_is_bounded_whatever_lengths_come():
    model = new_model()
    with torch.no_grad(), model.frozen_filters():
        for length in range(280, 300):
            model(tokens(1, length), use_cache=False)
        taps = model.model.layers[0].mixer.frozen.taps
        assert [length for length, _ in taps.spectra[0]] == list(range(292, 300))
        assert taps.nbytes() < 20 * taps.h.nbytes


# partial filters


def test_the_cache_of_a_partial_filter_holds_only_what_its_taps_reach():
    model, ids = model_of("partial"), tokens(2, 200)
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :150], past_key_values=cache).logits]
    parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(150, 200)]
    assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, torch.float64)
    long = cache.layers[0].histories[1]
    assert long.buffer.shape[-1] == model.config.filter_length - 1
    assert cache.layers[0].taps.reversed.shape[-1] <= model.config.filter_length + 4


def test_a_partial_filter_of_one_tap_remembers_nothing():
    model, ids = new_model("partial", torch.float64, filter_length=1), tokens(2, 30)
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, t : t + 10], past_key_values=cache).logits for t in (0, 10, 20)]
    assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, torch.float64)


# projections


def test_projections_in_another_layout_are_the_linear_layer():
    linear, x = nn.Linear(6, 9), torch.randn(2, 5, 6)
    for layer in (linear, nn.Linear(6, 9, bias=False)):
        down = project_down(layer, x)
        assert down.is_contiguous()
        torch.testing.assert_close(down.transpose(1, 2), layer(x))
        torch.testing.assert_close(project_up(layer, x.transpose(1, 2).contiguous()), layer(x))


@pytest.mark.parametrize("case", ["hook", "subclass", "own forward", "bfloat16", "autocast", "no parameter"])
def test_a_layer_that_does_more_than_a_product_is_called(case):
    linear, x = nn.Linear(6, 9), torch.randn(2, 5, 6)
    assert is_plain(linear, x)
    if case == "hook":
        linear.register_forward_hook(lambda *_: None)
    elif case == "subclass":
        linear = type("Adapter", (nn.Linear,), {})(6, 9)
    elif case == "own forward":
        linear.forward = linear.forward
    elif case == "bfloat16":
        x = x.bfloat16()
    elif case == "no parameter":
        weight = linear.weight.detach()
        del linear.weight
        linear.weight = weight
    with torch.autocast("cpu", enabled=case == "autocast"):
        assert not is_plain(linear, x)


def test_hooks_on_projections_see_every_call_and_change_no_output():
    model, ids = model_of("order 2", torch.float32), tokens(2, 60)
    expected, seen = model(ids, use_cache=False).logits, []
    handles = [
        layer.mixer.in_proj.register_forward_hook(lambda *args: seen.append(args[2].shape))
        for layer in model.model.layers
    ]
    assert_close(model(ids, use_cache=False).logits, expected, torch.float32)
    assert seen == [(2, 60, 96)] * 3
    for handle in handles:
        handle.remove()


# backends under a whole model


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name not in ("overlap_save", "triton", "flashfftconv")]
)
@pytest.mark.parametrize("name", ["order 2", "order 3", "heads"])
def test_a_model_gives_the_same_logits_and_gradients_by_every_backend(backend, name):
    model, ids = new_model(name, torch.float64), tokens(2, 70)

    def run():
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output.logits.detach(), model.model.layers[0].mixer.filter.output.weight.grad.clone()

    expected = run()
    with use_backend(backend):
        found = run()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, torch.float64)


def test_training_in_float32_gives_the_gradients_of_float64_in_padded_and_packed_batches():
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :11] = 0
    mask[2, 30:] = 0
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = new_model("hybrid", dtype, layer_types=[HYENA, FULL, HYENA])
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append({key: p.grad.double() for key, p in model.named_parameters() if p.grad is not None})
    for key, exact in grads[1].items():
        assert (grads[0][key] - exact).norm() <= 1e-4 * exact.norm() + 1e-9, key
