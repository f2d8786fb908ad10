"""Conversion of GGUF files to model folders in Hugging Face form.

Quantised weights are written as the fp32 values they stand for, so nothing is lost or rounded;
F32, F16 and BF16 tensors keep their type.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from idlm.errors import CheckpointError, UnsupportedModelError
from idlm.model import cache
from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.files import write_json, write_safetensors
from idlm.model.gguf_tokenizer import write_tokenizer
from idlm.model.tensor_map import check_tensors, tensor_map

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField, ReaderTensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
SHARD_BYTES = 2 * 10**9
OVERHEAD_BYTES = 50 * 10**6  # tokenizer and headers
IDENTITY_BYTES = 2**20


def convert_gguf(path: Path, cache_dir: Path | None = None) -> Path:
    """Convert a GGUF file, once; later calls return the folder of the first.

    Args:
        cache_dir: where converted models are kept; by default `cache.models_folder`.

    Returns:
        A folder with `config.json`, safetensors and the tokenizer.

    Raises:
        CheckpointError: the file is damaged.
        UnsupportedModelError: its architecture, a tensor type or the tokenizer is not supported.
        ResourceError: no disk space.
    """
    try:
        identity = _identity(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; check the file."
        ) from error
    models = cache.models_folder() if cache_dir is None else cache_dir
    target = models / cache.folder_name(path.name, identity)
    return cache.build_once(target, lambda folder: write_model(path, folder))


def write_model(path: Path, folder: Path) -> None:
    """Convert a GGUF file into an existing empty folder. Raises as `convert_gguf`."""
    from gguf import GGUFReader

    # The reader follows offsets in the file without checks, so damage shows as any error.
    try:
        reader = GGUFReader(path)
        fields = {name: _value(field) for name, field in reader.fields.items()}
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or no GGUF file ({type(error).__name__}: {error}); fetch it again."
        ) from error
    try:
        config = _config(fields, reader.tensors)
        tensors = _tensors(reader)
        places = tensor_map(ModelConfig.from_hf(config))
        check_tensors({name: _shape(t) for name, t in tensors.items()}, places, path.name)
        shards = _shards(tensors)
        total = sum(_converted_bytes(tensor) for tensor in tensors.values())
        cache.require_space(folder, total + OVERHEAD_BYTES)
        write_json(folder / "config.json", config)
        write_tokenizer(path, fields, folder)
        _write_weights(shards, config, folder)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} lacks the field {error}; fetch it again.") from error


def _value(field: ReaderField) -> Any:
    """A metadata value; of fp32, the shortest decimal that stands for it (1e-5, not 9.999e-6)."""
    value = field.contents()
    is_fp32 = [kind.name for kind in field.types] == ["FLOAT32"]
    return float(str(np.float32(value))) if is_fp32 else value


def _identity(path: Path) -> str:
    """What tells this file from others without reading gigabytes: size, time, both ends."""
    status = path.stat()
    with path.open("rb") as file:
        ends = file.read(IDENTITY_BYTES)
        file.seek(max(0, status.st_size - IDENTITY_BYTES))
        ends += file.read()
    digest = hashlib.sha256(ends).hexdigest()
    return f"{status.st_size}:{status.st_mtime_ns}:{digest}"


def _config(fields: Mapping[str, Any], tensors: list[ReaderTensor]) -> dict[str, Any]:
    """The Hugging Face config that the metadata amount to."""
    arch = fields["general.architecture"]
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {arch!r} is not supported; use one of {', '.join(ARCHITECTURES)}."
        )
    if fields.get("split.count", 0) > 1:
        raise UnsupportedModelError(
            "this is one part of a split GGUF file; join the parts with `llama-gguf-split --merge`."
        )
    if fields.get(f"{arch}.expert_count", 0) > 0:
        raise UnsupportedModelError("mixture-of-experts models are not supported.")
    shapes = {tensor.name: _shape(tensor) for tensor in tensors}
    if "token_embd.weight" not in shapes:
        raise CheckpointError("the tensor token_embd.weight is missing; fetch the file again.")
    if any(isinstance(v, list) for k, v in fields.items() if k.startswith(f"{arch}.")):
        raise UnsupportedModelError("layers of different shapes are not supported.")
    hidden, heads = fields[f"{arch}.embedding_length"], fields[f"{arch}.attention.head_count"]
    head_dim = fields.get(f"{arch}.attention.key_length", hidden // heads)
    if fields.get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError("rotary embedding of a part of each head is not supported.")
    # llama.cpp knows Mistral as a llama with a sliding window.
    window = fields.get(f"{arch}.attention.sliding_window") if arch == "llama" else None
    return {
        "architectures": ["MistralForCausalLM" if window else ARCHITECTURES[arch]],
        "model_type": "mistral" if window else arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": fields[f"{arch}.feed_forward_length"],
        "num_hidden_layers": fields[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields[f"{arch}.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": fields[f"{arch}.context_length"],
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(fields),
        "rope_parameters": _rope(arch, fields, head_dim, tensors),
        "sliding_window": window,
    }


def _eos_token_ids(fields: Mapping[str, Any]) -> list[int]:
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (fields.get(f"tokenizer.ggml.{name}") for name in names)
    return list(dict.fromkeys(i for i in ids if i is not None))


def _rope(
    arch: str, fields: Mapping[str, Any], head_dim: int, tensors: list[ReaderTensor]
) -> dict[str, Any]:
    """`rope_parameters` from the metadata, or for llama3 from the tensor of factors."""
    theta = fields.get(f"{arch}.rope.freq_base", 10000.0)
    scaling = f"{arch}.rope.scaling"
    kind = fields.get(f"{scaling}.type", "none")
    factors = next((t.data for t in tensors if t.name == ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_rope(theta, head_dim, factors)
    # Before there was rope.scaling.factor, linear scaling was this one field.
    factor = fields.get(f"{scaling}.factor") or fields.get(f"{arch}.rope.scale_linear") or 1.0
    if kind == "none" and factor != 1.0:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "yarn" or fields.get(f"{scaling}.yarn_log_multiplier"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} with these settings is not supported; use a model with "
            "linear, yarn or llama3 scaling."
        )
    yarn = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": fields[f"{scaling}.original_context_length"],
    }
    for beta in ("beta_fast", "beta_slow"):
        if (value := fields.get(f"{scaling}.yarn_{beta}")) is not None:
            yarn[beta] = value
    attention = fields.get(f"{scaling}.attn_factor", 1.0)
    if attention != 1.0:
        yarn["attention_factor"] = attention * (1.0 + 0.1 * math.log(factor))
    return yarn


def _llama3_rope(theta: float, head_dim: int, factors_F: np.ndarray) -> dict[str, Any]:
    """The llama3 scaling that divides the rotary frequencies by ``factors_F``.

    The file holds the factors only; the scaling is found by trying the original context lengths
    in use, with the band limits 1 and 4 that every released model has.
    """
    plain_F = RopeConfig(theta).frequencies(head_dim, 0)[0].double()
    wanted_F = plain_F / torch.from_numpy(factors_F.astype(np.float64))
    for original in (8192, 4096, 16384, 32768, 2048, 131072):
        scaling = {
            "factor": float(factors_F.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        rope = RopeConfig(theta, "llama3", tuple(scaling.items()))
        if torch.allclose(rope.frequencies(head_dim, 0)[0].double(), wanted_F, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", "rope_theta": theta, **scaling}
    raise UnsupportedModelError(
        f"the rotary factors in {ROPE_FACTORS} are not those of llama3 scaling, the only kind "
        "supported; use the safetensors form of the model."
    )


def _tensors(reader: GGUFReader) -> dict[str, ReaderTensor]:
    """The tensors by Hugging Face name, all of a type that can be dequantised."""
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        try:
            dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"tensor {tensor.name} is of type {tensor.tensor_type.name}, which cannot be "
                "dequantised; use another quantisation of the model."
            ) from error
        tensors[_hf_name(tensor.name)] = tensor
    return tensors


def _shards(tensors: dict[str, ReaderTensor]) -> list[dict[str, ReaderTensor]]:
    """The tensors in groups of at most about `SHARD_BYTES`."""
    shards: list[dict[str, ReaderTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = _converted_bytes(tensor)
        if used and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TENSOR_NAMES:
        return f"{TENSOR_NAMES[stem]}.{kind}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_TENSOR_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_TENSOR_NAMES[parts[2]]}.{kind}"
    raise UnsupportedModelError(
        f"tensor {name} is not part of the supported architectures; use another model."
    )


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _is_float(tensor: ReaderTensor) -> bool:
    return tensor.tensor_type.name in ("F32", "F16", "BF16")


def _converted_bytes(tensor: ReaderTensor) -> int:
    return int(tensor.n_bytes) if _is_float(tensor) else 4 * int(tensor.n_elements)


def _write_weights(
    shards: list[dict[str, ReaderTensor]], config: dict[str, Any], folder: Path
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    weight_map: dict[str, str] = {}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        total = sum(_converted_bytes(tensor) for shard in shards for tensor in shard.values())
        task = progress.add_task("Converting the model", total=total)
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            converted = {}
            for name, tensor in shard.items():
                converted[name] = _dequantised(name, tensor, config)
                progress.advance(task, _converted_bytes(tensor))
            write_safetensors(folder / file, converted)
            weight_map |= dict.fromkeys(converted, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _dequantised(name: str, tensor: ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    from gguf.quants import dequantize

    if tensor.tensor_type.name == "BF16":
        weight = torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    elif _is_float(tensor):
        weight = torch.from_numpy(tensor.data.copy())
    else:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    if config["model_type"] in ("llama", "mistral"):
        if ".q_proj." in name:
            return _halves(weight, config["num_attention_heads"])
        if ".k_proj." in name:
            return _halves(weight, config["num_key_value_heads"])
    return weight


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order of llama.cpp's llama: rotary pairs side by side become two halves."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape).contiguous()
