"""What `tests/test_distributed.py` runs in two processes: two steps of training, each process on half of the rows.

Run: torchrun --nproc_per_node 2 tests/distributed_worker.py MODEL FOLDER
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hyena_hf  # noqa: F401 (registers the models)
from hyena_hf.filters import LongFilter


STEPS, RATE = 2, 0.05


def batches():
    """Rows of every step, (steps, 4, length)."""
    return torch.randint(0, 97, (STEPS, 4, 24), generator=torch.Generator().manual_seed(3))


def load(folder, dtype, **kwargs):
    """float64 models are loaded in float32 and raised, so that filters follow."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)
    return model.double() if dtype == torch.float64 else model


def train(model, rows):
    """Plain SGD; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for ids in rows:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


# ways to share a model between processes


def ddp(folder, dtype):
    return DistributedDataParallel(load(folder, dtype), find_unused_parameters=False)


def fsdp(folder, dtype):
    """FSDP2 as torch documents it, with filters as units of their own."""
    model = load(folder, dtype)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, LongFilter):
                fully_shard(module)
        fully_shard(layer)
    fully_shard(model)
    return model


def from_pretrained(folder, dtype):
    """transformers' own: every process reads its shard only."""
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size())
    )


def accelerate(folder, dtype):
    """What Accelerator.prepare and Trainer(fsdp=...) do on GPUs; on a CPU they leave FSDP out."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    device, main = torch.device("cpu"), dist.get_rank() == 0
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=main, device=device
    )
    return fsdp2_prepare_model(accelerator, load(folder, dtype))


MODES = {
    "ddp": (ddp, torch.float64),
    "fsdp": (fsdp, torch.float64),
    "fsdp bf16": (fsdp, torch.bfloat16),
    "from_pretrained": (from_pretrained, torch.float32),
    "from_pretrained bf16": (from_pretrained, torch.bfloat16),
    "accelerate": (accelerate, torch.float64),
    "accelerate bf16": (accelerate, torch.bfloat16),
}


def model_folder(folder, name):
    """transformers 5.23 goes astray after a step where it shards tied embeddings, those of Llama too."""
    return folder / ("untied" if name.startswith("from_pretrained") else "tied")


def save(model, folder):
    """One checkpoint of the whole model, as a user would write it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if inner.is_distributed_loading_by_transformers:
        inner.save_pretrained(folder)
        return
    state = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        inner.save_pretrained(folder, state_dict={key: value.clone() for key, value in state.items()})


def train_with_trainer(folder, out):
    arguments = TrainingArguments(
        output_dir=str(out), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in batches().flatten(0, 1)]
    model = load(folder, torch.float64)
    optimizers = torch.optim.SGD(model.parameters(), lr=RATE), None
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=optimizers)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    assert trainer.args.world_size == 2
    trainer.save_model(str(out))


def main(folder, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, (share, dtype) in MODES.items():
        model = share(model_folder(folder, name), dtype)
        losses = train(model, batches()[:, dist.get_rank() :: 2])
        dist.all_reduce(losses)
        save(model, out / name)
        if dist.get_rank() == 0:
            kinds = sorted({type(module).__name__ for module in model.modules()})
            save_file({"losses": losses / 2}, out / name / "losses", metadata={"kinds": " ".join(kinds)})
    train_with_trainer(folder / "tied", out / "trainer")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
