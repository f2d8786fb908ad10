"""What follows the library's products, interpreted on the CPU or compiled on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
from idlm.model.cuda import epilogue
from idlm.model.cuda.low_rank import LowRank, stack, stacked
from idlm.model.cuda.rotation import Heads, rotate_and_append
from idlm.model.cuda.stream import Stream, begin
from tests.support.paged import cells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


class Case:
    """A projection of ``rows`` and all around it; ``rank`` 0: without an update."""

    def __init__(
        self,
        rows: int,
        masks: int,
        inputs: int,
        modules: tuple[int, ...],
        rank: int,
        *,
        bias: bool = False,
        together: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        draw = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=draw, device=DEVICE) * scale).to(dtype)

        self.random, self.modules, self.rank = random, modules, rank
        self.first_mask, outputs = rows - masks, sum(modules)
        self.x_NI, self.norm_I = random(rows, inputs, scale=3.0), random(inputs)
        weight = nn.Parameter(random(outputs, inputs, scale=inputs**-0.5), requires_grad=False)
        A = nn.Parameter(random(len(modules) * rank, inputs, scale=inputs**-0.5), False)
        self.weight_OI, self.A_ZI = weight.detach().clone(), A.detach().clone()
        self.B_OZ = random(outputs, rank, scale=max(rank, 1) ** -0.5)
        self.bias_O = random(outputs) if bias else None
        if rank and together:
            stack(weight, A)
        self.base = weight
        self.low_rank = None
        if rank:
            self.low_rank = LowRank(A, self.B_OZ, modules, stacked_SI=stacked(weight, A))

    def product(self, x: torch.Tensor | Stream) -> epilogue.Product:
        return epilogue.product(x, self.base, self.bias_O, self.low_rank, self.first_mask)

    def behind_norm(self) -> tuple[epilogue.Product, Stream]:
        stream = begin(self.x_NI, self.norm_I, EPS)
        return self.product(stream), stream

    def expected(self, *, norm: bool) -> torch.Tensor:
        """The projection in fp64."""
        x_NI = self.x_NI.double()
        if norm:
            x_NI = F.rms_norm(x_NI, x_NI.shape[-1:], self.norm_I.double(), EPS)
        bias_O = None if self.bias_O is None else self.bias_O.double()
        y_NO = F.linear(x_NI, self.weight_OI.double(), bias_O)
        if self.rank:
            x_MI = x_NI[self.first_mask :]
            pairs = zip(
                self.A_ZI.double().split(self.rank),
                self.B_OZ.double().split(self.modules),
                strict=True,
            )
            y_NO[self.first_mask :] += torch.cat([x_MI @ A.T @ B.T for A, B in pairs], dim=1)
        return y_NO


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def check_gate(case: Case) -> None:
    gate, up = case.expected(norm=True).chunk(2, dim=-1)
    inner_NI = epilogue.gate(*case.behind_norm())
    assert error(inner_NI, F.silu(gate) * up) < BOUNDS[inner_NI.dtype]


def check_add(case: Case) -> None:
    (H,) = case.modules
    before_NH, norm_H = case.random(len(case.x_NI), H), case.random(H)
    stream = begin(before_NH, case.norm_I.new_ones(H), EPS)
    onward = epilogue.add(case.product(case.x_NI), stream, norm_H, EPS)
    bound = BOUNDS[before_NH.dtype]
    assert error(onward.x_NH, before_NH.double() + case.expected(norm=False)) < bound
    # What goes on is the norm of what is stored.
    normed_NH = F.rms_norm(onward.x_NH.double(), (H,), norm_H.double(), EPS)
    assert error(onward.normed(), normed_NH) < bound


CHECKS: dict[Callable[[Case], None], tuple[int, ...]] = {check_gate: (40, 40), check_add: (150,)}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("rows", "masks", "rank", "bias", "together"),
    [
        (5, 0, 0, False, False),
        (70, 0, 4, True, True),
        (70, 7, 3, True, True),
        (66, 66, 24, False, False),
        (130, 65, 150, False, True),
    ],
)
def test_is_the_projection_and_what_follows(
    check: Callable[[Case], None], rows: int, masks: int, rank: int, bias: bool, together: bool
) -> None:
    check(Case(rows, masks, 40, CHECKS[check], rank, bias=bias, together=together))


@settings(max_examples=6)
@given(st.integers(1, 140), st.integers(0, 140), st.sampled_from((5, 129)))
def test_any_number_of_rows_has_any_number_of_masks(rows: int, masks: int, outputs: int) -> None:
    check_gate(Case(rows, min(rows, masks), 24, (outputs, outputs), 20))
    check_add(Case(rows, min(rows, masks), 24, (outputs,), 20))


def check_rotate(
    requests: int,
    clean: int,
    masks: int,
    dim: int,
    rank: int,
    *,
    queries: int = 2,
    keys: int = 1,
    inputs: int = 48,
    norms: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    R = clean + masks
    modules = (queries * dim, keys * dim, keys * dim)
    shape = requests * R, requests * masks, inputs, modules, rank
    case = Case(*shape, bias=not norms, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    start_B = torch.randint(60, (requests,), generator=draw).to(DEVICE)
    table_BP = torch.randperm(6 * requests, generator=draw).view(requests, 6).int().to(DEVICE)
    cos_ND, sin_ND = case.random(2, requests * R, dim // 2).repeat(1, 1, 2)
    sin_ND[:, : dim // 2] *= -1
    head_norms = (case.random(dim), case.random(dim), EPS) if norms else (None, None, 0.0)
    caches = torch.zeros(2, 2, 6 * requests, keys, 16, dim, dtype=dtype, device=DEVICE)
    angles = cos_ND, sin_ND, cells(table_BP, start_B, R, clean)
    heads = Heads(*angles, *caches[0].unbind())
    actual_NW = epilogue.rotate(*case.behind_norm(), heads, *head_norms)
    expected_NW = case.expected(norm=True).to(dtype)
    rotate_and_append(expected_NW, Heads(*angles, *caches[1].unbind()), *head_norms)
    width = modules[0]
    bound = BOUNDS[dtype]
    assert error(actual_NW[:, :width], expected_NW[:, :width].double()) < bound
    assert error(caches[0], caches[1].double()) < bound
    touched = (caches != 0).any(-1)  # a number may be 0 by chance, not all of a head
    assert torch.equal(touched[0], touched[1])  # nobody else's cells


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    ("requests", "clean", "masks", "dim", "rank"),
    [(3, 1, 0, 64, 0), (2, 0, 3, 16, 5), (5, 4, 12, 80, 4)],
)
def test_heads_go_where_they_belong(
    requests: int, clean: int, masks: int, dim: int, rank: int, norms: bool
) -> None:
    check_rotate(requests, clean, masks, dim, rank, norms=norms)


def test_clean_rows_are_those_of_the_base_model() -> None:
    case = Case(80, 30, 64, (48, 48), 4)
    inner_NI = epilogue.gate(*case.behind_norm())
    case.B_OZ[:] = 0
    without_NI = epilogue.gate(*case.behind_norm())
    assert torch.equal(inner_NI[:50], without_NI[:50])
    assert (inner_NI[50:] != without_NI[50:]).any(1).all()


@pytest.mark.parametrize(("outputs", "ranks"), [(7, 3), (16, 16)])
def test_stacked_weights_are_held_once(outputs: int, ranks: int) -> None:
    base, A = (nn.Parameter(torch.randn(rows, 5), False) for rows in (outputs, ranks))
    kept = torch.cat((base, A)).clone()
    assert stacked(base, A) is None
    stack(base, A)
    whole_SI = stacked(base, A)
    assert whole_SI is not None and len(whole_SI) % 16 == 0
    assert torch.equal(whole_SI[: outputs + ranks], kept)
    assert torch.equal(torch.cat((base, A)), kept)
    whole_SI[:] = 1
    assert base.eq(1).all() and A.eq(1).all() and base.is_contiguous() and A.is_contiguous()
    assert stacked(nn.Parameter(base.clone(), False), A) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "masks"), [(65, 0), (112, 48), (256, 192), (1000, 700)])
def test_real_shapes(rows: int, masks: int, dtype: torch.dtype) -> None:
    check_gate(Case(rows, masks, 4096, (12288, 12288), 128, dtype=dtype))
    check_add(Case(rows, masks, 12288, (4096,), 128, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("clean", "masks"), [(5, 0), (4, 3), (4, 12)])
def test_real_heads(clean: int, masks: int, dtype: torch.dtype) -> None:
    check_rotate(16, clean, masks, 128, 128, queries=32, keys=8, inputs=4096, dtype=dtype)
