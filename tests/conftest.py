"""Settings shared by all tests: no network, two threads, one seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)

settings.register_profile("idlm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("idlm")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Make every test start from the same global random state."""
    torch.manual_seed(0)
