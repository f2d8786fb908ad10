"""Attention of one new token per slot over a contiguous cache, for the batch sampler."""

from __future__ import annotations

import torch

from idlm.model.attention import grouped_attention, visibility_bias

# Keys that one step of the kernel's loop reads.
BLOCK_KEYS = 64


class SlotAttention:
    """Slot ``b`` writes its key and value at ``index_B[b]`` and sees the cache up to there.

    Args:
        k_LBKSD, v_LBKSD: the cache, written in place.
        index_B: place of the new token, int64; read at every call, so a captured graph follows.
    """

    def __init__(self, k_LBKSD: torch.Tensor, v_LBKSD: torch.Tensor, index_B: torch.Tensor) -> None:
        self.k_LBKSD, self.v_LBKSD, self.index_B = k_LBKSD, v_LBKSD, index_B
        self._slots_B = torch.arange(len(index_B), device=index_B.device)

    def __call__(
        self, layer: int, q_B1QD: torch.Tensor, k_B1KD: torch.Tensor, v_B1KD: torch.Tensor
    ) -> torch.Tensor:
        k_BKSD, v_BKSD = self.k_LBKSD[layer], self.v_LBKSD[layer]
        if q_B1QD.is_cuda:
            return _launch(
                q_B1QD.contiguous(),
                k_B1KD.contiguous(),
                v_B1KD.contiguous(),
                k_BKSD,
                v_BKSD,
                self.index_B,
            )
        k_BKSD[self._slots_B, :, self.index_B] = k_B1KD[:, 0]
        v_BKSD[self._slots_B, :, self.index_B] = v_B1KD[:, 0]
        S = int(self.index_B.max()) + 1
        visible_B1S = (torch.arange(S) <= self.index_B[:, None])[:, None]
        bias_B1S = visibility_bias(visible_B1S, q_B1QD.dtype)
        return grouped_attention(q_B1QD, k_BKSD[:, :, :S], v_BKSD[:, :, :S], bias_B1S)


def _launch(
    q_B1QD: torch.Tensor,
    k_B1KD: torch.Tensor,
    v_B1KD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    index_B: torch.Tensor,
) -> torch.Tensor:
    # Triton comes with torch on CUDA machines only.
    from idlm.training.slot_kernel import attend

    B, _, Q, D = q_B1QD.shape
    K, S = k_BKSD.shape[1:3]
    out_B1QD = torch.empty_like(q_B1QD)
    attend[(B, K)](
        q_B1QD,
        k_B1KD,
        v_B1KD,
        k_BKSD,
        v_BKSD,
        index_B,
        out_B1QD,
        D**-0.5,
        k_BKSD.stride(0),
        S,
        K=K,
        G=Q // K,
        # The matrix units want 16 rows.
        ROWS=max(16, 1 << (Q // K - 1).bit_length()),
        D=D,
        DIM=1 << (D - 1).bit_length(),
        BLOCK=BLOCK_KEYS,
    )
    return out_B1QD
