"""How far loaded checkpoints are from the code that published them, one line a layout.

    python -m benchmarks.bench_checkpoints            (--smoke: page in runs/smoke)

Logits of the tiny checkpoints in tests/golden/checkpoints, whose expected logits the published code computed, after
loading, and again after conversion and `AutoModelForCausalLM.from_pretrained`. Differences are divided by the largest
logit, or 1. The control is the same model loaded twice.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.report import RESULTS, SMOKE_RESULTS, command_line, markdown_table, write_result
from hyena_hf.checkpoints import convert_checkpoint, detect_layout, load_checkpoint


GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "checkpoints"
MADE_BY = {
    "safari-lm": "safari",
    "longsafari-seqlen": "hyena-dna",
    "longsafari-hf": "hyena-dna",
    "stripedhyena": "stripedhyena 0.2.2",
    "evo1": "stripedhyena 0.2.2, configuration of evo-model 0.5",
    "evo2": "vtx 1.1.0",
}


def logits_at(model: torch.nn.Module, ids: np.ndarray, positions: np.ndarray | None) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.as_tensor(ids), use_cache=False).logits.double().numpy()
    return logits if positions is None else logits[:, positions]


def compare(folder: Path) -> list[str]:
    """The row of one checkpoint."""
    layout = detect_layout(folder)
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        expected = {key: file[key] for key in file.files}
    ids, positions = expected["input_ids"], expected.get("positions")
    scale = max(1.0, abs(expected["logits"]).max())
    model = load_checkpoint(folder)
    first = logits_at(model.float(), ids, positions)
    again = logits_at(load_checkpoint(folder).float(), ids, positions)
    with tempfile.TemporaryDirectory() as scratch:
        convert_checkpoint(folder, Path(scratch) / "out")
        loaded = logits_at(AutoModelForCausalLM.from_pretrained(Path(scratch) / "out").eval().float(), ids, positions)
    exact = "not published"
    if "logits_float64" in expected:
        wide = abs(expected["logits_float64"])
        difference = abs(logits_at(model.double(), ids, positions) - expected["logits_float64"]).max()
        exact = f"{difference / max(1.0, wide.max()):.1e}"
    figures = [f"{abs(x - expected['logits']).max() / scale:.1e}" for x in (first, loaded)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    control = f"{abs(first - again).max() / scale:.1e}"
    return [layout, MADE_BY[layout], f"{parameters:,}", *figures, exact, control]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="page in runs/smoke")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    head = ["layout", "expected logits by", "parameters", "float32", "float32, converted and reloaded"]
    rows = [compare(folder) for folder in sorted(GOLDEN.iterdir())]
    lines = markdown_table([*head, "float64 (published filters are float32)", "control"], rows)
    folder = SMOKE_RESULTS if arguments.smoke else RESULTS
    print("\n".join(lines))
    print(write_result("checkpoints", "Published layouts", command_line("bench_checkpoints"), lines, folder=folder))


if __name__ == "__main__":
    main()
