"""Embeddings: every layer and pooling against plain loops, alone and in batches, in chunks, on both strands.

Run: python -m pytest tests/test_scoring_embeddings.py -q
"""

import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model

from hyena_hf import HyenaByteTokenizer, HyenaForMaskedLM, HyenaModel, HyenaNucleotideTokenizer
from hyena_hf.scoring import embed, reverse_complement
from tests.models import new_model


DNA = HyenaNucleotideTokenizer()
POOL = {
    "mean": lambda states: states.double().mean(0),
    "max": lambda states: states.amax(0),
    "last": lambda states: states[-1],
}


def dna(*lengths, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("ACGTN", k=length)) for length in lengths]


def dna_model(name="order 2", **changes):
    return new_model(name, vocab_size=12, pad_token_id=4, **changes)


SEQUENCES = dna(5, 100, 33, 1, 70, 250)


def states_of(model, ids, layer):
    """Hidden states (L, D) by transformers' own output."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]


def bases(text):
    return DNA(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 2, 3, -4])
@pytest.mark.parametrize("pooling", list(POOL))
def test_an_embedding_pools_the_hidden_states_of_the_bases(layer, pooling):
    model = dna_model()
    expected = [POOL[pooling](states_of(model, [0, *bases(text)], layer)[1:]) for text in SEQUENCES]
    for options in ({}, {"batch_size": 6}, {"batch_size": 1}):
        found = embed(model, DNA, SEQUENCES, layer=layer, pooling=pooling, **options)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_minus_one_is_the_output_of_the_final_norm():
    model = dna_model()
    with torch.no_grad():
        state = model.model(torch.tensor([[0, *bases("ACGT")]])).last_hidden_state[0, -1]
    np.testing.assert_allclose(embed(model, DNA, ["ACGT"], pooling="last")[0], state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", list(POOL))
@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("name", ["order 2", "hybrid", "modal"])
def test_chunks_change_no_embedding(name, layer, pooling):
    model = dna_model(name)
    whole = embed(model, DNA, SEQUENCES, layer=layer, pooling=pooling)
    for chunk_length in (16, 37):
        found = embed(model, DNA, SEQUENCES, layer=layer, pooling=pooling, chunk_length=chunk_length)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


def test_without_pooling_every_base_has_its_state():
    model = dna_model()
    for options in ({}, {"batch_size": 6}, {"chunk_length": 16}):
        found = embed(model, DNA, SEQUENCES, pooling="none", **options)
        for text, states in zip(SEQUENCES, found, strict=True):
            np.testing.assert_allclose(states, states_of(model, [0, *bases(text)], -1)[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_length", [1 << 16, 16])
def test_special_tokens_are_pooled_when_asked_for(chunk_length):
    model = dna_model()
    expected = [states_of(model, DNA(text)["input_ids"], -1).mean(0) for text in SEQUENCES]
    found = embed(model, DNA, SEQUENCES, special_tokens=True, chunk_length=chunk_length)
    np.testing.assert_allclose(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_another_token_before_a_sequence_changes_its_embedding():
    model = dna_model()
    expected = states_of(model, [2, *bases("ACGT")], -1)[1:].mean(0)
    np.testing.assert_allclose(embed(model, DNA, ["ACGT"], bos="[BOS]")[0], expected, rtol=0, atol=1e-6)


def test_a_bidirectional_model_sees_the_special_token_behind_a_sequence_and_runs_it_whole():
    model = new_model(kind=HyenaForMaskedLM, vocab_size=12, pad_token_id=4, is_causal=False)
    expected = [states_of(model, DNA(text)["input_ids"], -1)[1:-1].mean(0) for text in SEQUENCES]
    for options in ({"batch_size": 6}, {"chunk_length": 16}):
        found = embed(model, DNA, SEQUENCES, **options)
        np.testing.assert_allclose(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_a_model_without_head_is_embedded_too():
    model = dna_model()
    body = HyenaModel(model.config)
    body.load_state_dict(model.model.state_dict())
    np.testing.assert_array_equal(embed(body, DNA, SEQUENCES), embed(model, DNA, SEQUENCES))


def test_other_models_of_transformers_are_embedded_too():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=260, n_embd=16, n_layer=2, n_head=2, bos_token_id=257)).eval()
    expected = [states_of(model, list(text.encode()), 1).mean(0) for text in SEQUENCES]
    found = embed(model, HyenaByteTokenizer(), SEQUENCES, layer=1, batch_size=6)
    np.testing.assert_allclose(found, torch.stack(expected), rtol=0, atol=1e-5)


def test_the_embedding_of_both_strands_is_their_mean():
    model = dna_model()
    opposite = [reverse_complement(text) for text in SEQUENCES]
    mean = (embed(model, DNA, SEQUENCES) + embed(model, DNA, opposite)) / 2
    np.testing.assert_allclose(embed(model, DNA, SEQUENCES, reverse_complement=True), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", list(POOL))
def test_windows_of_a_split_sequence_are_pooled_together(pooling):
    model = dna_model(beyond_trained_length="refuse", max_position_embeddings=9)
    text = dna(14)[0]
    found = embed(model, DNA, [text], pooling=pooling, long="split")[0]
    # bases 0-7, then 4-11 and 8-13, each behind [CLS]; only new ones count
    windows = [(0, 8, 0), (4, 12, 8), (8, 14, 12)]
    parts = [states_of(model, [0, *bases(text[a:b])], -1)[1:][new - a :] for a, b, new in windows]
    np.testing.assert_allclose(found, POOL[pooling](torch.cat(parts)), rtol=0, atol=1e-5)


def test_a_long_mean_is_summed_in_float64():
    model = dna_model().eval()
    with torch.no_grad():  # states that float32 could not add up: 1000 and little else
        model.model.norm.weight.zero_()
        model.model.norm.bias.fill_(1000.1)
    found = embed(model, DNA, ["ACGT" * 2500], chunk_length=100)
    np.testing.assert_allclose(found, np.float32(1000.1), rtol=1e-7)


def test_embeddings_in_bfloat16_come_back_in_float32():
    model = dna_model().to(torch.bfloat16)
    assert embed(model, DNA, ["ACGT", "AC"]).dtype == np.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": 4}, ValueError, "3 blocks, so hidden states 0"),
        ({"layer": -5}, ValueError, "-4 to -1"),
        ({"layer": "last"}, TypeError, "whole number"),
        ({"pooling": "cls"}, ValueError, "'mean', 'last', 'max', 'none'"),
        ({"pooling": "none", "reverse_complement": True}, ValueError, "no common order"),
        ({"sequences": ["A", ""]}, ValueError, "sequence 1 of 2 is empty"),
    ],
)
def test_bad_arguments_are_refused_in_words(change, error, message):
    arguments = {"model": dna_model(), "tokenizer": DNA, "sequences": ["ACGT"], **change}
    with pytest.raises(error, match=message):
        embed(**arguments)
