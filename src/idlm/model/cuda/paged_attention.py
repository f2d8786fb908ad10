"""Triton kernels of attention over a paged KV cache, for 1 to many in-flight rows a request.

Rows are flat, as the projections have them: the clean rows of all requests, then their mask rows.
The rows of a request times the query heads of one KV head are packed into tiles, so that a few rows
fill a matrix unit. The keys are split into parts that run side by side and are merged by their
log-sum-exp (flash-decoding).
"""

# No deferred annotations here: Triton reads them.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait
from idlm.model.cuda.rows import Rows

PART_KEYS = 64  # in the shortest part
REACH_KEYS = 256  # texts are cut alike while they have no more than a multiple of it
MAX_PARTS = 32
PROMPT_ROWS = 256  # packed rows of a text that fill high tiles
MERGED_ROWS = 32  # parts of rows that one program merges


@dataclass(frozen=True)
class Cut:
    """How the work is cut.

    Attributes:
        rows: packed rows of a program; the matrix units want 16 at least.
        keys: of a step.
        programs: that there should be at least, of one tile of rows each.
        warps, stages: of a program.
    """

    rows: int
    keys: int
    programs: int
    warps: int
    stages: int


def cut_of(texts: int, packed: int, dim: int, itemsize: int) -> Cut:
    """The cut for so many requests times KV heads (docs/benchmarks.md, "Attention").

    Args:
        packed: rows in flight of a request times query heads of a KV head.
        dim: of a head.
        itemsize: bytes of an element.
    """
    # As few rows in all tiles as can be; of those, in as few tiles.
    rows = 16 if triton.cdiv(packed, 16) % 2 else 32
    if itemsize > 2:
        return Cut(rows, 64 if dim <= 128 else 32, programs=256, warps=4, stages=2)
    if dim > 128:
        return Cut(rows, keys=32, programs=256, warps=4, stages=3)
    # Tiles of 64 rows read the keys once for all of them, but a few rows would go through all 64.
    # They do other instructions: with bf16, rows come out other than in lower tiles.
    if packed >= PROMPT_ROWS:
        return Cut(64, keys=64 if dim <= 64 else 32, programs=256, warps=4, stages=3)
    if dim <= 64 and 48 <= texts < 192 and packed > 32:
        return Cut(64, keys=64, programs=512, warps=4, stages=2)
    if dim <= 64 and texts >= 192 and packed > 16:
        return Cut(64, keys=32, programs=256, warps=4, stages=3)
    if texts < 48:
        programs = min(16 * texts, 192 if dim <= 64 else 256)
        return Cut(rows, keys=64, programs=programs, warps=4, stages=2)
    if dim > 64:
        return Cut(rows, keys=64 if texts < 256 else 32, programs=256, warps=4, stages=3)
    if texts < 192:
        return Cut(rows, keys=32, programs=512, warps=2, stages=3)
    return Cut(rows, keys=32, programs=1024, warps=1, stages=2)


def attend(
    qkv_NW: torch.Tensor,
    k_NKTD: torch.Tensor,
    v_NKTD: torch.Tensor,
    groups: Sequence[Rows],
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of in-flight rows over committed keys and over each other.

    Nothing waits for the device, and the launch depends on shapes only: it can be captured.

    Args:
        qkv_NW: as `rotation.rotate_and_append` has left it; Q query heads share K KV heads.
        k_NKTD, v_NKTD: of the same dtype; the rows' own are there already.
        groups: all rows, one or two; how the work is cut depends on the first.
        window: a row sees keys less than this many positions before it; None: all.
    Returns:
        ``[N, Q * D]``; 0 for a row that sees no key.
    """
    N, W = qkv_NW.shape
    K, T, D = k_NKTD.shape[1:]
    Q = W // D - 2 * K
    first, second = groups[0], groups[-1]  # maybe the same
    G, texts = Q // K, first.requests * K
    cut = cut_of(texts, (first.clean + first.masks) * G, D, k_NKTD.itemsize)
    longest = triton.cdiv(first.table_BP.shape[1] * T, PART_KEYS)
    parts = max(1, min(MAX_PARTS, longest, triton.cdiv(cut.programs, texts)))
    out_NX = torch.empty((N, Q * D), dtype=qkv_NW.dtype, device=qkv_NW.device)
    partial, worth = out_NX, out_NX
    if parts > 1:
        partial = torch.empty((parts, N, Q, D), dtype=torch.float32, device=qkv_NW.device)
        worth = torch.empty((parts, N, Q), dtype=torch.float32, device=qkv_NW.device)
    tiles = [triton.cdiv((x.clean + x.masks) * G, cut.rows) for x in groups]
    programs = sum(x.requests * K * n for x, n in zip(groups, tiles, strict=True))
    _attend[(programs, parts)](
        qkv_NW,
        k_NKTD,
        v_NKTD,
        *_places(first),
        *_places(second),
        partial,
        worth,
        D**-0.5,
        N,
        texts,
        tiles[0],
        second.requests * K,
        parts,
        *k_NKTD.stride()[:3],
        WINDOW=window or 0,
        K=K,
        G=G,
        D=D,
        DIM=max(16, triton.next_power_of_2(D)),
        T=T,
        ROWS=cut.rows,
        KEYS=cut.keys,
        SHORTEST=PART_KEYS,
        REACH=REACH_KEYS,
        SPLIT=parts > 1,
        GROUPS=len(groups),
        num_warps=cut.warps,
        num_stages=cut.stages,
        **overlap(),
    )
    if parts > 1:
        dim, slots = triton.next_power_of_2(D), triton.next_power_of_2(parts)
        together = max(1, MERGED_ROWS // slots)
        _merge[(triton.cdiv(N * Q, together),)](
            partial,
            worth,
            out_NX,
            N * Q,
            parts,
            ROWS=together,
            SLOTS=slots,
            D=D,
            DIM=dim,
            num_warps=max(1, together * slots * dim // 2048),
            **overlap(),
        )
    return out_NX


def _places(rows: Rows) -> tuple[torch.Tensor | int, ...]:
    """What the kernel is told of a group."""
    return (
        rows.table_BP,
        rows.start_B,
        rows.positions_BR,
        rows.visible_BRR.view(torch.uint8),
        rows.clean,
        rows.masks,
        rows.first_clean,
        rows.first_mask,
        rows.table_BP.stride(0),
        rows.positions_BR.stride(0),
    )


@triton.jit
def _gather(scores, v, top, total, out):  # type: ignore[no-untyped-def]
    """One step of the softmax: its highest score, its sum and the weighted sum of values so far."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet stays at weight 0 instead of NaN.
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - safe[:, None])
    fade = tl.exp(top - safe)
    total = total * fade + tl.sum(weights, 1)
    out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return higher, total, out


@triton.jit(
    do_not_specialize=[
        "clean",
        "masks",
        "first_clean",
        "first_mask",
        "table_stride",
        "positions_stride",
        "clean2",
        "masks2",
        "first_clean2",
        "first_mask2",
        "table_stride2",
        "positions_stride2",
        "N",
        "texts",
        "tiles",
        "texts2",
        "parts",
    ]
)
def _attend(  # type: ignore[no-untyped-def]
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    start_ptr,
    positions_ptr,
    visible_ptr,
    clean,
    masks,
    first_clean,
    first_mask,
    table_stride,
    positions_stride,
    table2_ptr,
    start2_ptr,
    positions2_ptr,
    visible2_ptr,
    clean2,
    masks2,
    first_clean2,
    first_mask2,
    table_stride2,
    positions_stride2,
    out_ptr,
    worth_ptr,
    scale,
    N,
    texts,
    tiles,
    texts2,
    parts,
    cache_stride_n,
    cache_stride_h,
    cache_stride_t,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHORTEST: tl.constexpr,
    REACH: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One KV head of one request: a tile of packed rows over one part of the keys."""
    program = tl.program_id(0)
    part = tl.program_id(1)
    if GROUPS == 2:  # noqa: SIM102  # a constant: with one group the rest is not compiled
        if program >= texts * tiles:
            program -= texts * tiles
            texts = texts2
            table_ptr, table_stride = table2_ptr, table_stride2
            positions_ptr, positions_stride = positions2_ptr, positions_stride2
            start_ptr, visible_ptr = start2_ptr, visible2_ptr
            clean, masks = clean2, masks2
            first_clean, first_mask = first_clean2, first_mask2
    b = program % texts // K
    head = program % texts % K
    R = clean + masks
    packed = program // texts * ROWS + tl.arange(0, ROWS)
    row = packed // G
    query_head = head * G + packed % G
    real_row = row < R
    own = tl.minimum(row, R - 1)
    flat_clean, flat_mask = first_clean + b * clean, first_mask + b * masks - clean
    flat = (own + tl.where(own < clean, flat_clean, flat_mask)).to(tl.int64)
    dims = tl.arange(0, DIM)
    real_dim = dims < D
    # Lengths and tables were there before the launch that this one waits for.
    start = tl.load(start_ptr + b).to(tl.int32)
    # Parts of equal length, but none is short: a short text has fewer of them. The length does not
    # depend on the rows in flight; the last part has them all.
    reach = (start // REACH + 1) * REACH
    length = tl.maximum(tl.cdiv(tl.cdiv(reach, parts), KEYS) * KEYS, SHORTEST)
    first = part * length
    end = tl.where(part == parts - 1, start + R, tl.minimum(start + R, first + length))
    # Steps of committed keys alone, which all rows see; whatever is in flight comes after those.
    flying = first + tl.maximum(tl.minimum(start, end) - first, 0) // KEYS * KEYS
    # Where the next step's keys are is known one step ahead, so that they can be fetched meanwhile.
    table_row_ptr = table_ptr + b * table_stride
    coming = first + tl.arange(0, KEYS)
    block = tl.load(table_row_ptr + coming // T, mask=coming < end, other=0)
    k_head_ptr = k_cache_ptr + head * cache_stride_h
    v_head_ptr = v_cache_ptr + head * cache_stride_h
    wait(OVERLAP)
    q = tl.load(
        qkv_ptr + flat[:, None] * ((K * G + 2 * K) * D) + query_head[:, None] * D + dims[None, :],
        mask=real_row[:, None] & real_dim[None, :],
        other=0.0,
    )
    if WINDOW > 0:
        position = tl.load(positions_ptr + b * positions_stride + row, mask=real_row, other=0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for at in tl.range(first, flying, KEYS):
        keys = at + tl.arange(0, KEYS)
        cell = block.to(tl.int64) * cache_stride_n + (keys % T) * cache_stride_t
        coming = keys + KEYS
        block = tl.load(table_row_ptr + coming // T, mask=coming < end, other=0)
        k_ptrs = k_head_ptr + cell[None, :] + dims[:, None]
        v_ptrs = v_head_ptr + cell[:, None] + dims[None, :]
        if D == DIM:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=real_dim[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=real_dim[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if WINDOW > 0:
            near = position[:, None] - keys[None, :] < WINDOW
            scores = tl.where(near, scores, float("-inf"))
        top, total, out = _gather(scores, v, top, total, out)
    for at in tl.range(flying, end, KEYS):
        keys = at + tl.arange(0, KEYS)
        there = keys < end
        cell = block.to(tl.int64) * cache_stride_n + (keys % T) * cache_stride_t
        coming = keys + KEYS
        block = tl.load(table_row_ptr + coming // T, mask=coming < end, other=0)
        k = tl.load(
            k_head_ptr + cell[None, :] + dims[:, None],
            mask=there[None, :] & real_dim[:, None],
            other=0.0,
        )
        v = tl.load(
            v_head_ptr + cell[:, None] + dims[None, :],
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
            flown = tl.load(positions_ptr + b * positions_stride + flight, mask=ours, other=0)
            key_position = tl.where(flight < 0, keys, flown)
            sees = sees & (position[:, None] - key_position[None, :] < WINDOW)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(sees, scores, float("-inf"))
        top, total, out = _gather(scores, v, top, total, out)
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    place = flat * (K * G) + query_head
    if SPLIT:
        place += part * N.to(tl.int64) * (K * G)
        # log-sum-exp of the part's scores: what its share is worth.
        positive = tl.where(total > 0.0, total, 1.0)
        worth = tl.where(total > 0.0, top + tl.log(positive), float("-inf"))
        tl.store(worth_ptr + place, worth, mask=real_row)
        # Nobody reads the share of a part that is worth nothing.
        real_row = real_row & (total > 0.0)
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=real_row[:, None] & real_dim[None, :],
    )


@triton.jit(do_not_specialize=["N", "parts"])
def _merge(  # type: ignore[no-untyped-def]
    partial_ptr,
    worth_ptr,
    out_ptr,
    N,
    parts,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some output rows from the shares of the parts."""
    wait(OVERLAP)
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    share_RS = n[:, None] + tl.arange(0, SLOTS).to(tl.int64)[None, :] * N
    there = (n < N)[:, None] & (tl.arange(0, SLOTS) < parts)[None, :]
    worth = tl.load(worth_ptr + share_RS, mask=there, other=float("-inf"))
    top = tl.max(worth, 1)
    share = tl.exp(worth - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(share, 1)
    there = (worth > float("-inf"))[:, :, None] & (dims < D)[None, None, :]
    partial = tl.load(
        partial_ptr + share_RS[:, :, None] * D + dims[None, None, :], mask=there, other=0.0
    )
    out = tl.sum(partial * share[:, :, None], 1) / tl.where(total > 0.0, total, 1.0)[:, None]
    out = out.to(out_ptr.dtype.element_ty)
    written = (n < N)[:, None] & (dims < D)[None, :]
    tl.store(out_ptr + n[:, None] * D + dims[None, :], out, mask=written)
