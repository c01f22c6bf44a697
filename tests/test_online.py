"""Tiles: the long convolution of generated tokens is exact, cheap, chosen where it pays, and needs no prompt."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from hyena_hf.cache import ExactHistory, HeadHistory, ModalState, OnlineTiles, Plan, Taps, online
from tests.models import FULL, HYENA, config_of, model_of, new_model, shrink_tiles, tokens
from tests.oracles import causal_conv


CHANNELS = 6
COUNTS = (1, 2, 31, 32, 33, 127, 1000)
PROMPTS = (1, 127, 128, 300, 1001)

every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Decaying:
    """A filter (1, C, length) that never ends, as a cache asks for it."""

    support = max_length = None

    def __init__(self, dtype, heads=CHANNELS):
        generator = torch.Generator().manual_seed(0)
        decay = torch.exp(-torch.arange(4096) / 700.0)
        self.h = (torch.randn(1, heads, 4096, generator=generator) * decay).to(dtype)
        self.direct = torch.randn(heads, generator=generator).to(dtype)

    def __call__(self, length):
        return self.h[..., :length]

    exact_taps = __call__

    def operator(self):
        """What `push` takes beside the inputs."""
        return Taps(), self, 0, self.direct

    def truth(self, w):
        return causal_conv(w.numpy(), self.h[0].numpy(), self.direct.numpy())


def inputs(rows, length, dtype):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, CHANNELS, length, generator=generator, dtype=torch.float64).to(dtype)


def worst(got, truth):
    """Relative to the largest output."""
    return np.abs(got.double().numpy() - truth).max() / np.abs(truth).max()


def limit(dtype):
    return 1e-13 if dtype == torch.float64 else 1e-6


@pytest.fixture
def eager(monkeypatch):
    """Tiles begin as soon as they can."""
    monkeypatch.setattr(online, "PATIENCE", 0)


@every_dtype
@pytest.mark.parametrize("ends", [False, True], ids=["continued", "ends"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.usefixtures("eager")
def test_generated_tokens_are_those_of_the_whole_convolution(dtype, prompt, ends):
    long_filter = Decaying(dtype)
    for count in COUNTS:
        w = inputs(2, prompt + count, dtype)
        tiles, operator = OnlineTiles(capacity=prompt + count, ends=ends), long_filter.operator()
        pieces = [w[..., :prompt], *w[..., prompt:].split(1, dim=-1)]
        y = torch.cat([tiles.push(piece, None, 0, *operator) for piece in pieces], dim=-1)
        assert worst(y, long_filter.truth(w)) <= limit(dtype), count
        assert tiles.dropped == (ends and prompt + count > online.NEAR)


@every_dtype
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_tiles_are_as_near_to_the_truth_as_a_history(dtype, exact):
    long_filter, w = Decaying(dtype), inputs(1, 3000, dtype)
    truth, errors = long_filter.truth(w), {}
    for kind in (ExactHistory(None, exact=exact), OnlineTiles(capacity=3000, exact=exact)):
        operator = long_filter.operator()
        errors[type(kind)] = worst(
            torch.cat([kind.push(x, None, 0, *operator) for x in w.split(1, dim=-1)], -1), truth
        )
    assert errors[OnlineTiles] <= 2 * errors[ExactHistory]


@every_dtype
@pytest.mark.parametrize("keep", [0, 5, 64], ids="keep {}".format)
def test_rows_of_unequal_counts_rejected_tokens_and_chunks_stay_exact_in_every_row(dtype, keep, monkeypatch):
    shrink_tiles(monkeypatch)
    long_filter, rows = Decaying(dtype), 3
    streams = inputs(rows, 900, dtype)
    truth, operator = long_filter.truth(streams), long_filter.operator()
    tiles, done = OnlineTiles(), [0] * rows
    generator = torch.Generator().manual_seed(keep)
    folded = 0
    for call in range(120):
        size = [1, 1, 1, 1, 2, 5, 20][int(torch.randint(7, (1,), generator=generator))]
        counts = torch.randint(0, size + 1, (rows,), generator=generator) if call % 30 == 29 else None
        w = torch.stack([streams[row, :, done[row] : done[row] + size] for row in range(rows)])
        y = tiles.push(w, counts, keep and max(keep, size), *operator)
        folded += tiles.far is not None
        for row in range(rows):
            real = size if counts is None else int(counts[row])
            got, expected = y[row, :, :real].double().numpy(), truth[row, :, done[row] : done[row] + real]
            assert np.abs(got - expected).max(initial=0) <= limit(dtype) * np.abs(truth).max()
            done[row] += real
        if keep and call % 7 == 6:
            back = 1 if counts is None else counts.clamp(max=1)
            tiles.crop(back)
            done = [at - int(n) for at, n in zip(done, torch.as_tensor(back).expand(rows), strict=True)]
        if call % 40 == 20:
            order = torch.tensor([2, 0, 2])
            tiles.map(lambda x, order=order: x.index_select(0, order))
            streams, truth, done = streams[order], truth[order.numpy()], [done[row] for row in order]
    assert folded > 20


@pytest.mark.usefixtures("eager")
def test_channels_of_a_head_share_its_filter():
    long_filter, w = Decaying(torch.float64, heads=3), inputs(2, 400, torch.float64)
    tiles, operator = OnlineTiles(capacity=400), long_filter.operator()
    y = torch.cat([tiles.push(x, None, 0, *operator) for x in w.split([200, *[1] * 150, 3, *[1] * 47], dim=-1)], -1)
    assert worst(y, long_filter.truth(w)) <= 1e-13
    assert tiles.far is not None


@pytest.mark.usefixtures("eager")
def test_a_longer_generation_than_expected_folds_anew_but_not_without_its_prompt():
    long_filter, w = Decaying(torch.float64), inputs(1, 900, torch.float64)
    tiles, operator = OnlineTiles(capacity=210), long_filter.operator()
    y = torch.cat([tiles.push(x, None, 0, *operator) for x in w.split([200, *[1] * 700], dim=-1)], -1)
    assert worst(y, long_filter.truth(w)) <= 1e-13
    ending = OnlineTiles(capacity=210, ends=True)
    for x in w[..., :210].split([200, *[1] * 10], dim=-1):
        ending.push(x, None, 0, *operator)
    for new, counts in ((w[..., 210:211], None), (w[..., :100], None), (w[..., :1], torch.ones(1))):
        with pytest.raises(ValueError, match="decode_cache='history'"):
            copy.deepcopy(ending).push(new, counts, 0, *operator)


@pytest.mark.usefixtures("eager")
def test_the_memory_of_a_generation_that_ends_does_not_depend_on_its_prompt():
    long_filter, sizes = Decaying(torch.float32), []
    for prompt in (200, 1000):
        tiles, operator = OnlineTiles(capacity=prompt + 50, ends=True), long_filter.operator()
        for x in inputs(1, prompt + 2, torch.float32).split([prompt, 1, 1], dim=-1):
            tiles.push(x, None, 0, *operator)
        sizes.append(tiles.nbytes())
    assert sizes[0] == sizes[1] < 4 * CHANNELS * (2 * online.NEAR + 2 * (online.NEAR + 50))


@pytest.mark.usefixtures("eager")
def test_points_transformed_for_a_token_grow_with_the_logarithm_of_their_number(monkeypatch):
    points, circular = [], online._circular
    monkeypatch.setattr(
        online, "_circular", lambda block, *rest: (points.append(2 * block.shape[-1]), circular(block, *rest))[1]
    )
    long_filter = Decaying(torch.float32)
    for length in (512, 1024, 2048, 4096):
        points.clear()
        tiles, operator = OnlineTiles(capacity=length), long_filter.operator()
        for x in inputs(1, length, torch.float32).split(1, dim=-1):
            tiles.push(x, None, 0, *operator)
        assert np.log2(length) - 8 < sum(points) / length < np.log2(length)


# the choice


def kinds(model, settings=None):
    """The summaries of the long convolutions after a generation, or after a call of `forward`."""
    past = DynamicCache(config=model.config)
    if settings is None:
        model(tokens(1, 4), past_key_values=past)
    else:
        past = model.generate(tokens(1, 4), return_dict_in_generate=True, **settings).past_key_values
    return [type(history) for layer in past.layers for history in layer.histories[1:]]


def test_explicit_choices_hold_wherever_tiles_can_serve():
    assert kinds(model_of("order 3")) == [ExactHistory] * 6
    assert kinds(model_of("online")) == [OnlineTiles] * 3
    assert kinds(new_model("order 3", decode_cache="online")) == [OnlineTiles] * 6
    assert kinds(new_model("heads", decode_cache="online")) == [HeadHistory] * 3
    assert kinds(new_model("modal", decode_cache="online")) == [ModalState] * 3
    mixed = {"filter_types": ["implicit", "explicit", "modal"], "decode_cache": "online"}
    assert kinds(new_model(**mixed)) == [OnlineTiles, ExactHistory, ModalState]
    model, past = model_of("online"), StaticCache(config=config_of(), max_cache_len=8)
    model(tokens(1, 4), past_key_values=past)
    assert [type(layer.histories[1]) for layer in past.layers] == [ExactHistory] * 3


def test_the_generation_config_comes_before_the_config():
    model = new_model(decode_cache="history")
    for choice, kind in (("online", OnlineTiles), ("history", ExactHistory), (None, ExactHistory)):
        settings = {"generation_config": GenerationConfig(max_new_tokens=2, decode_cache=choice)}
        assert kinds(model, settings) == [kind] * 3
    past = DynamicCache(config=model.config)
    model.generation_config.decode_cache = "online"
    model.generate(tokens(1, 4), max_new_tokens=2, past_key_values=past)
    assert isinstance(past.layers[0].histories[1], OnlineTiles)
    with pytest.raises(ValueError, match="'tiles'; choose one of auto, history, online"):
        model.generate(tokens(1, 4), max_new_tokens=2, generation_config=GenerationConfig(decode_cache="tiles"))


def test_tiles_are_taken_where_a_generation_is_announced_that_is_long_enough(monkeypatch):
    plans = {(None, None): False, (4000, None): False, (4000, 15): False, (4000, 16): True, (255, 200): False}
    for (expected, new), taken in plans.items():
        assert Plan(new=new).takes_tiles("auto", expected) == taken
    model = model_of("order 2", torch.float32)
    monkeypatch.setattr("hyena_hf.cache.plan.CROSSOVER", 40)
    assert kinds(model, {"max_new_tokens": 20}) == [ExactHistory] * 3
    assert kinds(model, {"max_new_tokens": 37}) == [OnlineTiles] * 3
    assert kinds(model, {"max_length": 41}) == [OnlineTiles] * 3


# what surrounds generation


def test_gradients_flow_through_tiles(monkeypatch):
    shrink_tiles(monkeypatch)
    model = new_model(dtype=torch.float64, decode_cache="online")
    past = DynamicCache(config=model.config)
    embeds = model.get_input_embeddings()(tokens(2, 40)).detach().requires_grad_()
    parts = [model(inputs_embeds=x, past_key_values=past).logits for x in embeds.split([20, *[1] * 20], dim=1)]
    assert all(layer.histories[1].far is not None for layer in past.layers)
    wanted = [embeds, *(p for name, p in model.named_parameters() if "filter" in name or "skip" in name)]
    cached = torch.autograd.grad(torch.cat(parts, dim=1).square().sum(), wanted)
    whole = torch.autograd.grad(model(inputs_embeds=embeds, use_cache=False).logits.square().sum(), wanted)
    for got, truth in zip(cached, whole, strict=True):
        assert (got - truth).abs().max().item() <= 1e-10 * truth.abs().max().item()


def test_a_cache_filled_in_inference_mode_goes_on_outside(monkeypatch):
    shrink_tiles(monkeypatch)
    model, ids = model_of("online"), tokens(2, 60)
    past, parts = DynamicCache(config=model.config), []
    for at, x in enumerate(ids.split([20, *[1] * 40], dim=1)):
        with torch.inference_mode(at < 20):
            parts.append(model(x, past_key_values=past).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids, use_cache=False).logits, rtol=0, atol=1e-10)


# generation without its prompt


@pytest.mark.parametrize("changes", [{}, {"order": 3, "layer_types": [HYENA, FULL, HYENA]}], ids=["", "order 3"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
def test_tokens_are_the_same_when_the_prompt_is_dropped(changes, mode, monkeypatch):
    shrink_tiles(monkeypatch)
    model = new_model(dtype=torch.float64, decode_cache="online", **changes).requires_grad_(False)
    dropped, fold = [], OnlineTiles._fold
    monkeypatch.setattr(OnlineTiles, "_fold", lambda self, *args: (fold(self, *args), dropped.append(self.dropped))[0])
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :9] = 0
    got, truth = (
        model.generate(ids, attention_mask=mask, max_new_tokens=40, pad_token_id=0, **settings)
        for settings in (mode, {**mode, "use_cache": False, "prefill_chunk_size": None})
    )
    assert torch.equal(got, truth)
    assert dropped
    assert all(dropped)


def test_a_cache_that_others_may_go_on_with_keeps_the_prompt(monkeypatch):
    model, prompt = model_of("online"), tokens(1, 12)
    ends, init = [], OnlineTiles.__init__
    monkeypatch.setattr(
        OnlineTiles, "__init__", lambda self, **kwargs: (init(self, **kwargs), ends.append(self.ends))[0]
    )
    mine = {"past_key_values": DynamicCache(config=model.config)}
    for settings in ({"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True}, mine):
        model.generate(prompt, max_new_tokens=2, **settings)
    assert ends == [False] * 9


@every_dtype
def test_long_greedy_generations_agree_with_a_history_token_by_token(dtype):
    model, prompt = model_of("order 2", dtype), tokens(2, 9)
    settings = {"max_new_tokens": 300, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    found = []
    for choice in ("history", "online"):
        config = GenerationConfig(decode_cache=choice, **settings)
        found.append(model.generate(prompt, generation_config=config))
    assert torch.equal(found[0].sequences, found[1].sequences)
    one, other = (torch.stack(out.logits) for out in found)
    assert (one - other).abs().max().item() <= 1e-5 * one.abs().max().item()
