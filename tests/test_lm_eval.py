"""lm-eval on tests/lm_eval_tasks, offline: `hyena-lm-eval` in one process of its own, shared by all tests here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation.perplexity import bits_per_byte, read_document
from hyena_hf import HyenaByteTokenizer, HyenaConfig, HyenaForCausalLM
from hyena_hf.cli.lm_eval import main


TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["hyena_choice", "hyena_rolling", "hyena_generation"]
# The command with requests in batches of 8, then the same requests one by one, without indexing all tasks again.
SCRIPT = """
import sys
from hyena_hf.cli.lm_eval import main
folder, tasks = sys.argv[1], sys.argv[2:]
sys.argv = ["hyena-lm-eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks",
    *tasks, "--include_path", ".", "--batch_size", "8", "--device", "cpu", "--log_samples", "--output_path", folder]
main()
import json
from pathlib import Path
import lm_eval
from lm_eval.tasks import TaskManager
results = lm_eval.simple_evaluate("hf", model_args=f"pretrained={folder},dtype=float32", tasks=tasks, batch_size=1,
    device="cpu", task_manager=TaskManager(include_path=".", include_defaults=False))
Path(folder, "one_by_one.json").write_text(json.dumps(results["samples"], default=str))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Hyena with attention in its second layer, its tokenizer, and what lm-eval made of them."""
    folder = tmp_path_factory.mktemp("hyena")
    tokenizer = HyenaByteTokenizer()
    torch.manual_seed(0)
    config = HyenaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        max_position_embeddings=128,
        layer_types=["hyena", "full_attention"],
        num_attention_heads=2,
    )
    model = HyenaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)  # far from uniform predictions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TASKS.parent.parent),
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), *NAMES]
    done = subprocess.run(
        command, cwd=TASKS, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "neither marked as CausalLM" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def samples(folder):
    """Task to samples in order of the documents, of the command (batches of 8) and one by one."""
    one_by_one = json.loads((folder / "one_by_one.json").read_text())
    batched = {}
    for name in NAMES:
        (file,) = folder.glob(f"*/samples_{name}_*.jsonl")
        batched[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        name: [sorted(found[name], key=lambda sample: sample["doc_id"]) for found in (batched, one_by_one)]
        for name in NAMES
    }


@pytest.fixture(scope="module")
def model(folder):
    return HyenaForCausalLM.from_pretrained(folder).eval()


def _loglikelihoods(found):
    return [float(response[0][0]) for sample in found for response in sample["resps"]]


def test_all_three_kinds_of_request_give_finite_results(folder, samples):
    (file,) = folder.glob("*/results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["hyena_choice"]["acc,none"] in {0, 0.2, 0.4, 0.6, 0.8, 1}
    assert math.isfinite(results["hyena_rolling"]["bits_per_byte,none"])
    assert math.isfinite(results["hyena_generation"]["exact_match,none"])
    assert [len(samples[name][0]) for name in NAMES] == [5, 3, 3]


def test_right_padded_requests_score_the_same_in_any_batch(samples):
    batched, one_by_one = map(_loglikelihoods, samples["hyena_choice"])
    assert len(set(batched)) == 14
    assert batched == pytest.approx(one_by_one, rel=1e-6, abs=1e-5)
    batched, one_by_one = ([float(s["resps"][0][0]) for s in found] for found in samples["hyena_rolling"])
    assert batched == pytest.approx(one_by_one, rel=1e-6, abs=1e-5)


def test_choices_score_what_the_model_gives_them_directly(samples, model):
    expected = []
    for sample in samples["hyena_choice"][0]:
        for choice in sample["doc"]["choices"]:
            context, continuation = sample["doc"]["question"].encode(), f" {choice}".encode()
            ids = torch.tensor([[*context, *continuation]])
            logits = model(ids[:, :-1]).logits[0, len(context) - 1 :].double()
            expected.append(logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum().item())
    assert _loglikelihoods(samples["hyena_choice"][0]) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_rolling_loglikelihood_is_the_perplexity_scripts(samples, model, tmp_path):
    for sample in samples["hyena_rolling"][0]:
        path = tmp_path / "text"
        path.write_text(sample["doc"]["text"], encoding="utf-8")
        document, size = read_document(path, HyenaByteTokenizer())
        if len(document) > 128:
            continue  # lm-eval's windows differ: they score a first token without its context
        result = bits_per_byte(model, [document], context=128, batch_size=1, bytes_per_document=[size])
        assert float(sample["resps"][0][0]) == pytest.approx(-result.nats, rel=1e-6)
        assert result.tokens == result.bytes == size


def test_generation_in_a_left_padded_batch_is_that_of_single_prompts(samples, model):
    batched, one_by_one = ([sample["resps"][0][0] for sample in found] for found in samples["hyena_generation"])
    assert batched == one_by_one
    for sample, text in zip(samples["hyena_generation"][0], batched, strict=True):
        prompt = torch.tensor([list(sample["doc"]["prompt"].encode())])
        ids = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        expected = HyenaByteTokenizer().decode(ids, skip_special_tokens=True)
        assert text == expected.split("\n")[0].split("<|eos|>")[0]


def test_the_command_says_what_to_install_when_lm_eval_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"needs lm-eval: pip install 'hyena-hf\[eval\]'"):
        main()
