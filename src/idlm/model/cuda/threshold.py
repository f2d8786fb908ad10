"""Triton kernel that finds the smallest probability that top-k and top-p keep, without sorting.

Positive floats lie in the order of their bits, so the threshold is found by halving a range of
bits: thirty passes over a row, which stays in the caches, where a sort of it takes far longer.
"""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait

CHUNK = 4096  # probabilities that are looked at together
ABOVE_ONE = tl.constexpr(0x3F800001)  # bits of the number after 1.0
HALVINGS = tl.constexpr(30)  # of a range of so many bits, until one is left


def rank_threshold(
    probs_BRX: torch.Tensor, top_k_B: torch.Tensor | None, top_p_B: torch.Tensor | None
) -> torch.Tensor:
    """`decoding.sampling`'s threshold ``[B, R, 1]``, fp32; of equals all are kept.

    Args:
        probs_BRX: fp32, between 0 and 1; the rows are dense, but may lie anywhere.
        top_k_B: int64; X or more: off. None: off for all.
        top_p_B: fp32; 1 or more: off. None: off for all.
    """
    B, R, X = probs_BRX.shape
    thresholds_BR1 = torch.empty((B, R, 1), dtype=torch.float32, device=probs_BRX.device)
    _rank_threshold[(B * R,)](
        probs_BRX,
        *probs_BRX.stride()[:2],
        thresholds_BR1 if top_k_B is None else top_k_B,
        thresholds_BR1 if top_p_B is None else top_p_B,
        thresholds_BR1,
        R,
        X=X,
        TOP_K=top_k_B is not None,
        TOP_P=top_p_B is not None,
        CHUNK=min(CHUNK, triton.next_power_of_2(X)),
        num_warps=8,
        **overlap(),
    )
    return thresholds_BR1


@triton.jit
def _kept(row_ptr, bits, X: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many probabilities reach the number of these bits, and their sum."""
    least = bits.to(tl.float32, bitcast=True)
    count = tl.zeros([CHUNK], tl.int32)
    total = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, X, CHUNK):
        place = first + tl.arange(0, CHUNK)
        p = tl.load(row_ptr + place, mask=place < X, other=-1.0)
        reaches = p >= least
        count += reaches.to(tl.int32)
        total += tl.where(reaches, p, 0.0)
    return tl.sum(count, 0), tl.sum(total, 0)


@triton.jit(do_not_specialize=["R"])
def _rank_threshold(  # type: ignore[no-untyped-def]
    probs_ptr,
    stride_b,
    stride_r,
    top_k_ptr,
    top_p_ptr,
    thresholds_ptr,
    R,
    X: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    wait(OVERLAP)
    row = tl.program_id(0)
    b = row // R
    row_ptr = probs_ptr + b.to(tl.int64) * stride_b + (row % R) * stride_r
    kept = tl.zeros([], tl.int32)  # bits of what is kept for certain: 0.0 keeps all
    if TOP_K:
        top_k = tl.load(top_k_ptr + b)
        if top_k < X:
            lost = kept + ABOVE_ONE
            for _ in range(HALVINGS):
                middle = (kept + lost) // 2
                count, _total = _kept(row_ptr, middle, X, CHUNK)
                enough = count >= top_k
                kept = tl.where(enough, middle, kept)
                lost = tl.where(enough, lost, middle)
    if TOP_P:
        top_p = tl.load(top_p_ptr + b)
        if top_p < 1.0:
            _count, whole = _kept(row_ptr, kept, X, CHUNK)
            lost = tl.zeros([], tl.int32) + ABOVE_ONE
            for _ in range(HALVINGS):
                middle = (kept + lost) // 2
                _count, total = _kept(row_ptr, middle, X, CHUNK)
                enough = total >= top_p * whole
                kept = tl.where(enough, middle, kept)
                lost = tl.where(enough, lost, middle)
    tl.store(thresholds_ptr + row, kept.to(tl.float32, bitcast=True))
