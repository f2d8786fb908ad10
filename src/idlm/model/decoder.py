"""The Llama-family decoder: one definition for training and inference.

Rows over a KV cache run through the same layers as fused kernels (`cpu_stack`, `cuda_stack`).

A forward takes *rows*: clean tokens first, then mask rows. Rows know their position explicitly;
what a row sees is the business of the `Attention` passed in. An `Adapter` acts on the mask rows
only, so clean rows compute what the base model computes, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from idlm.model.attention import Attention, PagedAttention
from idlm.model.config import ModelConfig
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cpu import stack as cpu_stack
from idlm.model.cuda import head as cuda_head
from idlm.model.cuda import stack as cuda_stack

if TYPE_CHECKING:
    from idlm.model.adapter import Adapter, LoraLinear


class Linear(nn.Linear):
    """Linear layer with an optional low-rank update of the last ``M`` (mask) rows."""

    def forward(
        self, x_BRI: torch.Tensor, lora: LoraLinear | None = None, num_masks: int = 0
    ) -> torch.Tensor:
        y_BRO = F.linear(x_BRI, self.weight, self.bias)
        if lora is None or num_masks == 0:
            return y_BRO
        return lora.add_to(y_BRO, x_BRI, num_masks)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x_BRND: torch.Tensor, cos_BR1D: torch.Tensor, sin_BR1D: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``x``: halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin).

    ``sin`` carries the sign of its first half.
    """
    x1, x2 = x_BRND.chunk(2, dim=-1)
    return x_BRND * cos_BR1D + torch.cat((x2, x1), dim=-1) * sin_BR1D


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., 2 * I]``, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Layer(nn.Module):
    """One pre-norm transformer layer with fused QKV and gate/up projections."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        H, D, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.attn_norm = RMSNorm(H, eps)
        self.qkv = Linear(H, (config.num_heads + 2 * config.num_kv_heads) * D, bias=config.qkv_bias)
        self.q_norm = RMSNorm(D, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, eps) if config.qk_norm else None
        self.o = Linear(config.num_heads * D, H, bias=config.output_bias)
        self.mlp_norm = RMSNorm(H, eps)
        self.gate_up = Linear(H, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, H, bias=config.mlp_bias)

    def forward(
        self,
        x_BRH: torch.Tensor,
        cos_BR1D: torch.Tensor,
        sin_BR1D: torch.Tensor,
        attention: Attention,
        num_masks: int,
        adapter: Adapter | None,
    ) -> torch.Tensor:
        lora = {} if adapter is None else adapter.layer(self.index)
        q, k, v = self.project(x_BRH, cos_BR1D, sin_BR1D, lora, num_masks)
        return self.combine(x_BRH, attention(self.index, q, k, v), lora, num_masks)

    def project(
        self,
        x_BRH: torch.Tensor,
        cos_BR1D: torch.Tensor,
        sin_BR1D: torch.Tensor,
        lora: dict[str, LoraLinear],
        num_masks: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values: ``[B, R, heads, D]`` each."""
        qkv_BRW = self.qkv(self.attn_norm(x_BRH), lora.get("qkv"), num_masks)
        heads_BRND = qkv_BRW.unflatten(-1, (-1, self.head_dim))
        qk, v = heads_BRND.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        qk = rotate(qk, cos_BR1D, sin_BR1D)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=2)
        return q, k, v

    def combine(
        self,
        x_BRH: torch.Tensor,
        attended_BRQD: torch.Tensor,
        lora: dict[str, LoraLinear],
        num_masks: int,
    ) -> torch.Tensor:
        """Residual stream after the attention's output projection and the SwiGLU MLP."""
        x_BRH = x_BRH + self.o(attended_BRQD.flatten(2), lora.get("o"), num_masks)
        gate_up = self.gate_up(self.mlp_norm(x_BRH), lora.get("gate_up"), num_masks)
        return x_BRH + self.down(swiglu(gate_up), lora.get("down"), num_masks)


@dataclass(frozen=True)
class Part:
    """Requests of a forward that have as many rows each; their attention is their own.

    Attributes:
        tokens_BC, attention, num_masks: as in `Decoder.forward`; the attention knows the positions.
    """

    tokens_BC: torch.Tensor
    attention: PagedAttention
    num_masks: int


class Decoder(nn.Module):
    """Token rows in, final hidden states out; `logits` maps those to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        # Neither parameter nor buffer: stays fp32 whatever dtype the model is moved to.
        self.inv_freq_F, self.rope_factor = config.rope.frequencies(
            config.head_dim, config.max_position_embeddings
        )

    def forward(
        self,
        tokens_BC: torch.Tensor,
        positions_BR: torch.Tensor,
        attention: Attention,
        *,
        num_masks: int = 0,
        adapter: Adapter | None = None,
    ) -> torch.Tensor:
        """Run the clean rows and the ``num_masks`` mask rows that follow them.

        Args:
            tokens_BC: token ids of the clean rows, int64; C may be 0. Any id is ordinary text,
                the mask token's too: masks are rows, not ids.
            positions_BR: position of every row, ``R = C + num_masks``, int64.
            attention: the keys and values of this pass and who sees them.
            adapter: acts on mask rows only. None: masks are the embedding of the mask token of
                a fully converted model (``config.mask_token_id``).
        Returns:
            ``hidden_BRH`` after the final norm.
        """
        lora = adapter if num_masks else None
        paged = attention if isinstance(attention, PagedAttention) else None
        x_BRH = self._embed(tokens_BC, num_masks, adapter)
        cos_BR1D, sin_BR1D = self._rope(positions_BR, x_BRH.dtype)
        if paged is not None and cpu_stack.takes(x_BRH, paged, lora):
            return cpu_stack.run(self, x_BRH, cos_BR1D, sin_BR1D, paged, num_masks, lora)
        for layer in self.layers:
            x_BRH = layer(x_BRH, cos_BR1D, sin_BR1D, attention, num_masks, lora)
        return self.norm(x_BRH)

    def together(self, parts: Sequence[Part], adapter: Adapter | None) -> list[torch.Tensor]:
        """`forward` of all ``parts``, by fused kernels where `cuda_stack.takes` them.

        Within a layer all keys are there before anybody attends: rows of a part may go on where
        others of it end.

        Returns:
            Of each part ``hidden_BRH``.
        """
        lora = adapter if any(part.num_masks for part in parts) else None
        if all(cuda_stack.takes(self, part.attention, lora) for part in parts):
            return cuda_stack.run(self, parts, lora)
        return [
            self(
                part.tokens_BC,
                part.attention.positions_BR,
                part.attention,
                num_masks=part.num_masks,
                adapter=adapter,
            )
            for part in parts
        ]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., V]``, in the dtype of ``hidden``; on CUDA not rounded, fp32."""
        if cpu_kernels.usable(hidden):
            return cpu_kernels.linear(hidden, self.output_weight)
        if not torch.is_grad_enabled() and cuda_head.takes(hidden, self.output_weight):
            return cuda_head.logits(hidden, self.output_weight)
        return F.linear(hidden, self.output_weight)

    def logits_at(self, hidden_BH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
        """``[B, K]``, fp32, not rounded: the logits of the tokens ``ids`` of each row alone."""
        if cpu_kernels.usable(hidden_BH):
            return cpu_kernels.score(hidden_BH, self.output_weight, ids_BK)
        if not torch.is_grad_enabled() and cuda_head.takes(hidden_BH, self.output_weight):
            return cuda_head.score(hidden_BH, self.output_weight, ids_BK)
        rows_BKH = self.output_weight[ids_BK]
        return (rows_BKH.float() * hidden_BH[:, None].float()).sum(-1)

    @property
    def output_weight(self) -> torch.Tensor:
        """``[V, H]``: the output layer, which is the embedding when the two are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def _embed(
        self, tokens_BC: torch.Tensor, num_masks: int, adapter: Adapter | None
    ) -> torch.Tensor:
        x_BCH = self.embed(tokens_BC)
        if num_masks == 0:
            return x_BCH
        mask_H = self.mask_embedding(adapter).to(x_BCH.dtype)
        return torch.cat((x_BCH, mask_H.expand(x_BCH.shape[0], num_masks, -1)), dim=1)

    def mask_embedding(self, adapter: Adapter | None) -> torch.Tensor:
        """``[H]``: what mask rows are before the first layer."""
        if adapter is not None:
            return adapter.mask_embedding
        assert self.config.mask_token_id is not None, "mask rows need an adapter or a mask id"
        return self.embed.weight[self.config.mask_token_id]

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Of the rotary embedding's pairs, ``[D / 2]``, fp32."""
        if self.inv_freq_F.device != device:
            self.inv_freq_F = self.inv_freq_F.to(device)
        return self.inv_freq_F

    def _rope(
        self, positions_BR: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles_BRF = positions_BR[..., None].float() * self.frequencies(positions_BR.device)
        cos_BRF = angles_BRF.cos() * self.rope_factor
        sin_BRF = angles_BRF.sin() * self.rope_factor
        cos_BR1D = torch.cat((cos_BRF, cos_BRF), dim=-1)[:, :, None].to(dtype)
        sin_BR1D = torch.cat((-sin_BRF, sin_BRF), dim=-1)[:, :, None].to(dtype)
        return cos_BR1D, sin_BR1D
