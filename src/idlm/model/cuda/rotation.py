"""Triton kernel that rotates queries and keys and puts keys and values into the paged KV cache."""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait

HEADS = 16  # of one program


@dataclass(frozen=True)
class Heads:
    """Where the heads of queries, keys and values go.

    Attributes:
        cos_ND, sin_ND, cells_N: as in `rows.Flat`.
        k_NKTD, v_NKTD: the cache, blocks of T tokens; it gets the keys, rotated, and the values.
    """

    cos_ND: torch.Tensor
    sin_ND: torch.Tensor
    cells_N: torch.Tensor
    k_NKTD: torch.Tensor
    v_NKTD: torch.Tensor


def rotate_and_append(
    qkv_NW: torch.Tensor,
    heads: Heads,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate queries and keys (after their norms, if any) and put keys and values into the cache.

    Args:
        qkv_NW: the heads of queries, keys and values, ``[N, (Q + 2 K) * D]``, dense; the queries
            are overwritten.
    """
    N, W = qkv_NW.shape
    k_NKTD, v_NKTD = heads.k_NKTD, heads.v_NKTD
    K, T, D = k_NKTD.shape[1:]
    _rotate_and_append[(N, triton.cdiv(W // D, HEADS))](
        qkv_NW,
        heads.cos_ND,
        heads.sin_ND,
        heads.cells_N,
        qkv_NW if q_norm_D is None else q_norm_D,
        qkv_NW if k_norm_D is None else k_norm_D,
        k_NKTD,
        v_NKTD,
        eps,
        *k_NKTD.stride()[:3],
        NORM=q_norm_D is not None,
        Q=W // D - 2 * K,
        K=K,
        D=D,
        T=T,
        HEADS=HEADS,
        HALF=triton.next_power_of_2(D // 2),
        num_warps=2,
        **overlap(),
    )


@triton.jit
def _rotate_and_append(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    cells_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    NORM: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some heads of one row."""
    wait(OVERLAP)
    row = tl.program_id(0)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    lane = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = D // 2
    real = (head < Q + 2 * K) & (lane < half)
    rotated = head < Q + K
    first_ptr = qkv_ptr + row.to(tl.int64) * ((Q + 2 * K) * D) + head * D + lane
    x1 = tl.load(first_ptr, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(first_ptr + half, mask=real, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        shrink = (1.0 / tl.sqrt(squares / D + eps))[:, None]
        in_q, in_k = real & (head < Q), real & (head >= Q) & rotated
        lanes = lane + 0 * head
        scale1 = tl.load(q_norm_ptr + lanes, mask=in_q, other=0.0).to(tl.float32)
        scale1 += tl.load(k_norm_ptr + lanes, mask=in_k, other=0.0).to(tl.float32)
        scale2 = tl.load(q_norm_ptr + half + lanes, mask=in_q, other=0.0).to(tl.float32)
        scale2 += tl.load(k_norm_ptr + half + lanes, mask=in_k, other=0.0).to(tl.float32)
        x1 = tl.where(rotated, x1 * shrink * scale1, x1)
        x2 = tl.where(rotated, x2 * shrink * scale2, x2)
    # The halves of cos are equal; sin carries the sign of its first half.
    cos = tl.load(cos_ptr + row * D + lane, mask=lane < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * D + half + lane, mask=lane < half, other=0.0).to(tl.float32)
    kind = qkv_ptr.dtype.element_ty
    y1 = tl.where(rotated, x1 * cos - x2 * sin, x1).to(kind)
    y2 = tl.where(rotated, x2 * cos + x1 * sin, x2).to(kind)
    tl.store(first_ptr, y1, mask=real & (head < Q))
    tl.store(first_ptr + half, y2, mask=real & (head < Q))
    index = tl.load(cells_ptr + row)
    cell = index // T * cache_stride_n + index % T * cache_stride_t + lane
    k_cell_ptr = k_cache_ptr + cell + (head - Q) * cache_stride_h
    tl.store(k_cell_ptr, y1, mask=real & (head >= Q) & rotated)
    tl.store(k_cell_ptr + half, y2, mask=real & (head >= Q) & rotated)
    v_cell_ptr = v_cache_ptr + cell + (head - Q - K) * cache_stride_h
    tl.store(v_cell_ptr, y1, mask=real & (head >= Q + K))
    tl.store(v_cell_ptr + half, y2, mask=real & (head >= Q + K))
