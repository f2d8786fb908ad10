"""Several processes train what one process trains."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from idlm.errors import InvalidRequestError
from idlm.model.checkpoint import load_decoder
from idlm.model.decoder import Decoder
from idlm.training import conversion, log
from idlm.training.conversion import Conversion, FullConversion, LosslessConversion
from idlm.training.data import Corpus
from idlm.training.parallel import Parallel, torchrun
from idlm.training.run_state import newest
from idlm.training.trainer import Trainer
from tests.training.test_trainer import CONFIG, losses

# Micro-batches within the processes, and steps enough for a difference to grow.
SETTINGS = CONFIG.with_(steps=8, log_every=1, accumulate=2, survival=True, visits=True)
FULL_SETTINGS = SETTINGS.with_(kind="full", lr=1e-3, curriculum=0.5, ema=0.5)


def train(model: Path, data: Path, out: Path, parallel: Parallel, steps: int = 8) -> None:
    """A lossless and a full run of ``steps`` out of 8 steps."""
    documents, heldout = (Corpus.read(data, split) for split in ("train", "heldout"))
    for config in (SETTINGS, FULL_SETTINGS):
        decoder = load_decoder(model, device="cpu", dtype=torch.float32)
        converting: Conversion
        if config.kind == "lossless":
            converting = LosslessConversion(decoder, config, "tiny", parallel)
        else:
            converting = FullConversion(
                *(decoder, config, "tiny", parallel),
                dtype=torch.float32,
                mask_token_id=0,
                source=model,
            )
        trainer = Trainer(converting, documents, heldout, config, out / config.kind, parallel)
        trainer.resume()
        if steps == 8:
            trainer.run()
            continue
        for _ in range(steps):
            trainer.train_step()
        trainer.save_checkpoint()


def worker(rank: int, port: int, model: Path, data: Path, whole: Path, part: Path) -> None:
    torch.set_num_threads(1)
    vars(log)["find_spec"] = lambda name: None  # as `lines_only` has it here
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with torchrun(torch.device("cpu")) as parallel:
        train(model, data, part, parallel, steps=4)
        conversion.SPREAD_ABOVE = 0.0  # the frozen weights too
        train(model, data, whole, parallel)


def test_two_processes_equal_one(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    """Loss curves and results of both kinds; and one process goes on where two stopped."""
    one, two, part = (tmp_path / name for name in ("one", "two", "part"))
    with torchrun(torch.device("cpu")) as parallel:
        train(model_dir, data_dir, one, parallel)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, model_dir, data_dir, two, part), nprocs=2)
    with torchrun(torch.device("cpu")) as parallel:
        train(model_dir, data_dir, part, parallel)
    for kind in ("lossless", "full"):
        expected = losses(one / kind)
        assert len(expected) == 8
        assert losses(two / kind) == pytest.approx(expected, abs=1e-4)
        assert losses(part / kind) == pytest.approx(expected[4:], abs=1e-4)
        (weights,) = {p.name for p in (one / kind).glob("*model.safetensors")}
        tensors = [load_file(folder / kind / weights) for folder in (one, two, part)]
        for name, tensor in tensors[0].items():
            for other in tensors[1:]:
                # Not by element: AdamW makes a whole step of a gradient that is rounding only.
                assert (other[name].float() - tensor.float()).norm() <= 1e-2 * tensor.float().norm()
    checkpoint = newest(two / "full")
    assert checkpoint is not None and checkpoint.name == "checkpoint-000000008"
    # Each process held, and wrote, about half of the weights and of the optimizer's state.
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)


def test_batch_that_cannot_be_shared(decoder: Decoder, data_dir: Path) -> None:
    documents, heldout = (Corpus.read(data_dir, split) for split in ("train", "heldout"))
    converting = LosslessConversion(decoder, SETTINGS, "tiny")
    with pytest.raises(InvalidRequestError, match="multiple of 6"):
        Trainer(converting, documents, heldout, SETTINGS, None, Parallel(0, 3))


def test_single_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with torchrun(torch.device("cpu")) as parallel:
        assert parallel.main and parallel.world == 1
        assert parallel.of_main([3.0]) == [3.0]
        parallel.wait()
