"""Converted models that FSDP2 shards over two processes learn, are saved and go on as in one process.

The processes run what `accelerate launch` runs on GPUs (`tests/sharded_worker.py`).

Run: python -m pytest tests/test_sharded.py -q
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

import hyena_hf.linear_attention.modeling as converted_classes
from hyena_hf.linear_attention import convert_attention
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from tests import sharded_worker
from training.recipe import claim
from training.trainer import check_sharding, last_good_checkpoint


ROOT = Path(__file__).parents[1]
TOKENIZER = HyenaByteTokenizer()
SMALL = {  # what comes last counts
    "training.linearize": "--length 32 --window 4 --batch-size 2 --transfer-steps 4 --steps 4 --lora 4",
    "training.finetune": "--length 32 --batch-size 2 --epochs 0.1 --evaluate-every 2 --lora 4",
}
TUNE = "--task lm --length 32 --epochs 0.25 --evaluate-every 2 --learning-rate 1e-3 --batch-size"
OUTPUTS = ("result.json", "adapter", "model")
LINEARIZE = "--length 32 --window 4 --transfer-steps 4 --steps 6 --evaluate-every 2 --batch-size"


def documented(folder):
    """Commands of the example, made small: module, arguments, environment."""
    text = (ROOT / "examples" / "linearize_7b.md").read_text().replace("\\\n", " ")
    places = {"MODEL": "bf16", "TEXT/": "text", "OTHER_TEXT.txt": "text/0.txt"}
    for line in text.splitlines():
        if line.strip().startswith("accelerate launch"):
            words = [str(folder / places[word]) if word in places else word for word in shlex.split(line)[2:]]
            words = [word.replace("runs/", f"{folder}/") for word in words]
            launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
            environment = prepare_multi_gpu_env(launch)
            ours = {key: environment[key] for key in environment if key.startswith(("ACCELERATE_", "FSDP_"))}
            module = launch.training_script
            yield module, [*launch.training_script_args, *SMALL[module].split()], ours


def commands(folder, rows, into):
    """A LoRA run, a full one and a linearisation of float32 models: module and arguments."""
    text = ["--data", str(folder / "text")]
    tuned, full, linear = (str(folder / f"{name}{into}") for name in ("tuned", "full", "linear"))
    lora = [str(folder / "converted"), "--output", tuned, "--lora", "4", *text, *TUNE.split(), rows]
    return {
        "tuned": ("training.finetune", lora),
        "full": ("training.finetune", [str(folder / "converted"), "--output", full, *text, *TUNE.split(), rows]),
        "linear": ("training.linearize", [str(folder / "tied"), linear, *text, *LINEARIZE.split(), rows]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, text, and what two processes made of them."""
    path = tmp_path_factory.mktemp("sharded")
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    sizes["initializer_range"] = 0.2  # so that what attention sees makes a difference
    for name in ("tied", "untied", "bf16"):
        set_seed(0)
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=40)
        config.tie_word_embeddings = name != "untied"
        model = LlamaForCausalLM(config).to(torch.bfloat16 if name == "bf16" else torch.float32)
        model.save_pretrained(path / name)
        TOKENIZER.save_pretrained(path / name)
    convert_attention(LlamaForCausalLM.from_pretrained(path / "tied"), window=4).save_pretrained(path / "converted")
    TOKENIZER.save_pretrained(path / "converted")
    (path / "text").mkdir()
    for index in range(30):
        (path / "text" / f"{index}.txt").write_text(f"{index} is what document {index} says. " * 5)
    (path / "plan.json").write_text(json.dumps(plan(path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, sharded_worker.__file__, str(path / "plan.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return path


def plan(folder):
    """Steps of the worker."""
    linearizes, finetunes = documented(folder)
    whole, alone = linearizes[2], finetunes[2]  # every process loads the model, or one does
    ours, steps = commands(folder, "2", ""), []
    steps += [("main", *linearizes), ("main", *finetunes)]
    steps += [("main", *ours[name], whole if name == "linear" else alone) for name in ours]
    tuned = folder / "tuned"
    # as if killed before the result was written, and at the step before
    for killed in ("ended", "resumed"):
        steps += [("move", str(tuned / name), str(folder / f"{name} before {killed}")) for name in OUTPUTS]
        if killed == "resumed":
            steps.append(("move", str(tuned / "checkpoint-8"), str(folder / "checkpoint-8")))
        steps.append(("main", *ours["tuned"], alone))
    shards = {**alone, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    other = [str(folder / "refused") if word == str(tuned) else word for word in ours["tuned"][1]]
    steps.append(("refused", "training.finetune", other, shards, str(folder / "refused shards")))
    steps.append(("refused", *ours["linear"], alone, str(folder / "refused loading")))
    return [*steps, ("gradients", str(folder), whole)]


@pytest.fixture(scope="module")
def alone(folder):
    """The same commands in one process, on the rows of both."""
    for module, arguments in commands(folder, "4", " alone").values():
        importlib.import_module(module).main(arguments)
    return folder


def assert_equal(found, expected, tolerance):
    found, expected = load_file(found), load_file(expected)
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype, key
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("case", sharded_worker.CASES)
def test_losses_and_gradients_of_two_processes_are_those_of_one(folder, case):
    student, teacher = sharded_worker.student_and_teacher(folder, case)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    expected = sharded_worker.descend(student, optimizer, student, teacher)
    found = load_file(folder / f"{case}.safetensors")
    assert set(found) == set(expected)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert len(found) == sharded_worker.STEPS * (1 + len(trained))
    tolerance = {"bf16": 1e-5, "mixed": 0.1}.get(case, 1e-12)  # mixed: against float32, in which one process computes
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype
        error = (tensor - expected[key]).norm() / expected[key].norm()
        assert error < tolerance, key


@pytest.mark.parametrize("case", sharded_worker.CASES)
def test_every_layer_is_a_unit_of_its_own(folder, case):
    with safe_open(folder / f"{case}.safetensors", "pt") as file:
        assert "FSDPLlamaDecoderLayer" in file.metadata()["kinds"].split()


def test_every_converted_family_names_its_layers():
    kinds = [kind for name, kind in vars(converted_classes).items() if name.startswith("Hedgehog") and "For" in name]
    for kind in kinds:
        with torch.device("meta"):
            model = kind(kind.config_class(num_hidden_layers=1, layer_types=["hedgehog"]))
        assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


def test_maps_in_float32_stay_so_beside_shards_in_bfloat16(folder):
    found = load_file(folder / "bf16.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for run in ("7b", "7b-lora"):
        for key, tensor in load_file(folder / run / "model" / "model.safetensors").items():
            assert tensor.dtype == (torch.float32 if ".linear_attention." in key else torch.bfloat16), key


@pytest.mark.parametrize("run", ["tuned", "linear"])
def test_saved_adapters_and_merged_models_are_those_of_one_process(alone, run):
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert_equal(alone / run / file, alone / f"{run} alone" / file, 2e-6)


def test_a_model_trained_in_full_is_saved_as_by_one_process(alone):
    assert_equal(alone / "full/model/model.safetensors", alone / "full alone/model/model.safetensors", 2e-6)


@pytest.mark.parametrize("run", ["tuned", "full", "linear"])
def test_losses_are_reported_as_by_one_process(alone, run):
    one, two = (json.loads((alone / name / "result.json").read_text()) for name in (f"{run} alone", run))
    assert two["best_step"] == one["best_step"]
    for (step, found), (expected_step, expected) in zip(two["loss_curve"], one["loss_curve"], strict=True):
        assert step == expected_step
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("run", ["tuned", "full", "linear", "7b", "7b-lora"])
def test_what_was_saved_loads_whole(folder, run):
    result = json.loads((folder / run / "result.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(folder / run / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.model_type == "hedgehog_llama"
    assert result["steps"] >= 2


def test_the_best_checkpoint_is_loaded_where_it_is_not_the_last(alone):
    result = json.loads((alone / "linear" / "result.json").read_text())
    assert result["best_step"] < result["steps"]
    best = alone / "linear" / f"checkpoint-{result['best_step']}" / "adapter_model.safetensors"
    assert_equal(alone / "linear" / "adapter" / "adapter_model.safetensors", best, 0)


@pytest.mark.parametrize("killed", ["ended", "resumed"])
def test_a_run_that_was_killed_ends_as_the_other(folder, killed):
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        name, rest = file.split("/")
        later = folder / f"{name} before resumed" if killed == "ended" else folder / "tuned" / name
        assert_equal(later / rest, folder / f"{name} before ended" / rest, 0)
    results = folder / "result.json before ended", folder / "tuned" / "result.json"
    first, last = (json.loads(path.read_text()) for path in results)
    assert first["validation_curves"] == last["validation_curves"]


def test_a_sharded_run_does_not_go_on_with_another_ones_checkpoints(alone):
    sharded, other = (json.loads((alone / run / "finetune.json").read_text()) for run in ("tuned", "tuned alone"))
    assert sharded["sharded"]
    assert "sharded" not in other
    shutil.copytree(alone / "tuned alone", alone / "other")
    with pytest.raises(ValueError, match=r"sharded \(None there, True now\)"):
        claim(alone / "other", {**other, "sharded": True}, "finetune.json")


def test_a_damaged_file_of_a_sharded_checkpoint_is_noticed(folder, tmp_path):
    shutil.copytree(folder / "tuned", tmp_path / "run")
    assert last_good_checkpoint(tmp_path / "run").name == "checkpoint-8"
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
        damaged = tmp_path / "run" / "checkpoint-8" / name
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[: len(whole) // 2])
        assert last_good_checkpoint(tmp_path / "run").name != "checkpoint-8"
        damaged.write_bytes(whole)


def test_what_cannot_be_served_is_refused_in_words(folder):
    assert "--fsdp_state_dict_type FULL_STATE_DICT" in (folder / "refused shards").read_text()
    assert "--fsdp_cpu_ram_efficient_loading false" in (folder / "refused loading").read_text()
    assert "reshard_after_forward=False" in (folder / "refused head").read_text()
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        check_sharding(argparse.Namespace(fsdp_version=1))
    check_sharding(FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT"))
