# SPDX-License-Identifier: Apache-2.0
"""`hyena variants`: what a DNA model makes of every allele of a VCF."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "variants",
        help="log-likelihood ratio of every allele of a VCF",
        description="Compare the likelihood of a window with each alternative allele to that of the reference, and "
        "write a table with a row for each. A run that was killed goes on where it was when started again.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or its name on the hub")
    parser.add_argument("vcf", metavar="VCF", type=Path, help="variants: .vcf, .vcf.gz or .bcf")
    parser.add_argument("reference", metavar="FASTA", type=Path, help="the genome they were called on")
    parser.add_argument("output", metavar="OUT", type=Path, help="new table: .tsv or .parquet")
    add_window_options(parser)
    parser.add_argument(
        "--max-n", type=float, default=0.1, help="share of N above which a window is noted (default 0.1)"
    )
    parser.add_argument(
        "--annotate", type=Path, metavar="VCF", help="new .vcf or .vcf.gz with the ratios as HYENA_LLR in INFO"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score the variants of a file."""
    from hyena_hf.scoring.processes import processes
    from hyena_hf.scoring.tables import check_output
    from hyena_hf.scoring.variants import VariantSettings, write_variant_effects
    from hyena_hf.scoring.vcf import check_annotation

    check_output(arguments.output)
    settings = VariantSettings(
        arguments.window, batch_size_of(arguments), arguments.reverse_complement, arguments.max_n
    )
    if arguments.annotate is not None:
        check_annotation(arguments.vcf, arguments.annotate)
    model, tokenizer = load(arguments)
    count = write_variant_effects(
        model,
        tokenizer,
        arguments.vcf,
        arguments.reference,
        arguments.output,
        settings=settings,
        annotated=arguments.annotate,
        progress=None,
    )
    if processes(distributed=True)[0] != 0:
        return
    written = str(arguments.output)
    if arguments.annotate is not None:
        written += f" and {arguments.annotate}"
    sys.stdout.write(f"{count} records; written to {written}\n")


def add_window_options(parser: argparse.ArgumentParser) -> None:
    """Add what the commands that score windows share."""
    parser.add_argument(
        "--window",
        type=int,
        help="bases that the model sees around a site (default: what it was trained on, at most 8192)",
    )
    parser.add_argument("--batch-size", default="auto", help="windows in a batch (default auto)")
    parser.add_argument("--reverse-complement", action="store_true", help="mean over both strands; twice the work")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the accelerator, if there is one)")
    parser.add_argument(
        "--dtype", default="auto", choices=_DTYPES, help="of the weights (default: as they are stored)"
    )


def batch_size_of(arguments: argparse.Namespace) -> int | str:
    """The value of `--batch-size`.

    Raises:
        ValueError: It is neither a number nor auto.
    """
    value = arguments.batch_size
    if value != "auto" and not value.isdecimal():
        raise ValueError(f"--batch-size {value} is neither a number nor auto")
    return value if value == "auto" else int(value)


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A causal language model on its device, and its tokenizer; errors as in `hyena score`."""
    from transformers import AutoModelForCausalLM

    from .score import load as load_on_device

    return load_on_device(AutoModelForCausalLM, arguments)
