"""Whole trainings of a tiny model."""

from __future__ import annotations

import json
import os
import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from idlm.errors import CheckpointError, IdlmError, InvalidRequestError, ResourceError
from idlm.model.adapter import Adapter
from idlm.model.decoder import Decoder
from idlm.training.config import ConvertConfig
from idlm.training.conversion import LosslessConversion
from idlm.training.data import Corpus
from idlm.training.log import BOARD_FOLDER, LOG_FILE, PLOT_FILE, RunLog
from idlm.training.run_state import newest
from idlm.training.trainer import NAN_FILE, Trainer

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
    return Trainer(LosslessConversion(decoder, config, "tiny"), train, heldout, config, out)


def result(trainer: Trainer) -> Adapter:
    assert isinstance(trainer.conversion, LosslessConversion)
    return trainer.conversion.result()


def losses(out: Path) -> list[float]:
    records = map(json.loads, (out / LOG_FILE).read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_acceptance_rises_and_the_adapter_loads(
    decoder: Decoder, data_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    before = trainer.evaluate()
    report = trainer.run()
    assert report is not None and report.progress.step == 60
    after = report.best.acceptance
    assert sum(after.sampled) > sum(before.sampled) + 0.05
    assert after.tpf["T=1 N=4"] > before.tpf["T=1 N=4"]
    values = losses(tmp_path)
    assert len(values) == 12 and values[-1] < 0.9 * values[0]

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
    for a, b in zip(result(whole).parameters(), result(second).parameters(), strict=True):
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
    folder = newest(tmp_path)
    assert folder is not None
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"damaged.*delete it"):
        trainer.resume()
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"damaged.*delete it"):
        trainer.resume()


def test_accumulation_changes_nothing(decoder: Decoder, data_dir: Path) -> None:
    results = []
    for accumulate in (1, 4):
        trainer = make_trainer(decoder, data_dir, None, CONFIG.with_(accumulate=accumulate))
        results.append(torch.stack([trainer.train_step() for _ in range(3)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_stops_at_nan_with_the_batch(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG.with_(steps=10))
    step = trainer.train_step

    def step_and_break() -> torch.Tensor:
        if trainer.progress.step == 2:
            for parameter in decoder.layers[0].parameters():
                parameter.fill_(float("nan"))
        return step()

    trainer.train_step = step_and_break  # type: ignore[method-assign]
    with pytest.raises(IdlmError, match=r"not a number in step 2 .*lower --lr"):
        trainer.run()
    assert newest(tmp_path) is None
    batch = load_file(tmp_path / NAN_FILE)
    assert torch.equal(batch["tokens_BT"], trainer.loader.batch(2).tokens_BT)


def test_best_weights_are_the_result(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    """A run that gets worse towards its end leaves what it had in the middle."""
    trainer = make_trainer(
        decoder, data_dir, tmp_path, CONFIG.with_(steps=40, eval_every=20, save_every=20)
    )
    step, kept = trainer.train_step, {}

    def step_and_spoil() -> torch.Tensor:
        if trainer.progress.step == 20:
            kept.update(result(trainer).state_dict())
            for name, master in trainer.optimizer.masters.items():
                if name.startswith("head"):
                    master.detach().normal_(std=3.0)
        return step()

    trainer.train_step = step_and_spoil  # type: ignore[method-assign]
    report = trainer.run()
    assert report is not None and report.best.step == 20
    device = torch.device("cpu")
    adapter = Adapter.load(tmp_path, decoder.config, device=device, dtype=torch.bfloat16)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, kept[name])
    again = make_trainer(decoder, data_dir, tmp_path, trainer.config)
    assert again.resume() and again.best == report.best and again.progress.step == 40


def test_log_board_and_plot(
    decoder: Decoder, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    make_trainer(decoder, data_dir, tmp_path, CONFIG.with_(steps=4, log_every=2)).run()
    records = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 4]
    assert records[0]["terms"] == {"divergence": records[0]["loss"]}
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / BOARD_FOLDER)).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(tmp_path))
    assert {"agree/1", "acceptance/tpf/T=0 N=4"} <= set(events.Tags()["scalars"])


def test_bar_and_lines_on_a_terminal() -> None:
    log, terminal = RunLog(None, main=True), StringIO()
    log._console = Console(file=terminal, force_terminal=True, width=80)
    with log.bar():
        log.advance(0.25)
        log.say("step 1 [1/2]")
        log._bar.refresh()  # type: ignore[union-attr]
    assert "step 1 [1/2]" in terminal.getvalue() and "25%" in terminal.getvalue()


def test_log_without_its_optional_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, main=True)
    log.record(1, {"loss": 0.5})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == [LOG_FILE]
    assert "matplotlib is missing" in capsys.readouterr().err


def test_out_of_memory_names_the_settings(decoder: Decoder, data_dir: Path) -> None:
    trainer = make_trainer(decoder, data_dir, None, CONFIG)

    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")

    trainer.train_step = fail  # type: ignore[method-assign]
    with pytest.raises(ResourceError, match=r"CUDA out of memory\).*--accumulate.*--anchors"):
        trainer.run()


def test_sigterm_saves(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    step = trainer.train_step

    def step_and_stop() -> torch.Tensor:
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = step_and_stop  # type: ignore[method-assign]
    assert trainer.run() is None and trainer.progress.step == 3
    again = make_trainer(decoder, data_dir, tmp_path, CONFIG)
    assert again.resume() and again.progress.step == 3


def test_time_ends_the_run(decoder: Decoder, data_dir: Path) -> None:
    config = CONFIG.with_(steps=None, minutes=0.02)
    trainer = make_trainer(decoder, data_dir, None, config)
    trainer.run()
    assert trainer.progress.fraction(config) >= 1.0


def test_training_goes_on_from_an_adapter(decoder: Decoder, data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(decoder, data_dir, tmp_path, CONFIG.with_(steps=5))
    assert trainer.run() is not None
    further = CONFIG.with_(init_adapter=str(tmp_path))
    conversion = LosslessConversion(decoder, further, "tiny")
    for name, tensor in load_file(tmp_path / "sampler_head.safetensors").items():
        own = dict(conversion.adapter.named_parameters())[name]
        assert torch.equal(own.bfloat16(), tensor) and own.requires_grad
    assert all(lora.B[0].any() for lora in conversion.adapter.layer(0).values())


def test_an_adapter_of_other_shapes_is_refused(
    decoder: Decoder, data_dir: Path, tmp_path: Path
) -> None:
    LosslessConversion(decoder, CONFIG, "tiny").save(tmp_path)
    wider = CONFIG.with_(head_width=32, init_adapter=str(tmp_path))
    with pytest.raises(InvalidRequestError, match="--head-width"):
        LosslessConversion(decoder, wider, "tiny")


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    CONFIG.save(path)
    assert ConvertConfig.read(path, {}) == CONFIG
    assert ConvertConfig.read(path, {"rank": 8}).rank == 8
    assert set(ConvertConfig.describe()) == set(ConvertConfig.__dataclass_fields__)
    for bad in (
        {"kind": "half"},
        {"clean_weight": 1.0},
        {"curriculum": 1.0},
        {"rank": 0},
        {"projections": ("q",)},
        {"batch": 3, "accumulate": 2},
        {"rnk": 1},
    ):
        with pytest.raises(InvalidRequestError):
            ConvertConfig.read(path, bad)
    with pytest.raises(InvalidRequestError, match="--minutes"):
        ConvertConfig.read(None, {})


def test_settings_of_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="rank belongs to the lossless kind"):
        ConvertConfig.read(None, {"kind": "full", "rank": 8, "steps": 1})
    config = ConvertConfig.read(None, {"kind": "full", "steps": 1})
    assert (config.lr, config.block_size) == (1e-5, 3)
    config.save(tmp_path / "full.yaml")
    assert ConvertConfig.read(tmp_path / "full.yaml", {}) == config


def test_curriculum() -> None:
    config = CONFIG.with_(block_size=7, curriculum=0.3)
    sizes = [config.masks_at(step / 100) for step in (0, 9, 11, 19, 21, 29, 31, 99)]
    assert sizes == [1, 1, 2, 2, 3, 3, 7, 7]
    assert CONFIG.with_(block_size=2, curriculum=0.5).masks_at(0.4) == 1
    assert CONFIG.masks_at(0.0) == CONFIG.block_size
