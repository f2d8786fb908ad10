"""The projection kernel, interpreted on the CPU or compiled on a GPU, against plain products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.projection import add, project
from idlm.model.cuda.rotation import Heads, rotate_and_append
from idlm.model.cuda.stream import begin
from idlm.model.cuda.tile import Tile
from tests.support.paged import cells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """A projection with all that may surround it, and its definition in fp64."""

    def __init__(
        self,
        rows: int,
        masks: int,
        inputs: int,
        modules: tuple[int, ...],
        rank: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).to(dtype)

        outputs = sum(modules)
        self.rank, self.first_mask, self.modules = rank, rows - masks, modules
        self.x_NI, self.weight_OI = random(rows, inputs), random(outputs, inputs) * inputs**-0.5
        self.A_ZI = random(len(modules) * rank, inputs) * inputs**-0.5
        self.B_OZ = random(outputs, rank)
        self.bias_O, self.norm_I = random(outputs), random(inputs)
        self.merged = False
        self.order_N: torch.Tensor | None = None

    def residual(self, gated: bool) -> torch.Tensor:
        width = len(self.bias_O) // (2 if gated else 1)
        draw = torch.Generator().manual_seed(1)
        return torch.randn(len(self.x_NI), width, generator=draw).to(self.x_NI.dtype)

    def run(self, *, norm: bool, gated: bool, residual: bool, bias: bool) -> torch.Tensor:
        def there(tensor: torch.Tensor, wanted: bool = True) -> torch.Tensor | None:
            return tensor.to(DEVICE, copy=True) if wanted else None

        x, weight = there(self.x_NI), there(self.weight_OI)
        A, B = there(self.A_ZI), there(self.B_OZ)
        assert x is not None and weight is not None and A is not None and B is not None
        given = begin(x, self.norm_I.to(DEVICE), 1e-5) if norm else x
        low_rank = LowRank(A, B, self.modules)
        if self.merged:
            low_rank = low_rank.merged(weight)
        update: dict[str, Any] = {"low_rank": low_rank, "first_mask": self.first_mask}
        if not residual:
            order = None if self.order_N is None else there(self.order_N)
            given_bias = there(self.bias_O, bias)
            return project(given, weight, given_bias, gated=gated, order_N=order, **update).cpu()
        assert not norm and not gated
        before = begin(self.residual(gated).to(DEVICE), self.bias_O.to(DEVICE), 1e-5)
        after = add(before, x, weight, norm_H=self.bias_O.to(DEVICE), eps=1e-5, **update)
        # What goes on is the norm of what is stored.
        expected = F.rms_norm(after.x_NH, after.x_NH.shape[-1:], self.bias_O.to(DEVICE), 1e-5)
        error = relative_error(after.normed().cpu(), expected.double().cpu())
        assert error < {4: 1e-5, 2: 1e-2}[x.itemsize]
        return after.x_NH.cpu()

    def expected(self, *, norm: bool, gated: bool, residual: bool, bias: bool) -> torch.Tensor:
        x, weight, A_ZI, B_OZ, bias_O, norm_I = (
            tensor.to(DEVICE).double()
            for tensor in (
                self.x_NI,
                self.weight_OI,
                self.A_ZI,
                self.B_OZ,
                self.bias_O,
                self.norm_I,
            )
        )
        if norm:
            x = F.rms_norm(x, x.shape[-1:], norm_I, 1e-5)
        y = x @ weight.T
        pairs = zip(A_ZI.split(self.rank), B_OZ.split(self.modules), strict=True)
        update = torch.cat([x @ A.T @ B.T for A, B in pairs], dim=-1)
        order_N = torch.arange(len(y)) if self.order_N is None else self.order_N
        masks = order_N[self.first_mask :].to(DEVICE)
        y[masks] += update[masks]
        y += bias * bias_O
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        y = y.cpu()
        return y + self.residual(gated).double() if residual else y


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


PLAIN = {"norm": False, "gated": False, "residual": False, "bias": False}


@pytest.mark.parametrize("surroundings", [PLAIN, PLAIN | {"norm": True, "bias": True}])
@pytest.mark.parametrize(
    ("rows", "masks", "inputs", "modules", "rank"),
    [
        (7, 3, 96, (64, 32, 32), 4),
        (48, 36, 100, (64, 64), 24),
        (10, 10, 64, (96,), 16),
        (8, 0, 64, (64,), 8),
        (81, 36, 32, (40,), 3),
    ],
)
def test_is_the_projection_and_its_update(
    rows: int,
    masks: int,
    inputs: int,
    modules: tuple[int, ...],
    rank: int,
    surroundings: dict[str, bool],
) -> None:
    case = Case(rows, masks, inputs, modules, rank)
    assert relative_error(case.run(**surroundings), case.expected(**surroundings)) < 1e-5


@pytest.mark.parametrize(("rows", "masks"), [(7, 3), (40, 30)])
@pytest.mark.parametrize(
    "surroundings",
    [
        PLAIN | {"residual": True},
        PLAIN | {"gated": True, "norm": True},
        PLAIN | {"gated": True, "norm": True, "bias": True},
    ],
)
def test_what_happens_on_the_way_out(rows: int, masks: int, surroundings: dict[str, bool]) -> None:
    case = Case(rows, masks, 64, (48, 48), 5)
    assert relative_error(case.run(**surroundings), case.expected(**surroundings)) < 1e-5


def test_a_norm_may_have_many_parts() -> None:
    """One for every tile of the product before it."""
    draw = torch.Generator().manual_seed(0)
    x_NH, y_NI, norm_H = (torch.randn(*n, generator=draw) for n in ((3, 1056), (3, 32), (1056,)))
    weight_HI, next_OH = (torch.randn(*n, generator=draw) / 8 for n in ((1056, 32), (32, 1056)))
    given = (x.to(DEVICE) for x in (x_NH, y_NI, weight_HI, norm_H, next_OH))
    x, y, weight, norm, following = given
    before = begin(x.clone(), norm, 1e-5)
    after = add(before, y, weight, norm_H=norm, eps=1e-5, tile=Tile(16, 16, 16, 2, 2))
    assert after.squares_NP.shape[1] == 66
    expected = F.rms_norm(x + y @ weight.T, (1056,), norm, 1e-5) @ following.T
    assert relative_error(project(after, following).cpu(), expected.double().cpu()) < 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("rows", "masks"), [(7, 3), (10, 10), (48, 36), (81, 36), (300, 130)])
@pytest.mark.parametrize("surroundings", [{}, {"norm": True, "gated": True}, {"residual": True}])
def test_mask_rows_with_weights_of_their_own(
    rows: int, masks: int, surroundings: dict[str, bool], dtype: torch.dtype
) -> None:
    case = Case(rows, masks, 64, (48, 48), 5, dtype)
    case.merged = True
    surroundings = PLAIN | surroundings
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    assert relative_error(case.run(**surroundings), case.expected(**surroundings)) < bound


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("rows", "masks"), [(7, 3), (21, 9), (48, 36), (133, 57), (300, 130)])
@pytest.mark.parametrize("surroundings", [{"bias": True}, {"norm": True, "gated": True}])
def test_mask_rows_may_lie_anywhere(
    rows: int, masks: int, surroundings: dict[str, bool], merged: bool
) -> None:
    case = Case(rows, masks, 64, (48, 48), 5)
    case.merged = merged
    case.order_N = torch.randperm(rows)
    surroundings = PLAIN | surroundings
    assert relative_error(case.run(**surroundings), case.expected(**surroundings)) < 1e-5


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "surroundings", [{"bias": True}, {"norm": True, "gated": True}, {"residual": True}]
)
def test_many_rows_are_fetched_as_boxes(surroundings: dict[str, bool], merged: bool) -> None:
    case = Case(130, 70, 96, (64, 64), 8, torch.float16)
    case.merged = merged
    surroundings = PLAIN | surroundings
    assert relative_error(case.run(**surroundings), case.expected(**surroundings)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["base", "low rank", "merged"])
@pytest.mark.parametrize(
    ("requests", "clean", "masks", "dim"), [(3, 1, 0, 64), (2, 0, 3, 64), (5, 4, 12, 80)]
)
def test_heads_go_where_they_belong(
    requests: int, clean: int, masks: int, dim: int, kind: str, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)

    queries, keys, inputs, R = 3, 1, 96, clean + masks
    modules = (queries * dim, keys * dim, keys * dim)
    weight_OI = random(sum(modules), inputs) * inputs**-0.5
    merged_OI = random(*weight_OI.shape) * inputs**-0.5 if kind == "merged" else None
    low_rank = LowRank(random(12, inputs) * 0.1, random(len(weight_OI), 4), modules, merged_OI)
    start_B = torch.randint(60, (requests,), generator=draw).to(DEVICE)
    table_BP = torch.randperm(6 * requests, generator=draw).view(requests, 6).int().to(DEVICE)
    half = dim // 2
    cos_ND, sin_ND = random(2, requests * R, half).repeat(1, 1, 2)
    sin_ND[:, :half] *= -1
    given = begin(random(requests * R, inputs), random(inputs), 1e-5)
    update: dict[str, Any] = {
        "low_rank": None if kind == "base" else low_rank,
        "first_mask": requests * clean,
    }
    after = [torch.zeros(2, 6 * requests, keys, 16, dim, dtype=dtype, device=DEVICE) for _ in "ab"]
    expected_NW = project(given, weight_OI, **update)
    angles = cos_ND, sin_ND, cells(table_BP, start_B, R, clean)
    rotate_and_append(expected_NW, Heads(*angles, *after[0].unbind()))
    actual_NW = project(given, weight_OI, heads=Heads(*angles, *after[1].unbind()), **update)
    width = modules[0]
    # Products of such numbers are exact in fp32 (with more rows, numpy adds them up otherwise).
    if dtype is torch.float16 and len(expected_NW) < 64:
        assert torch.equal(actual_NW[:, :width], expected_NW[:, :width])
        assert torch.equal(after[1], after[0])
    bound = 1e-5 if dtype is torch.float32 else 2e-3
    assert relative_error(actual_NW[:, :width], expected_NW[:, :width].double()) < bound
    assert relative_error(after[1], after[0].double()) < bound


def test_clean_rows_are_those_of_the_base_model() -> None:
    case = Case(40, 30, 64, (64, 32, 32), 4)
    with_update = case.run(**PLAIN)
    case.B_OZ[:] = 0
    assert torch.equal(with_update[:10], case.run(**PLAIN)[:10])
    assert not torch.equal(with_update[10:], case.run(**PLAIN)[10:])


BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "masks"), [(1, 0), (7, 3), (16, 12), (64, 48), (100, 40)])
@pytest.mark.parametrize(
    ("inputs", "modules", "rank"),
    [
        (576, (576, 192, 192), 24),
        (1536, (576,), 24),
        (4096, (4096, 1024, 1024), 128),
        (12288, (4096,), 128),
    ],
)
def test_real_shapes(
    rows: int,
    masks: int,
    inputs: int,
    modules: tuple[int, ...],
    rank: int,
    dtype: torch.dtype,
) -> None:
    case = Case(rows, masks, inputs, modules, rank, dtype)
    surroundings = PLAIN | {"norm": len(modules) > 1, "residual": len(modules) == 1}
    expected = case.expected(**surroundings)
    for _ in range(3):  # a race would show now and then only
        assert relative_error(case.run(**surroundings), expected) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "masks"), [(1, 0), (7, 3), (16, 12), (64, 48), (100, 40)])
@pytest.mark.parametrize(("inputs", "inner", "rank"), [(576, 1536, 24), (4096, 12288, 128)])
def test_real_gated_shapes(
    rows: int, masks: int, inputs: int, inner: int, rank: int, dtype: torch.dtype
) -> None:
    case = Case(rows, masks, inputs, (inner, inner), rank, dtype)
    surroundings = PLAIN | {"norm": True, "gated": True}
    error = relative_error(case.run(**surroundings), case.expected(**surroundings))
    assert error < BOUNDS[dtype]


@pytest.mark.gpu
def test_a_row_is_the_same_whatever_rows_are_beside_it() -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(torch.bfloat16).to(DEVICE)

    x_NI, residual_NH = random(1000, 1536), random(1000, 576)
    down_HI, norm_H, gate_up_OH = random(576, 1536) * 0.02, random(576), random(3072, 576) * 0.04
    o_HH = random(576, 576) * 0.04
    alone = None
    for rows in (1, 16, 32, 60, 128, 224, 512, 1000):
        stream = begin(residual_NH[:rows].contiguous(), norm_H, 1e-5)
        stream = add(stream, x_NI[:rows].contiguous(), down_HI, norm_H=norm_H, eps=1e-5)
        inner_NI, o_NH = project(stream, gate_up_OH, gated=True), project(stream, o_HH)
        first = torch.cat((stream.x_NH[0], inner_NI[0], stream.normed()[0], o_NH[0]))
        alone = first if alone is None else alone
        assert torch.equal(first, alone), rows
