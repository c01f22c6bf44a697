"""Every test runs offline, on one thread, from the same seed, with exact float32 sums."""

import os


# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from transformers import set_seed


# models of tests are tiny: a second thread makes them slower, by far where another process holds its core
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)
    torch.set_float32_matmul_precision("highest")  # our training commands lower it
