"""Train a causal language model on text: a file, a folder, a dataset, or Python's own standard library.

    python -m training.train_lm --smoke                                    # under a minute: does everything work?
    python -m training.train_lm --data book.txt --output runs/book         # a 1M-parameter byte-level Hyena
    python -m training.train_lm --data corpus/ --tokenizer bpe:8192 --model config.json --steps 20000 --output runs/bpe
    python -m training.train_lm --data hf:roneneldan/TinyStories --length 1024 --output runs/stories
    torchrun --nproc-per-node 8 -m training.train_lm --data corpus.jsonl --output runs/ddp

The same command goes on where it was interrupted, from the last complete checkpoint in --output; a command with other
settings is refused there. The trained model is in OUTPUT/model, for `AutoModelForCausalLM.from_pretrained` (after
`import hyena_hf`); OUTPUT/loss.png and OUTPUT/metrics.jsonl show how it went. 5% of the text, chosen by a hash of its
name, is kept for validation. Measured numbers of a run: `make demo`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from hyena_hf import HyenaConfig
from hyena_hf.tokenization_byte import HyenaByteTokenizer
from training.data import (
    ENCODING_ERRORS,
    Document,
    module_name,
    pack_documents,
    read_documents,
    split_documents,
    stdlib_documents,
)
from training.recipe import Recipe, train


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=256),
    "small": dict(hidden_size=128, num_hidden_layers=4, intermediate_size=512),
    "153m": dict(hidden_size=864, num_hidden_layers=18, intermediate_size=1728),  # the published one, 150B tokens
}
VALIDATION_ROWS = 256  # at most, so that a validation loss stays cheap
SMOKE_CHARACTERS = 200_000


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the flags are listed in a test."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train_lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", metavar="SOURCE", help="files, folders or hf:NAME; default: Python's standard library")
    add("--text-column", default="text", help="field of .jsonl lines and dataset rows")
    add(
        "--encoding-errors", choices=ENCODING_ERRORS, default="strict", help="what to do with bytes that are not UTF-8"
    )
    add("--tokenizer", default="byte", help="byte, bpe:SIZE (trained on the data) or a pretrained tokenizer")
    add("--model", default="small", help=f"{', '.join(PRESETS)}, a config.json for a new model, or a pretrained model")
    add("--length", type=int, default=512, help="tokens in a row")
    add("--batch-size", type=int, default=16, help="rows in a step, on each device")
    add("--steps", type=int, help="optimizer steps; default: once over the data")
    add("--learning-rate", type=float, default=1e-3, help="the peak")
    add("--output", type=Path, help="folder of this run; default: runs/train_lm, or runs/train_lm-smoke")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a tiny model, 20 steps, a little of the data: proves only that it runs")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path("runs/train_lm-smoke" if options.smoke else "runs/train_lm")
    if options.smoke:
        options.model, options.length, options.batch_size, options.steps = "tiny", 64, 4, 20
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.disable_progress_bar()
    if options.smoke:
        torch.set_num_threads(1)  # tiny models lose by sharing work
    torch.set_float32_matmul_precision("high")  # float32 transforms: a training step rounds more than they do
    processes = PartialState(cpu=not torch.accelerator.is_available())
    documents = _documents(options)
    with processes.local_main_process_first():
        tokenizer = make_tokenizer(options.tokenizer, documents, options.output)
    splits = split_documents(documents, validation=0.05, heldout=0, group=str if options.data else module_name)
    train_rows = pack_documents(map(Encoder(tokenizer), splits.train), options.length)
    validation_rows = pack_documents(map(Encoder(tokenizer), splits.validation), options.length)
    set_seed(options.seed)
    model = make_model(options.model, tokenizer, options.length)
    steps = options.steps or math.ceil(len(train_rows) / (options.batch_size * processes.num_processes))
    interval = 10 * max(1, min(50, steps // 100))
    recipe = Recipe(
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        save_every=interval,
        evaluate_every=interval,
    )
    processes.print(
        f"{model.num_parameters(only_trainable=True):,} parameters, {train_rows.num_tokens:,} tokens in "
        f"{train_rows.num_documents:,} documents, {steps:,} steps of {options.batch_size} x {options.length}"
    )
    result = train(
        model,
        train_rows,
        validation_rows.first(VALIDATION_ROWS),
        output_dir=options.output,
        recipe=recipe,
        tokenizer=tokenizer,
    )
    processes.print(
        f"validation: {result.validation_curve[-1][1]:.3f} bits per token; {result.train_seconds:,.0f} s of training, "
        f"{result.tokens_per_second:,.0f} tokens/s; the model is in {result.model_dir}"
    )
    if options.smoke:
        processes.print("This was a smoke run: its numbers mean nothing.")


def _documents(options: argparse.Namespace) -> list[Document]:
    documents = (
        read_documents(options.data, text_column=options.text_column, encoding_errors=options.encoding_errors)
        if options.data
        else stdlib_documents()
    )
    return shorten(documents, SMOKE_CHARACTERS) if options.smoke else documents


def shorten(documents: Sequence[Document], characters: int) -> list[Document]:
    """An equal share of the beginning of every document, so that about `characters` are left."""
    share = max(1, characters // len(documents))
    return [Document(document.name, document.text[:share]) for document in documents]


def make_tokenizer(choice: str, documents: Sequence[Document], output_dir: Path) -> PreTrainedTokenizerBase:
    """Make or load a tokenizer; a trained one is kept in OUTPUT/tokenizer, so that a resumed run has the same.

    Args:
        choice: `byte`, `bpe:SIZE`, or what AutoTokenizer loads.
        documents: what BPE merges are learned from.
        output_dir: folder of the run.

    Raises:
        ValueError: `bpe:` without a size, or a tokenizer that does not load.
    """
    kind, _, size = choice.partition(":")
    if kind == "byte":
        return HyenaByteTokenizer()
    if kind != "bpe":
        return AutoTokenizer.from_pretrained(choice)
    if not size.isdigit():
        raise ValueError(f"--tokenizer {choice!r} needs a vocabulary size after bpe:, e.g. bpe:8192")
    folder = output_dir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        trained = HyenaByteTokenizer.train_bpe((document.text for document in documents), vocab_size=int(size))
        trained.save_pretrained(folder)
    return HyenaByteTokenizer.from_pretrained(folder)


class Encoder:
    """Token ids of a document, with the end token that tells a generation where to stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def __call__(self, document: Document) -> torch.Tensor:
        return torch.tensor(self.tokenizer(document.text, add_special_tokens=False).input_ids + self.end)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of a configuration that belong to the tokenizer."""
    return dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_model(choice: str, tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedModel:
    """Make a model with new weights from a preset or a config.json, or load a pretrained one.

    Raises:
        ValueError: the model has fewer token ids than the tokenizer, or fewer positions than a row.
    """
    if choice in PRESETS:
        config = HyenaConfig(**PRESETS[choice], **special_ids(tokenizer), max_position_embeddings=length)
        model = AutoModelForCausalLM.from_config(config)
    elif choice.endswith(".json"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(choice))
    else:
        model = AutoModelForCausalLM.from_pretrained(choice)
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"the model's vocab_size ({model.config.vocab_size}) must be at least the tokenizer's ({len(tokenizer)}); "
            "choose the tokenizer that belongs to the model, or a larger vocab_size in its configuration"
        )
    name = model.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    positions = vars(model.config).get(name, length)  # models without a limit have no such field
    if positions < length:
        raise ValueError(
            f"--length ({length}) is more than the positions of the model ({positions}); choose --length {positions}"
        )
    return model


if __name__ == "__main__":
    main()
