"""The command `hyena`: what the package does to models on disk.

hyena convert LongSafari/hyenadna-small-32k-seqlen OUT
hyena distill IN OUT --state-size 16 --calibrate text.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import convert, distill


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Words behind `hyena`; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog="hyena", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (convert, distill):
        command.add_parser(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"hyena {chosen.command}: {error}")
