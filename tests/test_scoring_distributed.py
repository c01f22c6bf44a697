"""Two processes started by torchrun share sequences, and both get all results in order.

Run: python -m pytest tests/test_scoring_distributed.py -q
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from hyena_hf import HyenaNucleotideTokenizer
from hyena_hf.cli import embed as embed_command
from hyena_hf.cli import score as score_command
from hyena_hf.scoring import embed, score
from tests.models import new_model


ROOT = Path(__file__).parents[1]
LENGTHS = (30, 7, 55, 12, 80)


def dna(*lengths):
    draw = random.Random(0)
    return ["".join(draw.choices("ACGT", k=length)) for length in lengths]


def command(*words):
    """Arguments as `hyena` parses them."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    score_command.add_parser(commands)
    embed_command.add_parser(commands)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scoring")
    new_model(vocab_size=12, pad_token_id=4).save_pretrained(out / "model")
    HyenaNucleotideTokenizer().save_pretrained(out / "model")
    (out / "in.fa").write_text("".join(f">r{index}\n{text}\n" for index, text in enumerate(dna(*LENGTHS))))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*start, "tests/scoring_worker.py", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def ranks(folder):
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(2)]


def test_both_processes_get_the_results_of_one_in_order(folder, ranks):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), HyenaNucleotideTokenizer()
    for found in ranks:
        np.testing.assert_allclose(found["scores"], score(model, tokenizer, dna(*LENGTHS)), rtol=1e-6)
        np.testing.assert_allclose(found["embeddings"], embed(model, tokenizer, dna(*LENGTHS)), atol=1e-5)


def test_each_process_runs_its_share_only(ranks):
    assert sorted(int(found["rows"][0]) for found in ranks) == [2 * 2, 2 * 3]


def test_a_process_can_work_alone(ranks):
    for rank, found in enumerate(ranks):
        np.testing.assert_allclose(found["alone"], found["scores"][rank : rank + 1], rtol=1e-6)


def test_a_failure_of_one_process_ends_the_other_too(ranks):
    errors = sorted(str(found["error"][0]) for found in ranks)
    assert errors[0].startswith("RuntimeError: process 0 of 2 failed: ValueError: sequence 2 holds 'U'")
    assert errors[1].startswith("ValueError: sequence 2 holds 'U' at position 1")


def test_processes_share_the_parts_of_a_folder(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), HyenaNucleotideTokenizer()
    frame = pd.read_parquet(folder / "parts")
    assert list(frame["id"]) == [f"r{index}" for index in range(5)]
    np.testing.assert_allclose(np.stack(frame["embedding"]), embed(model, tokenizer, dna(*LENGTHS)), atol=1e-5)
