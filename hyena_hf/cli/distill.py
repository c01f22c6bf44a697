"""`hyena distill`: a trained model into one that generates in constant memory."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

# Where unfinished work lies inside OUT: fits of layers, then the model before it is whole.
_WORK, _UNFINISHED = ".distillation", ".unfinished"


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "distill",
        help="fit every long filter by a recurrence",
        description="Fit every long filter of a model by a small state-space model, and write a model that generates "
        "in constant memory, with a report. A run that was killed goes on where it was when started again.",
    )
    parser.add_argument("source", metavar="IN", help="folder of a model, or its name on the hub")
    parser.add_argument("target", metavar="OUT", type=Path, help="new folder")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--state-size", type=int, help="real numbers that a filter may remember (default 16)")
    sizes.add_argument("--tolerance", type=float, help="largest relative l2 error of a filter, in place of a size")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="file on which both models are compared")
    parser.add_argument(
        "--weighted", action="store_true", help="fit for the frequencies that filters meet on that text; slower"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of it that are used (default 16384)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Distil a model from one folder into another."""
    from transformers import AutoModelForCausalLM

    from hyena_hf.distillation import distill

    if arguments.weighted and arguments.calibrate is None:
        raise ValueError("--weighted needs a text to measure on; add --calibrate TEXT")
    _check_inputs(arguments)
    check_target(arguments.target)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.source).eval()
    tokenizer = _tokenizer(arguments.source)
    calibration = None
    if arguments.calibrate is not None:
        limit = model.config.max_position_embeddings
        calibration = read_tokens(arguments.calibrate, tokenizer, arguments.tokens, limit)
    theirs = arguments.target.exists()
    with _writing(arguments.target):
        work = claim(arguments.target)
    try:
        student, report = distill(
            model,
            state_size=arguments.state_size,
            tolerance=arguments.tolerance,
            calibration=calibration,
            weighted=arguments.weighted,
            work_dir=work,
            progress=sys.stderr.isatty(),
        )
    except (TypeError, ValueError):
        for folder in (work,) if theirs else (work, arguments.target):
            with suppress(OSError):  # it holds finished layers
                folder.rmdir()
        raise
    with _writing(arguments.target):
        unfinished = arguments.target / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        student.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        report.save(unfinished)
        publish(unfinished, arguments.target)
        shutil.rmtree(work)
    sys.stdout.write(f"{report}\nwritten to {arguments.target}\n")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Say of a disk that is full or a folder that is read-only what can be done."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{target} cannot be written ({error}); make room or get the right to write there, then repeat the "
            f"command: layers that are finished are kept"
        ) from error


def _check_inputs(arguments: argparse.Namespace) -> None:
    source, text = arguments.source, arguments.calibrate
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ValueError(f"{source} is no folder, and no name on the hub (OWNER/NAME); name that of a trained model")
    if text is not None and not text.is_file():
        raise ValueError(f"--calibrate {text}: there is no such file; name a text")
    if arguments.tokens < 2:
        raise ValueError(f"--tokens {arguments.tokens} predict nothing; use at least 2")


def check_target(target: Path) -> None:
    """Refuse a folder that holds something else than what a killed run has left."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a new folder")
    begun = (target / _WORK).exists() and not (target / "config.json").exists()
    if target.exists() and not begun and (held := next(target.iterdir(), None)) is not None:
        raise ValueError(f"{target} is not empty (it holds {held.name}); name a new folder")


def claim(target: Path) -> Path:
    """Folder for unfinished work inside a new one, or one that a killed run has left; any other is refused."""
    check_target(target)
    work = target / _WORK
    work.mkdir(parents=True, exist_ok=True)
    return work


def publish(unfinished: Path, target: Path) -> None:
    """Move finished files up, config.json last: a folder that has one is whole."""
    files = sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        path.replace(target / path.name)
    unfinished.rmdir()


def _tokenizer(source: str) -> Any:
    """The tokenizer beside a model; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None


def read_tokens(path: Path, tokenizer: Any, count: int, longest: int) -> list[Tensor]:
    """The first tokens of a text, in rows of up to `longest`."""
    import torch

    if tokenizer is None:
        raise ValueError(f"--calibrate {path} needs a tokenizer, but the model's folder has none")
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :count]
    if ids.shape[1] < 2:
        raise ValueError(f"{path} holds {ids.shape[1]} tokens, too few to predict any; give a longer text")
    rows = ids.split(min(longest, 2048), dim=1)
    return [row for row in rows if torch.numel(row) > 1]
