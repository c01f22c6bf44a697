# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own, with what they cost."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


# A process begins with the peak of the one that started it; a small one between them keeps ours out of the figure.
_MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:], stdout=2)
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def run_measured(command: Sequence[str], log: Path) -> tuple[int, int]:
    """Run a command, all that it says going to a file.

    Returns:
        Its exit status, and the peak memory (resident bytes) of its process.
    """
    measured = log.with_suffix(".peak")
    with log.open("wb") as said:
        code = subprocess.call([sys.executable, "-c", _MEASURE, str(measured), *command], stdout=said, stderr=said)
    peak = int(measured.read_text()) * (1 if sys.platform == "darwin" else 1024)
    measured.unlink()
    return code, peak


__all__ = ["run_measured"]
