"""The tensors of a checkpoint: their Hugging Face names, shapes and places in the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from idlm.errors import CheckpointError
from idlm.model.adapter import FUSED_MODULES, MODULE_PARENT, module_shapes
from idlm.model.config import ModelConfig


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor of ``shape`` goes: rows of a (fused) parameter from ``start``."""

    parameter: str
    start: int
    shape: tuple[int, ...]


def tensor_map(config: ModelConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this architecture has to have, by its name there."""
    return dict(_places(config))


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place], source: str
) -> None:
    """Check that the tensors ``shapes`` of ``source`` are those of the architecture.

    Raises:
        CheckpointError: one is missing, unexpected or of another shape.
    """
    if missing := sorted(places.keys() - shapes.keys()):
        raise CheckpointError(
            f"The weights in {source} lack {missing[0]} ({len(missing)} tensors are missing); the "
            "config belongs to another model, or the weights are incomplete: fetch them again."
        )
    if unexpected := sorted(n for n in shapes.keys() - places.keys() if not _ignorable(n)):
        raise CheckpointError(
            f"The weights in {source} hold {unexpected[0]}, which the config does not account for "
            f"({len(unexpected)} such tensors); use weights and config of the same model."
        )
    for name, place in places.items():
        if shapes[name] != place.shape:
            raise CheckpointError(
                f"{name} in {source} has shape {shapes[name]}, the config asks for {place.shape}; "
                "use weights and config of the same model."
            )


def _places(config: ModelConfig) -> Iterator[tuple[str, Place]]:
    V, H, D = config.vocab_size, config.hidden_size, config.head_dim
    biased = {
        "qkv": config.qkv_bias,
        "o": config.output_bias,
        "gate_up": config.mlp_bias,
        "down": config.mlp_bias,
    }
    yield "model.embed_tokens.weight", Place("embed.weight", 0, (V, H))
    yield "model.norm.weight", Place("norm.weight", 0, (H,))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Place("lm_head.weight", 0, (V, H))
    for i in range(config.num_layers):
        source, own = f"model.layers.{i}", f"layers.{i}"
        yield f"{source}.input_layernorm.weight", Place(f"{own}.attn_norm.weight", 0, (H,))
        yield f"{source}.post_attention_layernorm.weight", Place(f"{own}.mlp_norm.weight", 0, (H,))
        if config.qk_norm:
            yield f"{source}.self_attn.q_norm.weight", Place(f"{own}.q_norm.weight", 0, (D,))
            yield f"{source}.self_attn.k_norm.weight", Place(f"{own}.k_norm.weight", 0, (D,))
        for fused, modules in FUSED_MODULES.items():
            width, sizes = module_shapes(config, fused)
            start = 0
            for module, size in zip(modules, sizes, strict=True):
                name = f"{source}.{MODULE_PARENT[fused]}.{module}"
                yield f"{name}.weight", Place(f"{own}.{fused}.weight", start, (size, width))
                if biased[fused]:
                    yield f"{name}.bias", Place(f"{own}.{fused}.bias", start, (size,))
                start += size


def _ignorable(name: str) -> bool:
    # A copy of the tied embedding, and the rotary frequencies that old checkpoints stored.
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
