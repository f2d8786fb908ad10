"""What follows from a verdict, in numbers: committed tokens, the new length, the block to use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from idlm.decoding.verify import Drafts, Verdict
from idlm.model.cuda import head as cuda_head


@dataclass
class Settled:
    """What follows from the verdict on ``B`` requests.

    Attributes:
        packed_BX: see `idlm.decoding.cycle.Outcome`.
        length_B: tokens in the cache, committed drafts among them, int64.
        proposed_B: ``M``, or 0 where no block follows the committed tokens, int64.
        rows_BM: rows of that block among all ``B * R`` rows of the forward, int64.
    """

    packed_BX: torch.Tensor
    length_B: torch.Tensor
    proposed_B: torch.Tensor
    rows_BM: torch.Tensor


def settle(
    verdict: Verdict,
    drafts: Drafts,
    length_B: torch.Tensor,
    block_after_NN: torch.Tensor,
    num_rows: int,
    block_size: int,
) -> Settled:
    """Draw the consequences of a verdict.

    Args:
        length_B: tokens in the cache before this forward, int64.
        block_after_NN: the mask block to use by drafts tested and drafts accepted, -1: none.
        num_rows: rows ``R`` of each request: the model's own, then blocks of ``M`` masks.
        block_size: ``M``.
    """
    accepted_B, next_B = verdict.accepted_B, verdict.next_B
    if cuda_head.usable(next_B.device):
        given = accepted_B, next_B, verdict.overlap_BM, drafts.tokens_BM, drafts.count_B, length_B
        return Settled(*cuda_head.settle(*given, block_after_NN, num_rows, block_size))
    B, N = len(next_B), drafts.tokens_BM.shape[1] + 1
    tokens_BN = torch.cat((drafts.tokens_BM, next_B[:, None]), dim=1)
    tokens_BN.scatter_(1, accepted_B[:, None], next_B[:, None])
    counts_B2 = torch.stack((accepted_B, drafts.count_B), dim=1)
    bits_BM = verdict.overlap_BM.float().contiguous().view(torch.int32).long()
    block_B = block_after_NN[drafts.count_B, accepted_B]
    request_B = torch.arange(B, device=next_B.device)
    first_B = request_B * num_rows + N + block_B.clamp(min=0) * block_size
    return Settled(
        torch.cat((tokens_BN, counts_B2, bits_BM), dim=1),
        length_B + 1 + accepted_B,
        torch.where(block_B >= 0, block_size, 0),
        first_B[:, None] + torch.arange(block_size, device=next_B.device),
    )
