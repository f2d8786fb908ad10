"""Settings shared by all tests: no network, two threads in all, one seed; which tests run where."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs a file, as its tests share fixtures; the longest in parts that share none.

    Who has nothing left gets the next file, in the order above.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            # As far as the model or the prompts, which are the first parameter.
            return nodeid.partition("-")[0] if path == "tests/test_exactness.py" else path

    config.option.loadscopereorder = False
    return ByFixtures(config, log)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Make every test start from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Folder of the converted default model (fetched and converted on first use, then cached)."""
    return resolve(None)
