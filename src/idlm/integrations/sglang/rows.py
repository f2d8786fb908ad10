"""The rows of a forward: where they are, what goes into the model, and what it committed.

The linear layout (`decoding.layout`) with the same number of rows for each request: pending, drafts
and masks; without drafts, the masks stand right behind pending, and rows that nothing sees follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import nn

from idlm.integrations.sglang import row_kernels
from idlm.integrations.sglang.slots import Slots
from idlm.model.cuda import stack as cuda_stack


@dataclass(frozen=True)
class RowOrder:
    """The rows of a forward, flat over the batch: those of tokens, then those of masks.

    Attributes:
        order_F: int64.
        masks: how many are rows of masks.
        ready_P1: of each projection with a LoRA, an int32 that is 0 and is used up.
    """

    order_F: torch.Tensor
    masks: int
    ready_P1: torch.Tensor

    @property
    def first_mask(self) -> int:
        """How many come before the rows of masks."""
        return len(self.order_F) - self.masks


def locate(
    pending_B: torch.Tensor,
    length_B: torch.Tensor,
    slot_B: torch.Tensor,
    table_PS: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (pending in each; `enter` knows better), positions and cache places, int64, of all rows.

    Args:
        table_PS: the host's place in its cache for each position of each slot.
        width: rows of a request.
    """
    if cuda_stack.usable(slot_B.device):
        B = len(slot_B)
        ids_F, positions_F, places_F = torch.empty(
            (3, B * width), dtype=torch.int64, device=slot_B.device
        )
        row_kernels.locate[(B,)](
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
    positions_BW = length_B[:, None] + torch.arange(width, device=slot_B.device)
    return (
        pending_B.long().repeat_interleave(width),
        positions_BW.flatten(),
        table_PS[slot_B[:, None], positions_BW].flatten().long(),
    )


def enter(
    ids_F: torch.Tensor,
    slot_B: torch.Tensor,
    slots: Slots,
    embed: nn.Module,
    mask_H: torch.Tensor,
    *,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the rows (`RowOrder`) and what goes into the first layer, ``[F, H]``.

    Args:
        ids_F: from `locate`.
        embed: the host's embedding.
        mask_H: the masks' embedding.
        whole: whether this rank has the whole embedding.
    """
    weight_VH: torch.Tensor = embed.weight  # type: ignore[assignment]
    B, M, H = len(slot_B), slots.tokens_PM.shape[1], len(mask_H)
    if whole and cuda_stack.usable(slot_B.device) and weight_VH.dtype is mask_H.dtype:
        order_F, x_FH = torch.empty_like(ids_F), weight_VH.new_empty(len(ids_F), H)
        row_kernels.enter[(len(ids_F),)](
            ids_F,
            slot_B,
            slots.tokens_PM,
            slots.count_P,
            weight_VH,
            mask_H,
            order_F,
            x_FH,
            B,
            M=M,
            H=H,
            WIDTH=triton.next_power_of_2(H),
        )
        return order_F, x_FH
    tokens_BM, count_B = slots.tokens_PM[slot_B], slots.count_P[slot_B]
    ids_BW = ids_F.view(B, 2 * M + 1)
    ids_BW = torch.cat((ids_BW[:, :1], tokens_BM, ids_BW[:, 1 + M :]), dim=1)
    masks_F = mask_rows(count_B, M)
    x_FH = embed(ids_BW.flatten()).index_copy(0, masks_F, mask_H.expand(B * M, -1))
    place_N = torch.arange(M + 1, device=ids_F.device)
    others_BN = _first_rows(count_B, M) + place_N + M * (place_N > count_B[:, None])
    return torch.cat((others_BN.flatten(), masks_F)), x_FH


def mask_rows(count_B: torch.Tensor, block_size: int) -> torch.Tensor:
    """The rows of masks, flat over the batch, of requests with so many drafts (0 or all), int64."""
    behind_M = torch.arange(1, block_size + 1, device=count_B.device)
    return (_first_rows(count_B, block_size) + count_B[:, None] + behind_M).flatten()


def _first_rows(count_B: torch.Tensor, block_size: int) -> torch.Tensor:
    B, W = len(count_B), 2 * block_size + 1
    return torch.arange(0, B * W, W, device=count_B.device)[:, None]


def report(
    slot_B: torch.Tensor, length_B: torch.Tensor, slots: Slots
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a forward committed, for the host.

    Args:
        length_B: tokens in the cache before it, int64.
    Returns:
        Tokens ``[B * N]``, int64; how many of each request's count, int32; the new lengths and the
        last token of each request, int64.
    """
    if cuda_stack.usable(slot_B.device):
        B, N = len(slot_B), slots.committed_PN.shape[1]
        tokens_F = torch.empty(B * N, dtype=torch.int64, device=slot_B.device)
        last_B, new_length_B = torch.empty((2, B), dtype=torch.int64, device=slot_B.device)
        count_B = torch.empty(B, dtype=torch.int32, device=slot_B.device)
        row_kernels.report[(B,)](
            slot_B,
            length_B,
            slots.committed_PN,
            slots.accepted_P,
            tokens_F,
            count_B,
            new_length_B,
            last_B,
            N=N,
            ROWS=triton.next_power_of_2(N),
        )
        return tokens_F, count_B, new_length_B, last_B
    tokens_BN, count_B = slots.committed_PN[slot_B], slots.accepted_P[slot_B] + 1
    last_B = tokens_BN.gather(1, count_B[:, None] - 1).squeeze(1)
    return tokens_BN.flatten(), count_B.to(torch.int32), length_B + count_B, last_B
