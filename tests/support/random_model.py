"""Small random decoders and adapters, built in memory."""

from __future__ import annotations

import torch

from idlm.model.adapter import Adapter, AdapterConfig
from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.decoder import Decoder


def random_config(vocab_size: int = 61, **overrides: object) -> ModelConfig:
    fields: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope": RopeConfig(10000.0),
    }
    return ModelConfig(**(fields | overrides))  # type: ignore[arg-type]


@torch.no_grad()
def random_decoder(config: ModelConfig, seed: int = 0, peakedness: float = 1.0) -> Decoder:
    """A decoder whose logits vary with the context; higher ``peakedness``: surer of itself."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2:
            scale = parameter.shape[1] ** -0.5
            if "embed" in name or "lm_head" in name:
                scale = peakedness if "lm_head" in name else 1.0
                scale *= parameter.shape[1] ** -0.5 * 2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return decoder.requires_grad_(False).eval()


@torch.no_grad()
def random_adapter(config: ModelConfig, seed: int = 1, rank: int = 4) -> Adapter:
    """An adapter that proposes, but not what the base model would say."""
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(
        AdapterConfig(
            rank=rank,
            alpha=rank,
            projections=("qkv", "o", "gate_up", "down"),
            block_size=7,
            head_width=24,
            head_depth=2,
            base_fingerprint=config.fingerprint(),
            base_model="random",
        ),
        config,
    )
    for parameter in adapter.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
    adapter.mask_embedding.copy_(torch.randn(config.hidden_size, generator=generator) * 0.3)
    return adapter.freeze()
