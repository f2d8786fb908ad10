"""Cross-entropy of hidden states on target tokens, a chunk of rows at a time.

The ``[rows, vocabulary]`` logits exist for one chunk only, and the gradients with respect to the
hidden states and the output layer are computed along with the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from idlm.training.compilation import compiled
from idlm.training.divergence import CHUNK_ROWS


class CrossEntropy(NamedTuple):
    """Sum over rows, and what the rows say of their targets.

    Attributes:
        loss: ``sum_n -weight_n log q_n(target_n)``, scalar fp32; differentiable in the hidden
            states and the output weight.
        chance_N: ``q_n(target_n)``, fp32.
        agree_N: 1 where the target is the likeliest token, else 0, fp32.
    """

    loss: torch.Tensor
    chance_N: torch.Tensor
    agree_N: torch.Tensor


def cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    chunk_rows: int = CHUNK_ROWS,
) -> CrossEntropy:
    """Cross-entropy of ``q_n = softmax(hidden_n @ W.T)`` on ``targets_N`` (int64).

    Args:
        weights_N: what each row counts, fp32, not differentiable; rows of weight 0 have no target.
    """
    return CrossEntropy(
        *_CrossEntropy.apply(hidden_NH, weight_VH, targets_N, weights_N, chunk_rows)
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, ...]:
        chunk_of = compiled(_chunk) if hidden_NH.is_cuda else _chunk
        # Equal chunks: one compilation serves them all.
        parts = -(-hidden_NH.shape[0] // chunk_rows)
        # Many chunks are added up, which bf16 has too few digits for.
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        results = []
        for hidden, targets, weights in zip(
            hidden_NH.tensor_split(parts),
            targets_N.tensor_split(parts),
            weights_N.tensor_split(parts),
            strict=True,
        ):
            *result, part_VH = chunk_of(hidden, weight_VH, targets, weights)
            grad_VH += part_VH
            results.append(result)
        loss_N, chance_N, agree_N, grad_NH = (
            torch.cat(column) for column in zip(*results, strict=True)
        )
        ctx.save_for_backward(grad_NH, grad_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(chance_N, agree_N)
        return loss_N.sum(), chance_N, agree_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_NH, grad_VH = ctx.saved_tensors
        scale = grads[0]
        return (
            (grad_NH * scale).to(grad_NH.dtype),
            (grad_VH * scale).to(grad_VH.dtype),
            None,
            None,
            None,
        )


def _chunk(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Weighted loss, chance and agreement of some rows, and the gradients of the loss's sum."""
    logits_NV = F.linear(hidden_NH, weight_VH).float()
    log_q_NV = logits_NV - logits_NV.logsumexp(-1, keepdim=True)
    log_chance_N = log_q_NV.gather(1, targets_N[:, None]).squeeze(1)
    agree_N = (logits_NV.argmax(-1) == targets_N).float()
    vocabulary_V = torch.arange(weight_VH.shape[0], device=weight_VH.device)
    grad_NV = log_q_NV.exp() - (targets_N[:, None] == vocabulary_V).float()
    grad_NV = (grad_NV * weights_N[:, None]).to(weight_VH.dtype)
    return (
        -weights_N * log_chance_N,
        log_chance_N.exp(),
        agree_N,
        grad_NV @ weight_VH,
        grad_NV.T @ hidden_NH,
    )
