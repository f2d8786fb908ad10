"""Triton kernels of verification: which drafts stand, the token after them, and what follows."""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

from idlm.model.cuda.choice import CHUNK, best_of_chunks, first_best
from idlm.model.cuda.draw import Draw
from idlm.model.cuda.noise import exponential, key_of, uniform
from idlm.model.cuda.overlap import overlap, wait


def greedy_verdict(
    logits_BNV: torch.Tensor, tokens_BM: torch.Tensor, count_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decoding.verify.Verdict` of greedy requests: ``accepted_B``, ``next_B``, ``overlap_BM``.

    Args:
        logits_BNV: as in `choice.argmax`; row ``i`` predicts ``d_{i+1}``.
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
        **overlap(),
    )
    return accepted_B, next_B, overlap_BM


def sampled_verdict(
    logits_BNV: torch.Tensor,
    tokens_BM: torch.Tensor,
    ids_BMK: torch.Tensor,
    probs_BMK: torch.Tensor,
    count_B: torch.Tensor,
    draw: Draw,
    accept_stream: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`greedy_verdict` of requests that want no more than a temperature.

    Args:
        ids_BMK, probs_BMK: `decoding.verify.Drafts`; what belongs to a request is dense.
        draw: of tokens; its position is that of the first draft.
        accept_stream: where the rejection rule's numbers come from; None: the coupled rule.
    """
    (B, N, V), K = logits_BNV.shape, ids_BMK.shape[2]
    device, strides = logits_BNV.device, logits_BNV.stride()[:2]
    # Without drafts both rules take a sample of the model's own row, the same.
    coupled = accept_stream is None or N == 1
    chunks = triton.cdiv(V, CHUNK)
    slots, rows = triton.next_power_of_2(chunks), triton.next_power_of_2(N)
    greedy_B = draw.greedy_B.view(torch.uint8)
    best_XC, sum_XC, ratio_XC = torch.empty((3, B * N, chunks), dtype=torch.float32, device=device)
    index_XC, drawn_XC = torch.empty((2, B * N, chunks), dtype=torch.int32, device=device)
    _weigh[(B * N, chunks)](
        logits_BNV,
        *strides,
        best_XC,
        index_XC,
        sum_XC,
        ratio_XC,
        drawn_XC,
        draw.seed_B,
        draw.position_B,
        draw.temperature_B,
        N,
        STREAM=draw.stream if coupled else 0,
        V=V,
        CHUNK=CHUNK,
        num_warps=4,
        **overlap(),
    )
    top_BN, total_BN = torch.empty((2, B, N), dtype=torch.float32, device=device)
    target_BN = torch.empty((B, N), dtype=torch.int32, device=device)
    stands_BM = torch.empty((B, N - 1), dtype=torch.int32, device=device)
    overlap_BM = torch.empty((B, N - 1), dtype=torch.float32, device=device)
    _judge[(B, N)](
        logits_BNV,
        *strides,
        best_XC,
        index_XC,
        sum_XC,
        ratio_XC,
        drawn_XC,
        tokens_BM,
        tokens_BM.stride(0),
        ids_BMK,
        ids_BMK.stride(0),
        probs_BMK,
        probs_BMK.stride(0),
        draw.seed_B,
        draw.position_B,
        draw.temperature_B,
        greedy_B,
        top_BN,
        total_BN,
        target_BN,
        stands_BM,
        overlap_BM,
        chunks,
        ACCEPT=0 if coupled else accept_stream,
        N=N,
        V=V,
        K=K,
        CHUNKS=slots,
        CANDIDATES=triton.next_power_of_2(K),
        num_warps=4,
        **overlap(),
    )
    accepted_B, next_B = torch.empty((2, B), dtype=torch.int64, device=device)
    if coupled:
        _follow[(B,)](
            target_BN,
            stands_BM,
            count_B,
            accepted_B,
            next_B,
            N=N,
            ROWS=rows,
            num_warps=1,
            **overlap(),
        )
        return accepted_B, next_B, overlap_BM
    values_2BC = torch.empty((2, B, chunks), dtype=torch.float32, device=device)
    tokens_2BC = torch.empty((2, B, chunks), dtype=torch.int32, device=device)
    rest_BV = torch.empty((B, V), dtype=torch.float32, device=device)
    _redraw[(B, chunks)](
        logits_BNV,
        *strides,
        top_BN,
        total_BN,
        target_BN,
        stands_BM,
        ids_BMK,
        ids_BMK.stride(0),
        probs_BMK,
        probs_BMK.stride(0),
        count_B,
        draw.seed_B,
        draw.position_B,
        draw.temperature_B,
        greedy_B,
        rest_BV,
        values_2BC,
        tokens_2BC,
        STREAM=draw.stream,
        N=N,
        V=V,
        K=K,
        ROWS=rows,
        CHUNK=CHUNK,
        CANDIDATES=triton.next_power_of_2(K),
        num_warps=4,
        **overlap(),
    )
    _take[(B,)](
        values_2BC,
        tokens_2BC,
        stands_BM,
        count_B,
        accepted_B,
        next_B,
        chunks,
        N=N,
        V=V,
        ROWS=rows,
        CHUNKS=slots,
        num_warps=1,
        **overlap(),
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
        **overlap(),
    )
    return packed_BX, new_length_B, proposed_B, rows_BM


@triton.jit
def _leading(stands, row, count, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of leading places, of the first ``count``, that stand, int32."""
    # The row behind the last draft has none to stand: it ends the run at the latest.
    return tl.min(tl.where(stands & (row < N - 1) & (row < count), N - 1, row), 0)


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
    OVERLAP: tl.constexpr,
):
    """One request, from the best of its rows' chunks."""
    wait(OVERLAP)
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
    accepted = _leading(match, row, tl.load(count_ptr + b), N)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    tl.store(next_ptr + b, tl.sum(tl.where(row == accepted, target, 0), 0).to(tl.int64))


@triton.jit
def _probability(logit, temperature, top, total):  # type: ignore[no-untyped-def]
    """Of tokens with these logits, in a row with this highest logit and sum of weights."""
    return tl.exp(logit / temperature - top) / total


@triton.jit(do_not_specialize=["N"])
def _weigh(  # type: ignore[no-untyped-def]
    logits_ptr,
    stride_b,
    stride_n,
    best_ptr,
    index_ptr,
    sum_ptr,
    ratio_ptr,
    drawn_ptr,
    seed_ptr,
    position_ptr,
    temperature_ptr,
    N,
    STREAM: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of one row: its likeliest token, its share of the softmax, and a draw from it."""
    wait(OVERLAP)
    row, chunk = tl.program_id(0), tl.program_id(1)
    b, n = row // N, row % N
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    row_ptr = logits_ptr + b.to(tl.int64) * stride_b + n * stride_n
    logit = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + b)
    best, index = first_best(logit, token, V - 1, 0)
    top = best / temperature
    weight = tl.exp(logit / temperature - tl.where(top == float("-inf"), 0.0, top))
    place = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + place, best)
    tl.store(index_ptr + place, index)
    tl.store(sum_ptr + place, tl.sum(weight, 0))
    if STREAM:
        key = key_of(tl.load(seed_ptr + b), tl.load(position_ptr + b) + n, STREAM)
        ratio, drawn = first_best(weight / exponential(key, token), token, V - 1, 0)
        tl.store(ratio_ptr + place, ratio)
        tl.store(drawn_ptr + place, drawn)


@triton.jit(do_not_specialize=["tokens_stride", "ids_stride", "probs_stride", "chunks"])
def _judge(  # type: ignore[no-untyped-def]
    logits_ptr,
    stride_b,
    stride_n,
    best_ptr,
    index_ptr,
    sum_ptr,
    ratio_ptr,
    drawn_ptr,
    tokens_ptr,
    tokens_stride,
    ids_ptr,
    ids_stride,
    probs_ptr,
    probs_stride,
    seed_ptr,
    position_ptr,
    temperature_ptr,
    greedy_ptr,
    top_ptr,
    total_ptr,
    target_ptr,
    stands_ptr,
    overlap_ptr,
    chunks,
    ACCEPT: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row, from its chunks; and whether the draft that it predicts stands.

    Without ``ACCEPT`` a draft stands if it is the row's draw, which is the target then; otherwise
    the target is the likeliest token.
    """
    wait(OVERLAP)
    b, n = tl.program_id(0), tl.program_id(1)
    row = b * N + n
    chunk = tl.arange(0, CHUNKS)
    place = row * chunks + chunk
    value = tl.load(best_ptr + place, mask=chunk < chunks, other=float("-inf"))
    index = tl.load(index_ptr + place, mask=chunk < chunks, other=V - 1)
    best, likeliest = first_best(value, index, V - 1, 0)
    temperature = tl.load(temperature_ptr + b)
    greedy = tl.load(greedy_ptr + b) != 0
    top = best / temperature
    # What a chunk's weights are worth beside the highest of all.
    fade = tl.exp(value / temperature - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(tl.load(sum_ptr + place, mask=chunk < chunks, other=0.0) * fade, 0)
    target = likeliest
    if not ACCEPT:
        ratio = tl.load(ratio_ptr + place, mask=chunk < chunks, other=0.0) * fade
        drawn = tl.load(drawn_ptr + place, mask=chunk < chunks, other=V - 1)
        _, choice = first_best(ratio, drawn, V - 1, 0)
        target = tl.where(greedy, likeliest, choice)
    tl.store(top_ptr + row, top)
    tl.store(total_ptr + row, total)
    tl.store(target_ptr + row, target)
    if n < N - 1:
        row_ptr = logits_ptr + b.to(tl.int64) * stride_b + n * stride_n
        draft = tl.load(tokens_ptr + b * tokens_stride + n)
        candidate = tl.arange(0, CANDIDATES)
        real = candidate < K
        ids = tl.load(ids_ptr + b * ids_stride + n * K + candidate, mask=real, other=0)
        q = tl.load(probs_ptr + b * probs_stride + n * K + candidate, mask=real, other=0.0)
        # What was no candidate has q = 0.
        logit = tl.load(row_ptr + ids, mask=q > 0.0, other=float("-inf")).to(tl.float32)
        p = _probability(logit, temperature, top, total)
        p = tl.where(greedy, (ids == likeliest).to(tl.float32), p)
        tl.store(overlap_ptr + b * (N - 1) + n, tl.sum(tl.minimum(p, q), 0))
        if ACCEPT:
            q_draft = tl.sum(tl.where(ids == draft, q, 0.0), 0)
            own = tl.load(row_ptr + draft).to(tl.float32)
            p_draft = _probability(own, temperature, top, total)
            p_draft = tl.where(greedy, (draft == likeliest).to(tl.float32), p_draft)
            key = key_of(tl.load(seed_ptr + b), tl.load(position_ptr + b) + n, ACCEPT)
            stands = uniform(key) * q_draft < p_draft
        else:
            stands = draft == target
        tl.store(stands_ptr + b * (N - 1) + n, stands.to(tl.int32))


@triton.jit
def _accepted(stands_ptr, count_ptr, b, N: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Drafts of request ``b`` that stand."""
    row = tl.arange(0, ROWS)
    stands = tl.load(stands_ptr + b * (N - 1) + row, mask=row < N - 1, other=0) != 0
    return _leading(stands, row, tl.load(count_ptr + b), N)


@triton.jit
def _follow(  # type: ignore[no-untyped-def]
    target_ptr,
    stands_ptr,
    count_ptr,
    accepted_ptr,
    next_ptr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Coupled rule, one request: the target behind the drafts that stand comes next."""
    wait(OVERLAP)
    b = tl.program_id(0)
    accepted = _accepted(stands_ptr, count_ptr, b, N, ROWS)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    tl.store(next_ptr + b, tl.load(target_ptr + b * N + accepted).to(tl.int64))


@triton.jit(do_not_specialize=["ids_stride", "probs_stride"])
def _redraw(  # type: ignore[no-untyped-def]
    logits_ptr,
    stride_b,
    stride_n,
    top_ptr,
    total_ptr,
    likeliest_ptr,
    stands_ptr,
    ids_ptr,
    ids_stride,
    probs_ptr,
    probs_stride,
    count_ptr,
    seed_ptr,
    position_ptr,
    temperature_ptr,
    greedy_ptr,
    rest_ptr,
    values_ptr,
    chosen_ptr,
    STREAM: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rejection rule, one chunk of the row behind the drafts that stand: draws from it.

    One is from ``p``, one from what is left of ``p`` without ``q`` if a draft was rejected.
    """
    wait(OVERLAP)
    b, chunk = tl.program_id(0), tl.program_id(1)
    count = tl.load(count_ptr + b)
    accepted = _accepted(stands_ptr, count_ptr, b, N, ROWS)
    row = b * N + accepted
    top, total = tl.load(top_ptr + row), tl.load(total_ptr + row)
    likeliest = tl.load(likeliest_ptr + row)
    temperature = tl.load(temperature_ptr + b)
    greedy = tl.load(greedy_ptr + b) != 0
    row_ptr = logits_ptr + b.to(tl.int64) * stride_b + accepted * stride_n
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logit = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    p = _probability(logit, temperature, top, total)
    p = tl.where(greedy, (token == likeliest).to(tl.float32), p)
    rest = p
    if accepted < count:
        # Through memory, since candidates lie anywhere in the chunk.
        rest_row_ptr = rest_ptr + b.to(tl.int64) * V
        tl.store(rest_row_ptr + token, p, mask=token < V)
        tl.debug_barrier()
        candidate = tl.arange(0, CANDIDATES)
        real = candidate < K
        ids = tl.load(ids_ptr + b * ids_stride + accepted * K + candidate, mask=real, other=0)
        q = tl.load(probs_ptr + b * probs_stride + accepted * K + candidate, mask=real, other=0.0)
        ours = (q > 0.0) & (ids // CHUNK == chunk)
        some = tl.load(row_ptr + ids, mask=ours, other=float("-inf")).to(tl.float32)
        p_ids = _probability(some, temperature, top, total)
        p_ids = tl.where(greedy, (ids == likeliest).to(tl.float32), p_ids)
        tl.store(rest_row_ptr + ids, tl.maximum(p_ids - q, 0.0), mask=ours)
        tl.debug_barrier()
        rest = tl.load(rest_row_ptr + token, mask=token < V, other=0.0)
    key = key_of(tl.load(seed_ptr + b), tl.load(position_ptr + b) + accepted, STREAM)
    noise = exponential(key, token)
    place = b * tl.num_programs(1) + chunk
    parts = tl.num_programs(0) * tl.num_programs(1)
    value, chosen = first_best(rest / noise, token, V - 1, 0)
    tl.store(values_ptr + place, value)
    tl.store(chosen_ptr + place, chosen)
    value, chosen = first_best(p / noise, token, V - 1, 0)
    tl.store(values_ptr + parts + place, value)
    tl.store(chosen_ptr + parts + place, chosen)


@triton.jit(do_not_specialize=["chunks"])
def _take(  # type: ignore[no-untyped-def]
    values_ptr,
    chosen_ptr,
    stands_ptr,
    count_ptr,
    accepted_ptr,
    next_ptr,
    chunks,
    N: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Rejection rule, one request: the best draw of all chunks comes next."""
    wait(OVERLAP)
    b = tl.program_id(0)
    accepted = _accepted(stands_ptr, count_ptr, b, N, ROWS)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    chunk = tl.arange(0, CHUNKS)
    place = b * chunks + chunk
    there = chunk < chunks
    parts = tl.num_programs(0) * chunks
    value = tl.load(values_ptr + place, mask=there, other=0.0)
    left, token = first_best(value, tl.load(chosen_ptr + place, mask=there, other=V - 1), V - 1, 0)
    value = tl.load(values_ptr + parts + place, mask=there, other=0.0)
    _, own = first_best(
        value, tl.load(chosen_ptr + parts + place, mask=there, other=V - 1), V - 1, 0
    )
    # p = q up to rounding: nothing is left over, and a rejection had no chance to begin with.
    tl.store(next_ptr + b, tl.where(left > 0.0, token, own).to(tl.int64))


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
    OVERLAP: tl.constexpr,
):
    """One request."""
    wait(OVERLAP)
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
