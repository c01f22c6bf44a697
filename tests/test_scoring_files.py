"""`hyena score` and `hyena embed`: the parts they write, going on after a kill, and folders that they refuse.

Run: python -m pytest tests/test_scoring_files.py -q
"""

import copy
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from hyena_hf import HyenaByteTokenizer, HyenaNucleotideTokenizer
from hyena_hf.cli import embed as embed_command
from hyena_hf.cli import score as score_command
from hyena_hf.scoring import embed, score, shards
from hyena_hf.scoring.forward import Forward
from hyena_hf.scoring.manifest import model_fingerprint
from tests.models import new_model
from tests.test_scoring_distributed import command


ROOT, DNA = Path(__file__).parents[1], HyenaNucleotideTokenizer()


def texts(count=9, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("ACGT", k=draw.randint(5, 60))) for _ in range(count)]


def model_of(seed=0):
    return new_model(vocab_size=12, pad_token_id=4, seed=seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("files")
    for name, seed in (("model", 0), ("other", 1)):
        model_of(seed).save_pretrained(out / name)
        DNA.save_pretrained(out / name)
    (out / "in.fa").write_text("".join(f">r{index}\n{text}\n" for index, text in enumerate(texts())))
    return out


def run(kind, folder, out, *options, model="model", source="in.fa"):
    module = {"score": score_command, "embed": embed_command}[kind]
    module.run(command(kind, folder / model, folder / source, out, *options))
    return out


def test_scores_of_a_file_are_those_of_its_sequences(folder, tmp_path, capsys):
    frame = pd.read_parquet(run("score", folder, tmp_path / "out", "--shard-size", 4))
    assert "9 sequences" in capsys.readouterr().out
    assert list(frame["id"]) == [f"r{index}" for index in range(9)]
    assert list(frame["length"]) == list(frame["tokens"]) == [len(text) for text in texts()]
    np.testing.assert_allclose(frame["log_likelihood"], score(model_of(), DNA, texts()), rtol=1e-6)
    np.testing.assert_allclose(
        frame["mean_log_likelihood"], score(model_of(), DNA, texts(), reduction="mean"), rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["parquet", "safetensors"])
def test_embeddings_of_a_file_are_those_of_its_sequences(folder, tmp_path, kind):
    options = "--layer", 1, "--pooling", "max", "--reverse-complement", "--format", kind
    out = run("embed", folder, tmp_path / "out", *options)
    expected = embed(model_of(), DNA, texts(), layer=1, pooling="max", reverse_complement=True)
    if kind == "parquet":
        frame = pd.read_parquet(out)
        ids, found = list(frame["id"]), np.stack(frame["embedding"])
    else:
        with safe_open(out / "part-00000.safetensors", "np") as file:
            ids, found = json.loads(file.metadata()["ids"]), file.get_tensor("embeddings")
            assert list(file.get_tensor("lengths")) == [len(text) for text in texts()]
    assert ids == [f"r{index}" for index in range(9)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_windows_of_a_contig_are_embedded_by_position(folder, tmp_path):
    frame = pd.read_parquet(run("embed", folder, tmp_path / "out", "--windows", 20, "--stride", 10))
    row = frame[frame["id"] == "r0:11-30"]
    np.testing.assert_allclose(row["embedding"].iloc[0], embed(model_of(), DNA, [texts()[0][10:30]])[0], atol=1e-5)


def test_options_reach_the_model(folder, tmp_path):
    frame = pd.read_parquet(run("score", folder, tmp_path / "a", "--bos", "[BOS]", "--batch-size", 3))
    np.testing.assert_allclose(frame["log_likelihood"], score(model_of(), DNA, texts(), bos="[BOS]"), rtol=1e-6)
    frame = pd.read_parquet(run("score", folder, tmp_path / "b", "--no-bos", "--chunk-length", 16))
    np.testing.assert_allclose(frame["log_likelihood"], score(model_of(), DNA, texts(), bos=None), rtol=1e-6)


def test_replaced_letters_are_reported(folder, tmp_path, capsys):
    (tmp_path / "soft.fa").write_text(">a\nacgtACRY\n")
    run("score", folder, tmp_path / "out", source=tmp_path / "soft.fa")
    said = capsys.readouterr().out
    assert "4 lower-case letters were read as capitals; 2 IUPAC letters of ambiguous bases were read as N" in said


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    whole = run("score", folder, tmp_path / "whole", "--shard-size", 1)
    out = tmp_path / "killed"
    # the process sleeps before its fourth part, with half a file written
    program = (
        "import sys, time; from hyena_hf.cli import score; from hyena_hf.scoring.shards import ScoreWriter\n"
        "from tests.test_scoring_distributed import command\n"
        "def write(self, path, *rest, write=ScoreWriter.write):\n"
        "    if '00003' in path.name: path.write_bytes(b'half'); time.sleep(600)\n"
        "    write(self, path, *rest)\n"
        "ScoreWriter.write = write; score.run(command(*sys.argv[1:]))"
    )
    words = "score", folder / "model", folder / "in.fa", out, "--shard-size", 1
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600  # a busy machine takes minutes to import torch
    while not list(out.glob(".part-00003*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert sorted(kept) == [f"part-0000{number}.parquet" for number in range(3)]
    run("score", folder, out, "--shard-size", 1)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(whole))


def test_a_finished_folder_is_not_made_again(folder, tmp_path):
    out = run("score", folder, tmp_path / "out", "--shard-size", 4)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    run("score", folder, out, "--shard-size", 4, "--batch-size", 2)  # batches decide on nothing
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")} == before


@pytest.mark.parametrize(
    ("kind", "options", "changes", "message"),
    [
        ("score", ["--shard-size", 3], {}, "records a part: 1000 there, 3 now"),
        ("score", ["--reverse-complement"], {}, "reverse complement: False there, True now"),
        ("score", ["--windows", 9], {}, "windows"),
        ("score", [], {"model": "other"}, "another model"),
        ("score", [], {"source": "more.fa"}, "another input"),
        ("embed", [], {}, "another command: 'score' there, 'embed' now"),
    ],
)
def test_a_folder_of_another_job_is_refused(folder, tmp_path, kind, options, changes, message):
    (folder / "more.fa").write_text(">a\nACGT\n")
    out = run("score", folder, tmp_path / "out")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ValueError, match=message):
        run(kind, folder, out, *options, **changes)
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_folder_with_something_else_is_refused(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty .it holds notes\.txt"):
        run("score", folder, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        run("score", folder, tmp_path / "notes.txt")


def test_a_broken_input_leaves_no_folder(folder, tmp_path):
    (tmp_path / "blank.fa").write_text(">a\nACGT\n>b\n")
    with pytest.raises(ValueError, match="record 2"):
        run("score", folder, tmp_path / "out", source=tmp_path / "blank.fa")
    assert not (tmp_path / "out").exists()


def test_a_part_holds_a_bounded_number_of_letters(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LETTERS", 100)
    out = run("score", folder, tmp_path / "out")
    sizes = [pd.read_parquet(path)["length"].sum() for path in sorted(out.glob("part-*"))]
    assert len(sizes) > 1
    assert max(sizes) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", 0], "at least 1"),
        (["--stride", 5], "needs windows"),
        (["--windows", 5, "--stride", 6], "use 1 to 5"),
        (["--batch-size", "many"], "number of sequences"),
    ],
)
def test_bad_options_are_refused_in_words(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run("score", folder, tmp_path / "out", *options)


def test_the_tokenizer_of_another_model_is_refused(folder, tmp_path):
    model_of().save_pretrained(tmp_path / "bare")
    HyenaByteTokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="record 'r0' holds token 84, but the model knows 12"):
        run("score", folder, tmp_path / "out", model=tmp_path / "bare")


def test_the_fingerprint_of_a_model_is_another_when_any_value_is():
    model = new_model(vocab_size=12, hidden_size=128, num_hidden_layers=1, intermediate_size=256, pad_token_id=4)
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == before
    for name, parameter in model.named_parameters():
        at = parameter.numel() - 2 if parameter.numel() > 1 else 0
        value = parameter.data.view(-1)[at].item()
        parameter.data.view(-1)[at] = value + 1
        assert model_fingerprint(model) != before, name
        parameter.data.view(-1)[at] = value
    assert model_fingerprint(model) == before


def test_the_fingerprint_of_a_model_tells_which_adapter_is_active():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["in_proj"], "init_lora_weights": False}
    tuned = peft.get_peft_model(model_of(), peft.LoraConfig(**options))
    tuned.add_adapter("other", peft.LoraConfig(**options))
    inner = Forward(tuned).model
    first = model_fingerprint(inner)
    tuned.set_adapter("other")
    second = model_fingerprint(inner)
    with tuned.disable_adapter():
        none = model_fingerprint(inner)
    assert len({first, second, none, model_fingerprint(model_of())}) == 4
    tuned.set_adapter("default")
    assert model_fingerprint(inner) == first
