"""The projection kernel, interpreted on the CPU or compiled on a GPU, against plain products."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
from idlm.model.projection_kernel import LowRank, project

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """A projection with all that may surround it, and its definition in fp64."""

    def __init__(
        self, B: int, R: int, inputs: int, modules: tuple[int, ...], rank: int, masks: int
    ) -> None:
        torch.manual_seed(0)
        outputs = sum(modules)
        self.rank, self.masks, self.modules = rank, masks, modules
        self.x_BRI = torch.randn(B, R, inputs)
        self.gate_up_BRI = torch.randn(B, R, 2 * inputs)
        self.weight_OI, self.B_OZ = torch.randn(outputs, inputs), torch.randn(outputs, rank)
        self.A_ZI = torch.randn(len(modules) * rank, inputs)
        self.bias_O, self.norm_I = torch.randn(outputs), torch.rand(inputs) + 0.5
        self.residual_BRO = torch.randn(B, R, outputs)

    def run(self, *, norm: bool, swiglu: bool, residual: bool, bias: bool) -> torch.Tensor:
        def there(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor | None:
            return tensor.to(DEVICE, copy=True) if wanted else None

        x = there(self.gate_up_BRI if swiglu else self.x_BRI)
        weight, A, B = there(self.weight_OI), there(self.A_ZI), there(self.B_OZ)
        assert x is not None and weight is not None and A is not None and B is not None
        return project(
            x,
            weight,
            there(self.bias_O, bias),
            low_rank=LowRank(A, B, self.modules),
            num_masks=self.masks,
            norm_I=there(self.norm_I, norm),
            eps=1e-5,
            swiglu=swiglu,
            residual_BRO=there(self.residual_BRO, residual),
        ).cpu()

    def expected(self, *, norm: bool, swiglu: bool, residual: bool, bias: bool) -> torch.Tensor:
        x = self.x_BRI.double()
        if swiglu:
            gate, up = self.gate_up_BRI.double().chunk(2, dim=-1)
            x = F.silu(gate) * up
        if norm:
            x = F.rms_norm(x, x.shape[-1:], self.norm_I.double(), 1e-5)
        y = x @ self.weight_OI.double().T
        pairs = zip(self.A_ZI.split(self.rank), self.B_OZ.split(self.modules), strict=True)
        update = torch.cat([x @ A.double().T @ B.double().T for A, B in pairs], dim=-1)
        first = y.shape[1] - self.masks
        y[:, first:] += update[:, first:]
        return y + bias * self.bias_O.double() + residual * self.residual_BRO.double()


SHAPES = [
    (1, 7, 96, (64, 32, 32), 4, 3),
    (3, 16, 100, (64, 64), 24, 12),
    (2, 5, 64, (96,), 16, 5),
    (2, 4, 64, (64,), 8, 0),
    (9, 9, 32, (40,), 3, 4),
]
SURROUNDINGS = [
    {"norm": False, "swiglu": False, "residual": False, "bias": False},
    {"norm": True, "swiglu": False, "residual": False, "bias": True},
    {"norm": False, "swiglu": True, "residual": True, "bias": False},
]


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize(("B", "R", "inputs", "modules", "rank", "masks"), SHAPES)
def test_is_the_projection_and_what_surrounds_it(
    B: int,
    R: int,
    inputs: int,
    modules: tuple[int, ...],
    rank: int,
    masks: int,
    surroundings: dict[str, bool],
) -> None:
    case = Case(B, R, inputs, modules, rank, masks)
    actual, expected = case.run(**surroundings), case.expected(**surroundings)
    assert (actual - expected).norm() / expected.norm() < 1e-5
