"""The chunked divergence against plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.training.divergence import divergence


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    chunk_rows=st.integers(1, 8),
    tv_weight=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient(rows: int, chunk_rows: int, tv_weight: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher, upstream = (
        torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (8, 8, 1)
    )
    weight = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    p, log_p = (f(teacher @ weight.T, dim=-1) for f in (torch.softmax, torch.log_softmax))
    q, log_q = (f(student @ weight.T, dim=-1) for f in (torch.softmax, torch.log_softmax))
    expected = (p * (log_p - log_q)).sum(-1) + tv_weight * 0.5 * (p - q).abs().sum(-1)
    (expected_grad,) = torch.autograd.grad((expected * upstream[:, 0]).sum(), student)

    result = divergence(student, teacher, weight, tv_weight, chunk_rows)
    (grad,) = torch.autograd.grad((result.loss_N * upstream[:, 0]).sum(), student)
    torch.testing.assert_close(result.loss_N, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(result.overlap_N, torch.minimum(p, q).sum(-1))
    assert torch.equal(result.agree_N.bool(), p.argmax(-1) == q.argmax(-1))


def test_equal_distributions() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    result = divergence(hidden, hidden, weight, tv_weight=1.0)
    assert result.loss_N.abs().max() < 1e-5
    assert result.overlap_N.min() > 1 - 1e-5
    assert result.agree_N.min() == 1


def test_bf16_hidden_states_give_fp32_losses() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8).bfloat16()
    weight = torch.randn(30, 8).bfloat16()
    student.requires_grad_()
    loss = divergence(student, teacher, weight).loss_N
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    wide = divergence(student.double(), teacher.double(), weight.double()).loss_N
    assert loss.tolist() == pytest.approx(wide.tolist(), rel=0.1)
