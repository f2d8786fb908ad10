"""The gated linear kernel, interpreted on the CPU or compiled on a GPU, against plain products."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
from idlm.model.gated_kernel import gated_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_and_expect(
    B: int, R: int, inputs: int, modules: tuple[int, ...], rank: int, masks: int, bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    outputs = sum(modules)
    x_BRI = torch.randn(B, R, inputs)
    weight_OI, B_OZ = torch.randn(outputs, inputs), torch.randn(outputs, rank)
    A_ZI = torch.randn(len(modules) * rank, inputs)
    bias_O = torch.randn(outputs) if bias else None
    y_BRO = gated_linear(
        x_BRI.to(DEVICE),
        weight_OI.to(DEVICE),
        None if bias_O is None else bias_O.to(DEVICE),
        A_ZI.to(DEVICE),
        B_OZ.to(DEVICE),
        modules,
        masks,
    )
    x = x_BRI.double()
    expected = torch.nn.functional.linear(
        x, weight_OI.double(), None if bias_O is None else bias_O.double()
    )
    update = [
        x @ A.double().T @ part.double().T
        for A, part in zip(A_ZI.split(rank), B_OZ.split(modules), strict=True)
    ]
    if masks:
        expected[:, R - masks :] += torch.cat(update, dim=-1)[:, R - masks :]
    return y_BRO.cpu(), expected


@pytest.mark.parametrize(
    ("B", "R", "inputs", "modules", "rank", "masks", "bias"),
    [
        (1, 7, 96, (64, 32, 32), 4, 3, False),
        (3, 16, 100, (64, 64), 24, 12, True),
        (2, 5, 64, (96,), 16, 5, False),
        (2, 4, 64, (64,), 8, 0, True),
        (9, 9, 32, (40,), 3, 4, False),
    ],
)
def test_masks_alone_get_the_update(
    B: int, R: int, inputs: int, modules: tuple[int, ...], rank: int, masks: int, bias: bool
) -> None:
    actual, expected = run_and_expect(B, R, inputs, modules, rank, masks, bias)
    assert (actual - expected).norm() / expected.norm() < 1e-5
