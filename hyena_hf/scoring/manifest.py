# SPDX-License-Identifier: Apache-2.0
"""Whose results a folder holds: fingerprints of model, tokenizer and input, written before the first result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


MANIFEST = "_manifest.json"  # readers of Parquet folders skip what begins with _
FORMAT = 1
_VALUES = 1 << 22  # of a tensor, which are read at once
_BLOCK = 1 << 20


def model_fingerprint(model: Any) -> str:
    """The same for the same weights, config and active adapters wherever they lie; reads every byte of the weights."""
    digest = hashlib.sha256()
    config = json.loads(model.config.to_json_string(use_diff=False))
    for where in ("_name_or_path", "transformers_version", "architectures", "auto_map"):
        config.pop(where, None)
    digest.update(json.dumps([config, _adapters(model)], sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for start in range(0, flat.numel(), _VALUES):
            block = flat[start : start + _VALUES].contiguous().cpu()
            digest.update(block.view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapters(model: Any) -> list[Any]:
    """What peft has put into a model, and which of it counts: two adapters of one model have the same weights."""
    settings = {name: dict(config.to_dict()) for name, config in (getattr(model, "peft_config", None) or {}).items()}
    for config in settings.values():
        for where in ("base_model_name_or_path", "revision", "inference_mode", "peft_version"):
            config.pop(where, None)
    layers = [
        [name, layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", None)]
        for name, layer in model.named_modules()
        if hasattr(layer, "merged_adapters")
    ]
    return [settings, layers] if settings or layers else []


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The same for tokenizers that read texts alike."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = None if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):
        (rules or {}).pop(state, None)
    words = type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), rules
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder."""
    files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for part in files:
        with part.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def claim(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Make a folder ours, or go on in one that the same job has begun.

    Args:
        folder: For results; made if it is missing.
        job: What decides on the results, as JSON takes it.

    Returns:
        The manifest: `job`, and `summary`, None until the results are whole.

    Raises:
        ValueError: The folder holds something else, or results of another job.
    """
    check_folder(folder)
    manifest, path = {"format": FORMAT, "job": job, "summary": None}, folder / MANIFEST
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
        return manifest
    try:
        begun = json.loads(path.read_text())
        old = begun["job"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of ours ({error}); name a new folder") from error
    other = sorted(key for key in {*job, *old} if job.get(key) != old.get(key))
    if other:
        key = other[0]
        also = f"; also {', '.join(other[1:])}" if other[1:] else ""
        raise ValueError(
            f"{folder} was begun with another {key}: {old.get(key)!r} there, {job.get(key)!r} now{also}. Repeat the "
            f"command it was begun with, or name a new folder"
        )
    for left in folder.glob(".*.unfinished"):
        left.unlink()
    return begun


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than results.

    Raises:
        ValueError: It does, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder")
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    held = next((path for path in folder.iterdir() if not path.name.startswith(f".{MANIFEST}")), None)
    if held is not None:
        raise ValueError(f"{folder} is not empty (it holds {held.name}); name a new folder")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    with whole(folder / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=1))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when that has gone well: a kill leaves no half files under it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
