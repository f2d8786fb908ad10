"""Finding models and reading their config and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from idlm.decoding.params import SamplingParams
from idlm.errors import (
    CheckpointError,
    InvalidRequestError,
    ResourceError,
    UnsupportedModelError,
)
from idlm.llm import LLM
from idlm.model import checkpoint, default_model
from idlm.model.attention import CausalAttention
from idlm.model.checkpoint import (
    HUB_FILES,
    load_config,
    load_decoder,
    resolve,
    save_checkpoint,
)
from idlm.model.decoder import Decoder
from tests.support.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", vocab_size=61)


def _load(folder: Path) -> Decoder:
    return load_decoder(folder, device="cpu", dtype=torch.float32)


def _edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def _assert_same(a: Decoder, b: Decoder) -> None:
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q), name


def test_parameters_are_frozen_and_of_the_asked_dtype(folder: Path) -> None:
    decoder = load_decoder(folder, device="cpu", dtype=torch.bfloat16)
    assert not decoder.training
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in decoder.parameters())
    assert decoder.inv_freq_F.dtype == torch.float32
    assert not decoder.inv_freq_F.is_meta


def test_fused_projections_hold_the_parts_in_order(folder: Path) -> None:
    decoder, tensors = _load(folder), load_file(folder / "model.safetensors")
    parameters = dict(decoder.named_parameters())
    attention = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    mlp = [tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(parameters["layers.1.qkv.weight"], torch.cat(attention))
    assert torch.equal(parameters["layers.1.gate_up.weight"], torch.cat(mlp))


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    whole = tiny_model(tmp_path / "whole", "qwen3")
    sharded = tiny_model(tmp_path / "sharded", "qwen3", max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    _assert_same(_load(whole), _load(sharded))


def test_sdar_is_qwen3_with_a_mask_token(tmp_path: Path) -> None:
    sdar = _load(tiny_model(tmp_path / "sdar", "sdar", vocab_size=61, mask_token_id=60))
    assert sdar.config.model_type == "sdar"
    assert sdar.config.mask_token_id == 60
    _assert_same(sdar, _load(tiny_model(tmp_path / "qwen3", "qwen3", vocab_size=61)))


def test_tied_models_may_store_the_output_layer_and_old_ones_the_frequencies(
    tmp_path: Path,
) -> None:
    folder = tiny_model(tmp_path / "m", vocab_size=61, tie_word_embeddings=True)
    before = _load(folder)
    assert before.lm_head is None

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(61, 32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    _edit_weights(folder, add)
    _assert_same(before, _load(folder))


def test_eos_ids_of_both_files_are_joined(folder: Path) -> None:
    _edit_json(folder / "config.json", eos_token_id=[5, 2])
    _edit_json(folder / "generation_config.json", eos_token_id=[2, 9])
    assert load_config(folder).eos_token_ids == (5, 2, 9)
    _edit_json(folder / "generation_config.json", eos_token_id=7)
    assert load_config(folder).eos_token_ids == (5, 2, 7)
    (folder / "generation_config.json").unlink()
    assert load_config(folder).eos_token_ids == (5, 2)


# Each damages a model folder; the message must name the tensor or file, and what to do.
def _missing_tensor(folder: Path) -> str:
    _edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    return r"lack model\.layers\.1\.mlp\.up_proj\.weight \(1 .*incomplete"


def _unexpected_tensor(folder: Path) -> str:
    name = "model.layers.0.self_attn.q_proj.bias"
    _edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    return r"hold model\.layers\.0\.self_attn\.q_proj\.bias.*of the same model"


def _wrong_shape(folder: Path) -> str:
    name = "model.embed_tokens.weight"
    _edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(60, 32)}))
    return r"embed_tokens\.weight in .* has shape \(60, 32\).*\(61, 32\)"


def _quantised_tensor(folder: Path) -> str:
    name = "model.layers.0.mlp.up_proj.weight"
    packed = torch.zeros(48, 32, dtype=torch.int8)
    _edit_weights(folder, lambda tensors: tensors.update({name: packed}))
    return r"up_proj\.weight in .* is of type I8.*GGUF"


def _truncated_file(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return r"model\.safetensors is missing or damaged .*fetch the model again"


def _empty_file(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return r"model\.safetensors is missing or damaged"


def _pickle_only(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return r"pickle \(pytorch_model\.bin\).*convert it to safetensors"


def _no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return r"No weights in .*fetch the model again"


def _index_without_map(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    return r"index\.json has no weight_map"


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return r"config\.json is missing; give a model folder"


def _broken_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    return r"config\.json cannot be read.*fetch the model again"


def _config_is_a_list(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return r"config\.json is not a JSON object"


def _config_lacks_a_field(folder: Path) -> str:
    fields = json.loads((folder / "config.json").read_text())
    del fields["hidden_size"]
    (folder / "config.json").write_text(json.dumps(fields))
    return r"config\.json is damaged: KeyError: 'hidden_size'"


def _mask_token_outside(folder: Path) -> str:
    _edit_json(folder / "config.json", mask_token_id=61)
    return r"config\.json is damaged: ValueError: mask_token_id 61 is not in the vocabulary"


@pytest.mark.parametrize(
    "damage",
    [
        _mask_token_outside,
        _missing_tensor,
        _unexpected_tensor,
        _wrong_shape,
        _quantised_tensor,
        _truncated_file,
        _empty_file,
        _pickle_only,
        _no_weights,
        _index_without_map,
        _no_config,
        _broken_config,
        _config_is_a_list,
        _config_lacks_a_field,
    ],
)
def test_damage_is_told_before_memory_is_taken(
    folder: Path, damage: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = damage(folder)
    monkeypatch.delattr(checkpoint, "_empty_decoder")
    with pytest.raises((CheckpointError, UnsupportedModelError), match=f"(?s){expected}"):
        _load(folder)


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == torch.device("cpu"):
            raise torch.OutOfMemoryError("out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ResourceError, match=r"needs 0\.0 GB on cpu.*another device or a smaller"):
        _load(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing or damaged"):
        _load(folder)


def test_shard_without_a_promised_tensor(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{shards[0].name} lacks .*promises"):
        _load(folder)


def test_unknown_architecture(folder: Path) -> None:
    _edit_json(folder / "config.json", model_type="gpt_neox")
    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox' is not supported; use .*llama"):
        _load(folder)


def test_quantised_checkpoint(folder: Path) -> None:
    _edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match=r"quantised.*use the unquantised model"):
        _load(folder)


def test_a_folder_is_its_own_model(folder: Path) -> None:
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder


def test_none_is_the_default_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model, "locate", lambda: tmp_path)
    assert resolve(None) == tmp_path


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"")
    for path, message in {
        "notes.txt": r"notes\.txt is not a model; give a model folder",
        "empty": r"No model in .*empty.*give a model folder",
        "two": r"holds 2 GGUF files; give the path of one .*a\.gguf",
        "gone.gguf": r"There is no file .*gone\.gguf",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve(tmp_path / path)


def test_hub_is_offline() -> None:
    with pytest.raises(CheckpointError, match=r"no folder 'someone/some-model'.*Give a local"):
        resolve("someone/some-model")


def test_hub_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("Name or service not known\nand a long tail")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="Name or service not known") as caught:
        resolve("someone/some-model")
    assert "tail" not in str(caught.value)


def test_no_hub_id() -> None:
    with pytest.raises(CheckpointError, match=r"no folder './models/x'.*no model id"):
        resolve("./models/x")


def test_hub_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/some-model") == folder
    assert asked == {"model": "someone/some-model", "allow_patterns": HUB_FILES}


def test_no_pickle_or_copy_of_the_weights_is_fetched() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "model.gguf", "run.py", "README.md"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=HUB_FILES)) == wanted


# --- a decoder written as a checkpoint


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("sdar", {"mask_token_id": 3}),
    ],
)
@torch.no_grad()
def test_a_saved_decoder_is_a_causal_lm_of_transformers_and_a_model_of_ours(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_model(tmp_path / "source", family, **overrides)
    decoder = _load(source)
    for parameter in decoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    out = tmp_path / "out"
    save_checkpoint(decoder, out, source, mask_token_id=300)

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens_BR, positions_BR = torch.randint(320, (2, 24)), torch.arange(24).repeat(2, 1)
    ours_BRV = decoder.logits(decoder(tokens_BR, positions_BR, CausalAttention(positions_BR)))
    torch.testing.assert_close(theirs(tokens_BR).logits, ours_BRV, atol=1e-4, rtol=0)
    _assert_same(decoder, _load(out))

    llm = LLM(out, stride=4, dtype="float32", device="cpu")
    assert llm.config.mask_token_id == 300 and llm.layout.num_masks == 12
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompt = AutoTokenizer.from_pretrained(out)("The quick brown fox")["input_ids"]
    (output,) = llm.generate([prompt], params)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert output.token_ids == expected[0, len(prompt) :].tolist()
    assert output.token_ids == llm.autoregressive().generate([prompt], params)[0].token_ids
    assert output.stats.drafted > 0


def test_a_saved_decoder_keeps_its_dtype_and_the_files_of_its_source(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source", "sdar", torch_dtype="float32")
    _edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_sdar.SDAR"})
    decoder = load_decoder(source, device="cpu", dtype=torch.bfloat16)
    save_checkpoint(decoder, tmp_path / "out", source, mask_token_id=None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_config(tmp_path / "out").mask_token_id is None
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_large_decoder_is_saved_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, out = _load(folder), tmp_path / "out"
    save_checkpoint(decoder, out, folder, None)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_checkpoint(decoder, out, folder, None)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and "model.safetensors" not in {p.name for p in shards}
    assert all(p.stat().st_size < 24_000 for p in shards)
    _assert_same(decoder, _load(out))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, decoder.output_weight)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 5_000_000)
    save_checkpoint(decoder, out, folder, None)
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]


def test_what_cannot_be_saved(folder: Path, tmp_path: Path) -> None:
    decoder = _load(folder)
    with pytest.raises(InvalidRequestError, match=r"mask token 61 is not in the vocabulary"):
        save_checkpoint(decoder, tmp_path / "out", folder, 61)
    with pytest.raises(InvalidRequestError, match="overwritten; give another folder"):
        save_checkpoint(decoder, folder / ".", folder, 60)
    assert not (tmp_path / "out").exists()
