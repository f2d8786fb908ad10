"""The sampler head and the choice of candidates on CUDA, in few launches.

What the head computes is defined by `SamplerHead.step` and `Decoder.logits_at`; here norms, sums
and gates happen on the way into and out of the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from idlm.model.cuda_stack import usable

if TYPE_CHECKING:
    from idlm.model.adapter import HeadBlock, SamplerHead


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `step` and `score` can work with them: on CUDA, of one dtype."""
    return usable(x.device) and x.dtype is weight.dtype and not torch.is_autocast_enabled()


def step(
    head: SamplerHead, projected_BW: torch.Tensor, token_BH: torch.Tensor, state_BH: torch.Tensor
) -> torch.Tensor:
    """`SamplerHead.step`."""
    from idlm.model.projection_kernel import project

    given_BW = project(
        token_BH,
        head.from_token.weight,
        norm_I=head.token_norm.weight,
        eps=head.token_norm.eps or 0.0,
        addend_NO=projected_BW,
    )
    blocks: list[HeadBlock] = list(head.blocks)  # type: ignore[arg-type]
    for block, part_BW in zip(blocks, given_BW.chunk(len(blocks), -1), strict=True):
        inner_BW = project(
            state_BH,
            block.from_state.weight,
            norm_I=block.state_norm.weight,
            eps=block.state_norm.eps or 0.0,
            addend_NO=part_BW,
            gated=True,
        )
        state_BH = project(inner_BW, block.out.weight, addend_NO=state_BH)
    return state_BH


def score(hidden_BH: torch.Tensor, weight_VH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """``[B, K]``, fp32: the logits of the tokens ``ids`` of each row alone."""
    from idlm.model.score_kernel import score

    return score(hidden_BH, weight_VH, ids_BK)


def best_of_groups(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids ``[..., k]``: the likeliest token of each of ``k`` groups that share out the vocabulary.

    The likeliest of all is among them, and of the others those that no likelier one stands in the
    way of; a reduction finds them, where the exact ``k`` likeliest would have to be sorted out.
    """
    V = logits.shape[-1]
    depth = -(-V // k)
    padded = F.pad(logits, (0, depth * k - V), value=float("-inf"))
    best = padded.unflatten(-1, (depth, k)).argmax(dim=-2)
    return (best * k + torch.arange(k, device=logits.device)).clamp_(max=V - 1)
