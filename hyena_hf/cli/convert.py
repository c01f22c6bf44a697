"""`hyena convert`: published weights into a model of this package, or back into a published layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "convert",
        help="published weights (safari, HyenaDNA, StripedHyena, Evo) into a model that AutoModel loads",
        description="Write published weights as a folder that AutoModel loads, with tokenizer, generation config and "
        "model card; no code in the files runs. With --to, write a model of this package in a published layout.",
    )
    parser.add_argument("source", metavar="PATH_OR_REPO", help="folder, file of weights, or repository of the hub")
    parser.add_argument("target", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--layout", help="of the source, where it cannot be found from the files")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--to", metavar="LAYOUT", help="longsafari-hf or stripedhyena: write that, from our own model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert in either direction."""
    from hyena_hf.checkpoints import convert_checkpoint

    if arguments.to is not None:
        _export(arguments)
        return
    conversion = convert_checkpoint(
        arguments.source, arguments.target, arguments.layout, arguments.revision, progress=sys.stderr.isatty()
    )
    for warning in conversion.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    sys.stdout.write(f"{conversion.layout}: written to {arguments.target}\n")


def _export(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    from hyena_hf.checkpoints import export_checkpoint

    if arguments.layout is not None:
        raise ValueError("--layout is for reading published weights; --to reads a model of this package")
    model = AutoModelForCausalLM.from_pretrained(arguments.source, revision=arguments.revision or "main")
    export_checkpoint(model, arguments.target, arguments.to)
    sys.stdout.write(f"{arguments.to}: written to {arguments.target}\n")
