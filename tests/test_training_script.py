"""The training command: what it accepts, what it refuses, and that its model loads."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import hyena_hf  # noqa: F401 (registers the model)
from training.data import Document
from training.train_lm import Encoder, main, make_model, make_tokenizer, parse_arguments


FLAGS = frozenset(
    [
        "data",
        "text-column",
        "encoding-errors",
        "tokenizer",
        "model",
        "length",
        "batch-size",
        "steps",
        "learning-rate",
        "output",
        "seed",
        "smoke",
    ]
)


def test_the_flags_are_twelve_and_frozen():
    source = parse_arguments([])
    assert {name.replace("_", "-") for name in vars(source)} == FLAGS
    assert len(FLAGS) == 12


def test_a_smoke_run_gives_a_model_and_tokenizer_that_load_and_generate(tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    main(["--data", str(text), "--smoke", "--output", str(tmp_path / "run")])
    assert "its numbers mean nothing" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    prompt = tokenizer("To be", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 4


def test_new_weights_depend_on_the_seed_alone(tmp_path):
    tokenizer = make_tokenizer("byte", [], tmp_path)
    first = [make_model("tiny", tokenizer, 32).state_dict() for _ in range(2) if torch.manual_seed(3)]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])


def test_a_trained_tokenizer_is_kept_with_the_run(tmp_path):
    documents = [Document("a", "the cat sat on the mat " * 20)]
    tokenizer = make_tokenizer("bpe:270", documents, tmp_path)
    again = make_tokenizer("bpe:270", [Document("b", "other words " * 20)], tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer("the cat").input_ids) < len("the cat")


def test_documents_end_with_the_end_token(tmp_path):
    tokenizer = make_tokenizer("byte", [], tmp_path)
    assert Encoder(tokenizer)(Document("a", "hé")).tolist() == [*"hé".encode(), tokenizer.eos_token_id]


def test_models_that_do_not_fit_the_tokenizer_or_the_rows_are_refused(tmp_path):
    tokenizer = make_tokenizer("byte", [], tmp_path)
    shape = dict(n_embd=8, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2Config(vocab_size=300, **shape).to_json_file(tmp_path / "fits.json")
    assert make_model(str(tmp_path / "fits.json"), tokenizer, 32).config.vocab_size == 300
    with pytest.raises(ValueError, match=r"--length \(33\) is more than the positions of the model \(32\)"):
        make_model(str(tmp_path / "fits.json"), tokenizer, 33)
    GPT2Config(vocab_size=100, **shape).to_json_file(tmp_path / "small.json")
    with pytest.raises(ValueError, match=r"vocab_size \(100\) must be at least the tokenizer's \(260\)"):
        make_model(str(tmp_path / "small.json"), tokenizer, 32)


def test_a_bpe_tokenizer_needs_a_size(tmp_path):
    with pytest.raises(ValueError, match="needs a vocabulary size after bpe:"):
        make_tokenizer("bpe:", [], tmp_path)


def test_two_processes_train_one_model(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("To be, or not to be, that is the question. " * 400)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.train_lm", "--data", str(text), "--smoke", "--output", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two processes share the two cores
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("its numbers mean nothing") == 1
    names = {path.name for path in (tmp_path / "run" / "checkpoint-20").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= names
