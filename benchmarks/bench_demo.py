"""The demo at three seeds: held-out bits per byte of Hyena, distilled too, GPT-2 and Llama with their spread.

    python -m benchmarks.bench_demo                    # three times `make demo`; goes on where it stopped
    python -m benchmarks.bench_demo --smoke            # a few minutes, page in runs/smoke, numbers mean nothing

Each seed is a run of `python -m training.demo --seed N` in runs/: other initial weights, another order of the same
rows, the same three texts. The baselines have no seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from training import demo


SEEDS = (0, 1, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the seeds, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_demo", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    options = parser.parse_args(arguments)
    runs = [run_seed(seed, smoke=options.smoke) for seed in SEEDS]
    folder = SMOKE_RESULTS if options.smoke else RESULTS
    print(write_result("demo", "The demo at three seeds", command_line("bench_demo"), page(runs), folder=folder))


def run_seed(seed: int, *, smoke: bool) -> dict[str, Any]:
    """Run the demo with one seed, or read what it has already written."""
    words = ["--seed", str(seed), *(["--smoke"] if smoke else [])]
    output = Path(demo.parse_arguments(words).output)
    demo.main(words)
    return json.loads((output / "results.json").read_text())


def page(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The table over seeds, the baselines, and one row a run."""
    first = runs[0]
    corpus = first["corpus"]
    models = [
        [
            name,
            f"{numbers['parameters']:,}",
            f"{numbers['learning_rate']:g}" if "learning_rate" in numbers else "-",
            spread([run["models"][name]["heldout_bits_per_byte"] for run in runs], 3),
            spread([run["models"][name]["train_seconds"] for run in runs], 0) if "train_seconds" in numbers else "-",
            spread([run["models"][name]["decode_tokens_per_second"] for run in runs], 0),
            f"{numbers['cache_bytes']:,}",
        ]
        for name, numbers in first["models"].items()
    ]
    single = [
        [run["seed"], name, f"{numbers['heldout_bits_per_byte']:.4f}", f"{numbers['validation_bits_per_byte']:.4f}"]
        for run in runs
        for name, numbers in run["models"].items()
    ]
    return [
        f"{corpus['name']}: {corpus['train_bytes']:,} bytes of training text, {corpus['heldout_bytes']:,} held out, "
        f"divided by module. Mean (lowest to highest) of seeds {', '.join(str(run['seed']) for run in runs)}; seconds "
        f"are wall time of optimizer steps. Commit of the runs: {', '.join(sorted({run['commit'] for run in runs}))}.",
        "",
        *markdown_table(
            ["model", "parameters", "rate", "held-out bits/byte", "training s", "decoding tokens/s", "cache bytes"],
            models,
        ),
        "",
        *markdown_table(
            ["baseline on the same training bytes", "held-out bits/byte"],
            [[name, f"{bits:.3f}"] for name, bits in first["baselines"].items()],
        ),
        "",
        "## Every run",
        "",
        *markdown_table(["seed", "model", "held-out bits/byte", "validation bits/byte"], single),
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and lowest to highest, of one number over the seeds."""
    return f"{mean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
