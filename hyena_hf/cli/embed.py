# SPDX-License-Identifier: Apache-2.0
"""`hyena embed`: embeddings of the sequences of a file."""

from __future__ import annotations

import argparse
from typing import Any

from . import score


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "embed",
        help="embeddings of the sequences of a file",
        description="Write the hidden states of a layer, pooled over the letters of every sequence of a file (FASTA, "
        "FASTQ, lines, Parquet, CSV, JSON lines), into a folder of parts. A run that was killed goes on where it was "
        "when started again; under torchrun or accelerate launch the processes share the parts.",
    )
    score.add_arguments(parser)
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="0: embeddings of tokens, i: behind block i, -1: behind the last one and the final norm (default -1)",
    )
    parser.add_argument("--pooling", default="mean", choices=("mean", "last", "max"), help="default mean")
    parser.add_argument("--special-tokens", action="store_true", help="pool special tokens around a sequence too")
    parser.add_argument(
        "--format",
        default="parquet",
        choices=("parquet", "safetensors"),
        help="of the parts: columns id, length, embedding; or tensors embeddings and lengths, ids in the metadata",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Embed a file."""
    from transformers import AutoModel

    from hyena_hf.scoring.embedding import Embedder
    from hyena_hf.scoring.shards import EmbeddingWriter

    source = score.prepare(arguments)
    model, tokenizer = score.load(AutoModel, arguments)
    embedder = Embedder(
        model,
        tokenizer,
        layer=arguments.layer,
        pooling=arguments.pooling,
        special_tokens=arguments.special_tokens,
        **score.task_options(arguments),
    )
    score.write(EmbeddingWriter(embedder, arguments.format), source, arguments)
