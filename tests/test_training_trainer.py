"""Checkpoints survive a kill, a full disk and a diverging loss; a resumed run equals one never interrupted."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hyena_hf import HyenaConfig, HyenaForCausalLM
from training.data import pack_documents
from training.recipe import Recipe, train
from training.trainer import CheckpointError, HyenaTrainer, StepClock, last_good_checkpoint


RECIPE = Recipe(steps=6, batch_size=2, log_every=1, save_every=2, evaluate_every=6, learning_rate=1e-2)


def tiny_gpt2():
    set_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def tiny_hyena():
    set_seed(1)
    config = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=16)
    return HyenaForCausalLM(HyenaConfig(**config, layer_types=["hyena", "full_attention"], num_attention_heads=2))


def rows():
    return pack_documents([[(i * j) % 16 for i in range(20)] for j in range(12)], 16)


def run(output_dir, recipe=RECIPE, model=None):
    model = tiny_gpt2() if model is None else model
    return model, train(model, rows(), rows(), output_dir=output_dir, recipe=recipe)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    model, result = run(output_dir)
    return output_dir, model, result


def test_a_run_leaves_model_metrics_plot_and_result(uninterrupted):
    output_dir, model, result = uninterrupted
    names = {path.name for path in output_dir.iterdir()}
    files = {"model", "metrics.jsonl", "loss.png", "recipe.json", "result.json"}
    assert names == {"checkpoint-4", "checkpoint-6"} | files
    steps = [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in result.loss_curve] == [1, 2, 3, 4, 5, 6]
    loaded = AutoModelForCausalLM.from_pretrained(output_dir / "model")
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.config.use_cache is True


def test_training_lowers_the_loss_and_counts_its_time(uninterrupted):
    _, _, result = uninterrupted
    assert result.loss_curve[-1][1] < result.loss_curve[0][1]
    assert result.validation_curve[-1][0] == 6
    assert result.tokens_per_second == pytest.approx(6 * 2 * 16 / result.train_seconds)


def test_a_finished_run_is_read_back_without_training(uninterrupted):
    output_dir, model, result = uninterrupted
    before = (output_dir / "metrics.jsonl").stat().st_mtime_ns
    again, repeated = run(output_dir)
    assert repeated == result
    assert torch.equal(weights(again), weights(model))
    assert (output_dir / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused_with_the_difference(uninterrupted):
    output_dir, _, _ = uninterrupted
    other = Recipe(steps=6, batch_size=2, log_every=1, save_every=2, evaluate_every=6, learning_rate=2e-2)
    with pytest.raises(ValueError, match=r"holds another run: learning_rate \(0.01 there, 0.02 now\)"):
        run(output_dir, other)


def interrupt_after_step_5(clock, args, state, control, **kwargs):  # noqa: ARG001 (a callback's signature)
    if state.global_step == 5:
        raise KeyboardInterrupt


@pytest.mark.parametrize("make_model", [tiny_gpt2, tiny_hyena])
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, make_model):
    expected_model, expected = run(tmp_path / "whole", model=make_model())
    with monkeypatch.context() as patch:
        patch.setattr(StepClock, "on_step_end", interrupt_after_step_5)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", model=make_model())
    set_seed(99)
    model, result = run(tmp_path / "parts", model=make_model())
    assert torch.equal(weights(model), weights(expected_model))
    assert result.loss_curve == expected.loss_curve


KILLED = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_training_trainer import HyenaTrainer, run

torch.set_num_threads(1)

def slow_save(self, output_dir):
    (Path(output_dir) / "rng_state.pth").write_bytes(b"half")
    print("saving", flush=True)
    time.sleep(600)

original = HyenaTrainer._save_rng_state
HyenaTrainer._save_rng_state = lambda self, d: (slow_save if self.state.global_step == 4 else original)(self, d)
run(Path({output_dir!r}))
"""


def test_a_run_killed_during_a_save_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path, uninterrupted):
    script = KILLED.format(tests=str(Path(__file__).parent), output_dir=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "saving\n"
        child.send_signal(signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert (tmp_path / "incomplete" / "checkpoint-4").is_dir()

    model, result = run(tmp_path)
    _, expected_model, expected = uninterrupted
    assert torch.equal(weights(model), weights(expected_model))
    assert result.loss_curve == expected.loss_curve
    assert not (tmp_path / "incomplete").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is a Linux feature")
@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_a_full_disk_names_the_step_and_keeps_the_checkpoint_before(tmp_path, monkeypatch, file, uninterrupted):
    original = HyenaTrainer._save_optimizer_and_scheduler

    def onto_full_disk(self, output_dir):
        if self.state.global_step == 4:
            (Path(output_dir) / file).symlink_to("/dev/full")
        original(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(HyenaTrainer, "_save_optimizer_and_scheduler", onto_full_disk)
        with pytest.raises(
            CheckpointError, match=r"step 4 could not be written .* last good checkpoint: .*checkpoint-2"
        ):
            run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "metrics.jsonl", "recipe.json"}

    model, _ = run(tmp_path)
    assert torch.equal(weights(model), weights(uninterrupted[1]))


class Diverging(GPT2LMHeadModel):
    """A model whose loss or gradient is no longer finite at a given call."""

    calls, bad_call, bad_gradient = 0, 5, False

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.calls += self.training
        if self.calls == self.bad_call:
            output.loss = (
                output.loss + 0 * torch.sqrt(0 * output.loss) if self.bad_gradient else output.loss * torch.nan
            )
        return output


@pytest.mark.parametrize(("bad_gradient", "what"), [(False, "loss"), (True, "gradient norm")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(tmp_path, bad_gradient, what):
    model = Diverging(tiny_gpt2().config)
    model.bad_gradient = bad_gradient
    with pytest.raises(
        FloatingPointError, match=rf"the {what} at step 5 is nan; .* last good checkpoint: .*checkpoint-4"
    ):
        run(tmp_path, model=model)
    last = last_good_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-4"
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(last)), weights(model))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"is not finite after step 1; it was not saved"):
        run(tmp_path, Recipe(steps=6, batch_size=2, log_every=1, save_every=1, learning_rate=1e39, warmup=0))
    assert last_good_checkpoint(tmp_path) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors is truncated"),
        (lambda folder: truncate(folder / "optimizer.pt"), "optimizer.pt is missing or truncated"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing or truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors weights"),
        (lambda folder: (folder / "trainer_state.json").write_text("{"), "trainer_state.json cannot be read"),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 5}'), "is not that of step 6"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_fault(tmp_path, uninterrupted, damage, fault, caplog):
    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-6")
    with caplog.at_level(logging.WARNING):
        last = last_good_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-4"
    assert fault in caplog.text


def test_a_run_killed_after_its_last_checkpoint_only_finishes(tmp_path, uninterrupted):
    output_dir, expected_model, expected = uninterrupted
    shutil.copytree(output_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "model")
    model, result = run(tmp_path)
    assert torch.equal(weights(model), weights(expected_model))
    assert result.loss_curve == expected.loss_curve
    assert (tmp_path / "model" / "config.json").exists()
    assert (tmp_path / "result.json").exists()


def test_resuming_from_nothing_is_refused(tmp_path):
    trainer = HyenaTrainer(
        tiny_gpt2(), TrainingArguments(str(tmp_path), dataloader_pin_memory=False, report_to="none")
    )
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_every_model_reads_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    seen = []
    original = Trainer.training_step

    def watched(self, model, inputs, *args):
        seen[-1].append(inputs["input_ids"])
        return original(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", watched)
    for width in (8, 16):
        seen.append([])
        config = tiny_gpt2().config
        config.n_embd = width
        run(tmp_path / str(width), Recipe(steps=8, batch_size=2), GPT2LMHeadModel(config))
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 9, "log_every": 2, "save_every": 5}, r"save_every \(5\) must be a multiple of log_every \(2\)"),
        ({"steps": 9, "warmup": 1.5}, r"warmup \(1.5\) must be in \[0, 1\)"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_the_stock_trainer_resumes_a_hyena_checkpoint(tmp_path):
    data = [{"input_ids": torch.arange(8) % 16, "labels": torch.arange(8) % 16} for _ in range(4)]

    def trainer(steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        )
        return Trainer(tiny_hyena(), arguments, train_dataset=data)

    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
