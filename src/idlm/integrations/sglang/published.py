"""The authors' checkpoints (``model_type`` `sdar`): the weights of a Qwen3, decoded causally."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen3Config

MODEL_TYPE = "sdar"
ARCHITECTURE = "Qwen3ForCausalLM"


class SdarConfig(Qwen3Config):
    """A config that `transformers` knows under another name."""

    model_type = MODEL_TYPE


def register() -> None:
    """Let the host read configs of this type without the checkpoint's own code."""
    AutoConfig.register(MODEL_TYPE, SdarConfig, exist_ok=True)


def as_causal_model(server_args: Any) -> None:
    """Have the host run such a checkpoint by its Qwen3, not by its block-diffusion model."""
    config = Path(server_args.model_path) / "config.json"
    if config.exists() and json.loads(config.read_text()).get("model_type") == MODEL_TYPE:
        given = json.loads(server_args.json_model_override_args or "{}")
        server_args.json_model_override_args = json.dumps(
            {"architectures": [ARCHITECTURE], **given}
        )
