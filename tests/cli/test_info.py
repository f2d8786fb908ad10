"""`idlm info` on the default model and on adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from idlm.cli.main import main
from idlm.model.adapter import FUSED_MODULES, LORA_FILE, RESULTS_FILE, load_adapter_config
from idlm.model.peft_config import PEFT_CONFIG_FILE
from tests.support.tiny import tiny_model


def info(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict)
    return facts


def test_model(default_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = info(default_model_dir, capsys)
    assert facts["kind"] == "model" and facts["architecture"] == "llama"
    assert facts["parameters"] == 134_515_008
    assert facts["vocabulary"] == 49_152 and facts["context"] == 8192
    assert facts["chat_template"] is True


def test_adapter(
    adapter_folder: Path, default_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = info(adapter_folder, capsys)
    assert facts["kind"] == "adapter"
    config = load_adapter_config(adapter_folder)
    assert (facts["rank"], facts["stride_trained"]) == (config.rank, config.block_size + 1)
    assert facts["modules"] == [m for fused in config.projections for m in FUSED_MODULES[fused]]
    assert facts["base_fingerprint"] == info(default_model_dir, capsys)["fingerprint"]
    assert facts["bytes"] == sum(p.stat().st_size for p in adapter_folder.glob("*.safetensors"))


def test_a_fully_converted_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path / "model", "sdar", mask_token_id=5)
    parameters = info(folder, capsys)["parameters"]
    (folder / RESULTS_FILE).write_text('{"greedy": [0.5]}')
    # The state of a training that was stopped is no part of the model.
    shutil.copy(folder / "model.safetensors", folder / "checkpoint.safetensors")
    facts = info(folder, capsys)
    assert (facts["kind"], facts["mask_token_id"]) == ("model", 5)
    assert facts["parameters"] == parameters and facts["results"] == {"greedy": [0.5]}


def test_lines_for_people(adapter_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(adapter_folder)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "o_proj" in lines["modules"].split(", ")
    assert lines["card"].strip() == str(adapter_folder / "README.md")


def test_figures(adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    results = {"greedy": [0.9, 0.8125], "tpf": {"T=0 N=4": 2.75, "T=1 N=4": 2.0}}
    (folder / RESULTS_FILE).write_text(json.dumps(results))
    assert info(folder, capsys)["results"] == results
    assert main(["info", str(folder)]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["accepted at T=0"].strip() == "0.900 0.812"
    assert lines["TPF held-out"].strip() == "T=0 N=4 2.75  T=1 N=4 2.00"
    (folder / RESULTS_FILE).write_text("[]")
    assert main(["info", str(folder)]) == 2
    assert f"{RESULTS_FILE} is damaged" in capsys.readouterr().err
    (folder / RESULTS_FILE).unlink()
    assert info(folder, capsys)["results"] is None


def test_a_lora_of_others(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (LORA_FILE, PEFT_CONFIG_FILE):
        shutil.copy(adapter_folder / name, tmp_path / name)
    facts = info(tmp_path, capsys)
    assert facts["kind"] == "adapter" and facts["base_fingerprint"] is None
    assert facts["modules"] == info(adapter_folder, capsys)["modules"]
    assert facts["sampler_head_width"] == 0


def test_damaged_weights(
    adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in adapter_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / LORA_FILE).write_bytes((tmp_path / LORA_FILE).read_bytes()[:1000])
    assert main(["info", str(tmp_path)]) == 2
    assert LORA_FILE in capsys.readouterr().err
