"""Adapters on disk: what is saved comes back, and PEFT reads the LoRA as we do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from idlm.decoding.params import SamplingParams
from idlm.errors import AdapterMismatchError, CheckpointError, UnsupportedModelError
from idlm.llm import DEFAULT_ADAPTER, LLM
from idlm.model.adapter import (
    CONFIG_FILE,
    HEAD_FILE,
    LORA_FILE,
    Adapter,
    AdapterConfig,
    load_adapter_config,
)
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import load_config, load_decoder
from idlm.model.config import ModelConfig
from idlm.model.peft_config import PEFT_CONFIG_FILE
from tests.support.random_model import random_config
from tests.support.tiny import tiny_model

BASE = random_config()
MIB = 1 << 20


@torch.no_grad()
def adapter_for(
    base: ModelConfig,
    projections: tuple[str, ...] = ("qkv", "o", "gate_up", "down"),
    head: tuple[int, int] = (8, 2),
) -> Adapter:
    config = AdapterConfig(
        rank=3,
        alpha=6.0,  # a scale other than 1 would show if one side forgot it
        projections=projections,
        block_size=3,
        head_width=head[0],
        head_depth=head[1],
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


@pytest.mark.parametrize(
    ("projections", "head"),
    [(("qkv", "o", "gate_up", "down"), (8, 2)), (("o", "down"), (8, 1)), (("o",), (0, 0))],
)
def test_what_is_saved_comes_back(
    projections: tuple[str, ...], head: tuple[int, int], tmp_path: Path
) -> None:
    adapter = adapter_for(BASE, projections, head)
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
        {"head_width": 0},
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


# --- the files that others publish


def peft_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """A random LoRA for the model in ``base``, written by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 128, "lora_alpha": 256, "task_type": "CAUSAL_LM"} | options
    settings.setdefault("target_modules", list(MODULES))
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    return folder


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PUBLISHED_VOCABULARY = 151936  # of Qwen3, whose tokenizer ends at 151668
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def greedy_by_transformers(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    return [int(token) for token in ids[0, len(prompt) :]]


def test_a_published_checkpoint_decodes_as_ar_does(tmp_path: Path) -> None:
    """A model of type sdar: config, names and files as the paper's authors publish them."""
    as_qwen3 = tiny_model(tmp_path / "qwen3", "qwen3", PUBLISHED_VOCABULARY)
    folder = shutil.copytree(as_qwen3, tmp_path / "sdar")
    fields = json.loads((folder / "config.json").read_text())
    del fields["rope_parameters"], fields["dtype"], fields["layer_types"]
    fields |= {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": 3,
        "fuse_cross_entropy": True,
        "mask_token_id": 151669,
        "max_window_layers": 36,
        "model_type": "sdar",
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (folder / name).write_text("raise RuntimeError('code of a model folder was run')")
    prompt = [5, 9, 200, 31, 7]
    expected = greedy_by_transformers(as_qwen3, prompt)
    for layout in ("linear", "quadratic"):
        llm = LLM(folder, layout=layout, stride=4, device="cpu", dtype="float32")
        assert llm.adapter is None and llm.layout.num_masks > 0
        (output,) = llm.generate([prompt], GREEDY)
        assert output.token_ids == expected
        assert output.stats.drafted > 0


def test_a_published_lora_decodes_as_ar_does(tmp_path: Path) -> None:
    """A LoRA of rank 128 in PEFT's files, for a Qwen3 that knows nothing of masks."""
    base = tiny_model(tmp_path / "base", "qwen3", PUBLISHED_VOCABULARY)
    folder = peft_adapter(tmp_path / "lora", base)
    assert {path.name for path in folder.iterdir()} >= {LORA_FILE, PEFT_CONFIG_FILE}
    llm = LLM(base, adapter=folder, stride=4, device="cpu", dtype="float32")
    assert llm.adapter is not None and llm.adapter.head is None
    assert llm.adapter.config == load(folder, llm.config).config
    assert llm.adapter.config.rank == 128
    decoder = load_decoder(base, device="cpu", dtype=torch.float32)
    assert torch.equal(llm.adapter.mask_embedding, decoder.embed.weight[151669])
    prompt = [5, 9, 200, 31, 7]
    (output,) = llm.generate([prompt], GREEDY)
    assert output.token_ids == greedy_by_transformers(base, prompt)
    assert output.stats.drafted > 0
    # The base model's own mask token wins, and what was saved needs no base model for it.
    llm.adapter.save(tmp_path / "own")
    own = load(tmp_path / "own", llm.config)
    assert torch.equal(own.mask_embedding, llm.adapter.mask_embedding)
    assert load(folder, replace(llm.config, mask_token_id=7)).mask_token_id == 7


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"use_rslora": True, "r": 4},
    ],
)
@torch.no_grad()
def test_a_lora_of_peft_computes_what_it_computes_there(
    options: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_model(tmp_path / "base", "qwen3", vocab_size=61)
    folder = peft_adapter(tmp_path / "lora", base, **options)
    decoder = load_decoder(base, device="cpu", dtype=torch.float32)
    adapter = load(folder, replace(decoder.config, mask_token_id=60))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens_BR = torch.randint(61, (1, 20))
    without_BRV = plain(tokens_BR).logits
    expected_BRV = PeftModel.from_pretrained(plain, str(folder))(tokens_BR).logits
    assert (expected_BRV - without_BRV).abs().max() > 0.05
    adapter.mask_embedding = nn.Parameter(decoder.embed(tokens_BR[0]))
    positions_BR = torch.arange(20)[None]
    hidden_BRH = decoder(
        tokens_BR[:, :0], positions_BR, CausalAttention(positions_BR), num_masks=20, adapter=adapter
    )
    torch.testing.assert_close(decoder.logits(hidden_BRH), expected_BRV, atol=1e-4, rtol=0)


def _no_lora(fields: dict[str, Any]) -> None:
    fields["peft_type"] = "IA3"


def _dora(fields: dict[str, Any]) -> None:
    fields["use_dora"] = True


def _trained_biases(fields: dict[str, Any]) -> None:
    fields["bias"] = "all"


def _no_rank(fields: dict[str, Any]) -> None:
    fields["r"] = 0


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_no_lora, "of type IA3, which is not supported"),
        (_dora, "with use_dora, which is not supported"),
        (_trained_biases, "with bias, which is not supported"),
        (_no_rank, r"adapter_config\.json is missing or damaged \(r is 0\)"),
    ],
)
def test_a_peft_adapter_that_cannot_be_applied_is_refused(
    damage: Callable[[dict[str, Any]], None], match: str, saved: Path
) -> None:
    for name in (CONFIG_FILE, HEAD_FILE):
        (saved / name).unlink()
    with pytest.raises(AdapterMismatchError, match="no mask token; add mask_token_id"):
        load(saved)
    fields = json.loads((saved / PEFT_CONFIG_FILE).read_text())
    damage(fields)
    (saved / PEFT_CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=match):
        load_adapter_config(saved)
