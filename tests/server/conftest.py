"""Servers of a tiny random model and of the default model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from idlm import LLM
from tests.server.live import Live, serving
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model that proposes drafts too; context 512."""
    folder = tiny_model(tmp_path_factory.mktemp("tiny"), mask_token_id=7)
    return LLM(folder, stride=4, dtype="float32", max_batch=4)


@pytest.fixture(scope="module")
def live(tiny_llm: LLM) -> Iterator[Live]:
    """A server of the tiny model."""
    with serving(tiny_llm) as server:
        yield server


@pytest.fixture(scope="session")
def default_llm(default_model_dir: object) -> LLM:
    """The default model with its adapter."""
    return LLM(stride=4, layout="linear", max_batch=8)
