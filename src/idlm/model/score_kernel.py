"""Triton kernel that scores a few tokens of the vocabulary for each row."""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

TOKENS, INPUTS = 16, 128


def score(hidden_BH: torch.Tensor, weight_VH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """``weight[ids] @ hidden``, ``[B, K]`` fp32.

    Args:
        hidden_BH, weight_VH: dense, of one dtype.
        ids_BK: int64, in any layout.
    """
    (B, K), H = ids_BK.shape, hidden_BH.shape[1]
    scores_BK = torch.empty((B, K), dtype=torch.float32, device=hidden_BH.device)
    _score[(B, triton.cdiv(K, TOKENS))](
        hidden_BH,
        weight_VH,
        ids_BK,
        scores_BK,
        K,
        *ids_BK.stride(),
        H=H,
        TOKENS=TOKENS,
        INPUTS=INPUTS,
    )
    return scores_BK


@triton.jit(do_not_specialize=["K"])
def _score(  # type: ignore[no-untyped-def]
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    scores_ptr,
    K,
    ids_stride_b,
    ids_stride_k,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Some tokens of one row."""
    b = tl.program_id(0)
    k = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    ids = tl.load(ids_ptr + b * ids_stride_b + k * ids_stride_k, mask=k < K, other=0)
    total = tl.zeros([TOKENS, INPUTS], tl.float32)
    for first in tl.range(0, H, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        hidden = tl.load(hidden_ptr + b * H + inputs, mask=inputs < H, other=0.0)
        weight = tl.load(
            weight_ptr + ids[:, None] * H + inputs[None, :],
            mask=(inputs < H)[None, :],
            other=0.0,
        )
        total += weight.to(tl.float32) * hidden.to(tl.float32)[None, :]
    tl.store(scores_ptr + b * K + k, tl.sum(total, 1), mask=k < K)
