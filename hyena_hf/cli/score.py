# SPDX-License-Identifier: Apache-2.0
"""`hyena score`: log-likelihoods of the sequences of a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hyena_hf.scoring.shards import Source

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "score",
        help="log-likelihoods of the sequences of a file",
        description="Write the log-likelihood of every sequence of a file (FASTA, FASTQ, lines, Parquet, CSV, JSON "
        "lines) into a folder of Parquet parts: id, length, tokens, log_likelihood (natural logarithm, sum over "
        "tokens), mean_log_likelihood. A run that was killed goes on where it was when started again; under torchrun "
        "or accelerate launch the processes share the parts.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score a file."""
    from transformers import AutoModelForCausalLM

    from hyena_hf.scoring.likelihood import Scorer
    from hyena_hf.scoring.shards import ScoreWriter

    source = prepare(arguments)
    model, tokenizer = load(AutoModelForCausalLM, arguments)
    writer = ScoreWriter(Scorer(model, tokenizer, **task_options(arguments)))
    write(writer, source, arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `hyena score` and `hyena embed` have in common."""
    parser.add_argument("model", metavar="MODEL", help="folder of a model with its tokenizer, or its name on the hub")
    parser.add_argument("input", metavar="INPUT", type=Path, help="file of sequences; its suffix tells what it is")
    parser.add_argument("output", metavar="OUT", type=Path, help="new folder, or one that this command has begun")
    reading = parser.add_argument_group("reading")
    reading.add_argument("--column", default="sequence", help="of a table, that of the sequences (default sequence)")
    reading.add_argument("--id-column", help="of a table, that of the names (default: rows are numbered)")
    case = reading.add_mutually_exclusive_group()
    case.add_argument(
        "--keep-case",
        dest="case",
        action="store_const",
        const="keep",
        help="leave lower-case letters as they are; by default those of FASTA and FASTQ become capitals",
    )
    case.add_argument("--upper-case", dest="case", action="store_const", const="upper", help="capitals in any file")
    parser.set_defaults(case="auto")
    reading.add_argument("--windows", type=int, metavar="N", help="cut sequences into windows of N letters")
    reading.add_argument("--stride", type=int, metavar="N", help="from a window's start to the next (default: no gap)")
    running = parser.add_argument_group("running")
    bos = running.add_mutually_exclusive_group()
    bos.add_argument("--bos", default="auto", metavar="TOKEN", help="before a sequence (default: the tokenizer's own)")
    bos.add_argument("--no-bos", dest="bos", action="store_const", const=None, help="nothing before a sequence")
    running.add_argument(
        "--long",
        default="refuse",
        choices=("refuse", "split"),
        help="sequences longer than the model takes: refuse them, or split them into windows that overlap by half",
    )
    running.add_argument("--reverse-complement", action="store_true", help="average over both strands of DNA")
    running.add_argument("--batch-size", default="auto", metavar="N", help="sequences in a batch (default: by memory)")
    running.add_argument(
        "--chunk-length", type=int, default=65536, metavar="N", help="longer ones run in chunks (default 65536 tokens)"
    )
    running.add_argument("--shard-size", type=int, default=1000, metavar="N", help="sequences a part (default 1000)")
    running.add_argument("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    running.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="of the weights (default: as they are stored)"
    )


def prepare(arguments: argparse.Namespace) -> Source:
    """The source, after refusing what is wrong before a model is loaded."""
    from hyena_hf.scoring.manifest import check_folder
    from hyena_hf.scoring.sequences import kind_of
    from hyena_hf.scoring.shards import Source

    kind_of(arguments.input)
    check_folder(arguments.output)
    return Source(
        arguments.input,
        column=arguments.column,
        id_column=arguments.id_column,
        case=arguments.case,
        window=arguments.windows,
        stride=arguments.stride,
    )


def task_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a task takes of them."""
    batch_size = arguments.batch_size
    if batch_size != "auto":
        if not batch_size.isdecimal():
            raise ValueError(f"--batch-size {batch_size}: use a number of sequences, or auto")
        batch_size = int(batch_size)
    return {
        "batch_size": batch_size,
        "bos": arguments.bos,
        "chunk_length": arguments.chunk_length,
        "long": arguments.long,
        "reverse_complement": arguments.reverse_complement,
    }


def load(kind: Any, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, the model on its device.

    Raises:
        ValueError: No such model, tokenizer or device.
    """
    from transformers import AutoTokenizer

    from hyena_hf.scoring.processes import processes

    name = arguments.model
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"{name} is no folder, and no name on the hub (OWNER/NAME); name that of a trained model")
    rank, _ = processes(True)
    model = kind.from_pretrained(name, dtype=arguments.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that loads ({error}); save one beside the model") from error
    device = arguments.device or _device(rank)
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:  # what torch raises where there is no such device
        raise ValueError(
            f"the model cannot be put on the device {device} ({error}); name another one by --device"
        ) from error


def _device(rank: int) -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else f"{accelerator.type}:{rank % torch.accelerator.device_count()}"


def write(writer: Any, source: Source, arguments: argparse.Namespace) -> None:
    """Write the results and say what was done."""
    from hyena_hf.scoring.processes import processes
    from hyena_hf.scoring.shards import write_results

    summary = write_results(writer, source, arguments.output, shard_size=arguments.shard_size, progress=None)
    if processes(True)[0] == 0:
        sys.stdout.write(f"{summary}\nwritten to {arguments.output}\n")
