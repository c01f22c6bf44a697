import lzma
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluation.baselines as baselines
from evaluation.baselines import MarkovModel, markov_bits_per_byte, xz_bits_per_byte


SMOOTHINGS = ["kneser-ney", "witten-bell"]


def _random_text(size, seed, alphabet=b"abcd"):
    """Each byte repeats one of the three before it most of the time: something for contexts to learn."""
    generator = random.Random(seed)
    text = bytearray(alphabet)
    while len(text) < size:
        text.append(text[-generator.randint(1, 3)] if generator.random() < 0.8 else generator.choice(alphabet))
    return bytes(text)


def _python_text(*modules):
    return [Path(__import__(module).__file__).read_bytes() for module in modules]


def _witten_bell(train, context, byte, order):
    """P(byte | context) by counting, straight from Witten and Bell 1991."""
    probability = 1 / 256
    for k in range(order + 1):
        suffix = context[len(context) - k :]
        followers = Counter(
            padded[i]
            for padded in (bytes(order) + document for document in train)
            for i in range(order, len(padded))
            if padded[i - k : i] == suffix
        )
        if followers:
            total = sum(followers.values()) + len(followers)
            probability = (followers[byte] + len(followers) * probability) / total
    return probability


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("context", [b"abab", b"abzz", b"", b"\0\0\0\0", b"zzzz", b"\xff"])
def test_the_probabilities_of_the_next_byte_sum_to_one(smoothing, context):
    model = MarkovModel([_random_text(4000, seed=0), b"", b"abba"], order=4, smoothing=smoothing)
    next_byte = [model.log2_probabilities(context + bytes([byte]))[-1] for byte in range(256)]
    assert np.isfinite(next_byte).all()
    assert np.exp2(next_byte).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_witten_bell_is_what_counting_by_hand_gives(order):
    train = [_random_text(300, seed=1), b"dcba", b"\0\1"]
    model = MarkovModel(train, order, smoothing="witten-bell")
    document = _random_text(40, seed=2) + b"zq" + bytes(3)
    padded = bytes(order) + document
    expected = [_witten_bell(train, padded[t : t + order], byte, order) for t, byte in enumerate(document)]
    np.testing.assert_allclose(np.exp2(model.log2_probabilities(document)), expected, rtol=1e-12)


def test_kneser_ney_gives_the_lower_order_to_bytes_that_follow_many_others():
    """`b` is frequent but only after `a`; `x` is rare but after anything: in a new context `x` is likelier."""
    train = [b"ab" * 50 + b"cxdxexfxgxhxixjxkxlx"]
    model = MarkovModel(train, order=1)
    unseen = {byte: model.log2_probabilities(b"Z" + byte)[-1] for byte in (b"b", b"x")}
    assert unseen[b"x"] > unseen[b"b"] + 1
    by_counts = MarkovModel(train, order=1, smoothing="witten-bell")
    assert by_counts.log2_probabilities(b"Zb")[-1] > by_counts.log2_probabilities(b"Zx")[-1]


def test_on_python_sources_each_order_beats_the_lower_ones():
    train, heldout = _python_text("argparse", "ast", "typing", "inspect", "pathlib"), _python_text("dataclasses")
    bits = [markov_bits_per_byte(train, heldout, order) for order in range(6)]
    assert bits == sorted(bits, reverse=True)
    assert 1.5 < bits[5] < 3 < 4.2 < bits[0] < 5.5


def test_kneser_ney_is_the_better_smoothing_on_python_sources():
    train, heldout = _python_text("argparse", "ast", "typing", "inspect", "pathlib"), _python_text("dataclasses")
    kneser_ney, witten_bell = (markov_bits_per_byte(train, heldout, smoothing=smoothing) for smoothing in SMOOTHINGS)
    assert kneser_ney < witten_bell - 0.2


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_random_bytes_need_eight_bits_and_a_repeated_byte_almost_none(smoothing):
    train, heldout = random.Random(0).randbytes(100_000), random.Random(1).randbytes(10_000)
    assert 8 < markov_bits_per_byte([train], [heldout], order=0, smoothing=smoothing) < 8.01
    assert markov_bits_per_byte([b"a" * 10_000], [b"a" * 1000], smoothing=smoothing) < 0.01


def test_documents_do_not_run_into_each_other():
    train = [b"xyxyxyxy", b"abababab"]
    together = MarkovModel(train, order=2).log2_probabilities(b"ab")
    np.testing.assert_array_equal(together, MarkovModel(train[::-1], order=2).log2_probabilities(b"ab"))
    heldout = [b"abab", b"xyx"]
    alone = [markov_bits_per_byte(train, [document], order=2) * len(document) for document in heldout]
    assert markov_bits_per_byte(train, heldout, order=2) == pytest.approx(sum(alone) / 7, rel=1e-12)


def test_markov_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match=r"order \(8\) must be in 0 \.\. 7"):
        MarkovModel([b"abc"], order=8)
    with pytest.raises(ValueError, match="the 2 training documents hold no bytes"):
        MarkovModel([b"", b""])
    with pytest.raises(ValueError, match="the 0 held-out documents hold no bytes"):
        markov_bits_per_byte([b"abc"], [])


def test_xz_pays_for_held_out_bytes_only_and_may_refer_to_the_training_bytes():
    train, heldout = [random.Random(0).randbytes(5000), b"some text"], [random.Random(1).randbytes(3000)]
    assert 7.9 < xz_bits_per_byte(train, heldout) < 8.2
    assert xz_bits_per_byte(train, [train[0][1000:3000]]) < 0.4
    plain = len(lzma.compress(heldout[0], preset=9 | lzma.PRESET_EXTREME)) - len(lzma.compress(b""))
    assert xz_bits_per_byte([], heldout) == 8 * plain / 3000
    with pytest.raises(ValueError, match="the 1 held-out documents hold no bytes"):
        xz_bits_per_byte(train, [b""])


def test_xz_sees_the_last_training_bytes_when_there_are_too_many(monkeypatch):
    first, last = random.Random(0).randbytes(2000), random.Random(1).randbytes(2000)
    monkeypatch.setattr(baselines, "XZ_PREFIX", 2000)
    assert xz_bits_per_byte([first, last], [last]) < 0.3
    assert math.isclose(xz_bits_per_byte([first, last], [first]), 8, rel_tol=0.02)
