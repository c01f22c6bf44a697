"""What `hyena convert` needs for a model of 7 billion parameters: peak memory and time.

    python -m benchmarks.bench_convert --folder SCRATCH     (29 GB of disk; --smoke: a tiny one)

Writes a synthetic Evo 1 checkpoint in the published layout (bfloat16, three shards of safetensors, poles in float32),
converts it in a process of its own, and reloads some of the result to compare. The control converts a tiny checkpoint:
what the imports alone take. Resident memory counts pages of mapped files that the system may drop at any time;
anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result


SHARDS = 3
EVO1 = {"hidden_size": 4096, "inner_mlp_size": 10928, "num_layers": 32, "num_attention_heads": 32, "state_size": 8}
TINY = {"hidden_size": 64, "inner_mlp_size": 96, "num_layers": 4, "num_attention_heads": 4, "state_size": 8}


def published_config(size: dict[str, int]) -> dict[str, object]:
    """The published configuration of Evo 1 (131k) at a size."""
    attention = [
        layer for layer in range(size["num_layers"]) if layer in (8, 16, 24) or layer == size["num_layers"] - 1
    ]
    return {
        **size,
        "model_type": "stripedhyena",
        "vocab_size": 512,
        "num_filters": size["hidden_size"],
        "attn_layer_idxs": attention,
        "hyena_layer_idxs": [layer for layer in range(size["num_layers"]) if layer not in attention],
        "short_filter_length": 3,
        "tie_embeddings": True,
        "tokenizer_type": "CharLevelTokenizer",
        "mlp_activation": "gelu",
        "max_seqlen": 131072,
        "eps": 1e-6,
        "hyena_filter_groups": 1,
        "column_split_hyena": True,
        "final_norm": True,
        "use_interpolated_rotary_pos_emb": True,
        "rotary_emb_scaling_factor": 16,
    }


def published_shapes(config: dict, layers: range) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published tensors of some layers."""
    width, inner, poles = config["hidden_size"], config["inner_mlp_size"], config["state_size"]
    for layer in layers:
        prefix = f"backbone.blocks.{layer}."
        for norm in ("pre_norm", "post_norm"):
            yield f"{prefix}{norm}.scale", (width,)
        for name, shape in {"l1": (inner, width), "l2": (inner, width), "l3": (width, inner)}.items():
            yield f"{prefix}mlp.{name}.weight", shape
        if layer in config["attn_layer_idxs"]:
            for name, rows in {"Wqkv": 3 * width, "out_proj": width}.items():
                yield f"{prefix}inner_mha_cls.{name}.weight", (rows, width)
                yield f"{prefix}inner_mha_cls.{name}.bias", (rows,)
        else:
            for name, rows in {"projections": 3 * width, "out_filter_dense": width}.items():
                yield f"{prefix}{name}.weight", (rows, width)
                yield f"{prefix}{name}.bias", (rows,)
            yield f"{prefix}filter.short_filter_weight", (3 * width, 1, 3)
            yield f"{prefix}filter.short_filter_bias", (3 * width,)
            yield f"{prefix}filter.D", (width,)
            for name in ("poles", "residues"):
                yield f"{prefix}filter.{name}", (width, poles, 1, 2)


def write_checkpoint(folder: Path, size: dict[str, int]) -> int:
    """Write a synthetic checkpoint; the number of its parameters."""
    config = published_config(size)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    count, index = 0, {}
    bounds = [size["num_layers"] * shard // SHARDS for shard in range(SHARDS + 1)]
    for shard in range(SHARDS):
        layers = range(bounds[shard], bounds[shard + 1])
        shapes = dict(published_shapes(config, layers))
        if shard == 0:
            shapes["backbone.embedding_layer.weight"] = (512, size["hidden_size"])
            shapes["backbone.norm.scale"] = (size["hidden_size"],)
        tensors = {name: synthetic(name, shape, noise) for name, shape in shapes.items()}
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        count += sum(tensor.numel() for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return count


def synthetic(name: str, shape: tuple[int, ...], noise: Tensor) -> Tensor:
    """Small random numbers; poles inside the unit disc."""
    numbers = torch.Size(shape).numel()
    values = noise.repeat(-(-numbers // len(noise)))[:numbers].view(shape)
    if name.endswith("poles"):
        return values * 0.1 + torch.tensor([0.9, 0.1])
    return values.clone() if name.endswith("residues") else values.to(torch.bfloat16)


def convert(source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds, peak resident GiB and peak anonymous GiB of a conversion in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    command = [sys.executable, "-m", "hyena_hf.cli.main", "convert", str(source), str(target)]
    code = f"from hyena_hf.cli.main import main; main({command[3:]!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        anonymous = max(anonymous, anonymous_kib(process.pid))
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"hyena convert ended with {process.returncode}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20, anonymous / 2**20


def anonymous_kib(pid: int) -> int:
    """Memory of a process that belongs to no file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def compare(source: Path, target: Path) -> int:
    """Tensors of the last shard that came through unchanged."""
    index = (
        json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
        if (target / "model.safetensors.index.json").exists()
        else None
    )
    equal = 0
    with safe_open(source / f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors", framework="pt") as theirs:
        for name in theirs.keys():  # noqa: SIM118 (no mapping)
            if not name.endswith("mlp.l3.weight"):
                continue
            ours = name.replace("backbone.blocks", "model.layers").replace("mlp.l3", "mlp.down_proj")
            with safe_open(target / (index[ours] if index else "model.safetensors"), framework="pt") as file:
                if not torch.equal(file.get_tensor(ours), theirs.get_tensor(name)):
                    raise RuntimeError(f"{ours} differs from {name}")
            equal += 1
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put 29 GB for a while (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="a tiny checkpoint, page in runs/smoke")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        sizes = {"tiny (control)": TINY, "tiny again (control)": TINY}
        if not arguments.smoke:
            sizes["Evo 1, 7B"] = EVO1
        for name, size in sizes.items():
            source, target = Path(scratch) / "source", Path(scratch) / "target"
            shutil.rmtree(source, ignore_errors=True)
            count = write_checkpoint(source, size)
            largest = max(path.stat().st_size for path in source.glob("*.safetensors")) / 2**30
            seconds, resident, anonymous = convert(source, target)
            equal = compare(source, target)
            rows.append(
                [name, f"{count:,}", f"{largest:.2f}", f"{seconds:.0f}", f"{resident:.2f}", f"{anonymous:.2f}", equal]
            )
    head = ["checkpoint", "numbers", "largest shard, GiB", "seconds", "peak resident, GiB", "of it anonymous, GiB"]
    lines = markdown_table([*head, "tensors compared"], rows)
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    print("\n".join(lines))
    print(write_result("convert", "Converting 7B", command_line("bench_convert"), lines, folder=folder))


if __name__ == "__main__":
    main()
