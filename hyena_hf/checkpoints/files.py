# SPDX-License-Identifier: Apache-2.0
"""Find the files of a checkpoint and hand out its tensors one at a time."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .pickles import read_torch_file


# Revisions that the publishers say to take in place of the first upload, whose weights are wrong.
_REVISIONS = {
    "togethercomputer/evo-1-8k-base": "1.1_fix",
    "togethercomputer/evo-1-131k-base": "1.1_fix",
}

# Bytes of a mapped file that are read before it is opened anew, which gives its pages back.
_MAPPED_BYTES = 2**29

_WANTED = ["*.json", "*.safetensors", "*.ckpt", "*.pt", "*.pt.part*", "*.bin", "*.yml", "*.yaml", "*.txt", "*.model"]
_TORCH = (".ckpt", ".pt", ".pth", ".bin")
_PART = re.compile(r"\.part(\d+)$")
# Files of a trainer that end like weights and are none.
_OTHERS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|scaler)\.(bin|pt|pth)$")


@dataclass
class Tensors:
    """The tensors of a checkpoint by their published names; nothing is read before it is asked for.

    Attributes:
        files: Path of each tensor, in the order of the files.
        loaded: Tensors of torch files, memory-mapped.
    """

    files: dict[str, Path]
    loaded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._open: tuple[Path, Any] | None = None
        self._stack = ExitStack()
        self._mapped = 0

    def names(self) -> list[str]:
        """Published names, in the order of the files."""
        return list(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        if name in self.loaded:
            return self.loaded[name]
        path = self.files[name]
        if self._open is None or self._open[0] != path or self._mapped > _MAPPED_BYTES:
            # pages of a file that was closed take no memory
            self._stack.close()
            self._open, self._mapped = (path, self._stack.enter_context(_open_safetensors(path))), 0
        tensor = self._open[1].get_tensor(name)
        self._mapped += tensor.numel() * tensor.element_size()
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its numbers."""
        if name in self.loaded:
            return tuple(self.loaded[name].shape)
        with _open_safetensors(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor with at least one dimension, without reading its numbers."""
        if name in self.loaded:
            return self.loaded[name].dtype
        with _open_safetensors(self.files[name]) as file:
            return file.get_slice(name)[:0].dtype


@dataclass
class Source:
    """A checkpoint as it lies on disk.

    Attributes:
        name: What the user called it.
        folder: Where its files lie.
        config: Contents of its configuration file; empty if it has none.
        tensors: Its weights.
        title: Its name without the path: what names of published checkpoints are recognised by.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    title: str


def open_source(path_or_repo: str | Path, revision: str | None = None) -> Source:
    """Open a folder, a file of weights, or a repository of the hub.

    Args:
        path_or_repo: A folder, a file, or OWNER/NAME.
        revision: Branch, tag or commit of a repository; None: the one that its publishers recommend.

    Raises:
        ValueError: There is no such thing, files are missing, truncated or ambiguous.
    """
    name, path = str(path_or_repo), Path(path_or_repo).expanduser()
    title = path.name
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision ({revision!r}) is for repositories of the hub, but {name} lies on this disk")
    elif isinstance(path_or_repo, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        path = _download(name, revision)
    else:
        raise ValueError(f"{name} is no file, no folder and no repository (OWNER/NAME); check the spelling")
    folder = path if path.is_dir() else path.parent
    weights = _weight_files(folder) if path.is_dir() else _of_one_file(path)
    if not path.is_dir():
        title = f"{folder.name}/{path.name}"
    return Source(name, folder, _read_config(folder), _read_weights(weights), title)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision or _REVISIONS.get(repo), allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repo} is no folder here, and could not be fetched from the hub ({str(error).splitlines()[0]}); check "
            f"the name and the network, or download it and name the folder"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder, in order."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _of_index(folder, folder / index)
    found = [
        path
        for path in sorted(folder.iterdir())
        if (path.suffix == ".safetensors" or path.suffix in _TORCH or _PART.search(path.name))
        and not _OTHERS.match(path.name)
    ]
    for usual in ("model.safetensors", "pytorch_model.bin", "weights.ckpt"):
        if folder / usual in found:
            return [folder / usual]
    groups: dict[str, list[Path]] = {}
    for path in found:
        groups.setdefault(_PART.sub("", path.name), []).append(path)
    if not groups:
        listed = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{folder} holds no weights ({listed}); expected *.safetensors, *.ckpt, *.pt, *.bin or parts *.pt.part0"
        )
    if len(groups) > 1:
        raise ValueError(f"{folder} holds several files of weights ({', '.join(groups)}); name one of them")
    (files,) = groups.values()
    return _in_order(files)


def _of_one_file(path: Path) -> list[Path]:
    if _PART.search(path.name):
        stem = _PART.sub("", path.name)
        return _in_order([other for other in path.parent.iterdir() if _PART.sub("", other.name) == stem != other.name])
    if path.suffix == ".safetensors" or path.suffix in _TORCH:
        return [path]
    if path.name.endswith(".index.json"):
        return _of_index(path.parent, path)
    raise ValueError(f"{path} is no file of weights; expected .safetensors, {', '.join(_TORCH)}, or a folder")


def _in_order(parts: list[Path]) -> list[Path]:
    """Parts 0, 1, ... of a file that was cut, or the one file."""
    numbers = [_PART.search(part.name) for part in parts]
    if numbers[0] is None:
        return parts
    ordered = sorted(zip((int(number.group(1)) for number in numbers if number), parts, strict=True))
    missing = sorted({*range(ordered[-1][0] + 1)} - {number for number, _ in ordered})
    if missing:
        raise ValueError(
            f"{_PART.sub('', parts[0].name)} was cut into parts, of which {', '.join(f'part{n}' for n in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {parts[0].parent}; copy all of them"
        )
    return [part for _, part in ordered]


def _of_index(folder: Path, index: Path) -> list[Path]:
    """The shards that an index names."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map; copy the file again")
    if not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
        raise ValueError(f"{index} names shards that are no plain file names; copy the file again")
    names = sorted(set(listed.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{index.name} lists {len(names)} shards, of which {len(missing)} are missing in {folder}: "
            f"{', '.join(missing[:5])}; copy all of them"
        )
    return [folder / name for name in names]


def _read_weights(files: list[Path]) -> Tensors:
    owners: dict[str, Path] = {}
    loaded: dict[str, Tensor] = {}
    if files[0].suffix != ".safetensors":
        shards = [files] if _PART.search(files[0].name) else [[file] for file in files]
        for shard in shards:
            tensors = read_torch_file(shard)
            loaded |= tensors
            owners |= dict.fromkeys(tensors, shard[0])
        return Tensors(owners, loaded)
    for file in files:
        with _open_safetensors(file) as opened:
            owners |= dict.fromkeys(opened.keys(), file)
    return Tensors(owners)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated, corrupt or no safetensors file ({error}); copy it again") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration beside the weights: config.json, or the only other file that looks like one."""
    if (folder / "config.json").is_file():
        return _unwrapped(_read_json(folder / "config.json"))
    found = list(_other_configs(folder))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several configurations ({', '.join(path.name for path, _ in found)}); keep one, or "
            f"rename the right one to config.json"
        )
    return found[0][1] if found else {}


def _unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """The model's part, which safari's trainer puts under "model"."""
    return content["model"] if isinstance(content.get("model"), dict) else content


def _other_configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and "index" not in path.name:
            content = _read_json(path, missing_ok=True)
        elif path.suffix in (".yml", ".yaml"):
            content = _read_yaml(path)
        else:
            continue
        content = _unwrapped(content)
        if {"d_model", "hidden_size"} & set(content):
            yield path, content


def _read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        if missing_ok:
            return {}
        raise ValueError(f"{path} is no JSON ({error}); copy it again") from error
    if not isinstance(content, dict):
        if missing_ok:
            return {}
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}  # not ours: other programs' files lie beside weights too
    return content if isinstance(content, dict) else {}


__all__ = ["Source", "Tensors", "open_source"]
