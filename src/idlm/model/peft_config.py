"""PEFT's description of a LoRA (`adapter_config.json`), as far as it can be applied here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlm.errors import CheckpointError, UnsupportedModelError
from idlm.model.files import write_json

PEFT_CONFIG_FILE = "adapter_config.json"
# Settings that change what the LoRA computes in ways that `LoraLinear` does not know.
UNSUPPORTED = (
    *("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"),
    *("fan_in_fan_out", "lora_bias"),
)


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA as PEFT writes it.

    Attributes:
        rank: of every update.
        alpha: the update is scaled by ``alpha / rank``.
        base_model: name of the base model, for people.
    """

    rank: int
    alpha: float
    base_model: str

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read `adapter_config.json`.

        Raises:
            CheckpointError: the file is missing or damaged.
            UnsupportedModelError: not a LoRA, or a kind of it that is not implemented.
        """
        path = folder / PEFT_CONFIG_FILE
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kind, rank, alpha = fields["peft_type"], int(fields["r"]), float(fields["lora_alpha"])
            name = str(fields.get("base_model_name_or_path") or "unnamed")
            if rank < 1:
                raise ValueError(f"r is {rank}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is missing or damaged ({error}); fetch the adapter again."
            ) from error
        used = [option for option in UNSUPPORTED if fields.get(option)]
        if kind != "LORA" or used or fields.get("bias", "none") != "none":
            feature = f"of type {kind}" if kind != "LORA" else f"with {(*used, 'bias')[0]}"
            raise UnsupportedModelError(
                f"The adapter in {folder} is {feature}, which is not supported; use a plain LoRA."
            )
        if fields.get("use_rslora"):  # scaled by alpha / sqrt(rank), arXiv 2312.03732
            alpha *= rank**0.5
        return cls(rank, alpha, name)

    def write(self, folder: Path, modules: list[str]) -> None:
        """Write `adapter_config.json` for a LoRA on ``modules``."""
        fields = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": modules,
            "inference_mode": True,
        }
        write_json(folder / PEFT_CONFIG_FILE, fields)
