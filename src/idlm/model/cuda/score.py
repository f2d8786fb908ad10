"""Triton kernels that score a few tokens of the vocabulary for each row, and draft one of them."""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

from idlm.model.cuda.choice import best_of_chunks, best_of_row, first_best
from idlm.model.cuda.draw import Draw
from idlm.model.cuda.noise import exponential, key_of
from idlm.model.cuda.overlap import overlap, wait
from idlm.model.cuda.stream import Stream

# Of a program, whose tokens are read at once; and programs of a launch, about.
TOKENS, INPUTS = 8, 1024
PROGRAMS = 4096
SOME = 256  # candidates whose noise is made at once


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
        INPUTS=min(INPUTS, triton.next_power_of_2(H)),
    )
    return scores_BK


def draft(
    hidden_BMH: torch.Tensor,
    state_BH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_BMK: torch.Tensor,
    near_BM: torch.Tensor,
    embedding_VH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    finished_MB: torch.Tensor,
    place: int,
    tokens_BM: torch.Tensor,
    probs_BMK: torch.Tensor | None = None,
    draw: Draw | None = None,
) -> torch.Tensor:
    """Write the draft of one place: the likeliest of its candidates, or a draw from them.

    The logits are those of ``hidden + state``.

    Args:
        hidden_BMH, ids_BMK: of all places; ids are int64; the places are dense.
        near_BM: how many of the ids, from the first, are candidates; at least 1, int32, dense.
        state_BH, weight_VH, embedding_VH: dense, of the dtype of ``hidden``.
        norm_H, eps: RMS norm of the embedding.
        finished_MB: int32; those of this place are 0 and are used up.
        tokens_BM: int64, dense; gets the draft.
        probs_BMK: fp32, dense; gets the distribution over the ids, if there is a ``draw``.
        draw: its position is that before the first place. None: all are greedy.
    Returns:
        ``[B, H]``: the embeddings of the drafts, behind the norm.
    """
    B, M, K = ids_BMK.shape
    H = hidden_BMH.shape[2]
    scores_BK = torch.empty((B, K), dtype=torch.float32, device=hidden_BMH.device)
    embedded_BH = torch.empty_like(state_BH)
    # What nobody reads where all are greedy.
    seed_B = position_B = temperature_B = greedy_B = scores_BK
    if draw is not None:
        seed_B, position_B = draw.seed_B, draw.position_B
        temperature_B, greedy_B = draw.temperature_B, draw.greedy_B.view(torch.uint8)
    parts = min(triton.cdiv(K, TOKENS), triton.cdiv(PROGRAMS, B))
    _draft[(B, parts)](
        hidden_BMH,
        hidden_BMH.stride(0),
        state_BH,
        weight_VH,
        ids_BMK,
        ids_BMK.stride(0),
        near_BM,
        scores_BK,
        finished_MB,
        embedding_VH,
        norm_H,
        eps,
        embedded_BH,
        tokens_BM,
        scores_BK if probs_BMK is None else probs_BMK,
        seed_B,
        position_B,
        temperature_B,
        greedy_B,
        place,
        STREAM=0 if draw is None else draw.stream,
        M=M,
        K=K,
        H=H,
        CANDIDATES=triton.next_power_of_2(K),
        WIDTH=triton.next_power_of_2(H),
        TOKENS=TOKENS,
        INPUTS=min(INPUTS, triton.next_power_of_2(H)),
        SOME=min(SOME, triton.next_power_of_2(K)),
        **overlap(),
    )
    return embedded_BH


def draft_likeliest(
    logits_BV: torch.Tensor,
    embedding_VH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    tokens_B: torch.Tensor,
) -> torch.Tensor:
    """Write the draft of one place: the likeliest of all tokens, the first of equals.

    Args:
        logits_BV: dense.
        embedding_VH, norm_H, eps: as in `draft`.
        tokens_B: int64, gets the drafts; they may lie apart.
    Returns:
        ``[B, H]``: the embeddings of the drafts, behind the norm.
    """
    B, V = logits_BV.shape
    H = embedding_VH.shape[1]
    values_BC, indices_BC = best_of_chunks(logits_BV[:, None])
    embedded_BH = embedding_VH.new_empty(B, H)
    chunks = values_BC.shape[1]
    _draft_likeliest[(B,)](
        values_BC,
        indices_BC,
        chunks,
        embedding_VH,
        norm_H,
        eps,
        embedded_BH,
        tokens_B,
        tokens_B.stride(0),
        V=V,
        H=H,
        CHUNKS=triton.next_power_of_2(chunks),
        WIDTH=triton.next_power_of_2(H),
        **overlap(),
    )
    return embedded_BH


def begin_chain(
    first_B: torch.Tensor, embedding_VH: torch.Tensor, norm_H: torch.Tensor, eps: float, places: int
) -> tuple[torch.Tensor, Stream, torch.Tensor]:
    """What the first place of a chain begins with.

    Args:
        first_B: the token before it, int64.
        embedding_VH, norm_H, eps: as in `draft`.
    Returns:
        The embedding of ``first`` behind the norm, ``[B, H]``; a state of zeros, on its way into
        whatever norm has this ``eps``; and ``finished_MB`` for all places.
    """
    B, H = len(first_B), embedding_VH.shape[1]
    token_BH, state_BH, scaled_BH = embedding_VH.new_empty(3, B, H)
    squares_B1 = torch.empty((B, 1), dtype=torch.float32, device=first_B.device)
    finished_MB = torch.empty((places, B), dtype=torch.int32, device=first_B.device)
    _begin_chain[(B,)](
        first_B,
        embedding_VH,
        norm_H,
        eps,
        token_BH,
        state_BH,
        scaled_BH,
        squares_B1,
        finished_MB,
        M=places,
        H=H,
        WIDTH=triton.next_power_of_2(H),
        PLACES=triton.next_power_of_2(places),
        **overlap(),
    )
    return token_BH, Stream(state_BH, scaled_BH, squares_B1, eps), finished_MB


@triton.jit
def _copy_normed(  # type: ignore[no-untyped-def]
    row_ptr, norm_ptr, eps, out_ptr, H: tl.constexpr, WIDTH: tl.constexpr
):
    """One row behind its norm."""
    lane = tl.arange(0, WIDTH)
    row = tl.load(row_ptr + lane, mask=lane < H, other=0.0).to(tl.float32)
    scale = tl.load(norm_ptr + lane, mask=lane < H, other=0.0).to(tl.float32)
    row = row * scale * (1.0 / tl.sqrt(tl.sum(row * row, 0) / H + eps))
    tl.store(out_ptr + lane, row.to(out_ptr.dtype.element_ty), mask=lane < H)


@triton.jit(do_not_specialize=["chunks", "tokens_stride"])
def _draft_likeliest(  # type: ignore[no-untyped-def]
    values_ptr,
    indices_ptr,
    chunks,
    embedding_ptr,
    norm_ptr,
    eps,
    embedded_ptr,
    tokens_ptr,
    tokens_stride,
    V: tl.constexpr,
    H: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The draft of one request, from the best of its chunks."""
    wait(OVERLAP)
    b = tl.program_id(0)
    token = best_of_row(values_ptr, indices_ptr, b, chunks, V, CHUNKS)
    tl.store(tokens_ptr + b * tokens_stride, token)
    row_ptr = embedding_ptr + token * H
    _copy_normed(row_ptr, norm_ptr, eps, embedded_ptr + b * H, H, WIDTH)


@triton.jit
def _begin_chain(  # type: ignore[no-untyped-def]
    first_ptr,
    embedding_ptr,
    norm_ptr,
    eps,
    token_ptr,
    state_ptr,
    scaled_ptr,
    squares_ptr,
    finished_ptr,
    M: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One request."""
    wait(OVERLAP)
    b = tl.program_id(0)
    first = tl.load(first_ptr + b)
    _copy_normed(embedding_ptr + first * H, norm_ptr, eps, token_ptr + b * H, H, WIDTH)
    lane, place = tl.arange(0, WIDTH), tl.arange(0, PLACES)
    nothing = tl.zeros([WIDTH], token_ptr.dtype.element_ty)
    tl.store(state_ptr + b * H + lane, nothing, mask=lane < H)
    tl.store(scaled_ptr + b * H + lane, nothing, mask=lane < H)
    tl.store(squares_ptr + b, 0.0)
    unfinished = tl.zeros([PLACES], tl.int32)
    tl.store(finished_ptr + place * tl.num_programs(0) + b, unfinished, mask=place < M)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    hidden_ptr,
    state_ptr,
    weight_ptr,
    ids,
    real,
    H: tl.constexpr,
    STATE: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Logits of ``ids`` for one row; of those that are not ``real`` nothing is read."""
    total = tl.zeros([TOKENS, INPUTS], tl.float32)
    for first in tl.range(0, H, INPUTS):
        inputs = first + tl.arange(0, INPUTS)
        weight = tl.load(
            weight_ptr + ids[:, None] * H + inputs[None, :],
            mask=real[:, None] & (inputs < H)[None, :],
            other=0.0,
        )
        hidden = tl.load(hidden_ptr + inputs, mask=inputs < H, other=0.0).to(tl.float32)
        if STATE:
            state = tl.load(state_ptr + inputs, mask=inputs < H, other=0.0).to(tl.float32)
            hidden = (hidden + state).to(hidden_ptr.dtype.element_ty).to(tl.float32)
        total += weight.to(tl.float32) * hidden[None, :]
    return tl.sum(total, 1)


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
    score = _scores(
        hidden_ptr + b * H, hidden_ptr, weight_ptr, ids, k < K, H, False, TOKENS, INPUTS
    )
    tl.store(scores_ptr + b * K + k, score, mask=k < K)


@triton.jit(do_not_specialize=["place"])
def _draft(  # type: ignore[no-untyped-def]
    hidden_ptr,
    hidden_stride,
    state_ptr,
    weight_ptr,
    ids_ptr,
    ids_stride,
    near_ptr,
    scores_ptr,
    finished_ptr,
    embedding_ptr,
    norm_ptr,
    eps,
    embedded_ptr,
    tokens_ptr,
    probs_ptr,
    seed_ptr,
    position_ptr,
    temperature_ptr,
    greedy_ptr,
    place,
    STREAM: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    CANDIDATES: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    SOME: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Scores of some candidates of one request; the last of its programs chooses."""
    wait(OVERLAP)
    b, parts = tl.program_id(0), tl.num_programs(1)
    start = tl.program_id(1) * TOKENS
    near = tl.load(near_ptr + b * M + place)
    ids_row_ptr = ids_ptr + b * ids_stride + place * K
    if start < near:
        while start < near:
            k = start + tl.arange(0, TOKENS)
            score = _scores(
                hidden_ptr + b * hidden_stride + place * H,
                state_ptr + b * H,
                weight_ptr,
                tl.load(ids_row_ptr + k, mask=k < K, other=0),
                k < near,
                H,
                True,
                TOKENS,
                INPUTS,
            )
            tl.store(scores_ptr + b * K + k, score, mask=k < near)
            start += parts * TOKENS
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        ahead = tl.atomic_add(finished_ptr + place * tl.num_programs(0) + b, 1, sem="acq_rel")
        if ahead == tl.minimum(parts, tl.cdiv(near, TOKENS)) - 1:
            candidate = tl.arange(0, CANDIDATES)
            logit = tl.load(
                scores_ptr + b * K + candidate, mask=candidate < near, other=float("-inf")
            )
            best, chosen = first_best(logit, candidate, near - 1, 0)
            if STREAM:
                temperature = tl.load(temperature_ptr + b)
                greedy = tl.load(greedy_ptr + b) != 0
                key = key_of(tl.load(seed_ptr + b), tl.load(position_ptr + b) + 1 + place, STREAM)
                probs_row_ptr = probs_ptr + (b * M + place) * K
                nothing = tl.zeros([CANDIDATES], tl.float32)
                far = (candidate >= near) & (candidate < K)
                tl.store(probs_row_ptr + candidate, nothing, mask=far)
                total = tl.sum(tl.exp(logit / temperature - best / temperature), 0)
                likeliest, top = chosen, tl.full([], float("-inf"), tl.float32)
                start = 0
                while start < near:
                    some = start + tl.arange(0, SOME)
                    own = tl.load(scores_ptr + b * K + some, mask=some < near, other=float("-inf"))
                    q = tl.exp(own / temperature - best / temperature) / total
                    q = tl.where(greedy, (some == likeliest).to(tl.float32), q)
                    tl.store(probs_row_ptr + some, q, mask=some < near)
                    drawn = tl.load(ids_row_ptr + some, mask=some < near, other=0)
                    ratio, index = first_best(q / exponential(key, drawn), some, near - 1, 0)
                    chosen = tl.where(ratio > top, index, chosen)
                    top = tl.maximum(top, ratio)
                    start += SOME
            token = tl.load(ids_row_ptr + chosen)
            tl.store(tokens_ptr + b * M + place, token)
            _copy_normed(embedding_ptr + token * H, norm_ptr, eps, embedded_ptr + b * H, H, WIDTH)
