# SPDX-License-Identifier: Apache-2.0
"""Read torch files (`.ckpt`, `.pt`, `.bin`) as tensors only: no code that a pickle names is ever run.

torch's own restricted unpickler does the reading (`weights_only=True`), memory-mapped where the file allows it. Files
of Lightning hold settings beside the weights as pickled objects of OmegaConf and others, and those of Evo 2 byte
buffers of Transformer Engine. Such objects become empty placeholders of ours, which keep nothing and call nothing; the
classes that they name are never imported. A file that names anything else (a function of `os`, say) is refused.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


# Packages whose objects lie beside the weights in published files; none of their code runs here.
_SETTINGS = frozenset(
    {
        *("omegaconf", "hydra", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
        *("torchmetrics", "argparse", "collections", "typing", "pathlib", "enum", "datetime", "numpy", "copyreg"),
        *("_codecs", "transformer_engine", "deepspeed", "transformers"),
    }
)
_BUILTINS = frozenset({"dict", "list", "set", "frozenset", "tuple", "int", "float", "str", "bool", "bytes", "object"})
_HARMLESS = frozenset({"io.BytesIO", "_io.BytesIO", *(f"builtins.{name}" for name in _BUILTINS)})


class Placeholder:
    """Stands for an object of a foreign class: takes whatever a pickle hands it and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":  # noqa: ARG004 (swallowed on purpose)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


class JoinedParts(io.RawIOBase):
    """The bytes of several files as those of one, which they were cut from.

    Args:
        parts: Files in order.
    """

    def __init__(self, parts: list[Path]) -> None:
        super().__init__()
        self._files = [part.open("rb") for part in parts]
        self._sizes = [part.stat().st_size for part in parts]
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as in any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the part at this position; fewer bytes at the end of one."""
        start = self._at
        for file, size in zip(self._files, self._sizes, strict=True):
            if start < size:
                file.seek(start)
                count = file.readinto(memoryview(buffer)[: size - start])
                self._at += count
                return count
            start -= size
        return 0

    def close(self) -> None:
        """Close all parts."""
        for file in self._files:
            file.close()
        super().close()


def read_torch_file(paths: list[Path]) -> dict[str, Any]:
    """The tensors of a torch file by name; values that are no tensors are left out.

    Args:
        paths: The file, or the parts that it was cut into, in order.

    Returns:
        Names and CPU tensors. Those of a whole file in torch's zip form are memory-mapped: reading one costs nothing
        until its numbers are used.

    Raises:
        ValueError: The file is truncated or no torch file, names code, or holds no tensors.
    """
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more parts"
    try:
        content = _load(paths, name)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{name} is truncated, corrupt or no torch file ({_first_line(error)}); copy it again"
        ) from error
    tensors = dict(_tensors(content))
    if not tensors:
        raise ValueError(f"{name} holds no tensors by name; name the file with the weights")
    return tensors


def _first_line(error: BaseException) -> str:
    first = str(error).partition("\n")[0][:200]
    # torch's own advice is to let the file run code
    return type(error).__name__ if "weights_only" in first else first


def _load(paths: list[Path], name: str) -> Any:
    with _opened(paths) as file:
        zipped = zipfile.is_zipfile(file)
        file.seek(0)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        file.seek(0)
        placeholders: list[Any] = [(_placeholder(full), full) for full in _checked(foreign, name)]
        mapped: Any = {"mmap": True} if zipped and len(paths) == 1 else {}
        with torch.serialization.safe_globals(placeholders):
            try:
                return torch.load(  # noqa: TID251 (the one place that reads foreign files: tensors only)
                    paths[0] if mapped else file, map_location="cpu", weights_only=True, **mapped
                )
            except Exception as error:
                found = re.search(r"GLOBAL\s+([\w.]+)", str(error))
                if found is None or "nsupported" not in str(error):
                    raise
                _checked([found.group(1)], name)
                raise ValueError(
                    f"{name} is in torch's form of before 2020 and holds objects besides tensors ({found.group(1)}); "
                    f"save its state dict again with a current torch"
                ) from error


def _opened(paths: list[Path]) -> Any:
    return paths[0].open("rb") if len(paths) == 1 else io.BufferedReader(JoinedParts(paths))


def _empty(*args: Any) -> dict:  # noqa: ARG001 (swallowed on purpose)
    return {}


def _empty_list(*args: Any) -> list:  # noqa: ARG001 (swallowed on purpose)
    return []


def _placeholder(full: str) -> Any:
    if full == "collections.defaultdict":
        return _empty  # torch sets items of plain dictionaries only
    if full == "collections.deque":
        return _empty_list  # and appends to plain lists only
    return type(full.rpartition(".")[2], (Placeholder,), {})


def _checked(foreign: list[str], name: str) -> list[str]:
    """The names of classes that placeholders may stand for, after refusing all others."""
    for full in foreign:
        if full not in _HARMLESS and full.partition(".")[0] not in _SETTINGS and full not in _BUILTINS:
            raise ValueError(
                f"{name} is refused: it names {full}, which is no tensor and no known kind of settings, and a pickle "
                f"may run code; nothing was run. Get the weights as safetensors, or as a file of tensors only"
            )
    return foreign


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, of a state dict or of what usual trainers put around one."""
    if not isinstance(content, dict):
        return
    if isinstance(content.get("state"), dict):  # composer puts all else beside it
        content = content["state"]
    for wrapper in ("state_dict", "model_state_dict", "module", "model"):
        inner = content.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            content = inner
            break
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield key, value.detach()


__all__ = ["read_torch_file"]
