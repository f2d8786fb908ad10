"""Models on disk: finding a model by name and reading its config and weights.

Everything ends up as a local folder in Hugging Face form: `config.json`, safetensors, tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from idlm.errors import (
    CheckpointError,
    InvalidRequestError,
    ResourceError,
    UnsupportedModelError,
)
from idlm.model import default_model
from idlm.model.config import ModelConfig
from idlm.model.decoder import Decoder
from idlm.model.files import replacing, write_json, write_safetensors
from idlm.model.gguf_file import convert_gguf
from idlm.model.tensor_map import Place, check_tensors, tensor_map

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of models and of adapters.
HUB_FILES = [
    *("*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"),
    *("adapter_model.safetensors", "sampler_head.safetensors"),
]
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
SHARD_BYTES = 5_000_000_000
# What a checkpoint takes over from its base model, beside the config.
COPIED_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "generation_config.json",
)
# Architectures that only remote code can load, and the one of `transformers` with their weights.
BASE_ARCHITECTURES = {"sdar": ("qwen3", "Qwen3ForCausalLM")}


def resolve(model: str | Path | None) -> Path:
    """The local folder of ``model`` in Hugging Face form.

    Args:
        model: a folder; a `.gguf` file or a folder with one, which is converted and cached; a
            model id of the Hugging Face hub; None for the default model.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched or read.
        UnsupportedModelError: a GGUF file of an architecture that is not supported.
        ResourceError: no disk space for the converted model.
    """
    if model is None:
        return default_model.locate()
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        if path.is_file():
            return convert_gguf(path)
        raise CheckpointError(f"There is no file {path}; give the path of a GGUF file.")
    if path.exists():
        raise CheckpointError(f"{path} is not a model; give a model folder or a .gguf file.")
    return _from_hub(str(model))


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json`, with the end-of-sequence ids of `generation_config.json` added.

    Raises:
        CheckpointError: the file is missing or damaged.
        UnsupportedModelError: the architecture or a feature of it is not supported, or the
            weights are quantised.
    """
    fields = _read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise UnsupportedModelError(
            f"The weights in {folder} are quantised (quantization_config in config.json), which "
            "is not supported; use the unquantised model or a GGUF file of it."
        )
    try:
        config = ModelConfig.from_hf(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged: {_reason(error)}; fetch the model again."
        ) from error
    if not (folder / "generation_config.json").exists():
        return config
    eos = _read_json(folder / "generation_config.json").get("eos_token_id")
    more = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def load_decoder(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """Read the weights of a model folder, frozen for inference.

    Names, shapes and file lengths are checked before any memory is taken, and tensors are copied
    one by one from the mapped files to their place, so the model is never held twice.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected, truncated or of wrong shape.
        UnsupportedModelError: as `load_config`.
        ResourceError: the device has too little memory.
    """
    config = load_config(folder)
    places = tensor_map(config)
    files = _weight_files(folder)
    _check(folder, files, places)
    decoder = _empty_decoder(config, torch.device(device), dtype)
    parameters = dict(decoder.named_parameters())
    for path, names in files.items():
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(names & places.keys()):
                place = places[name]
                parameter = parameters[place.parameter]
                parameter[place.start : place.start + place.shape[0]] = tensors.get_tensor(name)
    return decoder


def save_checkpoint(
    decoder: Decoder, folder: Path, source: Path, mask_token_id: int | None
) -> None:
    """Write a decoder as a model folder that `transformers` loads as a causal LM.

    Weights in the decoder's dtype, in shards of at most `SHARD_BYTES`; the config of ``source``
    with ``mask_token_id`` in it, by which `load_config` knows a fully converted model; its
    tokenizer. Every file is replaced atomically, the config last.

    Args:
        decoder: whole parameters, on any device.
        source: folder of the base model (`resolve`).
        mask_token_id: the token whose embedding mask rows get; None: a plain model.

    Raises:
        InvalidRequestError: the token is not in the vocabulary, or ``folder`` is ``source``.
        ResourceError: the disk is full or not writable.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    if mask_token_id is not None and not 0 <= mask_token_id < decoder.config.vocab_size:
        raise InvalidRequestError(
            f"The mask token {mask_token_id} is not in the vocabulary (0 to "
            f"{decoder.config.vocab_size - 1}); give an id that is."
        )
    if folder.resolve() == source.resolve():
        raise InvalidRequestError(
            f"{folder} holds the base model, which would be overwritten; give another folder."
        )
    parameters = dict(decoder.named_parameters())
    tensors = {
        name: parameters[place.parameter][place.start : place.start + place.shape[0]]
        for name, place in tensor_map(decoder.config).items()
    }
    shards = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in shards.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    if len(shards.filename_to_tensors) > 1:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)
    else:
        (folder / INDEX_FILE).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):  # of an earlier checkpoint in other shards
        if path.name not in shards.filename_to_tensors:
            path.unlink()
    for name in COPIED_FILES:
        if (source / name).exists():
            with replacing(folder / name) as temporary:
                temporary.write_bytes((source / name).read_bytes())
    write_json(folder / "config.json", _saved_config(source, decoder, mask_token_id))


def _saved_config(source: Path, decoder: Decoder, mask_token_id: int | None) -> dict[str, Any]:
    """`config.json` of ``source``, for ``decoder`` and without remote code."""
    fields = _read_json(source / "config.json")
    for name in ("auto_map", "torch_dtype", "mask_token_id"):
        fields.pop(name, None)
    if fields["model_type"] in BASE_ARCHITECTURES:
        fields["model_type"], architecture = BASE_ARCHITECTURES[fields["model_type"]]
        fields["architectures"] = [architecture]
    fields["dtype"] = str(decoder.embed.weight.dtype).removeprefix("torch.")
    return fields if mask_token_id is None else fields | {"mask_token_id": mask_token_id}


def _empty_decoder(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder with memory for its parameters, not yet filled."""
    with torch.device("meta"), _WithoutInitialisation():
        decoder = Decoder(config)
    # Not `to_empty`: on meta tensors it imports the compiler, which takes seconds.
    for module in decoder.modules():
        for name, meta in module.named_parameters(recurse=False):
            try:
                memory = torch.empty(meta.shape, dtype=dtype, device=device)
            except torch.OutOfMemoryError as error:
                size = sum(p.numel() for p in decoder.parameters()) * dtype.itemsize
                raise ResourceError(
                    f"The model needs {size / 1e9:.1f} GB on {device}, which has less free; use "
                    "another device or a smaller model."
                ) from error
            setattr(module, name, nn.Parameter(memory, requires_grad=False))
    return decoder.eval()


class _WithoutInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`, which on meta tensors imports the compiler too."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder and the tensors to take from each."""
    if (folder / WEIGHTS_FILE).exists():
        path = folder / WEIGHTS_FILE
        return {path: set(_headers(path))}
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; fetch it again.")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(folder / file, set()).add(name)
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it "
            "is read; convert it to safetensors, or use a model that comes as safetensors."
        )
    raise CheckpointError(
        f"No weights in {folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; fetch the "
        "model again, as safetensors or as a GGUF file."
    )


def _check(folder: Path, files: dict[Path, set[str]], places: dict[str, Place]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, names in files.items():
        headers = _headers(path)
        for name in names:
            if name not in headers:
                raise CheckpointError(
                    f"{path} lacks {name}, which {INDEX_FILE} promises; fetch the model again."
                )
            dtype, shapes[name] = headers[name]
            if name in places and dtype not in FLOAT_DTYPES:
                raise UnsupportedModelError(
                    f"{name} in {path} is of type {dtype}, not floating point: quantised weights "
                    "are not supported; use the unquantised model or a GGUF file of it."
                )
    check_tensors(shapes, places, str(folder))


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor in a safetensors file, whose length is checked too."""
    try:
        with safe_open(path, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); fetch the model again."
        ) from error


def _from_folder(folder: Path) -> Path:
    if any(folder.glob("*.safetensors")):
        return folder
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return convert_gguf(ggufs[0])
    if ggufs:
        raise CheckpointError(
            f"{folder} holds {len(ggufs)} GGUF files; give the path of one of them, such as "
            f"{ggufs[0]}."
        )
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"No model in {folder}: it has no config.json and no GGUF file; give a model folder."
        )
    return folder


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    advice = (
        "Give a local model folder, a .gguf file, or the id (owner/name) of a model that can be "
        "reached"
    )
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise CheckpointError(
            f"There is no folder {model!r}, and it is no model id either. {advice}."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no folder {model!r}, and the model hub knows no such model (or needs a "
            f"login for it). {advice}."
        ) from error
    # Offline, timeouts, full disk, interrupted downloads: each has its own exception class.
    except Exception as error:
        raise CheckpointError(
            f"There is no folder {model!r}, and fetching it from the model hub failed: "
            f"{_reason(error)}. {advice}; the default model needs no hub."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"No model in {path.parent}: {path.name} is missing; give a model folder."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {_reason(error)}; fetch the model again."
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch the model again.")
    return fields


def _reason(error: Exception) -> str:
    """The first line of an error, with its kind where the text alone says little."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
