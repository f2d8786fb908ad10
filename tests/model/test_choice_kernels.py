"""Kernels that choose tokens, interpreted on the CPU or compiled on a GPU, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from idlm.model.choice_kernel import CHUNK, argmax, best_of_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 61, CHUNK, CHUNK + 1, 3 * CHUNK + 17]


def strided(B: int, R: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits with many ties, cut out of a larger tensor."""
    draw = torch.Generator().manual_seed(V)
    logits = torch.randint(-20, 20, (B, R + 2, V + 3), generator=draw).to(dtype)
    return logits.to(DEVICE)[:, 1 : R + 1, :V]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", SIZES)
def test_argmax_is_the_first_of_equals(V: int, dtype: torch.dtype) -> None:
    logits_BRV = strided(3, 2, V, dtype)
    # The first of equals, which torch does not promise on every device.
    best_BR1 = logits_BRV.amax(-1, keepdim=True)
    expected = (logits_BRV == best_BR1).int().cpu().argmax(-1)
    assert torch.equal(argmax(logits_BRV).cpu(), expected)


def test_argmax_of_nothing_finite_can_be_used() -> None:
    logits_BRV = torch.full((2, 1, CHUNK + 9), torch.nan, device=DEVICE)
    logits_BRV[1] = -torch.inf
    index_BR = argmax(logits_BRV)
    assert 0 <= int(index_BR[0, 0]) < CHUNK + 9
    assert int(index_BR[1, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "k"), [(61, 61), (61, 9), (100, 64), (2500, 70), (9, 1), (4096, 128)]
)
def test_the_best_of_each_group(V: int, k: int, dtype: torch.dtype) -> None:
    logits_BRV = strided(2, 3, V, dtype)
    depth = -(-V // k)
    padded = torch.nn.functional.pad(logits_BRV.float().cpu(), (0, depth * k - V), value=-torch.inf)
    groups = padded.unflatten(-1, (depth, k))
    first = (groups == groups.amax(-2, keepdim=True)).int().argmax(-2)
    expected = first * k + torch.arange(k)
    assert torch.equal(best_of_groups(logits_BRV, k).cpu(), expected)
