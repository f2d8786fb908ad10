"""Triton kernels of `rows`: one launch each, where most of what surrounds a forward is launches."""

# No deferred annotations here: Triton reads them.
import triton
import triton.language as tl


@triton.jit
def locate(  # type: ignore[no-untyped-def]
    pending_ptr,
    length_ptr,
    slot_ptr,
    table_ptr,
    table_stride,
    ids_ptr,
    positions_ptr,
    places_ptr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Ids, positions and places of one request."""
    b = tl.program_id(0)
    row = tl.arange(0, ROWS)
    there = row < W
    position = tl.load(length_ptr + b).to(tl.int64) + row
    table_row_ptr = table_ptr + tl.load(slot_ptr + b).to(tl.int64) * table_stride
    place = tl.load(table_row_ptr + position, mask=there, other=0)
    pending = tl.load(pending_ptr + b).to(tl.int64)
    tl.store(ids_ptr + b * W + row, tl.zeros([ROWS], tl.int64) + pending, mask=there)
    tl.store(positions_ptr + b * W + row, position, mask=there)
    tl.store(places_ptr + b * W + row, place.to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["B"])
def enter(  # type: ignore[no-untyped-def]
    ids_ptr,
    slot_ptr,
    tokens_ptr,
    count_ptr,
    embedding_ptr,
    mask_ptr,
    order_ptr,
    x_ptr,
    B,
    M: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its place in the order, and its embedding."""
    row = tl.program_id(0)
    b, r = row // (2 * M + 1), row % (2 * M + 1)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    count = tl.load(count_ptr + slot).to(tl.int32)
    masked = (r > count) & (r <= count + M)
    drafted = (r > 0) & (r <= count)
    draft = tl.load(tokens_ptr + slot * M + r - 1, mask=drafted, other=0)
    token = tl.where(drafted, draft, tl.load(ids_ptr + row))
    lane = tl.arange(0, WIDTH)
    x = tl.load(mask_ptr + lane, mask=(lane < H) & masked, other=0.0)
    embedded = tl.load(embedding_ptr + token * H + lane, mask=(lane < H) & (masked == 0), other=0.0)
    x = tl.where(masked, x, embedded)
    tl.store(x_ptr + row.to(tl.int64) * H + lane, x, mask=lane < H)
    after = tl.where(r > count, r - M, r)
    place = tl.where(masked, B * (M + 1) + b * M + r - count - 1, b * (M + 1) + after)
    tl.store(order_ptr + place, row.to(tl.int64))


@triton.jit
def report(  # type: ignore[no-untyped-def]
    slot_ptr,
    length_ptr,
    committed_ptr,
    accepted_ptr,
    tokens_ptr,
    count_ptr,
    new_length_ptr,
    pending_ptr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What one request committed."""
    b = tl.program_id(0)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    accepted = tl.load(accepted_ptr + slot)
    row = tl.arange(0, ROWS)
    token = tl.load(committed_ptr + slot * N + row, mask=row < N, other=0)
    tl.store(tokens_ptr + b * N + row, token, mask=row < N)
    tl.store(count_ptr + b, (accepted + 1).to(tl.int32))
    tl.store(new_length_ptr + b, tl.load(length_ptr + b).to(tl.int64) + accepted + 1)
    tl.store(pending_ptr + b, tl.load(committed_ptr + slot * N + accepted))
