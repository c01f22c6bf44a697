# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder whose attention is linear: convert it, teach it, save it, load it, compare it with the original.

    python -m examples.minilm_linear --output runs/minilm                             # data of training/real_data.py
    python -m examples.minilm_linear --output runs/minilm --model FOLDER --text FILE    # any BERT encoder, any text

    convert   all layers of all-MiniLM-L6-v2, with Hedgehog's softmax features
    transfer  80 steps: each layer's feature maps learn the weights of its own softmax attention
    tune      300 steps: all weights learn the original's hidden states and embeddings, on text without labels
    compare   embeddings of the last part of the text, which nothing was trained on, and of pairs of sentences

OUTPUT/transferred and OUTPUT/tuned are folders for `AutoModel.from_pretrained` (after `import hyena_hf`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

import hyena_hf  # noqa: F401  registers the converted types with the Auto classes
from hyena_hf.linear_attention import attention_transfer, convert_attention
from training.embedding_distillation import agreement, distil_embeddings, embed, text_chunks
from training.real_data import jargon_file, minilm_folder, read_text


PAIRS = (
    ("A man is eating food.", "A man is eating a piece of bread."),
    ("A man is eating food.", "The girl is carrying a baby."),
    ("The server rejected my password.", "I cannot log in to the machine."),
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.minilm_linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the converted models")
    add("--model", type=Path, help="folder of a BERT encoder (default: all-MiniLM-L6-v2)")
    add("--text", type=Path, help="a text file, .gz or not (default: the Jargon File)")
    add("--feature-map", default="hedgehog_softmax", help="default: %(default)s")
    add("--feature-dim", type=int, default=64, help="learned directions a head (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens of a row of text (default: %(default)s)")
    add("--held-out", type=int, default=512, help="rows at the end of the text to compare on (default: %(default)s)")
    add("--transfer", type=int, default=80, help="steps of 16 rows (default: %(default)s)")
    add("--tune", type=int, default=300, help="steps of 8 rows (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    options = parse_arguments(arguments)
    transformers_logging.disable_progress_bar()
    set_seed(0)
    folder = options.model or minilm_folder()
    teacher, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = text_chunks(tokenizer, read_text(options.text or jargon_file()), options.length)
    train, held_out = rows[: -options.held_out], rows[-options.held_out :]
    train = train[torch.randperm(len(train))]
    expected = embed(teacher, held_out)

    model = convert_attention(teacher, feature_map=options.feature_map, feature_dim=options.feature_dim)
    report("converted", model, held_out, expected)
    attention_transfer(model, train.split(16), steps=options.transfer, learning_rate=5e-2, progress=say("transfer"))
    model = saved(model, tokenizer, options.output / "transferred")
    report("transferred", model, held_out, expected)
    distil_embeddings(model, teacher, train.split(8), steps=options.tune, progress=say("tune"))
    model = saved(model, tokenizer, options.output / "tuned")
    report("tuned", model, held_out, expected)
    for pair in PAIRS:
        print(
            *pair,
            f"cosine {similarity(teacher, tokenizer, pair):.3f}, linear {similarity(model, tokenizer, pair):.3f}",
        )


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Save a model with its tokenizer, and load it again as a user would."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval()


def report(name: str, model: PreTrainedModel, held_out: Tensor, expected: Tensor) -> None:
    """Print how near the held-out embeddings are to the original's."""
    found = agreement(embed(model, held_out), expected)
    print(
        f"{name:12} cosine {found.cosine:.3f}, same nearest row {found.neighbours:.1%} of {len(held_out)}", flush=True
    )


def similarity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str]) -> float:
    """Cosine of the embeddings of two sentences."""
    first, second = (embed(model, torch.tensor([ids])) for ids in tokenizer(list(pair))["input_ids"])
    return float(torch.cosine_similarity(first, second))


def say(stage: str) -> Any:
    """A callback that prints every twentieth step's loss."""

    def progress(step: int, loss: float) -> None:
        if step == 1 or step % 20 == 0:
            print(f"{stage} step {step}: {loss:.4f}", flush=True)

    return progress


if __name__ == "__main__":
    main()
