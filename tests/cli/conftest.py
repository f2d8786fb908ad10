"""The default model, fetched, and the adapter that we ship for it."""

from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from idlm.llm import DEFAULT_ADAPTER
from idlm.model import checkpoint

load_once = cache(checkpoint.load_decoder)


@pytest.fixture(scope="session", autouse=True)
def fetched(default_model_dir: Path) -> None:
    """Fetch the default model first: fetching says so on stderr, which the tests read."""


@pytest.fixture(autouse=True)
def weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One command after the other gets the same decoder of a model."""
    monkeypatch.setattr(checkpoint, "load_decoder", load_once)


@pytest.fixture(scope="session")
def adapter_folder() -> Path:
    """The shipped adapter of the default model."""
    return Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER))
