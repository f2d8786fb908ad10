"""Settings shared by all tests: no network, two threads in all, one seed; slow tests first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    if find_spec("triton") is not None:
        from tests.support.interpreter import spare

        spare()

from idlm.model.checkpoint import resolve

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

settings.register_profile("idlm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("idlm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that of several processes none is left alone with one at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Make every test start from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Folder of the converted default model (fetched and converted on first use, then cached)."""
    return resolve(None)
