"""Whole models into recurrences: `distill`, its report, and the command.

.venv/bin/python -m pytest tests/test_distill_model.py
"""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from hyena_hf import HyenaByteTokenizer, HyenaForCausalLM, HyenaForMaskedLM
from hyena_hf.cli.main import main
from hyena_hf.distillation import distill, fit_modal
from hyena_hf.distillation import model as distillation
from hyena_hf.filters import ModalFilter
from tests.models import FULL, HYENA, new_model, tokens


# filters of one slow band: few exponentials hold them
SMOOTH = {"num_hidden_layers": 2, "filter_num_bands": 1, "sine_frequency": 1.0, "max_position_embeddings": 120}
KINDS = {
    "order 2": {},
    "order 3": {},
    "heads": {"num_heads": 4},
    "hybrid": {"num_hidden_layers": 3, "layer_types": [HYENA, FULL, HYENA]},
}


def smooth(name="order 2", **changes):
    model = new_model(name, **{**SMOOTH, **KINDS[name], **changes})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "filter.layers" in key or "filter.output" in key:
                parameter.normal_(0, 0.02)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_distilled_model_has_the_logits_of_the_original_and_generates_the_same_tokens(name, tmp_path):
    model = smooth(name)
    student, report = distill(model, state_size=12, calibration=tokens(2, 60))
    ids = tokens(2, 80)
    logits = model(ids).logits
    assert (student(ids).logits - logits).abs().max() <= 1e-3 * logits.abs().max()
    assert report.calibration.tokens == 118
    assert abs(report.calibration.change) <= 1e-3
    assert 0 <= report.calibration.kl + 1e-12 <= 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(ids, **options), model.generate(ids, **options))
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits)
    assert isinstance(model.model.layers[0].mixer.filter, type(smooth(name).model.layers[0].mixer.filter))


def test_the_filters_of_the_new_model_are_the_fits_of_the_report():
    model = smooth("order 3")
    student, report = distill(model, state_size=[3, 6])
    for layer, one in zip((0, 1), report.layers, strict=True):
        h = model.model.layers[layer].mixer.filter(120).double()
        modal = student.model.layers[layer].mixer.filter
        assert isinstance(modal, ModalFilter)
        found = modal.double()(120)
        error = ((found - h)[..., 1:].norm(dim=-1) / h[..., 1:].norm(dim=-1)).flatten()
        torch.testing.assert_close(error, one.filters.relative_l2, rtol=1e-3, atol=2e-6)
        assert torch.equal(found[..., 0].float(), h[..., 0].float())
        assert int(one.filters.states.max()) <= (3, 6)[layer]


def test_a_tolerance_chooses_the_smallest_size_that_keeps_it_and_says_loudly_where_none_does(monkeypatch):
    model = smooth()
    _, report = distill(model, tolerance=1e-4)
    for one in report.layers:
        assert (one.filters.relative_l2 <= 1e-4).all()
        assert one.state_size < 64
    assert not report.missed()
    monkeypatch.setattr(distillation, "_SIZES", (2, 5))
    noise = smooth(filter_types=["explicit"] * 2, filter_length=100)
    with pytest.warns(UserWarning, match="filters miss the tolerance of 0.001 with up to 5 states"):
        _, report = distill(noise, tolerance=1e-3)
    assert report.missed()
    assert "TOLERANCE MISSED" in str(report)


def test_a_killed_run_goes_on_behind_the_layers_that_were_finished(tmp_path, monkeypatch):
    model, calls = smooth(), []

    def fit(h, **options):
        if len(calls) == 1:
            calls.append(h)
            raise KeyboardInterrupt
        calls.append(h)
        return fit_modal(h, **options)

    monkeypatch.setattr(distillation, "fit_modal", fit)
    with pytest.raises(KeyboardInterrupt):
        distill(model, state_size=6, work_dir=tmp_path)
    student, report = distill(model, state_size=6, work_dir=tmp_path)
    assert len(calls) == 3  # the first layer once, the second one twice
    (tmp_path / "layer_1.safetensors").write_bytes(b"half a file")
    again, other = distill(model, state_size=6, work_dir=tmp_path)
    assert len(calls) == 4
    assert str(report) == str(other)
    assert torch.equal(student(tokens(1, 30)).logits, again(tokens(1, 30)).logits)
    distill(model, state_size=4, work_dir=tmp_path)  # another size is another fit
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"filter_types": ["modal"] * 2}, {}, ValueError, "its filters are modal already"),
        ({"layer_types": [FULL] * 2}, {}, ValueError, "it has no Hyena layer"),
        ({}, {"state_size": 4, "tolerance": 0.1}, ValueError, "give one"),
        ({}, {"state_size": 0}, ValueError, "state_size (0) must be a whole number"),
        ({}, {"state_size": [4]}, ValueError, "has 1 entries for 2 layers"),
        ({}, {"tolerance": 2.0}, ValueError, "above 0 and below 1"),
        ({}, {"calibration": torch.ones(1, 1, dtype=torch.long)}, ValueError, "predicts nothing"),
        ({}, {"calibration": []}, ValueError, "calibration set is empty"),
        ({}, {"calibration": [[1, 2]]}, ValueError, "a tensor of token ids (B, L), got list"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_any_work(changes, options, error, message, monkeypatch):
    monkeypatch.setattr(distillation, "fit_modal", None)
    with pytest.raises(error) as raised:
        distill(smooth(**changes), **options)
    assert message in str(raised.value)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="takes a Hyena model, got Linear"):
        distill(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sees later tokens"):
        distill(new_model("order 2", kind=HyenaForMaskedLM, is_causal=False))


def command(*words):
    main(["distill", *map(str, words)])


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "model"
    tokenizer = HyenaByteTokenizer()
    smooth(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 6)
    return folder


def test_the_command_writes_a_model_with_its_tokenizer_and_report(trained, tmp_path, capsys):
    out = tmp_path / "out"
    command(trained, out, "--state-size", 8, "--calibrate", tmp_path / "text.txt")
    assert "calibration tokens" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, HyenaForCausalLM)
    assert model.config.filter_types == ["modal"] * 2
    numbers = json.loads((out / "distillation.json").read_text())
    assert [one["layer"] for one in numbers["layers"]] == [0, 1]
    assert {path.name for path in out.iterdir()} >= {"distillation.txt", "distillation.png", "tokenizer_config.json"}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    with pytest.raises(SystemExit, match="is not empty"):
        command(trained, out)


def test_the_command_goes_on_in_a_folder_that_a_killed_run_has_left(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(HyenaForCausalLM, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(trained, out)
    assert (out / ".distillation" / "layer_1.safetensors").exists()
    monkeypatch.setattr(distillation, "fit_modal", None)
    command(trained, out)
    assert (out / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", (), "holds 0 tokens"),
        ("x", ("--state-size", "0"), "must be a whole number"),
        (None, (), "no such file"),
    ],
)
def test_the_command_ends_with_one_line_that_says_what_is_wrong(text, words, message, trained, tmp_path):
    path = tmp_path / "other.txt"
    if text is not None:
        path.write_text(text * 40)
    with warnings.catch_warnings(), pytest.raises(SystemExit) as raised:
        command(trained, tmp_path / "out", "--calibrate", path, *words)
    assert message in str(raised.value)


def test_a_comparison_on_text_records_no_gradients(monkeypatch):
    model = smooth().requires_grad_(True)
    recorded, forward = [], type(model).forward

    def watched(self, *inputs, **options):
        recorded.append(torch.is_grad_enabled())
        return forward(self, *inputs, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    distill(model, state_size=2, calibration=tokens(1, 20))
    assert recorded == [False, False]


def test_the_report_knows_how_far_any_filter_of_each_order_must_be():
    _, report = distill(smooth(filter_types=["explicit"] * 2, filter_length=100), state_size=4)
    for one in report.layers:
        assert (one.bounds.diff() <= 0).all()
        assert one.bounds[3] > 0.1
        torch.testing.assert_close(one.bounds[3], one.filters.lower_bound.median(), rtol=1e-6, atol=0)


def test_a_refused_command_leaves_a_folder_of_the_caller_where_it_was(trained, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    with pytest.raises(SystemExit):
        main(["distill", str(trained), str(out), "--state-size", "0"])
    assert list(out.iterdir()) == []
