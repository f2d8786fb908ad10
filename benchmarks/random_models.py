"""Random weights in the shapes of two models, where it is times that count and no text."""

from __future__ import annotations

import torch

from idlm.model.adapter import Adapter, AdapterConfig
from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.cuda import stack as cuda_stack
from idlm.model.decoder import Decoder

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
# Of the adapters.
RANK = {"135M": 24, "8B": 128}
HEAD_WIDTH = {"135M": 1024, "8B": 4096}


def config(name: str) -> ModelConfig:
    """The shapes of SmolLM2-135M or Qwen3-8B."""
    small = name == "135M"
    return ModelConfig(
        model_type="llama" if small else "qwen3",
        vocab_size=49152 if small else 151936,
        hidden_size=576 if small else 4096,
        intermediate_size=1536 if small else 12288,
        num_layers=30 if small else 36,
        num_heads=9 if small else 32,
        num_kv_heads=3 if small else 8,
        head_dim=64 if small else 128,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960,
        rope=RopeConfig(1e6),
        qk_norm=not small,
        tie_word_embeddings=small,
    )


def random_model(
    name: str, rank: int | None = None, width: int | None = None
) -> tuple[Decoder, Adapter]:
    """Decoder and adapter (7 masks, LoRA everywhere, sampler head), on `DEVICE` in `DTYPE`.

    Args:
        rank: of the LoRA, in place of `RANK`.
        width: of the sampler head's blocks, in place of `HEAD_WIDTH`.
    """
    shape = config(name)
    with torch.device("meta"):
        decoder = Decoder(shape).to(DTYPE)
    decoder = decoder.to_empty(device=DEVICE)
    projections = ("qkv", "o", "gate_up", "down")
    rank, width = rank or RANK[name], width or HEAD_WIDTH[name]
    adapter_config = AdapterConfig(rank, rank, projections, 7, width, 2, None, "random")
    adapter = Adapter(adapter_config, shape).to(DEVICE, DTYPE)
    with torch.no_grad():
        for module in (decoder, adapter):
            for parameter_name, parameter in module.named_parameters():
                if "norm" in parameter_name:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    cuda_stack.prepare(decoder.requires_grad_(False).eval(), adapter.freeze())
    return decoder, adapter


def bandwidth(gibibytes: int = 4) -> tuple[float, float]:
    """GB/s of a large copy (read and written bytes) and of a large sum (read bytes).

    Launched as they are: a copy within a captured graph is another engine's, and slower.
    """
    source = torch.randn(gibibytes << 28, device=DEVICE)  # zeros would be faster
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    speeds = []
    for run, factor in ((lambda: target.copy_(source), 2), (source.sum, 1)):
        run()
        events[0].record()
        for _ in range(5):
            run()
        events[1].record()
        events[1].synchronize()
        speeds.append(5 * factor * source.nbytes / events[0].elapsed_time(events[1]) / 1e6)
    return speeds[0], speeds[1]
