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
    from idlm.model.projection_kernel import add, begin, project

    token = begin(token_BH, head.token_norm.weight, head.token_norm.eps or 0.0)
    given_BW = project(token, head.from_token.weight, addend_NO=projected_BW)
    blocks: list[HeadBlock] = list(head.blocks)  # type: ignore[arg-type]
    norms = [block.state_norm for block in blocks]
    state = begin(state_BH, norms[0].weight, norms[0].eps or 0.0)
    following = [*norms[1:], norms[0]]
    parts = given_BW.chunk(len(blocks), -1)
    for block, part_BW, norm in zip(blocks, parts, following, strict=True):
        inner_BW = project(state, block.from_state.weight, addend_NO=part_BW, gated=True)
        state = add(state, inner_BW, block.out.weight, norm_H=norm.weight, eps=norm.eps or 0.0)
    return state.x_NH


def logits(hidden: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """``[..., H]`` to ``[..., V]``, fp32: rounded to bf16, the best two would often be equal."""
    rows_NH = hidden.reshape(-1, hidden.shape[-1])  # in one product, wherever the rows lie
    if hidden.dtype is torch.float32:
        logits_NV = rows_NH @ weight_VH.T
    else:
        logits_NV = torch.mm(rows_NH, weight_VH.T, out_dtype=torch.float32)
    return logits_NV.unflatten(0, hidden.shape[:-1])


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
