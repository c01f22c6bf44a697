"""Training after distillation: it wins back what a bad fit has lost, stays stable, and goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, set_seed

from hyena_hf import HyenaConfig, HyenaForCausalLM
from hyena_hf.filters import ModalFilter
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.data import pack_documents
from training.distill import distil_and_train, main, parse_arguments
from training.recipe import Recipe, train


FLAGS = frozenset(
    [
        "model",
        "output",
        "state_size",
        "data",
        "filters_only",
        "batch_size",
        "steps",
        "learning_rate",
        "seed",
        "smoke",
    ]
)
RECIPE = Recipe(steps=40, batch_size=4, learning_rate=3e-3, log_every=10, save_every=10, evaluate_every=40)
LENGTH = 48


def rows():
    """Documents that repeat themselves after 20 tokens: nothing but a long filter can foretell them."""
    generator = torch.Generator().manual_seed(0)
    return pack_documents(
        [torch.randint(12, (20,), generator=generator).repeat(3)[:LENGTH] for _ in range(64)], LENGTH
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    set_seed(0)
    sizes = dict(vocab_size=12, hidden_size=16, num_hidden_layers=1, intermediate_size=32, initializer_range=0.1)
    model = HyenaForCausalLM(HyenaConfig(**sizes, max_position_embeddings=LENGTH, filter_hidden_size=16))
    recipe = replace(RECIPE, steps=150, save_every=150, evaluate_every=150, learning_rate=1e-2)
    train(model, rows(), rows(), output_dir=tmp_path_factory.mktemp("teacher"), recipe=recipe)
    return model


def tuned(teacher, folder, **changed):
    arguments = dict(output_dir=folder, recipe=RECIPE, state_size=2) | changed
    return distil_and_train(teacher, rows(), rows(), **arguments)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return tuned(teacher, folder), folder


def modal_filters(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [module for module in model.modules() if isinstance(module, ModalFilter)]


def test_training_wins_back_what_two_states_have_lost(run):
    scores, folder = run
    assert scores["original"] < scores["distilled"]
    assert scores["trained"] < scores["distilled"]
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "distilled" / "distillation.txt").exists()


def test_poles_stay_inside_the_unit_disc(teacher, tmp_path):
    recipe = replace(RECIPE, learning_rate=0.3, steps=10)  # far too high
    tuned(teacher, tmp_path, recipe=recipe, filters_only=True)
    before, after = (modal_filters(tmp_path / name)[0] for name in ("distilled", "model"))
    assert (before.log_radius - after.log_radius).abs().max() > 0.1
    assert after.log_radius.max() < 0
    assert (after.angle >= 0).all()
    assert after(4 * LENGTH).abs().max() < 100


def test_with_filters_only_nothing_else_changes(teacher, tmp_path):
    tuned(teacher, tmp_path, filters_only=True, recipe=replace(RECIPE, steps=10))
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("distilled", "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".filter." in name for name in changed)


def test_an_interrupted_run_ends_as_one_that_was_not(teacher, run, tmp_path, monkeypatch):
    scores, folder = run
    step, distilled = Trainer.training_step, []

    def killed(self, *args, **kwargs):
        if self.state.global_step == 25:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tuned(teacher, tmp_path)
    monkeypatch.setattr("training.distill.distill", lambda *_, **__: distilled.append(1))
    assert tuned(teacher, tmp_path) == pytest.approx(scores)
    assert not distilled
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place / "model").state_dict() for place in (folder, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_of_another_run_is_refused(teacher, run):
    with pytest.raises(ValueError, match=r"holds another run: it was begun with .*'state_size': 2.*choose another"):
        tuned(teacher, run[1], state_size=4)


def test_a_folder_of_another_teacher_is_refused(teacher, run):
    other = HyenaForCausalLM(teacher.config)
    with pytest.raises(ValueError, match="holds another run"):
        tuned(other, run[1])


def test_the_flags_are_frozen():
    assert vars(parse_arguments(["model", "out"])).keys() == FLAGS


def test_a_smoke_run_of_the_command_gives_a_model_that_loads(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question. " * 200)
    tokenizer = HyenaByteTokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, intermediate_size=16)
    HyenaForCausalLM(HyenaConfig(**sizes, max_position_embeddings=32)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), str(tmp_path / "out"), "--data", str(tmp_path / "book.txt"), "--smoke"])
    printed = capsys.readouterr().out
    assert "validation perplexity: original " in printed
    assert "its numbers mean nothing" in printed
    assert modal_filters(tmp_path / "out" / "model")
