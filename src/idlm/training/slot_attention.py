"""Attention of one new token per slot over a contiguous cache, for the batch sampler."""

from __future__ import annotations

from functools import cache
from typing import Any

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
    B, _, Q, D = q_B1QD.shape
    K, S = k_BKSD.shape[1:3]
    out_B1QD = torch.empty_like(q_B1QD)
    _kernel()[(B, K)](
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


@cache
def _kernel() -> Any:
    # Triton comes with torch on CUDA machines only.
    import triton
    import triton.language as tl

    @triton.jit
    def attend(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        k_cache_ptr,
        v_cache_ptr,
        index_ptr,
        out_ptr,
        scale,
        slot_stride,
        S,
        K: tl.constexpr,
        G: tl.constexpr,
        ROWS: tl.constexpr,
        D: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # One program per slot and KV head; its G query heads are the rows of the products.
        slot = tl.program_id(0)
        head = tl.program_id(1)
        index = tl.load(index_ptr + slot).to(tl.int32)
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM)
        real = dims < D
        new = (slot * K + head) * D + dims
        row_offsets = (slot * K + head) * G * D + rows[:, None] * D + dims[None, :]
        row_mask = (rows[:, None] < G) & real[None, :]
        q = tl.load(q_ptr + row_offsets, mask=row_mask, other=0.0)
        k_new = tl.load(k_ptr + new, mask=real, other=0.0)
        v_new = tl.load(v_ptr + new, mask=real, other=0.0)
        base = slot.to(tl.int64) * slot_stride + head * S * D
        tl.store(k_cache_ptr + base + index * D + dims, k_new, mask=real)
        tl.store(v_cache_ptr + base + index * D + dims, v_new, mask=real)
        # The new token is taken from registers; the loop reads what stood there before it.
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
        total = tl.full([ROWS], 1.0, tl.float32)
        out = tl.zeros([ROWS, DIM], tl.float32) + v_new.to(tl.float32)[None, :]
        for first in range(0, index, BLOCK):
            keys = first + tl.arange(0, BLOCK)
            old = keys < index
            k = tl.load(
                k_cache_ptr + base + keys[None, :] * D + dims[:, None],
                mask=old[None, :] & real[:, None],
                other=0.0,
            )
            v = tl.load(
                v_cache_ptr + base + keys[:, None] * D + dims[None, :],
                mask=old[:, None] & real[None, :],
                other=0.0,
            )
            scores = tl.dot(q, k, input_precision="ieee") * scale
            scores = tl.where(old[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            fade = tl.exp(top - higher)
            total = total * fade + tl.sum(weights, 1)
            out = out * fade[:, None]
            out += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_offsets, out, mask=row_mask)

    return attend
