# SPDX-License-Identifier: Apache-2.0
"""Commands are measured by themselves."""

import sys

from training.processes import run_measured


def test_the_peak_memory_of_a_command_is_its_own_not_that_of_the_process_that_starts_it(tmp_path):
    """On Linux a process begins with the peak of its parent."""
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(range(0, len(ballast), 4096))  # resident
    for size in (1_000_000, 100_000_000):
        program = f"x = bytearray({size}); x[::4096] = b'y' * len(range(0, {size}, 4096)); print('done')"
        code, peak = run_measured([sys.executable, "-c", program], tmp_path / "log")
        assert code == 0
        assert size < peak < size + 50_000_000
        assert (tmp_path / "log").read_text() == "done\n"
    assert run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")[0] == 3
