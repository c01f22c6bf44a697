"""What `tests/test_sharded.py` runs in two processes, as `accelerate launch --use_fsdp` runs it on GPUs.

Run: torchrun --nproc_per_node 2 tests/sharded_worker.py PLAN.json, a list of steps:
    ["gradients", FOLDER, ENVIRONMENT]                     ["main", MODULE, ARGUMENTS, ENVIRONMENT]
    ["refused", MODULE, ARGUMENTS, ENVIRONMENT, FILE]      ["move", FROM, TO]
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, set_seed

from hyena_hf.linear_attention import convert_attention
from training.adapters import add_lora
from training.imitation import FormerSelf, ModelTeacher, head_of, imitation_loss


# model, window, dtype, whether everything is trained instead of adapters and maps
CASES = {
    "tied": ("tied", 4, torch.float64, False),
    "no window": ("untied", 0, torch.float64, False),
    "bf16": ("tied", 4, torch.bfloat16, False),
    "full tied": ("tied", 4, torch.float64, True),
    "full": ("untied", 4, torch.float64, True),
    "by hand": ("untied", 4, torch.float64, False),
    "mixed": ("tied", 4, torch.float32, False),  # with accelerate's mixed precision
}
STEPS, ROWS, LENGTH = 2, 4, 24


def let_accelerate_shard_on_cpus():
    """On CPUs Accelerator's state leaves its FSDP plugin out; this sets what it sets on GPUs."""
    plain = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_plugin


def student_and_teacher(folder, case):
    """A converted model, what is trained in it moved a little, and a teacher."""
    name, window, dtype, full = CASES[case]
    original = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
    converted = convert_attention(original, window=window)
    set_seed(0)
    student = converted if full else add_lora(converted, "lm", 4)
    student = student.double() if dtype == torch.float64 else student
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            if parameter.requires_grad and ("lora_" in key or "linear_attention" in key):
                parameter += 0.1 * torch.randn_like(parameter)
    return student, ModelTeacher(original) if full else FormerSelf()


def descend(model, optimizer, inner, teacher, rank=0, processes=1):
    """Losses and gradients of two steps on a process's share of the rows, as `FineTuner` makes them."""
    ids = torch.randint(0, 97, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    found = {}
    for step, rows in enumerate(ids[:, rank::processes]):
        batch = {"input_ids": rows, "labels": rows}
        loss = imitation_loss(model, inner, batch, teacher, torch.tensor(ROWS * (LENGTH - 1))) * processes
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                found[f"{name} {step}"] = whole.clone()
        optimizer.step()
        optimizer.zero_grad()
    return found


def shard_by_hand(model):
    """As torch documents it, everything sharded again after each forward."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model, reshard_after_forward=True)


def gradients(folder, environment):
    """What two processes find in every case, in FOLDER/CASE.safetensors."""
    os.environ.update(environment)
    for case in CASES:
        AcceleratorState._reset_state()
        student, teacher = student_and_teacher(Path(folder), case)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if case == "mixed" else "no")
        assert accelerator.state.is_fsdp2
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        if case == "by hand":
            model = shard_by_hand(student)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        else:
            model, optimizer = accelerator.prepare(student, optimizer)
        rank, processes = accelerator.process_index, accelerator.num_processes
        found = descend(model, optimizer, accelerator.unwrap_model(model), teacher, rank, processes)
        for step in range(STEPS):
            found[f"loss {step}"] = accelerator.reduce(found[f"loss {step}"], "mean")
        kinds = " ".join(sorted({type(module).__name__ for module in model.modules()}))
        if accelerator.is_main_process:
            save_file(found, Path(folder) / f"{case}.safetensors", metadata={"kinds": kinds})
        accelerator.wait_for_everyone()
    model.requires_grad_(requires_grad=True)
    try:
        head_of(model.get_base_model())
    except ValueError as error:
        (Path(folder) / "refused head").write_text(str(error))


def run(module, arguments, environment):
    """A command of this package."""
    os.environ.update(environment)
    importlib.import_module(module).main(arguments)


def refused(module, arguments, environment, file):
    """Why a command was refused, in a file."""
    try:
        run(module, arguments, environment)
    except ValueError as error:
        Path(file).write_text(str(error))


def move(source, target):
    """Rename a file or folder, once for all processes."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        Path(source).rename(target)
    processes.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpus()
    for name, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        {"gradients": gradients, "main": run, "refused": refused, "move": move}[name](*arguments)
