"""The rows of a forward: where they are, what goes into the model, and what it committed.

The linear layout (`decoding.layout`) with the same number of rows for each request: pending, drafts
and masks; without drafts, the masks stand right behind pending, and rows that nothing sees follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from idlm.integrations.sglang import row_kernels
from idlm.integrations.sglang.slots import Slots
from idlm.model.cuda import head as cuda_head


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
    if cuda_head.usable(slot_B.device):
        return row_kernels.locate(pending_B, length_B, slot_B, table_PS, width)
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
    if whole and cuda_head.usable(slot_B.device) and weight_VH.dtype is mask_H.dtype:
        return row_kernels.enter(ids_F, slot_B, slots.tokens_PM, slots.count_P, weight_VH, mask_H)
    tokens_BM, count_B = slots.tokens(slot_B), slots.count(slot_B)
    B, M = tokens_BM.shape
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
    if cuda_head.usable(slot_B.device):
        return row_kernels.report(slot_B, length_B, slots.committed_PN, slots.accepted_P)
    tokens_BN, count_B = slots.committed_PN[slot_B], slots.accepted_P[slot_B] + 1
    last_B = tokens_BN.gather(1, count_B[:, None] - 1).squeeze(1)
    return tokens_BN.flatten(), count_B.to(torch.int32), length_B + count_B, last_B
