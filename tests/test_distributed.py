"""Two processes train as one does on the whole batch: DDP, FSDP2 by hand, by transformers and by accelerate, Trainer.

Started by torchrun: `accelerate launch --cpu` silently runs one process. float64 is compared exactly; in bfloat16 the
order of sums differs, so there the filters, which stay in float32, and the losses are.

Run: python -m pytest tests/test_distributed.py -q
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import distributed_worker
from tests.models import new_model


WORKER = Path(distributed_worker.__file__)
SHARDED = [name for name in distributed_worker.MODES if name != "ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, and what two processes made of it in every mode."""
    out = tmp_path_factory.mktemp("distributed")
    for name in ("tied", "untied"):
        new_model("hybrid", tie_word_embeddings=name == "tied").save_pretrained(out / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    result = subprocess.run(
        [*command, str(out), str(out)],
        cwd=WORKER.parents[1],
        env={**os.environ, "PYTHONPATH": str(WORKER.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return out


def alone(folder, name, dtype):
    """The model after the same steps in one process on whole batches, and its losses."""
    model = distributed_worker.load(distributed_worker.model_folder(folder, name), dtype)
    return model, distributed_worker.train(model, distributed_worker.batches())


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


@pytest.mark.parametrize(
    "name", [name for name, (_, dtype) in distributed_worker.MODES.items() if dtype != torch.bfloat16]
)
def test_two_processes_train_to_the_weights_of_one(folder, name):
    dtype = distributed_worker.MODES[name][1]
    model, losses = alone(folder, name, dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    found = load_file(folder / name / "losses")["losses"]
    torch.testing.assert_close(found, losses, rtol=0, atol=2e-6)  # transformers sums losses in float32
    saved, expected = weights(folder, name), model.state_dict()
    assert set(expected) - set(saved) <= {"lm_head.weight"}  # tied
    for key, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["fsdp bf16", "from_pretrained bf16", "accelerate bf16"])
def test_sharded_bfloat16_models_keep_float32_filters_and_train_as_one_process(folder, name):
    model, losses = alone(folder, name, torch.bfloat16)
    found = load_file(folder / name / "losses")["losses"]
    torch.testing.assert_close(found, losses, rtol=0.01, atol=0)
    start = load_file(distributed_worker.model_folder(folder, name) / "model.safetensors")
    for key, tensor in weights(folder, name).items():
        assert tensor.dtype == (torch.float32 if ".filter." in key else torch.bfloat16), key
        if ".filter." in key and "decay_rates" not in key:
            step = (model.state_dict()[key] - start[key]).norm()
            assert step > 0
            assert (tensor - model.state_dict()[key]).norm() < 0.1 * step, key


# in float32 transformers leaves them in the unit of their layer
@pytest.mark.parametrize("name", [name for name in SHARDED if name != "from_pretrained"])
def test_every_filter_is_a_unit_of_its_own(folder, name):
    with safe_open(folder / name / "losses", "pt") as file:
        kinds = set(file.metadata()["kinds"].split())
    assert {"FSDPHyenaDecoderLayer", "FSDPHyenaForCausalLM"} <= kinds
    assert kinds & {"FSDPImplicitFilter", "FSDPFilterLinear"}


@pytest.mark.parametrize("name", list(distributed_worker.MODES))
def test_the_saved_whole_loads_again(folder, name):
    dtype = distributed_worker.MODES[name][1]
    model = distributed_worker.load(folder / name, dtype)
    for key, tensor in weights(folder, name).items():
        assert torch.equal(model.state_dict()[key].to(tensor.dtype), tensor), key


def test_trainer_in_two_processes_trains_to_the_weights_of_one(folder):
    model, _ = alone(folder, "trainer", torch.float64)
    for key, tensor in weights(folder, "trainer").items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=1e-12)
