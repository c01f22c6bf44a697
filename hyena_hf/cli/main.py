"""The command `hyena`: what the package does to models and sequences on disk.

hyena convert LongSafari/hyenadna-small-32k-seqlen OUT
hyena score OUT genes.fa.gz scores
hyena embed OUT genome.fa embeddings --windows 16384
hyena variants OUT calls.vcf.gz genome.fa effects.parquet
hyena mutagenesis OUT genome.fa map --region chr1:1000-1200
hyena distill OUT OUT-16 --state-size 16 --calibrate text.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import convert, distill, embed, mutagenesis, score, variants


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Words behind `hyena`; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="hyena", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (convert, distill, score, embed, variants, mutagenesis):
        command.add_parser(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
        sys.exit(f"hyena {chosen.command}: {error}")
