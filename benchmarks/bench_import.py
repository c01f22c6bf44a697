"""What `import hyena_hf` costs, beside the imports of transformers that its user would make anyway.

    python -m benchmarks.bench_import            (--smoke: 2 runs each, page in runs/smoke)

CPU seconds of fresh interpreters, in shuffled rounds. The reference is measured twice under two names: where these two
differ, so do all others by chance.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from tqdm import tqdm

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result


REFERENCE = "from transformers import AutoModelForCausalLM, LlamaForCausalLM"
CASES = {
    "reference": REFERENCE,
    "reference again (control)": REFERENCE,
    "package": "import hyena_hf",
    "package and model": "import hyena_hf; hyena_hf.HyenaForCausalLM",
    "torch alone": "import torch",
}
HEAVY = ("datasets", "peft", "accelerate", "accelerate.accelerator", "scipy", "matplotlib", "pandas", "sklearn")


def cpu_seconds(code: str) -> float:
    """User and system time of an interpreter that runs `code`, its children included.

    Raises:
        subprocess.CalledProcessError: the code failed.
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return usage.ru_utime + usage.ru_stime


def loaded_modules(code: str, names: Sequence[str] = HEAVY) -> list[str]:
    """Which of the modules are loaded after `code`."""
    code += f"\nimport sys\nprint(*[name for name in {tuple(names)} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every case in every round; each round has its own order."""
    order = random.Random(0)
    for code in set(CASES.values()):  # writes bytecode and warms the file cache
        cpu_seconds(code)
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name in order.sample(list(CASES), len(CASES)):
            times[name].append(cpu_seconds(CASES[name]))
    return times


def page(times: dict[str, list[float]]) -> list[str]:
    """The table, and which heavy modules each case loads."""
    base = median(times["reference"])
    rows = [
        (name, f"`{CASES[name]}`", f"{median(t):.2f}", f"{min(t):.2f} to {max(t):.2f}", f"{median(t) / base:.2f}")
        for name, t in times.items()
    ]
    loaded = {code: loaded_modules(code) for code in dict.fromkeys(CASES.values())}
    extra = sorted(set(loaded[CASES["package and model"]]) - set(loaded[REFERENCE]))
    return [
        f"CPU seconds of a fresh interpreter, {len(times['reference'])} shuffled rounds after one warm-up.",
        "",
        *markdown_table(["case", "code", "median", "range", "ratio of medians"], rows),
        "",
        f"Heavy modules loaded afterwards, of {', '.join(HEAVY)} (all that are installed could be):",
        "",
        *markdown_table(
            ["code", "loaded"], [(f"`{code}`", ", ".join(names) or "none") for code, names in loaded.items()]
        ),
        "",
        f"Loaded by our model but not by the reference: {', '.join(extra) or 'none'}. No module of hyena_hf imports "
        "any of them. transformers' weight loading imports accelerate where it is installed "
        "(`transformers.activations` is enough), and its losses import scipy.",
    ]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each case (default 9)")
    parser.add_argument("--smoke", action="store_true", help="2 runs, page in runs/smoke")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds ({arguments.rounds}) must be at least 1")
    times = measure(2 if arguments.smoke else arguments.rounds)
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    path = write_result("import", "Import time", command_line("bench_import"), page(times), folder=folder)
    print(path.read_text())


if __name__ == "__main__":
    main()
