"""Log-likelihoods: their value, the same alone and in any batch, in chunks, on both strands, when memory runs out.

Run: python -m pytest tests/test_scoring.py -q
"""

import random

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hyena_hf import HyenaByteTokenizer, HyenaForMaskedLM, HyenaNucleotideTokenizer
from hyena_hf.scoring import reverse_complement, score
from hyena_hf.scoring.batching import plan
from hyena_hf.scoring.encoding import split
from tests.models import new_model


DNA = HyenaNucleotideTokenizer()
BYTES = HyenaByteTokenizer()


def dna(*lengths, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("ACGTN", k=length)) for length in lengths]


def dna_model(name="order 2", **changes):
    return new_model(name, vocab_size=12, pad_token_id=4, **changes)


def oracle(model, ids):
    """Sum of float64 log-softmax, one token after another."""
    exact = new_model(vocab_size=12, pad_token_id=4).double()
    exact.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    total = 0.0
    with torch.no_grad():
        for at in range(1, len(ids)):
            logits = exact(torch.tensor([ids[:at]])).logits[0, -1]
            total += (logits[ids[at]] - logits.exp().sum().log()).item()
    return total


SEQUENCES = dna(5, 100, 33, 1, 70, 250)


def test_a_score_is_the_sum_of_the_log_probabilities_of_its_bases():
    model = dna_model()
    expected = [oracle(model, [0, *DNA(text, add_special_tokens=False)["input_ids"]]) for text in SEQUENCES[:4]]
    found = score(model, DNA, SEQUENCES[:4])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["order 2", "order 3", "hybrid", "heads", "modal", "sliding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_the_same_alone_and_in_any_batch(name, side):
    model, tokenizer = dna_model(name), HyenaNucleotideTokenizer(padding_side=side)
    alone = np.concatenate([score(model, tokenizer, [text], reduction="mean") for text in SEQUENCES])
    for batch_size in (2, 3, len(SEQUENCES), "auto"):
        found = score(model, tokenizer, SEQUENCES, reduction="mean", batch_size=batch_size)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["order 2", "hybrid", "modal"])
def test_chunks_change_no_score(name):
    model = dna_model(name)
    whole = score(model, DNA, SEQUENCES, reduction="mean")
    for chunk_length in (16, 37):
        found = score(model, DNA, SEQUENCES, reduction="mean", chunk_length=chunk_length)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


def test_tokens_scores_add_up_to_sums_and_means():
    model = dna_model()
    tokens = score(model, DNA, SEQUENCES, reduction="none")
    assert [len(values) for values in tokens] == [len(text) for text in SEQUENCES]
    np.testing.assert_allclose(score(model, DNA, SEQUENCES), [values.sum() for values in tokens])
    np.testing.assert_allclose(score(model, DNA, SEQUENCES, reduction="mean"), [values.mean() for values in tokens])


def test_without_a_token_before_it_the_first_one_is_not_scored():
    model = dna_model()
    ids = DNA(SEQUENCES[2], add_special_tokens=False)["input_ids"]
    assert score(model, DNA, SEQUENCES[2:3], bos=None)[0] == pytest.approx(oracle(model, ids), rel=1e-6)
    assert len(score(model, DNA, SEQUENCES[2:3], bos=None, reduction="none")[0]) == len(ids) - 1


def test_another_token_can_stand_before_a_sequence():
    model = dna_model()
    ids = DNA(SEQUENCES[2], add_special_tokens=False)["input_ids"]
    expected = pytest.approx(oracle(model, [2, *ids]), rel=1e-6)
    assert score(model, DNA, SEQUENCES[2:3], bos="[BOS]")[0] == expected
    assert score(model, DNA, SEQUENCES[2:3], bos=2)[0] == expected


@pytest.mark.parametrize("make", [GPT2LMHeadModel, LlamaForCausalLM])
def test_other_causal_models_are_scored_too(make):
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = GPT2Config if make is GPT2LMHeadModel else LlamaConfig
    model = make(kind(**shape, bos_token_id=257, eos_token_id=258)).eval()
    tokenizer = HyenaByteTokenizer(add_bos_token=True)
    with torch.no_grad():
        logs = [model(tokenizer(text, return_tensors="pt").input_ids).logits.log_softmax(-1)[0] for text in SEQUENCES]
    expected = [
        log[:-1].gather(-1, torch.tensor(list(text.encode()))[:, None]).sum().item()
        for log, text in zip(logs, SEQUENCES, strict=True)
    ]
    for options in ({}, {"batch_size": 6}, {"chunk_length": 16}):
        np.testing.assert_allclose(score(model, tokenizer, SEQUENCES, **options), expected, rtol=1e-6)


# strands


def test_the_reverse_complement_knows_ambiguous_letters_and_case():
    assert reverse_complement("ACGTNRYSWKMBDHVacgtn") == "nacgtBDHVKMWSRYNACGT"
    assert reverse_complement(reverse_complement("GATTACA")) == "GATTACA"


def test_the_score_of_both_strands_is_their_mean_and_the_same_for_either():
    model = dna_model()
    both = score(model, DNA, SEQUENCES, reverse_complement=True)
    opposite = [reverse_complement(text) for text in SEQUENCES]
    mean = (score(model, DNA, SEQUENCES) + score(model, DNA, opposite)) / 2
    np.testing.assert_allclose(both, mean, rtol=1e-6)
    np.testing.assert_allclose(score(model, DNA, opposite, reverse_complement=True), both, rtol=1e-6)


def test_letters_that_are_no_dna_have_no_other_strand():
    with pytest.raises(ValueError, match="sequence 1 holds 'U' at position 3"):
        score(dna_model(), DNA, ["ACGT", "ACU"], reverse_complement=True)


# lengths and memory


def test_padding_is_bounded_and_every_row_runs_once():
    draw = random.Random(1)
    lengths = [int(2 ** draw.uniform(2, 10)) for _ in range(300)]
    batches = plan(lengths, rows=None, tokens=4096)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        cells = len(batch) * max(lengths[index] for index in batch)
        assert cells <= 4096
        assert cells <= 1.25 * sum(lengths[index] for index in batch)


def test_windows_overlap_by_half_and_count_every_token_once():
    assert split(10, 4) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    for length, room in ((1, 2), (7, 2), (9, 5), (100, 7)):
        counted = [at for start, stop, new in split(length, room) for at in range(max(start, new), stop)]
        assert counted == list(range(length))


def test_a_sequence_longer_than_the_model_is_refused_or_split():
    model = dna_model(beyond_trained_length="refuse", max_position_embeddings=64)
    text = dna(150)
    with pytest.raises(ValueError, match=r"151 tokens.*model takes 64.*split"):
        score(model, DNA, text)
    found = score(model, DNA, text, long="split", reduction="none")[0]
    ids = [0, *DNA(text[0], add_special_tokens=False)["input_ids"]]
    expected = []
    for start, stop, new in split(150, 63):
        logits = model(torch.tensor([[0, *ids[1 + start : 1 + stop]]])).logits[0].double().log_softmax(-1)
        expected += [logits[at - start, ids[1 + at]].item() for at in range(new, stop)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Small:
    """A model that runs out of memory above so many tokens."""

    def __init__(self, model, monkeypatch, limit, error):
        self.limit, self.error, self.seen, self.whole = limit, error, [], model.model.forward
        monkeypatch.setattr(model.model, "forward", self)

    def __call__(self, input_ids, **kwargs):
        self.seen.append(tuple(input_ids.shape))
        if input_ids.numel() > self.limit:
            raise self.error
        return self.whole(input_ids=input_ids, **kwargs)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["accelerator", "processor"])
@pytest.mark.parametrize("batch_size", ["auto", 16])
def test_batches_are_halved_until_they_fit(monkeypatch, caplog, error, batch_size):
    model, texts = dna_model(), dna(*range(30, 46))
    expected = score(model, DNA, texts)
    small = Small(model, monkeypatch, 200, error)
    np.testing.assert_allclose(score(model, DNA, texts, batch_size=batch_size), expected, rtol=1e-6)
    assert "out of memory with 16 sequences" in caplog.text
    refused = [rows * columns for rows, columns in small.seen if rows * columns > 200]
    assert 1 <= len(refused) <= 3


def test_a_row_that_does_not_fit_runs_in_chunks(monkeypatch, caplog):
    model, texts = dna_model(), dna(900, 20)
    expected = score(model, DNA, texts)
    Small(model, monkeypatch, 500, NO_MEMORY[0])
    np.testing.assert_allclose(score(model, DNA, texts), expected, rtol=1e-6)
    assert "going on in chunks of 450" in caplog.text


def test_a_row_that_never_fits_raises_the_error(monkeypatch):
    model = dna_model()
    Small(model, monkeypatch, 10, NO_MEMORY[1])
    with pytest.raises(RuntimeError, match="can't allocate"):
        score(model, DNA, dna(300))


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    model = dna_model()
    small = Small(model, monkeypatch, 10, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        score(model, DNA, dna(30, 31))
    assert len(small.seen) == 1


def test_the_model_is_left_in_training_mode_and_unfrozen():
    model = dna_model().train()
    score(model, DNA, ["ACGT"])
    assert model.training
    assert model.model.layers[0].mixer.frozen is None


# bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sequences": "ACGT"}, TypeError, "put it into a list"),
        ({"sequences": []}, ValueError, "is empty"),
        ({"sequences": ["A", ""]}, ValueError, "sequence 1 of 2 is empty"),
        ({"sequences": ["A", 5]}, TypeError, "number 1 is a int"),
        ({"sequences": ["A"], "bos": None}, ValueError, "sequence 0 is 1 token long and nothing stands before it"),
        ({"reduction": "max"}, ValueError, "'sum', 'mean', 'none'"),
        ({"reduction": "none", "reverse_complement": True}, ValueError, "no common order"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"batch_size": "large"}, TypeError, "'auto' or a number"),
        ({"chunk_length": 0}, ValueError, "at least 1"),
        ({"chunk_length": 2.5}, TypeError, "number of tokens"),
        ({"bos": "[START]"}, ValueError, "'\\[START\\]' is no token"),
        ({"bos": 99}, ValueError, "no id of a vocabulary of 12"),
        ({"bos": 1.5}, TypeError, "a token or its id"),
        ({"long": "cut"}, ValueError, "'refuse', 'split'"),
        ({"tokenizer": "dna"}, TypeError, "must be a tokenizer"),
        ({"model": "hyena"}, TypeError, "must be a model"),
    ],
)
def test_bad_arguments_are_refused_in_words(change, error, message):
    arguments = {"model": dna_model(), "tokenizer": DNA, "sequences": ["ACGT"], **change}
    with pytest.raises(error, match=message):
        score(**arguments)


def test_a_model_that_fills_gaps_has_no_likelihood():
    model = new_model(kind=HyenaForMaskedLM, vocab_size=12, pad_token_id=4, is_causal=False)
    with pytest.raises(TypeError, match="predicts the next token"):
        score(model, DNA, ["ACGT"])
