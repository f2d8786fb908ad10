"""The rows of a forward on CUDA, and Triton kernels that lay them out for the first layer."""

# No deferred annotations here: Triton reads them.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait


@dataclass(frozen=True)
class Rows:
    """Rows of some requests, as many of each, in a forward.

    Flat, the clean rows of all that take part come first, then all mask rows.

    Attributes:
        requests, clean, masks: B, and rows of each request of either kind.
        table_BP: blocks of each request, int32; index ``i`` is at ``i % T`` of block ``i // T``.
        start_B: committed tokens, int64; row ``r`` of request ``b`` is at index ``start_b + r``.
        positions_BR: positions of the rows, int64.
        visible_BRR: bool, dense; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
        first_clean, first_mask: flat rows at which its own begin.
    """

    requests: int
    clean: int
    masks: int
    table_BP: torch.Tensor
    start_B: torch.Tensor
    positions_BR: torch.Tensor
    visible_BRR: torch.Tensor
    first_clean: int
    first_mask: int

    @property
    def last_clean(self) -> int:
        """Where its clean rows end."""
        return self.first_clean + self.requests * self.clean

    @property
    def last_mask(self) -> int:
        """Where its mask rows end."""
        return self.first_mask + self.requests * self.masks

    def unflat(self, x_NX: torch.Tensor) -> torch.Tensor:
        """Its rows of ``[N, ...]`` as ``[B, R, ...]``."""
        clean = x_NX[self.first_clean : self.last_clean]
        masks = x_NX[self.first_mask : self.last_mask]
        own = [x.unflatten(0, (self.requests, -1)) for x in (clean, masks) if len(x)]
        if self.requests == 1 and len(own) == 2 and self.last_clean == self.first_mask:
            return x_NX[self.first_clean : self.last_mask][None]
        return own[0] if len(own) == 1 else torch.cat(own, dim=1)


@dataclass(frozen=True)
class Flat:
    """What the first layer begins with, of flat rows.

    Attributes:
        x_NH: embeddings.
        cos_ND, sin_ND: as `decoder.rotate` takes them.
        cells_N: where keys and values go, int64: at ``cell % T`` of block ``cell // T``.
    """

    x_NH: torch.Tensor
    cos_ND: torch.Tensor
    sin_ND: torch.Tensor
    cells_N: torch.Tensor


def arrange(
    pending_B: torch.Tensor,
    length_B: torch.Tensor,
    tokens_BM: torch.Tensor,
    count_B: torch.Tensor,
    offsets_NR: torch.Tensor,
    visible_NRR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tokens_BN`` and ``positions_BR``, int64, and ``visible_BRR``, bool, of decoding requests.

    Args:
        pending_B, length_B: the last token and its position, int64.
        tokens_BM, count_B: drafts and how many count, int64; rows of tokens may lie anywhere.
        offsets_NR, visible_NRR: `decoding.layout.RowTables`, by that count.
    """
    B, (N, R) = len(pending_B), offsets_NR.shape
    tokens_BN, positions_BR = pending_B.new_empty(B, N), pending_B.new_empty(B, R)
    visible_BRR = torch.empty((B, R, R), dtype=torch.bool, device=pending_B.device)
    _arrange[(B,)](
        pending_B,
        length_B,
        tokens_BM,
        tokens_BM.stride(0),
        count_B,
        offsets_NR,
        visible_NRR.view(torch.uint8),
        tokens_BN,
        positions_BR,
        visible_BRR.view(torch.uint8),
        N=N,
        R=R,
        ROWS=triton.next_power_of_2(R),
        PAIRS=triton.next_power_of_2(R * R),
        **overlap(),
    )
    return tokens_BN, positions_BR, visible_BRR


def enter(
    parts: Sequence[tuple[Rows, torch.Tensor, torch.Tensor | None]],
    embedding_VH: torch.Tensor,
    mask_H: torch.Tensor,
    inv_freq_F: torch.Tensor,
    rope_factor: float,
    block_tokens: int,
) -> Flat:
    """The rows of all ``parts`` on their way into the first layer.

    Args:
        parts: of each its rows, the ids ``tokens_BC`` of the clean ones (int64, rows dense), and
            ``kept_BR`` of `PagedAttention`, dense.
        embedding_VH, mask_H: of one dtype, in which all is returned.
        inv_freq_F: frequencies of the ``F = D / 2`` rotated pairs, fp32.
        rope_factor: what cos and sin are multiplied by.
        block_tokens: T.
    """
    N = sum(rows.requests * (rows.clean + rows.masks) for rows, _, _ in parts)
    H, F = embedding_VH.shape[1], len(inv_freq_F)
    x_NH = embedding_VH.new_empty(N, H)
    cos_ND, sin_ND = embedding_VH.new_empty(2, N, 2 * F)
    cells_N = torch.empty(N, dtype=torch.int64, device=x_NH.device)
    for rows, tokens_BC, kept_BR in parts:
        _enter[(rows.requests * (rows.clean + rows.masks),)](
            tokens_BC,
            tokens_BC.stride(0),
            rows.positions_BR,
            rows.positions_BR.stride(0),
            rows.table_BP,
            rows.table_BP.stride(0),
            rows.start_B,
            rows.start_B if kept_BR is None else kept_BR.view(torch.uint8),
            embedding_VH,
            mask_H,
            inv_freq_F,
            rope_factor,
            x_NH,
            cos_ND,
            sin_ND,
            cells_N,
            rows.requests,
            rows.clean,
            rows.masks,
            rows.first_clean,
            rows.first_mask,
            ALL=kept_BR is None,
            T=block_tokens,
            H=H,
            F=F,
            WIDTH=triton.next_power_of_2(H),
            PAIRS=triton.next_power_of_2(F),
            **overlap(),
        )
    return Flat(x_NH, cos_ND, sin_ND, cells_N)


@triton.jit(do_not_specialize=["drafts_stride"])
def _arrange(  # type: ignore[no-untyped-def]
    pending_ptr,
    length_ptr,
    drafts_ptr,
    drafts_stride,
    count_ptr,
    offsets_ptr,
    visible_ptr,
    tokens_ptr,
    positions_ptr,
    visible_out_ptr,
    N: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One request."""
    wait(OVERLAP)
    b = tl.program_id(0)
    count = tl.load(count_ptr + b)
    row = tl.arange(0, ROWS)
    drafted = (row > 0) & (row < N)
    token = tl.load(drafts_ptr + b * drafts_stride + row - 1, mask=drafted, other=0)
    token = tl.where(row == 0, tl.load(pending_ptr + b), token)
    tl.store(tokens_ptr + b * N + row, token, mask=row < N)
    offset = tl.load(offsets_ptr + count * R + row, mask=row < R, other=0)
    tl.store(positions_ptr + b * R + row, tl.load(length_ptr + b) + offset, mask=row < R)
    pair = tl.arange(0, PAIRS)
    sees = tl.load(visible_ptr + count * (R * R) + pair, mask=pair < R * R, other=0)
    tl.store(visible_out_ptr + b * (R * R) + pair, sees, mask=pair < R * R)


@triton.jit(do_not_specialize=["tokens_stride", "B", "clean", "masks", "first_clean", "first_mask"])
def _enter(  # type: ignore[no-untyped-def]
    tokens_ptr,
    tokens_stride,
    positions_ptr,
    positions_stride,
    table_ptr,
    table_stride,
    start_ptr,
    kept_ptr,
    embedding_ptr,
    mask_ptr,
    inv_freq_ptr,
    rope_factor,
    x_ptr,
    cos_ptr,
    sin_ptr,
    cells_ptr,
    B,
    clean,
    masks,
    first_clean,
    first_mask,
    ALL: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    wait(OVERLAP)
    own = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    kind = x_ptr.dtype.element_ty
    is_clean = own < B * clean
    n = tl.where(is_clean, own, own - B * clean)
    each = tl.where(is_clean, clean, masks)
    b = n // each
    r = n % each + tl.where(is_clean, 0, clean)
    row = n + tl.where(is_clean, first_clean, first_mask)
    x_row_ptr = x_ptr + row.to(tl.int64) * H + lane
    if is_clean:
        token = tl.load(tokens_ptr + b * tokens_stride + r)
        x = tl.load(embedding_ptr + token * H + lane, mask=lane < H, other=0.0)
        tl.store(x_row_ptr, x, mask=lane < H)
    else:
        x = tl.load(mask_ptr + lane, mask=lane < H, other=0.0)
        tl.store(x_row_ptr, x.to(kind), mask=lane < H)
    index = tl.load(start_ptr + b) + r
    block = tl.load(table_ptr + b * table_stride + index // T).to(tl.int64)
    if not ALL:
        block = tl.where(tl.load(kept_ptr + b * (clean + masks) + r) != 0, block, 0)
    tl.store(cells_ptr + row, block * T + index % T)
    position = tl.load(positions_ptr + b * positions_stride + r).to(tl.float32)
    pair = tl.arange(0, PAIRS)
    angle = position * tl.load(inv_freq_ptr + pair, mask=pair < F, other=0.0)
    cos, sin = tl.cos(angle) * rope_factor, tl.sin(angle) * rope_factor
    place = row * (2 * F) + pair
    tl.store(cos_ptr + place, cos.to(kind), mask=pair < F)
    tl.store(cos_ptr + place + F, cos.to(kind), mask=pair < F)
    # The first half carries the sign.
    tl.store(sin_ptr + place, (-sin).to(kind), mask=pair < F)
    tl.store(sin_ptr + place + F, sin.to(kind), mask=pair < F)
