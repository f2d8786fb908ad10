"""The default model with a small adapter that proposes something, right or wrong."""

from pathlib import Path

import pytest
import torch

from idlm.model import checkpoint
from idlm.model.adapter import Adapter, AdapterConfig


@pytest.fixture(scope="session", autouse=True)
def fetched(default_model_dir: Path) -> None:
    """Fetch the default model first: fetching says so on stderr, which the tests read."""


@pytest.fixture(scope="session")
def adapter_folder(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of the default model."""
    torch.manual_seed(0)
    base = checkpoint.load_config(default_model_dir)
    config = AdapterConfig(
        rank=4,
        alpha=4.0,
        projections=("o", "down"),
        block_size=3,
        head_width=16,
        base_fingerprint=base.fingerprint(),
        base_model="SmolLM2-135M-Instruct",
    )
    folder = tmp_path_factory.mktemp("adapter")
    Adapter(config, base).save(folder)
    return folder
