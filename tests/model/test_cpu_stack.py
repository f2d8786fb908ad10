"""The fused CPU layers and head against their definitions, and row invariance bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.model.adapter import Adapter
from idlm.model.attention import PagedAttention
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cpu import stack as cpu_stack
from idlm.model.cpu.head import greedy_chain
from idlm.model.decoder import Decoder
from tests.support.paged import block_table, contiguous, paged
from tests.support.random_model import random_adapter, random_config, random_decoder

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "odd sizes": {
        "hidden_size": 45,
        "intermediate_size": 70,
        "head_dim": 14,
        "num_heads": 6,
        "num_kv_heads": 2,
    },
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "qk norm, window": {"qk_norm": True, "sliding_window": 6},
    "wide": {"hidden_size": 160, "intermediate_size": 200, "head_dim": 64, "num_kv_heads": 1},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
LENGTH = 60


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    assert cpu_kernels.available(), "these tests need a C compiler"
    with torch.inference_mode():
        yield


@lru_cache
def model(shape: str, dtype: torch.dtype, rank: int = 3) -> tuple[Decoder, Adapter]:
    config = random_config(**SHAPES[shape])
    decoder = random_decoder(config)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in decoder.parameters():
            if parameter.dim() == 1:  # norms at 1 and biases at 0 would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return decoder.to(dtype), random_adapter(config, rank=rank).to(dtype)


class Cache:
    def __init__(self, decoder: Decoder, batch: int, dtype: torch.dtype) -> None:
        c = decoder.config
        shape = (2, c.num_layers, batch, c.num_kv_heads, LENGTH, c.head_dim)
        random = torch.Generator().manual_seed(3)
        self.table = block_table(batch, LENGTH)
        self.k, self.v = paged(torch.randn(shape, generator=random).to(dtype), self.table)

    def one(self, b: int) -> Cache:
        """The cache of request ``b`` alone, over the same memory."""
        cache = copy.copy(self)
        cache.table = self.table[b : b + 1]
        return cache

    def keys_and_values(self) -> torch.Tensor:
        return contiguous(torch.stack((self.k, self.v)), self.table, LENGTH)

    def forward(
        self,
        decoder: Decoder,
        tokens_BC: torch.Tensor,
        start_B: torch.Tensor,
        visible_BRR: torch.Tensor,
        adapter: Adapter | None,
    ) -> torch.Tensor:
        R = visible_BRR.shape[1]
        positions_BR = start_B[:, None] + torch.arange(R)
        window = decoder.config.sliding_window
        attention = PagedAttention(
            self.k, self.v, self.table, start_B, positions_BR, visible_BRR, window
        )
        hidden_BRH: torch.Tensor = decoder(
            tokens_BC,
            positions_BR,
            attention,
            num_masks=R - tokens_BC.shape[1],
            adapter=adapter,
        )
        return hidden_BRH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [0, 1, 12])
@pytest.mark.parametrize("shape", SHAPES)
def test_computes_what_the_definition_does(shape: str, dtype: torch.dtype, masks: int) -> None:
    decoder, adapter = model(shape, dtype)
    tokens_BC = torch.randint(0, 61, (3, 4), generator=torch.Generator().manual_seed(1))
    start_B, R = torch.tensor([0, 7, 30]), 4 + masks
    visible_BRR = torch.ones(3, R, R, dtype=torch.bool).tril()
    visible_BRR[1, 2:, 1] = False
    cache, reference = Cache(decoder, 3, dtype), Cache(decoder, 3, dtype)
    reference.k, reference.v = reference.k.double(), reference.v.double()
    actual = cache.forward(decoder, tokens_BC, start_B, visible_BRR, adapter)
    # fp64 takes the torch path.
    precise = copy.deepcopy(decoder).double(), copy.deepcopy(adapter).double().freeze()
    expected = reference.forward(precise[0], tokens_BC, start_B, visible_BRR, precise[1])
    for got, want in (
        (actual, expected),
        *zip(cache.keys_and_values(), reference.keys_and_values(), strict=True),
    ):
        error = (got.double() - want).norm() / want.norm()
        assert error < TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    clean=st.integers(1, 9),
    masks=st.integers(0, 14),
    batch=st.integers(1, 3),
    start=st.integers(0, 20),
    data=st.data(),
)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    shape: str,
    dtype: torch.dtype,
    clean: int,
    masks: int,
    batch: int,
    start: int,
    data: st.DataObject,
) -> None:
    """Clean rows of one request: alone and one by one, or with masks and other requests."""
    decoder, adapter = model(shape, dtype)
    R = clean + masks
    tokens_BC = torch.randint(0, 61, (batch, clean), generator=torch.Generator().manual_seed(start))
    starts_B = torch.tensor([start, 0, 33])[:batch]
    causal_BRR = torch.ones(batch, R, R, dtype=torch.bool).tril()
    together = Cache(decoder, batch, dtype).forward(
        decoder, tokens_BC, starts_B, causal_BRR, adapter if masks else None
    )
    alone = Cache(decoder, batch, dtype).one(0)
    one_11 = torch.ones(1, 1, 1, dtype=torch.bool)
    for c in range(clean):
        row = alone.forward(decoder, tokens_BC[:1, c : c + 1], starts_B[:1] + c, one_11, None)
        assert torch.equal(row[0, 0], together[0, c])


def test_mask_rows_do_not_depend_on_other_requests() -> None:
    decoder, adapter = model("llama", torch.bfloat16)
    tokens_BC = torch.randint(0, 61, (3, 4), generator=torch.Generator().manual_seed(1))
    start_B, visible_BRR = torch.tensor([3, 9, 20]), torch.ones(3, 16, 16, dtype=torch.bool).tril()
    together = Cache(decoder, 3, torch.bfloat16).forward(
        decoder, tokens_BC, start_B, visible_BRR, adapter
    )
    for b in range(3):
        cache, one = Cache(decoder, 3, torch.bfloat16).one(b), slice(b, b + 1)
        alone = cache.forward(decoder, tokens_BC[one], start_B[one], visible_BRR[one], adapter)
        assert torch.equal(alone[0], together[b])


def test_weights_that_move_are_found_again() -> None:
    decoder, adapter = copy.deepcopy(model("llama", torch.float32))
    tokens_BC = torch.arange(4)[None]
    causal_BRR = torch.ones(1, 7, 7, dtype=torch.bool).tril()

    def hidden(dtype: torch.dtype) -> torch.Tensor:
        cache = Cache(decoder, 1, dtype)
        return cache.forward(decoder, tokens_BC, torch.tensor([5]), causal_BRR, adapter)

    before = hidden(torch.float32)
    decoder.bfloat16()
    adapter.bfloat16()
    rounded = hidden(torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), before, atol=0.2, rtol=0.1)
    decoder.float()
    adapter.float()
    # The weights are rounded now, the arithmetic is not.
    assert not torch.equal(hidden(torch.float32), before)
    for parameter in [*decoder.parameters(), *adapter.parameters()]:
        parameter.data = parameter.data.clone()
    after = hidden(torch.float32)
    for layer in adapter.lora:
        for lora in layer.values():  # type: ignore[operator]
            lora.A.data = torch.zeros_like(lora.A)
    assert not torch.equal(hidden(torch.float32), after)


def test_an_adapter_of_another_dtype_is_refused() -> None:
    decoder, _ = model("llama", torch.bfloat16)
    _, adapter = model("llama", torch.float32)
    visible_BRR = torch.ones(1, 7, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"dense tensors of torch\.bfloat16"):
        Cache(decoder, 1, torch.bfloat16).forward(
            decoder, torch.arange(4)[None], torch.tensor([5]), visible_BRR, adapter
        )


def test_rows_must_fit_into_the_cache() -> None:
    decoder, _ = model("llama", torch.float32)
    visible_BRR = torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not fit into 4 blocks"):
        Cache(decoder, 1, torch.float32).forward(
            decoder, torch.arange(4)[None], torch.tensor([61]), visible_BRR, None
        )


def test_an_adapter_in_training_takes_the_torch_path() -> None:
    decoder, adapter = copy.deepcopy(model("llama", torch.float32))
    cache = Cache(decoder, 1, torch.float32)
    visible_BRR = torch.ones(1, 4, 4, dtype=torch.bool)
    attention = PagedAttention(
        cache.k, cache.v, cache.table, torch.tensor([0]), torch.arange(4)[None], visible_BRR
    )
    x_BRH = torch.zeros(1, 4, decoder.config.hidden_size)
    assert cpu_stack.takes(x_BRH, attention, adapter)
    adapter.requires_grad_(True)
    assert not cpu_stack.takes(x_BRH, attention, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "odd sizes"])
def test_greedy_chain_follows_the_head(shape: str, dtype: torch.dtype) -> None:
    decoder, adapter = model(shape, dtype)
    random = torch.Generator().manual_seed(2)
    hidden_BMH = torch.randn(3, 5, decoder.config.hidden_size, generator=random).to(dtype)
    ids_BMK = torch.stack([torch.randperm(61, generator=random)[:20] for _ in range(15)])
    ids_BMK, first_B = ids_BMK.view(3, 5, 20), torch.tensor([0, 60, 7])
    assert adapter.head is not None
    tokens_BM = greedy_chain(decoder, adapter.head, hidden_BMH, ids_BMK, first_B)
    # In fp64, teacher-forced with the chain's own tokens: they are the best, up to rounding.
    head, embed = copy.deepcopy(adapter.head).double(), decoder.embed.weight.double()
    state_BH = torch.zeros(3, decoder.config.hidden_size, dtype=torch.float64)
    projected_BMW, previous_B = head.project(hidden_BMH.double()), first_B
    for j in range(5):
        state_BH = head.step(projected_BMW[:, j], embed[previous_B], state_BH)
        logits_BV = (hidden_BMH[:, j].double() + state_BH) @ decoder.output_weight.double().T
        logits_BK = logits_BV.gather(1, ids_BMK[:, j])
        previous_B = tokens_BM[:, j]
        assert (ids_BMK[:, j] == previous_B[:, None]).any(1).all()
        chosen_B = logits_BV.gather(1, previous_B[:, None])[:, 0]
        spread_B = logits_BK.amax(1) - logits_BK.amin(1)
        assert (logits_BK.amax(1) - chosen_B <= TOLERANCE[dtype] * spread_B).all()
    assert len(tokens_BM.unique()) > 5


def test_greedy_chain_refuses_unknown_tokens() -> None:
    decoder, adapter = model("llama", torch.float32)
    assert adapter.head is not None
    hidden_BMH = torch.zeros(1, 2, decoder.config.hidden_size)
    good, bad = torch.zeros(1, 2, 3, dtype=torch.int64), torch.full((1, 2, 3), 61)
    for ids_BMK, first in ((bad, 0), (good, -1), (good, 61)):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            greedy_chain(decoder, adapter.head, hidden_BMH, ids_BMK, torch.tensor([first]))
