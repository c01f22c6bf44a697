"""Fine-tuning: only what should be trained is, losses are those of whole steps, the best model is kept, and a run that
was killed ends as one that was not.

Run: python -m pytest tests/test_finetune.py -q
"""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from hyena_hf import (
    HyenaConfig,
    HyenaForCausalLM,
    HyenaForSequenceClassification,
    HyenaForTokenClassification,
    HyenaNucleotideTokenizer,
)
from training import fine_tuner
from training.adapters import add_lora, freeze_backbone, lora_targets
from training.data import pack_documents
from training.fine_tuner import (
    EarlyStopping,
    FineTuneData,
    FineTuner,
    FineTuneRecipe,
    balanced_weights,
    fine_tune,
    split_rows,
    weighted_loss,
)
from training.finetune import load_tokenizer, main, parse_arguments, usable_length
from training.metrics import classification_metrics, confusion, language_metrics, row_losses
from training.sequences import PaddingCollator, encode_sequences
from training.tasks import Example
from training.trainer import StepClock
from training.warmup import Stage, StepBatches


DNA = HyenaNucleotideTokenizer()
HEADS = {
    "sequence": HyenaForSequenceClassification,
    "token": HyenaForTokenClassification,
    "lm": HyenaForCausalLM,
}
SHAPE = dict(
    vocab_size=12, hidden_size=16, num_hidden_layers=2, intermediate_size=16, max_position_embeddings=32,
    pad_token_id=4, filter_num_bands=2, filter_hidden_size=8, layer_types=["hyena", "full_attention"],
    num_attention_heads=2,
)  # fmt: skip


def tiny(task="sequence", **changes):
    set_seed(1)
    return HEADS[task](HyenaConfig(**{**SHAPE, **({} if task == "lm" else {"num_labels": 3}), **changes}))


def examples(count, seed, per_token=False):
    """Sequences with a class that the first letters give away, most of them of class 0."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = draw.choice([0, 0, 0, 1, 2])
        sequence = "ACG"[label] * 4 + "".join(draw.choice("ACGT") for _ in range(draw.randint(2, 12)))
        labels = tuple("ACGT".index(letter) % 3 for letter in sequence)
        rows.append(Example(str(number), sequence, labels if per_token else label))
    return rows


def encoded(count, seed, per_token=False):
    return encode_sequences(examples(count, seed, per_token), DNA, length=32, special_tokens=False)[0]


def data_of(task="sequence"):
    if task == "lm":
        ids = [DNA(example.sequence, add_special_tokens=False).input_ids for example in examples(40, 0)]
        return FineTuneData(pack_documents(ids, 16), pack_documents(ids[:9], 16))
    return FineTuneData(*(encoded(count, seed, task == "token") for count, seed in ((24, 0), (10, 1), (8, 2))))


RECIPE = FineTuneRecipe(
    "sequence", (Stage(4, steps=6),), learning_rate=1e-2, evaluate_every=2, class_weights=(0.5, 1.0, 2.0)
)


def recipe_of(task, **changes):
    weights = None if task == "lm" else RECIPE.class_weights
    return FineTuneRecipe(**{**vars(RECIPE), "task": task, "class_weights": weights, **changes})


def run(output_dir, recipe=RECIPE, model=None, **kwargs):
    model = tiny(recipe.task) if model is None else model
    return fine_tune(model, data_of(recipe.task), output_dir=Path(output_dir), recipe=recipe, tokenizer=DNA, **kwargs)


def stored(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# metrics


def hand_mcc(confused):
    """Gorodkin 2004, equation for K classes."""
    total = sum(map(sum, confused))
    right = sum(confused[k][k] for k in range(len(confused)))
    truth, guess = [sum(row) for row in confused], [sum(column) for column in zip(*confused, strict=True)]
    numerator = right * total - sum(t * g for t, g in zip(truth, guess, strict=True))
    return numerator / math.sqrt((total**2 - sum(g * g for g in guess)) * (total**2 - sum(t * t for t in truth)))


def test_metrics_are_those_of_the_formulas():
    truth, guess = [0, 0, 0, 1, 1, 2, 2, 2, 2, -100], [0, 0, 1, 1, 0, 2, 2, 1, 2, 1]
    scores = classification_metrics([guess], [truth])
    confused = confusion(guess, truth, 3)
    assert confused == [[2, 1, 0], [1, 1, 0], [0, 1, 3]]
    assert scores["mcc"] == pytest.approx(hand_mcc(confused), abs=1e-12)
    assert scores["accuracy"] == pytest.approx(6 / 9)
    f1 = [2 * confused[k][k] / (sum(confused[k]) + sum(row[k] for row in confused)) for k in range(3)]
    assert scores["f1"] == pytest.approx(sum(f1) / 3)


def test_predictions_of_one_class_have_no_correlation():
    assert classification_metrics([1, 1, 1], [0, 1, 1])["mcc"] == 0
    assert classification_metrics([1, 1, 1], [0, 1, 1])["f1"] == pytest.approx((0 + 0.8) / 2)


def test_metrics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="none of the 2 labels counts"):
        classification_metrics([1, 1], [-100, -100])
    with pytest.raises(ValueError, match=r"predictions have shape \(2,\), labels \(3,\)"):
        classification_metrics([1, 1], [1, 1, 0])


def test_bits_do_not_depend_on_how_rows_are_batched():
    logits, labels = torch.randn(5, 7, 11, dtype=torch.float64), torch.randint(0, 11, (5, 7))
    labels[1, 3], labels[4] = -100, -100
    whole = language_metrics(row_losses(logits, labels).numpy())
    parts = torch.cat([row_losses(logits[rows], labels[rows]) for rows in ([0, 1, 2], [3], [4])])
    logs = logits.float().double().log_softmax(-1)
    hand = [-float(logs[b, t, labels[b, t + 1]]) for b in range(5) for t in range(6) if labels[b, t + 1] != -100]
    assert whole["bits"] == pytest.approx(sum(hand) / len(hand) / math.log(2), rel=1e-6)
    assert language_metrics(parts.numpy()) == whole


# losses


def test_a_weighted_loss_is_that_of_the_sum_over_labels():
    logits, labels = torch.randn(4, 6, 3), torch.randint(0, 3, (4, 6))
    labels[2, 1:] = -100
    weights, logs = [0.5, 1.0, 2.0], logits.double().log_softmax(-1)
    pairs = [(b, t) for b in range(4) for t in range(6) if labels[b, t] >= 0]
    total = sum(weights[labels[b, t]] for b, t in pairs)
    hand = sum(-weights[labels[b, t]] * logs[b, t, labels[b, t]] for b, t in pairs) / total
    weighed = torch.tensor(weights, dtype=torch.float64)
    for divisor in (None, torch.tensor(total)):
        assert weighted_loss(logits, labels, weighed, divisor).item() == pytest.approx(hand.item(), rel=1e-6)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])], ids=["plain", "weighted"])
@pytest.mark.parametrize("total", [None, torch.tensor(0.0)], ids=["evaluation", "step"])
def test_labels_that_all_bear_no_loss_give_zero_and_no_gradient(weights, total):
    logits = torch.randn(4, 6, 3, requires_grad=True)
    loss = weighted_loss(logits, torch.full((4, 6), -100), weights, total)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 6, 3))


def test_balanced_weights_give_every_class_the_same_total():
    counts = torch.tensor([6, 3, 1])
    assert balanced_weights(counts) == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    assert sum(balanced_weights(counts)[k] * int(counts[k]) for k in range(3)) == pytest.approx(10)
    with pytest.raises(ValueError, match=r"classes without training labels .* \[6, 0, 1\]"):
        balanced_weights(torch.tensor([6, 0, 1]))


def trainer_of(task, tmp_path, accumulation=1, **changes):
    rows = encoded(12, 5, task == "token")
    recipe = recipe_of(task, **changes)
    arguments = TrainingArguments(
        str(tmp_path), gradient_accumulation_steps=accumulation, report_to="none", use_cpu=True,
        dataloader_pin_memory=False, label_names=["labels"],
    )  # fmt: skip
    batches = StepBatches([rows], recipe.stages, seed=0)
    trainer = FineTuner(tiny(task).double(), arguments, recipe=recipe, batches=batches, train_dataset=rows)
    return trainer, PaddingCollator(4, "left")([rows[row] for row in range(8)])


def hand_gradient(model, batch, weights):
    """Of the loss of a step, row by row without padding."""
    total, loss = 0.0, 0.0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = mask.bool()
        logs = model(input_ids=ids[real][None]).logits[0].log_softmax(-1).reshape(-1, 3)
        for log, label in zip(logs, labels[real] if labels.ndim else labels[None], strict=True):
            loss = loss - weights[label] * log[label]
            total += weights[label]
    return torch.autograd.grad(loss / total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize("task", ["sequence", "token"])
@pytest.mark.parametrize("tokens_per_pass", [None, 40, 1])
def test_the_gradient_of_a_step_does_not_depend_on_its_passes_or_padding(tmp_path, task, tokens_per_pass):
    trainer, batch = trainer_of(task, tmp_path, tokens_per_pass=tokens_per_pass)
    expected = hand_gradient(trainer.model, batch, RECIPE.class_weights)
    trainer.model.eval()  # as it is after an evaluation, when Trainer counts
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch, items)
    for parameter, gradient in zip(trainer.model.parameters(), expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


def test_class_weights_are_right_under_the_gradient_accumulation_of_trainer(tmp_path):
    trainer, batch = trainer_of("sequence", tmp_path, accumulation=2)
    expected = hand_gradient(trainer.model, batch, RECIPE.class_weights)
    trainer.model.eval()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 6), slice(6, 8))]
    items = trainer._get_num_items_in_batch(parts, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 2
    for part in parts:
        trainer.training_step(trainer.model, part, items)
    torch.testing.assert_close(trainer.model.score.weight.grad, expected[-1], rtol=1e-6, atol=1e-9)


def test_evaluation_leaves_the_class_weights_out(tmp_path):
    trainer, batch = trainer_of("sequence", tmp_path)
    trainer.model.eval()
    loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    plain = torch.nn.functional.cross_entropy(trainer.model(**{**batch, "labels": None}).logits, batch["labels"])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_passes_hold_so_many_tokens_and_at_least_a_row():
    batch = {"input_ids": torch.zeros(7, 10), "labels": torch.arange(7)}
    sizes = [[len(part["labels"]) for part in split_rows(batch, tokens)] for tokens in (None, 70, 69, 25, 3)]
    assert sizes == [[7], [7], [6, 1], [2, 2, 2, 1], [1] * 7]


# runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_a_run_leaves_model_metrics_plot_and_result(whole):
    folder, result = whole
    names = {path.name for path in folder.iterdir()}
    assert {"model", "metrics.jsonl", "curves.png", "finetune.json", "result.json"} <= names
    assert json.loads((folder / "result.json").read_text())["test"] == result.test
    assert [step for step, _ in result.validation_curves["mcc"]] == [2, 4, 6]
    assert sum(map(sum, result.test["confusion"])) == 8
    assert {"mcc", "f1", "accuracy", "loss", "confusion"} == result.test.keys()
    assert result.stages[0]["epochs"] == 1
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(epochs) == 1


def test_the_saved_model_is_the_best_checkpoint_and_gives_the_reported_scores(whole):
    folder, result = whole
    best = max(result.validation_curves["mcc"], key=lambda point: (point[1], -point[0]))
    assert best == [result.best_step, result.validation["mcc"]]
    assert same(stored(folder / "model"), stored(folder / f"checkpoint-{result.best_step}"))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    guess = [
        int(model(torch.tensor([tokenizer(row.sequence, add_special_tokens=False).input_ids])).logits.argmax())
        for row in examples(10, 1)
    ]
    truth = [row.label for row in examples(10, 1)]
    assert classification_metrics(guess, truth)["mcc"] == pytest.approx(result.validation["mcc"], abs=1e-9)


def test_a_finished_run_is_read_back_without_training(whole, monkeypatch):
    folder, result = whole
    monkeypatch.setattr(FineTuner, "train", None)
    assert run(folder) == result


def test_a_folder_of_another_run_is_refused_with_the_difference(whole):
    with pytest.raises(ValueError, match=r"holds another run: class_weights \(\[0.5, 1.0, 2.0\] there, None now\)"):
        run(whole[0], recipe_of("sequence", class_weights=None))


def other_weights():
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] += 1e-6
    return model


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (other_weights, "weights_digest"),
        (lambda: tiny(norm_eps=1e-3), "config_digest"),
    ],
)
def test_a_finished_run_of_another_pretrained_model_is_refused(whole, model, key):
    with pytest.raises(ValueError, match=f"holds another run: {key} "):
        run(whole[0], model=model())


@pytest.mark.parametrize("test", [encoded(8, 9), None], ids=["other rows", "none"])
def test_a_finished_run_is_not_read_back_for_another_test_split(whole, test):
    data = data_of()
    other = FineTuneData(data.train, data.validation, test)
    with pytest.raises(ValueError, match="holds another run: test_digest "):
        fine_tune(tiny(), other, output_dir=whole[0], recipe=RECIPE, tokenizer=DNA)


def test_a_finished_run_is_not_read_back_for_other_names_of_the_classes(whole):
    model = tiny()
    model.config.id2label = {0: "b", 1: "a", 2: "c"}
    with pytest.raises(ValueError, match=r"id2label \(.* there, \{'0': 'b', '1': 'a', '2': 'c'\} now\)"):
        run(whole[0], model=model)


def test_a_finished_run_that_merged_its_model_is_not_read_back_for_an_adapter_alone(whole):
    with pytest.raises(ValueError, match=r"holds another run: keep_merged \(True there, False now\)"):
        run(whole[0], keep_merged=False)


def interrupt_after_step_5(clock, args, state, control, **kwargs):  # noqa: ARG001 (a callback's signature)
    if state.global_step == 5:
        raise KeyboardInterrupt


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from test_finetune import FineTuner, run

torch.set_num_threads(1)

def slow_save(self, output_dir):
    print("saving", flush=True)
    time.sleep(600)

original = FineTuner._save_rng_state
FineTuner._save_rng_state = lambda self, d: (slow_save if self.state.global_step == 4 else original)(self, d)
run(Path({output_dir!r}))
"""


def test_a_run_killed_during_a_save_resumes_to_the_weights_and_scores_of_one_that_was_not(tmp_path, whole):
    tests = Path(__file__).parent
    script = KILLED.format(tests=str(tests), root=str(tests.parent), output_dir=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "saving\n"
        child.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    result = run(tmp_path)
    folder, expected = whole
    assert same(stored(tmp_path / "checkpoint-6"), stored(folder / "checkpoint-6"))
    assert same(stored(tmp_path / "model"), stored(folder / "model"))
    assert (result.validation_curves, result.loss_curve) == (expected.validation_curves, expected.loss_curve)
    assert result.test == expected.test


@pytest.mark.parametrize("kept", [True, False], ids=["merged", "adapter only"])
def test_a_lora_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path, monkeypatch, kept):
    expected = run(tmp_path / "whole", model=add_lora(tiny(), "sequence", 2), keep_merged=kept)
    with monkeypatch.context() as patch:
        patch.setattr(StepClock, "on_step_end", interrupt_after_step_5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", model=add_lora(tiny(), "sequence", 2), keep_merged=kept)
    result = run(tmp_path / "parts", model=add_lora(tiny(), "sequence", 2), keep_merged=kept)
    assert result.validation_curves == expected.validation_curves
    adapters = [load_file(tmp_path / part / "adapter" / "adapter_model.safetensors") for part in ("whole", "parts")]
    assert same(*adapters)
    assert (tmp_path / "parts" / "model").exists() == kept
    assert Path(result.model_dir).name == ("model" if kept else "adapter")


def scripted(values):
    scores = iter(values)
    return lambda predictions, labels: {"mcc": next(scores), "f1": 0.0, "accuracy": 0.0}  # noqa: ARG005


def test_early_stopping_keeps_the_best_model(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.1, 0.5, 0.4, 0.5, 0.9]))
    result = run(tmp_path, recipe_of("sequence", stages=(Stage(4, steps=40),), patience=2))
    assert result.stopped_early
    assert (result.steps, result.best_step) == (8, 4)
    assert result.validation["mcc"] == 0.5
    assert same(stored(tmp_path / "model"), stored(tmp_path / "checkpoint-4"))
    assert not same(stored(tmp_path / "model"), stored(tmp_path / "checkpoint-8"))


def test_a_run_killed_after_it_stopped_early_only_finishes(tmp_path, monkeypatch):
    recipe = recipe_of("sequence", stages=(Stage(4, steps=40),), patience=1)
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.5, 0.4, 0.9]))
    expected = run(tmp_path, recipe)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.9]))
    monkeypatch.setattr(FineTuner, "train", None)
    assert run(tmp_path, recipe) == expected
    assert same(stored(tmp_path / "model"), stored(tmp_path / "checkpoint-2"))


def moved(begun, there):
    """The folder of a run that was begun elsewhere and lacks its last act."""
    shutil.move(begun, there)
    (there / "result.json").unlink(missing_ok=True)
    shutil.rmtree(there / "model", ignore_errors=True)
    return there


def test_a_run_that_was_moved_before_its_result_was_written_publishes_its_best_model(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.5, 0.4, 0.3, 0.9]))
    expected = run(tmp_path / "before")
    there = moved(tmp_path / "before", tmp_path / "after")
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.9]))
    result = run(there)
    assert same(stored(there / "model"), stored(there / "checkpoint-2"))
    assert result.test == expected.test


def test_a_run_that_was_moved_after_an_interruption_still_publishes_its_best_model(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.5, 0.4, 0.3, 0.9]))
    with monkeypatch.context() as patch:
        patch.setattr(StepClock, "on_step_end", interrupt_after_step_5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "before")
    there = moved(tmp_path / "before", tmp_path / "after")
    assert run(there).best_step == 2
    assert same(stored(there / "model"), stored(there / "checkpoint-2"))


def test_a_run_whose_best_checkpoint_is_gone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuner, "classification_metrics", scripted([0.5, 0.4, 0.3, 0.9]))
    run(tmp_path / "before")
    there = moved(tmp_path / "before", tmp_path / "after")
    shutil.rmtree(there / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match=r"after holds no weights in checkpoint-2, the best checkpoint"):
        run(there)


def test_a_finished_run_that_was_moved_names_its_model_where_it_is(tmp_path):
    run(tmp_path / "before")
    shutil.move(tmp_path / "before", tmp_path / "after")
    assert run(tmp_path / "after").model_dir == str(tmp_path / "after" / "model")


@pytest.mark.parametrize(("metric", "values"), [("mcc", [1, 3, 2, 3]), ("loss", [3, 1, 2, 1])])
def test_training_stops_when_nothing_was_better_for_so_long(metric, values):
    history = [{"step": step, f"eval_{metric}": value, "loss": 0} for step, value in enumerate(values)]
    assert [EarlyStopping(metric, patience).is_over(history) for patience in (1, 2, 3)] == [True, True, False]
    assert not EarlyStopping(metric, 1).is_over([])


# what is trained


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_a_frozen_backbone_changes_only_the_head(tmp_path, task):
    model = tiny(task)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    freeze_backbone(model)
    run(tmp_path, recipe_of(task), model)
    after = stored(tmp_path / "model")
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in before if name.startswith("score")}


def test_nothing_is_left_to_train_where_the_output_matrix_is_the_embedding():
    with pytest.raises(ValueError, match="HyenaForCausalLM has no parameter outside its body"):
        freeze_backbone(tiny("lm"))


def test_adapters_stand_on_the_layers_that_were_named():
    model = tiny()
    assert lora_targets(model, ["hyena"]) == ["model.layers.0.mixer.in_proj", "model.layers.0.mixer.out_proj"]
    attention = [f"model.layers.1.mixer.{name}_proj" for name in ("q", "k", "v", "out")]
    assert lora_targets(model, ["attention"]) == attention
    assert lora_targets(model, ["mlp"]) == [
        f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("up", "down")
    ]
    adapted = add_lora(model, "sequence", 2, ["hyena"])
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora")[0].split(".")[-1] for name in trained if "lora" in name} == {"in_proj", "out_proj"}
    assert not [name for name in trained if "layers.1" in name]
    assert [name for name in trained if "lora" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]


def test_adapters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="LoRA parts must be some of hyena, attention, mlp, got filter"):
        lora_targets(tiny(), ["filter"])
    with pytest.raises(ValueError, match="HyenaForSequenceClassification has no attention layers"):
        lora_targets(tiny(layer_types=["hyena", "hyena"]), ["attention"])
    with pytest.raises(ValueError, match="rank of LoRA must be at least 1, got 0"):
        add_lora(tiny(), "sequence", 0)


@pytest.mark.parametrize("task", ["sequence", "token", "lm"])
def test_a_merged_model_gives_the_logits_of_the_adapter_without_peft(tmp_path, task):
    run(tmp_path, recipe_of(task), add_lora(tiny(task), task, 4))
    adapted = peft.PeftModel.from_pretrained(tiny(task), tmp_path / "adapter").eval()
    classes = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForCausalLM]
    loaded = dict(zip(HEADS, classes, strict=True))[task].from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(7, 11, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits, rtol=0, atol=1e-6)
        assert (loaded(ids).logits - tiny(task).eval()(ids).logits).abs().max() > 1e-3
    assert not any("lora" in name for name in stored(tmp_path / "model"))
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_filters_do_not_decay_and_have_their_own_rate(tmp_path):
    trainer, _ = trainer_of("sequence", tmp_path)
    trainer.filter_learning_rate = 1e-4
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert groups["filter/no_decay"]["lr"] == 1e-4
    assert "filter/decay" not in groups


def test_mixed_precision_keeps_float32_weights(tmp_path):
    run(tmp_path, recipe_of("sequence", bf16=True, stages=(Stage(4, steps=2),)))
    assert {value.dtype for value in stored(tmp_path / "model").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chat"}, "task must be one of sequence, token, lm, got 'chat'"),
        ({"stages": ()}, "at least one stage"),
        ({"metric": "bits"}, "metric must be one of mcc, f1, accuracy, loss for task sequence, got 'bits'"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"warmup": 1.0}, r"warmup \(1.0\) must be in \[0, 1\)"),
        ({"class_weights": (1.0, -1.0)}, "class weights must be positive and finite"),
        ({"task": "lm", "class_weights": (1.0,)}, "not for task lm"),
    ],
)
def test_recipes_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        FineTuneRecipe(**{**vars(RECIPE), **changes})


def test_data_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        run(tmp_path, recipe_of("sequence", class_weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match="task lm does not take EncodedSequences"):
        fine_tune(tiny("lm"), data_of(), output_dir=tmp_path, recipe=recipe_of("lm"), tokenizer=DNA)
    unpadded = HyenaNucleotideTokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="HyenaNucleotideTokenizer has no padding token"):
        fine_tune(tiny(), data_of(), output_dir=tmp_path, recipe=RECIPE, tokenizer=unpadded)


# the command

FLAGS = frozenset(
    [
        "model",
        "task",
        "data",
        "output",
        "benchmark",
        "tokenizer",
        "length",
        "truncate",
        "special-tokens",
        "pooling",
        "lora",
        "lora-parts",
        "adapter-only",
        "freeze",
        "epochs",
        "batch-size",
        "stages",
        "tokens-per-pass",
        "learning-rate",
        "filter-learning-rate",
        "weight-decay",
        "warmup",
        "class-weights",
        "metric",
        "patience",
        "evaluate-every",
        "bf16",
        "seed",
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model with its tokenizer, and data for it."""
    folder = tmp_path_factory.mktemp("command")
    tiny("lm").save_pretrained(folder / "base")
    DNA.save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for split, count, seed in (("train", 60, 0), ("test", 10, 1)):
        rows = [f"{row.sequence},class {row.label}" for row in examples(count, seed)]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]))
    records = [f">record {row.name}\n{row.sequence * 9}\n" for row in examples(60, 3)]
    (folder / "genome.fna").write_text("".join(records))
    return folder


def command(folder, output, *arguments, task="sequence", data="data"):
    base = [folder / "base", "--task", task, "--data", folder / data, "--output", output]
    main([str(word) for word in (*base, *arguments)])


def test_the_flags_are_28_and_frozen():
    options = parse_arguments(["m", "--task", "lm", "--data", "d", "--output", "o"])
    assert {name.replace("_", "-") for name in vars(options)} == FLAGS
    assert len(FLAGS) == 28


def test_the_command_trains_a_classifier_that_loads(folder, tmp_path, capsys):
    arguments = ["--epochs", "1", "--batch-size", "16", "--pooling", "mean", "--class-weights", "balanced"]
    command(folder, tmp_path, *arguments, "--metric", "f1", "--tokens-per-pass", "64")
    assert "best by f1 at step" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert model.config.classifier_pooling == "mean"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["data"]["classes"] == ["class 0", "class 1", "class 2"]
    assert result["data"]["validation_from_training"]
    counts = result["data"]["training_labels"]
    weights = json.loads((tmp_path / "finetune.json").read_text())["class_weights"]
    assert weights == pytest.approx([sum(counts) / 3 / count for count in counts])


def test_the_command_adapts_a_language_model_to_a_genome(folder, tmp_path):
    stages = ["--stages", "2:8:8", "2:16:4", "--lora", "2", "--lora-parts", "hyena", "--length", "16"]
    command(folder, tmp_path, *stages, task="lm", data="genome.fna")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [stage["length"] for stage in result["stages"]] == [8, 16]
    assert result["metric"] == "bits"
    assert 0 < result["validation"]["bits"] < 10
    assert result["data"]["documents"]["train"] + result["data"]["documents"]["validation"] == 60
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 12


def test_sequences_longer_than_the_model_are_refused_unless_they_may_be_cut(folder, tmp_path):
    with pytest.raises(ValueError, match=r"of \d+ sequences have more than 8 tokens \(the longest 16\)"):
        command(folder, tmp_path, "--length", "8")
    command(folder, tmp_path, "--length", "8", "--truncate", "--epochs", "0.1", "--freeze", "backbone")
    truncated = json.loads((tmp_path / "result.json").read_text())["data"]["truncated"]
    assert truncated["test"] == sum(len(row.sequence) > 8 for row in examples(10, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "2:8:8", "--epochs", "2"], "leave --epochs and --batch-size out"),
        (["--lora", "2", "--freeze", "backbone"], "leave --freeze out"),
        (["--adapter-only"], "are for --lora RANK"),
        (["--task", "lm", "--truncate"], "--task lm has none"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["m", "--task", "sequence", "--data", "d", "--output", "o", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-weights", "1", "2"], "--class-weights has 2 numbers for 3 classes"),
        (["--class-weights", "heavy"], "--class-weights must be balanced or numbers, got heavy"),
        (["--benchmark", "H3"], "the data have 3 classes .* the published task has 2"),
        (["--length", "64"], r"--length \(64\) must be from 2 to the positions of the model \(32\)"),
        (["--tokenizer", "byte"], r"vocab_size \(12\) must be at least the tokenizer's \(260\)"),
    ],
)
def test_commands_that_cannot_run_are_refused(folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        command(folder, tmp_path, *arguments)


def test_a_tokenizer_that_does_not_load_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer loads from .*nothing.*--tokenizer, e.g. dna"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_a_model_without_a_limit_needs_a_length():
    config = HyenaConfig(**SHAPE)
    assert usable_length(config, None) == 32
    del config.max_position_embeddings
    with pytest.raises(ValueError, match="does not say how many positions"):
        usable_length(config, None)
