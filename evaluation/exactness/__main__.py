"""Print the table: does a model give a sequence the same logits in every batch, cache and way of decoding?

    python -m evaluation.exactness --output runs/exactness           (2 minutes; --smoke: 20 seconds, fewer tokens)
    python -m evaluation.exactness --dtype float64 --models Llama "Hyena order 3"

The exit status is 1 if a cell of a model of this package is not within its bound.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from evaluation.exactness.models import DTYPES, MODELS
from evaluation.exactness.page import as_text, write_page
from evaluation.exactness.table import all_cases, fill


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for exactness.txt, .json, .png and .md")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="columns", metavar="M")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--smoke", action="store_true", help="shorter sequences, no export")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small only lose by more, and one thread sums in one order
    logging.set_verbosity_error()
    results = fill(options.models, all_cases(smoke=options.smoke), dtype=options.dtype, seed=options.seed)
    print(as_text(results), end="")
    if options.output is not None:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "evaluation.exactness", *given])
        print(write_page(results, options.output, command=command))
    ours = [model for model in results["models"].values() if model["ours"]]
    return int(any(model["good"] < len(model["cells"]) for model in ours))


if __name__ == "__main__":
    sys.exit(main())
