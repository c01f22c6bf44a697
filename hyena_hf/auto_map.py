# SPDX-License-Identifier: Apache-2.0
"""Let a saved model be loaded by a program that does not import `hyena_hf`, where `hyena_hf` is installed.

    model.save_pretrained(folder); tokenizer.save_pretrained(folder); write_auto_map(folder)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

transformers runs the file that `auto_map` in `config.json` names. Ours holds one import, which registers everything
else. Where `hyena_hf` is missing, transformers says so and names the package.
"""

import json
from pathlib import Path
from typing import Any


STUB = "hyena_stub"
TOKENIZERS = ("HyenaByteTokenizer", "HyenaNucleotideTokenizer")
_LINES = f"""# Run by transformers (`trust_remote_code=True`): importing hyena_hf registers its models and tokenizers.
from hyena_hf import {", ".join(TOKENIZERS)}, HyenaConfig
"""


def write_stub(folder: str | Path) -> None:
    """Write the file that `auto_map` names."""
    (Path(folder) / f"{STUB}.py").write_text(_LINES, encoding="utf-8")


def write_auto_map(folder: str | Path) -> None:
    """Make a saved model, and our tokenizer where it lies beside it, loadable with `trust_remote_code=True`.

    Models that are loaded from the folder and saved again take it along.

    Args:
        folder: Where `save_pretrained` wrote the model.

    Raises:
        ValueError: The folder holds no Hyena model.
    """
    folder = Path(folder)
    config = folder / "config.json"
    settings = _read(config)
    if settings.get("model_type") != "hyena":
        raise ValueError(
            f"{folder} holds no Hyena model (config.json has model_type {settings.get('model_type')!r}, expected "
            f"'hyena'); save one there first, model.save_pretrained(folder)"
        )
    write_stub(folder)
    _write(config, {**settings, "auto_map": {"AutoConfig": f"{STUB}.HyenaConfig"}})
    tokenizer = folder / "tokenizer_config.json"
    settings = _read(tokenizer)
    if (name := settings.get("tokenizer_class")) in TOKENIZERS:
        _write(tokenizer, {**settings, "auto_map": {"AutoTokenizer": [None, f"{STUB}.{name}"]}})


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


__all__ = ["write_auto_map"]
