"""Divergence of two next-token distributions given by hidden states, row by row.

The ``[rows, vocabulary]`` logits exist for one chunk of rows at a time, and the gradient with
respect to the student's hidden states is computed along with the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from idlm.training.compilation import compiled

# Rows of one chunk: enough to fill a GPU; the default batch and its quarter are multiples of it, so
# that one compilation serves both.
CHUNK_ROWS = 3584


class Divergence(NamedTuple):
    """Per row, fp32 (fp64 for fp64 inputs).

    Attributes:
        loss_N: ``KL(p || q) + tv_weight * TV(p, q)``; differentiable in the student.
        overlap_N: ``sum_x min(p, q)``, the chance that a draft is accepted at temperature 1.
        agree_N: 1 where both have the same argmax (acceptance at temperature 0), else 0.
    """

    loss_N: torch.Tensor
    overlap_N: torch.Tensor
    agree_N: torch.Tensor


def divergence(
    student_NH: torch.Tensor,
    teacher_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    tv_weight: float = 0.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Divergence:
    """Compare ``p = softmax(teacher @ W.T)`` with ``q = softmax(student @ W.T)``.

    Neither the teacher nor the output weight gets a gradient.
    """
    return Divergence(*_Divergence.apply(student_NH, teacher_NH, weight_VH, tv_weight, chunk_rows))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_NH: torch.Tensor,
        teacher_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        tv_weight: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, ...]:
        N = student_NH.shape[0]
        chunk_of = compiled(_chunk) if student_NH.is_cuda else _chunk
        # Equal chunks: one compilation serves them all.
        parts = -(-N // chunk_rows)
        results = [
            chunk_of(student, teacher, weight_VH, tv_weight, ctx.needs_input_grad[0])
            for student, teacher in zip(
                student_NH.tensor_split(parts), teacher_NH.tensor_split(parts), strict=True
            )
        ]
        loss_N, overlap_N, agree_N, grad_NH = (
            torch.cat(parts) for parts in zip(*results, strict=True)
        )
        ctx.save_for_backward(grad_NH)
        ctx.mark_non_differentiable(overlap_N, agree_N)
        return loss_N, overlap_N, agree_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_NH,) = ctx.saved_tensors
        return (grad_NH * grads[0][:, None]).to(grad_NH.dtype), None, None, None, None


def _chunk(
    student_NH: torch.Tensor,
    teacher_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    tv_weight: float,
    with_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, overlap, agreement and the loss's gradient w.r.t. the student, for some rows."""
    z_teacher_NV = _wide(F.linear(teacher_NH, weight_VH))
    z_student_NV = _wide(F.linear(student_NH, weight_VH))
    log_p_NV = z_teacher_NV - z_teacher_NV.logsumexp(-1, keepdim=True)
    log_q_NV = z_student_NV - z_student_NV.logsumexp(-1, keepdim=True)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    kl_N = (p_NV * (log_p_NV - log_q_NV)).sum(-1)
    overlap_N = torch.minimum(p_NV, q_NV).sum(-1)
    agree_N = (z_teacher_NV.argmax(-1) == z_student_NV.argmax(-1)).to(kl_N.dtype)
    loss_N = kl_N + tv_weight * (1.0 - overlap_N)
    if not with_grad:
        return loss_N, overlap_N, agree_N, loss_N.new_zeros(0)
    # d KL / d z = q - p. TV = 1 - sum min(p, q) grows with q_x where q_x > p_x only up to the
    # softmax's coupling: d TV / d z = q * (s - sum_x q_x s_x) with s = -[q < p].
    grad_NV = q_NV - p_NV
    if tv_weight:
        slope_NV = -(q_NV < p_NV).to(q_NV.dtype)
        mean_N1 = (q_NV * slope_NV).sum(-1, keepdim=True)
        grad_NV = grad_NV + tv_weight * q_NV * (slope_NV - mean_N1)
    grad_NH = grad_NV.to(weight_VH.dtype) @ weight_VH
    return loss_N, overlap_N, agree_N, grad_NH


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
