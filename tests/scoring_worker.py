"""What `tests/test_scoring_distributed.py` runs in two processes: scores and embeddings, and a failure of one process.

Run: torchrun --nproc_per_node 2 tests/scoring_worker.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hyena_hf import HyenaNucleotideTokenizer
from hyena_hf.cli import embed as embed_command
from hyena_hf.scoring import embed, score
from tests.test_scoring_distributed import LENGTHS, command, dna


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "model"), HyenaNucleotideTokenizer()
    texts, shapes = dna(*LENGTHS), []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = {"scores": score(model, tokenizer, texts), "embeddings": embed(model, tokenizer, texts)}
    hook.remove()
    rank = dist.get_rank()
    found["rows"] = np.array([sum(shape[0] for shape in shapes)])
    found["alone"] = score(model, tokenizer, texts[rank : rank + 1], distributed=False)
    try:
        # one process only meets the bad sequence: shares are by length
        score(model, tokenizer, ["ACGT", "ACT", "UU", "A"], reverse_complement=True)
    except (ValueError, RuntimeError) as error:
        found["error"] = np.array([f"{type(error).__name__}: {error}"])
    np.savez(folder / f"rank{rank}.npz", **found)
    embed_command.run(command("embed", folder / "model", folder / "in.fa", folder / "parts", "--shard-size", "2"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
