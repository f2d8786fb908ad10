"""Adapters on disk: what is saved comes back, and PEFT reads the LoRA as we do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from idlm.errors import AdapterMismatchError, CheckpointError
from idlm.llm import DEFAULT_ADAPTER
from idlm.model.adapter import (
    CONFIG_FILE,
    HEAD_FILE,
    LORA_FILE,
    PEFT_CONFIG_FILE,
    Adapter,
    AdapterConfig,
)
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_config, load_decoder
from idlm.model.config import ModelConfig
from tests.support.random_model import random_config
from tests.support.tiny import tiny_model

BASE = random_config()
MIB = 1 << 20


@torch.no_grad()
def adapter_for(
    base: ModelConfig, projections: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
) -> Adapter:
    config = AdapterConfig(
        rank=3,
        alpha=6.0,  # a scale other than 1 would show if one side forgot it
        projections=projections,
        block_size=3,
        head_width=8,
        head_depth=2,
        base_fingerprint=base.fingerprint(),
        base_model="random",
    )
    adapter = Adapter(config, base)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return adapter.freeze()


def load(folder: Path, base: ModelConfig = BASE) -> Adapter:
    return Adapter.load(folder, base, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter_for(BASE).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("projections", [("qkv", "o", "gate_up", "down"), ("o", "down")])
def test_what_is_saved_comes_back(projections: tuple[str, ...], tmp_path: Path) -> None:
    adapter = adapter_for(BASE, projections)
    adapter.save(tmp_path)
    back = load(tmp_path)
    assert back.config == adapter.config
    expected, given = adapter.state_dict(), back.state_dict()
    assert expected.keys() == given.keys()
    assert all(torch.equal(expected[name], given[name]) for name in expected)
    assert not any(p.requires_grad for p in back.parameters())
    assert {p.name for p in tmp_path.iterdir()} == {
        CONFIG_FILE,
        HEAD_FILE,
        LORA_FILE,
        PEFT_CONFIG_FILE,
    }


def test_an_adapter_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterMismatchError, match=r"another base model \(random"):
        load(saved, replace(BASE, num_layers=3))


@pytest.mark.parametrize("name", [CONFIG_FILE, HEAD_FILE, LORA_FILE])
def test_a_missing_or_truncated_file_is_refused(saved: Path, name: str) -> None:
    whole = (saved / name).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 3):
        (saved / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=name):
            load(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(saved)


@pytest.mark.parametrize("name", [HEAD_FILE, LORA_FILE])
def test_wrong_tensors_are_refused(saved: Path, name: str) -> None:
    tensors = load_file(saved / name)
    first = min(tensors)
    wrong = {
        "has shape": tensors | {first: tensors[first][..., 1:].contiguous()},
        "and 0 more": {k: v for k, v in tensors.items() if k != first},
        "unexpected": tensors | {"surplus": torch.zeros(2)},
    }
    for match, contents in wrong.items():
        save_file(contents, saved / name)
        with pytest.raises(AdapterMismatchError, match=match):
            load(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2; upgrade"):
        load(saved)


@pytest.mark.parametrize(
    "damage",
    [
        {"rank": None},
        {"rank": 0},
        {"rank": "3"},
        {"projections": ["q"]},
        {"projections": 5},
        {"head_width": -1},
        {"surplus": 1},
        {"format": "1"},
    ],
)
def test_a_damaged_config_is_refused(saved: Path, damage: dict[str, object]) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    (saved / CONFIG_FILE).write_text(json.dumps(config | damage))
    with pytest.raises(CheckpointError, match=CONFIG_FILE):
        load(saved)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_peft_reads_the_lora_as_we_do(family: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", family, vocab_size=61)
    decoder = load_decoder(folder, device="cpu", dtype=torch.float32)
    adapter_for(load_config(folder)).save(tmp_path / "adapter")
    adapter = load(tmp_path / "adapter", decoder.config)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens_BR = torch.randint(61, (1, 20))
    without_BRV = plain(tokens_BR).logits

    expected_BRV = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(tokens_BR).logits
    assert (expected_BRV - without_BRV).abs().max() > 0.1
    # Every row is a mask row, and they embed what the tokens embed.
    adapter.mask_embedding = nn.Parameter(decoder.embed(tokens_BR[0]))
    positions_BR = torch.arange(20)[None]
    hidden_BRH = decoder(
        tokens_BR[:, :0], positions_BR, CausalAttention(positions_BR), num_masks=20, adapter=adapter
    )
    torch.testing.assert_close(decoder.logits(hidden_BRH), expected_BRV, atol=1e-4, rtol=0)


def test_the_shipped_adapter_is_small_and_fits_the_default_model(
    default_model_dir: Path, tmp_path: Path
) -> None:
    shipped = Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER))
    sizes = [path.stat().st_size for path in shipped.iterdir()]
    assert max(sizes) <= 16 * MIB and sum(sizes) <= 32 * MIB
    base = load_config(default_model_dir)
    assert load(shipped, base).config.base_fingerprint == base.fingerprint()
    # It needs nothing but its files.
    shutil.copytree(shipped, tmp_path / "copy")
    load(tmp_path / "copy", base)
