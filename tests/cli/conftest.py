"""The default model, fetched, and the adapter that we ship for it."""

from importlib.resources import files
from pathlib import Path

import pytest

from idlm.llm import DEFAULT_ADAPTER


@pytest.fixture(scope="session", autouse=True)
def fetched(default_model_dir: Path) -> None:
    """Fetch the default model first: fetching says so on stderr, which the tests read."""


@pytest.fixture(scope="session")
def adapter_folder() -> Path:
    """The shipped adapter of the default model."""
    return Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER))
