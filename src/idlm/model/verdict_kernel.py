"""Triton kernels of verification: which drafts stand, the token after them, and what follows."""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

from idlm.model.choice_kernel import best_of_chunks, first_best


def greedy_verdict(
    logits_BNV: torch.Tensor, tokens_BM: torch.Tensor, count_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decoding.verify.Verdict` of greedy requests: ``accepted_B``, ``next_B``, ``overlap_BM``.

    Args:
        logits_BNV: as in `choice_kernel.argmax`; row ``i`` predicts ``d_{i+1}``.
        tokens_BM: ``d_1 .. d_M``, int64; the rows are dense, but may lie anywhere.
        count_B: how many of them are drafts, int64.
    """
    B, N, V = logits_BNV.shape
    accepted_B, next_B = torch.empty((2, B), dtype=torch.int64, device=logits_BNV.device)
    overlap_BM = torch.empty((B, N - 1), dtype=torch.float32, device=logits_BNV.device)
    values_XC, indices_XC = best_of_chunks(logits_BNV)
    chunks = values_XC.shape[1]
    _greedy_verdict[(B,)](
        values_XC,
        indices_XC,
        tokens_BM,
        tokens_BM.stride(0),
        count_B,
        accepted_B,
        next_B,
        overlap_BM,
        chunks,
        N=N,
        V=V,
        ROWS=triton.next_power_of_2(N),
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=4,
    )
    return accepted_B, next_B, overlap_BM


def settle(
    accepted_B: torch.Tensor,
    next_B: torch.Tensor,
    overlap_BM: torch.Tensor,
    tokens_BM: torch.Tensor,
    count_B: torch.Tensor,
    length_B: torch.Tensor,
    block_after_NN: torch.Tensor,
    num_rows: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decoding.settle.settle`: ``packed_BX``, the new ``length_B``, ``proposed_B``, ``rows_BM``.

    Args:
        accepted_B, next_B, overlap_BM: the verdict, dense.
        tokens_BM, count_B: the drafts; the rows of the tokens may lie anywhere.
    """
    B, N = len(next_B), tokens_BM.shape[1] + 1
    packed_BX = next_B.new_empty(B, 2 * N + 1)
    new_length_B, proposed_B = next_B.new_empty(2, B)
    rows_BM = next_B.new_empty(B, block_size)
    _settle[(B,)](
        accepted_B,
        next_B,
        overlap_BM,
        tokens_BM,
        tokens_BM.stride(0),
        count_B,
        length_B,
        block_after_NN,
        block_after_NN.stride(0),
        packed_BX,
        new_length_B,
        proposed_B,
        rows_BM,
        num_rows,
        N=N,
        M=block_size,
        ROWS=triton.next_power_of_2(max(N, block_size)),
        num_warps=1,
    )
    return packed_BX, new_length_B, proposed_B, rows_BM


@triton.jit(do_not_specialize=["chunks", "tokens_stride"])
def _greedy_verdict(  # type: ignore[no-untyped-def]
    values_ptr,
    indices_ptr,
    tokens_ptr,
    tokens_stride,
    count_ptr,
    accepted_ptr,
    next_ptr,
    overlap_ptr,
    chunks,
    N: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One request, from the best of its rows' chunks."""
    b = tl.program_id(0)
    row, chunk = tl.arange(0, ROWS), tl.arange(0, CHUNKS)
    place = (b * N + row)[:, None] * chunks + chunk[None, :]
    real = (row < N)[:, None] & (chunk < chunks)[None, :]
    value = tl.load(values_ptr + place, mask=real, other=float("-inf"))
    index = tl.load(indices_ptr + place, mask=real, other=V - 1)
    _, target = first_best(value, index, V - 1, 1)
    draft = tl.load(tokens_ptr + b * tokens_stride + row, mask=row < N - 1, other=-1)
    match = draft == target
    tl.store(overlap_ptr + b * (N - 1) + row, match.to(tl.float32), mask=row < N - 1)
    # The row behind the last draft has none to match: it ends the run at the latest.
    stands = match & (row < N - 1) & (row < tl.load(count_ptr + b))
    accepted = tl.min(tl.where(stands, N - 1, row), 0)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    tl.store(next_ptr + b, tl.sum(tl.where(row == accepted, target, 0), 0).to(tl.int64))


@triton.jit(do_not_specialize=["tokens_stride", "after_stride", "R"])
def _settle(  # type: ignore[no-untyped-def]
    accepted_ptr,
    next_ptr,
    overlap_ptr,
    tokens_ptr,
    tokens_stride,
    count_ptr,
    length_ptr,
    after_ptr,
    after_stride,
    packed_ptr,
    new_length_ptr,
    proposed_ptr,
    rows_ptr,
    R,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One request."""
    b = tl.program_id(0)
    place = tl.arange(0, ROWS)
    accepted, count = tl.load(accepted_ptr + b), tl.load(count_ptr + b)
    draft = tl.load(tokens_ptr + b * tokens_stride + place, mask=place < N - 1, other=0)
    corrected = (place == accepted) | (place == N - 1)
    packed_row_ptr = packed_ptr + b * (2 * N + 1)
    token = tl.where(corrected, tl.load(next_ptr + b), draft)
    tl.store(packed_row_ptr + place, token, mask=place < N)
    tl.store(packed_row_ptr + N, accepted)
    tl.store(packed_row_ptr + N + 1, count)
    overlap = tl.load(overlap_ptr + b * (N - 1) + place, mask=place < N - 1, other=0.0)
    bits = overlap.to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(packed_row_ptr + N + 2 + place, bits, mask=place < N - 1)
    tl.store(new_length_ptr + b, tl.load(length_ptr + b) + 1 + accepted)
    block = tl.load(after_ptr + count * after_stride + accepted)
    tl.store(proposed_ptr + b, tl.where(block >= 0, M, 0).to(tl.int64))
    first = b * R + N + tl.maximum(block, 0) * M
    tl.store(rows_ptr + b * M + place, first + place, mask=place < M)
