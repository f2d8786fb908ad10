"""The gated LoRA's GPU kernel, run by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from idlm.integrations.sglang.lora_kernel import ROWS, LoraKernel

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rank", "inputs", "outputs", "count"),
    [(24, 576, (576, 192, 192), 3), (3, 96, (64, 32), 20), (128, 200, (32,), ROWS + 1)],
)
@torch.no_grad()
def test_adds_the_update_to_its_rows_alone(
    dtype: torch.dtype, rank: int, inputs: int, outputs: tuple[int, ...], count: int
) -> None:
    A = torch.randn(len(outputs) * rank, inputs).to(dtype) * 0.05
    B = [torch.randn(out, rank).to(dtype) * 0.1 for out in outputs]
    x, y = torch.randn(50, inputs).to(dtype), torch.randn(50, sum(outputs)).to(dtype)
    rows = torch.randperm(50)[:count]
    expected = y.float()
    expected[rows] += x[rows].float() @ A.float().T @ torch.block_diag(*B).float().T
    others = [row for row in range(50) if row not in rows.tolist()]
    untouched = y[others].clone()
    LoraKernel(A, B).add_to(y, x, rows)
    torch.testing.assert_close(y.float(), expected, atol=4e-3, rtol=4e-3)
    assert torch.equal(y[others], untouched)


def test_takes_outputs_that_divide_into_tiles() -> None:
    assert LoraKernel.takes([torch.zeros(64, 4), torch.zeros(32, 4)])
    assert not LoraKernel.takes([torch.zeros(64, 4), torch.zeros(40, 4)])
