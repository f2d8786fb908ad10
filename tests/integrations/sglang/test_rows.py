"""The rows of SGLang's forwards: their kernels, in Triton's interpreter, against plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton.runtime.interpreter import GridExecutor

from idlm.integrations.sglang import rows
from idlm.integrations.sglang.slots import Slots
from idlm.model.cuda import stack as cuda_stack

pytestmark = pytest.mark.sglang

Result = TypeVar("Result")
CPU = torch.device("cpu")
SLOTS, V, H = 9, 50, 24


class Batch:
    """Requests in slots of their own, with drafts or without."""

    def __init__(self, M: int, drafted: list[bool]) -> None:
        self.M, B = M, len(drafted)
        self.slots = Slots(SLOTS, M, 4, CPU)
        self.slots.tokens_PM.copy_(torch.randint(V, (SLOTS, M)))
        self.slots.committed_PN.copy_(torch.randint(V, (SLOTS, M + 1)))
        self.slots.accepted_P.copy_(torch.randint(M + 1, (SLOTS,)))
        self.slot_B = torch.randperm(SLOTS)[:B]
        self.slots.count_P[self.slot_B] = torch.tensor(drafted) * M
        self.length_B = torch.randint(1, 30, (B,))
        self.pending_B = torch.randint(V, (B,))


def by_kernel(function: Callable[..., Result], *given: Any, **options: Any) -> Result:
    """What it gives where there is a GPU, by one launch."""
    launched, run = [], GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(self.fn.__name__)
        run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_stack, "usable", lambda device: True)
        patch.setattr(GridExecutor, "__call__", launch)
        result = function(*given, **options)
    assert launched == [function.__name__]
    return result


batches = st.builds(Batch, st.integers(1, 5), st.lists(st.booleans(), min_size=1, max_size=6))


@settings(max_examples=20)
@given(batch=batches)
def test_where_rows_are(batch: Batch) -> None:
    table_PS = torch.randperm(SLOTS * 64).view(SLOTS, 64).int()
    given = batch.pending_B, batch.length_B, batch.slot_B, table_PS, 2 * batch.M + 1
    for got, expected in zip(by_kernel(rows.locate, *given), rows.locate(*given), strict=True):
        assert got.dtype is expected.dtype and torch.equal(got, expected)


@settings(max_examples=20)
@given(batch=batches)
def test_what_goes_into_the_model(batch: Batch) -> None:
    M, W, B = batch.M, 2 * batch.M + 1, len(batch.slot_B)
    embed, mask_H = nn.Embedding(V, H).requires_grad_(False), torch.randn(H)
    ids_F = batch.pending_B.repeat_interleave(W)
    given = ids_F, batch.slot_B, batch.slots, embed, mask_H
    order_F, x_FH = rows.enter(*given, whole=True)
    for b, slot in enumerate(batch.slot_B.tolist()):
        count = int(batch.slots.count_P[slot])
        drafts = batch.slots.tokens_PM[slot, :count]
        clean = torch.cat((batch.pending_B[b : b + 1], drafts))
        x_WH = x_FH[b * W :][:W]
        assert torch.equal(x_WH[: count + 1], embed(clean))
        assert torch.equal(x_WH[count + 1 :][:M], mask_H.expand(M, -1))
    assert sorted(order_F.tolist()) == list(range(B * W))
    masks_F = rows.mask_rows(batch.slots.count_P[batch.slot_B], M)
    assert torch.equal(order_F[-B * M :], masks_F)
    assert bool((x_FH[masks_F] == mask_H).all())
    kernel_order_F, kernel_x_FH = by_kernel(rows.enter, *given, whole=True)
    assert torch.equal(kernel_order_F, order_F)
    seen_F = order_F < 0
    for b, slot in enumerate(batch.slot_B.tolist()):  # nothing sees the rows behind the masks
        seen_F[b * W :][: int(batch.slots.count_P[slot]) + M + 1] = True
    assert torch.equal(kernel_x_FH[seen_F], x_FH[seen_F])


@settings(max_examples=20)
@given(batch=batches)
def test_what_the_host_is_told(batch: Batch) -> None:
    slots, B, N = batch.slots, len(batch.slot_B), batch.M + 1
    given = batch.slot_B, batch.length_B, slots
    told = rows.report(*given)
    tokens_F, count_B, new_length_B, pending_B = told
    for b, slot in enumerate(batch.slot_B.tolist()):
        committed = slots.committed_PN[slot, : int(slots.accepted_P[slot]) + 1]
        assert int(count_B[b]) == len(committed)
        assert torch.equal(tokens_F.view(B, N)[b, : len(committed)], committed)
        assert int(pending_B[b]) == int(committed[-1])
        assert int(new_length_B[b]) == int(batch.length_B[b]) + len(committed)
    for got, expected in zip(by_kernel(rows.report, *given), told, strict=True):
        assert got.dtype is expected.dtype and torch.equal(got, expected)
