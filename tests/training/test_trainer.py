"""Whole trainings of a tiny model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from idlm.errors import CheckpointError, IdlmError, InvalidRequestError
from idlm.model.adapter import Adapter
from idlm.model.decoder import Decoder
from idlm.training.config import ConvertConfig
from idlm.training.data import Corpus
from idlm.training.trainer import CHECKPOINT_FILE, LOG_FILE, Trainer

CONFIG = ConvertConfig(
    rank=4,
    alpha=8.0,
    head_width=16,
    head_depth=2,
    block_size=3,
    batch=4,
    length=192,
    anchors=16,
    steps=60,
    lr=5e-3,
    head_lr=5e-3,
    log_every=5,
    eval_rows=4,
    tv_weight=0.2,
)


def make_trainer(decoder: Decoder, data: Path, out: Path | None, config: ConvertConfig) -> Trainer:
    train, heldout = (Corpus.read(data, split) for split in ("train", "heldout"))
    return Trainer(decoder, train, heldout, config, out, "tiny")


def losses(out: Path) -> list[float]:
    records = map(json.loads, (out / LOG_FILE).read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_acceptance_rises_and_the_adapter_loads(
    decoder: Decoder, data_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    before = trainer.evaluate()
    report = trainer.run()
    assert report.finished and report.progress.step == 60
    assert sum(report.acceptance.sampled) > sum(before.sampled) + 0.05
    assert report.acceptance.tpf["T=1 N=4"] > before.tpf["T=1 N=4"]
    values = losses(tmp_path)
    assert len(values) == 12 and values[-1] < 0.9 * values[0]

    trainer.finished_adapter().save(tmp_path)
    adapter = Adapter.load(
        tmp_path, decoder.config, device=torch.device("cpu"), dtype=torch.float32
    )
    for name, parameter in adapter.named_parameters():
        expected = trainer.optimizer.masters[name].bfloat16().float()
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resumed_run_equals_an_unbroken_one(
    decoder: Decoder, data_dir: Path, tmp_path: Path, ema: float
) -> None:
    config = CONFIG.with_(steps=20, save_every=10, ema=ema)
    whole = make_trainer(decoder, data_dir, tmp_path / "whole", config)
    whole.run()
    first = make_trainer(decoder, data_dir, tmp_path / "parts", config)
    (tmp_path / "parts").mkdir()
    for _ in range(10):
        first.train_step()
    first.save_checkpoint()
    second = make_trainer(decoder, data_dir, tmp_path / "parts", config)
    assert second.resume() and second.progress.step == 10
    second.run()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole")[2:], rel=1e-6)
    for a, b in zip(
        whole.finished_adapter().parameters(), second.finished_adapter().parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_checkpoint_of_other_settings_or_damaged(
    decoder: Decoder, data_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    assert not trainer.resume()
    trainer.train_step()
    trainer.save_checkpoint()
    other = make_trainer(decoder, data_dir, tmp_path, CONFIG.with_(lr=1e-4))
    with pytest.raises(CheckpointError, match="lr"):
        other.resume()
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.resume()


def test_accumulation_changes_nothing(decoder: Decoder, data_dir: Path) -> None:
    results = []
    for accumulate in (1, 4):
        trainer = make_trainer(decoder, data_dir, None, CONFIG.with_(accumulate=accumulate))
        results.append(torch.stack([trainer.train_step() for _ in range(3)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_stops_at_nan(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG.with_(steps=10))
    with torch.no_grad():
        trainer.adapter.mask_embedding.fill_(float("nan"))
    with pytest.raises(IdlmError, match="not a number"):
        trainer.run()
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_sigterm_saves(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    step = trainer.train_step

    def step_and_stop() -> torch.Tensor:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = step_and_stop  # type: ignore[method-assign]
    report = trainer.run()
    assert not report.finished and report.progress.step == 3
    again = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    assert again.resume() and again.progress.step == 3


def test_time_ends_the_run(decoder: Decoder, data_dir: Path) -> None:
    config = CONFIG.with_(steps=None, minutes=0.02)
    trainer = make_trainer(decoder, data_dir, None, config)
    trainer.run()
    assert trainer.progress.fraction(config) >= 1.0


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    CONFIG.save(path)
    assert ConvertConfig.read(path, {}) == CONFIG
    assert ConvertConfig.read(path, {"rank": 8}).rank == 8
    assert set(ConvertConfig.describe()) == set(ConvertConfig.__dataclass_fields__)
    for bad in ({"rank": 0}, {"projections": ("q",)}, {"batch": 3, "accumulate": 2}, {"rnk": 1}):
        with pytest.raises(InvalidRequestError):
            ConvertConfig.read(path, bad)
    with pytest.raises(InvalidRequestError, match="--minutes"):
        ConvertConfig.read(None, {})
