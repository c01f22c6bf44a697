# SPDX-License-Identifier: Apache-2.0
"""A converted encoder learns the embeddings of its original: tiny weights here, all-MiniLM-L6-v2 with -m real."""

import gzip
import time

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, BertTokenizer

import hyena_hf  # noqa: F401  registers the converted types
from examples import minilm_linear
from hyena_hf.linear_attention import attention_transfer, convert_attention
from training import real_data
from training.embedding_distillation import agreement, distil_embeddings, distillation_loss, embed, text_chunks
from training.real_data import jargon_file, minilm_folder, read_reviews, read_text


LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={letter: number for number, letter in enumerate(LETTERS)})


def teacher() -> BertModel:
    """A tiny encoder whose attention is far from uniform."""
    config = BertConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    return BertModel(config).eval()


def rows(count: int = 40) -> Tensor:
    ids = torch.randint(5, len(LETTERS), (count, 12))
    ids[:, 0], ids[:, -1] = 2, 3
    return ids


def test_rows_of_text_are_the_tokens_in_order_each_between_special_ones():
    text = " ".join("abcdefgh" * 3)  # 24 tokens, rows of 5 and 4 left over
    ids = text_chunks(tokenizer(), text, 7)
    assert ids.shape == (4, 7)
    assert ids[:, 0].eq(2).all()
    assert ids[:, -1].eq(3).all()
    assert ids[:, 1:-1].flatten().tolist() == [5 + i % 8 for i in range(20)]


def test_rows_need_room_and_text():
    with pytest.raises(ValueError, match=r"length .2. must be at least 3"):
        text_chunks(tokenizer(), "a b c", 2)
    with pytest.raises(ValueError, match="shorter than a row of 9"):
        text_chunks(tokenizer(), "a b c", 9)


def test_embeddings_are_means_of_hidden_states_whatever_the_batch():
    model, ids = teacher(), rows(7)
    expected = torch.stack([model(row[None]).last_hidden_state[0].mean(0) for row in ids])
    torch.testing.assert_close(embed(model, ids, batch_size=3), expected, rtol=0, atol=1e-5)
    assert not model.training


def test_agreement_is_cosine_and_shared_nearest_neighbours():
    theirs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]])
    assert agreement(theirs, theirs).neighbours == 1
    assert agreement(3 * theirs, theirs).cosine == pytest.approx(1)
    ours = theirs.clone()
    ours[1] = torch.tensor([-1.0, 0.0])  # far from row 0 now: rows 0 and 1 both have row 3 as their nearest
    found = agreement(ours, theirs)
    assert found.neighbours == 0.5
    assert found.cosine == pytest.approx((3 - 1 / 1.01**0.5) / 4)
    with pytest.raises(ValueError, match="one shape"):
        agreement(ours, theirs[:3])
    with pytest.raises(ValueError, match="3 or more"):
        agreement(ours[:2], theirs[:2])


def test_the_loss_is_that_of_the_formula_and_padding_counts_nowhere():
    original = teacher().double()
    model, ids = convert_attention(original, feature_map="hedgehog_softmax"), rows(2)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = distillation_loss(model, original, {"input_ids": ids, "attention_mask": mask}).detach()
    parts = [ids[:1], ids[1:, :7]]
    states = [[m(x, output_hidden_states=True).hidden_states[1:] for x in parts] for m in (model, original)]
    cosines = [torch.cosine_similarity(a[-1].mean(1), b[-1].mean(1)) for a, b in zip(*states, strict=True)]
    errors = []
    for layer in range(2):
        ours, theirs = (torch.cat([x[layer].flatten() for x in of]) for of in states)
        errors.append((ours - theirs).square().sum() / theirs.square().sum())
    expected = 1 - torch.cat(cosines).mean() + sum(errors) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert distillation_loss(original, original, ids).item() == pytest.approx(0, abs=1e-12)


def test_distillation_brings_embeddings_nearer_than_transfer_and_leaves_tables_and_teacher():
    original, ids = teacher(), rows(400)
    held_out, batches = ids[-40:], ids[:-40].split(16)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    model = convert_attention(original, feature_map="hedgehog_softmax")
    attention_transfer(model, batches, steps=20, learning_rate=5e-2)
    transferred = agreement(embed(model, held_out), embed(original, held_out)).cosine
    model.requires_grad_(False)
    losses = distil_embeddings(model, original, batches, steps=40, learning_rate=1e-2, map_learning_rate=1e-2)
    tuned = agreement(embed(model, held_out), embed(original, held_out)).cosine
    assert 1 - tuned < 0.8 * (1 - transferred)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    for name, value in original.state_dict().items():
        assert value.equal(before[name])
        same = name.startswith("pooler.") or ("embeddings" in name and "LayerNorm" not in name)
        assert model.state_dict()[name].equal(value) == same, name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def test_distillation_refuses_what_it_cannot_do():
    original, ids = teacher(), rows(4)
    other = BertModel(BertConfig.from_dict({**original.config.to_dict(), "num_hidden_layers": 1}))
    cases = [
        (original, [ids], {"steps": 0}, "steps .0."),
        (original, [ids], {"learning_rate": 0.0}, "must be positive"),
        (original, [], {}, "no batches"),
        (other, [ids], {}, "1 layers of width 16, the teacher 2 of 16"),
    ]
    for student, batches, options, message in cases:
        with pytest.raises(ValueError, match=message):
            distil_embeddings(student, original, batches, **{"steps": 2, **options})
    broken = teacher()
    broken.encoder.layer[0].output.dense.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        distil_embeddings(broken, original, [ids], steps=2)


def test_reviews_have_the_sign_of_their_rating_and_no_repetition(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_text("1\t1.5\tgood\n2\t-0.5\tbad \n3\t0\tneither\n4\t2.0\tgood\n")
    found = read_reviews(path)
    assert sorted((example.sequence, example.label) for example in found) == [("bad", 0), ("good", 1)]
    reversed_path = tmp_path / "reversed.txt"
    reversed_path.write_text("2\t-0.5\tbad\n1\t1.5\tgood\n")
    assert [e.sequence for e in read_reviews(reversed_path)] == [e.sequence for e in found]
    path.write_text("1\tgood\n")
    with pytest.raises(ValueError, match="line 1 has 2 columns"):
        read_reviews(path)
    path.write_text("1\t0\tneither\n")
    with pytest.raises(ValueError, match="no rated sentence"):
        read_reviews(path)


def test_material_that_is_nowhere_is_named_with_the_page_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(real_data, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"film reviews is not in .*training/real_data.py"):
        real_data.reviews_file()


def test_the_example_runs_on_any_encoder_and_text(tmp_path, capsys):
    torch.manual_seed(0)
    teacher().save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    text = tmp_path / "text.gz"
    with gzip.open(text, "wt") as file:
        file.write(" ".join("abcdefgh"[i] for i in torch.randint(8, (1000,))))
    out = tmp_path / "out"
    words = ["--output", out, "--model", tmp_path / "encoder", "--text", text, "--length", 12, "--held-out", 16]
    minilm_linear.main([*map(str, words), "--transfer", "20", "--tune", "40", "--feature-dim", "16"])
    printed = capsys.readouterr().out
    cosines = [float(line.split()[2].strip(",")) for line in printed.splitlines() if " same nearest row " in line]
    assert len(cosines) == 3
    assert cosines[2] > cosines[1]
    assert printed.count("linear ") == len(minilm_linear.PAIRS)
    assert AutoConfig.from_pretrained(out / "tuned").model_type == "hedgehog_bert"


@pytest.mark.real
def test_a_minute_of_transfer_brings_minilm_near_its_softmax_embeddings_and_files_keep_it(tmp_path):
    """Untrained 0.52; the threshold stands below what every seed and map width reaches."""
    try:
        folder, text = minilm_folder(), read_text(jargon_file())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    original = AutoModel.from_pretrained(folder).eval()
    ids = text_chunks(minilm_linear.AutoTokenizer.from_pretrained(folder), text)
    held_out, train = ids[-64:], ids[:-64][torch.randperm(len(ids) - 64)]
    expected = embed(original, held_out)
    model = convert_attention(original, feature_map="hedgehog_softmax", feature_dim=64)
    before = agreement(embed(model, held_out), expected)
    start = time.process_time()
    attention_transfer(model, train.split(4), steps=80, learning_rate=5e-2)
    assert time.process_time() - start < 60
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == "HedgehogBertModel"
    found = embed(loaded, held_out)
    assert found.equal(embed(model, held_out))
    after = agreement(found, expected)
    assert before.cosine < 0.7
    assert after.cosine > 0.88
    assert after.neighbours > before.neighbours + 0.1
