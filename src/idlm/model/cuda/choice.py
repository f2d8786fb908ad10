"""Triton kernels that choose the likeliest tokens.

A row of logits is cut into chunks that are looked through side by side: one block of threads alone
would need longer for a vocabulary than a small model's layer does for its rows.
"""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

from idlm.model.cuda.noise import exponential, key_of
from idlm.model.cuda.noise import uniform as open_uniform
from idlm.model.cuda.overlap import overlap, wait

# Tokens of a program that looks for the likeliest. Of one that takes the best of each group: tokens
# of a group that are under way at once, and warps.
CHUNK = 2048
DEPTH, WARPS = 12, 16


def argmax(logits_BRV: torch.Tensor) -> torch.Tensor:
    """Index ``[B, R]``, int64, of the largest logit of each row, the first of equals.

    Args:
        logits_BRV: floating; the rows are dense, but may lie anywhere.
    """
    return _of_chunks(*best_of_chunks(logits_BRV), logits_BRV)


def sample(
    probs_BRX: torch.Tensor,
    seed_B: torch.Tensor,
    position_BR: torch.Tensor,
    stream: int,
    ids_BRX: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decoding.sampling.sample`: index ``[B, R]``, int64, of a sample from ``probs[b, r]``.

    Args:
        probs_BRX: fp32; the rows are dense, but may lie anywhere.
        seed_B, position_BR: int64, dense.
        ids_BRX: the tokens, int64, laid out as ``probs``; None: the whole vocabulary.
    """
    B, R, X = probs_BRX.shape
    chunks = triton.cdiv(X, CHUNK)
    values_XC, indices_XC = _best_places(B * R, chunks, probs_BRX.device)
    _sample_chunk[(B * R, chunks)](
        probs_BRX,
        *probs_BRX.stride()[:2],
        seed_B,
        position_BR,
        seed_B if ids_BRX is None else ids_BRX,
        *((0, 0) if ids_BRX is None else ids_BRX.stride()[:2]),
        values_XC,
        indices_XC,
        R,
        STREAM=stream,
        IDS=ids_BRX is not None,
        X=X,
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(),
    )
    return _of_chunks(values_XC, indices_XC, probs_BRX)


def uniform(seed_B: torch.Tensor, position_BR: torch.Tensor, stream: int) -> torch.Tensor:
    """`decoding.random.uniform`, ``[B, R]`` fp64, of dense int64 seeds and positions."""
    u_BR = torch.empty(position_BR.shape, dtype=torch.float64, device=seed_B.device)
    R = position_BR.shape[1]
    if R:
        _uniform[(position_BR.numel(),)](
            seed_B, position_BR, u_BR, R, STREAM=stream, num_warps=1, **overlap()
        )
    return u_BR


def best_of_groups(
    logits_BRV: torch.Tensor, k: int, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[B, R, k]``, int64: the likeliest token of each of ``k`` groups (at most ``V``).

    Group ``g`` has the tokens ``g``, ``g + k``, ``g + 2 k`` and so on. Those whose logits lie no
    more than ``margin`` below the highest come first; how many they are is the second result,
    ``[B, R]``, int32.
    """
    B, R, V = logits_BRV.shape
    ids_BRK = torch.empty((B, R, k), dtype=torch.int64, device=logits_BRV.device)
    near_BR = torch.empty((B, R), dtype=torch.int32, device=logits_BRV.device)
    _best_of_groups[(B * R,)](
        logits_BRV,
        ids_BRK,
        near_BR,
        *logits_BRV.stride()[:2],
        R,
        margin,
        V=V,
        K=k,
        GROUPS=triton.next_power_of_2(k),
        DEPTH=DEPTH,
        num_warps=WARPS,
        **overlap(),
    )
    return ids_BRK, near_BR


def _of_chunks(
    values_XC: torch.Tensor, indices_XC: torch.Tensor, rows_BRX: torch.Tensor
) -> torch.Tensor:
    """Index ``[B, R]``, int64, of the best of each row, given the best of its chunks."""
    (B, R, X), chunks = rows_BRX.shape, values_XC.shape[1]
    index_BR = torch.empty((B, R), dtype=torch.int64, device=rows_BRX.device)
    _best[(B * R,)](
        values_XC,
        indices_XC,
        index_BR,
        chunks,
        V=X,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=1,
        **overlap(),
    )
    return index_BR


def best_of_chunks(logits_BRV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit (fp32) and its index (int32) of each chunk of each row, ``[B * R, C]``."""
    B, R, V = logits_BRV.shape
    chunks = triton.cdiv(V, CHUNK)
    values_XC, indices_XC = _best_places(B * R, chunks, logits_BRV.device)
    _best_of_chunk[(B * R, chunks)](
        logits_BRV,
        values_XC,
        indices_XC,
        *logits_BRV.stride()[:2],
        R,
        V=V,
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(),
    )
    return values_XC, indices_XC


def _best_places(rows: int, chunks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the best value (fp32) of each chunk of each row, and its index (int32)."""
    values_XC = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    return values_XC, torch.empty((rows, chunks), dtype=torch.int32, device=device)


@triton.jit
def first_best(value, index, last, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest value along ``axis`` and the first index that has it.

    Of NaNs alone it is ``last``: whatever happens, the index can be used.
    """
    best = tl.max(value, axis)
    same = value == tl.expand_dims(best, axis)
    return best, tl.minimum(tl.min(tl.where(same, index, last), axis), last)


@triton.jit(do_not_specialize=["R"])
def _best_of_chunk(  # type: ignore[no-untyped-def]
    logits_ptr,
    values_ptr,
    indices_ptr,
    stride_b,
    stride_r,
    R,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of one row."""
    wait(OVERLAP)
    row, chunk = tl.program_id(0), tl.program_id(1)
    row_ptr = logits_ptr + (row // R).to(tl.int64) * stride_b + (row % R) * stride_r
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    best, index = first_best(value, token, V - 1, 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(values_ptr + place, best)
    tl.store(indices_ptr + place, index)


@triton.jit(do_not_specialize=["R"])
def _sample_chunk(  # type: ignore[no-untyped-def]
    probs_ptr,
    stride_b,
    stride_r,
    seed_ptr,
    position_ptr,
    ids_ptr,
    ids_stride_b,
    ids_stride_r,
    values_ptr,
    indices_ptr,
    R,
    STREAM: tl.constexpr,
    IDS: tl.constexpr,
    X: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of one row: its largest ratio of probability and noise."""
    wait(OVERLAP)
    row, chunk = tl.program_id(0), tl.program_id(1)
    b, r = row // R, row % R
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ptr = probs_ptr + b.to(tl.int64) * stride_b + r * stride_r
    p = tl.load(row_ptr + index, mask=index < X, other=0.0)
    token = index
    if IDS:
        token = tl.load(
            ids_ptr + b * ids_stride_b + r * ids_stride_r + index, mask=index < X, other=0
        )
    key = key_of(tl.load(seed_ptr + b), tl.load(position_ptr + row), STREAM)
    best, first = first_best(p / exponential(key, token), index, X - 1, 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(values_ptr + place, best)
    tl.store(indices_ptr + place, first)


@triton.jit(do_not_specialize=["R"])
def _uniform(  # type: ignore[no-untyped-def]
    seed_ptr, position_ptr, u_ptr, R, STREAM: tl.constexpr, OVERLAP: tl.constexpr
):
    """One number."""
    wait(OVERLAP)
    row = tl.program_id(0)
    key = key_of(tl.load(seed_ptr + row // R), tl.load(position_ptr + row), STREAM)
    tl.store(u_ptr + row, open_uniform(key))


@triton.jit
def best_of_row(  # type: ignore[no-untyped-def]
    values_ptr, indices_ptr, row, chunks, V: tl.constexpr, CHUNKS: tl.constexpr
):
    """Index of the best of a row, given the best of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    place = row * chunks + chunk
    value = tl.load(values_ptr + place, mask=chunk < chunks, other=float("-inf"))
    index = tl.load(indices_ptr + place, mask=chunk < chunks, other=V - 1)
    _, first = first_best(value, index, V - 1, 0)
    return first.to(tl.int64)


@triton.jit(do_not_specialize=["chunks"])
def _best(  # type: ignore[no-untyped-def]
    values_ptr,
    indices_ptr,
    index_ptr,
    chunks,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row, from the best of its chunks."""
    wait(OVERLAP)
    row = tl.program_id(0)
    tl.store(index_ptr + row, best_of_row(values_ptr, indices_ptr, row, chunks, V, CHUNKS))


@triton.jit(do_not_specialize=["R"])
def _best_of_groups(  # type: ignore[no-untyped-def]
    logits_ptr,
    ids_ptr,
    near_ptr,
    stride_b,
    stride_r,
    R,
    margin,
    V: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All groups of one row, those with a likely token first."""
    wait(OVERLAP)
    row = tl.program_id(0)
    row_ptr = logits_ptr + (row // R).to(tl.int64) * stride_b + (row % R) * stride_r
    group = tl.arange(0, GROUPS)
    real = group < K
    top = tl.full([GROUPS], float("-inf"), tl.float32)
    best_token = group
    for first in tl.range(0, V, DEPTH * K):
        for depth in tl.static_range(DEPTH):
            token = first + depth * K + group
            value = tl.load(row_ptr + token, mask=real & (token < V), other=float("-inf"))
            better = value.to(tl.float32) > top
            best_token = tl.where(better, token, best_token)
            top = tl.where(better, value.to(tl.float32), top)
    near = real & (top >= tl.max(top, 0) - margin)
    ahead = tl.cumsum(near.to(tl.int32), 0)
    count = tl.sum(near.to(tl.int32), 0)
    place = tl.where(near, ahead - 1, count + group - ahead)
    tl.store(ids_ptr + row.to(tl.int64) * K + place, best_token.to(tl.int64), mask=real)
    tl.store(near_ptr + row, count)
