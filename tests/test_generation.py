"""generate() with a cache, in every mode, gives the tokens that it gives without one."""

from functools import cache

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from tests.models import FULL, MODELS, SLIDING, model_of, new_model, shrink_tiles, tokens


NEW = 24
SETTINGS = {"max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True}

every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    shrink_tiles(monkeypatch)


@cache
def prompt():
    """Three prompts of 12, 7 and 3 tokens, padded left."""
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :9] = 0
    return ids, mask


def generate(model, one_row=False, **settings):
    torch.manual_seed(0)
    ids, mask = prompt()
    if one_row:
        ids, mask = ids[:1], mask[:1]
    return model.generate(ids, attention_mask=mask, **{**SETTINGS, **settings})


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
}

# ways to feed a cache that must not matter
WAYS = {
    "dynamic": {},
    "chunked prefill": {"prefill_chunk_size": 5},
    "offloaded": {"cache_implementation": "offloaded"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "static, chunked prefill": {"cache_implementation": "static", "prefill_chunk_size": 5, "disable_compile": True},
}


@cache
def without_cache(name, mode, dtype=torch.float64):
    return generate(model_of(name, dtype), use_cache=False, output_scores=True, output_logits=True, **MODES[mode])


@every_model
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_changes_no_token_in_float64(name, mode, way):
    truth = without_cache(name, mode).sequences
    got = generate(model_of(name), **MODES[mode], **WAYS[way]).sequences
    assert torch.equal(got, truth)
    assert len(set(truth[:, 12:].flatten().tolist())) > 8  # no short cycle that would hide an error


def decisive_steps(out):
    """Per row, the number of first tokens that lead the second choice by more than 1e-4."""
    top = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
    return (top[..., 0] - top[..., 1] > 1e-4).long().cumprod(dim=1).sum(dim=1).tolist()


@every_model
@pytest.mark.parametrize("way", ["dynamic", "static, chunked prefill"])
def test_a_cache_changes_no_greedy_token_in_float32_that_leads_by_1e_4(name, way):
    truth = without_cache(name, "greedy", torch.float32)
    got = generate(model_of(name, torch.float32), output_logits=True, **WAYS[way])
    for row, steps in enumerate(decisive_steps(truth)):
        assert steps > 5
        assert torch.equal(got.sequences[row, : 12 + steps], truth.sequences[row, : 12 + steps])
        logits, exact = (torch.stack(out.logits, dim=1)[row, :steps] for out in (got, truth))
        assert (logits - exact).abs().max().item() <= 1e-5 * max(1.0, exact.abs().max().item())


@every_model
def test_beams_in_float32_score_as_without_a_cache(name):
    truth = without_cache(name, "beams", torch.float32)
    got = generate(model_of(name, torch.float32), output_scores=True, num_beams=3)
    assert (got.sequences_scores - truth.sequences_scores).abs().max().item() <= 1e-4


@every_model
def test_padding_on_the_left_changes_no_token(name):
    model = model_of(name)
    ids, mask = prompt()
    together = without_cache(name, "greedy").sequences
    for row in range(3):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **SETTINGS).sequences
        assert torch.equal(alone[0, -NEW:], together[row, -NEW:])


@every_model
@pytest.mark.parametrize("looked_up", [5, 70])
def test_prompt_lookup_changes_no_token(name, looked_up):
    got = generate(model_of(name), one_row=True, prompt_lookup_num_tokens=looked_up)
    assert torch.equal(got.sequences, without_cache(name, "greedy").sequences[:1])


@cache
def assistants(name):
    """A poor assistant, and one that is right most of the time."""
    near = new_model(name, torch.float64)
    with torch.no_grad():
        near.lm_head.weight.add_(torch.randn_like(near.lm_head.weight), alpha=0.01)
    return {"another model": model_of("order 2" if name != "order 2" else "hybrid"), "nearly the same": near}


@every_model
@pytest.mark.parametrize("assistant", ["another model", "nearly the same"])
def test_an_assistant_changes_no_token(name, assistant):
    got = generate(model_of(name), one_row=True, assistant_model=assistants(name)[assistant])
    assert torch.equal(got.sequences, without_cache(name, "greedy").sequences[:1])


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_may_propose_more_tokens_than_a_cache_keeps_by_default(schedule):
    model, assistant = model_of("order 2"), new_model("order 2", torch.float64)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight), alpha=0.003)
    assistant.generation_config.num_assistant_tokens = 100
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.assistant_confidence_threshold = 0
    got = generate(model, one_row=True, assistant_model=assistant, max_new_tokens=150)
    assert torch.equal(got.sequences, generate(model, one_row=True, use_cache=False, max_new_tokens=150).sequences)


def test_an_assistant_may_draft_the_padding_token():
    model, assistant = model_of("hybrid"), new_model("hybrid", torch.float64, tie_word_embeddings=False)
    drafted = 40
    with torch.no_grad():
        assistant.lm_head.weight[drafted] = 0
        assistant.lm_head.weight[drafted] += 10 * assistant.model.norm.weight
    settings = {"one_row": True, "pad_token_id": drafted}
    got = generate(model, assistant_model=assistant, **settings).sequences
    assert torch.equal(got, generate(model, use_cache=False, **settings).sequences)


@pytest.mark.parametrize("layer_types", [[FULL] * 3, [SLIDING] * 3])
def test_a_model_of_attention_alone_decodes_in_every_way(layer_types):
    changes = {"layer_types": layer_types, "sliding_window": 4}
    model, other = (new_model("order 2", torch.float64, seed=seed, **changes).requires_grad_(False) for seed in (0, 1))
    truth = generate(model, one_row=True, use_cache=False).sequences
    for way in ({}, {"prompt_lookup_num_tokens": 5}, {"assistant_model": other}, WAYS["static"]):
        assert torch.equal(generate(model, one_row=True, **way).sequences, truth), way
    hyena = model_of("order 2")
    got = generate(hyena, one_row=True, assistant_model=other).sequences
    assert torch.equal(got, without_cache("order 2", "greedy").sequences[:1])


def test_a_training_model_with_checkpointed_gradients_still_generates():
    model = new_model("hybrid", torch.float64)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(generate(model).sequences, without_cache("hybrid", "greedy").sequences)


def test_a_streamer_gets_every_token_once():
    class Collector(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    got = generate(model_of("hybrid"), one_row=True, streamer=(collector := Collector())).sequences
    assert collector.tokens == got[0].tolist()
    assert collector.ended


@every_model
@pytest.mark.parametrize("way", ["dynamic", "chunked prefill"])
def test_a_returned_cache_is_continued(name, way):
    model, (_, mask) = model_of(name), prompt()
    first = generate(model, max_new_tokens=10, **WAYS[way])
    # the last token has not been fed yet
    assert first.past_key_values.get_seq_length() == 12 + 9
    longer = torch.cat([mask, mask.new_ones(3, 10)], dim=1)
    rest = model.generate(
        first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        **{**SETTINGS, "max_new_tokens": NEW - 10},
    )
    assert torch.equal(rest.sequences, without_cache(name, "greedy").sequences)


def test_a_conversation_goes_on_with_new_user_tokens():
    model, (ids, mask) = model_of("hybrid"), prompt()
    first = generate(model, max_new_tokens=6)
    said = torch.cat([first.sequences, tokens(3, 4, seed=9)], dim=1)
    longer = torch.cat([mask, mask.new_ones(3, 10)], dim=1)
    got = model.generate(said, attention_mask=longer, past_key_values=first.past_key_values, **SETTINGS).sequences
    assert torch.equal(got, model.generate(said, attention_mask=longer, use_cache=False, **SETTINGS).sequences)
    assert got.shape[1] == ids.shape[1] + 10 + NEW


def test_generation_from_embeddings_equals_generation_from_ids():
    model, (ids, mask) = model_of("order 3"), prompt()
    embeds = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embeds, attention_mask=mask, **SETTINGS).sequences
    assert torch.equal(got, without_cache("order 3", "greedy").sequences[:, 12:])


def test_the_scores_of_a_generation_are_the_logits_of_its_tokens():
    model, (_, mask) = model_of("hybrid"), prompt()
    out = generate(model, output_logits=True)
    longer = torch.cat([mask, mask.new_ones(3, NEW)], dim=1)
    logits = model(out.sequences, attention_mask=longer, use_cache=False).logits[:, 11:-1]
    # generate() hands them out in float32
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", [{}, {"prompt_lookup_num_tokens": 5}, {"cache_implementation": "static"}], ids=str)
def test_generation_hands_out_attention_weights(way):
    model = new_model("hybrid", torch.float64, attn_implementation="eager").requires_grad_(False)
    out = generate(model, one_row=True, output_attentions=True, disable_compile=True, **way)
    assert torch.equal(out.sequences, without_cache("hybrid", "greedy").sequences[:1])
    assert out.attentions[0][0].shape[:3] == (1, 4, 12)
    assert len(out.attentions) <= NEW
    for step in out.attentions:
        (weights,) = step
        assert weights.sum(-1).sub(1).abs().max().item() < 1e-12


def test_generation_goes_past_the_trained_length():
    model = new_model("order 2", torch.float64, max_position_embeddings=20).requires_grad_(False)
    assert torch.equal(generate(model).sequences, generate(model, use_cache=False).sequences)


@pytest.mark.parametrize("name", ["order 2", "heads", "hybrid", "modal", "modal heads", "modal order 3"])
def test_compiled_decoding_with_a_static_cache_is_one_graph_for_all_steps(name):
    model = new_model(name, torch.float64)
    torch.compiler.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="aot_eager")
    compiled._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiled, "max_length": 12 + NEW}
    for chunk in ({}, {"prefill_chunk_size": 5}):
        got = generate(model, max_new_tokens=None, **settings, **chunk).sequences
        assert torch.equal(got, without_cache(name, "greedy").sequences)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
