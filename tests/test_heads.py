"""Task heads: right outputs and losses under any padding, one set of rules for labels, loadable from any body.

Run: python -m pytest tests/test_heads.py -q

The truth is always the sequence alone: its hidden states, pooled and scored by hand in float64.
"""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hyena_hf import (
    HyenaByteTokenizer,
    HyenaForCausalLM,
    HyenaForMaskedLM,
    HyenaForQuestionAnswering,
    HyenaForSequenceClassification,
    HyenaForTokenClassification,
    HyenaModel,
)
from tests.models import FULL, HYENA, config_of, new_model, tokens


HEADS = {
    "masked": (HyenaForMaskedLM, AutoModelForMaskedLM),
    "sequence": (HyenaForSequenceClassification, AutoModelForSequenceClassification),
    "token": (HyenaForTokenClassification, AutoModelForTokenClassification),
    "question": (HyenaForQuestionAnswering, AutoModelForQuestionAnswering),
}
NEW = {"masked": set(), "sequence": {"score.weight"}, "token": {"score.weight", "score.bias"}}
NEW["question"] = {"qa_outputs.weight", "qa_outputs.bias"}
CLASSIFIERS = [name for name in HEADS if name != "masked"]
LENGTHS = (21, 5, 13)

either_way = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_head = pytest.mark.parametrize("head", HEADS)


def head_model(head, causal=False, dtype=torch.float64, **changes):
    return new_model(dtype=dtype, kind=HEADS[head][0], is_causal=causal, **changes)


def padded(kind, pad=None):
    """Sequences, and one batch (3, 30) of them with its mask."""
    sequences = [tokens(length, seed=length) for length in LENGTHS]
    ids, mask = tokens(3, 30, seed=99), torch.zeros(3, 30, dtype=torch.long)
    for row, (sequence, n) in enumerate(zip(sequences, LENGTHS, strict=True)):
        places = {
            "left": torch.arange(30 - n, 30),
            "right": torch.arange(n),
            "both": torch.arange(4, 4 + n),
            "holes": torch.randperm(30, generator=torch.Generator().manual_seed(row))[:n].sort().values,
        }[kind]
        mask[row, places] = 1
        ids[row, places] = sequence
    return sequences, ids if pad is None else ids.masked_fill(mask == 0, pad), mask


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# sequence classification


def pooled_scores(model, sequences):
    """Scores of each sequence alone."""
    scores = []
    for sequence in sequences:
        hidden = model.model(sequence[None], use_cache=False).last_hidden_state[0]
        pooled = hidden[-1] if model.config.is_causal else hidden.mean(0)
        scores.append(pooled @ model.score.weight.T)
    return torch.stack(scores)


@either_way
@pytest.mark.parametrize("kind", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("layers", [[HYENA] * 3, [HYENA, FULL, HYENA]], ids=["hyena", "hybrid"])
def test_a_sequence_gets_the_scores_of_the_sequence_alone(causal, kind, layers):
    model = head_model("sequence", causal, layer_types=layers, num_labels=4)
    sequences, ids, mask = padded(kind)
    assert_equal(model(ids, attention_mask=mask).logits, pooled_scores(model, sequences))
    embeds = model.get_input_embeddings()(ids)
    assert_equal(model(inputs_embeds=embeds, attention_mask=mask).logits, pooled_scores(model, sequences))


@either_way
@pytest.mark.parametrize("kind", ["left", "right", "both"])
def test_without_a_mask_padding_tokens_at_either_end_are_padding(causal, kind):
    model = head_model("sequence", causal, pad_token_id=3)
    sequences, ids, _ = padded(kind, pad=3)
    assert_equal(model(ids).logits, pooled_scores(model, sequences))


@either_way
def test_a_padding_token_between_others_and_a_row_of_nothing_else_are_text(causal):
    model = head_model("sequence", causal, pad_token_id=3)
    sequences = [torch.tensor([5, 3, 3, 8, 9]), torch.full((5,), 3)]
    assert_equal(model(torch.stack(sequences)).logits, pooled_scores(model, sequences))


@either_way
def test_a_dense_batch_needs_neither_mask_nor_padding_token(causal):
    model, ids = head_model("sequence", causal), tokens(4, 11)
    assert model.config.pad_token_id is None
    assert_equal(model(ids).logits, pooled_scores(model, list(ids)))
    assert_equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, pooled_scores(model, list(ids)))


@either_way
def test_a_row_that_is_all_padding_gets_finite_scores(causal):
    model = head_model("sequence", causal)
    mask = torch.tensor([[1] * 9, [0] * 9])
    logits = model(tokens(2, 9), attention_mask=mask).logits
    assert logits.isfinite().all()


def test_a_causal_classifier_reads_on_from_a_cache():
    model, ids = head_model("sequence", True), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    past = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=past)
    out = model(ids[:, 12:], attention_mask=mask, past_key_values=past)
    assert out.past_key_values is past
    assert_equal(out.logits, pooled_scores(model, [ids[0], ids[1, :17]]))


PACKED = {
    "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] * 6])},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 4, 10])},
    "position_ids": {"position_ids": torch.tensor([[*range(4), *range(6)]])},
}


@pytest.mark.parametrize("head", ["sequence", "question"])
@pytest.mark.parametrize("described_by", PACKED)
def test_one_answer_a_row_is_refused_for_rows_of_several_documents(head, described_by):
    with pytest.raises(ValueError, match=f"{HEADS[head][0].__name__} gives one answer a row"):
        head_model(head)(tokens(1, 10), **PACKED[described_by])


# losses of sequences

PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression to several numbers": (2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 3.0]])),
    "single_label_classification": (4, torch.tensor([3, -100, 0])),
    "multi_label_classification": (2, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.5]])),
}


def expected_loss(problem, logits, labels):
    if problem == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels)
    if problem == "multi_label_classification":
        chances = logits.sigmoid()
        return -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean()
    return (logits.view(labels.shape) - labels).square().mean()


@pytest.mark.parametrize("told", [True, False], ids=["problem named", "problem guessed"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_sequences_is_that_of_the_problem(problem, told):
    count, labels = PROBLEMS[problem]
    named = problem.split()[0] if told or problem == "regression to several numbers" else None
    model = head_model("sequence", num_labels=count, problem_type=named)
    _, ids, mask = padded("holes")
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.loss.item() == pytest.approx(expected_loss(problem, out.logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_parts_of_a_batch_adds_up_to_that_of_the_whole(problem):
    count, labels = PROBLEMS[problem]
    model = head_model("sequence", num_labels=count, problem_type=problem.split()[0])
    ids, items = tokens(3, 9), (labels != -100).sum()
    whole = model(ids, labels=labels).loss
    parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=items).loss for rows in ([0, 1], [2])]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_whole_numbers_serve_as_numbers_and_as_several_labels():
    ids = tokens(2, 9)
    model = head_model("sequence", num_labels=1, dtype=torch.bfloat16)
    exact = (model(ids).logits.float().flatten() - torch.tensor([1.0, 0.0])).square().mean()
    assert model(ids, labels=torch.tensor([1, 0])).loss.item() == pytest.approx(exact.item(), rel=1e-6)
    model = head_model("sequence", num_labels=2, problem_type="multi_label_classification")
    several = torch.tensor([[1, 0], [1, 1]])
    assert torch.equal(model(ids, labels=several).loss, model(ids, labels=several.double()).loss)


WRONG_SEQUENCE_LABELS = [
    ({"num_labels": 3}, torch.tensor([0, 3, 1]), "labels hold 3, outside the num_labels of 3"),
    ({"num_labels": 3}, torch.tensor([0, -1, 1]), "labels hold -1"),
    ({"num_labels": 3}, torch.tensor([0, 1]), r"shape \(2,\).*single_label_classification.*\(3,\) or \(3, 1\)"),
    ({"num_labels": 3}, torch.tensor([0.0, 1.0, 1.0]), r"multi_label_classification with 3 labels.*\(3, 3\)"),
    ({"num_labels": 1}, torch.zeros(3, 2), r"regression with 1 labels.*\(3,\)"),
    ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.zeros(3), "whole numbers"),
    ({"num_labels": 3}, torch.full((3, 3), 2.0), "from 0 to 1, got 2.0"),
]


@pytest.mark.parametrize(("changes", "labels", "message"), WRONG_SEQUENCE_LABELS)
def test_labels_of_sequences_that_do_not_fit_are_refused(changes, labels, message):
    with pytest.raises(ValueError, match=message):
        head_model("sequence", **changes)(tokens(3, 9), labels=labels)


# tokens


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@pytest.mark.parametrize("head", ["masked", "token"])
def test_tokens_get_the_scores_and_the_loss_of_the_sequences_alone(head, kind):
    model = head_model(head, num_labels=5)
    sequences, ids, mask = padded(kind)
    labels = torch.randint(0, 5, ids.shape)
    labels[0, mask[0].nonzero()[3]] = -100
    out = model(ids, attention_mask=mask, labels=labels)
    alone = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
    real = mask.bool()
    assert_equal(out.logits[real], alone)
    assert out.loss.item() == pytest.approx(nn.functional.cross_entropy(alone, labels[real]).item(), rel=1e-6)


@pytest.mark.parametrize("head", ["masked", "token"])
def test_packed_tokens_get_the_scores_of_their_documents(head):
    model, ids = head_model(head), tokens(1, 10)
    alone = torch.cat([model(part).logits for part in ids.split([4, 6], dim=1)], dim=1)
    for description in PACKED.values():
        assert_equal(model(ids, **description).logits, alone)


@pytest.mark.parametrize("head", ["masked", "token"])
def test_the_loss_of_tokens_is_divided_by_the_items_of_the_whole_batch(head):
    model, ids = head_model(head), tokens(2, 10)
    labels = ids % 2
    mean, shared = (model(ids, labels=labels, **kwargs).loss for kwargs in ({}, {"num_items_in_batch": 40}))
    assert shared.item() == pytest.approx(mean.item() / 2, rel=1e-6)


@pytest.mark.parametrize("head", ["masked", "token"])
def test_labels_of_tokens_that_do_not_fit_are_refused(head):
    model, ids = head_model(head), tokens(2, 10)
    for wrong in (97, -1):
        labels = torch.zeros_like(ids)
        labels[1, 3] = wrong
        with pytest.raises(ValueError, match=f"labels hold {wrong}, outside"):
            model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 9\), but the batch \(2, 10\)"):
        model(ids, labels=torch.zeros(2, 9, dtype=torch.long))


# answers


@either_way
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_answers_get_the_scores_and_the_loss_of_the_sequences_alone(causal, kind):
    model = head_model("question", causal)
    sequences, ids, mask = padded(kind)
    inside = torch.tensor([[3, 9], [0, 4], [12, 12]])
    columns = torch.stack([mask[row].nonzero().flatten()[inside[row]] for row in range(3)])
    out = model(ids, attention_mask=mask, start_positions=columns[:, 0], end_positions=columns[:, 1])
    losses = []
    for row, sequence in enumerate(sequences):
        alone = model(sequence[None])
        for side, logits in enumerate((alone.start_logits, alone.end_logits)):
            got = (out.start_logits, out.end_logits)[side][row]
            assert_equal(got[mask[row].bool()], logits[0])
            assert got.softmax(-1)[mask[row] == 0].eq(0).all()
            losses.append(nn.functional.cross_entropy(logits, inside[row, side][None]))
    assert out.loss.item() == pytest.approx((sum(losses) / 6).item(), rel=1e-6)


def test_an_answer_that_was_cut_off_bears_no_loss():
    model, ids = head_model("question"), tokens(2, 9)
    some = model(ids, start_positions=torch.tensor([4, -100]), end_positions=torch.tensor([5, -100])).loss
    first = model(ids[:1], start_positions=torch.tensor([[4]]), end_positions=torch.tensor([[5]])).loss
    assert some.item() == pytest.approx(first.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([4, 9], [5, 5], "start_positions holds 9, outside the 9 columns"),
        ([4, 4], [5, -1], "end_positions holds -1"),
        ([4, 4], [5, 8], "end_positions points at column 8, which is masked"),
        ([4, 4, 4], [5, 5], r"start_positions must have shape \(2,\)"),
        ([4, 4], None, "end_positions is missing"),
    ],
)
def test_positions_that_do_not_fit_are_refused(start, end, message):
    mask = torch.ones(2, 9)
    mask[1, 8] = 0
    positions = {"start_positions": torch.tensor(start), "end_positions": None if end is None else torch.tensor(end)}
    with pytest.raises(ValueError, match=message):
        head_model("question")(tokens(2, 9), attention_mask=mask, **positions)


# storage


def new_tensors(head, folder, **kwargs):
    """A head loaded from a folder, and the names of the tensors that the folder did not hold."""
    model, info = HEADS[head][1].from_pretrained(folder, output_loading_info=True, **kwargs)
    assert type(model) is HEADS[head][0]
    return model, set(info["missing_keys"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", CLASSIFIERS)
@pytest.mark.parametrize("source", ["base", "causal language model", "masked language model"])
def test_a_head_loads_from_any_body_and_only_the_head_is_new(head, source, tied, tmp_path):
    kinds = {"base": HyenaModel, "causal language model": HyenaForCausalLM, "masked language model": HyenaForMaskedLM}
    stored = new_model(kind=kinds[source], is_causal=source != "masked language model", tie_word_embeddings=tied)
    stored.save_pretrained(tmp_path)
    model, missing = new_tensors(head, tmp_path, num_labels=5)
    assert missing == NEW[head]
    body = stored if source == "base" else stored.model
    assert body.state_dict().keys() == model.model.state_dict().keys()
    for key, tensor in body.state_dict().items():
        assert torch.equal(model.model.state_dict()[key], tensor), key
    weight = model.get_parameter("qa_outputs.weight" if head == "question" else "score.weight")
    assert 0.01 < weight.std().item() < 0.03


def test_a_masked_language_model_loads_from_a_bidirectional_body_alone(tmp_path):
    new_model(kind=HyenaModel, is_causal=False).save_pretrained(tmp_path / "both")
    model, missing = new_tensors("masked", tmp_path / "both")
    assert missing == set()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    new_model().save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="set is_causal=False, or use HyenaForCausalLM"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"no complete checkpoint.*reverse_"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "causal", is_causal=False, use_cache=False)
    with pytest.raises(ValueError, match="use HyenaForMaskedLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "both")


@every_head
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_head_comes_back_bit_by_bit_with_its_labels(head, causal, dtype, tmp_path):
    if head == "masked" and causal:
        pytest.skip("sees both sides only")
    model = head_model(head, causal, dtype, id2label={0: "no", 1: "yes", 2: "perhaps"})
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded, missing = new_tensors(head, tmp_path, dtype=dtype)
    assert missing == set()
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert tensor.dtype == (torch.float32 if ".filter." in key else dtype), key


# what transformers asks of models


@every_head
def test_a_head_returns_a_tuple_and_hidden_states_when_asked(head):
    model, ids = head_model(head), tokens(2, 7)
    out = model(ids, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 7, 32)] * 4
    values = model(ids, return_dict=False)
    assert len(values) == (2 if head == "question" else 1)
    assert torch.equal(values[0], out[0])


@every_head
def test_a_head_makes_no_cache_unless_asked(head):
    assert "past_key_values" not in head_model(head)(tokens(1, 5))
    if head == "sequence":
        assert head_model(head, True)(tokens(1, 5)).past_key_values is None
        assert head_model(head, True)(tokens(1, 5), use_cache=True).past_key_values is not None
    with pytest.raises(ValueError, match="bidirectional model"):
        head_model(head)(tokens(1, 5), use_cache=True)


@every_head
def test_every_parameter_of_a_head_has_a_policy(head):
    policy = head_model(head).parameter_policy()
    own = {name: rule for name, rule in policy.items() if not name.startswith("model.")}
    assert own == {name: (name.endswith("weight"), "base") for name in NEW[head]}


LABELS = {
    "masked": {"labels": [1] * 8},
    "sequence": {"labels": 1},
    "token": {"labels": [1] * 8},
    "question": {"start_positions": 2, "end_positions": 3},
}


@every_head
def test_the_stock_trainer_trains_a_head(head, tmp_path):
    model = head_model(head, dtype=torch.float32, num_hidden_layers=1)
    rows = [{"input_ids": tokens(8, seed=row).tolist(), **LABELS[head]} for row in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("head", CLASSIFIERS)
def test_a_head_compiles_and_exports(head):
    torch.compiler.reset()
    model, ids = head_model(head, dtype=torch.float32, num_hidden_layers=1).requires_grad_(False), tokens(2, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=250)}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": sizes})
    other = tokens(3, 31)
    torch.testing.assert_close(program.module()(input_ids=other)[0], model(other)[0], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# pipelines


def saved(tmp_path, head, kind=None, **changes):
    """A tiny model over bytes and its tokenizer, in a folder."""
    tokenizer = HyenaByteTokenizer(add_bos_token=False, add_eos_token=False)
    causal = kind is HyenaModel
    kind = kind or HEADS[head][0]
    model = new_model(kind=kind, is_causal=causal, vocab_size=260, pad_token_id=256, **changes)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, tokenizer


TEXTS = ["a long Hyena text", "short", "ümlaut"]


def test_the_text_classification_pipeline_scores_each_text_as_if_alone(tmp_path):
    model, _ = saved(tmp_path, "sequence", num_labels=3)
    classify = pipeline("text-classification", str(tmp_path), top_k=None, batch_size=3)
    for text, labels in zip(TEXTS, classify(TEXTS), strict=True):
        chances = model(torch.tensor([list(text.encode())])).logits[0].softmax(-1)
        for label in labels:
            assert label["score"] == pytest.approx(chances[model.config.label2id[label["label"]]].item(), abs=1e-5)


def test_the_token_classification_pipeline_names_every_byte(tmp_path):
    model, _ = saved(tmp_path, "token", num_labels=3)
    classify = pipeline("token-classification", str(tmp_path), ignore_labels=[], batch_size=3)
    for text, entities in zip(TEXTS, classify(TEXTS), strict=True):
        expected = model(torch.tensor([list(text.encode())])).logits[0].argmax(-1).tolist()
        assert [model.config.label2id[entity["entity"]] for entity in entities] == expected
        assert entities[-1]["end"] == len(text)


def test_the_fill_mask_pipeline_fills_a_mask(tmp_path):
    model, tokenizer = saved(tmp_path, "masked")
    # user text that spells a special token is bytes; this text is ours
    fill = pipeline("fill-mask", str(tmp_path), tokenizer=HyenaByteTokenizer(
        add_bos_token=False, add_eos_token=False, split_special_tokens=False
    ))  # fmt: skip
    (best, *_) = fill(f"hy{tokenizer.mask_token}na")
    ids = torch.tensor([[*b"hy", tokenizer.mask_token_id, *b"na"]])
    chances = model(ids).logits[0, 2].softmax(-1)
    assert best["token"] == chances.argmax().item()
    assert best["score"] == pytest.approx(chances.max().item(), rel=1e-4)


def test_the_feature_extraction_pipeline_returns_hidden_states(tmp_path):
    model, _ = saved(tmp_path, "sequence", kind=HyenaModel)
    extract = pipeline("feature-extraction", str(tmp_path), return_tensors=True)
    for text in TEXTS:
        ids = torch.tensor([list(text.encode())])
        torch.testing.assert_close(extract(text), model(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_whole_numbers_give_the_loss_of_int64_ones(dtype):
    ids, rows = tokens(3, 6), torch.tensor([0, 2, 1])
    cases = [(HyenaForSequenceClassification, True, rows), (HyenaForTokenClassification, True, ids % 3)]
    for head, causal, labels in [*cases, (HyenaForMaskedLM, False, ids)]:
        torch.manual_seed(0)
        model = head(config_of("order 2", is_causal=causal, num_labels=3)).eval()
        assert torch.equal(model(ids, labels=labels.to(dtype)).loss, model(ids, labels=labels).loss)
    with pytest.raises(TypeError, match=r"labels must be whole numbers, got torch\.float32"):
        model(ids, labels=ids.float())
