"""The ranks' shares of a LoRA, on SGLang's own layers: together they are the whole update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from torch import nn

from idlm.errors import UnsupportedModelError
from idlm.integrations.sglang.shares import share_of
from idlm.model.adapter import LoraLinear

pytestmark = pytest.mark.sglang

D, HIDDEN = 8, 24


def random_lora(inputs: int, outputs: tuple[int, ...], rank: int) -> LoraLinear:
    lora = LoraLinear(inputs, outputs, rank, scale=1.5)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    return lora.requires_grad_(False)


def update(A: torch.Tensor, B: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Each module's update of ``x`` ``[F, I]``."""
    down = F.linear(x, A).split(B[0].shape[1], dim=1)
    return [F.linear(z, b) for z, b in zip(down, B, strict=True)]


def whole(lora: LoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    return update(lora.A, [part * lora.scale for part in lora.B], x)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1, 4, 2), (2, 4, 2), (4, 4, 2), (4, 8, 2), (8, 8, 1), (3, 9, 3)]),
    rank=st.integers(1, 5),
)
def test_each_rank_has_the_rows_of_its_heads(shape: tuple[int, int, int], rank: int) -> None:
    ranks, heads, shared = shape
    lora = random_lora(HIDDEN, (heads * D, shared * D, shared * D), rank)
    # What the host's loader puts into a rank's rows, row by row: its number in the whole weight.
    numbers = [torch.arange(float(len(B)))[:, None].expand(-1, HIDDEN) for B in lora.B]
    x = torch.randn(5, HIDDEN)
    for number in range(ranks):
        layer = QKVParallelLinear(
            HIDDEN, D, heads, shared, bias=False, tp_rank=number, tp_size=ranks
        )
        for name, rows in zip("qkv", numbers, strict=True):
            layer.weight_loader(layer.weight, rows, name)
        held = layer.weight[:, 0].long().split(layer.output_partition_sizes)
        mine = update(*share_of(lora, layer), x)
        for got, all_rows, at in zip(mine, whole(lora, x), held, strict=True):
            torch.testing.assert_close(got, all_rows[:, at])


@settings(max_examples=20, deadline=None)
@given(ranks=st.sampled_from([1, 2, 4]), rank=st.integers(1, 5))
def test_gate_and_up_are_cut_each(ranks: int, rank: int) -> None:
    lora = random_lora(HIDDEN, (32, 32), rank)
    x = torch.randn(5, HIDDEN)
    shares = []
    for number in range(ranks):
        layer = MergedColumnParallelLinear(
            HIDDEN, [32, 32], bias=False, tp_rank=number, tp_size=ranks
        )
        shares.append(update(*share_of(lora, layer), x))
    for got, expected in zip(zip(*shares, strict=True), whole(lora, x), strict=True):
        torch.testing.assert_close(torch.cat(got, dim=1), expected)


@settings(max_examples=20, deadline=None)
@given(ranks=st.sampled_from([1, 2, 4]), rank=st.integers(1, 5))
def test_partial_sums_of_projections_cut_by_inputs(ranks: int, rank: int) -> None:
    lora = random_lora(32, (HIDDEN,), rank)
    x = torch.randn(5, 32)
    total = torch.zeros(5, HIDDEN)
    for number, part in enumerate(x.chunk(ranks, dim=1)):
        layer = RowParallelLinear(32, HIDDEN, bias=False, tp_rank=number, tp_size=ranks)
        total += update(*share_of(lora, layer), part)[0]
    torch.testing.assert_close(total, whole(lora, x)[0])


def test_layers_that_the_host_pads_are_refused() -> None:
    lora = random_lora(HIDDEN, (24, 24), 2)
    layer = MergedColumnParallelLinear(HIDDEN, [32, 32], bias=False, tp_rank=0, tp_size=1)
    with pytest.raises(UnsupportedModelError, match=r"with 32 outputs, the adapter is for 24"):
        share_of(lora, layer)
    row = RowParallelLinear(64, HIDDEN, bias=False, tp_rank=1, tp_size=2)
    with pytest.raises(UnsupportedModelError, match=r"with 64 inputs, the adapter is for 48"):
        share_of(random_lora(48, (HIDDEN,), 2), row)
