"""GGUF files of small models, written as llama.cpp's own converter writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def write_gguf(
    model: Path, path: Path, matrices: str = "F32", metadata: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Write the model folder ``model`` as the GGUF file ``path``.

    Args:
        matrices: the GGUF type of all matrices; vectors are F32. Of types that the `gguf` package
            cannot write (K-quants), matrices are random blocks.
        metadata: fields to add or replace; None removes one.

    Returns:
        The tensors that the file stands for, by Hugging Face name.
    """
    config = json.loads((model / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType[matrices]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for name, value in (_metadata(model, config, arch) | (metadata or {})).items():
        if value is not None:
            _add(writer, name, value)

    expected = {}
    for name, weight in load_file(model / "model.safetensors").items():
        data = weight.numpy()
        if weight.dim() == 1:
            data_type = gguf.GGMLQuantizationType.F32
        else:
            data_type = kind
            data = _blocks(data, kind, random)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(data, data_type).copy())
        if arch == gguf.MODEL_ARCH.LLAMA and "q_proj" in name:
            data = _permuted(data, config["num_attention_heads"])
        if arch == gguf.MODEL_ARCH.LLAMA and "k_proj" in name:
            data = _permuted(data, config["num_key_value_heads"])
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=data_type)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _metadata(model: Path, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> dict[str, Any]:
    name = gguf.MODEL_ARCH_NAMES[arch]
    rope = config["rope_parameters"]
    fields = {
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{name}.rope.freq_base": rope["rope_theta"],
    }
    if "head_dim" in config:
        fields[f"{name}.attention.key_length"] = config["head_dim"]
        fields[f"{name}.rope.dimension_count"] = config["head_dim"]
    if config.get("sliding_window"):
        fields[f"{name}.attention.sliding_window"] = config["sliding_window"]
    if rope["rope_type"] in ("linear", "yarn"):
        fields[f"{name}.rope.scaling.type"] = rope["rope_type"]
        fields[f"{name}.rope.scaling.factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        fields[f"{name}.rope.scaling.original_context_length"] = original
    return fields | byte_level_metadata(model)


def byte_level_metadata(model: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """The tokenizer fields of a model folder with a byte-level `tokenizer.json`."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    config = json.loads((model / "tokenizer_config.json").read_text())
    ids = dict(tokenizer["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[config["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[config["pad_token"]],
        "tokenizer.chat_template": config["chat_template"],
    }


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](name, value)


def _blocks(data: np.ndarray, kind: gguf.GGMLQuantizationType, random: Any) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.F16:
        return data.astype(np.float16)
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = random.integers(256, size=(data.shape[0], data.shape[1] // block, size), dtype="u1")
        # Where the fp16 scales of a block stand: anywhere else, any byte is valid.
        scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
        for offset in scales:
            values = random.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
            raw[..., offset : offset + 2] = values[..., None].view("u1")
        return raw.reshape(data.shape[0], -1)


def _permuted(data: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: the two halves of each head's rotary pairs interleaved."""
    halves = data.reshape(heads, 2, -1, *data.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What each rotary frequency is divided by, one wavelength at a time."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
