"""Several processes train what one process trains."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from idlm.errors import InvalidRequestError
from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.training.data import Corpus
from idlm.training.parallel import Parallel, torchrun
from idlm.training.trainer import CHECKPOINT_FILE, Trainer
from tests.training.test_trainer import CONFIG, losses

# More processes than accumulation would give, and steps enough for a difference to grow.
SETTINGS = CONFIG.with_(steps=12, log_every=1, accumulate=2, survival=True, visits=True)


def train(model: Path, data: Path, out: Path, parallel: Parallel) -> None:
    decoder = load_decoder(model, device="cpu", dtype=torch.float32)
    corpora = [Corpus.read(data, split) for split in ("train", "heldout")]
    Trainer(decoder, corpora[0], corpora[1], SETTINGS, out, "tiny", parallel).run()


def worker(rank: int, port: int, model: Path, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with torchrun(torch.device("cpu")) as parallel:
        train(model, data, out, parallel)


def test_two_processes_equal_one(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    train(model_dir, data_dir, tmp_path / "one", Parallel())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        worker, (port, model_dir, data_dir, tmp_path / "two"), nprocs=2, join=True
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 12
    assert two == pytest.approx(one, abs=1e-5)
    assert (tmp_path / "two" / CHECKPOINT_FILE).exists()


def test_batch_that_cannot_be_shared(decoder: Decoder, data_dir: Path) -> None:
    corpora = [Corpus.read(data_dir, split) for split in ("train", "heldout")]
    with pytest.raises(InvalidRequestError, match="multiple of 6"):
        Trainer(decoder, corpora[0], corpora[1], SETTINGS, None, "tiny", Parallel(0, 3))


def test_single_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with torchrun(torch.device("cpu")) as parallel:
        assert parallel.main and parallel.world == 1
        assert parallel.of_main([3.0]) == [3.0]
        parallel.wait()
