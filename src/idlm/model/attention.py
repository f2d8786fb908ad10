"""Attention of token rows over a KV cache and over each other.

The decoder hands every layer's queries, keys and values to an `Attention`; where keys are kept
and which row sees which key is decided there and nowhere else.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from idlm.model import cpu_kernels


class Attention(Protocol):
    """Attention of one forward pass, called once per layer."""

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        """Return the attended values ``[B, R, Q, D]`` of ``Q`` query heads; K divides Q."""
        ...


def grouped_attention(
    q_BRQD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, bias_BRS: torch.Tensor
) -> torch.Tensor:
    """Softmax attention; the query heads of a KV head are packed into its rows.

    Args:
        bias_BRS: added to the scores, in the dtype of ``q``: 0 where visible, -inf where not.
    Returns:
        ``[B, R, Q, D]``.
    """
    B, R, Q, D = q_BRQD.shape
    K = k_BKSD.shape[1]
    G = Q // K
    q_BKND = q_BRQD.view(B, R, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * R, D)
    bias_B1NS = bias_BRS[:, None].repeat(1, 1, G, 1)
    o_BKND = F.scaled_dot_product_attention(q_BKND, k_BKSD, v_BKSD, attn_mask=bias_B1NS)
    return o_BKND.view(B, K, G, R, D).permute(0, 3, 1, 2, 4).reshape(B, R, Q, D)


def visibility_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``visible`` (bool), -inf elsewhere, in ``dtype``."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )


def within_window(
    positions_BR: torch.Tensor, key_positions_BS: torch.Tensor, window: int | None
) -> torch.Tensor:
    """``[B, R, S]`` bool: key at most ``window - 1`` places before the row (all if no window)."""
    distance_BRS = positions_BR[:, :, None] - key_positions_BS[:, None, :]
    if window is None:
        return torch.ones_like(distance_BRS, dtype=torch.bool)
    return distance_BRS < window


class CausalAttention:
    """Plain causal attention of whole sequences, without a cache: training and reference."""

    def __init__(self, positions_BR: torch.Tensor, window: int | None = None) -> None:
        self._bias: torch.Tensor | None = None
        if window is not None:
            visible_BRR = positions_BR[:, :, None] >= positions_BR[:, None, :]
            visible_BRR &= within_window(positions_BR, positions_BR, window)
            self._bias = visibility_bias(visible_BRR, torch.float32)

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BRQD, k_BRKD, v_BRKD))
        bias = None if self._bias is None else self._bias[:, None].to(q.dtype)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, enable_gqa=True
        )
        return o.transpose(1, 2)


class CachedAttention:
    """Attention of in-flight rows over a contiguous KV cache and over each other.

    Row ``r`` of request ``b`` writes its key and value at index ``start_b + r`` of the cache,
    and sees the ``start_b`` committed tokens plus the in-flight rows that ``visible`` names.

    Args:
        k_LBKSD, v_LBKSD: the cache, written in place; index ``i`` holds the token at position
            ``i`` for ``i < start_b``.
        start_B: committed tokens per request, int64.
        positions_BR: position of every row, int64.
        visible_BRR: bool; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
        window: sliding window in tokens, or None.
    """

    def __init__(
        self,
        k_LBKSD: torch.Tensor,
        v_LBKSD: torch.Tensor,
        start_B: torch.Tensor,
        positions_BR: torch.Tensor,
        visible_BRR: torch.Tensor,
        window: int | None = None,
    ) -> None:
        self.k_LBKSD, self.v_LBKSD = k_LBKSD, v_LBKSD
        self.start_B, self.positions_BR, self.visible_BRR = start_B, positions_BR, visible_BRR
        self.window = window
        self._native = cpu_kernels.usable(k_LBKSD)
        if not self._native:
            B, R = positions_BR.shape
            device = positions_BR.device
            self._slots_BR = start_B[:, None] + torch.arange(R, device=device)
            self._batch_B1 = torch.arange(B, device=device)[:, None]
            self._span = int(start_B.max()) + R
            self._bias_BRS = self._bias(k_LBKSD.dtype)

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        k_BKSD, v_BKSD = self.k_LBKSD[layer], self.v_LBKSD[layer]
        if self._native:
            cpu_kernels.append(k_BRKD, k_BKSD, self.start_B)
            cpu_kernels.append(v_BRKD, v_BKSD, self.start_B)
            return cpu_kernels.attention(
                q_BRQD,
                k_BKSD,
                v_BKSD,
                self.start_B,
                self.visible_BRR,
                self.positions_BR,
                scale=q_BRQD.shape[-1] ** -0.5,
                window=self.window,
            )
        k_BKSD.transpose(1, 2)[self._batch_B1, self._slots_BR] = k_BRKD
        v_BKSD.transpose(1, 2)[self._batch_B1, self._slots_BR] = v_BRKD
        S = self._span
        return grouped_attention(q_BRQD, k_BKSD[:, :, :S], v_BKSD[:, :, :S], self._bias_BRS)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor:
        B, R = self.positions_BR.shape
        index_S = torch.arange(self._span, device=self.start_B.device)
        committed_B1S = (index_S < self.start_B[:, None])[:, None]
        visible_BRS = committed_B1S.repeat(1, R, 1)
        visible_BRS.scatter_(2, self._slots_BR[:, None].expand(B, R, R), self.visible_BRR)
        if self.window is not None:
            key_positions_BS = index_S.repeat(B, 1)
            key_positions_BS.scatter_(1, self._slots_BR, self.positions_BR)
            visible_BRS &= within_window(self.positions_BR, key_positions_BS, self.window)
        return visibility_bias(visible_BRS, dtype)
