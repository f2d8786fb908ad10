"""Triton kernels of attention over a paged KV cache, for 1 to many in-flight rows a request.

The rows of a request times the query heads of one KV head are packed into tiles, so that a few rows
fill a matrix unit. The keys are split into fixed chunks that run side by side and are merged by
their log-sum-exp (flash-decoding); the split depends on a request's own length only, so its result
does not depend on the batch.
"""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl

# Keys per step of the loop, and per split.
STEP_KEYS = 64
SPLIT_KEYS = 256
# Packed rows of one program at most; the matrix units want 16 at least.
MIN_ROWS, MAX_ROWS = 16, 64


def rotate_and_append(
    qkv_BRW: torch.Tensor,
    cos_BR1D: torch.Tensor,
    sin_BR1D: torch.Tensor,
    k_NKTD: torch.Tensor,
    v_NKTD: torch.Tensor,
    table_BP: torch.Tensor,
    start_B: torch.Tensor,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys (after their norms, if any) and put keys and values into the cache.

    Args:
        qkv_BRW: the heads of queries, keys and values, ``[B, R, (Q + 2 K) * D]``, dense; the
            queries are overwritten.
        cos_BR1D, sin_BR1D: as `decoder.rotate` takes them.
    Further arguments as in `attend`; row ``r`` of request ``b`` goes to index ``start_b + r``.

    Returns:
        The queries, ``[B, R, Q, D]``, a part of ``qkv``.
    """
    B, R, W = qkv_BRW.shape
    K, T, D = k_NKTD.shape[1:]
    Q = W // D - 2 * K
    _rotate_and_append[(B * R, W // D)](
        qkv_BRW,
        cos_BR1D,
        sin_BR1D,
        qkv_BRW if q_norm_D is None else q_norm_D,
        qkv_BRW if k_norm_D is None else k_norm_D,
        k_NKTD,
        v_NKTD,
        table_BP,
        start_B,
        R,
        eps,
        *k_NKTD.stride()[:3],
        table_BP.stride(0),
        NORM=q_norm_D is not None,
        Q=Q,
        K=K,
        D=D,
        T=T,
        HALF=triton.next_power_of_2(D // 2),
    )
    return qkv_BRW.view(B, R, -1, D)[:, :, :Q]


def attend(
    q_BRQD: torch.Tensor,
    k_NKTD: torch.Tensor,
    v_NKTD: torch.Tensor,
    table_BP: torch.Tensor,
    start_B: torch.Tensor,
    positions_BR: torch.Tensor,
    visible_BRR: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of in-flight rows over committed keys and over each other.

    Nothing waits for the device, and the launch depends on shapes only: it can be captured.

    Args:
        q_BRQD: queries; Q query heads share K KV heads.
        k_NKTD, v_NKTD: blocks of T tokens, of the same dtype; the rows' own are there already
            (`rotate_and_append`).
        table_BP: blocks of each request, int32; index ``i`` is at ``i % T`` of block ``i // T``.
        start_B: committed tokens, int64; every row sees them (within the window).
        positions_BR: positions of the in-flight rows, int64.
        visible_BRR: bool; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
        window: a row sees keys less than this many positions before it; None: all.
    Returns:
        ``[B, R, Q, D]``, contiguous; 0 for a row that sees no key.
    """
    B, R, Q, D = q_BRQD.shape
    K, T = k_NKTD.shape[1:3]
    G = Q // K
    rows = min(MAX_ROWS, max(MIN_ROWS, triton.next_power_of_2(R * G)))
    splits = triton.cdiv(table_BP.shape[1] * T, SPLIT_KEYS)
    out_BRQD = torch.empty((B, R, Q, D), dtype=q_BRQD.dtype, device=q_BRQD.device)
    partial = out_BRQD
    weight = torch.empty((splits, B, R, Q), dtype=torch.float32, device=q_BRQD.device)
    if splits > 1:
        partial = torch.empty((splits, B, R, Q, D), dtype=torch.float32, device=q_BRQD.device)
    visible_BRR = visible_BRR.contiguous()
    _attend[(B * K, triton.cdiv(R * G, rows), splits)](
        q_BRQD,
        k_NKTD,
        v_NKTD,
        table_BP,
        start_B,
        positions_BR,
        visible_BRR.view(torch.uint8),
        partial,
        weight,
        D**-0.5,
        B,
        R,
        *q_BRQD.stride()[:3],
        *k_NKTD.stride()[:3],
        table_BP.stride(0),
        positions_BR.stride(0),
        WINDOW=window or 0,
        K=K,
        G=G,
        D=D,
        DIM=max(16, triton.next_power_of_2(D)),
        T=T,
        ROWS=rows,
        KEYS=STEP_KEYS,
        CHUNK=SPLIT_KEYS,
        ONLY=splits == 1,
    )
    if splits > 1:
        _merge[(B * R * Q,)](
            partial,
            weight,
            out_BRQD,
            B * R * Q,
            SPLITS=splits,
            D=D,
            DIM=triton.next_power_of_2(D),
        )
    return out_BRQD


@triton.jit
def _rotate_and_append(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start_ptr,
    R,
    eps,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    table_stride,
    NORM: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    HALF: tl.constexpr,
):
    """One head of one row."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    lane = tl.arange(0, HALF)
    real = lane < D // 2
    first_ptr = qkv_ptr + (row.to(tl.int64) * (Q + 2 * K) + head) * D + lane
    x1 = tl.load(first_ptr, mask=real, other=0.0).to(tl.float32)
    x2 = tl.load(first_ptr + D // 2, mask=real, other=0.0).to(tl.float32)
    if head < Q + K:
        if NORM:
            shrink = 1.0 / tl.sqrt((tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / D + eps)
            norm_ptr = q_norm_ptr if head < Q else k_norm_ptr
            x1 *= shrink * tl.load(norm_ptr + lane, mask=real, other=0.0).to(tl.float32)
            x2 *= shrink * tl.load(norm_ptr + D // 2 + lane, mask=real, other=0.0).to(tl.float32)
        # The halves of cos are equal; sin carries the sign of its first half.
        cos = tl.load(cos_ptr + row * D + lane, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + row * D + D // 2 + lane, mask=real, other=0.0).to(tl.float32)
        rotated = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = rotated
    kind = qkv_ptr.dtype.element_ty
    if head < Q:
        tl.store(first_ptr, x1.to(kind), mask=real)
        tl.store(first_ptr + D // 2, x2.to(kind), mask=real)
    else:
        b = row // R
        index = tl.load(start_ptr + b) + row % R
        block = tl.load(table_ptr + b * table_stride + index // T).to(tl.int64)
        cell = block * cache_stride_n + (index % T) * cache_stride_t + lane
        if head < Q + K:
            cell_ptr = k_cache_ptr + cell + (head - Q) * cache_stride_h
        else:
            cell_ptr = v_cache_ptr + cell + (head - Q - K) * cache_stride_h
        tl.store(cell_ptr, x1.to(kind), mask=real)
        tl.store(cell_ptr + D // 2, x2.to(kind), mask=real)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start_ptr,
    positions_ptr,
    visible_ptr,
    out_ptr,
    weight_ptr,
    scale,
    B,
    R,
    q_stride_b,
    q_stride_r,
    q_stride_h,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    table_stride,
    positions_stride,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONLY: tl.constexpr,
):
    """One KV head of one request: a tile of packed rows over one chunk of the keys."""
    b = tl.program_id(0) // K
    head = tl.program_id(0) % K
    split = tl.program_id(2)
    packed = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = packed // G
    query_head = head * G + packed % G
    real_row = row < R
    dims = tl.arange(0, DIM)
    real_dim = dims < D
    start = tl.load(start_ptr + b)
    end = tl.minimum(start + R, (split + 1) * CHUNK)
    q = tl.load(
        q_ptr
        + b * q_stride_b
        + row[:, None] * q_stride_r
        + query_head[:, None] * q_stride_h
        + dims[None, :],
        mask=real_row[:, None] & real_dim[None, :],
        other=0.0,
    )
    if WINDOW > 0:
        position = tl.load(positions_ptr + b * positions_stride + row, mask=real_row, other=0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    # A fixed number of steps, masked: the interpreter cannot loop to a bound it has loaded.
    for step in range(0, CHUNK, KEYS):
        keys = split * CHUNK + step + tl.arange(0, KEYS)
        there = keys < end
        block = tl.load(table_ptr + b * table_stride + keys // T, mask=there, other=0)
        cell = block.to(tl.int64) * cache_stride_n + head * cache_stride_h
        cell += (keys % T) * cache_stride_t
        k = tl.load(
            k_cache_ptr + cell[None, :] + dims[:, None],
            mask=there[None, :] & real_dim[:, None],
            other=0.0,
        )
        v = tl.load(
            v_cache_ptr + cell[:, None] + dims[None, :],
            mask=there[:, None] & real_dim[None, :],
            other=0.0,
        )
        flight = keys - start
        ours = there & (flight >= 0)
        seen = tl.load(
            visible_ptr + (b * R + row[:, None]) * R + flight[None, :],
            mask=real_row[:, None] & ours[None, :],
            other=0,
        )
        sees = (there & (flight < 0))[None, :] | (seen != 0)
        if WINDOW > 0:
            own = tl.load(positions_ptr + b * positions_stride + flight, mask=ours, other=0)
            key_position = tl.where(flight < 0, keys, own)
            sees = sees & (position[:, None] - key_position[None, :] < WINDOW)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet stays at weight 0 instead of NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        fade = tl.exp(top - safe)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    place = (split * B + b) * R + row
    place = place.to(tl.int64) * (K * G) + query_head
    # log-sum-exp of the chunk's scores: what its share is worth.
    worth = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(weight_ptr + place, worth, mask=real_row)
    # Nobody reads the share of a chunk that is worth nothing, unless it is the only one.
    written = real_row & ((total > 0.0) | ONLY)
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=written[:, None] & real_dim[None, :],
    )


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partial_ptr,
    weight_ptr,
    out_ptr,
    N,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    """One output row from the chunks' shares."""
    n = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIM)
    real = dims < D
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([DIM], tl.float32)
    for split in range(0, SPLITS):
        worth = tl.load(weight_ptr + split * N + n)
        higher = tl.maximum(top, worth)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp(worth - safe)
        fade = tl.exp(top - safe)
        there = real & (worth + tl.zeros([DIM], tl.float32) > float("-inf"))
        part = tl.load(partial_ptr + (split * N + n) * D + dims, mask=there, other=0.0)
        total = total * fade + share
        out = out * fade + share * part
        top = higher
    out = out / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + n * D + dims, out.to(out_ptr.dtype.element_ty), mask=real)
