"""What the README's first screen tells a newcomer to type works."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FIRST_SCREEN = (ROOT / "README.md").read_text().split("## What is inside")[0]
COMMANDS, PYTHON = re.findall(r"```(?:python)?\n(.*?)```", FIRST_SCREEN, flags=re.DOTALL)


def test_the_first_screen_names_two_commands_that_make_knows():
    commands = [line.split("#")[0].split() for line in COMMANDS.strip().splitlines()]
    assert [command[0] for command in commands] == ["make", "make"]
    for command in commands:
        planned = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "python" in planned.stdout


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="needs the environment of `make env`")
def test_make_demo_in_its_smoke_form_writes_the_page_and_the_numbers():
    output = ROOT / "runs" / "demo-smoke"
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["make", "demo", "SMOKE=1"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    results = json.loads((output / "results.json").read_text())
    assert set(results["models"]) == {"hyena", "hyena, distilled", "gpt2", "llama"}
    assert "<svg" in (output / "report.html").read_text()


def test_the_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON, "README.md", "exec"), {})
    assert "def f(x):" in capsys.readouterr().out
    assert (tmp_path / "my-hyena" / "model.safetensors").exists()


def run_example(heading):
    """Execute the Python block of a section."""
    section = (ROOT / "README.md").read_text().split(f"## {heading}")[1]
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_the_example_of_distillation_runs_as_it_stands(capsys):
    run_example("Distil a trained model")
    assert "calibration tokens: KL" in capsys.readouterr().out


def test_the_example_of_linear_attention_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_example("Linear attention from trained attention")
    assert "perplexity, linear" in capsys.readouterr().out
    assert (tmp_path / "linear-llama" / "config.json").exists()


def test_the_example_of_scores_runs_as_it_stands(capsys):
    run_example("Published weights, scores, embeddings")
    assert "(3, 32)" in capsys.readouterr().out


def test_the_example_of_long_inputs_runs_as_it_stands(capsys):
    run_example("Long inputs and other runtimes")
    assert capsys.readouterr().out.count("torch.Size") == 3
