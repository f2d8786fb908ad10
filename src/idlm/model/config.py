"""Architecture of a Llama-family decoder, as read from a Hugging Face ``config.json``."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from idlm.errors import UnsupportedModelError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "sdar")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base ``theta`` and one of the four scalings.

    ``scaling`` holds the Hugging Face ``rope_scaling`` fields of ``kind`` (``default``,
    ``linear``, ``llama3`` or ``yarn``).
    """

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()

    def frequencies(self, head_dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
        """Inverse frequencies and the factor on cos and sin.

        Returns:
            ``(inv_freq_F, attention_factor)`` with ``F = head_dim // 2``, fp32, radians per
            position. Linear: arXiv 2306.15595; yarn: arXiv 2309.00071, section 3; llama3: the
            Llama 3.1 release.
        """
        fields = dict(self.scaling)
        # On the CPU even while a decoder is built on the meta device.
        exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        inv_freq_F = 1.0 / self.theta**exponents_F
        if self.kind == "default":
            return inv_freq_F, 1.0
        factor = float(fields["factor"])
        if self.kind == "linear":
            return inv_freq_F / factor, 1.0
        if self.kind == "llama3":
            return self._llama3(inv_freq_F, factor, fields), 1.0
        return self._yarn(inv_freq_F, factor, fields, head_dim, max_positions)

    def _llama3(
        self, inv_freq_F: torch.Tensor, factor: float, fields: dict[str, Any]
    ) -> torch.Tensor:
        original = float(fields["original_max_position_embeddings"])
        low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
        wavelength_F = 2 * math.pi / inv_freq_F
        smooth_F = ((original / wavelength_F - low) / (high - low)).clamp(0, 1)
        return smooth_F * inv_freq_F + (1 - smooth_F) * inv_freq_F / factor

    def _yarn(
        self,
        inv_freq_F: torch.Tensor,
        factor: float,
        fields: dict[str, Any],
        head_dim: int,
        max_positions: int,
    ) -> tuple[torch.Tensor, float]:
        original = float(fields.get("original_max_position_embeddings") or max_positions)

        def dimension(rotations: float) -> float:
            return (head_dim * math.log(original / (rotations * 2 * math.pi))) / (
                2 * math.log(self.theta)
            )

        low = dimension(float(fields.get("beta_fast") or 32))
        high = dimension(float(fields.get("beta_slow") or 1))
        if fields.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        pairs_F = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
        ramp_F = ((pairs_F - low) / (high - low)).clamp(0, 1)
        inv_freq_F = inv_freq_F / factor * ramp_F + inv_freq_F * (1 - ramp_F)
        return inv_freq_F, self._yarn_attention_factor(factor, fields)

    @staticmethod
    def _yarn_attention_factor(factor: float, fields: dict[str, Any]) -> float:
        if fields.get("attention_factor") is not None:
            return float(fields["attention_factor"])

        def scale(mscale: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

        mscale, all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
        if mscale and all_dim:
            return scale(float(mscale)) / scale(float(all_dim))
        return scale(1.0)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder (Llama, Mistral, Qwen2 or Qwen3)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read the fields of a Hugging Face ``config.json``.

        Raises:
            UnsupportedModelError: unknown ``model_type``, activation or rope scaling.
            KeyError, TypeError, ValueError: a field is missing or makes no sense.
        """
        model_type = config.get("model_type", "")
        if model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"Architecture {model_type or 'unnamed'!r} is not supported; "
                f"use a model of type {', '.join(MODEL_TYPES)}."
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"Activation {activation!r} is not supported; only SwiGLU models (hidden_act "
                "'silu') can be loaded."
            )
        heads = int(config["num_attention_heads"])
        eos, mask = config.get("eos_token_id"), config.get("mask_token_id")
        if mask is not None and not 0 <= mask < int(config["vocab_size"]):
            raise ValueError(f"mask_token_id {mask} is not in the vocabulary")
        qwen3_like = model_type in ("qwen3", "sdar")
        bias = bool(config.get("attention_bias", False))
        return cls(
            model_type=model_type,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            rope=_rope(config),
            qkv_bias=True if model_type == "qwen2" else bias,
            output_bias=False if model_type == "qwen2" else bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=qwen3_like,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(config),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            mask_token_id=mask,
        )

    def fingerprint(self) -> str:
        """SHA-256 over the fields that shape the weights: what an adapter must match."""
        fields = asdict(self)
        # Not part of what the weights compute, and often edited by hand.
        for name in ("bos_token_id", "eos_token_ids", "mask_token_id", "max_position_embeddings"):
            del fields[name]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _rope(config: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling`.
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(fields.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields.pop("type", None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"Rope scaling {kind!r} is not supported; use default, linear, llama3 or yarn."
        )
    return RopeConfig(theta, kind, tuple(sorted(fields.items())) if kind != "default" else ())


def _sliding_window(config: dict[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    if config["model_type"] == "mistral":
        return int(window)
    layer_types = config.get("layer_types")
    if layer_types is not None and set(layer_types) == {"full_attention"}:
        return None
    raise UnsupportedModelError(
        "Sliding-window attention on a part of the layers is not supported; set "
        "use_sliding_window to false in config.json if the context stays within the window."
    )
