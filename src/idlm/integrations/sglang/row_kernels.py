"""Triton kernels for what surrounds a forward: one launch each, where most of it is launches."""

# No deferred annotations here: Triton reads them.
import torch
import triton
import triton.language as tl


def locate(
    pending_B: torch.Tensor,
    length_B: torch.Tensor,
    slot_B: torch.Tensor,
    table_PS: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rows.locate`."""
    B = len(slot_B)
    ids_F, positions_F, places_F = torch.empty(
        (3, B * width), dtype=torch.int64, device=slot_B.device
    )
    _locate[(B,)](
        pending_B,
        length_B,
        slot_B,
        table_PS,
        table_PS.stride(0),
        ids_F,
        positions_F,
        places_F,
        W=width,
        ROWS=triton.next_power_of_2(width),
    )
    return ids_F, positions_F, places_F


def enter(
    ids_F: torch.Tensor,
    slot_B: torch.Tensor,
    tokens_PM: torch.Tensor,
    count_P: torch.Tensor,
    embedding_VH: torch.Tensor,
    mask_H: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows.enter`, of embeddings that are all here."""
    B, M, H = len(slot_B), tokens_PM.shape[1], len(mask_H)
    order_F, x_FH = torch.empty_like(ids_F), embedding_VH.new_empty(len(ids_F), H)
    _enter[(len(ids_F),)](
        ids_F,
        slot_B,
        tokens_PM,
        count_P,
        embedding_VH,
        mask_H,
        order_F,
        x_FH,
        B,
        M=M,
        H=H,
        WIDTH=triton.next_power_of_2(H),
    )
    return order_F, x_FH


def report(
    slot_B: torch.Tensor,
    length_B: torch.Tensor,
    committed_PN: torch.Tensor,
    accepted_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rows.report`."""
    B, N = len(slot_B), committed_PN.shape[1]
    tokens_F = torch.empty(B * N, dtype=torch.int64, device=slot_B.device)
    pending_B, new_length_B = torch.empty((2, B), dtype=torch.int64, device=slot_B.device)
    count_B = torch.empty(B, dtype=torch.int32, device=slot_B.device)
    _report[(B,)](
        slot_B,
        length_B,
        committed_PN,
        accepted_P,
        tokens_F,
        count_B,
        new_length_B,
        pending_B,
        N=N,
        ROWS=triton.next_power_of_2(N),
    )
    return tokens_F, count_B, new_length_B, pending_B


@triton.jit
def _locate(  # type: ignore[no-untyped-def]
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
    """One request."""
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
def _enter(  # type: ignore[no-untyped-def]
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
    """One row."""
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
def _report(  # type: ignore[no-untyped-def]
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
    """One request."""
    b = tl.program_id(0)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    accepted = tl.load(accepted_ptr + slot)
    row = tl.arange(0, ROWS)
    token = tl.load(committed_ptr + slot * N + row, mask=row < N, other=0)
    tl.store(tokens_ptr + b * N + row, token, mask=row < N)
    tl.store(count_ptr + b, (accepted + 1).to(tl.int32))
    tl.store(new_length_ptr + b, tl.load(length_ptr + b).to(tl.int64) + accepted + 1)
    tl.store(pending_ptr + b, tl.load(committed_ptr + slot * N + accepted))
