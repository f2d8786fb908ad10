"""Attention of token rows over a KV cache and over each other.

The decoder hands every layer's queries, keys and values to an `Attention`; where keys are kept
and which row sees which key is decided there and nowhere else.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F

from idlm.model.cpu import kernels as cpu_kernels


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


class PagedAttention:
    """Attention of in-flight rows over a paged KV cache and over each other.

    Index ``i`` of request ``b`` lies in block ``table[b, i // T]`` at ``i % T``. Row ``r`` writes
    its key and value at index ``start_b + r``, and sees the ``start_b`` committed tokens plus the
    in-flight rows that ``visible`` names.

    Args:
        k_LNKTD, v_LNKTD: N blocks of T tokens, written in place; index ``i`` holds the token at
            position ``i`` for ``i < start_b``.
        table_BP: blocks of each request, int32; entries that no row reaches may be any block.
        start_B: committed tokens per request, int64.
        positions_BR: position of every row, int64.
        visible_BRR: bool; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
        window: sliding window in tokens, or None.
        kept_BR: bool; keys of rows that are not kept go into block 0, nobody's. None: all are.
    """

    def __init__(
        self,
        k_LNKTD: torch.Tensor,
        v_LNKTD: torch.Tensor,
        table_BP: torch.Tensor,
        start_B: torch.Tensor,
        positions_BR: torch.Tensor,
        visible_BRR: torch.Tensor,
        window: int | None = None,
        kept_BR: torch.Tensor | None = None,
    ) -> None:
        self.k_LNKTD, self.v_LNKTD, self.table_BP = k_LNKTD, v_LNKTD, table_BP
        self.start_B, self.positions_BR, self.visible_BRR = start_B, positions_BR, visible_BRR
        self.window, self.kept_BR = window, kept_BR

    def __call__(
        self, layer: int, q_BRQD: torch.Tensor, k_BRKD: torch.Tensor, v_BRKD: torch.Tensor
    ) -> torch.Tensor:
        k_NKTD, v_NKTD = self.k_LNKTD[layer], self.v_LNKTD[layer]
        if cpu_kernels.usable(k_NKTD) and self.kept_BR is None:
            cpu_kernels.append(k_BRKD, k_NKTD, self.table_BP, self.start_B)
            cpu_kernels.append(v_BRKD, v_NKTD, self.table_BP, self.start_B)
            return cpu_kernels.attention(
                q_BRQD,
                k_NKTD,
                v_NKTD,
                self.table_BP,
                self.start_B,
                self.visible_BRR,
                self.positions_BR,
                scale=q_BRQD.shape[-1] ** -0.5,
                window=self.window,
            )
        index_BR, dead_B1S1, bias_BRS = self._places
        T = k_NKTD.shape[2]
        blocks_BR = self.table_BP.gather(1, index_BR // T)
        if self.kept_BR is not None:
            blocks_BR = blocks_BR * self.kept_BR
        k_NKTD[blocks_BR, :, index_BR % T] = k_BRKD
        v_NKTD[blocks_BR, :, index_BR % T] = v_BRKD
        # What has not been written may be NaN, which a weight of 0 does not take away.
        k_BKSD, v_BKSD = (self._gathered(x).masked_fill(dead_B1S1, 0) for x in (k_NKTD, v_NKTD))
        return grouped_attention(q_BRQD, k_BKSD, v_BKSD, bias_BRS)

    def _gathered(self, cache_NKTD: torch.Tensor) -> torch.Tensor:
        """``[B, K, S, D]``: the keys or values of each request in a row."""
        return cache_NKTD[self.table_BP].transpose(1, 2).flatten(2, 3)

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where rows write, which cells nobody has written, and who sees what: for all layers."""
        B, R = self.positions_BR.shape
        S, device = self.table_BP.shape[1] * self.k_LNKTD.shape[3], self.start_B.device
        index_BR = self.start_B[:, None] + torch.arange(R, device=device)
        index_S = torch.arange(S, device=device)
        committed_B1S = (index_S < self.start_B[:, None])[:, None]
        visible_BRS = committed_B1S.repeat(1, R, 1)
        visible_BRS.scatter_(2, index_BR[:, None].expand(B, R, R), self.visible_BRR)
        if self.window is not None:
            key_positions_BS = index_S.repeat(B, 1)
            key_positions_BS.scatter_(1, index_BR, self.positions_BR)
            visible_BRS &= within_window(self.positions_BR, key_positions_BS, self.window)
        dead_B1S1 = (index_S >= self.start_B[:, None] + R)[:, None, :, None]
        return index_BR, dead_B1S1, visibility_bias(visible_BRS, self.k_LNKTD.dtype)
