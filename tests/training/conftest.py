"""A small random instruct model and documents that it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.model.tokenizer import Tokenizer
from idlm.training.sampler import Limits
from idlm.training.synthesis import SynthesisConfig, synthesize
from tests.support.tiny import tiny_model

LIMITS = Limits(length=160, user=50, answer=60)


END_OF_TURN = 2


@pytest.fixture(autouse=True)
def lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No board and no plot, which take longer than such trainings do.

    As if their libraries were not installed; `monkeypatch.undo` brings them back.
    """
    monkeypatch.setattr("idlm.training.log.find_spec", lambda name: None)


def load_talker(folder: Path) -> Decoder:
    """The model with a flatter output distribution that ends its turns now and then."""
    decoder = load_decoder(folder, device="cpu", dtype=torch.float32)
    decoder.output_weight.mul_(0.25)
    logits = decoder.logits

    def logits_with_ends(hidden: torch.Tensor) -> torch.Tensor:
        z = logits(hidden)
        z[..., END_OF_TURN] += 3.0
        return z

    vars(decoder)["logits"] = logits_with_ends
    return decoder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def decoder(model_dir: Path) -> Decoder:
    return load_talker(model_dir)


@pytest.fixture(scope="session")
def data_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    config = SynthesisConfig(tokens=4000, slots=32, limits=LIMITS)
    synthesize(load_talker(model_dir), Tokenizer.load(model_dir), folder, config)
    return folder
