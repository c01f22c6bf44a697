"""Distil a trained Hyena model into recurrences, then train it further on text to win back what the fit has lost.

    python -m training.distill runs/book/model runs/book-16 --state-size 16 --data book.txt
    python -m training.distill runs/book/model runs/book-4 --state-size 4 --data book.txt --filters-only
    python -m training.distill MODEL_DIR OUT --smoke                # 20 steps on a little of the standard library

The same command goes on where it was interrupted; another one is refused in the same folder.

    OUT/distilled/    the model as `hyena_hf.distillation.distill` gives it, with its report
    OUT/model/        the same model after training, for from_pretrained
    OUT/loss.png      the loss curves        OUT/scores.json    perplexities of the original and of both

Filters are trained as they are stored, by their poles and residues; after every step poles that have left the unit
disc go back to its edge. 5% of the text, chosen by a hash of its name, is kept for validation and is what the
perplexities are of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

import hyena_hf  # noqa: F401  registers the Auto classes
from hyena_hf.distillation import distill
from hyena_hf.filters import ModalFilter
from training.data import PackedRows, collate_rows, module_name, pack_documents, read_documents, split_documents
from training.data import stdlib_documents as standard_library
from training.recipe import Recipe, train, write_json
from training.train_lm import SMOKE_CHARACTERS, VALIDATION_ROWS, Encoder, shorten
from training.trainer import STAGING, publish


COMMAND, SCORES = "distill.json", "scores.json"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the flags are listed in a test."""
    parser = argparse.ArgumentParser(
        prog="python -m training.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="folder of the trained model and its tokenizer")
    add("output", type=Path, help="folder of this run")
    add("--state-size", type=int, default=16, help="real numbers that a filter may remember (default %(default)s)")
    add("--data", nargs="+", metavar="SOURCE", help="as for train_lm; default: Python's standard library")
    add("--filters-only", action="store_true", help="train the filters alone; everything else stays as it was")
    add("--batch-size", type=int, default=8, help="rows in a step, each as long as the model was trained for")
    add("--steps", type=int, default=200, help="optimizer steps (default %(default)s)")
    add("--learning-rate", type=float, default=5e-4, help="the peak (default %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the rows")
    add("--smoke", action="store_true", help="20 steps, a little of the data: proves only that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.batch_size, options.steps = 4, 20
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    if options.smoke:
        torch.set_num_threads(1)  # tiny models lose by sharing work
    torch.set_float32_matmul_precision("high")  # float32 transforms: a training step rounds more than they do
    teacher = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = read_documents(options.data) if options.data else standard_library()
    documents = shorten(documents, SMOKE_CHARACTERS) if options.smoke else documents
    splits = split_documents(documents, validation=0.05, heldout=0, group=str if options.data else module_name)
    length = teacher.config.max_position_embeddings
    train_rows, validation_rows = (pack_documents(map(Encoder(tokenizer), part), length) for part in splits[:2])
    interval = 10 * max(1, min(10, options.steps // 100))
    recipe = Recipe(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        save_every=interval,
        evaluate_every=interval,
    )
    scores = distil_and_train(
        teacher,
        train_rows,
        validation_rows.first(VALIDATION_ROWS),
        output_dir=options.output,
        recipe=recipe,
        state_size=options.state_size,
        filters_only=options.filters_only,
        tokenizer=tokenizer,
    )
    print("validation perplexity: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    print(f"the model is in {options.output / 'model'}")
    if options.smoke:
        print("This was a smoke run: its numbers mean nothing.")


def distil_and_train(
    teacher: Any,
    train_rows: PackedRows,
    validation_rows: PackedRows,
    *,
    output_dir: Path,
    recipe: Recipe,
    state_size: int,
    filters_only: bool = False,
    tokenizer: Any = None,
) -> dict[str, float]:
    """Distil a model and train it further, or go on with a run that was interrupted.

    Args:
        teacher: a Hyena language model, left as it is.
        train_rows, validation_rows: from `pack_documents`.
        output_dir: holds everything about this run; another run needs another folder.
        recipe: of the training.
        state_size: real numbers that a filter may remember.
        filters_only: train poles, residues and taps at lag 0, nothing else.
        tokenizer: saved with the models.

    Returns:
        Validation perplexity of the `original`, `distilled` and `trained` model.

    Raises:
        ValueError: the folder belongs to another run, or the model cannot be distilled.
    """
    _claim(output_dir, {"state_size": state_size, "filters_only": filters_only, "teacher": _digest(teacher)})
    student = distilled(teacher, output_dir, state_size, tokenizer)
    path = output_dir / SCORES
    scores = json.loads(path.read_text()) if path.exists() else {}
    if not scores:
        for name, model in {"original": teacher, "distilled": student}.items():
            scores[name] = perplexity(model, validation_rows, recipe.batch_size)
        write_json(path, scores)
    if filters_only:
        _freeze_all_but_filters(student)
    set_seed(recipe.seed)
    train(student, train_rows, validation_rows, output_dir=output_dir, recipe=recipe, tokenizer=tokenizer)
    scores["trained"] = perplexity(student, validation_rows, recipe.batch_size)
    write_json(path, scores)
    return scores


def _claim(output_dir: Path, this: dict[str, Any]) -> None:
    """Write down what this run is; refuse a folder in which another one was begun."""
    path = output_dir / COMMAND
    before = json.loads(path.read_text()) if path.exists() else this
    if before != this:
        raise ValueError(
            f"{output_dir} holds another run: it was begun with {before}, not {this}; choose another output folder, "
            "or repeat the command with which that run was begun"
        )
    write_json(path, this)


def _digest(model: Any) -> str:
    """Of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def distilled(teacher: Any, output_dir: Path, state_size: int, tokenizer: Any) -> Any:
    """The distilled model from OUTPUT/distilled; made there first if it is missing."""
    folder = output_dir / "distilled"
    if not folder.exists():
        student, report = distill(
            teacher, state_size=state_size, work_dir=output_dir / "fits", progress=sys.stderr.isatty()
        )
        staged = output_dir / STAGING / "distilled"
        shutil.rmtree(staged.parent, ignore_errors=True)
        student.save_pretrained(staged)
        report.save(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        publish(staged, folder)
    return type(teacher).from_pretrained(folder)


def _freeze_all_but_filters(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ModalFilter):
            module.requires_grad_(True)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: PackedRows, batch_size: int) -> float:
    """Of all tokens of packed rows that are predicted."""
    model.eval()
    nats, tokens = 0.0, 0
    for start in tqdm(range(0, len(rows), batch_size), desc="perplexity", disable=None):
        batch = collate_rows([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        nats += losses.item()
        tokens += int((batch["labels"][:, 1:] >= 0).sum())
    return math.exp(nats / tokens)


if __name__ == "__main__":
    main()
