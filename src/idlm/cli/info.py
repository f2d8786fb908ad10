"""`idlm info`: what a model or an adapter is, read from its files without loading it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from idlm.errors import CheckpointError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "info",
        help="describe a model or an adapter",
        description="Describe a model or an adapter.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        metavar="MODEL_OR_ADAPTER",
        help="folder, .gguf file or hub id (default: the default model and its adapter)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        CheckpointError: there is no readable model or adapter.
        UnsupportedModelError: the model's architecture is not implemented.
    """
    facts = describe(args.path)
    if args.json:
        print(json.dumps(facts))
        return
    for part in (facts, facts.get("adapter") or {}):
        for name, value in part.items():
            if not isinstance(value, dict):
                print(f"{name.replace('_', ' '):<20}{_readable(value)}")
        for title, line in _figures(part.get("results") or {}):
            print(f"{title:<20}{line}")
        if part is facts and facts.get("adapter"):
            print()


def describe(path: str | None) -> dict[str, Any]:
    """The facts about a model or an adapter; None: the default model, its adapter within.

    Raises:
        CheckpointError, UnsupportedModelError: see `run`.
    """
    from idlm.llm import DEFAULT_ADAPTER
    from idlm.model import checkpoint
    from idlm.model.adapter import is_adapter

    folder = checkpoint.resolve(path)
    if is_adapter(folder):
        return _adapter(folder)
    facts = _model(folder)
    if path is None:
        facts["adapter"] = _adapter(Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER)))
    return facts


def _model(folder: Path) -> dict[str, Any]:
    from idlm.model import checkpoint
    from idlm.model.adapter import RESULTS_FILE
    from idlm.model.tokenizer import Tokenizer

    config = checkpoint.load_config(folder)
    return {
        "kind": "model",
        "path": str(folder),
        "architecture": config.model_type,
        **_weights(sorted(folder.glob("model*.safetensors"))),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "chat_template": Tokenizer.load(folder).has_chat_template,
        "mask_token_id": config.mask_token_id,
        "fingerprint": config.fingerprint(),
        "results": _results(folder / RESULTS_FILE),
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from idlm.model.adapter import (
        FUSED_MODULES,
        HEAD_FILE,
        LORA_FILE,
        RESULTS_FILE,
        load_adapter_config,
    )

    config = load_adapter_config(folder)
    files = [folder / LORA_FILE, folder / HEAD_FILE]
    card = folder / "README.md"
    return {
        "kind": "adapter",
        "path": str(folder),
        "base_model": config.base_model,
        "base_fingerprint": config.base_fingerprint,
        **_weights([path for path in files if path.exists()]),
        "rank": config.rank,
        "alpha": config.alpha,
        "modules": [module for fused in config.projections for module in FUSED_MODULES[fused]],
        "sampler_head_width": config.head_width,
        "sampler_head_depth": config.head_depth,
        "stride_trained": config.block_size + 1,
        "card": str(card) if card.exists() else None,
        "results": _results(folder / RESULTS_FILE),
    }


def _results(path: Path) -> dict[str, Any] | None:
    """The figures that `idlm convert` wrote beside the card."""
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text())
        if not isinstance(results, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it or fetch it again."
        ) from error
    return results


def _figures(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A title and a line for every group of figures, by place or by setting."""
    titles = {
        "greedy": "accepted at T=0",
        "sampled": "accepted at T=1",
        "tpf": "TPF held-out",
        "mt_bench": "TPF MT-bench",
    }
    for name, value in results.items():
        title = titles.get(name, name.replace("_", " "))
        if isinstance(value, dict):
            yield title, "  ".join(f"{setting} {figure:.2f}" for setting, figure in value.items())
        else:
            yield title, " ".join(f"{figure:.3f}" for figure in value)


def _weights(paths: Sequence[Path]) -> dict[str, Any]:
    """Number of parameters, their types and the size of safetensors, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    parameters, dtypes = 0, set()
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  it is no dict
                    part = tensors.get_slice(name)
                    parameters += math.prod(part.get_shape())
                    dtypes.add(part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); fetch it again."
            ) from error
    return {
        "parameters": parameters,
        "dtype": ", ".join(sorted(dtypes)),
        "bytes": sum(path.stat().st_size for path in paths),
    }


def _readable(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
