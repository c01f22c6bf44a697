"""What goes wrong while distilling: one line that says what to do, files that stay whole.

.venv/bin/python -m pytest tests/test_distill_bad_input.py
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyena_hf import HyenaByteTokenizer, HyenaForCausalLM
from hyena_hf.cli.main import main
from hyena_hf.distillation import distill
from hyena_hf.distillation import model as distillation
from tests.models import tokens
from tests.test_distill_model import smooth


def explicit(fill, taps=40):
    """A model whose filters are given tap by tap."""
    model = smooth(filter_types=["explicit"] * 2, filter_length=taps)
    with torch.no_grad():
        for layer in model.model.layers:
            for key, parameter in layer.mixer.filter.named_parameters():
                if key.startswith("weight"):
                    parameter.copy_(fill.to(parameter).expand_as(parameter))
    return model


def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    HyenaByteTokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def trained(tmp_path):
    return saved(smooth(vocab_size=len(HyenaByteTokenizer())), tmp_path)


def failure(*words):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as raised:
        main(["distill", *map(str, words)])
    message = str(raised.value.code)
    assert message.startswith("hyena distill: ")
    return message


@pytest.mark.parametrize(
    ("fill", "taps"), [(torch.zeros(()), 40), (torch.tensor(0.3), 120), (torch.ones(()), 1), (torch.ones(()), 3)]
)
def test_zero_constant_and_very_short_filters_are_distilled(fill, taps):
    model = explicit(fill, taps)
    student, report = distill(model, state_size=16, calibration=tokens(1, 50))
    assert all((one.filters.relative_l2 <= 1).all() for one in report.layers)
    assert torch.isfinite(student(tokens(1, 60)).logits).all()
    if taps != 3:  # zeros after two taps are no exponentials
        assert max(float(one.filters.relative_l2.max()) for one in report.layers) <= 1e-3


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (torch.tensor(float("nan")), "NaN or infinite ones; the model itself is broken"),
        (1.2 ** torch.arange(120.0), "taps that grow from one end to the other"),
    ],
)
def test_filters_that_no_recurrence_holds_end_the_command_with_their_name(fill, message, tmp_path):
    source = saved(explicit(fill, 120), tmp_path)
    found = failure(source, tmp_path / "out")
    assert message in found
    assert "channels 0, 1, 2, 3, 4, ... have" in found
    assert not (tmp_path / "out" / "config.json").exists()


def test_more_states_than_taps_are_as_many_as_there_are_taps():
    model = smooth(max_position_embeddings=8)
    student, report = distill(model, state_size=30)
    assert all(one.state_size <= 7 for one in report.layers)
    ids = tokens(1, 8)
    assert (student(ids).logits - model(ids).logits).abs().max() <= 1e-3


def test_a_text_of_one_token_and_weights_without_a_text_are_refused(trained, tmp_path):
    (tmp_path / "text").write_text("x")
    out = tmp_path / "out"
    assert "holds 1 tokens, too few to predict any; give a longer text" in failure(
        trained, out, "--calibrate", tmp_path / "text"
    )
    assert "add --calibrate TEXT" in failure(trained, tmp_path / "other", "--weighted")
    assert not (tmp_path / "other").exists()


def test_a_model_that_is_distilled_already_is_refused(tmp_path):
    source = saved(distill(smooth(), state_size=2)[0], tmp_path)
    assert "its filters are modal already" in failure(source, tmp_path / "out")


def test_a_model_file_that_is_cut_off_is_named(trained, tmp_path):
    weights = trained / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{trained} are corrupt or truncated" in failure(trained, tmp_path / "out")


@pytest.fixture
def full_disk():
    """No file may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size=4096):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_same_command_goes_on(trained, tmp_path, full_disk):
    out = tmp_path / "out"
    full_disk()
    message = failure(trained, out)
    assert "cannot be written" in message
    assert "repeat the c" in message
    assert not (out / "config.json").exists()
    full_disk(resource.RLIM_INFINITY)
    main(["distill", str(trained), str(out)])
    assert AutoModelForCausalLM.from_pretrained(out).config.filter_types == ["modal"] * 2


def test_a_disk_that_fills_up_while_the_model_is_saved_keeps_the_fits(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def save(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(HyenaForCausalLM, "save_pretrained", save)
        assert "No space left on device); make room" in failure(trained, out)
    assert sorted(path.name for path in (out / ".distillation").iterdir()) == [
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]
    monkeypatch.setattr("hyena_hf.distillation.model.fit_modal", None)
    main(["distill", str(trained), str(out)])
    assert (out / "config.json").exists()


def test_a_folder_that_may_not_be_written_is_said(trained, tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root writes everywhere
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(error))
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
    message = failure(trained, tmp_path / "locked" / "out")
    assert "Permission denied" in message
    assert "get the right to write there" in message


def test_a_file_in_the_place_of_the_folder_is_left_alone(trained, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file; name a new folder" in failure(trained, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_killed_command_started_again_writes_what_an_uninterrupted_one_does(trained, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    main(["distill", str(trained), str(whole)])
    code = "import sys; from hyena_hf.cli.main import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "distill", str(trained), str(out)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
    )
    first = out / ".distillation" / "layer_0.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert not (out / "config.json").exists()
    fit = first.read_bytes()
    main(["distill", str(trained), str(out)])
    assert fit  # a whole file, that the second command has used: the fits below are equal
    for name in ("config.json", "distillation.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    one, other = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_calibration_set_for_a_model_without_a_head_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(distillation, "_fit_layer", lambda *_: pytest.fail("it began to fit"))
    with pytest.raises(TypeError, match="needs a HyenaForCausalLM, got HyenaModel"):
        distill(smooth().model, state_size=2, calibration=tokens(1, 20))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((1, 20), 10_000), "outside the vocabulary"),
        (torch.rand(1, 20), "must be integers"),
        (torch.zeros(0, 20, dtype=torch.long), "empty input"),
        (torch.zeros(20, dtype=torch.long), r"token ids \(B, L\)"),
    ],
)
def test_every_batch_of_a_calibration_set_is_looked_at_before_any_work(batch, message, monkeypatch):
    monkeypatch.setattr(distillation, "_fit_layer", lambda *_: pytest.fail("it began to fit"))
    with pytest.raises((TypeError, ValueError), match=f"batch 1 of the calibration set: .*{message}"):
        distill(smooth(), state_size=2, calibration=[tokens(1, 20), batch])


def test_a_tolerance_may_take_as_many_states_as_there_are_taps():
    model = smooth("order 3", max_position_embeddings=8, filter_num_bands=4, sine_frequency=10.0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "filter.output" in key:
                parameter.normal_()
    _, report = distill(model, tolerance=1e-3)
    assert not report.missed()
    assert max(one.state_size for one in report.layers) == 7


def test_a_model_of_one_position_keeps_its_taps_at_lag_0():
    model = smooth(max_position_embeddings=1)
    student, _ = distill(model, state_size=1)
    ids = tokens(2, 1)
    torch.testing.assert_close(student(ids).logits, model(ids).logits)


def test_a_finished_model_is_never_overwritten(trained, tmp_path):
    main(["distill", str(trained), str(tmp_path / "out"), "--state-size", "2"])
    (tmp_path / "out" / ".distillation").mkdir()  # killed after the last file was in place
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "is not empty" in failure(trained, tmp_path / "out", "--state-size", 4)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "-3"], "use at least 2"),
        (["--state-size", "0"], "at least 1"),
        (["--calibrate", "no-such-text"], "no such file"),
    ],
)
def test_wrong_arguments_end_in_a_line_and_leave_nothing(options, message, trained, tmp_path):
    assert message in failure(trained, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "is no folder" in failure(tmp_path / "nothing", tmp_path / "out")
