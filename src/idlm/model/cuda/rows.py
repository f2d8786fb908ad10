"""The rows of a forward on CUDA, and Triton kernels that lay them out for the first layer."""

# No deferred annotations here: Triton reads them.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from idlm.model.cuda.overlap import overlap, wait


@dataclass(frozen=True)
class Rows:
    """The rows of a forward.

    Attributes:
        requests, clean, masks: B, and rows of each request of either kind.
        table_BP: blocks of each request, int32; index ``i`` is at ``i % T`` of block ``i // T``.
        start_B: committed tokens, int64; row ``r`` of request ``b`` is at index ``start_b + r``.
        positions_BR: positions of the rows, int64.
        visible_BRR: bool, dense; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
    """

    requests: int
    clean: int
    masks: int
    table_BP: torch.Tensor
    start_B: torch.Tensor
    positions_BR: torch.Tensor
    visible_BRR: torch.Tensor

    @property
    def first_mask(self) -> int:
        """Clean rows of all requests together: where the mask rows begin."""
        return self.requests * self.clean

    @property
    def _in_order(self) -> bool:
        """Whether flat rows lie as those of the requests do."""
        return self.requests == 1 or self.masks == 0 or self.clean == 0

    def flat(self, x_BRX: torch.Tensor) -> torch.Tensor:
        """``[B, R, ...]`` to ``[N, ...]``, the clean rows first."""
        if self._in_order:
            return x_BRX.flatten(0, 1).contiguous()
        return torch.cat(
            (x_BRX[:, : self.clean].flatten(0, 1), x_BRX[:, self.clean :].flatten(0, 1))
        )

    def unflat(self, x_NX: torch.Tensor) -> torch.Tensor:
        """``[N, ...]`` to ``[B, R, ...]``."""
        if self._in_order:
            return x_NX.unflatten(0, (self.requests, -1))
        clean, masks = x_NX[: self.first_mask], x_NX[self.first_mask :]
        parts = [(clean, self.clean), (masks, self.masks)]
        return torch.cat([x.unflatten(0, (self.requests, n)) for x, n in parts], dim=1)


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
    tokens_BC: torch.Tensor,
    positions_BR: torch.Tensor,
    embedding_VH: torch.Tensor,
    mask_H: torch.Tensor,
    inv_freq_F: torch.Tensor,
    rope_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings ``[N, H]`` and `rotate`'s cos and sin, ``[N, D]``, of flat rows (`Rows.flat`).

    Args:
        tokens_BC: ids of the clean rows, int64; the rows after those are masks. Rows dense.
        positions_BR: int64, dense.
        embedding_VH, mask_H: of one dtype, in which all is returned.
        inv_freq_F: frequencies of the ``F = D / 2`` rotated pairs, fp32.
        rope_factor: what cos and sin are multiplied by.
    """
    (B, R), C = positions_BR.shape, tokens_BC.shape[1]
    H, F = embedding_VH.shape[1], len(inv_freq_F)
    x_NH = embedding_VH.new_empty(B * R, H)
    cos_ND, sin_ND = embedding_VH.new_empty(2, B * R, 2 * F)
    _enter[(B * R,)](
        tokens_BC,
        tokens_BC.stride(0),
        positions_BR,
        embedding_VH,
        mask_H,
        inv_freq_F,
        rope_factor,
        x_NH,
        cos_ND,
        sin_ND,
        B,
        C,
        R - C,
        H=H,
        F=F,
        WIDTH=triton.next_power_of_2(H),
        PAIRS=triton.next_power_of_2(F),
        **overlap(),
    )
    return x_NH, cos_ND, sin_ND


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


@triton.jit(do_not_specialize=["tokens_stride", "B", "clean", "masks"])
def _enter(  # type: ignore[no-untyped-def]
    tokens_ptr,
    tokens_stride,
    positions_ptr,
    embedding_ptr,
    mask_ptr,
    inv_freq_ptr,
    rope_factor,
    x_ptr,
    cos_ptr,
    sin_ptr,
    B,
    clean,
    masks,
    H: tl.constexpr,
    F: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    wait(OVERLAP)
    row = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    kind = x_ptr.dtype.element_ty
    x_row_ptr = x_ptr + row.to(tl.int64) * H + lane
    if row < B * clean:
        b = row // clean
        r = row % clean
        token = tl.load(tokens_ptr + b * tokens_stride + r)
        x = tl.load(embedding_ptr + token * H + lane, mask=lane < H, other=0.0)
        tl.store(x_row_ptr, x, mask=lane < H)
    else:
        b = (row - B * clean) // masks
        r = clean + (row - B * clean) % masks
        x = tl.load(mask_ptr + lane, mask=lane < H, other=0.0)
        tl.store(x_row_ptr, x.to(kind), mask=lane < H)
    position = tl.load(positions_ptr + b * (clean + masks) + r).to(tl.float32)
    pair = tl.arange(0, PAIRS)
    angle = position * tl.load(inv_freq_ptr + pair, mask=pair < F, other=0.0)
    cos, sin = tl.cos(angle) * rope_factor, tl.sin(angle) * rope_factor
    place = row * (2 * F) + pair
    tl.store(cos_ptr + place, cos.to(kind), mask=pair < F)
    tl.store(cos_ptr + place + F, cos.to(kind), mask=pair < F)
    # The first half carries the sign.
    tl.store(sin_ptr + place, (-sin).to(kind), mask=pair < F)
    tl.store(sin_ptr + place + F, sin.to(kind), mask=pair < F)
