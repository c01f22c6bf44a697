"""What a generated token costs: Hyena with its three caches beside GPT-2, Llama, Mamba, Mamba-2 and LFM2.

    python -m benchmarks.bench_generate                 (--smoke: tiny models, 2 rounds, page in runs/smoke)
    python -m benchmarks.bench_generate --only online   (that section alone; the others stay on the page)
    python -m benchmarks.bench_generate --only assistant --teacher FOLDER     (a trained Hyena, as `make demo` leaves)

CPU time of one thread, 10M parameters, float32, random weights, shuffled rounds. Sections and what they take:

    step         20 min   one decode step by batch, eager and compiled
    generate     40 min   the same through generate()
    context      25 min   a step and the bytes of a cache over context
    memory       15 min   peak of a generation by batch
    long_prompt  30 min   64 prompts of 2048 tokens, prefill included
    prefill       1 min   the state behind a prompt
    assistant    15 min   a distilled model drafts for its teacher
    online       15 min   the exact sum over all inputs beside tiles

Code of the sections: `benchmarks.generation`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import transformers

from benchmarks.generation import (
    assistant,
    context,
    long_prompt,
    memory,
    online,
    prefill,
    step,
    through_generate,
)
from benchmarks.timing import Section, run_sections


SECTIONS: Mapping[str, Section] = {
    "step": step.section,
    "generate": through_generate.section,
    "context": context.section,
    "memory": memory.section,
    "long_prompt": long_prompt.section,
    "prefill": prefill.section,
    "assistant": assistant.section,
    "online": online.section,
}


def main() -> None:
    """One option of a section, before those of all benchmarks."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--teacher", type=Path)
    own, sys.argv[1:] = parser.parse_known_args()
    sections = {**SECTIONS, "assistant": partial(assistant.section, folder=own.teacher)}
    run_sections("generate", "Generated tokens", __doc__, sections)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
