"""The synthetic tasks: against the published generator's own examples, and by what an example must be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.synthetic import (
    UNPREDICTED,
    answer_examples,
    associative_recall,
    count_recall_sequences,
    next_token_examples,
    recall_sequences,
)


GOLDEN = Path(__file__).parent / "golden" / "task_assoc_recall_v20_l40.npz"


def sequences(vocab_size: int, length: int, examples: int = 300, seed: int = 0) -> torch.Tensor:
    return recall_sequences(np.random.default_rng(seed), vocab_size=vocab_size, length=length, examples=examples)


def test_the_published_training_and_test_sets_come_out_bit_for_bit():
    golden = np.load(GOLDEN, allow_pickle=False)
    sets = associative_recall(vocab_size=20, length=40, train_examples=64, test_examples=32, seed=0)
    for examples, name in zip(sets, ("train", "test"), strict=True):
        assert np.array_equal(np.stack(examples, axis=1), golden[name])


def test_another_seed_gives_other_examples_and_the_same_seed_the_same():
    first, again, other = (associative_recall(train_examples=10, test_examples=10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0].inputs, again[0].inputs)
    assert not torch.equal(first[0].inputs, other[0].inputs)


@pytest.mark.parametrize(("vocab_size", "length"), [(4, 2), (5, 2), (7, 9), (10, 32), (20, 40), (11, 101)])
def test_every_sequence_shows_pairs_of_one_map_and_asks_for_a_key_it_showed(vocab_size, length):
    keys = range(1, 1 + (vocab_size - 2) // 2)
    values = range(keys.stop, vocab_size - 1)
    for sequence in sequences(vocab_size, length).tolist():
        *pairs, arrow, query, answer = sequence
        assert len(pairs) == length // 2 * 2
        assert arrow == vocab_size - 1
        shown = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert all(shown[key] == value for key, value in zip(pairs[::2], pairs[1::2], strict=True))
        assert set(shown) <= set(keys)
        assert set(shown.values()) <= set(values)
        assert shown[query] == answer


@pytest.mark.parametrize("vocab_size", [10, 11])
def test_keys_values_and_answers_are_uniform(vocab_size):
    drawn = sequences(vocab_size, 8, examples=4000)
    num_keys = (vocab_size - 2) // 2
    for column, lowest, kinds in ((0, 1, num_keys), (1, 1 + num_keys, vocab_size - 2 - num_keys), (-1, 5, None)):
        kinds = kinds or vocab_size - 2 - num_keys
        counts = torch.bincount(drawn[:, column] - lowest, minlength=kinds)
        assert len(counts) == kinds
        # five standard deviations of a binomial count
        assert (counts - 4000 / kinds).abs().max() < 5 * (4000 / kinds) ** 0.5


def test_training_targets_are_all_next_tokens_and_test_targets_the_answer_only():
    drawn = sequences(10, 32, examples=5)
    train, test = next_token_examples(drawn), answer_examples(drawn)
    assert torch.equal(train.inputs[:, 1:], train.targets[:, :-1])
    assert torch.equal(train.inputs, test.inputs)
    assert torch.equal(train.targets[:, -1], test.targets[:, -1])
    assert (test.targets[:, :-1] == UNPREDICTED).all()
    assert train.inputs.shape == (5, 34)


def test_as_many_different_sequences_are_made_as_there_are_and_no_more():
    possible = count_recall_sequences(6, 4)
    train, _ = associative_recall(vocab_size=6, length=4, train_examples=possible, test_examples=1)
    assert len({*map(tuple, train.inputs.tolist())}) == possible == 20
    with pytest.raises(ValueError, match=r"test_examples \(21\) exceeds the 20 different sequences"):
        associative_recall(vocab_size=6, length=4, train_examples=1, test_examples=21)


def test_sets_of_long_sequences_are_made_at_once():
    train, test = associative_recall(vocab_size=30, length=131072, train_examples=3, test_examples=2)
    assert train.inputs.shape == (3, 131074)
    assert test.inputs.shape == (2, 131074)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 3}, r"vocab_size \(3\) must be at least 4"),
        ({"length": 1}, r"length \(1\) must be at least 2"),
        ({"examples": 0}, r"examples \(0\) must be at least 1"),
    ],
)
def test_sizes_that_no_sequence_has_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        recall_sequences(np.random.default_rng(0), **{"vocab_size": 10, "length": 32, "examples": 1, **sizes})


@pytest.mark.parametrize("name", ["train_examples", "test_examples"])
def test_empty_sets_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
        associative_recall(**{name: 0})
