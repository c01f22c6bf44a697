# SPDX-License-Identifier: Apache-2.0
"""Write a published checkpoint as one of this package, a few tensors at a time."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from hyena_hf.configuration_hyena import HyenaConfig

from .detection import open_checkpoint
from .layout import Conversion


# Bytes of a shard at most. Writing one takes as much memory again.
SHARD_BYTES = 10**9

_UNFINISHED = ".unfinished"


def convert_checkpoint(
    path_or_repo: str | Path,
    output: str | Path,
    layout: str | None = None,
    revision: str | None = None,
    *,
    progress: bool = False,
) -> Conversion:
    """Write a folder that AutoModel loads: safetensors, config, tokenizer, generation config, model card.

    Memory: twice a shard of at most 1 GB, and one tensor of the source. A conversion that was killed leaves no folder
    that looks whole; started again, it begins anew.

    Args:
        path_or_repo: As in `load_checkpoint`.
        output: New or empty folder.
        layout: As in `load_checkpoint`.
        revision: As in `load_checkpoint`.
        progress: Whether to draw a progress bar.

    Returns:
        What was converted: layout, config and notes.

    Raises:
        ValueError: As in `load_checkpoint`, or the folder holds something already.
    """
    target = Path(output)
    check_output(target)
    conversion = open_checkpoint(path_or_repo, layout, revision)
    work, moved = target / _UNFINISHED, []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        tensors = conversion.checked()
        numbers = write_shards(_shown(tensors, len(conversion.tensors), progress), work, conversion)
        _write_config(conversion, work)
        if conversion.tokenizer is not None:
            conversion.tokenizer().save_pretrained(work)
        (work / "README.md").write_text(_card(conversion, str(path_or_repo), numbers), encoding="utf-8")
        # the config last: without it nobody takes the folder for a model
        for path in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
            moved.append(path.rename(target / path.name))
        work.rmdir()
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        for path in moved:
            path.unlink(missing_ok=True)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        raise
    return conversion


def check_output(target: Path) -> None:
    """Refuse an output that exists and holds something else than what a killed conversion has left."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder")
    held = [path.name for path in target.iterdir() if path.name != _UNFINISHED] if target.exists() else []
    if held:
        raise ValueError(f"{target} is not empty (it holds {held[0]}); name a new folder")


def _shown(tensors: Iterable[Any], total: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield from tensors
        return
    from transformers.utils.logging import tqdm

    yield from tqdm(tensors, total=total, unit="tensor")


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, conversion: Conversion) -> int:
    """Write `model.safetensors`, or shards and their index; the number of numbers in all."""
    sizes: list[int] = []
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    numbers = held = 0
    for name, tensor in tensors:
        stored = tensor.contiguous() if ".filter." in name else tensor.to(conversion.dtype).contiguous()
        size = stored.numel() * stored.element_size()
        if shard and held + size > SHARD_BYTES:
            _write_shard(shard, folder, len(sizes))
            sizes.append(held)
            names.append(list(shard))
            shard, held = {}, 0
        # a copy of our own: views of a mapped file, or of a larger tensor, would be written whole
        shard[name] = stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored
        held += size
        numbers += stored.numel()
    _write_shard(shard, folder, len(sizes))
    sizes.append(held)
    names.append(list(shard))
    _name_shards(folder, names, sum(sizes), numbers)
    return numbers


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> None:
    save_file(shard, folder / f"shard-{number}", metadata={"format": "pt"})


def _name_shards(folder: Path, names: list[list[str]], size: int, numbers: int) -> None:
    """The names that transformers looks for, now that the number of shards is known."""
    if len(names) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = {}
    for number, held in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        files |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": size, "total_parameters": numbers}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(conversion: Conversion, folder: Path) -> None:
    config: HyenaConfig = conversion.config
    config.architectures = [conversion.model_class.__name__]
    config.dtype = str(conversion.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if hasattr(conversion.model_class, "generate"):
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def _card(conversion: Conversion, source: str, numbers: int) -> str:
    """The model card."""
    config = conversion.config
    kinds = ", ".join(sorted(set(config.layer_types)))
    name = source if not Path(source).exists() else Path(source).name
    notes = "".join(f"- {note}\n" for note in conversion.warnings + conversion.notes)
    model = conversion.model_class.__name__
    dtype, length = str(conversion.dtype).removeprefix("torch."), config.max_position_embeddings
    row = (f"{config.num_hidden_layers}", f"{config.hidden_size}", kinds, f"{numbers:,}")
    row = (*row, f"{dtype}, filters float32", f"{length:,}")
    auto = f"AutoModel{model.removeprefix('Hyena')}"
    return f"""---
library_name: transformers
tags: [hyena]
---
# {name}, as a `{model}`

Converted from the published layout `{conversion.layout}` by `hyena convert`. The licence is that of the original.

| layers | width | mixers | numbers stored | dtype | trained length |
|---|---|---|---|---|---|
| {" | ".join(row)} |

```python
import hyena_hf
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

{notes}"""


__all__ = ["convert_checkpoint"]
