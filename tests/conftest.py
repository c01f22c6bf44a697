"""Every test runs offline, on two threads, from the same seed."""

import os


# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from transformers import set_seed


torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    set_seed(0)
