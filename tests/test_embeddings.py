"""Learned positions and token types: added to the tokens, exact with caches and padding, bounded by their tables.

Run: python -m pytest tests/test_embeddings.py -q
"""

from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hyena_hf import HyenaForCausalLM, HyenaForTextEncoding
from tests.models import config_of, new_model, tokens


CHANGES = {
    "learned positions": {"learned_positions": True},
    "with types": {
        "learned_positions": True,
        "type_vocab_size": 3,
        "layer_types": ["hyena", "full_attention", "hyena"],
    },
    "monarch mixer": {"learned_positions": True, "block_type": "monarch_mixer", "mlp_blocks": 2, "gated_mlp": True},
    "monarch mixer with a norm": {"block_type": "monarch_mixer_norm", "type_vocab_size": 2},
}

every_model = pytest.mark.parametrize("name", CHANGES)


@cache
def model_of(name):
    return new_model(dtype=torch.float64, **CHANGES[name]).requires_grad_(False)


def close(got, truth):
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-10)


# causal models: what was computed token by token is what was computed at once


@every_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_logits_equal_those_of_one_call(name, kind):
    model, ids = model_of(name), tokens(2, 21)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=21)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 10], dim=1)]
    close(torch.cat(pieces, dim=1), model(ids).logits)


@every_model
def test_padded_rows_equal_rows_alone_with_a_cache(name):
    model, ids = model_of(name), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache).logits]
    logits.append(model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits)
    close(torch.cat(logits, dim=1)[1, 7:], model(ids[1:, 7:]).logits[0])


@every_model
def test_generation_goes_on_at_the_next_position(name):
    model, ids = model_of(name), tokens(1, 6)
    written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for length in range(6, 14):
        following = model(written[:, :length]).logits[0, -1].argmax()
        assert written[0, length] == following


def test_positions_make_equal_tokens_differ():
    alike = torch.full((1, 5), 3)
    hidden = model_of("learned positions").model.embed_positions.weight[:5]
    embedded = model_of("learned positions").model._embed(
        model_of("learned positions").model.embed_tokens(alike), None, torch.arange(5)[None], None
    )
    close(embedded[0] - embedded[0, 0], hidden - hidden[0])


# types


def test_types_change_outputs_and_are_ignored_where_there_are_none():
    model, ids = model_of("with types"), tokens(1, 9)
    zero, two = torch.zeros_like(ids), torch.full_like(ids, 2)
    assert torch.equal(model(ids).logits, model(ids, token_type_ids=zero).logits)
    assert (model(ids).logits - model(ids, token_type_ids=two).logits).abs().max() > 1e-3
    plain = model_of("learned positions")
    assert torch.equal(plain(ids).logits, plain(ids, token_type_ids=two).logits)


BAD = [
    ({"token_type_ids": torch.full((1, 9), 3)}, ValueError, "from 3 to 3.*3 types"),
    ({"token_type_ids": torch.full((1, 9), -1)}, ValueError, "from -1 to -1"),
    ({"token_type_ids": torch.zeros(1, 8, dtype=torch.long)}, ValueError, r"\(1, 8\).*\(1, 9\)"),
    ({"token_type_ids": torch.zeros(1, 9)}, TypeError, "float32"),
    ({"token_type_ids": [[0] * 9]}, TypeError, "got list"),
    ({"position_ids": torch.arange(250, 259)[None]}, ValueError, "from 250 to 258.*256 positions"),
    ({"position_ids": torch.arange(-1, 8)[None]}, ValueError, "from -1 to 7"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD)
def test_types_and_positions_outside_their_tables_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        model_of("with types")(tokens(1, 9), **inputs)


def test_inputs_longer_than_the_table_of_positions_are_refused_also_with_a_cache():
    model = model_of("learned positions")
    with pytest.raises(ValueError, match=r"257 tokens.*\(256\).*position embeddings are a trained table"):
        model(tokens(1, 257))
    cache = DynamicCache(config=model.config)
    model(tokens(1, 250), past_key_values=cache)
    with pytest.raises(ValueError, match="257 tokens"):
        model(tokens(1, 7), past_key_values=cache)


# vectors of texts


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_vectors_of_texts_read_what_the_config_says(pooling):
    model = new_model(dtype=torch.float64, kind=HyenaForTextEncoding, is_causal=False, classifier_pooling=pooling)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask)
        for row, start in ((0, 3), (1, 0)):
            states = model.model(ids[row : row + 1, start:]).last_hidden_state[0]
            pooled = {"first": states[0], "last": states[-1], "mean": states.mean(0)}[pooling]
            close(outputs.pooler_output[row], torch.tanh(model.pooler(pooled)))
            close(outputs.last_hidden_state[row, start:], states)


def test_a_text_encoder_refuses_packed_rows_and_returns_hidden_states():
    model = HyenaForTextEncoding(config_of(is_causal=False)).eval()
    with pytest.raises(ValueError, match="HyenaForTextEncoding gives one answer a row"):
        model(tokens(1, 6), seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert len(model(tokens(1, 6), output_hidden_states=True).hidden_states) == 4


def test_blocks_without_a_norm_before_the_mixer_have_none():
    model = HyenaForCausalLM(config_of(block_type="monarch_mixer"))
    assert all(layer.mixer_norm is None for layer in model.model.layers)
    assert not any("mixer_norm" in name or name == "model.norm.weight" for name, _ in model.named_parameters())
    assert model.model.embed_norm is not None
