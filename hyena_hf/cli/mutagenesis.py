# SPDX-License-Identifier: Apache-2.0
"""`hyena mutagenesis`: what every substitution of a region does to its likelihood, with a heat map."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .variants import add_window_options, batch_size_of, load


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "mutagenesis",
        help="log-likelihood ratio of every substitution of a region",
        description="Compare the likelihood of a window with each substitution of each site to that of the reference, "
        "and write a table with a row for each site. A run that was killed goes on where it was when started again.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or its name on the hub")
    parser.add_argument("fasta", metavar="FASTA", type=Path, help="genome")
    parser.add_argument("output", metavar="OUT", type=Path, help="new table: .tsv or .parquet")
    parser.add_argument(
        "--region", required=True, metavar="CONTIG:START-END", help="1-based, the end included; or a whole contig"
    )
    add_window_options(parser)
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="new heat map: .png, .pdf or .svg")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score the substitutions of a region."""
    from hyena_hf.scoring.mutagenesis import check_picture, write_mutagenesis
    from hyena_hf.scoring.processes import processes
    from hyena_hf.scoring.tables import check_output
    from hyena_hf.scoring.windows import WindowSettings

    check_output(arguments.output)
    settings = WindowSettings(arguments.window, batch_size_of(arguments), arguments.reverse_complement)
    if arguments.plot is not None:
        check_picture(arguments.plot)
    model, tokenizer = load(arguments)
    count = write_mutagenesis(
        model,
        tokenizer,
        arguments.fasta,
        arguments.region,
        arguments.output,
        settings=settings,
        picture=arguments.plot,
        progress=None,
    )
    if processes(distributed=True)[0] != 0:
        return
    written = str(arguments.output)
    if arguments.plot is not None:
        written += f" and {arguments.plot}"
    sys.stdout.write(f"{count} sites; written to {written}\n")
